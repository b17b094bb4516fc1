"""Sources whose truth is known and checked, and whose images are decoded when they are asked for."""

import abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import file_digests
from kdjax.data.flaws import DataReport, Flaw
from kdjax.data.images import ImageError, UndecodableError, Values, decode, measure
from kdjax.data.tables import Images
from kdjax.errors import DataError, StorageError
from kdjax.paths import Path, unreadable
from kdjax.types import FILES

_SKIPPING = threading.Lock()
_MOST_SKIPPED = 100
"""Images that follow one another and cannot be decoded: of more, the disk is at fault, not the images."""
_MEASURED = 16
"""Images whose values are measured when a source is opened."""
_FEW_LEVELS = 64
"""Of 256: images of a whole source that use fewer are not what was meant, or can hardly be seen."""


class Files(NamedTuple):
    """The n files of one kind that the images of a source have, one each."""

    kind: str
    """In words: "image"."""
    names: Sequence[str]
    digest: np.ndarray
    """(n,) int64: equal of files with equal bytes, and hardly ever of others."""
    describe: Callable[[int], str]
    """Names the file at a position in a sentence."""
    read: Callable[[int], bytes]
    """Its bytes; raises OSError or ValueError where the storage fails."""
    path: Callable[[int], Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedSource(abc.ABC):
    """A :class:`kdjax.types.Source` that knows all of its truth; what that is says what derives from it.

    An image that turns out not to be decodable is replaced by the next one in the source's order that is, together
    with its truth and its id, after the last by the first; it is named once and counted in the report. So what stands
    at a position depends on the position and the files alone.
    """

    images: Images
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

    @property
    @abc.abstractmethod
    def truth(self) -> tuple[np.ndarray, ...]:
        """Arrays that change with anything that the images show."""

    @abc.abstractmethod
    def example(self, row: int, image: np.ndarray) -> Any:
        """The example that has the truth of the image at a position, and its pixels, (H, W, 3) uint8."""

    @property
    @abc.abstractmethod
    def found(self) -> str:
        """What there is, counted, for a sentence: "200 images, ..."."""

    @property
    @abc.abstractmethod
    def counts(self) -> dict[str, Any]:
        """The same as plain JSON."""

    @property
    def files(self) -> tuple[Files, ...]:
        """All files of the images and of what they show; () where they have none of their own."""
        images = self.images
        if self.path is None:
            return ()
        return (Files("image", images.names, images.digest, images.describe, self.read, self.path),)

    def __len__(self) -> int:
        return len(self.images.identity)

    def __getitem__(self, index: int) -> Any:
        start = range(len(self))[index]
        for row in (np.arange(start, start + min(len(self), _MOST_SKIPPED)) % len(self)).tolist():
            try:
                image = self._decode(row)
            except UndecodableError as error:
                self._skip(row, error)
                continue
            if image.shape[:2] != self.size(row):
                raise DataError(f"{self.images.describe(row)} has changed since its size was read: open it again.")
            return self.example(row, image)
        raise StorageError(f"{self.images.describe(start)} and those that follow it cannot be decoded; check the disk.")

    def _decode(self, row: int) -> np.ndarray:
        try:
            data = self.read(row)
        except OSError as error:
            raise unreadable(self.images.describe(row), error) from error
        try:
            return decode(data, self.report.checks.reading)
        except UndecodableError:
            raise
        except ImageError as error:
            raise DataError(f"{self.images.describe(row)} {error}, unlike when it was opened.") from error

    @property
    def undecodable(self) -> list[int]:
        """Ids of images that could not be decoded so far, those that were left out at the start among them."""
        return self.report.flaws.get(flaws.CUT_OFF, [])

    def _skip(self, row: int, error: UndecodableError) -> None:
        identity = int(self.images.identity[row])
        with _SKIPPING:
            if identity in self.undecodable:
                return
            file = self.images.names[row]
            self.report.settle(flaws.CUT_OFF, [identity], lambda _: f"{self.images.describe(row)} {error}", [file])
        message = f"kdjax: {self.images.describe(row)} {error}; the next image takes its place wherever it comes up."
        if not self.report.silent:
            print(message, file=sys.stderr, flush=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of ids, sizes, truth and classes, and behind ``FILES`` one of the files, unless they are generated.

        That is what a run's examples and their order depend on.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for column in (self.images.identity, self.images.size, *self.truth):
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
        return [f"{self.report.origin}: {self.found}.", *self.report.lines()]

    def report_dict(self) -> dict[str, Any]:
        """What was found, as plain JSON, with the ids of everything that was left out or repaired."""
        return {
            "origin": self.report.origin,
            "images": len(self),
            **self.counts,
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
