"""Which anchors or proposals learn which objects, by IoU (Ren et al., Faster R-CNN; Lin et al., RetinaNet)."""

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
    if crowd is not None:
        negative &= ~jnp.any(crowd[None] & (pairwise_coverage(anchors, boxes) > 0.5), axis=1)
    return Assignment(matched=matched, positive=positive, negative=negative)
