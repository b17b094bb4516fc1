"""What a detector finds in photographs, as a person wants it: boxes by name, COCO's results, and drawings."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kdjax.data.masks import RunLengths
from kdjax.data.sizing import Size
from kdjax.files import json_list, write_json
from kdjax.paths import Path
from kdjax.tasks.average_precision import coco_boxes, in_original
from kdjax.types import Detections, ImageSource
from kdjax.visualize import Drawing, Mark, class_colour

RESULTS_FILE, IMAGES_FILE = "detections.json", "images.json"
"""Of what was found, in COCO's results format; and of the photographs and the classes, in that of its annotations."""
SCORE = 0.3
"""From which on something counts as found where nobody says otherwise: as in the pictures of a run."""


class FoundObjects(NamedTuple):
    """The n objects that a detector found in a photograph, best first."""

    boxes: np.ndarray
    """(n, 4) float32, xyxy in pixels of the photograph, clipped to it."""
    scores: np.ndarray
    """(n,) float32 in [0, 1], descending."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    names: tuple[str, ...]
    """Of the n objects' classes."""
    masks: tuple[RunLengths, ...] | None = None
    """Of detectors that find masks: COCO's run lengths of each object's pixels, which
    ``pycocotools.mask.decode`` makes an array (H, W) of."""


@dataclasses.dataclass(frozen=True)
class ObjectResults:
    """The results of detectors, see :class:`kdjax.types.Results`."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    threshold: float = SCORE

    def of(self, outputs: Detections, row: int, size: Size, original: Size) -> FoundObjects:
        """The objects in one image of a batch whose score is at least the threshold."""
        boxes, scores, labels, masks = in_original(outputs, row, size, original, self.threshold)
        return FoundObjects(boxes, scores, labels, tuple(self.class_names[label] for label in labels.tolist()), masks)

    def drawn(self, image: np.ndarray, result: FoundObjects) -> Drawing:
        """The photograph with a box, the class and the score of each object, under masks if there are any."""
        masks = result.masks or (None,) * len(result.boxes)
        found = zip(result.boxes, result.names, result.scores, result.labels.tolist(), masks, strict=True)
        marks = [
            Mark(box, f"{name} {score:.2f}", class_colour(label), mask=mask) for box, name, score, label, mask in found
        ]
        return Drawing(image, marks)

    def save(self, folder: Path, images: ImageSource, results: Iterable[tuple[int, FoundObjects]]) -> None:
        """Writes ``detections.json``, and beside it ``images.json``, which says what its ids mean."""
        with json_list(folder / RESULTS_FILE) as add:
            for position, result in results:
                for entry in self._entries(images.image_id(position), result):
                    add(entry)
        sizes = [images.size(k) for k in range(len(images))]
        described = [
            {"id": images.image_id(k), "file_name": images.name(k), "height": height, "width": width}
            for k, (height, width) in enumerate(sizes)
        ]
        classes = zip(self.category_ids, self.class_names, strict=True)
        categories = [{"id": number, "name": name} for number, name in classes]
        write_json(folder / IMAGES_FILE, {"images": described, "categories": categories, "annotations": []})

    def _entries(self, image_id: int, result: FoundObjects) -> Iterator[Mapping[str, Any]]:
        boxes, scores, labels = coco_boxes(result.boxes), result.scores.tolist(), result.labels.tolist()
        for k, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
            entry = {"image_id": image_id, "category_id": self.category_ids[label], "bbox": box, "score": score}
            yield entry | ({"segmentation": result.masks[k]} if result.masks else {})
