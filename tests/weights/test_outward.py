"""Writing for PyTorch: every model of every table comes back to the bit, and what would be another model is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax.models import build_model, complete
from kdjax.weights import SOURCES, import_state_dict, merged
from kdjax.weights.outward import export_state_dict
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
