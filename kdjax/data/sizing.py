"""How images are read, how large they are when a detector sees them, and what training changes: as configs say it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""

MOST_PIXELS = 50_000_000
"""An image of more is not decoded by default: a file of 100 kB can hold one that fills the memory."""


class Reading(NamedTuple):
    """How image files are read."""

    upright: bool = False
    """Turn images as their orientation mark (EXIF) says, instead of leaving pixels as they are stored."""
    value_range: tuple[float, float] | None = None
    """Values of more than 8 bits that become black and white; None takes the upper 8 of 16 bits."""
    most_pixels: int = MOST_PIXELS
    """An image of more is not decoded."""


READING = Reading()


class Resize(NamedTuple):
    """How an image becomes one of another size, in which the programs that published detectors are from differ."""

    side: Callable[[int, float], int]
    """From a side in pixels and a factor to the scaled side in whole pixels."""
    antialias: bool
    """Whether all pixels count where an image shrinks, or each pixel is made of the four nearest ones alone."""


def _nearest(side: int, factor: float) -> int:
    return round(side * factor)


def _half_up(side: int, factor: float) -> int:
    return int(side * factor + 0.5)


def _below(side: int, factor: float) -> int:
    return int(side * factor)


RESIZES = {
    "kdjax": Resize(_nearest, antialias=True),
    "torchvision": Resize(_below, antialias=False),
    "mmdet": Resize(_half_up, antialias=False),
    "detectron2": Resize(_half_up, antialias=True),
}
"""By the program that does so; all interpolate bilinearly."""


class Sizing(NamedTuple):
    """How large images are when a detector sees them, and how large the padded arrays are that hold them.

    An image is scaled, keeping its ratio, so that its shorter side has a given length, unless its longer side would
    exceed a limit, or the image the array that it is padded to. Of several shapes of arrays each image has the one in
    which it is scaled down least, and of those the smallest: it is a function of the image's own size alone.
    """

    shapes: tuple[Size, ...]
    """Of the padded arrays; a step is compiled for each."""
    short_sides: tuple[int, ...] = ()
    """Lengths in pixels of the shorter side: one of them, drawn, in training, the longest in evaluation. Empty to
    scale every image to the largest size that fits into its shape."""
    long_side: int = 0
    """Limit of the longer side in pixels; 0 for none."""
    resize: str = "kdjax"
    """How images are scaled, a key of ``RESIZES``."""
    eval_padding: int = 0
    """In evaluation, padded arrays have the next multiples of this as sides; 0 for ``shapes``."""
    centre_crop: bool = False
    """In evaluation, cut what does not fit, alike on both sides, where the shorter side has its length or, with no
    lengths given, where the image covers its array; as classifiers are tested. Otherwise images are scaled to fit."""

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Sizing":
        """What :meth:`described` made; keys that came later are at their defaults.

        >>> Sizing.of({"image_size": [[64, 96]], "short_sides": [], "long_side": 0}).shapes
        ((64, 96),)
        """
        shapes = tuple((height, width) for height, width in described["image_size"])
        others = {key: x for key, x in described.items() if key in cls._fields}
        return cls(**{**others, "shapes": shapes, "short_sides": tuple(described.get("short_sides", ()))})

    def described(self) -> dict[str, Any]:
        """The same by the names that the keys of configs have, as plain JSON.

        >>> Sizing(((64, 96),), (60, 64)).described()["image_size"]
        [[64, 96]]
        """
        lists = {"image_size": [list(shape) for shape in self.shapes], "short_sides": list(self.short_sides)}
        return lists | {key: x for key, x in self._asdict().items() if key not in ("shapes", "short_sides")}

    def scaled(self, size: Size, factor: float, limit: Size) -> Size:
        """A size times a factor, in whole pixels: at least 1, at most ``limit``."""
        side = RESIZES[self.resize].side
        height, width = (min(max(side(x, factor), 1), most) for x, most in zip(size, limit, strict=True))
        return height, width

    def padded(self, size: Size) -> Size:
        """The next multiples of ``eval_padding``, which is not 0, for an image of that size."""
        height, width = (-(-side // self.eval_padding) * self.eval_padding for side in size)
        return height, width

    def scale(self, size: np.ndarray, shape: np.ndarray, short_side: int | None = None) -> np.ndarray:
        """Factors (...) by which images of ``size`` (..., 2) are scaled into arrays of ``shape`` (..., 2).

        Args:
            size: height and width.
            shape: height and width.
            short_side: one of ``short_sides``; None for the longest.
        """
        if self.centre_crop:
            sides = short_side or max(self.short_sides, default=0)
            return sides / np.min(size, axis=-1) if sides else np.max(np.asarray(shape) / size, axis=-1)
        factor = np.min(np.asarray(shape) / size, axis=-1)
        if self.short_sides:
            factor = np.minimum(factor, (short_side or max(self.short_sides)) / np.min(size, axis=-1))
        if self.short_sides and self.long_side:
            factor = np.minimum(factor, self.long_side / np.max(size, axis=-1))
        return factor

    def evaluation_scale(self, size: np.ndarray) -> np.ndarray:
        """Factors (N,) by which evaluation scales images of height and width ``size`` (N, 2)."""
        return self.scale(size, np.array(self.shapes)[self.choose(size)])

    def choose(self, size: np.ndarray) -> np.ndarray:
        """Which of ``shapes`` each image of height and width ``size`` (N, 2) is padded to: (N,) int."""
        factor = np.stack([self.scale(size, np.array(shape)) for shape in self.shapes], axis=-1)
        area = np.where(factor == factor.max(axis=-1, keepdims=True), np.prod(self.shapes, axis=-1), np.inf)
        return np.argmin(area, axis=-1)


def sizing(image_size: Size | Sizing) -> Sizing:
    """What ``image_size`` stands for: a pair is the one shape into which every image is scaled to fit."""
    return image_size if isinstance(image_size, Sizing) else Sizing((image_size,))


class Augmentation(NamedTuple):
    """What training changes at random in its images, besides drawing their scale."""

    flip: float = 0.0
    """Probability of mirroring an image left to right."""
    jitter: tuple[float, float] | None = None
    """Range of a factor on the scale at which an image fits into its shape, in place of ``Sizing.short_sides``; with
    ``crop``, on the scale of evaluation. What is then too large is cropped at a random place (large-scale jitter;
    Ghiasi et al., 2021: 0.1 to 2)."""
    color: float = 0.0
    """Strength in [0, 1] of :func:`kdjax.data.transforms.recolor`: its factors are drawn from 1 - color to 1 + color,
    the turn of hues from -color / 10 to color / 10. At 0.5 about the photometric distortion of SSD (Liu et al., 2016).
    """
    crop: Size | None = None
    """Shape of training's arrays where it is not evaluation's: a window of that size is cut at a random place of the
    scaled image."""
    jitter_steps: int = 0
    """Equally spaced factors of ``jitter``, both ends among them, of which one is drawn; 0 for any in between."""
    cat_max_ratio: float = 1.0
    """Windows in which a class has more than this share of the labelled pixels are drawn anew, up to ten times."""
    area: tuple[float, float] | None = None
    """Range of the share of an image's area that is cut out at a random place and scaled to the whole array (Szegedy et
    al., 2015: 0.08 to 1), in place of ``jitter``."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the ratio of width to height of what ``area`` cuts out."""
    photometric: bool = False
    """Whether colours are changed as :mod:`kdjax.data.distortion` does."""
    mixup: float = 0.0
    """Above 0, both parameters of the beta distribution of the share that another image has in each (Zhang et al.,
    2018: 0.2 on ImageNet); of images with one class each."""
