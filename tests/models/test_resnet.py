"""ResNet: torchvision's parameter counts, PyTorch's padding and groups, and batch norm in its three modes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kdjax.errors import UserError
from kdjax.models.norm import BatchNorm
from kdjax.models.resnet import BasicBlock, Bottleneck, ResNet, max_pool

# Published parameter counts of torchvision's models, less those of the classifier (C * 1000 + 1000).
COUNTS = {
    18: 11_689_512 - 513_000,
    34: 21_797_672 - 513_000,
    50: 25_557_032 - 2_049_000,
    101: 44_549_160 - 2_049_000,
}

# Likewise, by depth, groups and base width.
RESNEXT_COUNTS = {
    (50, 32, 4): 25_028_904 - 2_049_000,
    (101, 32, 8): 88_791_336 - 2_049_000,
    (101, 64, 4): 83_455_272 - 2_049_000,
}


def shapes(module, *args):
    return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), *args))


@pytest.mark.parametrize("depth", COUNTS)
def test_has_torchvisions_number_of_parameters(depth):
    maps, variables = shapes(ResNet(depth), jnp.zeros((1, 65, 130, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == COUNTS[depth]
    factor = 1 if depth < 50 else 4
    assert {name: x.shape for name, x in maps.items()} == {
        "c2": (1, 17, 33, 64 * factor),
        "c3": (1, 9, 17, 128 * factor),
        "c4": (1, 5, 9, 256 * factor),
        "c5": (1, 3, 5, 512 * factor),
    }


@pytest.mark.parametrize("variant", RESNEXT_COUNTS, ids=lambda variant: "-".join(map(str, variant)))
def test_resnext_has_torchvisions_number_of_parameters(variant):
    depth, groups, base_width = variant
    module = ResNet(depth, groups=groups, base_width=base_width)
    _, variables = shapes(module, jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == RESNEXT_COUNTS[variant]


def test_width_rounds_to_multiples_of_eight():
    maps, variables = shapes(ResNet(18, width=0.3), jnp.zeros((1, 32, 32, 3)))
    assert [x.shape[-1] for x in maps.values()] == [16, 40, 80, 152]
    assert variables["params"]["conv1"]["kernel"].shape == (7, 7, 3, 16)
    assert variables["params"]["layer1_0"]["conv1"]["kernel"].shape == (3, 3, 16, 16)
    assert "downsample_conv" not in variables["params"]["layer1_0"]
    assert variables["params"]["layer2_0"]["downsample_conv"]["kernel"].shape == (1, 1, 16, 40)


@pytest.mark.parametrize("size", [(6, 7), (5, 8), (1, 2)])
def test_max_pool_pads_one_pixel_of_minus_infinity(size):
    x = np.random.default_rng(0).normal(-5, 1, (2, *size, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = np.stack(
        [
            np.stack([padded[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, size[1], 2)], axis=1)
            for i in range(0, size[0], 2)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), expected)


def convolve(x, kernel, stride):
    """A convolution with PyTorch's symmetric padding, as a loop."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    rows, columns = (range(0, n - size + 1, stride) for n in x.shape[1:3])
    pixels = [[np.tensordot(x[:, i : i + size, j : j + size], kernel, 3) for j in columns] for i in rows]
    return np.moveaxis(np.array(pixels), 2, 0)


def test_strided_block_pads_as_pytorch_does():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 7, 3)).astype(np.float32)  # An even size: XLA's "SAME" would pad (0, 1).
    block = BasicBlock(channels=4, stride=2)
    variables = block.init(jax.random.key(0), x)
    p = jax.tree.map(np.asarray, variables["params"])
    # Fresh running statistics, mean 0 and variance 1, and fresh scale and bias: batch norm divides by sqrt(1 + 1e-5).
    norm = 1 / np.sqrt(1 + 1e-5)
    y = np.maximum(convolve(x, p["conv1"]["kernel"], 2) * norm, 0)
    y = convolve(y, p["conv2"]["kernel"], 1) * norm + convolve(x, p["downsample_conv"]["kernel"], 2) * norm
    np.testing.assert_allclose(block.apply(variables, x), np.maximum(y, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_bottleneck_strides_where_its_style_says_and_convolves_in_groups(style):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, 8)).astype(np.float32)
    block = Bottleneck(channels=16, stride=2, style=style, groups=2, base_width=8, epsilon=0.5)
    variables = block.init(jax.random.key(0), x)
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in variables["params"].items() if "kernel" in layer}
    # int(16 * 8 / 64) * 2 channels inside, in two groups of two.
    assert {name: kernel.shape for name, kernel in kernels.items()} == {
        "conv1": (1, 1, 8, 4),
        "conv2": (3, 3, 2, 4),
        "conv3": (1, 1, 4, 64),
        "downsample_conv": (1, 1, 8, 64),
    }
    norm = 1 / np.sqrt(1 + 0.5)
    strides = {"pytorch": (1, 2), "caffe": (2, 1)}[style]
    y = np.maximum(convolve(x, kernels["conv1"], strides[0]) * norm, 0)
    halves = [convolve(y[..., i : i + 2], kernels["conv2"][..., i : i + 2], strides[1]) for i in (0, 2)]
    y = np.maximum(np.concatenate(halves, axis=-1) * norm, 0)
    y = convolve(y, kernels["conv3"], 1) * norm + convolve(x, kernels["downsample_conv"], 2) * norm
    np.testing.assert_allclose(block.apply(variables, x), np.maximum(y, 0), rtol=1e-4, atol=1e-5)


