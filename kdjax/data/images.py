"""Encoded images: what their headers say, whether they are whole, and their pixels as RGB. Pillow reads them."""

import io
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

MOST_PIXELS = 50_000_000
"""An image of more is not decoded: a file of 100 kB can hold one that fills the memory."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""What is tried; whatever a file is called. Pillow's other formats are rare, slow to refuse, or run other programs."""

_ANIMATED = ("GIF", "WEBP", "PNG", "TIFF")
_TAIL = 64
"""Bytes at the end of a file among which its format's end mark must be."""
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_ORIENTATION = 0x0112
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
    """Height and width in pixels, as stored: a camera's orientation mark is not applied."""
    turned: bool
    """Whether an orientation mark (EXIF) asks viewers to swap height and width."""
    animated: bool
    """Whether it has several pictures, of which the first counts."""


def read_header(file: IO[bytes]) -> Header:
    """Reads the header of an encoded image, and checks that the file is whole.

    A file without its format's end mark, or with values of more than 16 bits, is decoded once, here, to know; every
    other is not decoded.

    Args:
        file: open at any position; images of JPEG, PNG, WebP, BMP, TIFF and GIF, whatever their name.

    Raises:
        ImageError: empty, no image, or too large to be decoded safely.
        UndecodableError: cut off.
    """
    length = file.seek(0, os.SEEK_END)
    if not length:
        raise ImageError("is empty")
    file.seek(max(length - _TAIL, 0))
    tail = file.read()
    with _open(file) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        except Exception:  # Pillow raises whatever a broken EXIF block leads it to; pixels do not depend on it.
            turned = False
        header = Header((height, width), turned, image.format in _ANIMATED and getattr(image, "is_animated", False))
        if image.mode in ("F", "I") or _END.get(image.format or "", b"") not in tail:
            _pixels(image)
    return header


def for_all(function: Callable[[int], T], count: int) -> list[T]:
    """``[function(0), ..., function(count - 1)]``, computed by several threads that wait for storage together."""

    def chunk(start: int) -> list[T]:
        return [function(k) for k in range(start, min(start + _CHUNK, count))]

    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        # Pillow's remarks on metadata, which are not used.
        warnings.simplefilter("ignore")
        return [result for results in pool.map(chunk, range(0, count, _CHUNK)) for result in results]


def decode(data: bytes) -> np.ndarray:
    """The pixels of an encoded image, (H, W, 3) uint8, RGB.

    Grey and palette images and CMYK are converted, 16 bits a channel become the upper 8, transparency is left out, and
    a camera's orientation mark is not applied: boxes are those of the stored pixels.

    Raises:
        ImageError: no image, or too large.
        UndecodableError: its pixels cannot be read.
    """
    with _open(io.BytesIO(data)) as image:
        return _pixels(image)


def _open(file: IO[bytes]) -> Image.Image:
    """The image with its header read."""
    try:
        image = Image.open(file, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"has more than the {MOST_PIXELS:,} pixels that are decoded") from error
    except Exception as error:  # Pillow's readers raise whatever broken bytes lead them to.
        file.seek(0)
        raise ImageError(f"is no image that can be read (it begins with {file.read(12)!r})") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise ImageError(f"has {width} x {height} pixels, more than the {MOST_PIXELS:,} that are decoded")
    return image


def _pixels(image: Image.Image) -> np.ndarray:
    """Decodes to (H, W, 3) uint8."""
    try:
        if image.mode.startswith("I"):  # 16 bits: Pillow would cut off what is above 255.
            wide = np.asarray(image)
            if wide.min() < 0 or wide.max() >= 2**16:
                raise ValueError("its values are not of 16 bits")
            return np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.mode == "F":
            raise ValueError("it has floating-point pixels, whose range is not known")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # As above.
        raise UndecodableError(f"cannot be decoded ({str(error) or type(error).__name__})") from error
