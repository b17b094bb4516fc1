"""Semantic segmentation: the class of every pixel, judged by the mean intersection over union."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kdjax.data.examples import MappedImage, MapSource
from kdjax.data.map_statistics import described, suggested
from kdjax.data.sizing import Size, Sizing
from kdjax.data.transforms import Geometry, move_classes
from kdjax.errors import UsageError, UserError
from kdjax.report import known
from kdjax.tasks.cut import refuse_cut
from kdjax.tasks.found_maps import MapResults
from kdjax.tasks.iou import IntersectionOverUnion, decoded
from kdjax.tasks.map_pictures import legend, overlay, save_maps
from kdjax.types import IGNORED, Batch, Column, Judged, Labels, Suggestion
from kdjax.visualize import Drawing, image_of


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The task of segmenters, see :class:`kdjax.types.Task`."""

    name: ClassVar[str] = "segmentation"
    primary: ClassVar[str] = "mIoU"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, str]] = {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc"}
    spoken: ClassVar[tuple[str, ...]] = ("mIoU", "aAcc")
    floors: ClassVar[Mapping[str, float]] = {"shapes/maps": 30.0}
    """The teacher of the config reaches 51."""

    @classmethod
    def of(cls, data: Any) -> "Segmentation":
        """The task on data as the config has them.

        Raises:
            UserError: evaluation would see a part of each image only.
        """
        refuse_cut(data)
        return cls()

    def complete_model(self, model: dict[str, Any]) -> None:
        """Adds nothing: the data say nothing of a segmenter but its classes."""

    def check_model(self, model: Any, where: str) -> None:
        """Takes every segmenter."""

    def check_source(self, source: Any) -> None:
        """Raises UserError where a source has no index maps."""
        if not hasattr(source, "classes"):
            raise UserError(
                f"{source.origin} has no index maps, of which a segmenter learns: take index_maps:<folder>, "
                "voc_maps:<folder>, cityscapes:<folder>, a set of tensorflow-datasets with maps, or shapes/maps."
            )

    def targets(self, images: int, shape: Size) -> Labels:
        """Maps of nothing but ignored pixels."""
        return Labels(np.full((images, *shape), IGNORED, np.uint8))  # type: ignore[arg-type]

    def fill(self, targets: Any, row: int, example: MappedImage, geometry: Geometry) -> None:
        """Fills a row with the map of an example where a geometry puts it."""
        height, width = geometry.size
        targets.classes[row, :height, :width] = move_classes(example.classes, geometry)

    def judge(self, source: MapSource) -> IntersectionOverUnion:
        """The mean intersection over union on a source."""
        self.check_source(source)
        return IntersectionOverUnion(source)

    def results(self, class_names: Sequence[str], category_ids: Sequence[int], threshold: float | None) -> MapResults:
        """The class of every pixel.

        Raises:
            UsageError: there is a threshold, which no class of a pixel has.
        """
        del category_ids
        if threshold is not None:
            raise UsageError(
                f"threshold is {threshold:g}, which is for detectors and classifiers: a segmenter says one class for "
                "each pixel; leave it out."
            )
        return MapResults(tuple(class_names))

    def draw(self, path: str | os.PathLike[str], source: MapSource, columns: Mapping[str, Column]) -> None:
        """Draws the true maps over the images, and beside them what each model said."""
        maps = {
            f"{name}  {self.primary} {known(column.metrics.get(self.primary, math.nan), '.1f')}": [
                decoded(entry) for entry in column.kept
            ]
            for name, column in columns.items()
        }
        save_maps(path, source, maps)

    def judged(self, example: MappedImage, said: Any, class_names: Sequence[str]) -> Judged:
        """The map over the image; the score is the share of the labelled pixels whose class is right."""
        if said is None:
            marks = legend(class_names)
            return Judged(100.0, "truth", Drawing(overlay(example.image, example.classes), legend=marks))
        classes, labelled = decoded(said), example.classes != IGNORED
        right = 100 * float((classes == example.classes)[labelled].mean()) if labelled.any() else 100.0
        return Judged(right, f"{right:.1f} % of the pixels right", Drawing(overlay(example.image, classes)))

    def remarks(self, source: MapSource, sizing: Sizing) -> list[str]:
        """Nothing: maps are scaled as their images."""
        del source, sizing
        return []

    def suggest(self, source: MapSource) -> Suggestion | None:
        """Images of about their own size: see :func:`suggested`."""
        return Suggestion(suggested(source), ())

    def statistics(self, source: Any) -> None:
        """None: no method asks for what the maps look like."""

    def describe(self, source: MapSource) -> list[str]:
        """The share of the pixels that each class has, and in how many images it is."""
        return described(source)

    def drawn(self, batch: Batch, row: int, class_names: Sequence[str]) -> Drawing:
        """An image of a batch under the colours of its classes."""
        del class_names
        image = image_of(batch, row)
        height, width = image.shape[:2]
        return Drawing(overlay(image, np.asarray(batch.targets.classes[row])[:height, :width]))
