"""Which classes a model takes for which, counted over a whole source."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.charts import Chart, Curves, Line, Matrix
from kdjax.data.examples import ClassSource
from kdjax.types import Batch, Metrics

TOP = 5
"""Classes of which one must be right, for the second metric."""
_BINS = 200
"""Of probabilities."""
MOST_SHOWN = 20
"""Classes of which the metrics say which are taken for which, at most."""


class Confusion:
    """The judge of classifiers: one matrix of counts, in which every image counts once.

    Its metrics are in percent: "top1" and, of ``TOP`` classes or more, "top5": the images whose class is the most
    probable one, or among the five most probable; by class "recall", the images of it that are taken for it, and
    "precision", the images taken for it that are of it, NaN where there are none; and of ``MOST_SHOWN`` classes at most
    "confusion", by true class and by the class that was said, how many of the former's images the model takes for the
    latter, where there are any.
    """

    def __init__(self, source: ClassSource):
        classes = len(source.class_names)
        self._source = source
        self._counts = np.zeros((classes, classes), np.int64)
        self._near = np.zeros(1, np.int64)
        self._sure = np.zeros((2, _BINS + 1), np.int64)
        self._kept: dict[int, dict[str, Any]] = {}

    def add(self, outputs: Any, batch: Batch) -> None:
        """Takes the probabilities (N, K) of a batch; blank images count nowhere."""
        for position, said in zip(np.asarray(batch.index).tolist(), np.asarray(outputs), strict=True):
            if position < 0:
                continue
            truth, label = self._source.label(position), int(said.argmax())
            self._counts[truth, label] += 1
            # What is not a number is no better than anything.
            self._near += np.count_nonzero(~(said <= said[truth])) < TOP
            if np.isfinite(said[label]):
                self._sure[int(truth == label), int(_BINS * np.clip(said[label], 0, 1))] += 1
            self._kept[position] = {"label": label, "probability": float(said[label])}

    def state(self) -> dict[str, np.ndarray]:
        """The counts (K, K) by true class and by what was said, and of the images that "top5" counts as right.

        "sure" has (2, bins), wrong and right, by how sure the model was.
        """
        return {"counts": self._counts, "near": self._near, "sure": self._sure}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> Metrics:
        """The metrics of the counts of all processes together."""
        counts = np.sum([state["counts"] for state in states], axis=0)
        return metrics(counts, int(sum(state["near"].item() for state in states)), self._source.class_names)

    def charts(self, states: Sequence[Mapping[str, np.ndarray]]) -> list[Chart]:
        """How often the surest answers are right, and what is taken for what."""
        counts, sure = (np.sum([state[key] for state in states], axis=0) for key in ("counts", "sure"))
        right, said = (x[::-1].cumsum() for x in (sure[1], sure.sum(axis=0)))
        there = said > 0
        points = np.stack([100 * said / max(said[-1], 1), 100 * right / np.maximum(said, 1)], axis=1)[there]
        curve = Curves(
            "Right among the surest answers", "images that are answered, %", "right, %", {"": Line(points.tolist())}
        )
        return [curve, confusion_chart(counts, self._source.class_names)]

    def kept(self, count: int) -> dict[int, dict[str, Any]]:
        """By position what was said of an image, and its probability."""
        return {position: said for position, said in self._kept.items() if position < count}


def confusion_chart(counts: np.ndarray, names: Sequence[str], other: str = "") -> Matrix:
    """What is taken for what; of many classes those that are confused most.

    >>> confusion_chart(np.array([[3, 1], [0, 4]]), ("cat", "dog")).shares
    [[75.0, 25.0], [0.0, 100.0]]

    Args:
        counts: (K, K) by the true class and by the class that was said.
        names: of the K classes.
        other: what the last row and column are, if they are no class and always shown.
    """
    classes = len(counts) - bool(other)
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    most = np.sort(np.argsort(-wrong[:classes], kind="stable")[:MOST_SHOWN])
    places = np.append(most, classes) if other else most
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = [[*names, other][place] for place in places.tolist()]
    some = f" The {len(most)} of {classes} classes that are confused most." * (len(most) < classes)
    return Matrix(
        "What is taken for what",
        shown,
        shown,
        shares[np.ix_(places, places)].tolist(),
        f"Rows are the truth, columns what was said, in percent of the row.{some}",
    )


def metrics(counts: np.ndarray, near: int, class_names: Sequence[str]) -> Metrics:
    """What a matrix of counts is worth, see :class:`Confusion`.

    >>> metrics(np.array([[3, 1], [0, 4]]), 8, ("cat", "dog"))["recall"]
    {'cat': 75.0, 'dog': 100.0}

    Args:
        counts: (K, K) int, by true class and by the class that was said.
        near: images whose class is among the five most probable ones.
        class_names: of the K classes.
    """
    right, images = counts.diagonal(), counts.sum()

    def by_class(of: np.ndarray) -> dict[str, float]:
        share = np.divide(100 * right, of, out=np.full(len(of), np.nan), where=of > 0)
        return dict(zip(class_names, share.tolist(), strict=True))

    found: dict[str, Any] = {"top1": float(100 * right.sum() / images)}
    if len(class_names) >= TOP:
        found["top5"] = float(100 * near / images)
    found |= {"recall": by_class(counts.sum(axis=1)), "precision": by_class(counts.sum(axis=0))}
    if len(class_names) <= MOST_SHOWN:
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        found["confusion"] = {
            truth: {said: share for said, share in zip(class_names, row, strict=True) if share}
            for truth, row in zip(class_names, shares.tolist(), strict=True)
        }
    return found
