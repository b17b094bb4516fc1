"""What every detector promises, on the dict of models: a new one is tested by being there, and red without an ideal.

Classifiers are in test_classifier.
"""

import ast
import functools
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import operations
from kdjax.models import MODELS, build_model, model_class
from kdjax.models.kernels import cast_kernels
from kdjax.models.network import Network
from kdjax.types import Model
from tests.models import contract, toy
from tests.models.contract import CLASSES, Case
from tests.slow import slow_but
from tests.test_pairs import drawn

TWO_STAGE = ("objectness", "deltas", "logits", "masks")
"""What the network says of given RoIs."""
ALL = {"anchor_samples": 0, "roi_samples": 0}
"""Nothing is drawn."""
IDEALS = {
    "retinanet": (contract.ideal_retinanet, ("logits", "deltas")),
    "fcos": (contract.ideal_fcos, ("logits", "distances", "centerness")),
    "atss": (contract.ideal_atss, ("logits", "deltas", "centerness")),
    "gfl": (contract.ideal_gfl, ("logits", "distributions")),
    "reppoints": (contract.ideal_reppoints, ("logits", "initial", "boxes")),
    "solo": (contract.ideal_solo, ("logits", "features", "kernels", "biases")),
    "faster_rcnn": (contract.ideal_rcnn, TWO_STAGE),
    "mask_rcnn": (contract.ideal_rcnn, TWO_STAGE),
    "cascade_rcnn": (contract.ideal_rcnn, TWO_STAGE),
    "cascade_mask_rcnn": (contract.ideal_rcnn, TWO_STAGE),
}
"""How the ideal predictions of each model are made, and their fields that come out of the network."""
OURS = {
    "tests.models.iou_aware:IoUAwareRetinaNet": (contract.ideal_iou_aware, ("logits", "deltas", "iou")),
    "tests.models.toy:Toy": (contract.ideal_retinanet, ("logits", "deltas")),
}
"""Likewise, of models from outside."""
SMALL = {
    "retinanet": {"anchor_scale": 2.0},
    "fcos": {"range_scale": 2.0},
    "atss": {"anchor_scale": 2.0},
    "gfl": {"anchor_scale": 2.0},
    "reppoints": {"point_scale": 2.0},
    "solo": {"range_scale": 24.0, "kept_score": 0.65},
    "tests.models.iou_aware:IoUAwareRetinaNet": {"anchor_scale": 2.0},
}
"""Options with which the objects of small images suit every level."""
SHOWN = {"solo": (contract.left_half, 4.0, 1e-5)}
"""Fields of the cases of models whose boxes are those around masks, of a resolution of four pixels."""
CONVENTIONS = {f"{name}, torchvision": name for name in ("retinanet", "fcos", "mask_rcnn")}
"""The other convention of three families."""


@functools.cache
def case(name: str) -> Case:
    known = CONVENTIONS.get(name, name)
    head = SMALL.get(known, {}) | (ALL if model_class(known).has_proposals else {})
    return made(known, head | ({"convention": "torchvision"} if name in CONVENTIONS else {}))


def made(name: str, head: dict) -> Case:
    ideal, moving = (IDEALS | OURS)[name]
    tiny = {section: dict(fields) for section, fields in model_class(name).tiny.items()}
    return Case(
        build_model({"name": name, **tiny, "head": tiny.get("head", {}) | head}, CLASSES),
        ideal,
        moving,
        *SHOWN.get(name, ()),
    )


DETECTORS = tuple(name for name in MODELS if model_class(name).task == "detection")
EVERYONE = (*DETECTORS, *OURS)
QUICK = ("retinanet", "fcos", "mask_rcnn", "tests.models.toy:Toy")
"""With anchors and without, of two stages, and somebody else's."""
EVERY = pytest.mark.parametrize("name", slow_but(QUICK, EVERYONE))
LEARNING = pytest.mark.parametrize("name", slow_but(set(QUICK) - {"mask_rcnn"}, EVERYONE))
WITH_CONVENTIONS = pytest.mark.parametrize("name", slow_but(QUICK, [*EVERYONE, *CONVENTIONS]))


def test_every_detector_has_ideal_predictions():
    assert IDEALS.keys() == set(DETECTORS)


@WITH_CONVENTIONS
def test_terms_are_those_that_are_named(name):
    contract.check_terms(case(name))


@WITH_CONVENTIONS
def test_padding_has_no_influence(name):
    contract.check_padding(case(name))


@EVERY
def test_two_devices_are_one(name):
    contract.check_devices(case(name))


@WITH_CONVENTIONS
def test_ideal_predictions_are_the_truth(name):
    contract.check_ideal(case(name))


@WITH_CONVENTIONS
def test_the_loss_falls_on_the_way_to_ideal_predictions(name):
    contract.check_progress(case(name))


@LEARNING
def test_every_parameter_moves_unless_it_is_declared_still(name):
    contract.check_gradients(case(name))


