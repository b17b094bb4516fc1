"""Which anchors or proposals learn which objects.

By IoU (Ren et al., Faster R-CNN; Lin et al., RetinaNet), or by a threshold that each object has of its own (Zhang et
al., ATSS).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.boxes import pairwise_coverage, pairwise_iou


class Assignment(NamedTuple):
    """What each of the A anchors of an image learns; anchors neither positive nor negative are ignored."""

    matched: jax.Array
    """(A,) int32: index of the object that the anchor overlaps or serves; meaningful where positive."""
    positive: jax.Array
    """(A,) bool."""
    negative: jax.Array
    """(A,) bool."""


def assign_by_iou(
    anchors: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    inside: jax.Array,
    *,
    crowd: jax.Array | None = None,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    best_iou: float | None = 0.0,
    claim: bool = True,
) -> Assignment:
    """Assigns the anchors of one image to its objects.

    An anchor is positive where its best IoU with an object is at least ``positive_iou`` and negative where it is below
    ``negative_iou``. Besides, every object makes its best anchors positive, all of them where they tie, if their IoU
    is at least ``best_iou`` and above zero. An anchor that would be negative and lies by more than half in a crowd is
    ignored.

    Args:
        anchors: (A, 4) xyxy.
        boxes: (M, 4) xyxy.
        valid: (M,) bool: which of the boxes are objects; the others have no influence.
        inside: (A,) bool: which of the anchors take part; the others are ignored and serve as no object's best.
        crowd: (M,) bool or None: which of the boxes are regions to ignore; they are not valid.
        positive_iou: in [0, 1].
        negative_iou: in [0, positive_iou].
        best_iou: in [0, 1]: from which IoU on an object's best anchors serve it; None: they have no such privilege.
        claim: whether an object's best anchor learns that object, the last of them if there are several (MMDetection's
            gt_max_assign_all), or stays with the object that it overlaps most itself (torchvision, Detectron2).

    Returns:
        The assignment; without valid boxes, all anchors inside are negative.
    """
    iou = jnp.where(valid[None] & inside[:, None], pairwise_iou(anchors, boxes), -1.0)
    # Below, overlaps are compared for equality: the barrier keeps the compiler from computing them once for the
    # comparison and once for the maximum, which may differ in the last bit.
    iou = jax.lax.optimization_barrier(iou)
    best = jnp.max(iou, axis=1)
    matched = jnp.argmax(iou, axis=1).astype(jnp.int32)
    positive = best >= positive_iou
    if best_iou is not None:
        best_of_box = jnp.max(iou, axis=0)
        served = (iou == best_of_box[None]) & (best_of_box[None] > 0) & (best_of_box[None] >= best_iou)
        positive |= jnp.any(served, axis=1)
        if claim:
            last = jnp.max(jnp.where(served, jnp.arange(boxes.shape[0], dtype=jnp.int32)[None], -1), axis=1)
            matched = jnp.where(last >= 0, last, matched)
    negative = inside & ~positive & (best < negative_iou)
    return Assignment(matched=matched, positive=positive, negative=negative & ~_in_crowd(anchors, boxes, crowd))


def assign_by_atss(
    anchors: Sequence[jax.Array],
    boxes: jax.Array,
    valid: jax.Array,
    inside: Sequence[jax.Array],
    *,
    crowd: jax.Array | None = None,
    nearest: int = 9,
) -> Assignment:
    """Assigns the anchors of one image to its objects, adaptively (Zhang et al., ATSS, 2020, algorithm 1).

    Candidates of an object are, on every level, the anchors whose centres are nearest to its own. Positive are those
    of them whose IoU with it is at least the mean and the standard deviation (the unbiased one) of all candidates'
    IoUs together, and whose centre is inside of it by more than 0.01 pixels; an anchor that is positive for several
    objects learns the one that it overlaps most. All others are negative, but for those that lie by more than half in
    a crowd, which are ignored.

    Args:
        anchors: of each level (A, 4) xyxy.
        boxes: (M, 4) xyxy.
        valid: (M,) bool: which of the boxes are objects; the others have no influence.
        inside: of each level (A,) bool: which of the anchors take part; the others are ignored, and no candidates.
        crowd: (M,) bool or None: which of the boxes are regions to ignore; they are not valid.
        nearest: candidates of an object on each level, all of them where there are fewer; at equal distances the first.

    Returns:
        The assignment of all levels' anchors, one level after the other; of equal overlaps the first object is learnt.
    """
    every, taking_part = jnp.concatenate(anchors), jnp.concatenate(inside)
    own = _own_thresholds(anchors, boxes, inside, nearest)
    x, y = _centres(every)
    sides = (x - boxes[None, :, 0], y - boxes[None, :, 1], boxes[None, :, 2] - x, boxes[None, :, 3] - y)
    within = jnp.minimum(jnp.minimum(sides[0], sides[1]), jnp.minimum(sides[2], sides[3])) > 0.01
    learns = own.candidate & (own.iou >= own.least[None]) & within & valid[None]
    positive = jnp.any(learns, axis=1)
    matched = jnp.argmax(jnp.where(learns, own.iou, -1.0), axis=1).astype(jnp.int32)
    negative = taking_part & ~positive & ~_in_crowd(every, boxes, crowd)
    return Assignment(matched=matched, positive=positive, negative=negative)


def valuable_region(
    anchors: Sequence[jax.Array],
    boxes: jax.Array,
    valid: jax.Array,
    inside: Sequence[jax.Array],
    *,
    nearest: int = 9,
    share: float = 0.25,
) -> jax.Array:
    """How valuable the anchors of one image are for localization, though they may learn no object.

    Zheng et al., "Localization Distillation for Dense Object Detection", 2022, algorithm 1: an anchor is in the region
    of an object if its DIoU with it is below the threshold that :func:`assign_by_atss` has for that object, and at
    least a share of it. The weight is the IoU with the object, the largest of several [code].

    Args:
        anchors: of each level (A, 4) xyxy.
        boxes: (M, 4) xyxy.
        valid: (M,) bool: which of the boxes are objects.
        inside: of each level (A,) bool: which of the anchors take part.
        nearest: as in :func:`assign_by_atss`.
        share: 0.25 in the authors' code.

    Returns:
        Weights of all levels' anchors, one level after the other, in [0, 1]: 0 outside of the region.
    """
    own = _own_thresholds(anchors, boxes, inside, nearest)
    every, taking_part = jnp.concatenate(anchors), jnp.concatenate(inside)
    diou = own.iou - _apart(every, boxes)
    near = (diou < own.least[None]) & (diou >= share * own.least[None]) & valid[None] & taking_part[:, None]
    return jnp.max(jnp.where(near, own.iou, 0), axis=1)


class _Own(NamedTuple):
    """Of M objects, what decides which of A anchors suit each of them."""

    iou: jax.Array
    """(A, M)."""
    candidate: jax.Array
    """(A, M) bool: the nearest anchors of each level."""
    least: jax.Array
    """(M,): the mean of the candidates' IoUs and their standard deviation, added."""


