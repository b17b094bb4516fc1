"""Every detector against what the original computed with the same weights, read by the importer as if downloaded.

The cases are those that :mod:`tests.goldens.cases` finds. A case of a detector that kdjax does not have is skipped.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from kdjax.boxes import area, pairwise_iou
from kdjax.models import DETECTORS, build_detector
from kdjax.models.anchors import pyramid_anchors
from kdjax.types import Detections, Features, Targets, stride
from kdjax.weights import SOURCES, import_state_dict
from tests.goldens.cases import Case, assert_close, find_cases, load_case, no_cases
from tests.goldens.synthetic import synthetic_state_dict

OUTPUT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-3
MATCHED = 0.98

CASES = find_cases("detectors")

# What the originals' configs say and weights do not, by architecture. The backbone is read off the config's name.
IMPROVED_FCOS = {
    "conv_bias": True,
    "norm_on_box": True,
    "centerness_on_box": True,
    "centre_radius": 1.5,
    "box_loss": "giou",
    "iou_threshold": 0.6,
}
PYRAMID = {"channels": 256, "min_level": 3, "max_level": 7}
WITH_P2 = {"channels": 256, "min_level": 2, "max_level": 6, "extra_from": "pool"}
TORCHVISION = {
    "retinanet_resnet50_fpn": {
        "name": "retinanet",
        "neck": {**PYRAMID, "extra_from": "p5"},
        "head": {"convention": "torchvision", "max_detections": 300},
    },
    "retinanet_resnet50_fpn_v2": {
        "name": "retinanet",
        "neck": {**PYRAMID, "extra_from": "c5"},
        "head": {"convention": "torchvision", "max_detections": 300, "norm": "group", "box_loss": "giou"},
    },
    "fcos_resnet50_fpn": {
        "name": "fcos",
        "neck": {**PYRAMID, "extra_from": "p5"},
        "head": {**IMPROVED_FCOS, "convention": "torchvision", "score_threshold": 0.2},
    },
    "fasterrcnn_resnet50_fpn": {
        "name": "faster_rcnn",
        "neck": WITH_P2,
        "head": {"convention": "torchvision"},
    },
    "maskrcnn_resnet50_fpn": {
        "name": "mask_rcnn",
        "neck": WITH_P2,
        "head": {"convention": "torchvision"},
    },
}
MMDET = {
    "retinanet": {
        "name": "retinanet",
        "neck": {**PYRAMID, "extra_from": "c5", "extra_relu": False},
    },
    "fcos": {
        "name": "fcos",
        "neck": {**PYRAMID, "extra_from": "p5"},
    },
    "faster-rcnn": {"name": "faster_rcnn", "neck": WITH_P2},
    "mask-rcnn": {"name": "mask_rcnn", "neck": WITH_P2},
    "cascade-rcnn": {"name": "cascade_rcnn", "neck": WITH_P2},
    "cascade-mask-rcnn": {"name": "cascade_mask_rcnn", "neck": WITH_P2},
}


class Original(NamedTuple):
    """What a case was computed by."""

    source: str
    """A key of ``SOURCES``."""
    model: dict[str, Any] | None
    """The config of our detector; None where there is none."""
    num_classes: int
    first_label: int
    """What the original calls our class 0."""


def original(meta: dict[str, Any]) -> Original:
    num_classes = meta["num_classes"]
    if meta["source"] == "torchvision":
        source = {1e-5: "torchvision", 0.0: "torchvision_coco_v1"}[meta["batch_norm_eps"]]
        model = TORCHVISION.get(meta["model"])
        # The dense heads keep a place for the background; that of the two-stage detectors is no class of ours.
        background = int("rcnn" in meta["model"])
        backbone = {"depth": int(re.search(r"resnet(\d+)", meta["model"])[1])}
        return Original(source, model and model | {"backbone": backbone}, num_classes - background, background)
    name, backbone = meta["config"].split("/")[1].split("_")[:2]
    depth, *groups = map(int, re.findall(r"\d+", backbone))
    model = MMDET.get(name)
    if "center-normbbox-centeronreg-giou" in meta["config"]:
        model = model | {"head": IMPROVED_FCOS}
    if model:
        model = model | {"backbone": {"depth": depth, **dict(zip(("groups", "base_width"), groups, strict=False))}}
    caffe = {"retinanet": "mmdet_caffe", "fcos": "mmdet_detectron"}
    return Original(caffe[name] if "caffe" in backbone else "mmdet", model, num_classes, 0)


class Computed(NamedTuple):
    """What kdjax makes of a case."""

    detector: nn.Module
    variables: dict[str, Any]
    images: jax.Array
    image_size: jax.Array
    targets: Targets
    features: Features
    predictions: Any


def compute(case: Case, source: str, model: dict[str, Any], num_classes: int, first_label: int) -> Computed:
    """Imports the case's weights and runs the detector on its images."""
    images = jnp.asarray(case.whole("image"))
    if SOURCES[source].bgr:
        images = images[..., ::-1]  # The importer turned the first convolution around.
    image_size = jnp.tile(jnp.array(case.meta["image_size"]), (len(images), 1))
    like = jax.eval_shape(build_detector(model, num_classes).init, jax.random.key(0), images)
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    imported = import_state_dict(state, source, model=model, like=like, num_classes=num_classes)
    detector = build_detector(imported.model, num_classes)
    features, predictions = jax.jit(detector.apply)(imported.variables, images, image_size)
    targets = make_targets(case, image_size, first_label)
    return Computed(detector, imported.variables, images, image_size, targets, features, predictions)


