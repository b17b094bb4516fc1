"""Annotated images by one name: a random-access sequence of examples and the names of their classes."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from kdjax.data import check
from kdjax.data.check import Checks
from kdjax.errors import UserError
from kdjax.paths import local_path

if TYPE_CHECKING:
    from kdjax.data.indexed import IndexedSource

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


class Source(Protocol):
    """A sequence of examples with random access, safe to read from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def objects(self, index: int) -> Objects:
        """The objects of an example, without decoding its image."""


def open_source(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    checks: Checks = check.DEFAULT,
    download: bool = False,
) -> "IndexedSource":
    """Opens one split of a data set: every annotation is read and checked, and the header of every image.

    Args:
        name: ``shapes`` or ``shapes/tiny`` (generated on first use); ``tfds:<name>`` for a set that TFDS has prepared
            with the features of its COCO or VOC, such as ``tfds:coco/2017`` or ``tfds:voc/2007+2012``; or
            ``coco_json:<folder>`` for images with annotations in COCO's format (:func:`kdjax.data.coco.open_coco`).
        split: ``train`` or ``validation`` (or what the set calls its splits), or a slice such as ``train[:100]``.
        data_dir: TFDS's data directory, None for its default (``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``); or
            where a relative ``<folder>`` is, None for the working directory.
        checks: how flaws of the data are met.
        download: let TFDS download and prepare a set that is missing; nothing is downloaded otherwise.

    Raises:
        UserError: one sentence about what is unknown, missing, or wrong with the data, with file and id.
    """
    # They need the types above; and TFDS is slow to import.
    if name in ("shapes", "shapes/tiny"):
        from kdjax.data.prepared import open_shapes

        return open_shapes(name.partition("/")[2] or "full", split, data_dir, checks)
    kind, _, rest = name.partition(":")
    if kind == "tfds" and rest:
        from kdjax.data.prepared import open_prepared

        return open_prepared(rest, split, data_dir, checks, download)
    if kind == "coco_json" and rest:
        from kdjax.data.coco import open_coco

        return open_coco(local_path(data_dir or ".") / local_path(rest), split, checks)
    raise UserError(
        f"unknown data source {name!r}: choose shapes, shapes/tiny, tfds:<name> or coco_json:<folder of your data>"
    )
