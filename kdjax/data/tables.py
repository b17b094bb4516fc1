"""The images and the objects of a split as columns, and how single ones are named where something is wrong."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from kdjax.data.flaws import DataReport, Flaw

T = TypeVar("T")


def at(function: Callable[[int], T], rows: np.ndarray) -> Callable[[int], T]:
    """A function of positions, once only those in ``rows`` are left.

    >>> at(float, np.array([3, 5]))(1)
    5.0
    """
    return lambda row: function(int(rows[row]))


class Images(NamedTuple):
    """The n images of a split."""

    identity: np.ndarray
    """(n,) int64, unique."""
    names: Sequence[str]
    """Of their files."""
    size: np.ndarray
    """(n, 2) int64: height and width in pixels."""
    digest: np.ndarray
    """(n,) int64: equal of files with equal bytes, and hardly ever of others."""

    def describe(self, position: int) -> str:
        """Names an image in a sentence."""
        return f"{self.names[position]} (image {self.identity[position]})"

    def take(self, rows: np.ndarray) -> "Images":
        """Some of the images, in the order of ``rows``."""
        names = [self.names[row] for row in rows.tolist()]
        return Images(self.identity[rows], names, self.size[rows], self.digest[rows])


class Annotations(NamedTuple):
    """The m objects of all images of a split, in the order of the images."""

    image: np.ndarray
    """(m,) int64, ascending: position of each object's image."""
    identity: np.ndarray
    """(m,) int64: what the files know the object by."""
    boxes: np.ndarray
    """(m, 4), xyxy in pixels: float64 as the files have them, float32 once they are checked."""
    labels: np.ndarray
    """(m,) int32 in [0, classes)."""
    crowd: np.ndarray
    """(m,) bool."""
    area: np.ndarray
    """(m,) float64 or float32, pixels."""

    def take(self, rows: np.ndarray) -> "Annotations":
        """Some of the objects, in the order of ``rows``, or those for which a mask is True."""
        return Annotations(*(column[rows] for column in self))


def settle_objects(
    flaw: Flaw, chosen: np.ndarray, images: Images, annotations: Annotations, report: DataReport
) -> None:
    """Counts or refuses the objects for which a mask, or of which the positions, are given."""
    cases = annotations.take(chosen)
    files = [images.names[image] for image in cases.image.tolist()]
    report.settle(flaw, cases.identity, functools.partial(describe_object, images, cases), files)


def describe_object(images: Images, annotations: Annotations, row: int) -> str:
    """Names an object in a sentence."""
    x1, y1, x2, y2 = annotations.boxes[row].tolist()
    height, width = images.size[annotations.image[row]].tolist()
    return (
        f"annotation {annotations.identity[row]} of {images.describe(int(annotations.image[row]))}, "
        f"x {x1:g} to {x2:g}, y {y1:g} to {y2:g} in {width} x {height}"
    )