def make_targets(case: Case, image_size: jax.Array, first_label: int) -> Targets:
    boxes = [case.whole(f"target_{i}/boxes").reshape(-1, 4) for i in range(len(image_size))]
    labels = [case.whole(f"target_{i}/labels") - first_label for i in range(len(image_size))]
    room = max(1, *map(len, boxes))
    return Targets(
        boxes=jnp.stack([np.pad(x, ((0, room - len(x)), (0, 0))) for x in boxes]),
        labels=jnp.stack([np.pad(x, (0, room - len(x))) for x in labels]).astype(jnp.int32),
        valid=jnp.stack([jnp.arange(room) < len(x) for x in boxes]),
        image_size=image_size,
    )


def check_features(case: Case, features: Features) -> None:
    """The pyramid, whose extra levels torchvision calls by name."""
    names = [name for name in case.arrays if name.startswith("feature_")]
    assert len(names) == len(features)
    for name, (level, actual) in zip(names, features.items(), strict=True):
        assert_close(actual, case.arrays[name], f"{name}, {level}", OUTPUT_TOLERANCE)


def check_maps(case: Case, names: list[str], maps: list[Features]) -> None:
    """The dense outputs of a head, level by level (MMDetection) or flattened over the levels (torchvision)."""
    for output, (name, levels) in enumerate(zip(names, maps, strict=True)):
        if case.meta["source"] == "mmdet":
            expected = case.indexed(f"head/output_{output}/level_{{}}")
            assert len(expected) == len(levels)
            for (level, actual), array in zip(levels.items(), expected, strict=True):
                assert_close(actual, array, f"{name} of {level}", OUTPUT_TOLERANCE)
        else:
            expected = case.arrays[f"head/{name}"]
            images, _, channels = expected.shape
            joined = jnp.concatenate([x.reshape(images, -1, channels) for x in levels.values()], axis=1)
            assert_close(joined, expected, name, OUTPUT_TOLERANCE)


def check_losses(case: Case, computed: Computed, names: dict[str, str]) -> None:
    """The loss terms, each of them called ``names[term]`` in the case."""
    terms = jax.jit(computed.detector.loss)(computed.predictions, computed.targets)
    expected = {name.removeprefix("loss/"): float(case.whole(name)) for name in case.arrays if name.startswith("loss/")}
    assert set(names.values()) == expected.keys()
    assert {names[term]: float(value) for term, value in terms.items()} == pytest.approx(expected, rel=LOSS_TOLERANCE)