def test_fields_reach_every_block():
    parts = []

    def note(call, args, kwargs, context):
        parts.append(context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(ResNet(50, style="caffe", groups=2, base_width=32, epsilon=0.5), jnp.zeros((1, 32, 32, 3)))
    assert {part.epsilon for part in parts if isinstance(part, BatchNorm)} == {0.5}
    in_groups = [part for part in parts if isinstance(part, nn.Conv) and part.feature_group_count == 2]
    assert [part.name for part in in_groups] == ["conv2"] * 16
    strided = [part.name for part in parts if isinstance(part, nn.Conv) and part.strides == 2]
    assert strided == ["conv1"] + ["conv1", "downsample_conv"] * 3


def test_deformable_convolutions_stand_in_c3_to_c5_and_add_their_offsets():
    plain = ResNet(101, groups=32, base_width=4)
    maps, variables = shapes(plain.clone(deformable=True), jnp.zeros((1, 65, 96, 3)))
    expected_maps, expected = shapes(plain, jnp.zeros((1, 65, 96, 3)))
    assert maps == expected_maps
    params, others = (flatten_dict(tree["params"], sep="/") for tree in (variables, expected))
    added = {path: params.pop(path).shape for path in params.keys() - others.keys()}
    assert params == others
    blocks = [(layer, block) for layer, count in ((2, 4), (3, 23), (4, 3)) for block in range(count)]
    kernels = {f"layer{at}_{block}/conv2/conv_offset/kernel": (3, 3, 64 * 2**at, 18) for at, block in blocks}
    biases = {f"layer{at}_{block}/conv2/conv_offset/bias": (18,) for at, block in blocks}
    assert added == kernels | biases


def convolutions(module, size=(65, 96)):
    """Shapes of the maps and variables, and name, stride, padding and dilation of every 3x3 convolution."""
    seen = []

    def note(call, args, kwargs, context):
        if isinstance(part := context.module, nn.Conv) and part.kernel_size == (3, 3):
            seen.append((part.name, part.strides or 1, part.padding, part.kernel_dilation))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        maps, variables = shapes(module, jnp.zeros((1, *size, 3)))
    return maps, variables, seen


@pytest.mark.parametrize(
    ("output_stride", "sizes", "dilations"),
    [
        (8, [(17, 24), (9, 12), (9, 12), (9, 12)], [1] * 8 + [2] * 5 + [2, 4, 4]),
        (16, [(17, 24), (9, 12), (5, 6), (5, 6)], [1] * 14 + [2, 2]),
    ],
)
def test_dilation_stands_for_strides_in_the_last_layers(output_stride, sizes, dilations):
    plain = ResNet(50)
    module = plain.clone(output_stride=output_stride)
    maps, variables, seen = convolutions(module)
    assert [x.shape[1:3] for x in maps.values()] == sizes
    assert list(module.strides.values()) == [4, 8, min(16, output_stride), output_stride]
    assert variables == shapes(plain, jnp.zeros((1, 65, 96, 3)))[1]
    assert [dilation for *_, dilation in seen] == [padding for *_, padding, _ in seen] == dilations


@pytest.mark.parametrize(
    ("dilate_second", "second"), [(False, [1] * 8), (True, [1, 1, 1, 1, 2, 2, 4, 4])], ids=["first", "both"]
)
def test_basic_blocks_dilate_the_first_or_both_convolutions(dilate_second, second):
    _, _, seen = convolutions(ResNet(18, output_stride=8, dilate_second=dilate_second))
    assert [dilation for name, *_, dilation in seen if name == "conv1"] == [1, 1, 1, 1, 1, 2, 2, 4]
    assert [dilation for name, *_, dilation in seen if name == "conv2"] == second


def test_a_dilated_block_skips_positions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 8, 4)).astype(np.float32)
    block = BasicBlock(channels=4, stride=1)
    variables = block.init(jax.random.key(0), x)
    # Of every second row and column it sees what the plain block sees of their map.
    dilated = block.clone(dilations=(2, 2)).apply(variables, x)
    np.testing.assert_allclose(dilated[:, 1::2, ::2], block.apply(variables, x[:, 1::2, ::2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stem", "widths"), [("v1c", [32, 32, 64]), ("v1s", [64, 64, 128])])
def test_deep_stems_have_three_convolutions(stem, widths):
    maps, variables, seen = convolutions(ResNet(18, stem=stem))
    assert [variables["params"][f"conv{index}"]["kernel"].shape[-1] for index in (1, 2, 3)] == widths
    assert [(name, stride) for name, stride, *_ in seen[:3]] == [("conv1", 2), ("conv2", 1), ("conv3", 1)]
    assert ("downsample_conv" in variables["params"]["layer1_0"]) == (stem == "v1s")
    assert maps["c2"].shape == (1, 17, 24, 64)


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_a_deformable_bottleneck_strides_where_its_style_says(style):
    x = np.random.default_rng(0).normal(size=(1, 5, 6, 8)).astype(np.float32)
    block = Bottleneck(channels=16, stride=2, style=style, groups=2, base_width=8)
    variables = block.init(jax.random.key(0), x)
    other = block.clone(deformable=True)
    params = variables["params"] | {"conv2": other.init(jax.random.key(1), x)["params"]["conv2"]}
    params["conv2"]["kernel"] = variables["params"]["conv2"]["kernel"]
    actual = other.apply(variables | {"params": params}, x)
    np.testing.assert_allclose(actual, block.apply(variables, x), rtol=1e-5, atol=1e-5)


@functools.cache
def tiny():
    block = BasicBlock(channels=3, stride=1)
    return block, jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_running_statistics_follow_the_batch_by_a_tenth_and_only_in_training():
    block, variables = tiny()
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    _, updated = block.apply(variables, x, True, mutable=["batch_stats"])
    y = convolve(x, np.asarray(variables["params"]["conv1"]["kernel"]), 1)
    np.testing.assert_allclose(updated["batch_stats"]["bn1"]["mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    var = 0.9 + 0.1 * y.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["bn1"]["var"], var, rtol=1e-4)
    _, untouched = block.apply(variables, x, False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, untouched["batch_stats"], variables["batch_stats"])


def test_statistics_are_those_of_all_devices():
    block, variables = tiny()
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    expected, stats = block.apply(variables, x, True, mutable=["batch_stats"])
    across = BasicBlock(channels=3, stride=1, axis_name="devices")
    run = jax.pmap(
        lambda x: across.apply(variables, x, True, mutable=["batch_stats"]), axis_name="devices", out_axes=(0, None)
    )
    output, updated = run(x[:, None])
    np.testing.assert_allclose(output[:, 0], expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), updated, stats)


def test_blocks_that_are_computed_anew_have_the_same_parameters_values_and_gradients():
    plain = ResNet(10, width=0.125)
    anew = plain.clone(remat=True)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 64, 64, 3)), jnp.float32)
    weights = jax.tree.map(lambda y: rng.normal(size=y.shape).astype(np.float32), shapes(plain, x)[0])
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    assert jax.eval_shape(anew.init, jax.random.key(0), x) == jax.eval_shape(lambda: variables)

    def loss(params, module):
        maps, updated = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return sum(jnp.sum(weights[name] * y) for name, y in maps.items()), updated

    def differentiated(module):
        return jax.jit(jax.value_and_grad(functools.partial(loss, module=module), has_aux=True))(variables["params"])

    (value, updated), gradient = differentiated(anew)
    (expected, expected_updated), expected_gradient = differentiated(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(
        *map(jax.tree.leaves, ((updated, gradient), (expected_updated, expected_gradient))), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())

    def kept(module):
        arrays = jax.eval_shape(lambda params: jax.vjp(lambda x: loss(x, module)[0], params)[1], variables["params"])
        return sum(x.size for x in jax.tree.leaves(arrays))

    assert kept(anew) < kept(plain)


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    module = ResNet(50, width=0.125, deformable=True, dtype=jnp.bfloat16)
    maps, variables = shapes(module, jnp.zeros((1, 32, 32, 3)))
    assert {x.dtype for x in maps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depth": 20}, "depth is 20; it must be one of 10, 18, 34, 50, 101"),
        ({"width": 0.0}, "it must be a number above 0"),
        ({"style": "tensorflow"}, "style is 'tensorflow'; it must be one of pytorch, caffe"),
        ({"epsilon": float("nan")}, "epsilon is nan; it must be a number of at least 0"),
        ({"depth": 18, "groups": 32}, "depth 18 has no bottlenecks"),
        ({"depth": 18, "deformable": True}, "depth 18 has no bottlenecks"),
        ({"deformable": 3}, "deformable is 3; it must be True or False"),
        ({"stem": "v1d"}, "stem is 'v1d'; it must be one of plain, v1c, v1s"),
        ({"output_stride": 4}, "output_stride is 4; it must be one of 32, 16, 8"),
        ({"deformable": True, "output_stride": 8}, "not dilated, as output_stride=8 asks for"),
        ({"groups": 0}, "groups is 0; it must be a whole number of at least 1"),
        ({"groups": 32, "base_width": 4, "width": 0.125}, "no channels"),
    ],
)
def test_refuses_what_it_cannot_build(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        ResNet(**fields)
