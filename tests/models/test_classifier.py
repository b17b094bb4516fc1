"""What every classifier promises, on the dict of models."""

import ast
import functools
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import operations
from kdjax.models import MODELS, build_model, class_outputs, model_class, with_classes
from kdjax.types import Labels, Logits, Model, Sampling
from tests.slow import slow_but

CLASSIFIERS = [name for name in MODELS if model_class(name).task == "classification"]
EVERY = pytest.mark.parametrize("name", slow_but({"resnet_classifier", "mobilenet_v1"}, CLASSIFIERS))
CLASSES = 3
SIZE = np.array([[64, 64], [40, 64]], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
LABELS = Labels(np.array([2, 0], np.int32))


def tiny(name, **head):
    config = {section: dict(fields) for section, fields in model_class(name).tiny.items()}
    return {"name": name, **config, "head": head}


@functools.cache
def model(name, **head):
    return build_model(tiny(name, **head), CLASSES)


@functools.cache
def variables(name):
    """Whose linear layer is no longer as good as zero."""
    drawn = jax.jit(model(name).init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    head = {"kernel": drawn["params"]["head"]["kernel"] * 30, "bias": np.arange(CLASSES, dtype=np.float32)}
    return {**drawn, "params": drawn["params"] | {"head": head}}


@functools.cache
def predict(name):
    return jax.jit(functools.partial(model(name).apply, method="predict"))


@EVERY
def test_maps_have_the_strides_that_are_stated_and_parts_their_names(name):
    (maps, predictions), shapes = jax.eval_shape(
        lambda: model(name).init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3)))
    )
    assert list(maps) == list(model(name).strides) == ["c2", "c3", "c4", "c5"]
    for level, x in maps.items():
        assert x.shape[1:3] == (64 // model(name).strides[level], 96 // model(name).strides[level])
    assert (predictions.main.shape, predictions.auxiliary) == ((2, CLASSES), None)
    assert set(shapes["params"]) == {"backbone", "head"}


@EVERY
def test_what_it_says_are_probabilities_of_the_image_without_its_padding(name):
    said = predict(name)(variables(name), IMAGES, SIZE)
    assert (said.shape, said.dtype) == ((2, CLASSES), jnp.float32)
    np.testing.assert_allclose(said.sum(axis=1), 1, rtol=1e-5)
    painted = IMAGES.copy()
    painted[1, 40:] = 77
    np.testing.assert_array_equal(predict(name)(variables(name), painted, SIZE), said)


@EVERY
def test_the_mean_is_over_the_positions_inside_the_image(name):
    """What stands on a larger array is judged by as many positions as without it."""
    features = {"c5": np.random.default_rng(1).normal(size=(2, 2, 2, 4)).astype(np.float32)}
    larger = {"c5": np.pad(features["c5"], ((0, 0), (0, 1), (0, 2), (0, 0)), constant_values=9.0)}
    head = {"head": {"kernel": np.eye(4, CLASSES, dtype=np.float32), "bias": np.zeros(CLASSES, np.float32)}}
    logits, again = (
        model(name).apply({"params": head}, maps, np.array([[64, 64], [64, 32]]), method="heads").main
        for maps in (features, larger)
    )
    np.testing.assert_allclose(again, logits, rtol=1e-6)
    np.testing.assert_allclose(logits[0], features["c5"][0].mean(axis=(0, 1))[:CLASSES], rtol=1e-5)
    np.testing.assert_allclose(logits[1], features["c5"][1, :, :1].mean(axis=(0, 1))[:CLASSES], rtol=1e-5)


@EVERY
def test_every_parameter_moves(name):
    module = model(name, dropout=0.0)

    def loss(params):
        given = variables(name) | {"params": params}
        sampling = Sampling(LABELS, jax.random.split(jax.random.key(0), 2))
        (_, said), _ = module.apply(given, IMAGES / 255.0, SIZE, True, sampling, mutable=["batch_stats"])
        return sum(module.loss(said, LABELS, SIZE).values())

    gradient = jax.jit(jax.grad(loss))(variables(name)["params"])
    for path, value in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.any(value), jax.tree_util.keystr(path)


@EVERY
def test_classes_in_another_order_are_the_same_findings_under_other_labels(name):
    assert class_outputs(tiny(name)) == {"params/head/bias": (1, 0), "params/head/kernel": (1, 0)}
    order = [2, 0, 1]
    moved = with_classes(tiny(name), variables(name), order)
    before, after = (predict(name)(x, IMAGES, SIZE) for x in (variables(name), moved))
    np.testing.assert_allclose(after, before[:, order], rtol=1e-5)


@EVERY
def test_it_has_what_the_protocol_and_the_operations_ask_for(name):
    members = {*vars(Model), *Model.__annotations__} - {"__annotations__"} - set(dir(object))
    kind = type(model(name))
    for member in (x for x in members if not x.startswith("_")):
        assert member in {*dir(kind), *kind.__dataclass_fields__}, member
        asked = inspect.getattr_static(Model, member, None)
        if inspect.isfunction(asked):
            given = inspect.signature(getattr(kind, member)).parameters
            assert list(given) == list(inspect.signature(asked).parameters)
    calls = [x for x in ast.walk(ast.parse(Path(operations.__file__).read_text())) if isinstance(x, ast.keyword)]
    assert all(hasattr(kind, call.value.value) for call in calls if call.arg == "method")
    assert (model(name).learns_masks, model(name).has_proposals) == (False, False)


def test_dropout_hides_in_training_alone_and_draws_by_the_image():
    module, features = model("resnet_classifier", dropout=0.5), {"c5": np.ones((4, 1, 1, 2000), np.float32)}
    same = {"kernel": np.eye(2000, dtype=np.float32), "bias": np.zeros(2000, np.float32)}
    module = module.clone(num_classes=2000)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = functools.partial(module.apply, {"params": {"head": same}}, method="heads")
    kept = heads(features, None, Sampling(None, keys)).main
    assert set(np.unique(kept)) == {0.0, 2.0}
    assert 0.45 < np.mean(kept > 0) < 0.55
    np.testing.assert_array_equal(heads({"c5": features["c5"][:2]}, None, Sampling(None, keys[:2])).main, kept[:2])
    np.testing.assert_array_equal(heads(features).main, np.ones((4, 2000)))
    at = module.apply({"params": {"head": same}}, features, Logits(kept), method="heads_at")
    np.testing.assert_array_equal(at.main, np.ones((4, 2000)))


def test_smoothed_labels_ask_for_a_share_of_every_class():
    logits = Logits(np.array([[3.0, -1.0, 0.5], [0.0, 2.0, 1.0]], np.float32))
    log = np.log(np.exp(logits.main) / np.exp(logits.main).sum(axis=1, keepdims=True))
    target = 0.9 * np.eye(CLASSES)[LABELS.classes] + 0.1 / CLASSES
    module = model("resnet_classifier", label_smoothing=0.1)
    (loss,) = module.loss(logits, LABELS, SIZE).values()
    assert float(loss) == pytest.approx(-(target * log).sum(axis=1).mean(), rel=1e-5)


def test_images_that_are_mixed_learn_both_classes_by_their_shares():
    logits = Logits(np.array([[3.0, -1.0, 0.5], [0.0, 2.0, 1.0]], np.float32))
    share = np.array([0.25, 0.0], np.float32)
    module, other = model("resnet_classifier"), np.array([1, 1], np.int32)
    mixed = Labels(LABELS.classes, other, share)
    log = jax.nn.log_softmax(logits.main)
    rows = np.arange(2)
    expected = -((1 - share) * log[rows, LABELS.classes] + share * log[rows, other]).mean()
    assert float(module.loss(logits, mixed, SIZE)["cls"]) == pytest.approx(float(expected), rel=1e-5)


def test_two_devices_are_one():
    """Of a whole step: loss, gradient and statistics."""
    module = build_model(tiny("resnet_classifier", dropout=0.3), CLASSES, axis_name="devices")
    images = np.random.default_rng(2).normal(size=(4, 64, 64, 3)).astype(np.float32)
    size, labels = np.full((4, 2), 64, np.int32), Labels(np.array([0, 1, 2, 1], np.int32))
    keys, given = jax.random.split(jax.random.key(5), 4), variables("resnet_classifier")

    def run(images, size, labels, keys):
        def loss(params):
            (_, said), new = module.apply(
                given | {"params": params}, images, size, True, Sampling(labels, keys), mutable=["batch_stats"]
            )
            return module.loss(said, labels, size)["cls"], new

        return jax.lax.pmean(jax.value_and_grad(loss, has_aux=True)(given["params"]), "devices")

    found = []
    for count in (1, 2):
        parts = jax.tree.map(lambda x, n=count: x.reshape(n, 4 // n, *x.shape[1:]), (images, size, labels, keys))
        step = jax.pmap(run, axis_name="devices", devices=jax.devices()[:count])
        found.append(jax.tree.map(lambda x: np.asarray(x[0]), step(*parts)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), *found)