def check_detections(case: Case, detections: Detections, first_label: int) -> None:
    for image in range(len(detections.boxes)):
        expected = [case.whole(f"detection_{image}/{name}") for name in ("boxes", "scores", "labels")]
        kept = np.asarray(detections.valid[image])
        actual = [np.asarray(x[image])[kept] for x in (detections.boxes, detections.scores, detections.labels)]
        actual[2] = actual[2] + first_label
        count = max(len(expected[0]), len(actual[0]))
        share = matched(expected, actual) / max(count, 1)
        assert share >= MATCHED or not count, f"{share:.1%} of image {image}'s {count} detections are the original's"


def matched(expected: list[np.ndarray], actual: list[np.ndarray]) -> int:
    """How many detections find a partner of the same label, box and score."""
    (boxes, scores, labels), (others, other_scores, other_labels) = expected, actual
    same = labels[:, None] == other_labels[None]
    same &= np.abs(scores[:, None] - other_scores[None]) < SCORE_TOLERANCE
    # torchvision keeps boxes that were clipped to nothing; they have no IoU.
    empty = np.asarray(area(jnp.asarray(boxes)) <= 0)[:, None]
    close = np.abs(boxes[:, None] - others[None]).max(-1) < 1e-2
    same &= np.where(empty, close, np.asarray(pairwise_iou(jnp.asarray(boxes), jnp.asarray(others))) > 0.99)
    return int((maximum_bipartite_matching(csr_array(same)) >= 0).sum())


def check_retinanet(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    check_maps(case, ["cls_logits", "bbox_regression"], [predictions.logits, predictions.deltas])
    if "anchors" in case.arrays:
        anchors = pyramid_anchors(
            {level: x.shape[1:3] for level, x in predictions.logits.items()},
            scale=detector.anchor_scale,
            octaves=detector.anchor_octaves,
            ratios=detector.anchor_ratios,
            convention=detector.convention,
        )
        assert_close(jnp.concatenate(list(anchors.values())), case.arrays["anchors"], "anchors", OUTPUT_TOLERANCE)
    is_mmdet = case.meta["source"] == "mmdet"
    names = ("loss_cls", "loss_bbox") if is_mmdet else ("classification", "bbox_regression")
    check_losses(case, computed, dict(zip(("cls", "box"), names, strict=True)))
    check_detections(case, jax.jit(detector.decode)(predictions, computed.image_size), first_label)


def check_fcos(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    is_mmdet = case.meta["source"] == "mmdet"
    distances = predictions.distances
    if not is_mmdet:
        distances = {level: x / stride(level) for level, x in distances.items()}
    outputs = ["cls_logits", "bbox_regression", "bbox_ctrness"]
    check_maps(case, outputs, [predictions.logits, distances, predictions.centerness])
    names = ("loss_cls", "loss_bbox", "loss_centerness") if is_mmdet else ("classification", *outputs[1:])
    check_losses(case, computed, dict(zip(detector.terms, names, strict=True)))
    check_detections(case, jax.jit(detector.decode)(predictions, computed.image_size), first_label)


CHECKS = {"retinanet": check_retinanet, "fcos": check_fcos}
"""By detector: compares everything behind the features."""


def test_there_are_cases() -> None:
    assert CASES, no_cases("detectors")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_detector_is_the_original(path: Path) -> None:
    case = load_case(path)
    origin = original(case.meta)
    if origin.model is None or origin.model["name"] not in DETECTORS:
        pytest.skip(f"kdjax has no detector for {case.meta.get('model') or case.meta['config']}")
    computed = compute(case, origin.source, origin.model, origin.num_classes, origin.first_label)
    check_features(case, computed.features)
    CHECKS[origin.model["name"]](case, computed, origin.first_label)
