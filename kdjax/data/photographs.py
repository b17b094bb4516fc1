"""Photographs without any truth, in memory or in files: what a trained model is asked about."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from kdjax.data.images import ImageError, decode, for_all, read_header
from kdjax.data.sizing import READING, Reading, Size
from kdjax.errors import DataError, reason
from kdjax.paths import as_path, is_file, is_folder

Photograph = np.ndarray | str | os.PathLike[str]
"""(H, W, 3) uint8, RGB; or the path of an image file."""


class Pixels(NamedTuple):
    """One photograph, decoded."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    image_id: int | None
    """As its source has it; None of a black one in place of one that cannot be decoded."""


class Photographs:
    """Photographs of any sizes as a :class:`kdjax.types.ImageSource`: files are decoded when they are asked for.

    Those that cannot be read are left out: by their headers at once, by their pixels when these are asked for.
    """

    def __init__(
        self,
        items: Sequence[Photograph],
        reading: Reading = READING,
        *,
        names: Sequence[str] = (),
        identity: Sequence[int] = (),
    ):
        """Reads the headers of all files.

        Args:
            items: the photographs.
            reading: how files are read.
            names: what people know them by; by default their paths, and of arrays "photograph 0" and so on.
            identity: what files of results know them by; by default their positions, counted from 1.

        Raises:
            DataError: an array is no photograph.
        """
        items = _listed(items)
        names = names or [_name(k, item) for k, item in enumerate(items)]
        self._reading = reading
        found = for_all(lambda k: _size(items[k], names[k], reading), len(items))
        self.left_out = {
            name: str(size) for name, size in zip(names, found, strict=True) if isinstance(size, ImageError)
        }
        """Names of those that cannot be read, and why."""
        kept = [k for k, size in enumerate(found) if not isinstance(size, ImageError)]
        self.items = [items[k] for k in kept]
        self.names = [names[k] for k in kept]
        self._identity = [identity[k] if identity else k + 1 for k in kept]
        self._sizes: list[Size] = [size for size in found if not isinstance(size, ImageError)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pixels:
        try:
            return Pixels(_pixels(self.items[index], self.names[index], self._reading), self.image_id(index))
        except ImageError as error:
            self.left_out[self.names[index]] = str(error)
            return Pixels(np.zeros((1, 1, 3), np.uint8), None)

    def size(self, index: int) -> Size:
        """Height and width of a photograph."""
        return self._sizes[index]

    def image_id(self, index: int) -> int:
        """What files of results know a photograph by."""
        return self._identity[index]

    def name(self, index: int) -> str:
        """What a person knows it by."""
        return self.names[index]


def stems(names: Sequence[str]) -> list[str]:
    """Names without their suffixes, but for those that would be alike.

    >>> stems(["a/1.jpg", "b.jpg", "b.png"])
    ['a/1', 'b.jpg', 'b.png']
    """
    bare = [str(PurePosixPath(name).with_suffix("")) for name in names]
    count = Counter(bare)
    return [name if count[stem] > 1 else stem for name, stem in zip(names, bare, strict=True)]


def checked(photographs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Photographs in memory, each (H, W, 3) uint8.

    Args:
        photographs: a list of them, or one array (N, H, W, 3).

    Raises:
        DataError: they are something else; the sentence says how to make photographs of it.
    """
    return [_checked(_name(k, item), item) for k, item in enumerate(_listed(photographs))]


def _listed(photographs: Any) -> Sequence[Any]:
    """Several photographs, and not one alone."""
    if isinstance(photographs, str | os.PathLike):
        raise DataError(f"{str(photographs)!r} is one path, and a list is wanted: give [{str(photographs)!r}].")
    if getattr(photographs, "ndim", 4) != 4:
        raise DataError(
            f"an array of shape {np.shape(photographs)} is given; a list of arrays (H, W, 3) is wanted, "
            "or one array (N, H, W, 3): give [photograph] for one alone."
        )
    return photographs


def _name(position: int, item: Photograph) -> str:
    return os.fspath(item) if isinstance(item, str | os.PathLike) else f"photograph {position}"


def _checked(name: str, item: np.ndarray) -> np.ndarray:
    array, must = np.asarray(item), "it must be (H, W, 3), RGB"
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] != 3:
        raise DataError(f"{name} has its channels first, {array.shape}; {must}: give photograph.transpose(1, 2, 0).")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        raise DataError(
            f"{name} is grey, {array.shape}; {must}: give np.repeat(photograph.reshape(H, W, 1), 3, axis=2)."
        )
    if array.ndim == 3 and array.shape[2] == 4:
        raise DataError(f"{name} has four channels, {array.shape}; {must}: give photograph[..., :3], without alpha.")
    if array.ndim != 3 or array.shape[2] != 3:
        raise DataError(f"{name} has the shape {array.shape}; {must}.")
    if not array.size:
        raise DataError(f"{name} has no pixels: its shape is {array.shape}.")
    if array.dtype != np.uint8:
        remedy = "bring its values there and give photograph.astype(np.uint8)"
        low, high = (float(edge) for edge in (array.min(), array.max()))
        if low >= 0 and high <= 1:
            remedy = "give (255 * photograph).round().astype(np.uint8)"
        raise DataError(
            f"{name} is {array.dtype} with values from {low:g} to {high:g}; it must be uint8, from 0 to 255: {remedy}."
        )
    return array


def _size(item: Photograph, name: str, reading: Reading) -> Size | ImageError:
    """Height and width, of a file by its header, or why it cannot be read."""
    if not isinstance(item, str | os.PathLike):
        height, width, _ = _checked(name, item).shape
        return height, width
    try:
        with _opened(item) as file:
            return read_header(file, reading).size
    except ImageError as error:
        return error


def _pixels(item: Photograph, name: str, reading: Reading) -> np.ndarray:
    """(H, W, 3) uint8."""
    if not isinstance(item, str | os.PathLike):
        return _checked(name, item)
    with _opened(item) as file:
        return decode(file.read(), reading)


@contextlib.contextmanager
def _opened(item: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """An image file, open.

    Raises:
        ImageError: it cannot be read.
    """
    path = as_path(item)
    if not is_file(path):  # Opening anything else may wait for ever.
        raise ImageError("is a folder" if is_folder(path) else "is no file")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ImageError(f"cannot be read ({reason(error)})") from error
