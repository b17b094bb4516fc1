"""What the boxes of a data set look like, class by class and altogether."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kdjax.data.examples import ObjectSource
from kdjax.data.sizing import Sizing
from kdjax.losses import ClassStatistics, uniform_statistics
from kdjax.types import Suggestion

SMALL, MEDIUM = 32.0**2, 96.0**2
"""COCO's size classes: objects of an area below the first, in pixels, are small; of the others, those below the second,
medium."""


class Columns(NamedTuple):
    """All m objects of n images, without the images."""

    size: np.ndarray
    """(n, 2) int64: height and width of the images in pixels."""
    image: np.ndarray
    """(m,) int64: position of each object's image."""
    boxes: np.ndarray
    """(m, 4) float32, xyxy in pixels."""
    labels: np.ndarray
    """(m,) int32."""
    crowd: np.ndarray
    """(m,) bool."""
    area: np.ndarray
    """(m,) float32, pixels."""


def columns(source: ObjectSource) -> Columns:
    """Gathers the objects of a source, without decoding an image."""
    every = [source.objects(index) for index in range(len(source))]
    return Columns(
        size=np.array([objects.size for objects in every], np.int64).reshape(-1, 2),
        image=np.repeat(np.arange(len(every)), [len(objects.labels) for objects in every]),
        boxes=np.concatenate([np.zeros((0, 4), np.float32), *(objects.boxes for objects in every)]),
        labels=np.concatenate([np.zeros(0, np.int32), *(objects.labels for objects in every)]),
        crowd=np.concatenate([np.zeros(0, bool), *(objects.crowd for objects in every)]),
        area=np.concatenate([np.zeros(0, np.float32), *(objects.area for objects in every)]),
    )


def class_statistics(source: ObjectSource) -> ClassStatistics:
    """Measures classes and sizes of all boxes of a source, crowds left out, without decoding an image.

    Args:
        source: usually the training set.

    Returns:
        the share of each class, and the mean and standard deviation of its boxes' width and height relative to their
        image, float32. A class without boxes has the size of :func:`kdjax.losses.uniform_statistics`; a source without
        boxes is described by it altogether.
    """
    found = columns(source)
    side = (found.boxes[:, 2:] - found.boxes[:, :2]) / found.size[found.image][:, ::-1]
    size, label = side[~found.crowd], found.labels[~found.crowd]
    default = uniform_statistics(len(source.class_names))
    if not len(label):
        return default
    mean, deviation = np.array(default.mean), np.array(default.deviation)
    for k in np.unique(label):
        mean[k], deviation[k] = size[label == k].mean(0), size[label == k].std(0)
    count = np.bincount(label, minlength=len(source.class_names))
    return ClassStatistics(*(jnp.asarray(x, jnp.float32) for x in (count / count.sum(), mean, deviation)))


def describe(source: ObjectSource) -> list[str]:
    """What a person should know of a data set before training on it, as lines of text; crowds are counted apart."""
    found = columns(source)
    objects = Columns(found.size, *(column[~found.crowd] for column in found[1:]))
    count = np.bincount(objects.image, minlength=len(source))
    ratio = found.size[:, 1] / found.size[:, 0]
    ratios = {
        "below 1:2": ratio < 1 / 2,
        "1:2 to 1:1": (ratio >= 1 / 2) & (ratio < 1),
        "1:1": ratio == 1,
        "1:1 to 2:1": (ratio > 1) & (ratio <= 2),
        "above 2:1": ratio > 2,
    }
    sizes = {
        "small": objects.area < SMALL,
        "medium": (objects.area >= SMALL) & (objects.area < MEDIUM),
        "large": objects.area >= MEDIUM,
    }
    sides = np.sort(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=1)
    return [
        f"images: {len(source)}, {np.count_nonzero(count == 0)} of them without objects",
        f"pixels: height {_range(found.size[:, 0])}; width {_range(found.size[:, 1])}",
        f"width to height: {_shares(ratios)}",
        f"objects: {len(objects.image)}, besides {np.count_nonzero(found.crowd)} crowds; in an image {_range(count)}",
        f"COCO's size classes: {_shares(sizes)}",
        f"pixels of boxes: shorter side {_range(sides[:, 0])}; longer side {_range(sides[:, 1])}",
        *_histogram(source.class_names, objects),
    ]


