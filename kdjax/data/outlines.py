"""Segmentations of many objects in little memory: the points of all polygons stand in one array.

Lists of Python's numbers would take four times as much, and so many lists slow down everything else.
"""

import contextlib
import dataclasses
import itertools
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.data.sources import Segmentation


class PolygonStore:
    """Takes the polygons out of annotations while their file is parsed."""

    def __init__(self) -> None:
        """Starts empty."""
        self.points = array("d")

    def take(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The hook of ``json.loads``: an annotation's polygons become the places where they begin and end in the store.

        The first ends where the second begins. What is no list of lists of numbers stays as it is.
        """
        polygons = entry.get("segmentation")
        if type(polygons) is list:
            bounds = [len(self.points)]
            with contextlib.suppress(TypeError, OverflowError):
                for polygon in polygons:
                    self.points.fromlist(polygon)
                    bounds.append(len(self.points))
                entry["segmentation"] = tuple(bounds)
        return entry


@dataclasses.dataclass(frozen=True)
class Outlines:
    """The segmentations of m objects."""

    points: np.ndarray
    """(k,) float64: x1, y1, x2, y2, ... of all polygons, in pixels."""
    start: np.ndarray
    """(p,) int64: where in ``points`` each polygon begins, in the order of the objects."""
    stop: np.ndarray
    """(p,) int64: and ends."""
    first: np.ndarray
    """(m + 1,) int64: object i has the polygons ``first[i]`` to ``first[i + 1] - 1``."""
    runs: dict[int, dict[str, Any]]
    """Run-length encodings, by the position of the objects that have one instead of polygons."""

    def __getitem__(self, row: int) -> Segmentation:
        """The segmentation of one object."""
        if row in self.runs:
            return self.runs[row]
        polygons = range(int(self.first[row]), int(self.first[row + 1]))
        return [self.points[self.start[k] : self.stop[k]].tolist() for k in polygons]


def usable_outlines(
    segmentations: Sequence[Any], store: PolygonStore, boxes: np.ndarray, sizes: np.ndarray
) -> tuple[Outlines | None, np.ndarray]:
    """Segmentations that can be drawn, one for each object.

    A polygon needs three points of finite numbers; the others of its object are left out. Run lengths need the size of
    the image. An object with neither gets its box.

    Args:
        segmentations: m of them, as :meth:`PolygonStore.take` leaves them.
        store: holds their points.
        boxes: (m, 4), xyxy in pixels.
        sizes: (m, 2): height and width of each object's image, in pixels.

    Returns:
        the outlines, None where no object has a usable one; and the rows of the objects that got their boxes.
    """
    points = np.frombuffer(store.points)
    spans = [value if type(value) is tuple else (0,) for value in segmentations]
    start, stop = (
        np.fromiter(itertools.chain.from_iterable(span[part] for span in spans), np.int64)
        for part in (slice(-1), slice(1, None))
    )
    owner = np.repeat(np.arange(len(spans)), [len(span) - 1 for span in spans])
    bad = np.flatnonzero(~np.isfinite(points))
    finite = np.searchsorted(bad, start) == np.searchsorted(bad, stop)
    usable = finite & (stop - start >= 6) & ((stop - start) % 2 == 0)
    start, stop, owner = start[usable], stop[usable], owner[usable]

    runs = {
        row: value
        for row, value in enumerate(segmentations)
        if type(value) is dict and _sound_runs(value, sizes[row].tolist())
    }
    missing = np.bincount(owner, minlength=len(spans)) == 0
    missing[list(runs)] = False
    rows = np.flatnonzero(missing)
    if len(rows) == len(spans):
        return None, rows
    if len(rows):
        corners = boxes[rows][:, [0, 1, 2, 1, 2, 3, 0, 3]].astype(np.float64).ravel()
        begin = len(points) + 8 * np.arange(len(rows))
        points = np.concatenate([points, corners])
        start, stop = np.concatenate([start, begin]), np.concatenate([stop, begin + 8])
        owner = np.concatenate([owner, rows])
        order = np.argsort(owner, kind="stable")
        start, stop, owner = start[order], stop[order], owner[order]
    first = np.searchsorted(owner, np.arange(len(spans) + 1))
    return Outlines(points, start, stop, first, runs), rows


def _sound_runs(runs: dict[str, Any], size: list[int]) -> bool:
    """Whether run lengths cover an image of this height and width; compressed ones are only looked at."""
    counts = runs.get("counts")
    if runs.get("size") != size:
        return False
    if isinstance(counts, list):
        return set(map(type, counts)) <= {int} and min(counts, default=0) >= 0 and sum(counts) == size[0] * size[1]
    return isinstance(counts, str) and counts.isascii()
