"""The feature pyramid: sizes, names, upsampling and the levels above P5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models.fpn import FPN, upsample

MAPS = {f"c{i}": jnp.asarray(np.random.default_rng(i).normal(size=(1, *size, 4 * i)), jnp.float32)
        for i, size in ((2, (21, 25)), (3, (11, 13)), (4, (6, 7)), (5, (3, 4)))}  # fmt: skip


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 7), (1, 1), (2, 1)])
def test_upsampling_takes_the_pixel_that_pytorch_takes(size):
    half = (-(-size[0] // 2), -(-size[1] // 2))
    x = np.random.default_rng(0).normal(size=(2, *half, 3)).astype(np.float32)
    # PyTorch: floor(i * input / output).
    rows, columns = (np.floor(np.arange(n) * np.float32(h / n)).astype(int) for n, h in zip(size, half, strict=True))
    np.testing.assert_array_equal(upsample(jnp.asarray(x), size), x[:, rows][:, :, columns])


def test_upsampling_refuses_other_sizes():
    with pytest.raises(ValueError, match="3x4 is not half of 8x8"):
        upsample(jnp.zeros((1, 3, 4, 2)), (8, 8))


@pytest.mark.parametrize(("low", "high"), [(3, 7), (2, 6), (4, 5)])
def test_levels_sizes_and_parameters(low, high):
    neck = FPN(channels=8, min_level=low, max_level=high)
    features, variables = jax.eval_shape(lambda: neck.init_with_output(jax.random.key(0), MAPS))
    sizes = {2: (21, 25), 3: (11, 13), 4: (6, 7), 5: (3, 4), 6: (2, 2), 7: (1, 1)}
    assert {name: x.shape for name, x in features.items()} == {
        f"p{level}": (1, *sizes[level], 8) for level in range(low, high + 1)
    }
    assert set(variables["params"]) == (
        {f"lateral_c{level}" for level in range(low, 6)}
        | {f"output_p{level}" for level in range(low, 6)}
        | {f"extra_p{level}" for level in range(6, high + 1)}
    )


def identity(channels):
    """Parameters that make every convolution hand on its input's first ``channels`` channels."""

    def centre(leaf):
        if leaf.ndim == 1:
            return jnp.zeros_like(leaf)
        middle = leaf.shape[0] // 2
        return jnp.zeros_like(leaf).at[middle, middle].set(jnp.eye(leaf.shape[2], leaf.shape[3]))

    return lambda variables: jax.tree.map(centre, variables)


@pytest.mark.parametrize("extra_from", ["c5", "p5"])
@pytest.mark.parametrize("extra_relu", [True, False])
def test_what_every_level_is_made_of(extra_from, extra_relu):
    neck = FPN(channels=8, extra_from=extra_from, extra_relu=extra_relu)
    variables = identity(8)(jax.jit(neck.init)(jax.random.key(0), MAPS))
    if extra_from == "p5":
        variables["params"]["output_p5"]["bias"] = jnp.full(8, 10.0)
    features = jax.jit(neck.apply)(variables, MAPS)
    c3, c4, c5 = (np.asarray(MAPS[name])[..., :8] for name in ("c3", "c4", "c5"))
    p4 = c4 + c5.repeat(2, 1).repeat(2, 2)[:, :6, :7]
    np.testing.assert_allclose(features["p4"], p4, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features["p3"], c3 + p4.repeat(2, 1).repeat(2, 2)[:, :11, :13], rtol=1e-5, atol=1e-5)
    p6 = c5[:, ::2, ::2] + (10 if extra_from == "p5" else 0)
    np.testing.assert_allclose(features["p6"], p6, rtol=1e-5, atol=1e-5)
    p7 = np.maximum(p6, 0) if extra_relu else p6
    np.testing.assert_allclose(features["p7"], p7[:, ::2, ::2], rtol=1e-5, atol=1e-5)


def test_pooled_levels_are_every_second_position_of_the_level_below():
    neck = FPN(channels=8, min_level=5, max_level=7, extra_from="pool")
    features, variables = jax.jit(neck.init_with_output)(jax.random.key(0), MAPS)
    assert set(variables["params"]) == {"lateral_c5", "output_p5"}
    np.testing.assert_array_equal(features["p6"], features["p5"][:, ::2, ::2])
    np.testing.assert_array_equal(features["p7"], features["p6"][:, ::2, ::2])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"min_level": 1}, "min_level is 1; it must be a whole number from 2 to 5"),
        ({"max_level": 4}, "max_level is 4; it must be a whole number of at least 5"),
        ({"extra_from": "p4"}, "extra_from is 'p4'; it must be one of c5, p5, pool"),
        ({"channels": 0}, "channels is 0; it must be a whole number of at least 1"),
    ],
)
def test_refuses_what_it_cannot_build(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        FPN(**fields)


@pytest.mark.parametrize(("xavier", "squared"), [(False, 3 / 64), (True, 6 / (64 + 16))])
def test_kernels_start_as_in_the_program_that_is_meant(xavier, squared):
    maps = {f"c{level}": jnp.zeros((1, 32 >> level, 32 >> level, 64)) for level in range(3, 6)}
    params = FPN(16, xavier=xavier).init(jax.random.key(0), maps)["params"]
    lateral, output = params["lateral_c3"]["kernel"], params["output_p3"]["kernel"]
    assert np.abs(lateral).max() == pytest.approx(squared**0.5, rel=0.02)
    # As wide on both sides: no difference.
    assert np.abs(output).max() == pytest.approx((3 / 144) ** 0.5, rel=0.02)
