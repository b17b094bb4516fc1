"""A source whose objects are all in memory, checked, and whose images are decoded when they are asked for."""

import dataclasses
import functools
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdjax.data.check import CROWDED, CUT_OFF, Annotations, DataReport, Images, compare_classes
from kdjax.data.examples import Example, Objects
from kdjax.data.images import ImageError, UndecodableError, decode
from kdjax.data.outlines import Outlines, OutlinesOf
from kdjax.errors import UserError

_SKIPPING = threading.Lock()
_MOST_SKIPPED = 100
"""Images that follow one another and cannot be decoded: of more, the disk is at fault, not the images."""


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
                raise UserError(f"{self.images.describe(row)} has changed since its size was read: open it again.")
            return objects.in_image(image)
        raise UserError(f"{self.images.describe(start)} and those that follow it cannot be decoded; check the disk.")

    def _decode(self, row: int) -> np.ndarray:
        try:
            data = self.read(row)
        except OSError as error:
            raise UserError(f"{self.images.describe(row)} cannot be read any more ({error.strerror}).") from error
        try:
            return decode(data)
        except UndecodableError:
            raise
        except ImageError as error:
            raise UserError(f"{self.images.describe(row)} {error}, unlike when it was opened.") from error

    def _skip(self, row: int, error: UndecodableError) -> None:
        identity = int(self.images.identity[row])
        with _SKIPPING:
            if identity in self.report.flaws.get(CUT_OFF, ()):
                return
            self.report.settle(CUT_OFF, [identity], lambda _: f"{self.images.describe(row)} {error}")
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
        """Hexadecimal digest of ids, sizes, objects and classes: what a run's order of examples depends on."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for column in (self.images.identity, self.images.size, *self.annotations):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

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
        lines = [
            f"{self.report.origin}: {len(self)} images, {empty} of them without objects; {objects} objects of "
            f"{len(self.class_names)} classes, {crowds} of them crowds."
        ]
        for flaw, ids in self.report.flaws.items():
            shown = ", ".join(map(str, ids[:3])) + ", ..." * (len(ids) > 3)
            lines.append(f"  {self.report.outcome(flaw)}: {len(ids)} {flaw.what} ({flaw.of} {shown})")
        return lines

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
                {"what": flaw.what, "outcome": self.report.outcome(flaw), "of": flaw.of, "count": len(ids), "ids": ids}
                for flaw, ids in self.report.flaws.items()
            ],
        }


def check_counts(
    images: Images, annotations: Annotations, report: DataReport
) -> tuple[Images, Annotations, np.ndarray]:
    """Refuses a split without images or objects; leaves out images without objects where that is asked for.

    Returns:
        what remains, and the positions of the remaining images.

    Raises:
        UserError: no image, or no object.
    """
    if not len(images.identity):
        raise UserError(f"{report.origin} has no image.")
    if not len(annotations.image):
        raise UserError(f"{report.origin} has no object in any of its {len(images.identity)} images.")
    count, most = np.bincount(annotations.image, minlength=len(images.identity)), report.checks.max_objects
    if most is not None:
        rows = np.flatnonzero(count > most)
        report.settle(
            CROWDED, images.identity[rows], lambda k: f"{images.describe(int(rows[k]))} has {count[rows[k]]} of {most}"
        )
    kept = np.flatnonzero(count) if report.checks.skip_empty else np.arange(len(count))
    return images.take(kept), annotations._replace(image=np.searchsorted(kept, annotations.image)), kept


def joined(origin: str, parts: Sequence[IndexedSource]) -> IndexedSource:
    """Several sources of the same classes as one, in order.

    Raises:
        UserError: the classes differ, or images have the same id.
    """
    first = parts[0]
    start = np.cumsum([0, *map(len, parts)])
    report = DataReport(origin, first.report.checks)
    for part in parts:
        names = first.report.origin, first.class_names, part.report.origin, part.class_names
        if difference := compare_classes(*names):
            raise UserError(f"{difference}.")
        for flaw, ids in part.report.flaws.items():
            report.settle(flaw, ids, str)

    identity = np.concatenate([part.images.identity for part in parts])
    if len(np.unique(identity)) != len(identity):
        raise UserError(f"{origin}: images of different parts have the same id.")

    def read(row: int) -> bytes:
        part = int(np.searchsorted(start, row, side="right")) - 1
        return parts[part].read(row - int(start[part]))

    moved = [part.annotations._replace(image=part.annotations.image + k) for part, k in zip(parts, start, strict=False)]
    return IndexedSource(
        images=Images(
            identity,
            [name for part in parts for name in part.images.names],
            np.concatenate([part.images.size for part in parts]),
        ),
        annotations=Annotations(*map(np.concatenate, zip(*moved, strict=True))),
        outlines=None,
        class_names=first.class_names,
        category_ids=first.category_ids,
        read=read,
        report=report,
    )
