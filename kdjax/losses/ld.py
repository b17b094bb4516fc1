"""LD, localization distillation (Zheng et al., CVPR 2022, https://arxiv.org/abs/2102.12252).

Detectors that predict each side of a box as a distribution over its distance teach it as classifiers teach classes.
"""

import jax
import jax.numpy as jnp

from kdjax.losses.features import check_aligned
from kdjax.losses.logits import divergence
from kdjax.losses.reduce import masked_sum

SIDES = 4


def ld_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    weight: jax.Array | None = None,
    temperature: float = 10.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """How far the student's distributions of the sides of boxes are from the teacher's [code]::

        loss = temperature^2 / (4 K N) sum_{n,h,w} w sum_side KL( softmax(T / temperature) || softmax(S / temperature) )

    ``K`` is the number of distances. MMDetection's loss is the sum over the images of each device, two in its configs,
    where this is the mean over images, which does not depend on how many share a batch: a weight there is twice as much
    here.

    >>> sides = jnp.arange(8.0).reshape(1, 1, 1, 8)
    >>> float(ld_loss(sides, sides))
    0.0

    Args:
        student: (N, H, W, 4 * K) logits, the K distances of a side varying fastest, any float dtype.
        teacher: of the same shape; it gets no gradient.
        weight: (N, H, W) of at least 0, ``w``: how much each place counts; None for 1.
        temperature: above 0.
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the shapes differ, or channels are not those of four sides.
    """
    check_aligned(student, teacher, where)
    images, height, width, channels = student.shape
    if channels % SIDES:
        raise ValueError(f"The maps have {channels} channels; it must be a multiple of the four sides.")

    def by_place(student: jax.Array, teacher: jax.Array) -> jax.Array:
        ours, theirs = (x.reshape(images, height, width, SIDES, -1) for x in (student, teacher))
        return jnp.mean(divergence(ours / temperature, theirs / temperature), axis=-1) / ours.shape[-1]

    found = jax.checkpoint(by_place)(student, jax.lax.stop_gradient(teacher))
    if weight is not None:
        found *= jax.lax.stop_gradient(weight)
    return temperature**2 * masked_sum(found, where) / images
