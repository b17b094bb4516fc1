"""The judge agrees with pycocotools and with AP worked out by hand; the way from images to the judge loses nothing."""

import contextlib
import io
import json
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdjax.data.examples import Example
from kdjax.data.masks import rasterize
from kdjax.errors import UserError
from kdjax.evaluation import evaluate, make_predict, outputs
from kdjax.tasks import Detection
from kdjax.tasks.average_precision import AveragePrecision, ImageDetections, coco_metrics
from kdjax.types import Batch, Detections
from tests.sources import OfExamples

SUMMARY = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


class ListSource(list, OfExamples):
    """A source of examples made by hand."""

    def __init__(self, examples: list[Example], class_names: tuple[str, ...]):
        super().__init__(examples)
        self.class_names = class_names


def example(image_id, boxes, labels, crowd=None, area=None, image=None, segmentation=None) -> Example:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    return Example(
        image=np.zeros((8, 8, 3), np.uint8) if image is None else image,
        image_id=image_id,
        boxes=boxes,
        labels=np.asarray(labels, np.int32),
        crowd=np.zeros(len(boxes), bool) if crowd is None else np.asarray(crowd, bool),
        area=np.asarray(sides[:, 0] * sides[:, 1] if area is None else area, np.float32),
        segmentation=segmentation,
    )


def found(position, boxes, scores, labels, masks=None) -> ImageDetections:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return ImageDetections(position, boxes, np.asarray(scores, np.float32), np.asarray(labels, np.int32), masks)


