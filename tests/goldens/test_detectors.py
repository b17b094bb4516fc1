"""Every detector against what the original computed with the same weights, read by the importer as if downloaded.

The cases are those that :mod:`tests.goldens.cases` finds. A case of a detector that kdjax does not have is skipped.
"""

import functools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from kdjax.data.masks import paste, paste_whole
from kdjax.models import MODELS, build_model
from kdjax.models.anchors import pyramid_anchors
from kdjax.models.rcnn import POSITIVE_ROIS
from kdjax.models.rpn import Proposals
from kdjax.models.solo_head import SOLOPredictions
from kdjax.types import Detections, Features, Masks, Sampling, Targets
from kdjax.weights import SOURCES, import_state_dict
from tests.goldens.cases import Case, Sample, assert_close, find_cases, load_case, no_cases, quick_of
from tests.goldens.synthetic import synthetic_state_dict

OUTPUT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-3
MATCHED = 0.98
PIXELS = 0.999

CASES = find_cases("detectors")
# With anchors and without; two stages are with the slow ones.
QUICK = ("mmdet_retinanet_r50", "torchvision_fcos_resnet50_fpn")

# Everything runs once: compiling takes longer than running, also of single operations, for which there is NumPy.
_OPTIONS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
# Anchors that overlap an object equally are told apart by the last bit, so these are compiled as programs are.
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = True
jit = functools.partial(jax.jit, compiler_options=_OPTIONS)

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
# torchvision's cases use fewer than its default.
PROPOSALS = {"candidates": 500, "train_candidates": 500, "proposals": 100, "train_proposals": 100}
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
        "head": {"convention": "torchvision", **PROPOSALS},
    },
    "maskrcnn_resnet50_fpn": {
        "name": "mask_rcnn",
        "neck": WITH_P2,
        "head": {"convention": "torchvision", **PROPOSALS},
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
    "atss": {"name": "atss", "neck": {**PYRAMID, "extra_from": "p5"}},
    "gfl": {"name": "gfl", "neck": {**PYRAMID, "extra_from": "p5"}},
    "reppoints-moment": {"name": "reppoints", "neck": PYRAMID},
    "solo": {"name": "solo", "neck": WITH_P2},
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


def original(case: Case) -> Original:
    meta, num_classes = case.meta, case.meta["num_classes"]
    if meta["source"] == "torchvision":
        source = {1e-5: "torchvision", 0.0: "torchvision_coco_v1"}[meta["batch_norm_eps"]]
        model = TORCHVISION.get(meta["model"])
        # The dense heads keep a place for the background; that of the two-stage detectors is no class of ours.
        background = int("rcnn" in meta["model"])
        backbone = {"depth": int(re.search(r"resnet(\d+)", meta["model"])[1])}
        found = model and as_large(model | {"backbone": backbone}, case)
        return Original(source, found, num_classes - background, background)
    name, backbone = meta["config"].split("/")[1].split("_")[:2]
    model = MMDET.get(name)
    if "center-normbbox-centeronreg-giou" in meta["config"]:
        model = model | {"head": IMPROVED_FCOS}
    if model:
        model = as_large(model | {"backbone": backbone_of(backbone)}, case)
    source = "mmdet" if "caffe" not in backbone else "mmdet_detectron" if name == "fcos" else "mmdet_caffe"
    return Original(source, model, num_classes, 0)


def as_large(model: dict[str, Any], case: Case) -> dict[str, Any]:
    """The model with the levels of a case, and with its cells: where there are S x S of them, SOLO has S^2 masks."""
    levels = sum(name.startswith("feature_") for name in case.arrays)
    neck = model["neck"] | {"max_level": model["neck"]["min_level"] + levels - 1}
    masks = [shape[0] for name, shape in case.spec.items() if re.fullmatch(r".*conv_mask_list\.\d+\.weight", name)]
    cells = {"grids": tuple(map(math.isqrt, masks))} if masks else {}
    return model | {"neck": neck, "head": model.get("head", {}) | cells}


def backbone_of(name: str) -> dict[str, Any]:
    """The backbone that the name of a config of MMDetection's calls "r50", "x101-64x4d", "x101-dconv-c3-c5"."""
    kind, depth = re.match(r"([rx])(\d+)", name).groups()
    groups, base_width = (re.search(r"(\d+)x(\d+)d", name) or re.match(r"(\d+)x(\d+)d", "32x4d")).groups()
    grouped = {"groups": int(groups), "base_width": int(base_width)} if kind == "x" else {}
    return {"depth": int(depth), **grouped, **({"deformable": True} if "dconv" in name else {})}


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
    images = case.whole("image")
    if SOURCES[source].bgr:
        images = images[..., ::-1]  # The importer turned the first convolution around.
    image_size = np.tile(np.array(case.meta["image_size"], np.int32), (len(images), 1))
    like = jax.eval_shape(build_model(model, num_classes).init, jax.random.key(0), images)
    state = synthetic_state_dict(case.spec, case.meta["weight_seed"])
    imported = import_state_dict(state, source, model=model, like=like, num_classes=num_classes)
    detector = build_model(imported.model, num_classes)
    # Apart: many cases have the same backbone and neck, which are then compiled once.
    features = jit(functools.partial(detector.apply, method="features"))(imported.variables, images)
    predictions = jit(functools.partial(detector.apply, method="heads"))(imported.variables, features, image_size)
    targets = make_targets(case, len(images), first_label)
    return Computed(detector, imported.variables, images, image_size, targets, features, predictions)


def make_targets(case: Case, images: int, first_label: int) -> Targets:
    boxes = [case.whole(f"target_{i}/boxes").reshape(-1, 4) for i in range(images)]
    labels = [case.whole(f"target_{i}/labels") - first_label for i in range(images)]
    room = max(1, *map(len, boxes))
    return Targets(
        boxes=np.stack([np.pad(x, ((0, room - len(x)), (0, 0))) for x in boxes]),
        labels=np.stack([np.pad(x, (0, room - len(x))) for x in labels]).astype(np.int32),
        valid=np.stack([np.arange(room) < len(x) for x in boxes]),
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
            joined = np.concatenate([np.reshape(x, (images, -1, channels)) for x in levels.values()], axis=1)
            assert_close(joined, expected, name, OUTPUT_TOLERANCE)


def check_losses(case: Case, computed: Computed, names: dict[str, str]) -> None:
    """The loss terms, each of them called ``names[term]`` in the case."""
    terms = jit(computed.detector.loss)(computed.predictions, computed.targets, computed.image_size)
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


def area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(A, 4) and (B, 4) to (A, B)."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = area(np.concatenate([corner, opposite], axis=-1))
    return shared / np.maximum(area(boxes)[:, None] + area(others)[None] - shared, 1e-9)


def matched(expected: list[np.ndarray], actual: list[np.ndarray]) -> int:
    """How many detections find a partner of the same label, box and score."""
    (boxes, scores, labels), (others, other_scores, other_labels) = expected, actual
    same = labels[:, None] == other_labels[None]
    same &= np.abs(scores[:, None] - other_scores[None]) < SCORE_TOLERANCE
    # torchvision keeps boxes that were clipped to nothing, which have no IoU. Two-stage detectors of synthetic weights
    # find slivers of some hundredths of a pixel too, whose corners float32 moves by more than the IoU allows.
    close = np.abs(boxes[:, None] - others[None]).max(-1) < 1e-2
    sliver = (boxes[:, 2:] - boxes[:, :2]).min(-1) < 0.1
    same &= np.where(sliver[:, None], close, iou(boxes, others) > 0.99)
    return int((maximum_bipartite_matching(csr_array(same)) >= 0).sum())


def check_retinanet(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    check_maps(case, ["cls_logits", "bbox_regression"], [predictions.logits, predictions.deltas])
    if "anchors" in case.arrays:
        sizes = {level: x.shape[1:3] for level, x in predictions.logits.items()}
        options = {"scale": detector.anchor_scale, "octaves": detector.anchor_octaves, "ratios": detector.anchor_ratios}
        anchors = jit(
            functools.partial(pyramid_anchors, sizes, detector.strides, **options, exact=detector.facts.exact_anchors)
        )()
        assert_close(np.concatenate(list(anchors.values())), case.arrays["anchors"], "anchors", OUTPUT_TOLERANCE)
    is_mmdet = case.meta["source"] == "mmdet"
    names = ("loss_cls", "loss_bbox") if is_mmdet else ("classification", "bbox_regression")
    check_losses(case, computed, dict(zip(("cls", "box"), names, strict=True)))
    check_detections(case, jit(detector.decode)(predictions, computed.image_size), first_label)


def check_fcos(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    is_mmdet = case.meta["source"] == "mmdet"
    distances = predictions.distances
    if not is_mmdet:
        distances = {level: x / detector.strides[level] for level, x in distances.items()}
    outputs = ["cls_logits", "bbox_regression", "bbox_ctrness"]
    check_maps(case, outputs, [predictions.logits, distances, predictions.centerness])
    names = ("loss_cls", "loss_bbox", "loss_centerness") if is_mmdet else ("classification", *outputs[1:])
    check_losses(case, computed, dict(zip(detector.terms, names, strict=True)))
    check_detections(case, jit(detector.decode)(predictions, computed.image_size), first_label)


def check_atss(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    check_maps(case, list(predictions._fields), list(predictions))
    names = {"cls": "loss_cls", "box": "loss_bbox"} | {term: f"loss_{term}" for term in detector.terms[2:]}
    check_losses(case, computed, names)


def check_reppoints(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    check_maps(case, ["reppoints_cls_out", "boxes of the refined points"], [predictions.logits, predictions.boxes])
    names = ("loss_cls", "loss_pts_init", "loss_pts_refine")
    check_losses(case, computed, dict(zip(detector.terms, names, strict=True)))
    check_detections(case, jit(detector.decode)(predictions, computed.image_size), first_label)


def check_rcnn(case: Case, computed: Computed, first_label: int) -> None:
    detector, predictions = computed.detector, computed.predictions
    is_mmdet = case.meta["source"] == "mmdet"
    for output, name in enumerate(("objectness", "deltas")):
        expected = case.indexed(f"head/output_{output}/level_{{}}" if is_mmdet else f"rpn/{name}_{{}}")
        maps = getattr(predictions.rpn, name)
        for (level, actual), array in zip(maps.items(), expected, strict=True):
            assert_close(actual, array, f"{name} of {level}", OUTPUT_TOLERANCE)
    check_proposals(case, predictions.proposals, "proposals")
    if not is_mmdet:
        anchors = np.concatenate(list(jit(detector.anchors)(predictions.rpn).values()))
        assert_close(anchors, case.arrays["anchors"], "anchors", OUTPUT_TOLERANCE)
        check_rois(case, computed)
    check_rcnn_losses(case, computed)
    found = jit(detector.decode)(predictions, computed.image_size)
    check_detections(case, found, first_label)
    if detector.masks:
        check_masks(case, computed, first_label)


def check_proposals(case: Case, proposals: Proposals, name: str) -> None:
    for image in range(len(proposals.boxes)):
        kept = np.asarray(proposals.valid[image])
        actual = [np.asarray(x[image])[kept] for x in (proposals.boxes, proposals.scores)]
        if case.meta["source"] == "mmdet":
            expected = [case.whole(f"{name}_{image}/{part}") for part in ("boxes", "scores")]
        else:
            expected = [case.whole(f"{name}_{image}"), actual[1]]  # In order of their scores, which are not given.
        assert len(expected[0]) == len(actual[0])
        expected, actual = ([boxes, scores, np.zeros(len(boxes), int)] for boxes, scores in (expected, actual))
        share = matched(expected, actual) / max(len(actual[0]), 1)
        assert share >= MATCHED, f"{share:.1%} of image {image}'s {name} are the original's"


def check_rois(case: Case, computed: Computed) -> None:
    """Features and outputs of torchvision's proposals; in both, its background comes first."""
    detector = computed.detector
    rois = np.stack(case.indexed("proposals_{}"))
    run = functools.partial(jit(detector.apply, static_argnames=("size", "stage", "method")), computed.variables)
    pooled = run(computed.features, rois, size=7, method="pool")
    assert_close(np.asarray(pooled)[0, :16], case.arrays["pooled_first16"], "pooled", OUTPUT_TOLERANCE)
    logits, deltas = run(features=computed.features, rois=rois, stage=0, method="look")
    logits = np.roll(np.reshape(logits, (-1, logits.shape[-1])), 1, axis=-1)
    assert_close(logits, case.arrays["roi/class_logits"], "class logits", OUTPUT_TOLERANCE)
    assert_close(
        np.reshape(deltas, (len(logits), -1)), case.whole("roi/box_regression")[:, 4:], "boxes", OUTPUT_TOLERANCE
    )


def check_rcnn_losses(case: Case, computed: Computed) -> None:
    """Of all anchors and all RoIs: the originals drew no sample."""
    detector, targets, rpn = computed.detector, computed.targets, computed.predictions.rpn
    proposals = jit(functools.partial(detector.propose, train=True))(rpn, computed.image_size)
    is_mmdet = case.meta["source"] == "mmdet"
    if not is_mmdet:
        check_proposals(case, proposals, "train_proposals")
    if detector.masks:
        targets = targets._replace(masks=filled(targets.boxes, case.meta["image_size"]))
    sampling = Sampling(targets, jax.random.split(jax.random.key(0), len(targets.boxes)))
    # No more slots than there are proposals. Masks, which cost most, get a quarter of them unless more are positive.
    count = max(1, int(np.sum(proposals.valid, axis=1).max()))
    for samples in (count + targets.boxes.shape[1], 0):
        detector = detector.clone(anchor_samples=0, roi_samples=samples, train_proposals=count)
        heads = jit(functools.partial(detector.apply, method="heads"))
        predictions = heads(computed.variables, computed.features, computed.image_size, sampling)
        most = max(int(np.sum(stage.matches.positive, axis=1).max()) for stage in predictions.stages)
        if most < int(samples * POSITIVE_ROIS):
            break
    if is_mmdet:
        names = {"cls": "loss_cls", "box": "loss_bbox", "mask": "loss_mask", "rpn_cls": "loss_rpn_cls"}
        names |= {"rpn_box": "loss_rpn_bbox"}
        names |= {f"s{i}_{term}": f"s{i}.{names[term]}" for i in range(3) for term in ("cls", "box", "mask")}
    else:
        names = {"cls": "loss_classifier", "box": "loss_box_reg", "mask": "loss_mask", "rpn_cls": "loss_objectness"}
        names |= {"rpn_box": "loss_rpn_box_reg"}
    computed = computed._replace(detector=detector, predictions=predictions, targets=targets)
    check_losses(case, computed, {term: names[term] for term in detector.terms})


def filled(boxes: jax.Array, size: tuple[int, int]) -> Masks:
    """The masks of the cases: the boxes, rounded."""
    cells = max(size)
    corners = np.round(np.asarray(boxes)).astype(int)
    grid = np.zeros((*corners.shape[:2], cells, cells), bool)
    for image, places in enumerate(corners):
        for place, (left, top, right, bottom) in enumerate(places):
            grid[image, place, : min(bottom, size[0]) - top, : min(right, size[1]) - left] = True
    near = corners[..., :2].astype(np.float32)
    return Masks(grid, np.concatenate([near, near + cells], axis=-1))


def check_masks(case: Case, computed: Computed, first_label: int) -> None:
    """The masks that the case has of the original's own first detections."""
    for name in (name for name in case.arrays if "/masks_first" in name):
        image = int(name.split("/")[0].removeprefix("detection_"))
        expected = case.arrays[name]
        count = expected.shape[0]
        boxes, labels = (case.whole(f"detection_{image}/{part}")[None, :count] for part in ("boxes", "labels"))
        found = Detections(boxes, np.zeros((1, count)), labels - first_label, np.ones((1, count), bool))
        features = {level: np.asarray(x)[image : image + 1] for level, x in computed.features.items()}
        apply = jit(functools.partial(computed.detector.apply, method="find_masks"))
        masks = np.asarray(apply(computed.variables, features, found))[0]
        if case.meta["source"] == "torchvision":
            assert_close(masks[:, None], expected, name, OUTPUT_TOLERANCE)
            continue
        size = case.meta["image_size"]
        pasted = [coco_mask.decode(paste(mask, box, size)) for mask, box in zip(masks, boxes[0], strict=True)]
        check_pixels(np.stack(pasted).astype(bool), expected, name)


def check_pixels(actual: np.ndarray, expected: np.ndarray | Sample, name: str) -> None:
    if isinstance(expected, Sample):
        actual, expected = actual.reshape(-1)[expected.index], expected.values
    share = np.mean(actual == expected) if actual.size else 1.0
    assert share >= PIXELS, f"{share:.1%} of the pixels of {name} are the original's"


def check_solo(case: Case, computed: Computed, first_label: int) -> None:
    """The outputs are those of the original's inference: all masks at the size of the finest, and scores of peaks."""
    detector, predictions = computed.detector, computed.predictions
    counts = dict(zip(detector.steps, detector.grids, strict=True))

    @jit
    def all_masks(predictions: Any) -> list[jax.Array]:
        masks = []
        for level, count in counts.items():

            def of_image(image: Any, level: str = level, count: int = count) -> jax.Array:
                return detector.probabilities(image[0], level, np.arange(count**2), image[1])

            masks.append(jnp.moveaxis(jax.lax.map(of_image, (predictions, computed.image_size)), 1, -1))
        return masks

    masks, scores = {}, {}
    for number, (level, actual) in enumerate(zip(detector.steps, all_masks(predictions), strict=True)):
        name = f"head/output_0/level_{number}"
        assert_close(actual, case.arrays[name], name, OUTPUT_TOLERANCE)
        masks[level] = np.asarray(actual)
        name = f"head/output_1/level_{number}"
        sigmoids = np.asarray(jax.nn.sigmoid(predictions.logits[level]))
        scores[level] = as_decided(sigmoids, case.arrays[name])
        assert_close(scores[level], case.arrays[name], name, OUTPUT_TOLERANCE)
    # Its losses too were taken of these outputs of inference, as if they were logits; here each is a feature.
    images = len(computed.images)
    itself = {level: np.tile(np.eye(count**2, dtype=np.float32), (images, 1, 1)) for level, count in counts.items()}
    none = {level: np.zeros((images, count**2), np.float32) for level, count in counts.items()}
    taken = computed._replace(
        predictions=SOLOPredictions(scores, masks, itself, none),
        targets=computed.targets._replace(masks=filled(computed.targets.boxes, case.meta["image_size"])),
    )
    check_losses(case, taken, {"cls": "loss_cls", "mask": "loss_mask"})
    found = jit(detector.decode)(predictions, computed.image_size)
    # The original finds no boxes: its own are zeros.
    check_detections(case, found._replace(boxes=np.zeros_like(found.boxes)), first_label)
    for name in (name for name in case.arrays if "/masks_first" in name):
        image = int(name.split("/")[0].removeprefix("detection_"))
        expected, size = case.arrays[name], tuple(case.meta["image_size"])
        pasted = paste_whole(np.asarray(found.whole_masks[image, : expected.shape[0]]), size, size)
        pixels = np.array([coco_mask.decode(mask) for mask in pasted], bool).reshape(-1, *size)
        check_pixels(pixels, expected, name)


def as_decided(scores: np.ndarray, expected: np.ndarray | Sample) -> np.ndarray:
    """The scores (N, S, S, classes) of peaks and zeros elsewhere; of what ties but for the last bits as expected."""
    shifted = np.pad(scores, ((0, 0), (1, 0), (1, 0), (0, 0)))
    rival = np.max([shifted[:, :-1, :-1], shifted[:, :-1, 1:], shifted[:, 1:, :-1]], axis=0)
    peaks, tied = np.where(scores >= rival, scores, 0).reshape(-1), np.abs(scores - rival).reshape(-1) < 1e-6
    index, values = (
        (expected.index, expected.values) if isinstance(expected, Sample) else (slice(None), expected.reshape(-1))
    )
    assert tied.mean() < 1e-3
    peaks[index] = np.where(tied[index], values, peaks[index])
    return peaks.reshape(scores.shape)


CHECKS = {
    "retinanet": check_retinanet,
    "fcos": check_fcos,
    "reppoints": check_reppoints,
    "solo": check_solo,
    **dict.fromkeys(("atss", "gfl"), check_atss),
} | dict.fromkeys(("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"), check_rcnn)
"""By detector: compares everything behind the features."""


def test_there_are_cases() -> None:
    assert CASES, no_cases("detectors")


@pytest.mark.parametrize("path", quick_of(QUICK, CASES), ids=lambda path: path.stem)
def test_detector_is_the_original(path: Path) -> None:
    case = load_case(path)
    origin = original(case)
    if origin.model is None or origin.model["name"] not in MODELS:
        pytest.skip(f"kdjax has no detector for {case.meta.get('model') or case.meta['config']}")
    computed = compute(case, origin.source, origin.model, origin.num_classes, origin.first_label)
    check_features(case, computed.features)
    CHECKS[origin.model["name"]](case, computed, origin.first_label)
