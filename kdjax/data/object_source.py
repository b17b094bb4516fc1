"""A source whose images show objects, all of which are in memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import compare_classes, scaled_sides
from kdjax.data.examples import Example, Objects
from kdjax.data.flaws import DataReport, Flaw
from kdjax.data.indexed import IndexedSource
from kdjax.data.outlines import Outlines, OutlinesOf
from kdjax.data.tables import Annotations, Images, settle_objects
from kdjax.errors import DataError

_TINY = 2.0
"""Pixels on a side of an image that a detector sees; of less it learns nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedObjects(IndexedSource):
    """A :class:`kdjax.data.examples.ObjectSource` that knows all its objects."""

    annotations: Annotations
    outlines: Outlines | None
    """The segmentations of all objects, or None."""
    _first: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        first = np.searchsorted(self.annotations.image, np.arange(len(self) + 1))
        object.__setattr__(self, "_first", first)

    @property
    def truth(self) -> tuple[np.ndarray, ...]:
        """The columns of the annotations."""
        return tuple(self.annotations)

    def example(self, row: int, image: np.ndarray) -> Example:
        """The example that has the objects of the image at a position, and its pixels, (H, W, 3) uint8."""
        return self.objects(row).in_image(image)

    def objects(self, index: int) -> Objects:
        """The objects of the image at a position, from memory."""
        row = range(len(self))[index]
        rows = slice(int(self._first[row]), int(self._first[row + 1]))
        height, width = self.images.size[row].tolist()
        return Objects(
            image_id=int(self.images.identity[row]),
            size=(height, width),
            boxes=self.annotations.boxes[rows],
            labels=self.annotations.labels[rows],
            crowd=self.annotations.crowd[rows],
            area=self.annotations.area[rows],
            segmentation=OutlinesOf(self.outlines, range(rows.start, rows.stop)) if self.outlines else None,
        )

    @property
    def found(self) -> str:
        """How many images, objects and crowds there are."""
        counts = self.counts
        return (
            f"{len(self)} images, {counts['images_without_objects']} of them without objects; {counts['objects']} "
            f"objects of {len(self.class_names)} classes, {counts['crowds']} of them crowds"
        )

    @property
    def counts(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return {
            "images_without_objects": int(np.count_nonzero(np.diff(self._first) == 0)),
            "objects": len(self.annotations.image),
            "crowds": int(np.count_nonzero(self.annotations.crowd)),
        }


def check_counts(
    images: Images, annotations: Annotations, report: DataReport
) -> tuple[Images, Annotations, np.ndarray]:
    """Refuses a split without images or objects to find; leaves out images without objects where that is asked for.

    Counts what a run cannot do justice to: more objects than it has room for or judges, and objects that are too small.

    Returns:
        what remains, and the positions of the remaining images.

    Raises:
        DataError: no image, or no object but crowds.
    """
    if not len(images.identity):
        raise DataError(f"{report.origin} has no image.")
    if not len(annotations.image):
        raise DataError(f"{report.origin} has no object in any of its {len(images.identity)} images.")
    crowds = np.count_nonzero(annotations.crowd)
    if crowds == len(annotations.image):
        raise DataError(
            f"{report.origin} has no object to find: all {crowds} are crowds (iscrowd 1, or marked to be ignored); of "
            "ordinary objects iscrowd is 0."
        )
    if 2 * crowds > len(annotations.image):
        settle_objects(flaws.MOSTLY_CROWDS, annotations.crowd, images, annotations, report)
    count, checks = np.bincount(annotations.image, minlength=len(images.identity)), report.checks
    ordinary = np.bincount(annotations.image[~annotations.crowd], minlength=len(images.identity))
    for flaw, found, most in (
        (flaws.CROWDED, count, checks.max_objects),
        (flaws.UNREACHABLE, ordinary, checks.max_detections),
    ):
        if most is not None:
            _settle_counts(flaw, images, found, most, report)
    if checks.sizing:
        tiny = (scaled_sides(images, annotations, checks.sizing) < _TINY).any(axis=1) & ~annotations.crowd
        settle_objects(flaws.TINY, tiny, images, annotations, report)
    kept = np.flatnonzero(count) if report.checks.skip_empty else np.arange(len(count))
    return images.take(kept), annotations._replace(image=np.searchsorted(kept, annotations.image)), kept


def _settle_counts(flaw: Flaw, images: Images, count: np.ndarray, most: int, report: DataReport) -> None:
    """Counts or refuses the images that have more objects than ``most``."""
    rows = np.flatnonzero(count > most)
    files = [images.names[row] for row in rows.tolist()]
    report.settle(
        flaw, images.identity[rows], lambda k: f"{images.describe(int(rows[k]))} has {count[rows[k]]} of {most}", files
    )


def joined(origin: str, parts: Sequence[IndexedObjects]) -> IndexedObjects:
    """Several sources of the same classes as one, in order.

    Raises:
        DataError: the classes differ, or images have the same id.
    """
    first = parts[0]
    start = np.cumsum([0, *map(len, parts)])
    report = DataReport(origin, first.report.checks)
    for part in parts:
        names = first.report.origin, first.class_names, part.report.origin, part.class_names
        if difference := compare_classes(*names):
            raise DataError(f"{difference}.")
        for flaw, ids in part.report.flaws.items():
            report.settle(flaw, ids, str, part.report.files[flaw])

    identity = np.concatenate([part.images.identity for part in parts])
    if len(np.unique(identity)) != len(identity):
        raise DataError(f"{origin}: images of different parts have the same id.")

    def read(row: int) -> bytes:
        part = int(np.searchsorted(start, row, side="right")) - 1
        return parts[part].read(row - int(start[part]))

    moved = [part.annotations._replace(image=part.annotations.image + k) for part, k in zip(parts, start, strict=False)]
    return IndexedObjects(
        images=Images(
            identity,
            [name for part in parts for name in part.images.names],
            np.concatenate([part.images.size for part in parts]),
            np.concatenate([part.images.digest for part in parts]),
        ),
        annotations=Annotations(*map(np.concatenate, zip(*moved, strict=True))),
        outlines=None,
        class_names=first.class_names,
        category_ids=first.category_ids,
        read=read,
        report=report,
    )
