"""Charts of what detectors find: precision over recall, and which classes are taken for which, missed and made up."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from kdjax.charts import Curves, Line, Matrix
from kdjax.data.examples import ObjectSource
from kdjax.tasks.confusion import confusion_chart
from kdjax.visualize import DRAWN_SCORE, HIT_IOU, Found, overlaps

NOTHING = "nothing"
"""The row of what is found where nothing is, and the column of what is missed."""


class FoundThere(Found, Protocol):
    """What was found in an image of a source."""

    @property
    def position(self) -> int:
        """Of the image."""


def precision_chart(precisions: Mapping[float, np.ndarray]) -> Curves:
    """Precision over recall.

    Args:
        precisions: by IoU threshold (101,) percent, at the recalls 0, 1, ..., 100 %.
    """
    lines = {
        f"IoU {threshold:g}": Line([(float(recall), float(value)) for recall, value in enumerate(values)], dash=number)
        for number, (threshold, values) in enumerate(precisions.items())
    }
    return Curves("Precision and recall, mean over classes", "recall, %", "precision, %", lines)


def objects_chart(source: ObjectSource, found: Iterable[FoundThere]) -> Matrix:
    """What objects are taken for, at an IoU of ``HIT_IOU`` and a score of ``DRAWN_SCORE`` or more.

    Every detection, the best first, takes the object that it fits best and that is not taken, of whatever class; crowds
    are left out, with what is found in them.

    Args:
        source: the truth.
        found: of each image of it what a detector found.
    """
    classes = len(source.class_names)
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    for image in found:
        truth, shown = source.objects(image.position), image.scores >= DRAWN_SCORE
        boxes, labels = image.boxes[shown], image.labels[shown]
        fits = overlaps(boxes, truth.boxes[~truth.crowd])
        inside = overlaps(boxes, truth.boxes[truth.crowd], of_first=True).max(axis=1, initial=0) >= HIT_IOU
        true_labels = truth.labels[~truth.crowd]
        free = np.ones(len(true_labels), bool)
        for number in np.argsort(-image.scores[shown], kind="stable").tolist():
            place = int((fits[number] * free).argmax()) if free.any() else -1
            if place >= 0 and fits[number, place] >= HIT_IOU:
                free[place] = False
                counts[true_labels[place], labels[number]] += 1
            elif not inside[number]:
                counts[classes, labels[number]] += 1
        np.add.at(counts[:, classes], true_labels[free], 1)
    return confusion_chart(counts, source.class_names, NOTHING)