@LEARNING
def test_odd_objects_leave_the_loss_and_its_gradient_finite(name):
    contract.check_odd_objects(case(name))


@pytest.mark.parametrize(
    "name",
    slow_but({"retinanet"}, ("retinanet", "fcos", "atss", "gfl", "reppoints", "mask_rcnn", "cascade_rcnn")),
)
def test_classes_in_another_order_are_the_same_findings_under_other_labels(name):
    contract.check_classes(case(name), {"name": name, **model_class(name).tiny})


@pytest.mark.parametrize(
    ("mistake", "check", "sentence"),
    [
        (toy.CountsOnItsDevice, contract.check_devices, "Not equal to tolerance"),
        (toy.CountsPadding, contract.check_padding, "Not equal to tolerance"),
        (toy.LearnsInPadding, contract.check_padding, "Not equal to tolerance"),
        (toy.FindsLogarithms, contract.check_ideal, r"scores \[-"),
        (toy.RanksLogarithms, contract.check_ideal, "image 0 has 0 detections for 3 objects"),
        (toy.LearnsTheOpposite, contract.check_progress, "the loss is"),
        (toy.LeavesItsBoxesAlone, contract.check_gradients, "head/deltas/bias gets no gradient"),
        (toy.SaysItIsStill, contract.check_gradients, "head/.* moves"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_mistake_is_seen(mistake, check, sentence):
    right = case("tests.models.toy:Toy").detector
    fields = {"backbone": right.backbone, "neck": right.neck, "num_classes": CLASSES}
    with pytest.raises(AssertionError, match=sentence):
        check(Case(mistake(**fields), *OURS["tests.models.toy:Toy"]))


# --- What mypy cannot see: linen gives every name to every module.

MEMBERS = sorted({*vars(Model), *Model.__annotations__} - {"__annotations__"} - set(dir(object)))
MEMBERS = [name for name in MEMBERS if not name.startswith("_")]


OF_ALL_TASKS = pytest.mark.parametrize("name", [*MODELS, *OURS])


def tiny(name: str) -> Network:
    return build_model({"name": name, **model_class(name).tiny}, CLASSES)


@OF_ALL_TASKS
def test_models_have_what_the_protocol_asks_for(name):
    model = tiny(name)
    assert {"heads", "loss", "num_classes", "strides"} <= set(MEMBERS)
    for member in MEMBERS:
        assert member in {*dir(type(model)), *type(model).__dataclass_fields__}, member
        asked = inspect.getattr_static(Model, member, None)
        if inspect.isfunction(asked):
            given = inspect.signature(getattr(type(model), member)).parameters
            assert list(given) == list(inspect.signature(asked).parameters), member


@OF_ALL_TASKS
def test_models_have_the_methods_that_operations_name(name):
    calls = [x for x in ast.walk(ast.parse(Path(operations.__file__).read_text())) if isinstance(x, ast.keyword)]
    named = {call.value.value for call in calls if call.arg == "method"}
    assert named >= {"features", "heads", "predict"}
    for method in named:
        assert inspect.isfunction(getattr(model_class(name), method)), method


DEFORMABLE = {"name": "reppoints", "backbone": {"depth": 50, "width": 0.125, "deformable": True}}
TAUGHT_BY = {name: {"name": name, **model_class(name).tiny} for name in (*MODELS, *OURS)} | {"deformable": DEFORMABLE}


@pytest.mark.parametrize("name", slow_but({"retinanet", "pspnet", "tests.models.toy:Toy"}, TAUGHT_BY))
def test_a_teachers_kernels_may_be_cast_before_it_computes(name):
    """To the bit where a compiler leaves no rounding out; what a layer uses in float32 would be rounded."""
    model = build_model(TAUGHT_BY[name], CLASSES, dtype=jnp.bfloat16)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    size, variables = np.full((2, 2), 64, np.int32), drawn(model, images.astype(np.float32))
    cast = cast_kernels(model, variables, jnp.bfloat16, (64, 64))
    of_head = {x.dtype.name for x in jax.tree.leaves(cast["params"]["head"])}
    # The head of the toy computes in what it is given.
    assert ("bfloat16" in of_head) == (name != "tests.models.toy:Toy")

    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def seen(variables):
        said = model.apply(variables, model.preprocess(images, size), size)
        return said, operations.predict(model, variables, images, size)

    jax.tree.map(np.testing.assert_array_equal, seen(cast), seen(variables))


@OF_ALL_TASKS
def test_facts_agree_with_what_a_model_does(name):
    model = tiny(name)
    assert model.task in ("detection", "segmentation", "classification")
    assert model.learns_masks == any(term.split("_")[-1] == "mask" for term in model.terms)
    assert model.has_proposals == hasattr(model, "propose")
    assert set(model.tiny) <= {*model.parts, "head"}
    assert set(model.part_defaults) <= set(model.parts)
