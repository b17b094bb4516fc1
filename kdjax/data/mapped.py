"""Sources whose images have a class for every pixel: label maps, all of which are read once when they are opened."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kdjax.data import flaws
from kdjax.data.classified import check_classes, check_copies
from kdjax.data.examples import MappedImage
from kdjax.data.flaws import DataReport, Flaw
from kdjax.data.images import ImageError, decode_indices, for_all
from kdjax.data.indexed import Files, IndexedSource, check_values
from kdjax.data.sizing import Reading
from kdjax.data.tables import Images, at
from kdjax.data.vocabularies import NO_CLASS, Vocabulary
from kdjax.errors import DataError, reason
from kdjax.paths import Path, unreadable
from kdjax.types import IGNORED


class LabelMaps(NamedTuple):
    """The label maps of n images."""

    names: Sequence[str]
    """Of their files."""
    digest: np.ndarray
    """(n,) int64: equal of equal maps, and hardly ever of others."""
    pixels: np.ndarray
    """(n, classes) int64: how many pixels are of each class."""
    classes: Callable[[int], np.ndarray]
    """The map at a position, (H, W) uint8 in [0, classes) or ``IGNORED``; raises OSError or ImageError."""
    read: Callable[[int], bytes] | None = None
    """The file at a position, where they have one each."""
    path: Callable[[int], Path] | None = None
    """And its name."""

    def take(self, rows: np.ndarray) -> "LabelMaps":
        """Some of the maps, in the order of ``rows``."""
        return LabelMaps(
            [self.names[row] for row in rows.tolist()],
            self.digest[rows],
            self.pixels[rows],
            at(self.classes, rows),
            self.read and at(self.read, rows),
            self.path and at(self.path, rows),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedMaps(IndexedSource):
    """A :class:`kdjax.data.examples.MapSource` that has read all its label maps once."""

    maps: LabelMaps

    @property
    def truth(self) -> tuple[np.ndarray, ...]:
        """The digests of the maps."""
        return (self.maps.digest,)

    @property
    def files(self) -> tuple[Files, ...]:
        """The files of the images, and of the label maps."""
        maps = self.maps
        if maps.read is None or maps.path is None:
            return super().files
        return (*super().files, Files("label map", maps.names, maps.digest, self._describe, maps.read, maps.path))

    def example(self, row: int, image: np.ndarray) -> MappedImage:
        """The example that has the label map of the image at a position, and its pixels, (H, W, 3) uint8."""
        return MappedImage(image, self.image_id(row), self.classes(row))

    def classes(self, index: int) -> np.ndarray:
        """The classes of the pixels of the image at a position, (H, W) uint8 in [0, classes) or ``IGNORED``."""
        row = range(len(self))[index]
        try:
            found = self.maps.classes(row)
        except OSError as error:
            raise unreadable(self._describe(row), error) from error
        except ImageError as error:
            raise DataError(f"{self._describe(row)} {error}, unlike when it was opened.") from error
        if found.shape != self.size(row):
            raise DataError(f"{self._describe(row)} has changed since its size was read: open it again.")
        return found

    @property
    def pixels(self) -> np.ndarray:
        """(images, classes) int64: how many pixels of each image are of each class."""
        return self.maps.pixels

    def _describe(self, row: int) -> str:
        return f"{self.maps.names[row]} (of image {self.images.identity[row]})"

    @property
    def found(self) -> str:
        """How many images, classes and labelled pixels there are."""
        pixels = self.maps.pixels.sum()
        share = 100 * pixels / max(int(self.images.size.prod(axis=1).sum()), 1)
        maps = f"{len(self)} images with label maps of {len(self.class_names)} classes"
        return f"{maps}, {share:.1f} % of the pixels labelled"

    @property
    def counts(self) -> dict[str, Any]:
        """Pixels of each class, and images that show it, as plain JSON."""
        pixels, images = self.maps.pixels.sum(axis=0), np.count_nonzero(self.maps.pixels, axis=0)
        return {
            "pixels_of_class": dict(zip(self.class_names, pixels.tolist(), strict=True)),
            "images_of_class": dict(zip(self.class_names, images.tolist(), strict=True)),
            "ignored_pixels": int(self.images.size.prod(axis=1).sum() - pixels.sum()),
        }


class _Seen(NamedTuple):
    """What was seen of one label map."""

    size: tuple[int, ...]
    values: np.ndarray
    """(256,) int32: how many have each value."""
    digest: int
    grey: bool
    """Whether it is in RGB with equal channels."""


_NOTHING = _Seen((0, 0), np.zeros(256, np.int32), 0, False)


def mapped_source(
    images: Images,
    map_names: Sequence[str],
    words: Vocabulary,
    *,
    read: Callable[[int], bytes],
    read_map: Callable[[int], bytes],
    report: DataReport,
    path: Callable[[int], Path] | None = None,
    map_path: Callable[[int], Path] | None = None,
) -> IndexedMaps:
    """Images and their label maps, held against each other; every map is decoded once, by several threads.

    Args:
        images: held against their files already.
        map_names: n names of files.
        words: what the values of the maps mean.
        read: the encoded image at a position.
        read_map: the encoded label map at a position.
        report: counts or refuses.
        path: the file of the image at a position, where they have one each.
        map_path: likewise of the label map.

    Raises:
        DataError: there is no image, no labelled pixel, or a flaw is refused.
    """
    reading, together = report.checks.reading, report.checks.together
    found = for_all(lambda row: _seen(lambda: read_map(row), words, reading), len(map_names), together=together)
    sound = _sound(images, map_names, found, words, report)
    seen = [_NOTHING if isinstance(one, ImageError) else one for one in found]
    values = np.array([one.values for one in seen], np.int32).reshape(-1, 256)
    classes = range(len(words.class_names))
    used = set(np.flatnonzero(values[sound].any(axis=0)).tolist())
    if used == {0, IGNORED} and words.table[0] == 0:
        raise DataError(
            f"{report.origin} has no pixel but of {words.class_names[0]!r}: all values of its label maps are 0 and "
            f"{IGNORED}, and {IGNORED} is ignored; of two classes they are 0 and 1."
        )
    maps = LabelMaps(
        names=map_names,
        digest=np.array([one.digest for one in seen], np.int64),
        pixels=np.stack([values[:, words.table == label].sum(axis=1) for label in classes], axis=1),
        classes=lambda row: _classes(read_map(row), words, reading),
        read=read_map,
        path=map_path,
    )
    return settled_maps(
        images.take(sound), maps.take(sound), words, read=at(read, sound), report=report, path=path and at(path, sound)
    )


def _seen(read: Callable[[], bytes], words: Vocabulary, reading: Reading) -> _Seen | ImageError:
    """Decodes a label map once."""
    try:
        values, grey = decode_indices(read(), reading)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(f"cannot be read ({reason(error)})")
    if values.size and (values.min() < 0 or values.max() > 255):
        return ImageError(f"has values from {values.min()} to {values.max()}; {words.words}")
    values = values.astype(np.uint8, copy=False)
    count = np.array(Image.fromarray(values).histogram(), np.int32)
    return _Seen(values.shape, count, digest_of(words.table.astype(np.uint8)[values]), grey)


def _classes(data: bytes, words: Vocabulary, reading: Reading) -> np.ndarray:
    values, _ = decode_indices(data, reading)
    return words.table.astype(np.uint8)[values]


def digest_of(classes: np.ndarray) -> int:
    """64 bits of a digest of a label map."""
    digest = hashlib.blake2b(np.array(classes.shape).tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(classes).data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _sound(
    images: Images, names: Sequence[str], found: Sequence[_Seen | ImageError], words: Vocabulary, report: DataReport
) -> np.ndarray:
    """Counts or refuses the label maps that do not fit their images or the classes; the positions of the others."""
    sizes = images.size.tolist()

    def settle(flaw: Flaw, rows: list[int], describe: Callable[[int, Any], str]) -> set[int]:
        files = [names[row] for row in rows]
        report.settle(flaw, images.identity[rows], lambda k: describe(rows[k], found[rows[k]]), files)
        return set(rows)

    def size(row: int, one: _Seen) -> str:
        (height, width), (own_height, own_width) = sizes[row], one.size
        return f"{names[row]} is {own_width} x {own_height} pixels and {images.names[row]} {width} x {height}"

    def wrong(one: _Seen) -> np.ndarray:
        return np.flatnonzero((words.table == NO_CLASS) & (one.values > 0))

    def values(row: int, one: _Seen) -> str:
        count = [f"{value} in {one.values[value]} pixels" for value in wrong(one)[:4].tolist()]
        return f"{names[row]} has {', '.join(count)}{', ...' * (len(wrong(one)) > 4)}"

    maps = {row: one for row, one in enumerate(found) if not isinstance(one, ImageError)}
    outside = Flaw(
        f"label maps with values that are none of its {len(words.class_names)} classes",
        "image",
        "refused unless lenient",
        f"{words.words}; config.data.lenient=True leaves these images out",
    )
    bad = settle(
        flaws.UNUSABLE_MAP, [row for row in range(len(found)) if row not in maps], lambda row, x: f"{names[row]} {x}"
    )
    bad |= settle(flaws.MAP_SIZE, [row for row, one in maps.items() if list(one.size) != sizes[row]], size)
    bad |= settle(outside, [row for row, one in maps.items() if len(wrong(one))], values)
    settle(flaws.GREY_MAP, [row for row, one in maps.items() if one.grey], lambda row, _: names[row])
    return np.setdiff1d(np.arange(len(found)), list(bad))


def settled_maps(
    images: Images,
    maps: LabelMaps,
    words: Vocabulary,
    *,
    read: Callable[[int], bytes],
    report: DataReport,
    path: Callable[[int], Path] | None = None,
) -> IndexedMaps:
    """A source of sound images and label maps, once what they show is counted; arguments as :func:`mapped_source`."""
    if not len(images.identity):
        raise DataError(f"{report.origin} has no image.")
    if not maps.pixels.any():
        raise DataError(f"{report.origin} has no labelled pixel: all are ignored; {words.words}.")
    bare = np.flatnonzero(maps.pixels.sum(axis=1) == 0)
    names = [images.names[row] for row in bare.tolist()]
    report.settle(flaws.ONLY_IGNORED, images.identity[bare], lambda k: images.describe(int(bare[k])), names)
    if report.checks.skip_empty and len(bare):
        kept = np.setdiff1d(np.arange(len(maps.names)), bare)
        images, maps = images.take(kept), maps.take(kept)
        read, path = at(read, kept), path and at(path, kept)
    check_classes(maps.pixels.sum(axis=0), words.class_names, report)
    check_copies(images, lambda row: int(maps.digest[row]), read, report)
    source = IndexedMaps(
        images=images,
        maps=maps,
        class_names=words.class_names,
        category_ids=words.values,
        read=read,
        report=report,
        path=path,
    )
    check_values(source)
    return source
