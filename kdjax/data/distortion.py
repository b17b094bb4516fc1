"""The photometric distortion of SSD (Liu et al., 2016) as MMSegmentation has it, on whole numbers in between.

Four changes, each with probability 1/2: brightness, contrast, saturation and hue; contrast comes second or last. After
each, values are cut off at 0 and 255 and their fractions dropped. Saturation and hue are those of OpenCV's HSV of 8
bits, with 180 hues.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWN = 9
"""How many random numbers :func:`drawn_steps` takes."""
_BRIGHTNESS = 32.0
_FACTORS = 0.5, 1.5
_HUE = 18
"""Hues are turned by -18 to 17 of 180."""
_HUES = 180
_BLOCK = 1 << 14
"""Pixels that are changed at once: what is made of them in between stays in the processor's cache."""
_FIXED = 12
"""Bits of the fraction in OpenCV's tables of quotients."""


class Step(NamedTuple):
    """One change."""

    name: str
    """"brightness", "contrast", "saturation" or "hue"."""
    amount: float
    """What is added to values or hues, or a factor."""


def drawn_steps(numbers: np.ndarray) -> list[Step]:
    """The changes, in order, that numbers (DRAWN,) in [0, 1) stand for.

    >>> drawn_steps(np.array([0.4, 0.75, 0.6, 0.0, 0.5, 0.9, 0.0, 0.9, 0.0]))
    [Step(name='brightness', amount=16.0), Step(name='contrast', amount=1.0)]
    """
    low, high = _FACTORS
    amounts = {
        "brightness": _BRIGHTNESS * (2 * numbers[1] - 1),
        "contrast": low + (high - low) * numbers[4],
        "saturation": low + (high - low) * numbers[6],
        "hue": int(2 * _HUE * numbers[8]) - _HUE,
    }
    coins = {"brightness": numbers[0], "contrast": numbers[3], "saturation": numbers[5], "hue": numbers[7]}
    early = ["contrast"] if numbers[2] >= 0.5 else []
    order = ["brightness", *early, "saturation", "hue", *([] if early else ["contrast"])]
    return [Step(name, float(amounts[name])) for name in order if coins[name] < 0.5]


def distort(image: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    """Changes the colours of an image (H, W, 3) uint8, RGB, step by step."""
    if not steps:
        return image
    rows = max(1, _BLOCK // image.shape[1])
    return np.concatenate([_distorted(image[row : row + rows], steps) for row in range(0, len(image), rows)])


def _distorted(image: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    levels = np.arange(256, dtype=np.float32)
    for name, amount in steps:
        if name == "brightness":
            image = np.take(_cut_off(levels + np.float32(amount)), image)
        elif name == "contrast":
            image = np.take(_cut_off(levels * np.float32(amount)), image)
        else:
            hue, saturation, value = _hsv(image)
            if name == "saturation":
                saturation = np.take(_cut_off(levels * np.float32(amount)), saturation)
            else:
                hue = np.take(_turned(int(amount)), hue)
            image = _rgb(hue, saturation, value)
    return image


def _turned(amount: int) -> np.ndarray:
    return (np.arange(_HUES) + amount) % _HUES


def _cut_off(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _quotients(numerator: float) -> np.ndarray:
    """(256,) int32: ``numerator`` over each number, in steps of 2 ** -_FIXED; 0 over 0."""
    return np.rint(
        np.divide(numerator * 2**_FIXED, np.arange(256), where=np.arange(256) > 0, out=np.zeros(256))
    ).astype(np.int32)


_OVER_VALUE, _OVER_RANGE = _quotients(255), _quotients(_HUES / 6)


def _hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue (H, W) int32 in [0, 180), saturation int32 and value uint8, both in [0, 255], as OpenCV rounds them."""
    red, green, blue = (np.ascontiguousarray(image[..., channel]) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_FIXED - 1)
    saturation = (spread * np.take(_OVER_VALUE, value) + half) >> _FIXED
    of_red, of_green = value == red, value == green
    red, green, blue, wide = (x.astype(np.int32) for x in (red, green, blue, spread))
    place = np.where(of_red, green - blue, np.where(of_green, blue - red + 2 * wide, red - green + 4 * wide))
    hue = (place * np.take(_OVER_RANGE, spread) + half) >> _FIXED
    return hue + _HUES * (hue < 0), saturation, value


_SECTOR = np.arange(_HUES) / (_HUES / 6)
_SHARES = np.stack([np.clip(np.minimum((k + _SECTOR) % 6, 4 - (k + _SECTOR) % 6), 0, 1) for k in (5, 3, 1)]).astype(
    np.float32
) / np.float32(255)
"""(3, 180): of each hue, how far below the value red, green and blue are at full saturation, over 255."""


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 of hues, saturations and values."""
    image = np.empty((*hue.shape, 3), np.uint8)
    depth = value.astype(np.float32) * saturation
    whole = value + np.float32(0.5)
    for channel, share in enumerate(_SHARES):
        image[..., channel] = whole - depth * np.take(share, hue)
    return image
