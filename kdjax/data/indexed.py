"""A source whose objects are all in memory, checked, and whose images are decoded when they are asked for."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import compare_classes, file_digests, scaled_sides
from kdjax.data.examples import Example, Objects
from kdjax.data.flaws import DataReport, Flaw
from kdjax.data.images import ImageError, UndecodableError, Values, decode, measure
from kdjax.data.outlines import Outlines, OutlinesOf
from kdjax.data.tables import Annotations, Images, settle_objects
from kdjax.errors import DataError, StorageError
from kdjax.paths import Path
from kdjax.types import FILES

_SKIPPING = threading.Lock()
_MOST_SKIPPED = 100
"""Images that follow one another and cannot be decoded: of more, the disk is at fault, not the images."""
_MEASURED = 16
"""Images whose values are measured when a source is opened."""
_TINY = 2.0
"""Pixels on a side of an image that a detector sees; of less it learns nothing."""
_FEW_LEVELS = 64
"""Of 256: images of a whole source that use fewer are not what was meant, or can hardly be seen."""


@dataclasses.dataclass(frozen=True)
class IndexedSource:
    """A :class:`kdjax.data.examples.ObjectSource` that knows all its objects.

    An image that turns out not to be decodable is replaced by the next one in the source's order that is, together
    with its objects and its id, after the last by the first; it is named once and counted in the report. So what
    stands at a position depends on the position and the files alone.
    """

    images: Images
    annotations: Annotations
    outlines: Outlines | None
    """The segmentations of all objects, or None."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """What the files call each label; of several ids for one label, the lowest."""
    read: Callable[[int], bytes]
    """The encoded image at a position; raises OSError or ValueError where the storage fails."""
    report: DataReport
    path: Callable[[int], Path] | None = None
    """The file of the image at a position; None where they have none of their own."""
    generated: bool = False
    """Made by this package: pixels are a function of the rest."""
    _first: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        first = np.searchsorted(self.annotations.image, np.arange(len(self) + 1))
        object.__setattr__(self, "_first", first)

    def __len__(self) -> int:
        return len(self.images.identity)

    def __getitem__(self, index: int) -> Example:
        start = range(len(self))[index]
        for row in (np.arange(start, start + min(len(self), _MOST_SKIPPED)) % len(self)).tolist():
            try:
                image = self._decode(row)
            except UndecodableError as error:
                self._skip(row, error)
                continue
            objects = self.objects(row)
            if image.shape[:2] != objects.size:
                raise DataError(f"{self.images.describe(row)} has changed since its size was read: open it again.")
            return objects.in_image(image)
        raise StorageError(f"{self.images.describe(start)} and those that follow it cannot be decoded; check the disk.")

    def _decode(self, row: int) -> np.ndarray:
        try:
            data = self.read(row)
        except OSError as error:
            raise StorageError(f"{self.images.describe(row)} cannot be read any more ({error.strerror}).") from error
        try:
            return decode(data, self.report.checks.reading)
        except UndecodableError:
            raise
        except ImageError as error:
            raise DataError(f"{self.images.describe(row)} {error}, unlike when it was opened.") from error

    def _skip(self, row: int, error: UndecodableError) -> None:
        identity = int(self.images.identity[row])
        with _SKIPPING:
            if identity in self.report.flaws.get(flaws.CUT_OFF, ()):
                return
            file = self.images.names[row]
            self.report.settle(flaws.CUT_OFF, [identity], lambda _: f"{self.images.describe(row)} {error}", [file])
        message = f"kdjax: {self.images.describe(row)} {error}; the next image takes its place wherever it comes up."
        print(message, file=sys.stderr, flush=True)

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

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of ids, sizes, objects and classes, and behind ``FILES`` one of the files, unless they are generated.

        That is what a run's examples and their order depend on.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for column in (self.images.identity, self.images.size, *self.annotations):
            digest.update(np.ascontiguousarray(column).tobytes())
        files = hashlib.sha256(np.ascontiguousarray(self.images.digest).tobytes())
        return digest.hexdigest() + ("" if self.generated else FILES + files.hexdigest()[:16])

    @property
    def origin(self) -> str:
        """The file or the data set that sentences name."""
        return self.report.origin

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image at a position, as its header says."""
        height, width = self.images.size[range(len(self))[index]].tolist()
        return height, width

    def image_id(self, index: int) -> int:
        """The id of the image at a position."""
        return int(self.images.identity[range(len(self))[index]])

    def name(self, index: int) -> str:
        """The name of the file of the image at a position."""
        return self.images.names[range(len(self))[index]]

    def report_lines(self) -> list[str]:
        """What was found, in a few lines for a person."""
        objects, empty = len(self.annotations.image), np.count_nonzero(np.diff(self._first) == 0)
        crowds = np.count_nonzero(self.annotations.crowd)
        found = (
            f"{self.report.origin}: {len(self)} images, {empty} of them without objects; {objects} objects of "
            f"{len(self.class_names)} classes, {crowds} of them crowds."
        )
        return [found, *self.report.lines()]

    def report_dict(self) -> dict[str, Any]:
        """What was found, as plain JSON, with the ids of everything that was left out or repaired."""
        return {
            "origin": self.report.origin,
            "images": len(self),
            "images_without_objects": int(np.count_nonzero(np.diff(self._first) == 0)),
            "objects": len(self.annotations.image),
            "crowds": int(np.count_nonzero(self.annotations.crowd)),
            "classes": dict(zip(self.class_names, self.category_ids, strict=True)),
            "fingerprint": self.fingerprint,
            "flaws": [
                {
                    "what": flaw.what,
                    "outcome": self.report.outcome(flaw),
                    "of": flaw.of,
                    "count": len(ids),
                    "ids": ids,
                    "files": self.report.files[flaw],
                }
                for flaw, ids in self.report.flaws.items()
            ],
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


def check_values(source: IndexedSource) -> None:
    """Measures the values of some images, and counts or refuses them where they are a small part of what is possible.

    Images of 12 bits in files of 16 are nearly black, for one.
    """
    measured: dict[int, Values] = {}
    for row in dict.fromkeys(np.linspace(0, len(source) - 1, _MEASURED, dtype=int).tolist()):
        # What cannot be read is said where it is met.
        with contextlib.suppress(OSError, ImageError):
            measured[row] = measure(source.read(row), source.report.checks.reading)
    for wide in (False, True):
        found = {row: values for row, values in measured.items() if values.wide == wide}
        if not found or (wide and source.report.checks.reading.value_range):
            continue
        levels = max(x.brightest for x in found.values()) - min(x.darkest for x in found.values()) + 1
        if levels < _FEW_LEVELS:
            low, high = min(x.low for x in found.values()), max(x.high for x in found.values())
            _settle_levels(source, list(found), wide, levels, (low, high))


def _settle_levels(
    source: IndexedSource, rows: list[int], wide: bool, levels: int, values: tuple[float, float]
) -> None:
    low, high = values
    what = f"images of {'more than 8' if wide else '8'} bits with values from {low:g} to {high:g}"
    hint = "save them with their whole range of values"
    if wide:
        bits = max(8, int(high).bit_length())
        hint = (
            f"config.data.value_range=(0, {2**bits - 1}) takes them for {bits} bits, and ({low:g}, {high:g}) spreads "
            "them as far as they go"
        )
    images = source.images
    source.report.settle(
        Flaw(f"{what}, which use {levels} of 256 levels (of {len(rows)} that were measured)", "image", "kept", hint),
        images.identity[rows],
        lambda k: images.describe(rows[k]),
        [images.names[row] for row in rows],
    )


def check_shared(train: IndexedSource, evaluation: IndexedSource) -> None:
    """Counts, in the report of the split that is evaluated, the images whose files the training split holds too.

    Raises:
        DataError: there are some, and its checks are strict.
    """
    common = np.intersect1d(train.images.digest, evaluation.images.digest)
    theirs_by_row, ours_by_row = (
        file_digests(np.flatnonzero(np.isin(source.images.digest, common)), source.read)
        for source in (train, evaluation)
    )
    seen = {file: row for row, file in theirs_by_row.items()}
    pairs = [(row, seen[file]) for row, file in ours_by_row.items() if file in seen]
    ours, theirs = evaluation.images, train.images
    evaluation.report.settle(
        flaws.SHARED_FILE,
        ours.identity[[row for row, _ in pairs]],
        lambda k: f"{ours.describe(pairs[k][0])} is {theirs.describe(pairs[k][1])} of {train.origin}",
        [ours.names[row] for row, _ in pairs],
    )


def joined(origin: str, parts: Sequence[IndexedSource]) -> IndexedSource:
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
    return IndexedSource(
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
