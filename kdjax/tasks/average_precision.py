"""COCO average precision of what a detector finds in a source.

faster-coco-eval is the judge; this module only brings it numbers: detections leave the padded image for the pixels of
the original one here, and boxes become the judge's ``(x, y, width, height)``. The file is long because boxes and masks,
numbers and curves go one way to it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask

from kdjax.charts import Chart
from kdjax.data.examples import ObjectSource
from kdjax.data.masks import RunLengths, paste, paste_whole, run_lengths
from kdjax.data.sizing import Size
from kdjax.errors import UserError
from kdjax.tasks.object_charts import objects_chart, precision_chart
from kdjax.types import Batch, Detections

COCO_DETECTIONS = 100
"""Detections of an image that COCO's metrics are about."""

_SUMMARY = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR{}", "AR_small", "AR_medium", "AR_large"),
)
"""COCO's twelve numbers, in the judge's order; one has the limit of detections in its name."""


class ImageDetections(NamedTuple):
    """What a detector found in one image, best first, as NumPy arrays."""

    position: int
    """Of the image in its source."""
    boxes: np.ndarray
    """(n, 4) float32, xyxy in pixels of the original image, clipped to it."""
    scores: np.ndarray
    """(n,) float32 in [0, 1], descending."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    masks: tuple[RunLengths, ...] | None = None
    """Of detectors that find masks: the pixels of the original image that each object covers."""
    boxless: bool = False
    """Whether the detector finds masks alone: its boxes are those around them, and its AP is that of masks."""


class Metrics(TypedDict):
    """COCO's numbers in percent, 0 to 100; NaN where the source has no object to find.

    Where another number of detections is judged than COCO's 100, that number stands in place of it, as in ``AR300``.
    """

    AP: float
    """Mean over the IoU thresholds 0.50, 0.55, ..., 0.95, and over classes: by the IoU of boxes, of detectors that find
    none by the IoU of masks."""
    AP50: float
    AP75: float
    AP_small: float
    """Objects of area up to 32 squared, in pixels of the original image."""
    AP_medium: float
    """Objects between small and large."""
    AP_large: float
    """Objects of area from 96 squared."""
    AR1: float
    """Average recall of the best detection of each image."""
    AR10: float
    """Of the 10 best, and so on."""
    AR100: float
    AR_small: float
    """Average recall of small objects, by the 100 best detections of each image."""
    AR_medium: float
    AR_large: float
    per_class: dict[str, float]
    """AP of each class, in the source's order."""
    mask_AP: NotRequired[float]
    """Where masks were found and the source has some, by the IoU of masks instead of boxes, like all that follows."""
    mask_AP50: NotRequired[float]
    mask_AP75: NotRequired[float]
    mask_AP_small: NotRequired[float]
    mask_AP_medium: NotRequired[float]
    mask_AP_large: NotRequired[float]
    mask_AR1: NotRequired[float]
    mask_AR10: NotRequired[float]
    mask_AR100: NotRequired[float]
    mask_AR_small: NotRequired[float]
    mask_AR_medium: NotRequired[float]
    mask_AR_large: NotRequired[float]
    mask_per_class: NotRequired[dict[str, float]]


