"""What the values of label maps mean."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax.types import IGNORED

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Of Pascal VOC, in the order of the values in its label maps."""

CITYSCAPES = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19},
    **{"traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26},
    **{"truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
}
"""The classes that are learnt, in order, and their label ids."""
_MOST_ID = 33
"""Of Cityscapes; the license plate's is -1, which is 255 in a file."""
NO_CLASS = -1
"""In the table of a vocabulary, a value that no pixel should have."""


class Vocabulary(NamedTuple):
    """What the values of label maps mean."""

    class_names: tuple[str, ...]
    values: tuple[int, ...]
    """Of each class, what the files call it."""
    table: np.ndarray
    """(256,) int64: of each value its class, ``IGNORED`` or ``NO_CLASS``."""
    words: str
    """Which values there may be, for a sentence."""


def vocabulary(class_names: Sequence[str]) -> Vocabulary:
    """Of label maps whose values are the classes, and ``IGNORED``.

    >>> vocabulary(("background", "cell")).words
    'pixels are 0 to 1, in the order of the classes, or 255 where they are ignored'
    """
    count = len(class_names)
    table = np.full(256, NO_CLASS)
    table[:count], table[IGNORED] = np.arange(count), IGNORED
    words = f"pixels are 0 to {count - 1}, in the order of the classes, or {IGNORED} where they are ignored"
    return Vocabulary(tuple(class_names), tuple(range(count)), table, words)


def cityscapes() -> Vocabulary:
    """Of Cityscapes' label ids: the 19 classes that are learnt; all others are ignored."""
    table = np.full(256, NO_CLASS)
    table[: _MOST_ID + 1], table[IGNORED] = IGNORED, IGNORED
    table[list(CITYSCAPES.values())] = np.arange(len(CITYSCAPES))
    return Vocabulary(tuple(CITYSCAPES), tuple(CITYSCAPES.values()), table, f"label ids are 0 to {_MOST_ID}")
