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

    def scale(self, segmentations: Sequence[Any], factor: np.ndarray) -> None:
        """Multiplies the points of some objects' polygons by ``factor``, (m, 2): of x and of y."""
        points = np.frombuffer(self.points)
        for span, (x, y) in zip(segmentations, factor.tolist(), strict=True):
            if type(span) is tuple:
                polygons = points[span[0] : span[-1]]
                polygons[0::2] *= x
                polygons[1::2] *= y


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
    points, (start, stop, owner) = np.frombuffer(store.points), _usable_polygons(segmentations, store, sizes)
    runs = _usable_runs(segmentations, sizes)
    missing = np.bincount(owner, minlength=len(segmentations)) == 0
    missing[list(runs)] = False
    rows = np.flatnonzero(missing)
    if len(rows) == len(segmentations):
        return None, rows
    if len(rows):
        corners = boxes[rows][:, [0, 1, 2, 1, 2, 3, 0, 3]].astype(np.float64).ravel()
        begin = len(points) + 8 * np.arange(len(rows))
        points = np.concatenate([points, corners])
        start, stop = np.concatenate([start, begin]), np.concatenate([stop, begin + 8])
        owner = np.concatenate([owner, rows])
        order = np.argsort(owner, kind="stable")
        start, stop, owner = start[order], stop[order], owner[order]
    first = np.searchsorted(owner, np.arange(len(segmentations) + 1))
    return Outlines(points, start, stop, first, runs), rows


def outline_boxes(segmentations: Sequence[Any], store: PolygonStore, sizes: np.ndarray) -> np.ndarray:
    """The boxes around usable segmentations, (m, 4) float64, xyxy in pixels; NaN for an object without one.

    Arguments as those of :func:`usable_outlines`.
    """
    found = np.full((len(segmentations), 4), np.nan)
    points, (start, stop, owner) = np.frombuffer(store.points), _usable_polygons(segmentations, store, sizes)
    boxes = np.empty((len(start), 4))
    for parity in (0, 1):
        chosen = np.flatnonzero(start % 2 == parity)
        chosen = chosen[np.argsort(start[chosen])]
        for axis in (0, 1):
            # Of points that begin at an odd place, x stands at the odd places, and y at the even ones.
            place = (parity + axis) // 2
            values, bounds = points[(parity + axis) % 2 :: 2], np.stack([start[chosen], stop[chosen]], axis=1) // 2
            for side, reduce in ((axis, np.minimum), (axis + 2, np.maximum)):
                boxes[chosen, side] = _reduced(reduce, values, bounds + place)
    if len(owner):
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        found[owner[first], :2] = np.minimum.reduceat(boxes[:, :2], first)
        found[owner[first], 2:] = np.maximum.reduceat(boxes[:, 2:], first)
    for row, value in _usable_runs(segmentations, sizes).items():
        found[row] = _box_of_runs(value)
    return found


def _reduced(reduce: np.ufunc, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Reduces ``values`` between each of ``bounds`` (k, 2), which ascend: (k,)."""
    flat = bounds.ravel()
    if not len(flat):
        return np.zeros(0)
    # The end of all values is the one bound that may not be named.
    return reduce.reduceat(values, flat[:-1] if flat[-1] == len(values) else flat)[::2]


def _box_of_runs(runs: dict[str, Any]) -> list[float]:
    """The box around the pixels that sound run lengths cover, xyxy; NaN where they cover none."""
    counts, height = runs["counts"], runs["size"][0]
    lengths = _uncompressed(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    ends = np.cumsum([] if lengths is None else lengths)
    first, last = ends[0 : len(ends) // 2 * 2 : 2], ends[1::2] - 1
    first, last = first[first <= last], last[first <= last]
    if not len(first):
        return [np.nan] * 4
    column, row = np.divmod(first, height)
    last_column, last_row = np.divmod(last, height)
    tall = (column != last_column).any()
    top, bottom = (0, height) if tall else (row.min(), last_row.max() + 1)
    return [column.min(), top, last_column.max() + 1, bottom]


def _usable_polygons(
    segmentations: Sequence[Any], store: PolygonStore, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where in the store each polygon that can be drawn begins and ends, and the object that it is of, ascending."""
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
    return start[usable], stop[usable], owner[usable]


def _usable_runs(segmentations: Sequence[Any], sizes: np.ndarray) -> dict[int, dict[str, Any]]:
    """The run lengths that can be drawn, by the positions of their objects."""
    return {
        row: value
        for row, value in enumerate(segmentations)
        if type(value) is dict and _sound_runs(value, sizes[row].tolist())
    }


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
