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
