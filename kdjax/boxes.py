"""Box arithmetic: overlaps, clipping, and how detectors code boxes: by deltas of anchors or by distances of sides."""

import jax
import jax.numpy as jnp

DELTA_LIMIT = 4.135166556742356
"""log(1000 / 16): the largest log-scale delta that is decoded, the value of Detectron and MMDetection."""


def area(boxes: jax.Array) -> jax.Array:
    """Areas (...) in square pixels of xyxy boxes (..., 4); zero for boxes turned inside out."""
    width_height = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return width_height[..., 0] * width_height[..., 1]


def pairwise_iou(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """Intersection over union of every pair: (..., A, 4) and (..., B, 4) to (..., A, B).

    Pairs whose union is empty have IoU 0, never NaN.
    """
    intersection = _intersection(boxes, others)
    union = area(boxes)[..., :, None] + area(others)[..., None, :] - intersection
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)


def pairwise_coverage(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """The share of each box that lies in each other one: (..., A, 4) and (..., B, 4) to (..., A, B).

    Intersection over the area of ``boxes`` ("IoF"); 0 for empty ones.
    """
    own = area(boxes)[..., :, None]
    return jnp.where(own > 0, _intersection(boxes, others) / jnp.where(own > 0, own, 1), 0)


def _intersection(boxes: jax.Array, others: jax.Array) -> jax.Array:
    # Side by side: arrays of the corners of all pairs would take twice the memory of the result.
    sides = (
        jnp.minimum(boxes[..., :, None, axis + 2], others[..., None, :, axis + 2])
        - jnp.maximum(boxes[..., :, None, axis], others[..., None, :, axis])
        for axis in (0, 1)
    )
    width, height = (jnp.maximum(side, 0) for side in sides)
    return width * height


def clip(boxes: jax.Array, image_size: jax.Array) -> jax.Array:
    """Clips xyxy boxes (N, A, 4) to images of height and width ``image_size`` (N, 2)."""
    height, width = image_size[:, None, 0], image_size[:, None, 1]
    limit = jnp.stack([width, height, width, height], axis=-1).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limit)


def encode(boxes: jax.Array, anchors: jax.Array) -> jax.Array:
    """Deltas (dx, dy, dw, dh) that take ``anchors`` (..., 4) to ``boxes`` (..., 4).

    ``dx = (x - x_a) / w_a``, ``dw = log(w / w_a)`` with x the centre (Girshick et al., R-CNN, appendix C).
    Empty boxes are coded as one 1e-6 pixel wide, so that the result is finite.
    """
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + 0.5 * size, anchors[..., :2] + 0.5 * anchor_size
    shift = (centre - anchor_centre) / anchor_size
    scale = jnp.log(jnp.maximum(size, 1e-6) / anchor_size)
    return jnp.concatenate([shift, scale], axis=-1)


def decode(deltas: jax.Array, anchors: jax.Array, *, symmetric: bool = False) -> jax.Array:
    """The inverse of :func:`encode`.

    Log-scales are limited to at most ``DELTA_LIMIT``, and where ``symmetric``, as in MMDetection, to at least
    ``-DELTA_LIMIT``; torchvision and Detectron have no lower limit.
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_centre = anchors[..., :2] + 0.5 * anchor_size
    centre = anchor_centre + deltas[..., :2] * anchor_size
    lowest = -DELTA_LIMIT if symmetric else -jnp.inf
    half = 0.5 * anchor_size * jnp.exp(jnp.clip(deltas[..., 2:], lowest, DELTA_LIMIT))
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def centres_of(boxes: jax.Array) -> jax.Array:
    """The centres (..., 2), x and y, of boxes (..., 4) xyxy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def box_of(centres: jax.Array, distances: jax.Array) -> jax.Array:
    """The boxes (..., 4) xyxy whose sides are at ``distances`` (..., 4) from ``centres`` (..., 2)."""
    return jnp.concatenate([centres - distances[..., :2], centres + distances[..., 2:]], axis=-1)


def distances_to(centres: jax.Array, objects: jax.Array) -> jax.Array:
    """The inverse of :func:`box_of`: distances (..., 4) from ``centres`` (..., 2) to the sides of boxes (..., 4)."""
    return jnp.concatenate([centres - objects[..., :2], objects[..., 2:] - centres], axis=-1)
