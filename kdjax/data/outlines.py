"""Segmentations of many objects in little memory: the points of all polygons stand in one array.

Lists of Python's numbers would take four times as much, and so many lists slow down everything else.
"""

import contextlib
import dataclasses
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from kdjax.data.examples import Segmentation

_FARTHEST = 3
"""Times the longest side of all images: no point of a polygon may be farther from the corner."""
_MOST_DIGITS = 7
"""Of 5 bits each: run lengths of all images that are decoded have fewer."""


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

    def of(self, row: int) -> Segmentation:
        """The segmentation of one object."""
        if row in self.runs:
            return self.runs[row]
        polygons = range(int(self.first[row]), int(self.first[row + 1]))
        return [self.points[self.start[k] : self.stop[k]].tolist() for k in polygons]


class OutlinesOf(Sequence[Segmentation]):
    """The segmentations of some neighbouring objects, made when they are asked for: most readers want none."""

    def __init__(self, outlines: Outlines, rows: range):
        """Nothing is made yet; ``rows`` are the objects' positions in ``outlines``."""
        self._outlines, self._rows = outlines, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Segmentation: ...

    @overload
    def __getitem__(self, index: slice) -> "OutlinesOf": ...

    def __getitem__(self, index: int | slice) -> "Segmentation | OutlinesOf":
        rows = self._rows[index]
        return OutlinesOf(self._outlines, rows) if isinstance(rows, range) else self._outlines.of(rows)


def usable_outlines(
    segmentations: Sequence[Any], store: PolygonStore, boxes: np.ndarray, sizes: np.ndarray
) -> tuple[Outlines | None, np.ndarray]:
    """Segmentations that can be drawn, one for each object.

    A polygon needs three points, none of them far from the images; the others of its object are left out. Run lengths
    need the size of the image. An object with neither gets its box.

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
    # COCO's own code walks along every line: none may be endless.
    far = _FARTHEST * sizes.max(initial=0)
    bad = np.flatnonzero(~((points > -far) & (points < far)))
    near = np.searchsorted(bad, start) == np.searchsorted(bad, stop)
    usable = near & (stop - start >= 6) & ((stop - start) % 2 == 0)
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
    """Whether run lengths cover an image of this height and width exactly: COCO's own code trusts them."""
    counts = runs.get("counts")
    if runs.get("size") != size:
        return False
    if isinstance(counts, list):
        return set(map(type, counts)) <= {int} and min(counts, default=0) >= 0 and sum(counts) == size[0] * size[1]
    if not isinstance(counts, str):
        return False
    lengths = _uncompressed(counts)
    return lengths is not None and lengths.min() >= 0 and lengths.sum() == size[0] * size[1]


def _uncompressed(text: str) -> np.ndarray | None:
    """Run lengths (k,) int64 of COCO's compressed form; None for what is none.

    Every character holds 5 bits of a number, least significant first, and whether more follow; the last one's highest
    bit is the sign. From the fourth number on, they are differences from the one before the previous one.
    """
    codes = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() >= 64 or codes[-1] & 0x20:
        return None
    start = np.concatenate([[0], np.flatnonzero(codes & 0x20 == 0)[:-1] + 1])
    digits = np.diff(start, append=len(codes))
    if digits.max() > _MOST_DIGITS:
        return None
    place = 5 * (np.arange(len(codes)) - np.repeat(start, digits))
    numbers = np.add.reduceat((codes & 0x1F) << place, start)
    numbers -= np.where(codes[start + digits - 1] & 0x10, 1 << (5 * digits), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