class AveragePrecision:
    """A :class:`kdjax.types.Judge`: gathers detections by the position of their image in the source."""

    def __init__(self, source: ObjectSource, max_detections: int = COCO_DETECTIONS):
        """Knows nothing yet of what is found in the images of a source; of each the best detections are judged."""
        self._source, self._max_detections = source, max_detections
        self._found: list[ImageDetections] = []

    def add(self, outputs: Detections, batch: Batch) -> None:
        """Takes the detections of a batch, in pixels of its padded images; blank images are left out.

        Raises:
            UserError: detections without boxes, on a source without outlines.
        """
        if outputs.whole_masks is not None and self._source.objects(0).segmentation is None:
            raise UserError(
                f"This detector finds masks and no boxes, but {self._source.origin} has no outlines of its objects, by "
                "which masks are judged: take coco_json:<folder> with segmentations, or shapes."
            )
        self._found.extend(original_pixels(outputs, batch, self._source))

    def state(self) -> dict[str, np.ndarray]:
        """The detections of all images one after another, and how many each image has."""
        found = self._found
        state = {
            "position": np.array([image.position for image in found], np.int64),
            "count": np.array([len(image.scores) for image in found], np.int64),
            "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes for image in found)]),
            "scores": np.concatenate([np.zeros(0, np.float32), *(image.scores for image in found)]),
            "labels": np.concatenate([np.zeros(0, np.int32), *(image.labels for image in found)]),
        }
        if found and all(image.masks is not None for image in found):
            masks = [mask["counts"].encode() for image in found for mask in image.masks or ()]
            state["mask_length"] = np.array([len(mask) for mask in masks], np.int64)
            state["mask_bytes"] = np.frombuffer(b"".join(masks), np.uint8)
            state["boxless"] = np.array([image.boxless for image in found])
        return state

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> Metrics:
        """COCO's metrics of what all processes found."""
        found = [image for state in states for image in self.images(state)]
        return coco_metrics(self._source, found, self._max_detections)

    def charts(self, states: Sequence[Mapping[str, np.ndarray]]) -> list[Chart]:
        """Precision over recall, and what is taken for what."""
        found = [image for state in states for image in self.images(state)]
        curves = precision_chart(precisions(self._source, found, self._max_detections))
        return [curves, objects_chart(self._source, found)]

    def kept(self, count: int) -> dict[int, dict[str, Any]]:
        """The detections of the source's first images, by position, under the data set's own ids."""
        first = {image.position: image._asdict() for image in self._found if image.position < count}
        return {at: {"image_id": self._source.image_id(image.pop("position")), **image} for at, image in first.items()}

    def images(self, state: Mapping[str, np.ndarray]) -> Iterator[ImageDetections]:
        """The detections of a :meth:`state`, image by image."""
        ends = np.cumsum(state["count"])
        mask_ends = np.cumsum(state["mask_length"]) if "mask_length" in state else None
        boxless = state.get("boxless", np.zeros(len(ends), bool)).tolist()
        for position, end, count, alone in zip(state["position"].tolist(), ends, state["count"], boxless, strict=True):
            rows = slice(end - count, end)
            masks = None
            if mask_ends is not None:
                size = list(self._source.size(position))
                masks = tuple(
                    {"size": size, "counts": state["mask_bytes"][stop - length : stop].tobytes().decode()}
                    for stop, length in zip(mask_ends[rows], state["mask_length"][rows], strict=True)
                )
            boxes, scores, labels = (state[name][rows] for name in ("boxes", "scores", "labels"))
            yield ImageDetections(position, boxes, scores, labels, masks, alone)


def original_pixels(output: Detections, batch: Batch, source: ObjectSource) -> Iterator[ImageDetections]:
    """Splits the outputs (N, ...) of a batch into images, without blank ones and empty slots, in original pixels."""
    positions = np.asarray(batch.index)
    for row in np.flatnonzero(positions >= 0).tolist():
        position = int(positions[row])
        found = in_original(output, row, batch.size[row], source.size(position))
        yield ImageDetections(position, *found, boxless=output.whole_masks is not None)


def in_original(
    output: Detections, row: int, size: Any, original: Size, least: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[RunLengths, ...] | None]:
    """What was found in one image of a batch, as :class:`ImageDetections` has it.

    Args:
        output: (N, ...) of the batch.
        row: of the image.
        size: (2,) its height and width in the padded array.
        original: its own.
        least: score from which on detections count.

    Returns:
        boxes, scores, labels and masks in pixels of the original image.
    """
    boxes, scores, labels, valid = (np.asarray(x[row]) for x in output[:4])
    (height, width), kept = original, valid & ~(scores < least)
    # Per axis: rounding to whole pixels makes the two scales of a resized image differ slightly.
    ratio = (np.array(original) / np.asarray(size)).astype(np.float32)
    clipped = np.clip(boxes[kept] * ratio[[1, 0, 1, 0]], 0, np.array([width, height, width, height], np.float32))
    masks = None
    if output.whole_masks is not None:
        scaled = int(size[0]), int(size[1])
        masks = tuple(paste_whole(np.asarray(output.whole_masks[row])[kept], scaled, original))
        clipped = _around(masks)
    if output.masks is not None:
        found = np.asarray(output.masks[row])[kept]
        masks = tuple(paste(mask, box, original) for mask, box in zip(found, clipped, strict=True))
    return clipped, scores[kept], labels[kept], masks


