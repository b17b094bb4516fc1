"""Non-maximum suppression with static shapes: of boxes with the result of the greedy algorithm, and of masks."""

import jax
import jax.numpy as jnp

from kdjax.boxes import pairwise_iou

_BLOCK = 128
"""Candidates that are decided together; 64 to 256 run equally fast."""


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    iou_threshold: float,
    max_outputs: int,
) -> tuple[jax.Array, jax.Array]:
    """Class-wise non-maximum suppression of K candidates in each of N images.

    Greedy: the best-scored candidate is kept, and those of its label that overlap it by more than ``iou_threshold`` are
    dropped; then the best one that remains is kept, and so on. Of equal scores the first comes first.

    It takes the candidates in blocks of descending score, drops those that a kept box suppresses, decides the rest of
    the block, and stops as soon as every image has its ``max_outputs`` boxes: memory is O(K + block * max_outputs) and
    there is no step per box.

    Args:
        boxes: (N, K, 4) xyxy.
        scores: (N, K) float32, finite.
        labels: (N, K) integers; boxes of different labels do not suppress each other.
        valid: (N, K) bool: which candidates take part.
        iou_threshold: in [0, 1].
        max_outputs: D, how many boxes an image may keep.

    Returns:
        (N, D) int32, the indices of the kept candidates in descending order of score; and (N, D) bool, which of
        the indices are meant.
    """
    n, k = scores.shape
    scores, order = jax.lax.top_k(jnp.where(valid, scores, -jnp.inf), k)
    # Sorted, cut into blocks, the block first: (blocks, N, block, ...).
    padding = ((0, 0), (0, -k % _BLOCK))
    order = jnp.pad(order.astype(jnp.int32), padding)
    live = jnp.pad(scores, padding, constant_values=-jnp.inf) > -jnp.inf

    def cut(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(n, -1, _BLOCK, *x.shape[2:]), 0, 1)

    sorted_boxes = jnp.take_along_axis(boxes, order[:, :, None], axis=1)
    blocks = jax.tree.map(cut, (sorted_boxes, jnp.take_along_axis(labels, order, axis=1), live, order))
    count = blocks[2].shape[0]

    def suppresses(boxes: jax.Array, labels: jax.Array, others: jax.Array, other_labels: jax.Array) -> jax.Array:
        same = labels[:, :, None] == other_labels[:, None, :]
        return same & (pairwise_iou(boxes, others) > iou_threshold)

    def unfinished(state: tuple) -> jax.Array:
        block, _, _, _, kept = state
        # The first of a block is its best: if that is not live, nothing more comes.
        live = jax.lax.dynamic_index_in_dim(blocks[2], jnp.minimum(block, count - 1), keepdims=False)[:, 0]
        return (block < count) & jnp.any(live & (kept < max_outputs))

    def decide_block(state: tuple) -> tuple:
        block, kept_boxes, kept_labels, kept_index, kept = state
        boxes, labels, live, index = (jax.lax.dynamic_index_in_dim(x, block, keepdims=False) for x in blocks)
        # Slots that are still free hold empty boxes, which overlap nothing.
        live &= ~jnp.any(suppresses(kept_boxes, kept_labels, boxes, labels), axis=1)
        conflict = suppresses(boxes, labels, boxes, labels) & jnp.triu(jnp.ones((_BLOCK, _BLOCK), bool), 1)[None]
        keep = _resolve(conflict, live)
        # Boxes beyond the last slot are dropped by the scatter.
        slot = jnp.where(keep, kept[:, None] + jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1, max_outputs)
        put = jax.vmap(lambda table, slot, rows: table.at[slot].set(rows, mode="drop"))
        kept = jnp.minimum(kept + jnp.sum(keep, axis=1, dtype=jnp.int32), max_outputs)
        return (
            block + 1,
            put(kept_boxes, slot, boxes),
            put(kept_labels, slot, labels),
            put(kept_index, slot, index),
            kept,
        )

    start = (
        jnp.int32(0),
        jnp.zeros((n, max_outputs, 4), boxes.dtype),
        jnp.zeros((n, max_outputs), labels.dtype),
        jnp.zeros((n, max_outputs), jnp.int32),
        jnp.zeros(n, jnp.int32),
    )
    _, _, _, kept_index, kept = jax.lax.while_loop(unfinished, decide_block, start)
    return kept_index, jnp.arange(max_outputs)[None] < kept[:, None]


def _resolve(conflict: jax.Array, live: jax.Array) -> jax.Array:
    """Which of the ``live`` (N, B) candidates stay when each kept one drops those it is in ``conflict`` (N, B, B) with.

    ``conflict[n, i, j]`` is True only for i < j. Repeats "stays if nothing that stays drops it" until nothing changes:
    after t rounds the first t candidates are right, so that what is found at the end is the greedy answer; the number
    of rounds is the length of the longest chain of suppressions, not B.
    """

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep, _ = state
        updated = live & ~jnp.any(conflict & keep[:, :, None], axis=1)
        return updated, jnp.any(updated != keep)

    keep, _ = jax.lax.while_loop(lambda state: state[1], again, (live, jnp.array(True)))
    return keep


def matrix_nms(masks: jax.Array, scores: jax.Array, labels: jax.Array, *, sigma: float) -> jax.Array:
    """The scores of K masks of one image after Matrix NMS with a Gaussian (Wang et al., SOLOv2, 2020, section 3.3).

    ``s_j min_i exp(-sigma IoU_ij^2) / exp(-sigma max_k IoU_ki^2)`` over the better ones i of the same label, and the
    better ones k than these; what overlaps nothing keeps its score.

    Args:
        masks: (K, H, W) bool.
        scores: (K,) float32, descending.
        labels: (K,) int.
        sigma: at least 0.

    Returns:
        (K,) float32, in the same order.
    """
    count = len(scores)
    # Zeros and ones, which bfloat16 has, summed in float32: areas and intersections are exact.
    flat = masks.reshape(count, -1).astype(jnp.bfloat16)
    shared = jnp.einsum("ap,bp->ab", flat, flat, preferred_element_type=jnp.float32)
    area = jnp.diagonal(shared)
    union = area[:, None] + area[None] - shared
    better = jnp.triu(labels[:, None] == labels[None], 1)
    iou = jnp.where(better & (union > 0), shared / jnp.where(union > 0, union, 1), 0)
    covered = jnp.max(iou, axis=0, initial=0)
    return scores * jnp.min(jnp.exp(sigma * (covered[:, None] ** 2 - iou**2)), axis=0, initial=1)
