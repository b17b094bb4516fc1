"""What a segmenter says of photographs, as a person wants it: maps of their own size, PNGs of numbers, and drawings."""

import dataclasses
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kdjax.data.photographs import stems
from kdjax.data.sizing import Size
from kdjax.files import replace_bytes, write_json
from kdjax.paths import Path
from kdjax.tasks.iou import in_original
from kdjax.tasks.map_pictures import overlay
from kdjax.types import ImageSource
from kdjax.visualize import Drawing, Mark, class_colour

MAPS_FOLDER, CLASSES_FILE = "maps", "classes.json"


class FoundMap(NamedTuple):
    """The class of every pixel of a photograph."""

    classes: np.ndarray
    """(H, W) uint8 in [0, classes)."""
    names: dict[int, str]
    """Of the classes that are in it."""


@dataclasses.dataclass(frozen=True)
class MapResults:
    """The results of segmenters, see :class:`kdjax.types.Results`."""

    class_names: tuple[str, ...]

    def of(self, outputs: Any, row: int, size: Size, original: Size) -> FoundMap:
        """The map of one image of a batch, brought to its own size by the nearest pixel."""
        classes = in_original(outputs, row, size, original)
        return FoundMap(classes, {label: self.class_names[label] for label in np.unique(classes).tolist()})

    def drawn(self, image: np.ndarray, result: FoundMap) -> Drawing:
        """The photograph in grey under the colours of its classes, and below it what they mean."""
        legend = [Mark(np.zeros(4), name, class_colour(label)) for label, name in result.names.items()]
        return Drawing(overlay(image, result.classes), legend=legend)

    def save(self, folder: Path, images: ImageSource, results: Iterable[tuple[int, FoundMap]]) -> None:
        """Writes a PNG for each photograph, whose pixels are the numbers of the classes that ``classes.json`` names."""
        write_json(folder / CLASSES_FILE, dict(enumerate(self.class_names)))
        palette = [part for label in range(len(self.class_names)) for part in class_colour(label)]
        names = stems([images.name(k) for k in range(len(images))])
        for position, result in results:
            path = folder / MAPS_FOLDER / f"{names[position]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture, file = Image.fromarray(result.classes), io.BytesIO()
            picture.putpalette(palette)
            picture.save(file, "PNG")
            replace_bytes(path, file.getvalue())