def pycocotools_metrics(source, detections, kind="bbox") -> dict[str, Any]:
    """The same numbers by pycocotools, with category ids and annotation ids of its own."""
    truth, results = COCO(), []
    truth.dataset = {
        "info": {},
        "images": [dict(zip(("height", "width"), e.image.shape, strict=False), id=e.image_id) for e in source],
        "categories": [{"id": 10 + k, "name": name} for k, name in enumerate(source.class_names)],
        "annotations": [],
    }
    for e in source:
        outlines = e.segmentation or [[]] * len(e.boxes)
        columns = e.boxes.tolist(), e.labels, e.crowd, e.area, outlines
        for (x1, y1, x2, y2), label, crowd, area, outline in zip(*columns, strict=True):
            annotation = {"image_id": e.image_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(area)}
            annotation["segmentation"] = outline
            annotation |= {"iscrowd": int(crowd), "category_id": 10 + int(label)}
            truth.dataset["annotations"].append(annotation | {"id": 1 + len(truth.dataset["annotations"])})
    for d in detections:
        for i, ((x1, y1, x2, y2), score, label) in enumerate(zip(d.boxes.tolist(), d.scores, d.labels, strict=True)):
            where = {"segmentation": d.masks[i]} if kind == "segm" else {"bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(
                {"image_id": source[d.position].image_id, "score": float(score), "category_id": 10 + int(label)} | where
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()

    def percent(value):
        return math.nan if value == -1 else 100 * value

    per_class = {}
    for k, name in enumerate(source.class_names):
        values = judge.eval["precision"][:, :, k, 0, 2]
        per_class[name] = percent(np.mean(values[values > -1])) if (values > -1).any() else math.nan
    stats = [percent(judge.stats[i]) for i in range(12)]
    return dict(zip(SUMMARY, stats, strict=True)) | {"per_class": per_class}


def random_scene(seed: int, classes: int, images: int = 40) -> tuple[ListSource, list[ImageDetections]]:
    """Images with and without objects, crowds and detections; the last class never occurs if there are several.

    Boxes are fractional, areas are smaller than the boxes' as a mask's would be, and many scores are equal.
    """
    rng = np.random.default_rng(seed)
    examples, detections = [], []
    for i in rng.permutation(images):
        count = rng.integers(0, 7)
        corner, sides = rng.uniform(0, 300, (count, 2)), np.exp(rng.uniform(1.5, 5.5, (count, 2)))
        boxes = np.concatenate([corner, corner + sides], axis=1)
        labels = rng.integers(0, max(classes - 1, 1), count)
        crowd = rng.random(count) < 0.15
        area = rng.uniform(0.5, 1, count) * sides.prod(axis=1)
        examples.append(example(7 * int(i), boxes, labels, crowd, area))

        near = np.repeat(boxes, 3, axis=0)
        near = near + rng.normal(0, 0.08, near.shape) * np.tile(np.repeat(sides, 3, axis=0), 2)
        wild = np.sort(rng.uniform(0, 400, (4, 2, 2)), axis=1).reshape(4, 4)
        candidates, guesses = (
            np.concatenate([near, wild]),
            np.concatenate([np.repeat(labels, 3), rng.integers(0, classes, 4)]),
        )
        candidates[:, 2:] = np.maximum(candidates[:, 2:], candidates[:, :2])
        keep = rng.random(len(guesses)) < 0.7
        if rng.random() < 0.2:
            keep[:] = False
        scores = np.sort(np.round(rng.random(keep.sum()), 1))[::-1]
        detections.append(found(len(examples) - 1, candidates[keep], scores, guesses[keep]))
    return ListSource(examples, tuple(f"class {k}" for k in range(classes))), detections


@pytest.mark.parametrize(("seed", "classes"), [(0, 5), (1, 5), (2, 12), (3, 1), (4, 2)])
def test_metrics_equal_pycocotools(seed, classes):
    source, detections = random_scene(seed, classes)
    expected = pycocotools_metrics(source, detections)
    metrics = coco_metrics(source, detections)
    assert any(e.crowd.any() for e in source)
    assert any(len(d.scores) == 0 for d in detections)
    assert 5 < metrics["AP"] < 95
    np.testing.assert_allclose([metrics[k] for k in SUMMARY], [expected[k] for k in SUMMARY], rtol=1e-9)
    assert list(metrics["per_class"]) == list(source.class_names)
    np.testing.assert_allclose(list(metrics["per_class"].values()), list(expected["per_class"].values()), rtol=1e-9)


@pytest.mark.parametrize("first", [2**31, 2**53, 2**62, -(2**53)])
def test_ids_beyond_what_judges_compute_with_change_nothing(first):
    """A double has no number between 2**53 and 2**53 + 2: neighbours would be one image."""
    source, detections = random_scene(5, classes=3)
    renamed = ListSource([e._replace(image_id=first + e.image_id // 7) for e in source], source.class_names)
    assert coco_metrics(renamed, detections) == coco_metrics(source, detections)


def test_boxes_of_the_neighbouring_image_find_nothing():
    boxes = [[[0, 0, 40, 10]], [[50, 50, 60, 90]]]
    source = ListSource([example(2**53 + i, boxes[i % 2], [0]) for i in range(6)], ("a",))
    for shift, ap in ((0, 100), (1, 0)):
        detections = [found(i, boxes[(i + shift) % 2], [0.9], [0]) for i in range(6)]
        assert coco_metrics(source, detections)["AP"] == pytest.approx(ap)


def test_more_than_a_hundred_detections_equal_pycocotools():
    rng = np.random.default_rng(0)
    boxes = np.tile([10.0, 10, 60, 60], (130, 1)) + rng.normal(0, 6, (130, 4))
    source = ListSource([example(1, [[10, 10, 60, 60], [70, 70, 90, 95]], [0, 0])], ("a",))
    boxes[120] = [70, 70, 90, 95]  # beyond the first hundred: may not count
    detections = [found(0, boxes, np.linspace(1, 0.1, 130), np.zeros(130))]
    metrics, expected = coco_metrics(source, detections), pycocotools_metrics(source, detections)
    np.testing.assert_allclose([metrics[k] for k in SUMMARY], [expected[k] for k in SUMMARY], rtol=1e-9)
    assert metrics["AR100"] <= 50


def masked_scene(seed: int, classes: int) -> tuple[ListSource, list[ImageDetections]]:
    """Images of 90 x 120 with ellipses, as polygons and as run lengths of both kinds, and what is found near them."""
    rng = np.random.default_rng(seed)
    image = np.zeros((90, 120, 3), np.uint8)
    y, x = np.mgrid[:90, :120]
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)

    def encode(centre, axes):
        inside = np.hypot((y + 0.5 - centre[1]) / axes[1], (x + 0.5 - centre[0]) / axes[0]) <= 1
        runs = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
        return runs | {"counts": runs["counts"].decode()}

    def bounds(centre, axes):
        return np.concatenate([np.maximum(centre - axes, 0), np.minimum(centre + axes, [120, 90])])

    examples, detections = [], []
    for i in range(12):
        boxes, outlines, areas, found_boxes, masks = [], [], [], [], []
        count = int(rng.integers(0, 5))
        labels, crowd = rng.integers(0, classes, count), rng.random(count) < 0.15
        for k in range(count):
            centre, axes = rng.uniform([20, 20], [100, 70]), np.exp(rng.uniform(1.2, 3.5, 2))
            runs = encode(centre, axes)
            polygon = np.stack([centre[0] + axes[0] * np.cos(turn), centre[1] + axes[1] * np.sin(turn)], axis=1)
            outlines.append(runs if crowd[k] or k % 2 else [polygon.ravel().tolist()])
            boxes.append(bounds(centre, axes))
            areas.append(float(coco_mask.area(runs)))
            for _ in range(2):
                moved, resized = centre + rng.normal(0, 0.06, 2) * axes, axes * np.exp(rng.normal(0, 0.06, 2))
                found_boxes.append(bounds(moved, resized))
                masks.append(encode(moved, resized))
        examples.append(example(i, boxes, labels, crowd, areas, image, tuple(outlines)))
        scores = np.sort(rng.random(2 * count))[::-1]
        detections.append(found(i, found_boxes, scores, np.repeat(labels, 2), tuple(masks)))
    return ListSource(examples, tuple(f"class {k}" for k in range(classes))), detections


@pytest.mark.parametrize(("seed", "classes"), [(0, 3), (1, 1)])
def test_mask_metrics_equal_pycocotools(seed, classes):
    source, detections = masked_scene(seed, classes)
    metrics = coco_metrics(source, detections)
    expected = {"": pycocotools_metrics(source, detections), "mask_": pycocotools_metrics(source, detections, "segm")}
    assert any(e.crowd.any() for e in source)
    assert 5 < metrics["mask_AP"] < 95
    assert metrics["mask_AP"] != metrics["AP"]
    for prefix, numbers in expected.items():
        np.testing.assert_allclose([metrics[prefix + k] for k in SUMMARY], [numbers[k] for k in SUMMARY], rtol=1e-9)
        values = metrics[f"{prefix}per_class"]
        assert list(values) == list(source.class_names)
        np.testing.assert_allclose(list(values.values()), list(numbers["per_class"].values()), rtol=1e-9)


def test_masks_are_judged_only_where_both_sides_have_some():
    source, detections = masked_scene(2, 2)
    without = ListSource([e._replace(segmentation=None) for e in source], source.class_names)
    boxes_only = [d._replace(masks=None) for d in detections]
    for metrics in coco_metrics(without, detections), coco_metrics(source, boxes_only), coco_metrics(source, []):
        assert not [name for name in metrics if name.startswith("mask")]
    assert coco_metrics(source, boxes_only)["AP"] == coco_metrics(source, detections)["AP"] > 0


def test_ap_by_hand():
    # IoU 62 / 100: found at the thresholds 0.50, 0.55 and 0.60 of the ten.
    source = ListSource([example(3, [[0, 0, 100, 10]], [0])], ("a",))
    metrics = coco_metrics(source, [found(0, [[0, 0, 62, 10]], [0.9], [0])])
    assert metrics["AP"] == pytest.approx(30)
    assert (metrics["AP50"], metrics["AP75"]) == (100, 0)
    assert metrics["AR100"] == pytest.approx(30)
    assert metrics["per_class"] == {"a": pytest.approx(30)}
    # Area 1000 is small: no medium or large object to find.
    assert metrics["AP_small"] == pytest.approx(30)
    assert math.isnan(metrics["AP_medium"])
    assert math.isnan(metrics["AP_large"])


def test_half_of_the_objects_found():
    # Precision 1 up to recall 0.5: 51 of the 101 recalls 0, 0.01, ..., 1.
    source = ListSource([example(0, [[0, 0, 10, 10]], [1]), example(9, [[5, 5, 20, 30]], [1])], ("a", "b", "c"))
    metrics = coco_metrics(source, [found(1, [[5, 5, 20, 30]], [0.4], [1])])
    assert metrics["AP"] == pytest.approx(100 * 51 / 101)
    assert metrics["AR100"] == 50
    assert metrics["per_class"]["b"] == pytest.approx(100 * 51 / 101)
    assert math.isnan(metrics["per_class"]["a"])
    assert math.isnan(metrics["per_class"]["c"])


def test_crowds_are_neither_objects_nor_mistakes():
    boxes = [[0, 0, 50, 50], [60, 60, 200, 200]]
    source = ListSource([example(0, boxes, [0, 0], crowd=[False, True])], ("a",))
    inside_the_crowd = [70, 70, 90, 90]
    detections = [found(0, [inside_the_crowd, boxes[0]], [0.9, 0.8], [0, 0])]
    assert coco_metrics(source, detections)["AP"] == pytest.approx(100)
    without = ListSource([example(0, boxes[:1], [0])], ("a",))
    assert coco_metrics(without, detections)["AP"] == pytest.approx(50)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan():
    source = ListSource([example(0, [[0, 0, 9, 9]], [0]), example(1, [], [])], ("a", "b"))
    for detections in [], [found(0, [], [], []), found(1, [], [], [])]:
        metrics = coco_metrics(source, detections)
        assert (metrics["AP"], metrics["AP50"], metrics["AR100"], metrics["per_class"]["a"]) == (0, 0, 0, 0)
        assert math.isnan(metrics["per_class"]["b"])
    only_crowd = ListSource([example(0, [[0, 0, 9, 9]], [0], crowd=[True])], ("a", "b"))
    for empty in ListSource([example(0, [], [])], ("a", "b")), only_crowd:
        metrics = coco_metrics(empty, [found(0, [[0, 0, 9, 9]], [0.9], [0])])
        assert all(math.isnan(metrics[k]) for k in SUMMARY)
        assert all(math.isnan(value) for value in metrics["per_class"].values())


def test_the_judge_is_silent(capfd, caplog):
    caplog.set_level(0)
    coco_metrics(ListSource([example(0, [[0, 0, 9, 9]], [0])], ("a",)), [])
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if "coco" in record.name]


def test_strangers_are_refused():
    source = ListSource([example(0, [[0, 0, 9, 9]], [0])], ("a", "b"))
    with pytest.raises(ValueError, match="detections of an image at position 5: the source has 1 images"):
        coco_metrics(source, [found(5, [], [], [])])
    with pytest.raises(ValueError, match="a detection of class 2 in the image at position 0: the source has 2 classes"):
        coco_metrics(source, [found(0, [[0, 0, 1, 1]], [0.5], [2])])


class BrightBox(nn.Module):
    """Follows the detector's contract: finds the one bright rectangle of an image, moved by its only parameter.

    The second of its two slots is always empty. With ``shape``, it finds a mask in every box.
    """

    shape: tuple[tuple[float, ...], ...] | None = None

    @nn.compact
    def predict(self, images, image_size):
        assert image_size.shape == (images.shape[0], 2)
        shift = self.param("shift", nn.initializers.zeros, ())
        bright = images[..., 0] > 127

        def span(line):
            return jnp.argmax(line, axis=1), line.shape[1] - jnp.argmax(line[:, ::-1], axis=1)

        (y1, y2), (x1, x2) = span(bright.any(axis=2)), span(bright.any(axis=1))
        box = jnp.stack([x1, y1, x2, y2], axis=-1) + shift
        boxes = jnp.stack([box, jnp.zeros_like(box)], axis=1)
        count = len(boxes)
        return Detections(
            boxes=boxes,
            scores=jnp.tile(jnp.array([[0.9, 0.0]]), (count, 1)),
            labels=jnp.tile(jnp.array([[1, 0]]), (count, 1)),
            valid=jnp.tile(jnp.array([[True, False]]), (count, 1)),
            masks=None if self.shape is None else jnp.tile(jnp.array(self.shape), (count, 2, 1, 1)),
        )


def bright_source(count: int) -> ListSource:
    """Images of three shapes, each with a white rectangle on black; ids run backwards."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        height, width = [(64, 64), (32, 64), (128, 64)][i % 3]
        # Multiples of 4: exact after halving.
        x1, y1 = 4 * int(rng.integers(0, width // 8)), 4 * int(rng.integers(0, height // 8))
        x2, y2 = x1 + 4 * int(rng.integers(2, width // 8)), y1 + 4 * int(rng.integers(2, height // 8 + 1))
        image = np.zeros((height, width, 3), np.uint8)
        image[y1:y2, x1:x2] = 255
        examples.append(example(100 - i, [[x1, y1, x2, y2]], [1], image=image))
    return ListSource(examples, ("nothing", "box"))


@pytest.fixture(scope="module")
def predict():
    return make_predict(BrightBox())


def judged(predict, variables, source, batch_size=8):
    """The metrics of a model on a source, and what it found, image by image."""
    metrics, judge = evaluate(predict, variables, source, Detection(), batch_size=batch_size, image_size=(64, 64))
    return metrics, sorted(judge.images(judge.state()), key=lambda image: image.position)


def test_evaluate_maps_boxes_back_and_keeps_the_last_partial_batch(predict):
    source = bright_source(19)  # 16 + 3 images on 8 devices
    variables = {"params": {"shift": jnp.zeros(())}}
    metrics, detections = judged(predict, variables, source, 16)
    assert [d.position for d in detections] == list(range(19))
    for d, e in zip(detections, source, strict=True):
        np.testing.assert_allclose(d.boxes, e.boxes, atol=1e-4)
        np.testing.assert_array_equal(d.labels, [1])
        np.testing.assert_allclose(d.scores, [0.9])
    assert metrics["AP"] == pytest.approx(100)


def test_evaluate_uses_the_variables_and_clips_to_the_original_image(predict):
    source = bright_source(3)
    variables = {"params": {"shift": jnp.full((), 1000.0)}}
    metrics, detections = judged(predict, variables, source)
    assert metrics["AP"] == 0
    for d, e in zip(detections, source, strict=True):
        height, width, _ = e.image.shape
        np.testing.assert_array_equal(d.boxes, [[width, height, width, height]])


def test_evaluate_pastes_masks_into_the_original_images():
    # The left half of the box; the source's masks are the whole box, or its left half exactly.
    predict = make_predict(BrightBox(shape=((1.0, 1.0, 0.0, 0.0),) * 4))
    source = bright_source(9)

    def outlined(e, share):
        ((x1, y1, x2, y2),) = e.boxes.tolist()
        x2 = x1 + share * (x2 - x1)
        return e._replace(segmentation=([[x1, y1, x2, y1, x2, y2, x1, y2]],))

    variables = {"params": {"shift": jnp.zeros(())}}
    by_share = {}
    for share in (1.0, 0.5):
        outlines = ListSource([outlined(e, share) for e in source], source.class_names)
        metrics, detections = judged(predict, variables, outlines)
        assert metrics["AP"] == pytest.approx(100)
        by_share[share] = metrics
    for d, e in zip(detections, source, strict=True):
        ((x1, y1, x2, y2),) = e.boxes.astype(int).tolist()
        mask = rasterize(d.masks[0], e.image.shape[:2])
        half = np.zeros_like(mask)
        half[y1:y2, x1 : (x1 + x2) // 2] = True
        # Corners are rounded: there half of the interpolated mask is outside.
        assert not (mask & ~half).any()
        assert (half & ~mask).sum() <= 0.1 * half.sum()
    assert by_share[0.5]["mask_AP"] > 80
    assert by_share[1.0]["mask_AP50"] < 50


def test_evaluate_refuses_a_batch_that_devices_cannot_share(predict):
    with pytest.raises(ValueError, match="batch size 12 must be a multiple of the 8 devices"):
        judged(predict, {}, bright_source(1), 12)


def test_the_next_batch_starts_before_the_last_is_unpacked():
    started = []

    def fake_predict(variables, images, image_size):
        started.append(len(images))
        slots = images.shape[:2]
        return Detections(
            np.zeros((*slots, 1, 4), np.float32),
            np.zeros((*slots, 1)),
            np.zeros((*slots, 1), int),
            np.ones((*slots, 1), bool),
        )

    index = np.where(np.arange(8) < 5, np.arange(8), -1)
    batch = Batch(np.zeros((8, 4, 4, 3), np.uint8), np.full((8, 2), 4), index)
    results = outputs(fake_predict, {}, [batch] * 3)
    seen, output = next(results)
    assert seen is batch
    assert output.boxes.shape == (8, 1, 4)
    assert started == [8, 8]
    assert len(list(results)) == 2
    judge = AveragePrecision(bright_source(5))
    judge.add(output, seen)
    assert judge.state()["position"].tolist() == list(range(5))


def test_states_of_several_processes_merge_to_the_whole_in_any_order():
    """Masks, images without detections, and a process that saw none."""
    source, detections = masked_scene(3, 4)
    whole = AveragePrecision(source)
    parts = [AveragePrecision(source) for _ in range(3)]
    whole._found = detections
    for number, image in enumerate(detections):
        parts[number % 2]._found.append(image)
    states = [part.state() for part in parts]
    states[2] |= {name: states[0][name][:0] for name in ("mask_length", "mask_bytes")}
    expected = coco_metrics(source, detections)
    assert expected["mask_AP"] > 0
    for metrics in (whole.merge([whole.state()]), whole.merge(states[::-1])):
        np.testing.assert_equal(metrics, expected)


def whole_mask_outputs() -> tuple[Batch, Detections]:
    """One image of 32 x 48 pixels, scaled to 64 x 96 of 64 x 128: a mask of its left half, and a wrong one."""
    masks = np.zeros((1, 2, 16, 32), np.uint8)
    masks[0, 0, :, :12], masks[0, 1, :4, 20:24] = 255, 255
    boxes = np.zeros((1, 2, 4), np.float32)
    scores, labels = np.array([[0.9, 0.5]], np.float32), np.zeros((1, 2), np.int32)
    batch = Batch(np.zeros((1, 64, 128, 3), np.uint8), np.array([[64, 96]], np.int32), np.array([0]))
    return batch, Detections(boxes, scores, labels, np.ones((1, 2), bool), whole_masks=masks)


def test_a_detector_without_boxes_is_judged_by_its_masks():
    outline = ([[0, 0, 24, 0, 24, 32, 0, 32]],)
    source = ListSource([example(1, [[0, 0, 24, 32]], [0], image=np.zeros((32, 48, 3), np.uint8))], ("thing",))
    source[0] = source[0]._replace(segmentation=outline)
    batch, outputs = whole_mask_outputs()
    judge = AveragePrecision(source)
    judge.add(outputs, batch)
    metrics = judge.merge([judge.state()])
    assert metrics["AP"] == metrics["mask_AP"] == pytest.approx(100)
    (image,) = judge.images(judge.state())
    assert image.boxless
    np.testing.assert_array_equal(image.boxes, [[0, 0, 24, 32], [40, 0, 48, 8]])
    said = json.loads(json.dumps(judge.kept(1)[0], default=np.ndarray.tolist))
    hit, alarm = Detection().judged(source[0], said, source.class_names).drawing.marks
    assert (hit.mask, alarm.mask) == image.masks
    # By boxes the same would be found of an object that is half of that box.
    half = source[0]._replace(segmentation=([[0, 0, 24, 0, 0, 32]],))
    judge = AveragePrecision(ListSource([half], ("thing",)))
    judge.add(outputs, batch)
    assert judge.merge([judge.state()])["AP"] < 30


def test_masks_without_boxes_cannot_be_judged_without_outlines():
    source = ListSource([example(1, [[0, 0, 24, 32]], [0])], ("thing",))
    source.origin = "boxes.json"
    batch, outputs = whole_mask_outputs()
    with pytest.raises(UserError, match=r"finds masks and no boxes, but boxes.json has no outlines of its objects"):
        AveragePrecision(source).add(outputs, batch)