_AREA = 128 * 128
"""Pixels of the images of the embedded data, for which the configs have their steps and rates."""
_SMALLEST = 8.0
"""Pixels that nearly all objects should measure: the stride of the finest map of most detectors."""
_LARGEST_AREA = 2 * _AREA
_SIDES = range(64, 545, 32)
MOST_OBJECTS = 100
"""Room in an image that is chosen at most: as many as evaluation counts."""
_TOO_SMALL, _MANY = 4.0, 0.01
"""Pixels, and the share of boxes below from which on it is said."""


def suggest(source: ObjectSource) -> Suggestion | None:
    """What suits the images and boxes of a training split, within the compute of the embedded data or a few times it.

    The padded images have about the ratio of the median image and ``_AREA`` pixels or some more, up to twice as many
    where a tenth of the objects would measure less than ``_SMALLEST`` pixels. There is room for the objects of every
    image. Scale jitter and colour are on: a few hundred photographs are too few without.
    """
    found = columns(source)
    boxes = found.boxes[~found.crowd]
    if not len(boxes):
        return None
    own = found.size[found.image[~found.crowd]]
    sides = np.sqrt(np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-6))
    ratio = float(np.median(found.size[:, 0] / found.size[:, 1]))

    def shape(area: float) -> tuple[int, int]:
        shapes = [(height, width) for height in _SIDES for width in _SIDES if area <= height * width <= 1.6 * area]
        return min(shapes, key=lambda s: abs(np.log(s[0] / s[1] / ratio)) + abs(np.log(s[0] * s[1] / area)) / 4)

    def scaled(shape: tuple[int, int]) -> np.ndarray:
        return sides * np.min(np.array(shape) / own, axis=1)

    few = max(float(np.quantile(scaled(shape(_AREA)), 0.1)), 1e-3)
    size = shape(float(np.clip(_AREA * (_SMALLEST / few) ** 2, _AREA, _LARGEST_AREA)))
    count = int(np.bincount(found.image, minlength=len(found.size)).max())
    data = {
        "image_size": size,
        "jitter": (0.5, 1.5),
        "color": 0.3,
        "max_objects": min(max(count, 16), MOST_OBJECTS),
    }
    return Suggestion(data, np.sort(scaled(size)).tolist())


def sizes_in_words(source: ObjectSource, sizing: Sizing) -> list[str]:
    """How large boxes are once images are scaled, and a warning where many are too small to be found."""
    found = columns(source)
    own = found.size[found.image[~found.crowd]]
    if not len(own):
        return []
    boxes = found.boxes[~found.crowd]
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) * sizing.evaluation_scale(own)
    low, middle, high = np.quantile(sides, (0.05, 0.5, 0.95))
    lines = [f"Boxes are {low:.0f} to {high:.0f} pixels large once images are scaled, half of them below {middle:.0f}."]
    small = float(np.mean(sides < _TOO_SMALL))
    if small > _MANY:
        lines.append(
            f"WARNING: {small:.0%} of the boxes are below {_TOO_SMALL:g} pixels then, too small to be found: a larger "
            "config.data.image_size (or short_sides) makes them larger, at the cost of time."
        )
    return lines


def _range(values: np.ndarray) -> str:
    if not len(values):
        return "none"
    return f"{values.min():.4g} to {values.max():.4g}, median {np.median(values):.4g}"


def _shares(groups: dict[str, np.ndarray]) -> str:
    """The members of each group, with their share in percent."""
    return ", ".join(
        f"{name} {np.count_nonzero(chosen)} ({100 * np.count_nonzero(chosen) / max(len(chosen), 1):.1f} %)"
        for name, chosen in groups.items()
    )


def _histogram(class_names: tuple[str, ...], objects: Columns) -> list[str]:
    """A table: of each class its objects, their share, and the images that have any."""
    width = max(map(len, ("class", *class_names)))
    count = np.bincount(objects.labels, minlength=len(class_names))
    pairs = np.unique(np.stack([objects.labels, objects.image]), axis=1)
    images = np.bincount(pairs[0], minlength=len(class_names))
    share = 100 * count / max(count.sum(), 1)
    return [f"{'class':{width}}   objects       %    images"] + [
        f"{name:{width}} {count[k]:9} {share[k]:7.2f} {images[k]:9}" for k, name in enumerate(class_names)
    ]
