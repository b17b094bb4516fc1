"""The arrays that every floor of kdjax exchanges.

Boxes are everywhere ``(x1, y1, x2, y2)`` in pixels of the padded image, except inside ``kdjax.data`` readers and
``kdjax.evaluate``, which convert from and to what files and evaluators use. Images are NHWC, uint8, RGB until a
detector normalises them.
"""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax

Features = dict[str, jax.Array]
"""A feature pyramid: level name to array, ``{"p3": (N, H, W, C), ...}``; the stride of level ``p<i>`` is ``2**i``."""

Terms = dict[str, jax.Array]
"""Named, unweighted loss terms: name to float32 scalar."""

Task = Callable[[Features], Terms]
"""The student's heads and loss as a judge of other features: it gives them a gradient, but none to the heads."""


class Masks(NamedTuple):
    """The masks of M objects in each of N images, every one on an S x S grid of its own."""

    grid: jax.Array
    """(N, M, S, S) bool: which cells the object covers; False everywhere where not valid."""
    frame: jax.Array
    """(N, M, 4) float32: the region that the grid cuts into S x S equal cells, xyxy in pixels of the padded image.

    It begins at the object's first pixel. A cell is one pixel where the object fits into S pixels along that axis, and
    larger where it does not; nothing of the object is outside."""


class Targets(NamedTuple):
    """Ground truth of a batch of N images with room for M objects each."""

    boxes: jax.Array
    """(N, M, 4) float32, xyxy in pixels of the padded image; zeros where not valid."""
    labels: jax.Array
    """(N, M) int32 in [0, classes); zero where not valid."""
    valid: jax.Array
    """(N, M) bool: True for real objects, False for empty slots."""
    image_size: jax.Array
    """(N, 2) int32: height and width of the image inside the padded array, in pixels."""
    crowd: jax.Array | None = None
    """(N, M) bool: slots of ``boxes`` with a region to ignore, which holds a group of objects; they are not valid."""
    masks: Masks | None = None
    """Where detectors learn masks: those of the boxes."""


class Sampling(NamedTuple):
    """What a two-stage detector samples the proposals of a training step by."""

    targets: Targets
    keys: jax.Array
    """(N,) PRNG keys, one for each image."""


class Detections(NamedTuple):
    """The D highest-scoring detections of each of N images."""

    boxes: jax.Array
    """(N, D, 4) float32, xyxy in pixels of the padded image, clipped to the image."""
    scores: jax.Array
    """(N, D) float32 in [0, 1], descending; zero where not valid."""
    labels: jax.Array
    """(N, D) int32 in [0, classes)."""
    valid: jax.Array
    """(N, D) bool: False for empty slots."""
    masks: jax.Array | None = None
    """(N, D, S, S) float32 in [0, 1], of detectors that find masks: the box cut into S x S equal cells."""


class Batch(TypedDict):
    """What a training step consumes: the images of one global batch, or one device's part of it."""

    images: jax.Array
    """(N, H, W, 3) uint8, RGB, padded at the bottom and right with zeros."""
    targets: Targets
    index: jax.Array
    """(N,) int32: position of each image in the global batch; random numbers are folded from it."""


def stride(level: str) -> int:
    """Stride in pixels of a pyramid level by its name: ``stride("p3") == 8``."""
    return 2 ** int(level[1:])