def _around(masks: Sequence[RunLengths]) -> np.ndarray:
    """The boxes (n, 4) float32 around masks, xyxy in whole pixels; zeros around an empty one."""
    boxes = coco_mask.toBbox(list(masks)).reshape(-1, 4).astype(np.float32)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def coco_metrics(
    source: ObjectSource, detections: Iterable[ImageDetections], max_detections: int = COCO_DETECTIONS
) -> Metrics:
    """COCO's metrics of ``detections`` against the objects of ``source``, crowds being ignore regions.

    Images of the source without detections count as found empty. Masks are judged as well if all detections have some
    and the source has segmentations; of detectors without boxes they alone are.

    Raises:
        ValueError: a detection names an image or a class that the source does not have.
    """
    detections = list(detections)
    masks = bool(detections) and all(found.masks is not None for found in detections)
    masks = masks and all(source.objects(i).segmentation is not None for i in range(len(source)))
    images, truth = _truth(source, masks)
    by_box, by_mask = _found(source, detections, masks)

    def judge(found: Iterable[dict[str, Any]], kind: str) -> dict[str, Any]:
        evaluated = _evaluated(images, source.class_names, truth, max_detections, found, kind)
        return _numbers(evaluated, source.class_names, max_detections)

    of_masks = judge(by_mask, "segm") if masks else {}
    metrics = dict(of_masks) if masks and _boxless(detections) else judge(by_box, "bbox")
    metrics |= {f"mask_{name}": value for name, value in of_masks.items()}
    return cast(Metrics, metrics)


def precisions(
    source: ObjectSource, detections: Iterable[ImageDetections], max_detections: int = COCO_DETECTIONS
) -> dict[float, np.ndarray]:
    """By IoU threshold, 0.5 and 0.75, the precision (101,) in percent at the recalls 0, 1, ..., 100 %.

    It is the mean over the classes that the source has objects of, of all sizes, as in :func:`coco_metrics`, by masks
    of detectors without boxes; NaN where there is none.
    """
    detections = list(detections)
    boxless = _boxless(detections)
    images, truth = _truth(source, masks=boxless)
    by_box, by_mask = _found(source, detections, masks=boxless)
    results, kind = (by_mask, "segm") if boxless else (by_box, "bbox")
    evaluated = _evaluated(images, source.class_names, truth, max_detections, results, kind)
    precision = evaluated.eval["precision"][:, :, :, 0, -1]
    there = (precision >= 0).all(axis=(0, 1))
    nothing = np.full(precision.shape[1], np.nan)
    return {
        threshold: 100 * precision[place][:, there].mean(axis=1) if there.any() else nothing
        for threshold, place in ((0.5, 0), (0.75, 5))
    }


def _boxless(detections: Sequence[ImageDetections]) -> bool:
    """Whether a detector without boxes found them."""
    return bool(detections) and all(found.boxless for found in detections)


def _truth(source: ObjectSource, masks: bool) -> tuple[dict[int, Size], list[dict[str, Any]]]:
    """The sizes of the images by their ranks, and COCO's annotations of their objects, with masks if wanted."""
    ranks = _ranks([source.image_id(i) for i in range(len(source))])
    images: dict[int, Size] = {}
    truth: list[dict[str, Any]] = []
    for i in range(len(source)):
        objects = source.objects(i)
        images[ranks[i]] = objects.size
        columns = {"area": objects.area.tolist(), "iscrowd": objects.crowd.astype(int).tolist()}
        if masks and objects.segmentation is not None:
            columns["segmentation"] = [run_lengths(outline, objects.size) for outline in objects.segmentation]
        truth.extend(_annotations(ranks[i], objects.boxes, objects.labels, columns))
    return images, truth


