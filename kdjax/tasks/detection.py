"""Detection: boxes, and masks where detectors learn them, judged by COCO's average precision."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kdjax.data import statistics
from kdjax.data.examples import Example, ObjectSource, Segmentation
from kdjax.data.masks import mask_grid, rasterize
from kdjax.data.objects import moved
from kdjax.data.sizing import Size, Sizing
from kdjax.data.transforms import Geometry
from kdjax.errors import UserError
from kdjax.losses import ClassStatistics
from kdjax.models import model_class
from kdjax.options import defaults
from kdjax.report import known
from kdjax.tasks.average_precision import COCO_DETECTIONS, AveragePrecision, ImageDetections
from kdjax.tasks.cut import refuse_cut
from kdjax.tasks.found_objects import SCORE, ObjectResults
from kdjax.types import Batch, Column, Judged, Masks, Suggestion, Targets
from kdjax.visualize import (
    DRAWN_SCORE,
    FALSE_ALARM,
    HIT,
    MISS,
    Drawing,
    Mark,
    image_of,
    judged_marks,
    legend,
    object_marks,
    save_predictions,
    truth_marks,
)

_GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Detection:
    """The task of object detectors, see :class:`kdjax.types.Task`."""

    max_objects: int = 16
    """Room for objects in an image; of more, those with the largest boxes are kept. Crowds take what they leave."""
    mask_size: int = 0
    """Side of the grids of masks; 0 for targets without masks."""
    max_detections: int = COCO_DETECTIONS
    """Detections of an image that are judged."""

    name: ClassVar[str] = "detection"
    primary: ClassVar[str] = "AP"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, str]] = {
        "AP": "AP",
        "AP50": "AP50",
        "AP75": "AP75",
        "APs": "AP_small",
        "APm": "AP_medium",
        "APl": "AP_large",
        "mask AP": "mask_AP",
    }
    spoken: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75", "mask_AP")
    floors: ClassVar[Mapping[str, float]] = {"shapes": 10.0}
    """The teacher of every config reaches 24 on the embedded data."""

    @classmethod
    def of(cls, data: Any) -> "Detection":
        """The task on data as the config has them.

        Raises:
            UserError: evaluation would see a part of each image only.
        """
        refuse_cut(data)
        return cls(data.max_objects, data.mask_size if data.masks else 0, data.max_detections)

    def complete_model(self, model: dict[str, Any]) -> None:
        """Lets a detector return as many detections as are judged."""
        if self.max_detections == COCO_DETECTIONS:
            return
        # One that is unknown is refused where models are checked.
        with contextlib.suppress(UserError, KeyError):
            if "max_detections" in defaults(model_class(model["name"])):
                model["head"] = {"max_detections": self.max_detections} | model.get("head", {})

    def check_model(self, model: Any, where: str) -> None:
        """Raises UserError where the model learns masks and the data have none, or finds less than is judged."""
        if model.learns_masks and not self.mask_size:
            raise UserError(
                f"config.data.masks is False, but {where}, which learns masks: set config.data.masks=True, with data "
                "that have outlines."
            )
        most = getattr(model, "max_detections", None)
        if most is not None and most < self.max_detections != COCO_DETECTIONS:
            raise UserError(
                f"config.data.max_detections is {self.max_detections}, but {where}, which returns {most}: set "
                f"{where.partition(' is ')[0]}.head.max_detections={self.max_detections}."
            )

    def check_source(self, source: Any) -> None:
        """Raises UserError where a source has no boxes, or masks are to be made and it has no outlines."""
        _check_boxes(source)
        if self.mask_size and source.objects(0).segmentation is None:
            raise UserError(
                f"config.data.masks is True, but {source.origin} has no outlines of its objects, of which masks are "
                "made: take coco_json:<folder> with segmentations, or shapes; where no stage learns masks, set "
                "config.data.masks=False."
            )

    def targets(self, images: int, shape: Size) -> Targets:
        """Room for the objects of as many images."""
        del shape  # Boxes are as many in images of any size.
        slots = images, self.max_objects
        grid = np.zeros((*slots, self.mask_size, self.mask_size), np.bool_), np.zeros((*slots, 4), np.float32)
        arrays = [
            np.zeros((*slots, 4), np.float32),
            np.zeros(slots, np.int32),
            np.zeros(slots, np.bool_),
            np.zeros(slots, np.bool_),
            Masks._make(grid) if self.mask_size else None,
        ]
        return Targets._make(arrays)

    def fill(self, targets: Targets, row: int, example: Example, geometry: Geometry) -> None:
        """Fills a row with the objects of an example where a geometry puts them."""
        if not self.mask_size:
            example = example._replace(segmentation=None)
        _put_objects(moved(example, geometry), targets, row, geometry.size)

    def judge(self, source: ObjectSource) -> AveragePrecision:
        """COCO's average precision on a source."""
        _check_boxes(source)
        return AveragePrecision(source, self.max_detections)

    def results(
        self, class_names: Sequence[str], category_ids: Sequence[int], threshold: float | None
    ) -> ObjectResults:
        """Boxes and masks, in COCO's results format."""
        return ObjectResults(tuple(class_names), tuple(category_ids), SCORE if threshold is None else threshold)

    def draw(self, path: str | os.PathLike[str], source: ObjectSource, columns: Mapping[str, Column]) -> None:
        """Draws the ground truth, and what each model found, missed and made up."""
        found = {
            f"{name}  {self.primary} {known(column.metrics.get(self.primary, math.nan), '.1f')}": [
                _detections(position, entry) for position, entry in enumerate(column.kept)
            ]
            for name, column in columns.items()
        }
        save_predictions(path, source, found)

    def judged(self, example: Example, said: Any, class_names: Sequence[str]) -> Judged:
        """Hits, misses and false alarms; the score is the F1 of what is drawn, 100 where nothing is to be found."""
        names = class_names if len(class_names) > 1 else ("",)
        if said is None:
            return Judged(100.0, "truth", Drawing(example.image, object_marks(example, names), legend=legend()))
        marks = judged_marks(example, _detections(0, said), names, DRAWN_SCORE)
        hits, misses, alarms = (sum(mark.colour == colour for mark in marks) for colour in (HIT, MISS, FALSE_ALARM))
        whole = 2 * hits + misses + alarms
        words = f"{hits} found, {misses} missed, {alarms} false alarm{'s' * (alarms != 1)}"
        return Judged(200 * hits / whole if whole else 100.0, words, Drawing(example.image, marks))

    def remarks(self, source: ObjectSource, sizing: Sizing) -> list[str]:
        """How large boxes are once scaled."""
        return statistics.sizes_in_words(source, sizing)

    def suggest(self, source: ObjectSource) -> Suggestion | None:
        """Images of about the embedded data's area, larger where objects would be too small; and what augments them."""
        return statistics.suggest(source)

    def statistics(self, source: ObjectSource) -> ClassStatistics:
        """What the boxes of a source look like, class by class."""
        return statistics.class_statistics(source)

    def describe(self, source: ObjectSource) -> list[str]:
        """Counts and sizes of the objects of a source."""
        return statistics.describe(source)

    def drawn(self, batch: Batch, row: int, class_names: Sequence[str]) -> Drawing:
        """The objects and the regions to ignore of an image of a batch."""
        boxes, labels, valid, crowd = (np.asarray(x[row]) for x in batch.targets[:4])
        # Regions to ignore have no class in a batch.
        ignored = [Mark(box, "crowd", _GREY) for box in boxes[crowd]]
        marks = truth_marks(boxes[valid], labels[valid], crowd[valid], class_names) + ignored
        return Drawing(image_of(batch, row), marks)


