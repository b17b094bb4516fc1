"""What every segmenter promises, on the dict of models: a new one is tested by being there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax import operations
from kdjax.errors import UserError
from kdjax.models import MODELS, build_model, class_outputs, model_class, with_classes
from kdjax.models.segmentation import adaptive_pool, window_places
from kdjax.types import IGNORED, Labels, Logits, Sampling
from tests.slow import slow_but

CLASSES = 3
CANVAS = (64, 72)
SIZE = np.array([[64, 72], [40, 56], [64, 50], [33, 72]], np.int32)
"""Of four images."""
SEGMENTERS = [name for name in MODELS if model_class(name).task == "segmentation"]
EVERY = pytest.mark.parametrize("name", slow_but({"pspnet", "deeplabv3"}, SEGMENTERS))
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, *CANVAS, 3), np.uint8)
KEYS = jax.random.split(jax.random.key(0), 4)


def truth() -> Labels:
    """Half of the image is of one class, the rest of others; nothing is labelled in the padding, nor in image 1."""
    classes = np.where(np.arange(CANVAS[1]) < 36, 0, RNG.integers(0, CLASSES, (4, *CANVAS))).astype(np.uint8)
    rows, columns = np.arange(CANVAS[0])[None, :, None], np.arange(CANVAS[1])[None, None]
    inside = (rows < SIZE[:, :1, None]) & (columns < SIZE[:, 1:, None]) & (np.arange(4) != 1)[:, None, None]
    return Labels(np.where(inside, classes, IGNORED).astype(np.uint8))


TRUTH = truth()


@functools.cache
def made(name: str, **head):
    """A tiny segmenter and its first variables."""
    tiny = model_class(name).tiny
    module = build_model({"name": name, **tiny, "head": tiny["head"] | head}, CLASSES)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *CANVAS, 3)))


def learn(module, variables, images, size, targets, keys):
    """Terms and gradient of a step, and the new statistics."""

    def total(params):
        given = {**variables, "params": params}
        x = module.preprocess(images, size)
        _, logits, statistics = operations.forward(module, given, x, size, Sampling(targets, keys))
        terms = module.loss(logits, targets, size)
        return sum(terms.values()), (terms, statistics)

    (_, (terms, statistics)), gradient = jax.value_and_grad(total, has_aux=True)(variables["params"])
    if module.axis_name:
        terms, gradient = jax.lax.pmean((terms, gradient), module.axis_name)
    return terms, gradient, statistics


def logits_of(module, variables, images, size):
    return jax.jit(functools.partial(module.apply, method="pixel_logits"))(variables, images, size)


LEARNING = pytest.mark.parametrize(
    ("name", "head"),
    [
        ("pspnet", {"average_over": "all"}),
        pytest.param("deeplabv3", {"average_over": "labelled", "projection": True}, marks=pytest.mark.slow),
        pytest.param("deeplabv3_mobilenet_v2", {"average_over": "all"}, marks=pytest.mark.slow),
    ],
    ids=SEGMENTERS,
)


@LEARNING
def test_two_devices_learn_what_one_does_and_every_parameter_moves(name, head):
    """Image 1 has no labelled pixel, so that the devices have unequal numbers of them.

    In float64, so that no last bit opens or closes a ReLU, which batch norm of few values makes much of.
    """
    module, variables = made(name, **head)
    with jax.enable_x64(True):
        both = {"dtype": jnp.float64}
        module = module.clone(**both, backbone=module.backbone.clone(**both))
        compare_devices(module, jax.tree.map(lambda x: np.asarray(x, np.float64), variables))


def compare_devices(module, variables):
    terms, gradient, statistics = jax.jit(functools.partial(learn, module))(variables, IMAGES, SIZE, TRUTH, KEYS)
    assert set(terms) == set(module.terms) == {"seg", "auxiliary"}
    assert all(np.isfinite(value) and value > 0 for value in terms.values())
    across = module.clone(axis_name="devices", backbone=module.backbone.clone(axis_name="devices"))
    step = jax.pmap(
        functools.partial(learn, across),
        "devices",
        in_axes=(None, 0, 0, 0, 0),
        devices=jax.devices()[:2],
        out_axes=None,
    )
    halves = jax.tree.map(lambda x: np.reshape(x, (2, 2, *x.shape[1:])), (IMAGES, SIZE, TRUTH))
    shared, parts, updated = step(variables, *halves, KEYS.reshape(2, 2))
    pairs = zip(*map(jax.tree.leaves, ((shared, updated), (terms, statistics))), strict=True)
    for actual, wanted in pairs:
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
    parts = flatten_dict(parts, sep="/")
    for path, wanted in flatten_dict(gradient, sep="/").items():
        assert np.any(wanted), f"{path} gets no gradient"
        # Losses are float32; and a bias that the next batch norm takes out again has rounding for a gradient.
        assert np.linalg.norm(parts[path] - wanted) <= 1e-5 * np.linalg.norm(wanted) + 1e-9, path


@EVERY
def test_what_is_not_labelled_has_no_loss(name):
    module, _ = made(name)
    logits = Logits(*(jnp.asarray(RNG.normal(0, 3, (4, 8, 9, CLASSES)), jnp.float32) for _ in range(2)))
    nothing = Labels(np.full_like(TRUTH.classes, IGNORED))
    for average_over in ("all", "labelled"):
        loss = module.clone(average_over=average_over).loss
        terms, gradient = jax.value_and_grad(lambda x, loss=loss: sum(loss(x, nothing, SIZE).values()))(logits)
        assert terms == 0
        assert not any(np.any(x) for x in jax.tree.leaves(gradient))


@EVERY
def test_the_loss_falls_towards_the_truth(name):
    module, _ = made(name)
    coarse = RNG.integers(0, CLASSES, (1, 8, 9))
    classes = np.repeat(np.repeat(coarse, 8, 1), 8, 2).astype(np.uint8)
    sure = jax.nn.one_hot(coarse, CLASSES)
    losses = [float(module.loss(Logits(sure * s, None), Labels(classes), SIZE[:1])["seg"]) for s in (0, 1, 4)]
    assert losses[0] == pytest.approx(np.log(CLASSES), rel=1e-5)
    assert losses[0] > losses[1] > losses[2]


@EVERY
def test_a_class_for_every_pixel(name):
    module, variables = made(name)
    found = jax.jit(functools.partial(operations.predict, module))(variables, IMAGES[:2], SIZE[:2])
    assert (found.shape, found.dtype) == ((2, *CANVAS), np.uint8)
    assert found.max() < CLASSES


@EVERY
def test_classes_in_another_order_are_found_under_their_new_labels(name):
    config, order = {"name": name, **model_class(name).tiny}, [2, 0, 1]
    module, variables = made(name)
    arrays = flatten_dict(variables, sep="/")
    told_apart = {path: arrays[path] + RNG.normal(0, 1, arrays[path].shape) for path in class_outputs(config)}
    assert {path.split("/")[-2] for path in told_apart} == set(module.class_axis)
    variables = unflatten_dict({**arrays, **told_apart}, sep="/")
    images = module.preprocess(IMAGES[:1], SIZE[:1])
    before, after = (
        logits_of(module, x, images, SIZE[:1]) for x in (variables, with_classes(config, variables, order))
    )
    np.testing.assert_allclose(after, before[:, np.array(order)], rtol=1e-4, atol=1e-4)


@EVERY
def test_features_are_named_with_their_strides_and_heads_are_what_calling_gives(name):
    module, variables = made(name)
    images = module.preprocess(IMAGES, SIZE)
    features, logits = jax.jit(module.apply)(variables, images, SIZE)
    assert features.keys() == module.strides.keys() == {"c2", "c3", "c4", "c5", "decode", "auxiliary"}
    for level, x in features.items():
        assert x.shape[1:3] == tuple(-(-side // module.strides[level]) for side in CANVAS)
    assert set(variables["params"]) == {"backbone", "head"}
    alone = jax.jit(functools.partial(operations.features, module))(variables, images)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), alone, features)
    as_teacher = operations.heads_at(module, variables, features, logits, SIZE)
    assert logits.main.shape == (4, 8, 9, CLASSES)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), as_teacher, logits)


@EVERY
def test_bfloat16_computes_in_bfloat16_on_float32_parameters(name):
    config = {"name": name, **model_class(name).tiny}
    module = build_model(config, CLASSES, dtype=jnp.bfloat16)
    (features, logits), variables = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), jnp.zeros((1, *CANVAS, 3)))
    )
    assert {x.dtype for x in jax.tree.leaves((features, logits))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    terms = jax.eval_shape(lambda x: module.loss(x, Labels(TRUTH.classes[:1]), SIZE[:1]), logits)
    assert {(x.shape, x.dtype) for x in terms.values()} == {((), jnp.dtype(jnp.float32))}


@pytest.mark.parametrize("drop", ["channels", "elements"])
def test_dropout_is_of_the_image_and_in_training_alone(drop):
    module, variables = made("pspnet", drop=drop, dropout=0.5)
    ones = {"decode": jnp.ones((4, 8, 9, 16)), "auxiliary": jnp.ones((4, 8, 9, 8))}
    variables = jax.tree.map(jnp.zeros_like, variables)
    variables["params"]["head"]["classifier"]["kernel"] = jnp.eye(16, CLASSES).reshape(1, 1, 16, CLASSES)
    seen = operations.heads(module, variables, ones, SIZE, Sampling(None, KEYS)).main
    assert set(np.unique(seen)) == {0, 2}
    per_channel = np.ptp(seen, axis=(1, 2))
    assert not per_channel.any() if drop == "channels" else per_channel.all()
    assert not np.array_equal(seen[0], seen[1])
    third = jax.tree.map(lambda x: x[2:3], ones)
    np.testing.assert_array_equal(
        operations.heads(module, variables, third, SIZE[2:3], Sampling(None, KEYS[2:3])).main, seen[2:3]
    )
    without = operations.heads_at(module, variables, ones, None, SIZE)
    assert set(np.unique(without.main)) == {1}


def test_a_projection_drops_half_of_what_it_makes():
    module, variables = made("deeplabv3", projection=True, drop="elements", dropout=0.0, auxiliary_channels=0)
    images = module.preprocess(IMAGES, SIZE)
    still, _ = module.apply(variables, images, SIZE)
    (first, _), (again, _), (other, _) = (
        module.apply(variables, images, SIZE, sampling=Sampling(None, keys))
        for keys in (KEYS, KEYS, jax.random.split(jax.random.key(1), 4))
    )
    np.testing.assert_array_equal(first["decode"], again["decode"])
    assert not np.allclose(first["decode"], other["decode"])
    assert not np.allclose(first["decode"], still["decode"])
    np.testing.assert_array_equal(first["c5"], still["c5"])


def test_windows_are_averaged_where_they_overlap():
    module, variables = made("pspnet")
    images, whole = module.preprocess(IMAGES[:1], SIZE[:1]), functools.partial(logits_of, module, variables)
    sliding = logits_of(module.clone(window=(40, 48), window_stride=(24, 30)), variables, images, SIZE[:1])
    total, count = np.zeros((1, CLASSES, *CANVAS)), np.zeros(CANVAS)
    for top in (0, 24):
        for left in (0, 24):
            part = np.s_[top : top + 40, left : left + 48]
            total[:, :, *part] += whole(images[:, *part], np.array([[40, 48]]))
            count[part] += 1
    np.testing.assert_allclose(sliding, total / count, rtol=1e-4, atol=1e-5)
    at_once = logits_of(module.clone(window=(500, 500)), variables, images, SIZE[:1])
    np.testing.assert_allclose(at_once, whole(images, SIZE[:1]), rtol=1e-4, atol=1e-5)


def test_windows_end_with_the_image_whatever_it_is_padded_to():
    module, variables = made("pspnet", window=(32, 32), window_stride=(20, 20))
    padded = module.preprocess(IMAGES[1:2], SIZE[1:2])
    height, width = SIZE[1]
    cut = logits_of(module, variables, padded[:, :height, :width], SIZE[1:2])
    np.testing.assert_allclose(
        logits_of(module, variables, padded, SIZE[1:2])[:, :, :height, :width], cut, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("canvas", "window", "stride"), [(50, 20, 15), (50, 20, 20), (20, 20, 7), (41, 20, 20)])
def test_windows_leave_nothing_out(canvas, window, stride):
    sizes = np.stack([np.arange(1, canvas + 1)] * 2, axis=1)
    starts, valid = window_places((canvas, canvas), jnp.asarray(sizes), (window, window), (stride, stride))
    for image, (size, _) in enumerate(sizes):
        rows = sorted({int(start[0]) for start in starts[valid[:, image], image]})
        expected = [min(row, max(size - window, 0)) for row in range(0, size, stride)]
        assert rows == sorted(set(expected[: 1 + max(-(-(size - window) // stride), 0)]))
        assert rows[-1] + window >= size


@pytest.mark.parametrize(("size", "cells"), [((8, 10), 1), ((8, 10), 3), ((7, 5), 6), ((4, 12), 6)])
def test_pooling_cells_are_pytorchs(size, cells):
    x = RNG.normal(size=(2, *size, 3)).astype(np.float32)

    def bounds(index, side):
        return slice(index * side // cells, -(-(index + 1) * side // cells))

    expected = [[x[:, bounds(i, size[0]), bounds(j, size[1])].mean((1, 2)) for j in range(cells)] for i in range(cells)]
    np.testing.assert_allclose(
        adaptive_pool(jnp.asarray(x), cells), np.moveaxis(np.array(expected), 2, 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ({"window_stride": (8, 8)}, r"window_stride is \(8, 8\), but there is no window"),
        ({"window": (16, 16), "window_stride": (8, 20)}, "leaves out pixels between windows"),
        ({"window": (16,)}, r"window is \(16,\); it must be \(\) or height and width"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a number of at least 0 and below 1"),
        ({"drop": "images"}, "drop is 'images'; it must be one of channels, elements"),
        ({"average_over": "some"}, "average_over is 'some'; it must be one of all, labelled"),
        ({"dilations": ()}, r"dilations is \(\); it must be a tuple of whole numbers of at least 1"),
    ],
)
def test_refuses_what_it_cannot_be(head, sentence):
    with pytest.raises(UserError, match=sentence):
        build_model({"name": "deeplabv3", "head": head}, CLASSES)


def test_refuses_more_classes_than_an_index_map_has():
    with pytest.raises(UserError, match="at most 255 classes apart, and these are 300"):
        build_model({"name": "pspnet"}, 300)
