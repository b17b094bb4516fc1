"""Sources whose images are of one class each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import equal_files
from kdjax.data.examples import ClassifiedImage
from kdjax.data.flaws import DataReport
from kdjax.data.indexed import IndexedSource, check_values
from kdjax.data.tables import Images
from kdjax.errors import DataError
from kdjax.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedClasses(IndexedSource):
    """A :class:`kdjax.data.examples.ClassSource` that knows all its labels."""

    labels: np.ndarray
    """(n,) int32 in [0, classes)."""

    @property
    def truth(self) -> tuple[np.ndarray, ...]:
        """The labels."""
        return (self.labels,)

    def example(self, row: int, image: np.ndarray) -> ClassifiedImage:
        """The example that has the label of the image at a position, and its pixels, (H, W, 3) uint8."""
        return ClassifiedImage(image, self.image_id(row), self.label(row))

    def label(self, index: int) -> int:
        """The class of the image at a position, in [0, classes)."""
        return int(self.labels[range(len(self))[index]])

    @property
    def found(self) -> str:
        """How many images and classes there are."""
        count = np.bincount(self.labels, minlength=len(self.class_names))
        return f"{len(self)} images of {len(self.class_names)} classes, {count.min()} to {count.max()} of each"

    @property
    def counts(self) -> dict[str, Any]:
        """Images of each class, as plain JSON."""
        count = np.bincount(self.labels, minlength=len(self.class_names))
        return {"images_of_class": dict(zip(self.class_names, count.tolist(), strict=True))}


def classified_source(
    images: Images,
    labels: np.ndarray,
    class_names: Sequence[str],
    read: Callable[[int], bytes],
    report: DataReport,
    path: Callable[[int], Path] | None = None,
) -> IndexedClasses:
    """Images and their classes, held against each other.

    Args:
        images: held against their files already.
        labels: (n,) int in [0, classes).
        class_names: of all classes.
        read: the bytes of the file at a position.
        report: counts or refuses.
        path: the file at a position, where images have one each.

    Raises:
        DataError: there is no image, or one class alone; or a flaw is refused.
    """
    if not len(images.identity):
        raise DataError(f"{report.origin} has no image.")
    if len(class_names) < 2:
        raise DataError(f"{report.origin} has one class alone, {class_names[0]!r}; there must be two to tell apart.")
    check_classes(np.bincount(labels, minlength=len(class_names)), class_names, report)
    check_copies(images, lambda row: int(labels[row]), read, report)
    source = IndexedClasses(
        images=images,
        labels=labels.astype(np.int32),
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        read=read,
        report=report,
        path=path,
    )
    check_values(source)
    return source


def check_classes(count: np.ndarray, class_names: Sequence[str], report: DataReport) -> None:
    """Counts the classes of which there is nothing, ``count`` (classes,) being 0."""
    empty = np.flatnonzero(count == 0)
    names = [class_names[label] for label in empty.tolist()]
    report.settle(flaws.EMPTY_CLASS, empty, lambda k: repr(names[k]), names)


def check_copies(images: Images, truth: Callable[[int], Any], read: Callable[[int], bytes], report: DataReport) -> None:
    """Counts the images whose file is there already, by whether ``truth`` at their positions is the same."""
    first = equal_files(images, read)
    copies = np.flatnonzero(first != np.arange(len(first)))
    same = np.array([truth(row) == truth(int(first[row])) for row in copies.tolist()], bool)
    for flaw, rows in ((flaws.COPIED_IMAGE, copies[same]), (flaws.CONTRADICTED, copies[~same])):
        described = [f"{images.describe(row)} is {images.describe(int(first[row]))}" for row in rows[:5].tolist()]
        report.settle(flaw, images.identity[rows], described.__getitem__, [images.names[row] for row in rows.tolist()])
