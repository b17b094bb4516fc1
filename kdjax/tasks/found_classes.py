"""What a classifier says of photographs, as a person wants it: the most probable classes by name, and drawings."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from kdjax.data.sizing import Size
from kdjax.files import json_list
from kdjax.paths import Path
from kdjax.tasks.confusion import TOP
from kdjax.types import ImageSource
from kdjax.visualize import Drawing, Mark, class_colour

RESULTS_FILE = "classes.json"


class FoundClasses(NamedTuple):
    """The n most probable classes of a photograph, the most probable first: at most five."""

    scores: np.ndarray
    """(n,) float32 in [0, 1], descending: the probabilities."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    names: tuple[str, ...]
    """Of the n classes."""


@dataclasses.dataclass(frozen=True)
class ClassResults:
    """The results of classifiers, see :class:`kdjax.types.Results`."""

    class_names: tuple[str, ...]
    threshold: float = 0.0

    def of(self, outputs: Any, row: int, size: Size, original: Size) -> FoundClasses:
        """The classes of one image of a batch of probabilities (N, K), those below the threshold left out."""
        del size, original
        said = np.asarray(outputs[row])
        best = np.argsort(-said, kind="stable")[:TOP]
        best = best[said[best] >= self.threshold]
        return FoundClasses(
            said[best], best.astype(np.int32), tuple(self.class_names[label] for label in best.tolist())
        )

    def drawn(self, image: np.ndarray, result: FoundClasses) -> Drawing:
        """The photograph, and below it the classes with their probabilities."""
        found = zip(result.names, result.scores, result.labels.tolist(), strict=True)
        legend = [Mark(np.zeros(4), f"{name} {score:.2f}", class_colour(label)) for name, score, label in found]
        return Drawing(image, legend=legend)

    def save(self, folder: Path, images: ImageSource, results: Iterable[tuple[int, FoundClasses]]) -> None:
        """Writes ``classes.json``: of each photograph the names, the labels and the probabilities."""
        with json_list(folder / RESULTS_FILE) as add:
            for position, result in results:
                found = zip(result.names, result.labels.tolist(), result.scores.tolist(), strict=True)
                classes = [{"name": name, "label": label, "score": score} for name, label, score in found]
                add({"file_name": images.name(position), "classes": classes})
