"""What the embedded scenes become for other tasks: label maps, and crops of one object each."""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image

from kdjax.data.classified import IndexedClasses, classified_source
from kdjax.data.images import decode, for_all
from kdjax.data.mapped import IndexedMaps, LabelMaps, digest_of, settled_maps
from kdjax.data.masks import rasterize
from kdjax.data.object_source import IndexedObjects
from kdjax.data.tables import Annotations, Images
from kdjax.data.vocabularies import vocabulary
from kdjax.types import IGNORED

_MARGIN = 1.6
"""Side of a crop, as a multiple of the longer side of its object's box."""
_OFF_CENTRE = 0.15
"""How far the middle of a crop is from that of its object at most, as a share of the crop's side."""
_SMALLEST = 32
"""Pixels on a side of a crop."""


_COLOURS = np.array([[220, 60, 60], [60, 200, 60], [70, 90, 230], [220, 200, 50], [200, 70, 210], [60, 200, 210]])
"""What the objects of each class are tinted with in label maps, red, green and blue; of more classes, again."""
_TINT, _SPREAD = 0.7, 30.0
"""Share of the tint in a pixel, and the deviation of an object's tint from that of its class."""


def as_maps(source: IndexedObjects) -> IndexedMaps:
    """The same scenes, with the classes of their pixels: 0 for the background, then the classes of the objects.

    Objects are tinted, those of a class alike though not equally: what a segmenter tells classes apart by is mostly how
    they look, and outlines alone, by which the scenes are made to differ, take it longer to learn than a laptop has.

    Args:
        source: with outlines; where they overlap, the later object is in front. Crowds are ignored.
    """
    words = vocabulary(("background", *source.class_names))

    def classes(row: int) -> np.ndarray:
        objects = source.objects(row)
        found = np.zeros(objects.size, np.uint8)
        for outline, label, crowd in zip(objects.segmentation or (), objects.labels, objects.crowd, strict=True):
            found[rasterize(outline, objects.size)] = IGNORED if crowd else label + 1
        return found

    def read(row: int) -> bytes:
        objects, rng = source.objects(row), np.random.default_rng(source.image_id(row))
        scene = decode(source.read(row), source.report.checks.reading).copy()
        for outline, label in zip(objects.segmentation or (), objects.labels.tolist(), strict=True):
            inside = rasterize(outline, objects.size)
            tint = _COLOURS[label % len(_COLOURS)] + rng.normal(0, _SPREAD, 3)
            scene[inside] = np.clip((1 - _TINT) * scene[inside] + _TINT * tint, 0, 255)
        return _encoded(scene)

    def seen(row: int) -> tuple[int, np.ndarray]:
        found = classes(row)
        return digest_of(found), np.bincount(found.ravel(), minlength=256)[: len(words.class_names)]

    digests, pixels = zip(*for_all(seen, len(source)), strict=True)
    maps = LabelMaps(source.images.names, np.array(digests, np.int64), np.stack(pixels), classes)
    found = settled_maps(source.images, maps, words, read=read, report=source.report)
    return dataclasses.replace(found, generated=source.generated)


def as_crops(source: IndexedObjects) -> IndexedClasses:
    """Every object as an image of its own, with some of what is around it; its class is the object's.

    The window is square where the image has room for it; where in it the object is depends on the object's id alone.
    Objects in whose window is the middle of another one are left out.
    """
    objects = source.annotations
    windows = np.stack(
        [
            _window(source.size(image), box, np.random.default_rng(identity))
            for image, identity, box in zip(*(column.tolist() for column in objects[:2]), objects.boxes, strict=True)
        ]
    )
    alone = np.flatnonzero(_alone(objects, windows))
    objects, windows = objects.take(alone), windows[alone]
    names = [f"{source.name(image)} object {identity}" for image, identity in zip(*objects[:2], strict=True)]
    digests = [
        hashlib.blake2b(np.array([source.images.digest[image], *window]).tobytes(), digest_size=8).digest()
        for image, window in zip(objects.image, windows, strict=True)
    ]
    images = Images(objects.identity, names, windows[:, 2:], np.frombuffer(b"".join(digests), np.int64))

    def read(row: int) -> bytes:
        top, left, height, width = windows[row].tolist()
        scene = decode(source.read(int(objects.image[row])), source.report.checks.reading)
        return _encoded(scene[top : top + height, left : left + width])

    found = classified_source(images, objects.labels, source.class_names, read, source.report)
    return dataclasses.replace(found, generated=source.generated)


def _encoded(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "BMP")
    return file.getvalue()


def _alone(objects: Annotations, windows: np.ndarray) -> np.ndarray:
    """Which objects are the only ones whose middle is in their window, (m,) bool."""
    middle = (objects.boxes[:, 1::-1] + objects.boxes[:, :1:-1]) / 2
    first, last = (np.searchsorted(objects.image, objects.image, side) for side in ("left", "right"))
    inside = [
        (np.abs(middle[start:stop] - window[:2] - window[2:] / 2) <= window[2:] / 2).all(axis=1)
        for start, stop, window in zip(first, last, windows, strict=True)
    ]
    return np.array([np.count_nonzero(found) == 1 for found in inside], bool)


def _window(size: tuple[int, int], box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Top, left, height and width of the crop around a box, inside an image, (4,) int64."""
    corner, far = box[1::-1].astype(float), box[:1:-1].astype(float)
    side = max(_SMALLEST, round(_MARGIN * float((far - corner).max())))
    window = np.minimum(side, size)
    middle = (corner + far) / 2 + rng.uniform(-_OFF_CENTRE, _OFF_CENTRE, 2) * side
    first = np.clip(np.round(middle - window / 2), 0, np.array(size) - window)
    return np.concatenate([first, window]).astype(np.int64)
