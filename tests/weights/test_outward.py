"""Writing for PyTorch: every model of every table comes back to the bit, and what would be another model is refused."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.errors import UserError
from kdjax.models import build_model, complete
from kdjax.weights import SOURCES, import_state_dict, merged
from kdjax.weights.outward import NEVER, export_state_dict
from kdjax.weights.own_config import own_facts, read_config
from kdjax.weights.programs import Serving, lines_to_load, program_of
from kdjax.weights.sources import DETECTORS

CLASSES = 3
SERVING = Serving(CLASSES, "student.safetensors", 320, 512)
QUICK = (
    *(("torchvision", "retinanet"), ("mmdet", "faster_rcnn"), ("detectron2", "fcos"), ("mmpretrain", "mobilenet_v2")),
    *(("mmseg", "deeplabv3"), ("cirkd", "deeplabv3_mobilenet_v2"), ("timm", "resnet_classifier")),
)
PAIRS = [
    pytest.param(source, model, marks=[pytest.mark.slow] * ((source, model) not in QUICK))
    for source, table in SOURCES.items()
    for model in table.heads
    if source != "torchvision_coco_v1" or model in DETECTORS
]
# What no table says: what a program builds beside its published models' values.
BUILT: dict[str, dict[str, Any]] = {
    "mmseg": {"backbone": {"stem": "v1c"}},
    "cirkd": {"backbone": {"stem": "v1s"}},
}


def config(source: str, name: str) -> dict[str, Any]:
    """The smallest model that a program has, whole."""
    depth = 18 if program_of(source) != "torchvision" or name != "deeplabv3" else 50
    model: dict[str, Any] = {"name": name}
    if name not in ("mobilenet_v1", "mobilenet_v2", "deeplabv3_mobilenet_v2"):
        model["backbone"] = {"depth": depth}
        if name in ("pspnet", "deeplabv3"):
            model = merged(model, BUILT.get(source, {"backbone": {"stem": "plain"}}))
            model = merged(model, {"head": {"channels": 256, "auxiliary_channels": 256}})
    if name == "retinanet":
        model["neck"] = {"extra_from": "p5" if program_of(source) == "torchvision" else "c5"}
    if program_of(source) != "torchvision" and name in DETECTORS:
        # As narrow as its program may have it.
        model = merged(model, {"neck": {"channels": 64}, "head": {"head_channels": 32} if "rcnn" in name else {}})
    table = SOURCES[source]
    model = merged(merged(model, table.usual.get(name, {})), table.expects(name))
    if model.get("backbone", {}).get("depth") == 18:
        model["backbone"].pop("style", None)
    return complete(model)


@functools.cache
def shapes(source: str, name: str) -> Any:
    module = build_model(config(source, name), CLASSES)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def numbers(like: Any) -> Any:
    """Variables of which no two numbers of an array are equal."""
    flat = flatten_dict(like, sep="/")
    made = {
        path: (np.arange(x.size, dtype=np.float32) + index).reshape(x.shape)
        for index, (path, x) in enumerate(flat.items())
    }
    return unflatten_dict(made, sep="/")


@pytest.mark.parametrize(("source", "name"), PAIRS, ids=lambda x: x)
def test_what_is_written_is_imported_to_the_bit(source, name):
    model, like = config(source, name), shapes(source, name)
    variables = numbers(like)
    state = export_state_dict(variables, source, model=model, num_classes=CLASSES).state
    back = import_state_dict(state, source, model=model, like=like, num_classes=CLASSES).variables
    expected = flatten_dict(variables, sep="/")
    actual = flatten_dict(back, sep="/")
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path, strict=True)
    lines = lines_to_load(model, source, SERVING)
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    if program_of(source) != "cirkd" and name != "mobilenet_v1":
        compile("\n".join(lines), "lines", "exec")


def retinanet(**sections: Any) -> dict[str, Any]:
    """As a config of small detectors has it."""
    small = {"name": "retinanet", "backbone": {"depth": 18, "width": 0.125}, "neck": {"channels": 16}}
    return complete(merged(small, {"head": {"convs": 1, "norm": "group", "anchor_scale": 2.5}} | sections))


def export(model, source):
    like = jax.eval_shape(build_model(model, CLASSES).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return export_state_dict(numbers(like), source, model=model, num_classes=CLASSES)


def test_every_field_that_another_program_has_otherwise_is_named():
    with pytest.raises(UserError) as refused:
        export(retinanet(neck={"channels": 16, "extra_relu": False}), "torchvision")
    message = str(refused.value)
    assert message.startswith("This retinanet would be another model in torchvision: ")
    for sentence in (
        "neck.extra_relu is False, and weights of torchvision mean True",
        "head.convention is 'mmdet', and weights of torchvision mean 'torchvision'",
        "backbone.width is 0.125, and torchvision builds 1.0 alone",
        "head.convs is 1, and torchvision builds 4 alone",
        "neck.channels is 16, and torchvision builds 256 alone",
    ):
        assert sentence in message
    # What its constructor takes is no reason.
    assert "anchor_scale" not in message


@pytest.mark.parametrize(
    ("model", "source", "words"),
    [
        (
            {"name": "pspnet"},
            "mmdet",
            "A pspnet cannot have the names of mmdet, which has these models: retinanet",
        ),
        (
            {"name": "retinanet", "backbone": {"depth": 18, "width": 0.3}},
            "mmdet",
            "backbone.width is 0.3, and mmdet builds multiples of 1/8 alone",
        ),
        ({"name": "resnet_classifier"}, "nobody", "There is no source of weights 'nobody'"),
        ({"name": "resnet_classifier"}, "torchvision_coco_v1", "those of detectors; take torchvision"),
        (
            {"name": "retinanet", "neck": {"norm": "group"}},
            "detectron2",
            "neck.norm is 'group', and detectron2 builds ''",
        ),
        ({"name": "fcos", "backbone": {"epsilon": 1e-3}}, "detectron2", "epsilon is 0.001, and weights of detectron2"),
    ],
)
def test_what_a_program_has_not_is_refused(model, source, words):
    model = complete(model)
    with pytest.raises(UserError, match=re.escape(words)):
        export_state_dict({}, source, model=model, num_classes=CLASSES)


def test_layers_that_a_source_has_no_names_for_are_named():
    variables = {"params": {"head": {"extra": {"kernel": np.zeros((1, 1))}}}}
    with pytest.raises(UserError, match=r"A resnet_classifier of timm has no layers head/extra\."):
        export_state_dict(variables, "timm", model=complete({"name": "resnet_classifier"}), num_classes=CLASSES)


def test_small_detectors_of_the_default_convention_become_those_of_mmdetection():
    model = retinanet()
    written = export(model, "mmdet")
    assert written.first_label == 0
    assert written.changes == ()
    assert "bbox_head.cls_convs.0.gn.weight" in written.state
    assert written.state["backbone.bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize("source", ["mmdet", "mmdet_caffe"])
@pytest.mark.parametrize("name", ["retinanet", "fcos", "atss", "gfl", "reppoints", "solo", "cascade_mask_rcnn"])
def test_the_config_for_mmdetection_is_read_as_the_model(source, name):
    model = config(source, name)
    text = "\n".join(lines_to_load(model, source, SERVING))
    own = own_facts(read_config(text), name)
    assert own.bgr is SOURCES[source].bgr
    assert merged(model, own.model) == model


def test_a_background_of_a_head_with_sigmoids_is_never_found():
    model = config("torchvision", "retinanet")
    bias = export(model, "torchvision").state["head.classification_head.cls_logits.bias"].reshape(9, CLASSES + 1)
    assert (bias[:, 0] == NEVER).all()
    assert (bias[:, 1:] > 0).all()
