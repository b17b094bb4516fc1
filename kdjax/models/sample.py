"""A random sample of positives and negatives, of fixed size (Girshick, Fast R-CNN, 2015; Ren et al., Faster R-CNN)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sample(NamedTuple):
    """K slots for sampled candidates of one image: positives, then negatives, then slots that are empty."""

    candidate: jax.Array
    """(K,) int32: which candidate; meaningful where positive or negative."""
    positive: jax.Array
    """(K,) bool."""
    negative: jax.Array
    """(K,) bool."""


def sample(positive: jax.Array, negative: jax.Array, key: jax.Array, *, number: int, fraction: float) -> Sample:
    """Draws at most ``number`` candidates of one image, at most the given fraction of them positive.

    Positives are drawn first, and negatives fill what is left; if these are too few, slots stay empty. All of either
    kind are equally likely. With ``number`` equal to the number of candidates and ``fraction`` 1 all are kept.

    Args:
        positive: (A,) bool, the candidates that are positive.
        negative: (A,) bool, those that are negative; those that are neither are never drawn.
        key: the image's own, so that what is drawn does not depend on the batch.
        number: K, the slots; 256 anchors or 512 RoIs in Faster R-CNN.
        fraction: of ``number``, rounded down, that may be positive; 0.5 for anchors, 0.25 for RoIs.
    """
    size = positive.shape[0]
    random = jax.random.uniform(key, (size,))

    def draw(candidates: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
        _, index = jax.lax.top_k(jnp.where(candidates, random, -1.0), min(most, size))
        return index, jnp.minimum(jnp.sum(candidates), most)

    positives, taken = draw(positive, int(number * fraction))
    negatives, rest = draw(negative, number)
    slot = jnp.arange(number, dtype=jnp.int32)
    is_positive = slot < taken
    place = jnp.where(is_positive, slot, positives.size + slot - taken)
    index = jnp.take(jnp.concatenate([positives, negatives]), place, mode="clip")
    return Sample(index, is_positive, ~is_positive & (slot < taken + rest))
