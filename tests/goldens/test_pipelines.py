"""From a photograph to boxes, against torchvision's whole pipelines, which :mod:`tests.goldens.make_pipelines` ran."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.data.batches import padded
from kdjax.data.sizing import RESIZES, Sizing
from kdjax.models import build_model
from kdjax.weights import import_state_dict
from tests.goldens.cases import HERE
from tests.goldens.synthetic import photograph, synthetic_state_dict
from tests.slow import slow_but

CASES = sorted(path for path in (HERE / "pipelines").glob("*.npz") if path.stem != "scaled")
EQUAL = ("as it is", "as it is, portrait", "twice", "half")
"""Photographs whose scaled pixels are whole numbers."""
MODELS = {
    "RetinaNet": {"name": "retinanet", "neck": {"extra_from": "p5"}, "head": {"max_detections": 300}},
    "FCOS": {"name": "fcos", "neck": {"extra_from": "p5"}, "head": {"score_threshold": 0.2, "iou_threshold": 0.6}},
    "FasterRCNN": {"name": "faster_rcnn"},
}


class Case(NamedTuple):
    meta: dict[str, Any]
    found: list[dict[str, np.ndarray]]
    photographs: list[np.ndarray]
    detector: Any
    variables: Any


@functools.cache
def case(path: Path) -> Case:
    with np.load(path) as file:
        meta, arrays = json.loads(str(file["meta"])), {name: file[name] for name in file.files}
    drawn = list(meta["photographs"].values())
    found = [{key: arrays[f"{k}/{key}"] for key in ("boxes", "scores", "labels")} for k in range(len(drawn))]
    model, classes = {**MODELS[meta["model"]], "backbone": {"depth": 18}}, meta["num_classes"]
    head = {**model.get("head", {}), "convention": "torchvision"}
    if meta["model"] == "FCOS":
        head |= {"conv_bias": True, "norm_on_box": True, "centerness_on_box": True}
    model["head"] = head
    like = jax.eval_shape(build_model(model, classes).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    state = synthetic_state_dict(meta["spec"], meta["weight_seed"])
    imported = import_state_dict(state, "torchvision", model=model, like=like, num_classes=classes)
    detector = build_model(imported.model, classes)
    return Case(meta, found, [photograph(*x, seed=k) for k, x in enumerate(drawn)], detector, imported.variables)


@functools.cache
def predict(path: Path) -> Any:
    return jax.jit(functools.partial(case(path).detector.apply, method="predict"))


def found_by_ours(path: Path, number: int, resize: str) -> dict[str, np.ndarray]:
    """Boxes in pixels of the photograph, scores and labels."""
    meta, _, photographs, _, variables = case(path)
    sizing = Sizing(((192, 192),), (meta["short_side"],), meta["long_side"], resize, eval_padding=32)
    images, size = padded([photographs[number]], sizing)
    found = jax.tree.map(lambda x: np.asarray(x)[0], predict(path)(variables, images, size))
    ratio = (np.array(photographs[number].shape[:2]) / size[0]).astype(np.float32)
    boxes, kept = found.boxes * ratio[[1, 0, 1, 0]], found.valid
    return {"boxes": boxes[kept], "scores": found.scores[kept], "labels": found.labels[kept] + meta["first_label"]}


def apart(expected: dict[str, np.ndarray], found: dict[str, np.ndarray], score: float) -> np.ndarray:
    """By how many pixels each box is missed by the nearest one of its label and about its score."""
    pixels = np.abs(expected["boxes"][:, None] - found["boxes"][None]).max(axis=-1)
    same = expected["labels"][:, None] == found["labels"][None]
    same &= np.abs(expected["scores"][:, None] - found["scores"][None]) < score
    return np.min(np.where(same, pixels, np.inf), axis=1, initial=np.inf)


def test_there_are_cases() -> None:
    assert {path.stem for path in CASES} == {name.lower() for name in MODELS}


@pytest.mark.parametrize("path", slow_but(("fcos", "retinanet"), CASES), ids=lambda path: path.stem)
def test_equal_pixels_become_equal_boxes(path: Path) -> None:
    """Twice and half as large, pixels are whole numbers; 150 pixels are padded, where anchors find something too."""
    for number, what in enumerate(case(path).meta["photographs"]):
        if what in EQUAL:
            expected, found = case(path).found[number], found_by_ours(path, number, "torchvision")
            assert len(found["boxes"]) == len(expected["boxes"]), what
            assert apart(expected, found, score=1e-3).max() < 0.05, what


def test_pixels_that_are_rounded_move_boxes_less_than_another_way_of_scaling_does() -> None:
    """Random weights exaggerate both; those of two-stage detectors so much that they choose other regions."""
    (path,) = (path for path in CASES if path.stem == "fcos")
    for number, what in enumerate(case(path).meta["photographs"]):
        if what not in EQUAL:
            ours, others = (found_by_ours(path, number, resize) for resize in ("torchvision", "kdjax"))
            rounded, otherwise = (apart(case(path).found[number], x, score=0.1) for x in (ours, others))
            assert np.median(rounded) < 0.1
            assert np.quantile(rounded, 0.95) < 0.5
            assert 0.5 < np.median(otherwise) < 8


@pytest.mark.parametrize("what", ["enlarged", "shrunk"])
def test_scaled_pixels_are_torchvisions_but_for_their_rounding(what: str) -> None:
    with np.load(HERE / "pipelines" / "scaled.npz") as file:
        sizes, expected = json.loads(str(file["meta"])), file[what].astype(int)
    pixels = photograph(*sizes[what], step=1, seed=list(sizes).index(what))
    scaled = Sizing(((192, 192),), (64,), 192)
    found = {}
    for resize in RESIZES:
        images, ((height, width),) = padded([pixels], scaled._replace(resize=resize))
        found[resize] = images[0, :height, :width].astype(int)
    assert found["torchvision"].shape == expected.shape
    assert np.abs(found["torchvision"] - expected).max() <= 1
    assert np.mean(found["torchvision"] == expected) > 0.99
    # The longer side has a fraction of more than a half; the others round it up.
    assert {max(x.shape) - max(expected.shape) for name, x in found.items() if name != "torchvision"} == {1}
    # Antialiasing makes a difference where an image shrinks.
    difference = np.abs(found["mmdet"] - found["detectron2"]).mean()
    assert difference > 5 if what == "shrunk" else difference < 1
