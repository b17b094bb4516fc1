"""Pictures of index maps: their classes as colours over the image."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from kdjax.data.examples import MapSource
from kdjax.types import IGNORED
from kdjax.visualize import Drawing, Mark, class_colour, save_sheet

_SHARE = 0.6
"""Of a class's colour in a pixel."""
_IGNORED_COLOUR = (128, 128, 128)


def overlay(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """An image in grey, under the colours of its classes; ignored pixels stay grey.

    >>> overlay(np.zeros((1, 1, 3), np.uint8), np.array([[255]], np.uint8)).tolist()
    [[[76, 76, 76]]]

    Args:
        image: (H, W, 3) uint8, RGB.
        classes: (H, W) uint8.
    """
    colours = np.array([class_colour(label) for label in range(IGNORED)] + [_IGNORED_COLOUR])
    grey = image.mean(axis=-1, keepdims=True)
    return ((1 - _SHARE) * grey + _SHARE * colours[classes]).astype(np.uint8)


def save_maps(path: str | os.PathLike[str], source: MapSource, said: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Saves a PNG: a row for each of the first images, columns for the image, its true map, and each model's.

    Args:
        path: of the picture.
        source: the images, their maps and the names of the classes.
        said: caption to the maps (H, W) uint8 of the source's first images, in its order; as many for each.
    """
    rows, right = [], dict.fromkeys(said, 0.0)
    for position, maps in enumerate(zip(*said.values(), strict=True)):
        example = source[position]
        if example.image_id != source.image_id(position):  # It cannot be decoded, and the models saw nothing.
            continue
        labelled = example.classes != IGNORED
        for caption, classes in zip(said, maps, strict=True):
            right[caption] += float((classes == example.classes)[labelled].mean()) if labelled.any() else 0.0
        cells = [Drawing(example.image), *(Drawing(overlay(example.image, x)) for x in (example.classes, *maps))]
        rows.append((source.name(position), cells))
    captions = {"image": "", "truth": ""}
    captions |= {
        name: f"{100 * value / max(len(rows), 1):.1f} % of these pixels right" for name, value in right.items()
    }
    save_sheet(path, captions, rows, legend(source.class_names))


def legend(class_names: Sequence[str]) -> list[Mark]:
    """What colours mean; the boxes are of no meaning."""
    box = np.zeros(4)
    marks = [Mark(box, name, class_colour(label)) for label, name in enumerate(class_names)]
    return [*marks, Mark(box, "not counted", _IGNORED_COLOUR)]
