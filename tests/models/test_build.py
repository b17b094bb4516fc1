"""``build_model``, the shapes that every detector keeps, and what importing the package does not do."""

import subprocess
import sys
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import MODELS, build_model, class_outputs, complete, model_class, with_classes
from kdjax.models.network import Network
from kdjax.options import number
from kdjax.types import Detections, Masks, Sampling, Targets

TINY = {"backbone": {"depth": 18, "width": 0.125}, "neck": {"channels": 8}}
SIZE = np.array([[64, 96], [50, 70]], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)


DETECTORS = [name for name in MODELS if model_class(name).task == "detection"]


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    return build_model({"name": request.param, **TINY}, num_classes=3)


@pytest.fixture(scope="module")
def outputs(detector):
    """Features and predictions as shapes: nothing here is compiled."""
    return jax.eval_shape(lambda: detector.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3))))


def test_preprocessing_normalises_and_leaves_the_padding_zero(detector):
    images = np.asarray(detector.preprocess(jnp.asarray(IMAGES), jnp.asarray(SIZE)))
    assert images.dtype == np.float32
    expected = (IMAGES[1, :50, :70] - np.array(detector.pixel_mean)) / np.array(detector.pixel_std)
    np.testing.assert_allclose(images[1, :50, :70], expected, rtol=1e-5, atol=1e-5)
    assert not images[1, 50:].any()
    assert not images[1, :, 70:].any()


