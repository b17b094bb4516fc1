"""Maps of positions as pictures: how strong each is, and which are hidden, over the image that they are of."""

from typing import Any

import numpy as np

_STOPS = np.array([(13, 8, 60), (90, 20, 120), (185, 50, 110), (240, 120, 60), (252, 230, 120)], float)
"""Colours from nothing to the most, ever brighter, also for whoever tells no hues apart."""
_SHARE = 0.7
"""Of the colour in a picture; the rest is the image, in grey."""
_HIDDEN = 0.15
"""What is left of the image where a mask hides it."""


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1, clipped to that, as colours; what is no number is as 0.

    >>> heat(np.array([[0.0, 1.0]])).tolist()
    [[[13, 8, 60], [252, 230, 120]]]

    Args:
        values: (h, w) float.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    places = np.nan_to_num(np.clip(values, 0, 1)) * (len(_STOPS) - 1)
    channels = [np.interp(places, np.arange(len(_STOPS)), stops) for stops in _STOPS.T]
    return np.stack(channels, axis=-1).astype(np.uint8)


def spread(values: np.ndarray, stride: int, size: tuple[int, int]) -> np.ndarray:
    """A map on the pixels of its image, each position as a square of ``stride``; what is beyond the image falls away.

    >>> spread(np.array([[1, 2], [3, 4]]), 2, (3, 3)).tolist()
    [[1, 1, 2], [1, 1, 2], [3, 3, 4]]

    Args:
        values: (h, w) of any dtype.
        stride: pixels from one position to the next.
        size: height and width of the image.
    """
    height, width = size
    return values.repeat(stride, axis=0)[:height].repeat(stride, axis=1)[:, :width]


def over(image: np.ndarray, values: np.ndarray, stride: int, most: float) -> np.ndarray:
    """A map of strengths over its image: colours from 0 to ``most``.

    Args:
        image: (H, W, 3) uint8.
        values: (h, w) float; at least as large as the image, in positions.
        stride: see :func:`spread`.
        most: the strength that has the brightest colour.
    """
    colours = spread(heat(values / most if most > 0 else values), stride, _size(image))
    grey = image.mean(axis=-1, keepdims=True)
    return (_SHARE * colours + (1 - _SHARE) * grey).astype(np.uint8)


def masked(image: np.ndarray, kept: np.ndarray, stride: int) -> np.ndarray:
    """An image, dark where a mask hides it.

    Args:
        image: (H, W, 3) uint8.
        kept: (h, w) bool.
        stride: see :func:`spread`.
    """
    return (image * np.where(spread(kept, stride, _size(image)), 1, _HIDDEN)[..., None]).astype(np.uint8)


def strip(values: np.ndarray, width: int = 256, height: int = 16) -> np.ndarray:
    """Channels beside each other, the strongest brightest, (height, width or more, 3) uint8.

    Args:
        values: (C,) bool or float.
        width: of the picture at least, in pixels, unless there are more channels.
        height: of the picture.
    """
    strengths: Any = values.astype(float)
    most = strengths.max(initial=0)
    colours = heat(strengths[None] / most if most > 0 else strengths[None])
    return colours.repeat(height, axis=0).repeat(max(1, width // len(values)), axis=1)


def _size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
