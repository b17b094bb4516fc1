"""Losses between logits: knowledge distillation (Hinton et al., 2015) and channel-wise distillation (Shu et al., 2021).

https://arxiv.org/abs/1503.02531 and https://arxiv.org/abs/2011.13256. The backward pass computes the softmaxes anew, so
that nothing of the logits' size is kept for it but the logits themselves.
"""

import jax
import jax.numpy as jnp

from kdjax.losses.features import check_aligned
from kdjax.losses.reduce import masked_mean, masked_sum

_NEVER = -1e30
"""A logit whose probability is zero, and whose gradient is finite."""


def kd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float = 4.0,
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """How far the student's classes are from the teacher's, image by image or position by position::

        loss = temperature^2 mean KL( softmax(T / temperature) || softmax(S / temperature) )

    The square keeps the gradient's size at any temperature (Hinton et al., section 2).

    >>> float(kd_loss(jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 2.0]])))
    0.0

    Args:
        student: (N, K) logits of images, or (N, H, W, K) of positions, any float dtype.
        teacher: of the same shape; it gets no gradient.
        temperature: above 0.
        where: (N, H, W) bool, the valid positions of maps; None for all.
        axis_name: mapped axis over which the number of valid positions is averaged; None outside of one.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the shapes differ, or are of another form.
    """
    _check(student, teacher, where)
    found = jax.checkpoint(divergence)(student / temperature, jax.lax.stop_gradient(teacher) / temperature)
    return temperature**2 * masked_mean(found, where, axis_name=axis_name)


def cwd_loss(
    student: jax.Array, teacher: jax.Array, *, temperature: float = 4.0, where: jax.Array | None = None
) -> jax.Array:
    """How far the places of a class are from where the teacher has them, class by class [code]::

        loss = temperature^2 / (C N) sum_{n,c} KL( softmax_hw(T / temperature) || softmax_hw(S / temperature) )

    The softmax of each channel is over the positions (Shu et al., equations 2 to 4). Three times this is the term that
    MGD adds to segmentation.

    >>> maps = jnp.arange(8.0).reshape(1, 2, 2, 2)
    >>> float(cwd_loss(maps + 1, maps))
    0.0

    Args:
        student: (N, H, W, C) logits, any float dtype.
        teacher: of the same shape; it gets no gradient.
        temperature: above 0.
        where: (N, H, W) bool, the valid positions, over which the softmax goes; None for all.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the shapes differ, or are of another form.
    """
    check_aligned(student, teacher, where)

    def by_channel(x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, C, H * W)."""
        x = x.astype(jnp.float32) / temperature
        x = x if where is None else jnp.where(where[..., None], x, _NEVER)
        return jnp.swapaxes(x.reshape(x.shape[0], -1, x.shape[3]), 1, 2)

    def of_channels(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return divergence(by_channel(student), by_channel(teacher))

    images, *_, channels = student.shape
    found = jax.checkpoint(of_channels)(student, jax.lax.stop_gradient(teacher))
    return temperature**2 * masked_sum(found) / (images * channels)


def divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """``KL(softmax(teacher) || softmax(student))`` over the last axis: (..., K) to (...), float32."""
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (student, teacher))
    return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def _check(student: jax.Array, teacher: jax.Array, where: jax.Array | None) -> None:
    """Raises ValueError unless both are logits of one shape."""
    if not student.ndim == teacher.ndim == 2:
        check_aligned(student, teacher, where)
    elif student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits are {student.shape}, the teacher's {teacher.shape}; they must be alike."
        )
