"""The one masked reduction of kdjax: finite when everything is masked, and so is its gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

COUNT = "count"
"""Name, for policies of ``jax.checkpoint``, of what :func:`mean_count` returns: devices are asked for it once."""

Axis = int | Sequence[int] | None


def masked_sum(values: jax.Array, where: jax.Array | None = None, axis: Axis = None) -> jax.Array:
    """Sum of ``values`` over ``axis`` where ``where`` holds, in float32.

    Masked entries have no influence on the value or the gradient, even when they are NaN or infinite.

    >>> masked_sum(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    Array(4., dtype=float32)

    Args:
        values: any shape, any float dtype.
        where: bool, broadcastable to ``values`` (same rank); None keeps everything.
        axis: axes to sum over, all by default.
    """
    values = values.astype(jnp.float32)
    if where is not None:
        values = jnp.where(where, values, 0.0)
    return jnp.sum(values, axis=axis)


def masked_mean(
    values: jax.Array, where: jax.Array | None = None, axis: Axis = None, axis_name: str | None = None
) -> jax.Array:
    """Mean of ``values`` over ``axis`` where ``where`` holds, in float32; 0 where nothing holds.

    >>> masked_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[True, True], [False, False]]), axis=1)
    Array([2., 0.], dtype=float32)

    Args:
        values: any shape, any float dtype.
        where: bool, broadcastable to ``values`` (same rank); None keeps everything.
        axis: axes to average over, all by default.
        axis_name: mapped axis over which the count is averaged too: the mean over devices of the result is then the
            mean over everything on every device, however unevenly the mask falls on them.
    """
    total = masked_sum(values, where, axis)
    held = jnp.ones(values.shape) if where is None else jnp.broadcast_to(where, values.shape)
    count = jnp.sum(held.astype(jnp.float32), axis=axis)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def mean_count(count: jax.Array, axis_name: str | None = None, *, least: float = 1.0) -> jax.Array:
    """What a sum over this device's entries is divided by, so that the mean over devices is the global quotient.

    >>> jax.vmap(lambda count: mean_count(count, "devices"), axis_name="devices")(jnp.array([1, 4]))
    Array([2.5, 2.5], dtype=float32)
    >>> mean_count(jnp.array(0))
    Array(1., dtype=float32)

    Args:
        count: a scalar of this device: a number of entries, or the sum of their weights.
        axis_name: mapped axis over which it is averaged; None outside of one.
        least: what the global count is at least.

    Returns:
        A float32 scalar: the mean over devices, equal on all of them.
    """
    count = count.astype(jnp.float32)
    if axis_name is None:
        return jnp.maximum(count, least)
    count = jnp.maximum(jax.lax.pmean(count, axis_name), least / jax.lax.psum(1, axis_name))
    return checkpoint_name(count, COUNT)