def test_features_are_a_pyramid(detector, outputs):
    (features, _), _ = outputs
    assert features.keys() == detector.strides.keys()
    for level, x in features.items():
        stride = 2 ** int(level[1:])
        assert detector.strides[level] == stride
        assert x.shape == (2, -(-64 // stride), -(-96 // stride), 8)


def test_parameters_are_grouped_by_part(outputs):
    assert set(outputs[1]["params"]) == {"backbone", "neck", "head"}


def test_calling_is_features_and_heads(detector, outputs):
    (features, predictions), variables = outputs
    apply = detector.apply
    assert jax.eval_shape(lambda v: apply(v, jnp.zeros((2, 64, 96, 3)), method="features"), variables) == features
    assert jax.eval_shape(lambda v, f: apply(v, f, method="heads"), variables, features) == predictions


def test_losses_are_float32_scalars_and_detections_fill_their_slots(detector, outputs):
    (features, predictions), variables = outputs
    targets = Targets(np.zeros((2, 4, 4), np.float32), np.zeros((2, 4), np.int32), np.zeros((2, 4), bool))
    targets = targets._replace(masks=Masks(np.zeros((2, 4, 16, 16), bool), np.zeros((2, 4, 4), np.float32)))

    def loss(variables, features):
        sampling = Sampling(targets, jax.random.split(jax.random.key(0), 2))
        predictions = detector.apply(variables, features, SIZE, sampling, method="heads")
        return detector.loss(predictions, targets, SIZE)

    terms = jax.eval_shape(loss, variables, features)
    assert set(terms) == set(detector.terms)
    assert all(term.shape == () and term.dtype == jnp.float32 for term in terms.values())
    found = jax.eval_shape(detector.decode, predictions, jnp.asarray(SIZE))
    slots = (2, detector.max_detections)
    # Of those without boxes, which the tests of SOLO hold.
    found = found._replace(whole_masks=None)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == Detections(
        boxes=((*slots, 4), jnp.float32), scores=(slots, jnp.float32), labels=(slots, jnp.int32), valid=(slots, bool)
    )


def test_detectors_of_two_stages_or_of_masks_alone_look_at_finer_levels_unless_told_otherwise():
    levels = {name: build_model({"name": name}, num_classes=3).neck.min_level for name in DETECTORS}
    assert levels == {name: 2 if model_class(name).has_proposals or name == "solo" else 3 for name in DETECTORS}
    assert build_model({"name": "faster_rcnn", "neck": {"min_level": 3}}, num_classes=3).neck.max_level == 6


def test_frozen_norm_is_never_updated():
    def stats(frozen):
        detector = build_model({"name": "retinanet", **TINY, "frozen_norm": frozen}, num_classes=3)
        shapes = jax.eval_shape(detector.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        traced = jax.make_jaxpr(
            lambda v: detector.apply(v, jnp.zeros((1, 32, 32, 3)), True, method="features", mutable=["batch_stats"])[1]
        )(shapes)
        inputs = set(traced.jaxpr.invars)
        return [out in inputs for out in traced.jaxpr.outvars]

    # Of a frozen detector, the statistics that come out are the very variables that went in.
    assert all(stats(frozen=True))
    assert not any(stats(frozen=False))


def test_a_config_kept_as_json_builds_the_same_detector():
    lists = {"name": "retinanet", **TINY, "head": {"anchor_ratios": [1.0, 2.0]}, "pixel_mean": [1.0, 2.0, 3.0]}
    tuples = {"name": "retinanet", **TINY, "head": {"anchor_ratios": (1.0, 2.0)}, "pixel_mean": (1.0, 2.0, 3.0)}
    assert build_model(lists, num_classes=3) == build_model(tuples, num_classes=3)
    assert isinstance(hash(build_model(lists, num_classes=3)), int)


class Classifier(Network):
    """A model of another task, whose only part is a backbone."""

    dropout: Annotated[float, number(0, 1), "Share of the channels that are dropped."] = 0.0

    task: ClassVar[str] = "classification"
    terms: ClassVar[tuple[str, ...]] = ("cls",)

    def setup(self) -> None:
        self.head = nn.Dense(self.num_classes)

    def heads(self, features, image_size=None, sampling=None):
        return self.head(jnp.mean(features["c5"], axis=(1, 2)))


def test_a_model_of_other_parts_is_built_as_any_other():
    name = "tests.models.test_build:Classifier"
    config = {"name": name, "backbone": {"depth": 10, "width": 0.125}, "head": {"dropout": 0.5}, "frozen_norm": True}
    model = build_model(config, num_classes=3)
    assert (model.dropout, model.frozen_norm, model.task) == (0.5, True, "classification")
    assert not model.has_proposals
    assert not model.learns_masks
    (features, logits), variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3)))
    )
    assert set(variables["params"]) == {"backbone", "head"}
    assert features.keys() == model.strides.keys()
    for level, x in features.items():
        assert x.shape[1:3] == (64 // model.strides[level], 96 // model.strides[level])
    assert logits.shape == (2, 3)
    assert set(complete(config)) == {"name", "backbone", "head", "pixel_mean", "pixel_std", "frozen_norm"}
    assert class_outputs(config) == {"params/head/bias": (1, 0), "params/head/kernel": (1, 0)}
    with pytest.raises(UserError, match=r"Classifier does not say how the outputs of its layer 'head' are ordered"):
        with_classes(config, variables, [2, 0, 1])
    with pytest.raises(UserError, match=r"Unknown field 'neck' .* the fields are name, backbone, head, pixel_mean"):
        build_model(config | {"neck": {}}, num_classes=3)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, r"There is no model ''; choose one of retinanet"),
        ({"name": "yolo"}, r"There is no model 'yolo'; choose one of retinanet"),
        (
            {"name": "retinanet", "nek": {}},
            r"Unknown field 'nek' in a model's config; the fields are name, backbone",
        ),
        (
            {"name": "retinanet", "backbone": {"deep": 18}},
            r"Unknown field 'deep' in .* backbone; .* are depth, width, style",
        ),
        ({"name": "retinanet", "neck": {"levels": 5}}, r"Unknown field 'levels' in .* neck; the fields are channels"),
        ({"name": "retinanet", "head": {"num_classes": 5}}, r"Unknown field 'num_classes' in the model's head"),
        ({"name": "faster_rcnn", "head": {"masks": True}}, r"Unknown field 'masks' in the model's head"),
        ({"name": "retinanet", "head": {"norm": "batch"}}, "norm is 'batch'; it must be one of '', group"),
        ({"name": "retinanet", "head": {"box_loss": "l2"}}, "box_loss is 'l2'; it must be one of l1"),
        ({"name": "retinanet", "backbone": {"depth": 20}}, "depth is 20; it must be one of 10, 18, 34, 50, 101"),
    ],
)
def test_mistakes_in_a_config_are_one_clear_sentence(config, sentence):
    with pytest.raises(UserError, match=sentence):
        build_model(config, num_classes=3)


def test_importing_the_models_starts_no_backend():
    code = "import kdjax.models, jax; assert not jax._src.xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True)
