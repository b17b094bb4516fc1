"""Feature imitation, the baseline of every table: the plain mean squared error between aligned features."""

import jax

from kdjax.losses.features import squared_error
from kdjax.losses.reduce import masked_mean


def mimic_loss(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Mean squared error of one level (FitNets, Romero et al., ICLR 2015, equation 3, as a mean).

    Over the valid positions::

        loss = mean_{n,h,w,c} (S - T)^2

    >>> import jax.numpy as jnp
    >>> mimic_loss(jnp.full((1, 2, 2, 3), 3.0), jnp.ones((1, 2, 2, 3)))
    Array(4., dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher's channels.
        teacher: (N, H, W, C); it gets no gradient.
        where: (N, H, W) bool, the valid positions; None for all.
        axis_name: mapped axis over which valid positions are counted, so that the mean over devices is the global mean.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if the shapes of student and teacher differ, or ``where`` has another form.
    """
    mask = None if where is None else where[..., None]
    return masked_mean(squared_error(student, teacher, where), mask, axis_name=axis_name)
