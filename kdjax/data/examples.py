"""The vocabulary of data: an annotated image, its objects without its pixels, and a sequence of such."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from kdjax.types import Source

Segmentation = list[list[float]] | dict[str, Any]
"""The outline of one object as COCO files have it, in pixels of the image: polygons, each ``[x1, y1, x2, y2, ...]``, or
a run-length encoding ``{"size": [height, width], "counts": [...] or "..."}``."""


class Example(NamedTuple):
    """One annotated image with n objects."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    image_id: int
    """What evaluators know the image by; unique in its split."""
    boxes: np.ndarray
    """(n, 4) float32, xyxy in pixels of ``image``."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    crowd: np.ndarray
    """(n,) bool: the box holds a group of objects; evaluation ignores what is found there."""
    area: np.ndarray
    """(n,) float32: pixels of the object itself (COCO's size classes are made of it), not of its box."""
    segmentation: Sequence[Segmentation] | None = None
    """One for each object; None where the data set has none."""


class ClassifiedImage(NamedTuple):
    """One image of one class: an example of classification."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    image_id: int
    """Unique in its split."""
    label: int
    """In [0, classes)."""
    other: int = 0
    """The class of an image that is mixed into this one; of no meaning where none is."""
    share: float = 0.0
    """How much of the pixels is that image, in [0, 1]."""


class MappedImage(NamedTuple):
    """One image with the class of every pixel: an example of semantic segmentation."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    image_id: int
    """Unique in its split."""
    classes: np.ndarray
    """(H, W) uint8 in [0, classes), or :data:`kdjax.types.IGNORED`."""


class Objects(NamedTuple):
    """The n objects of one image, which is not decoded for them: an :class:`Example` without its pixels."""

    image_id: int
    """As :class:`Example` has it."""
    size: tuple[int, int]
    """Height and width of the image in its file, in pixels."""
    boxes: np.ndarray
    """(n, 4) float32, xyxy in pixels of the image in its file."""
    labels: np.ndarray
    """(n,) int32 in [0, classes)."""
    crowd: np.ndarray
    """(n,) bool."""
    area: np.ndarray
    """(n,) float32, pixels."""
    segmentation: Sequence[Segmentation] | None = None
    """One for each object; None where the data set has none."""

    def in_image(self, image: np.ndarray) -> Example:
        """The example that has these objects in the given pixels."""
        fields = self._asdict()
        del fields["size"]
        return Example(image, **fields)


class ObjectSource(Source, Protocol):
    """A source of examples with objects."""

    def __getitem__(self, index: int) -> Example: ...

    def objects(self, index: int) -> Objects:
        """The objects of an example, without decoding its image."""


class ClassSource(Source, Protocol):
    """A source of images of one class each."""

    def __getitem__(self, index: int) -> ClassifiedImage: ...

    def label(self, index: int) -> int:
        """The class of an image, in [0, classes), without decoding it."""


class MapSource(Source, Protocol):
    """A source of images with the class of every pixel."""

    def __getitem__(self, index: int) -> MappedImage: ...

    def classes(self, index: int) -> np.ndarray:
        """The classes of an image's pixels, (H, W) uint8 as :class:`MappedImage` has them, without decoding it."""

    @property
    def pixels(self) -> np.ndarray:
        """(images, classes) int64: how many pixels of each image are of each class."""