def _found(
    source: ObjectSource, detections: Sequence[ImageDetections], masks: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """COCO's results of what was found, judged by boxes and, if wanted, by masks.

    Raises:
        ValueError: as :func:`coco_metrics`.
    """
    ranks = _ranks([source.image_id(i) for i in range(len(source))])
    classes = len(source.class_names)
    by_box: list[dict[str, Any]] = []
    by_mask: list[dict[str, Any]] = []
    for found in detections:
        position, boxes, labels = found.position, found.boxes, found.labels
        if not 0 <= position < len(ranks):
            raise ValueError(f"detections of an image at position {position}: the source has {len(ranks)} images")
        if labels.size and labels.max() >= classes:
            raise ValueError(
                f"a detection of class {labels.max()} in the image at position {position}: the source has {classes} "
                "classes"
            )
        columns = {"score": found.scores.tolist()}
        area = np.prod(boxes[:, 2:].astype(float) - boxes[:, :2], axis=1).tolist()
        by_box.extend(_annotations(ranks[position], boxes, labels, columns | {"area": area}))
        if masks and found.masks:
            columns |= {"segmentation": list(found.masks), "area": coco_mask.area(list(found.masks)).tolist()}
            by_mask.extend(_annotations(ranks[position], boxes, labels, columns))
    return by_box, by_mask


def _ranks(ids: Sequence[int]) -> list[int]:
    """The rank of each id among all.

    The judge knows images by it: ids may be beyond what it computes with, and their order decides between detections
    of equal scores.
    """
    ranks = [0] * len(ids)
    for rank, position in enumerate(sorted(range(len(ids)), key=ids.__getitem__)):
        ranks[position] = rank
    return ranks


def _numbers(judge: COCOeval_faster, class_names: Sequence[str], max_detections: int) -> dict[str, Any]:
    """The numbers of :class:`Metrics`, of what COCO's judge has judged."""
    metrics: dict[str, Any] = {
        name.format(max_detections): _percent(judge.stats[place]) for place, name in enumerate(_SUMMARY)
    }
    # (IoU thresholds, recalls, classes, areas, limits of detections): all areas, the last limit.
    precision = judge.eval["precision"][:, :, :, 0, -1]
    # A class without objects is -1 throughout, and so is its mean.
    metrics["per_class"] = {name: _percent(precision[:, :, k].mean()) for k, name in enumerate(class_names)}
    return metrics


def _evaluated(
    images: Mapping[int, Size],
    class_names: Sequence[str],
    truth: Iterable[dict[str, Any]],
    max_detections: int,
    found: Iterable[dict[str, Any]],
    kind: str,
) -> COCOeval_faster:
    """COCO's judge, once it has judged."""
    judge = COCOeval_faster(
        _coco(images, class_names, truth),
        _coco(images, class_names, found),
        iouType=kind,
        print_function=_silent,
    )
    judge.params.maxDets = [1, 10, max_detections]
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge


def _annotations(
    image_id: int, boxes: np.ndarray, labels: np.ndarray, columns: Mapping[str, list[Any]]
) -> Iterator[dict[str, Any]]:
    """COCO's dictionaries of one image's xyxy boxes; each column has a value for each of them."""
    for box, label, *values in zip(coco_boxes(boxes), labels.tolist(), *columns.values(), strict=True):
        yield {"image_id": image_id, "bbox": box, "category_id": label, **dict(zip(columns, values, strict=True))}


def coco_boxes(boxes: np.ndarray) -> list[list[float]]:
    """COCO's x, y, width and height of boxes (n, 4) xyxy.

    In float64, as the judge computes: a width subtracted in float32 would shift areas across COCO's size limits.
    """
    boxes = boxes.astype(float)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _coco(images: Mapping[int, Size], class_names: Sequence[str], annotations: Iterable[dict[str, Any]]) -> COCO:
    """The judge's view of annotations, in memory; the class with label k has category id k."""
    return COCO(
        {
            "images": [{"id": key, "height": height, "width": width} for key, (height, width) in images.items()],
            "categories": [{"id": label, "name": name} for label, name in enumerate(class_names)],
            # From 1: the judge marks what it could not match by the annotation id 0.
            "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
        },
        print_function=_silent,
    )


def _percent(value: float) -> float:
    """The judge's fraction in percent; it says -1 where there is nothing to find."""
    return 100 * float(value) if value >= 0 else math.nan


def _silent(*_: Any) -> None:
    """Takes the place of the judge's ``print``."""