def _detections(position: int, kept: Mapping[str, Any]) -> ImageDetections:
    """What a judge of detectors kept of an image."""
    return ImageDetections(
        position=position,
        boxes=np.asarray(kept["boxes"], np.float32).reshape(-1, 4),
        scores=np.asarray(kept["scores"], np.float32),
        labels=np.asarray(kept["labels"], np.int32),
        masks=tuple(kept["masks"]) if kept.get("masks") else None,
    )


def _check_boxes(source: Any) -> None:
    if not hasattr(source, "objects"):
        raise UserError(
            f"config.task is detection, but {source.origin} has no boxes: take a config of its task, such as "
            "--config=mgd:classification or mgd:segmentation."
        )


def _put_objects(example: Example, targets: Any, row: int, size: Size) -> None:
    """Fills the slots of one image of ``size``: objects in their given order, then crowds; empty boxes are left out."""
    width, height = (example.boxes[:, 2:] - example.boxes[:, :2]).T
    area = np.where((width > 0) & (height > 0), width * height, 0)
    room = targets.valid.shape[1]
    objects = _largest(np.flatnonzero((area > 0) & ~example.crowd), area, room)
    crowds = _largest(np.flatnonzero((area > 0) & example.crowd), area, room - len(objects))
    filled = np.concatenate([objects, crowds])
    targets.boxes[row, : len(filled)] = example.boxes[filled]
    targets.labels[row, : len(objects)] = example.labels[objects]
    targets.valid[row, : len(objects)] = True
    targets.crowd[row, len(objects) : len(filled)] = True
    if targets.masks and example.segmentation:
        for slot, number in enumerate(objects.tolist()):
            grid, frame = _mask(example.segmentation[number], size, targets.masks.grid.shape[-1])
            targets.masks.grid[row, slot], targets.masks.frame[row, slot] = grid, frame


def _mask(outline: Segmentation, size: Size, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The grid and the frame of an object; of polygons, only the window around them is made pixels."""
    low, high = np.zeros(2, int), np.array(size[::-1])
    if outline and not isinstance(outline, dict):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in outline])
        # COCO's code rounds to fifths of a pixel: with a pixel more on each side, the window's edge changes nothing.
        low = np.clip(np.floor(points.min(axis=0)).astype(int) - 1, 0, high - 1)
        high = np.clip(np.ceil(points.max(axis=0)).astype(int) + 1, low + 1, high)
        outline = [(np.reshape(polygon, (-1, 2)) - low).ravel().tolist() for polygon in outline]
    width, height = (high - low).tolist()
    grid, frame = mask_grid(rasterize(outline, (height, width)), cells)
    return grid, frame + np.tile(low, 2)


def _largest(indices: np.ndarray, area: np.ndarray, room: int) -> np.ndarray:
    """The ``room`` of ``indices`` with the largest area, in their given order; of equal ones the first."""
    return np.sort(indices[np.argsort(-area[indices], kind="stable")[:room]])
