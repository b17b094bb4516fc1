"""Encoded images: what their headers say, whether they are whole, and their pixels as RGB. Pillow reads them."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from kdjax.data.sizing import READING, Reading
from kdjax.processes import divided

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""What is tried; whatever a file is called. Pillow's other formats are rare, slow to refuse, or run other programs."""

_ANIMATED = ("GIF", "WEBP", "PNG", "TIFF")
_TAIL = 64
"""Bytes at the end of a file among which its format's end mark must be."""
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings the stored pixels of each orientation mark upright."""
_BACK = _TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""And what brings them back."""
_TIFF_SIZE = 0x0100, 0x0101
"""The tags of the width and the height of stored pixels."""
_BLOCK, _BLOCKS = 4096, 4
"""Of a file of more bytes than all blocks together, a digest sees these blocks, from its beginning to its end."""
_LIMIT_KEY = "config.data.max_pixels raises that limit"
_RANGE_KEY = "config.data.value_range"
_THREADS, _CHUNK = 16, 64
"""Storage answers many requests at once; chunks keep the bookkeeping small."""

T = TypeVar("T")


class ImageError(ValueError):
    """An image cannot be used; the text goes on after its name, such as "is empty"."""


class UndecodableError(ImageError):
    """An image's header is sound, but its pixels are not there."""


class Header(NamedTuple):
    """What an image file says about itself."""

    size: tuple[int, int]
    """Height and width in pixels, as :func:`decode` makes it."""
    orientation: int
    """The mark (EXIF) by which viewers turn it: 1 is upright, from 5 on height and width change places."""
    animated: bool
    """Whether it has several pictures, of which the first counts."""
    digest: int
    """64 bits of a digest of the file's length and bytes: all of a small file, some of a large one."""


class Values(NamedTuple):
    """The values of an image."""

    wide: bool
    """Whether they have more than 8 bits."""
    low: float
    high: float
    darkest: int
    """Of 256 levels, the lowest that they become."""
    brightest: int
    """And the highest."""


def read_header(file: IO[bytes], reading: Reading = READING) -> Header:
    """Reads the header of an encoded image, and checks that the file is whole.

    A file without its format's end mark, or with values of more than 16 bits, is decoded once, here, to know; every
    other is not decoded.

    Args:
        file: open at any position; images of JPEG, PNG, WebP, BMP, TIFF and GIF, whatever their name.
        reading: how it is going to be decoded.

    Raises:
        ImageError: empty, no image, or too large to be decoded safely.
        UndecodableError: cut off.
    """
    length = file.seek(0, os.SEEK_END)
    if not length:
        raise ImageError("is empty")
    blocks = _blocks(file, length)
    digest = hashlib.blake2b(b"%d " % length + blocks, digest_size=8).digest()
    with _open(file, reading) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow may have turned its size already.
            width, height = (getattr(image, "tag_v2")[tag] for tag in _TIFF_SIZE)  # noqa: B009
        orientation = _orientation(image)
        if reading.upright and orientation >= 5:
            width, height = height, width
        animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
        if image.mode in ("F", "I") or _END.get(image.format or "", b"") not in blocks[-_TAIL:]:
            _pixels(image, reading)
    return Header((height, width), orientation, animated, int.from_bytes(digest, "little", signed=True))