def _own_thresholds(anchors: Sequence[jax.Array], boxes: jax.Array, inside: Sequence[jax.Array], nearest: int) -> _Own:
    levels = zip(anchors, inside, strict=True)
    candidate = jnp.concatenate([_nearest(x, boxes, here, nearest) for x, here in levels])
    iou = pairwise_iou(jnp.concatenate(anchors), boxes)
    count = jnp.sum(candidate, axis=0)
    mean = jnp.sum(jnp.where(candidate, iou, 0), axis=0) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(candidate, jnp.square(iou - mean[None]), 0), axis=0)
    return _Own(iou, candidate, mean + jnp.sqrt(squares / jnp.maximum(count - 1, 1)))


def _apart(anchors: jax.Array, boxes: jax.Array) -> jax.Array:
    """How far the centres of anchors (A, 4) and boxes (M, 4) are apart, for the DIoU (Zheng et al., 2020): (A, M).

    The square of their distance divided by that of the diagonal of the smallest box around both.
    """
    (x, y), (box_x, box_y) = _centres(anchors), _centres(boxes)
    distance = jnp.square(x - box_x[None, :, 0]) + jnp.square(y - box_y[None, :, 0])
    width, height = (
        jnp.maximum(anchors[:, axis + 2, None], boxes[None, :, axis + 2])
        - jnp.minimum(anchors[:, axis, None], boxes[None, :, axis])
        for axis in (0, 1)
    )
    return distance / jnp.maximum(jnp.square(width) + jnp.square(height), 1e-6)


def _nearest(anchors: jax.Array, boxes: jax.Array, inside: jax.Array, count: int) -> jax.Array:
    """Of each box (M, 4) the ``count`` anchors (A, 4) of those inside that are centred nearest to it: (A, M) bool."""
    (x, y), (box_x, box_y) = _centres(anchors), _centres(boxes)
    distance = jnp.square(x - box_x[None, :, 0]) + jnp.square(y - box_y[None, :, 0])
    distance = jnp.where(inside[:, None], distance, jnp.inf)
    # Compared for equality below, see assign_by_iou.
    distance = jax.lax.optimization_barrier(distance)
    # Up to the last one of those that are chosen, in the order of distance and index: no scatter is needed.
    values, index = jax.lax.top_k(-distance.T, min(count, len(anchors)))
    farthest, last = -values[None, :, -1], index[None, :, -1]
    first = jnp.arange(len(anchors))[:, None] <= last
    return inside[:, None] & ((distance < farthest) | ((distance == farthest) & first))


def _centres(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The x and y, (B, 1) each, of the centres of boxes (B, 4)."""
    return (boxes[:, :1] + boxes[:, 2:3]) / 2, (boxes[:, 1:2] + boxes[:, 3:]) / 2


def _in_crowd(anchors: jax.Array, boxes: jax.Array, crowd: jax.Array | None) -> jax.Array:
    """Which anchors (A, 4) lie by more than half in one of the boxes (M, 4) that are a ``crowd`` (M,): (A,) bool."""
    if crowd is None:
        return jnp.zeros(len(anchors), bool)
    return jnp.any(crowd[None] & (pairwise_coverage(anchors, boxes) > 0.5), axis=1)
