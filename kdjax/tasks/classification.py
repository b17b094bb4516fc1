"""Classification: one class for each image, judged by how often the most probable one is right."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kdjax.data.examples import ClassifiedImage, ClassSource
from kdjax.data.sizing import Size, Sizing
from kdjax.data.transforms import Geometry
from kdjax.errors import UserError
from kdjax.paths import as_path
from kdjax.report import known
from kdjax.tasks.class_pictures import save_classified, save_matrices
from kdjax.tasks.confusion import Confusion
from kdjax.tasks.found_classes import ClassResults
from kdjax.types import Batch, Column, Judged, Labels, Suggestion
from kdjax.visualize import Drawing, image_of

MATRICES_FILE = "confusion.png"
"""Beside the picture of predictions: what each model takes for what."""

_SIDES = range(64, 225, 32)
"""Of the images that are suggested, in pixels; a classifier of ImageNet has 224."""
_ENLARGED = 2.0
"""Scale from which on most images are told to be much smaller than what a model sees."""
_RARE, _FREQUENT = 10, 1.5
"""Images of a class of which a person is told that there are few; and how many times as many as of the others are told
to be many."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """The task of classifiers, see :class:`kdjax.types.Task`."""

    mixed: bool = False
    """Whether images of training are mixed with others, whose classes they have a share of."""

    name: ClassVar[str] = "classification"
    primary: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, str]] = {"top-1": "top1", "top-5": "top5"}
    spoken: ClassVar[tuple[str, ...]] = ("top1", "top5")
    floors: ClassVar[Mapping[str, float]] = {"shapes/crops": 30.0}

    @classmethod
    def of(cls, data: Any) -> "Classification":
        """The task on data as the config has them."""
        return cls(mixed=data.mixup > 0)

    def complete_model(self, model: dict[str, Any]) -> None:
        """A classifier depends on nothing that the data's keys say."""

    def check_model(self, model: Any, where: str) -> None:
        """A classifier of images can be trained on all data that have classes of images."""

    def check_source(self, source: Any) -> None:
        """Raises UserError where a source has no classes of images."""
        if not hasattr(source, "label"):
            raise UserError(
                f"config.task is classification, but {source.origin} does not say of which class an image is: take "
                "class_folders:<folder>, tfds:<name> of a set with classes, or shapes/crops, which is generated."
            )

    def targets(self, images: int, shape: Size) -> Labels:
        """Room for the classes of as many images."""
        del shape
        arrays: list[Any] = [np.zeros(images, np.int32)]
        if self.mixed:
            arrays += [np.zeros(images, np.int32), np.zeros(images, np.float32)]
        return Labels(*arrays)

    def fill(self, targets: Labels, row: int, example: ClassifiedImage, geometry: Geometry) -> None:
        """Fills a row with the class of an image, which is the same wherever a geometry moves it."""
        del geometry
        columns: tuple[Any, ...] = targets
        for column, value in zip(columns, (example.label, example.other, example.share), strict=True):
            if column is not None:
                column[row] = value

    def judge(self, source: ClassSource) -> Confusion:
        """The confusion matrix of a source."""
        self.check_source(source)
        return Confusion(source)

    def results(self, class_names: Sequence[str], category_ids: Sequence[int], threshold: float | None) -> ClassResults:
        """The five most probable classes."""
        del category_ids
        return ClassResults(tuple(class_names), threshold or 0.0)

    def draw(self, path: str | os.PathLike[str], source: ClassSource, columns: Mapping[str, Column]) -> None:
        """Draws the first images with what each model said; and of few classes, beside it, what it takes for what."""

        def caption(name: str, column: Column) -> str:
            return f"{name} ({known(column.metrics.get(self.primary, math.nan), '.1f')})"

        save_classified(path, source, {name: column.kept for name, column in columns.items()})
        found = {
            caption(name, column): column.metrics["confusion"]
            for name, column in columns.items()
            if "confusion" in column.metrics
        }
        if found:
            save_matrices(as_path(path).parent / MATRICES_FILE, source.class_names, found)

    def judged(self, example: ClassifiedImage, said: Any, class_names: Sequence[str]) -> Judged:
        """The class that was said; the score is above 50 where it is right, and the surer the farther from it."""
        truth = class_names[example.label]
        if said is None:
            return Judged(100.0, truth, Drawing(example.image))
        right, sure = said["label"] == example.label, 50 * said["probability"]
        words = f"{class_names[said['label']]} {said['probability']:.2f}" + (", right" if right else ", wrong")
        return Judged(50 + sure if right else 50 - sure, words, Drawing(example.image))

    def remarks(self, source: ClassSource, sizing: Sizing) -> list[str]:
        """What a model that knows nothing reaches where one class is frequent, and which classes are rare."""
        counts, lines = _counts(source), []
        most = int(counts.argmax())
        if counts[most] > _FREQUENT * counts.mean():
            lines.append(
                f"{source.class_names[most]!r} is {100 * counts[most] / counts.sum():.0f} % of the training images: a "
                "model that always says so reaches that top1 on images like them."
            )
        rare = [name for name, count in zip(source.class_names, counts.tolist(), strict=True) if 0 < count < _RARE]
        if rare:
            lines.append(f"{_some(rare)}: fewer than {_RARE} training images each, of which little can be learnt.")
        sizes = _sizes(source)
        enlarged = np.mean(sizing.evaluation_scale(sizes) > _ENLARGED)
        if enlarged > 0.5:
            lines.append(
                f"{100 * enlarged:.0f} % of the images are enlarged more than twice: a smaller config.data.image_size "
                "shows a model as much in less time."
            )
        return lines

    def suggest(self, source: ClassSource) -> Suggestion:
        """Square images about as large as the middle one of the source, with changed colours, and scales."""
        middle = float(np.median(np.sqrt(_sizes(source).prod(axis=1))))
        side = min(_SIDES, key=lambda side: abs(side - middle))
        return Suggestion({"image_size": (side, side), "jitter": (0.7, 1.4), "color": 0.3}, ())

    def statistics(self, source: ClassSource) -> None:
        """There is nothing that methods ask about classes of images."""
        del source

    def describe(self, source: ClassSource) -> list[str]:
        """Counts and sizes of the images of a source."""
        self.check_source(source)
        counts, sizes = _counts(source), _sizes(source)
        wide = max(len(name) for name in source.class_names)
        height, width = (f"{column.min()} to {column.max()}, median {np.median(column):g}" for column in sizes.T)
        return [
            f"images: {len(source)} of {len(counts)} classes",
            f"pixels: height {height}; width {width}",
            *(
                f"{name:{wide}}  {count} images, {100 * count / counts.sum():.1f} %"
                for name, count in zip(source.class_names, counts.tolist(), strict=True)
            ),
        ]

    def drawn(self, batch: Batch, row: int, class_names: Sequence[str]) -> Drawing:
        """An image of a batch with the name of its class."""
        return Drawing(image_of(batch, row), text=class_names[int(batch.targets.classes[row])])


def _counts(source: ClassSource) -> np.ndarray:
    """Images of each class, (classes,)."""
    return np.bincount([source.label(k) for k in range(len(source))], minlength=len(source.class_names))


def _sizes(source: ClassSource) -> np.ndarray:
    """Height and width of every image, (n, 2)."""
    return np.array([source.size(k) for k in range(len(source))])


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