def _blocks(file: IO[bytes], length: int) -> bytes:
    """All bytes of a small file; of a large one equally spaced blocks, the first and the last among them."""
    if length <= _BLOCKS * _BLOCK:
        file.seek(0)
        return file.read()
    found = []
    for k in range(_BLOCKS):
        file.seek(k * (length - _BLOCK) // (_BLOCKS - 1))
        found.append(file.read(_BLOCK))
    return b"".join(found)


def _orientation(image: Image.Image) -> int:
    try:
        mark = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises whatever a broken EXIF block leads it to; pixels do not depend on it.
        return 1
    return mark if mark in _TURNS else 1


def for_all(function: Callable[[int], T], count: int, *, together: bool = False) -> list[T]:
    """``[function(0), ..., function(count - 1)]``, computed by several threads that wait for storage together.

    Args:
        function: of a number.
        count: how many numbers.
        together: each process computes a part, for all of them (:func:`kdjax.processes.divided`).
    """

    def by_threads(numbers: range) -> list[T]:
        def chunk(start: int) -> list[T]:
            return [function(k) for k in numbers[start : start + _CHUNK]]

        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
            # Pillow's remarks on metadata, which are not used.
            warnings.simplefilter("ignore")
            return [result for results in pool.map(chunk, range(0, len(numbers), _CHUNK)) for result in results]

    return divided(by_threads, count) if together else by_threads(range(count))


def decode(data: bytes, reading: Reading = READING) -> np.ndarray:
    """The pixels of an encoded image, (H, W, 3) uint8, RGB.

    Grey and palette images and CMYK are converted, 16 bits a channel become the upper 8 unless a range is given, and
    transparency is left out. A camera's orientation mark is applied where that is asked for; otherwise boxes are those
    of the stored pixels.

    Raises:
        ImageError: no image, or too large.
        UndecodableError: its pixels cannot be read.
    """
    with _open(io.BytesIO(data), reading) as image:
        return _pixels(image, reading)


def decode_indices(data: bytes, reading: Reading = READING) -> tuple[np.ndarray, bool]:
    """The values of an encoded image whose pixels are numbers, (H, W) of any integer dtype, and whether it is in RGB.

    Of a palette image they are the numbers of the colours, of a grey one its values, of one of single bits 0 and 1; of
    RGB, whose channels must be equal, one channel. No orientation mark is applied.

    Raises:
        ImageError: no image, too large, or with other values than numbers.
        UndecodableError: its pixels cannot be read.
    """
    with _open(io.BytesIO(data), reading) as image:
        if image.format in ("JPEG", "WEBP"):
            raise ImageError(f"is in the format {image.format}, which changes values; it must be a PNG")
        try:
            image.load()
        except Exception as error:  # As above.
            raise UndecodableError(f"cannot be decoded ({str(error) or type(error).__name__})") from error
        values = np.asarray(image)
        if image.mode == "F":
            raise ImageError("has floating-point values; they must be whole numbers")
        if image.mode in ("LA", "PA"):
            return values[..., 0], False
        if values.ndim == 2:
            return (values.astype(np.uint8) if values.dtype == bool else values), False
        if image.mode not in ("RGB", "RGBA") or (values[..., 1:3] != values[..., :1]).any():
            colours = {
                f"#{r:02x}{g:02x}{b:02x}" for r, g, b in values[..., :3].reshape(-1, 3)[:: max(values.size // 999, 1)]
            }
            raise ImageError(
                f"is in colours ({', '.join(sorted(colours)[:4])}, ...), not of numbers: each pixel must be the number "
                "of its class, in a grey PNG or one with a palette"
            )
        return values[..., 0], True


def measure(data: bytes, reading: Reading = READING) -> Values:
    """The lowest and the highest value of an encoded image, and what they become when it is decoded.

    Raises:
        ImageError: as :func:`decode`.
    """
    with _open(io.BytesIO(data), reading) as image:
        wide = _is_wide(image)
        pixels = _pixels(image, reading)
        values = np.asarray(image) if wide else pixels
    return Values(wide, float(np.nanmin(values)), float(np.nanmax(values)), int(pixels.min()), int(pixels.max()))


def _open(file: IO[bytes], reading: Reading) -> Image.Image:
    """The image with its header read."""
    limit = reading.most_pixels
    if Image.MAX_IMAGE_PIXELS and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow has one of its own, for all images.
    file.seek(0)
    try:
        image = Image.open(file, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"has more than the {limit:,} pixels that are decoded ({_LIMIT_KEY})") from error
    except Exception as error:  # Pillow's readers raise whatever broken bytes lead them to.
        file.seek(0)
        raise ImageError(f"is no image that can be read (it begins with {file.read(12)!r})") from error
    width, height = image.size
    if width * height > limit:
        image.close()
        raise ImageError(f"has {width} x {height} pixels, more than the {limit:,} that are decoded ({_LIMIT_KEY})")
    return image


def _pixels(image: Image.Image, reading: Reading) -> np.ndarray:
    """Decodes to (H, W, 3) uint8."""
    try:
        before = _orientation(image) if image.format == "TIFF" else 1
        image.load()
        mark = _orientation(image)
        applied = mark != before != 1  # By Pillow, which does so with TIFF alone.
        if _is_wide(image):
            pixels = Image.fromarray(_narrow(image, reading))
        else:
            pixels = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        if applied and not reading.upright:
            pixels = pixels.transpose(_BACK[before])
        if mark != 1 and not applied and reading.upright:
            pixels = pixels.transpose(_TURNS[mark])
        array = np.asarray(pixels)
        return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)
    except Exception as error:  # As above.
        raise UndecodableError(f"cannot be decoded ({str(error) or type(error).__name__})") from error


def _is_wide(image: Image.Image) -> bool:
    """Whether its values have more than 8 bits: Pillow would cut off what is above 255."""
    return image.mode.startswith(("I", "F"))


def _narrow(image: Image.Image, reading: Reading) -> np.ndarray:
    """The values of a wide image in 8 bits, (H, W) uint8."""
    wide = np.asarray(image)
    if reading.value_range:
        low, high = reading.value_range
        share = np.nan_to_num((wide.astype(np.float64) - low) / (high - low))
        return (np.clip(share, 0, 1) * 255).round().astype(np.uint8)
    if image.mode == "F":
        raise ValueError(f"it has floating-point pixels, whose range is not known; {_RANGE_KEY} says it")
    if wide.min() < 0 or wide.max() >= 2**16:
        raise ValueError(f"its values are not of 16 bits; {_RANGE_KEY} says their range")
    return (wide >> 8).astype(np.uint8)
