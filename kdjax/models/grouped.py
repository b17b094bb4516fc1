"""Grouped convolutions (Xie et al., ResNeXt, 2017), which TPUs compute in fewer and wider groups.

XLA lays narrow groups out anew for a TPU, in float32: the forward pass of a ResNeXt-101 64x4d takes seven times the
memory and three times the traffic that it takes with groups of 128 channels, which are what its matrix unit multiplies.
"""

from typing import Any

import jax
import jax.numpy as jnp

_WIDTH = 128
"""Channels of a merged group at most."""


def grouped_conv(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, feature_group_count: int, **options: Any
) -> jax.Array:
    """``jax.lax.conv_general_dilated``, on TPUs with as many groups merged to one as have 128 channels together.

    To be given to ``flax.linen.Conv`` as ``conv_general_dilated``. A program is lowered for one or the other: for other
    platforms it is what it would be without this function. Values and gradients are equal but for the order of sums.

    Args:
        x: (N, H, W, C).
        kernel: (kh, kw, C / groups, F).
        strides: as ``jax.lax.conv_general_dilated`` has it, and so what follows.
        padding: likewise.
        feature_group_count: the groups.
        **options: likewise, of the layout above.

    Returns:
        (N, H', W', F).
    """
    groups, most = feature_group_count, max(1, _WIDTH // kernel.shape[2])
    times = max(times for times in range(1, most + 1) if groups % times == 0)

    def apart(x: jax.Array, kernel: jax.Array, groups: int = groups) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, feature_group_count=groups, **options)

    def merged(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return apart(x, merge_groups(kernel, groups, times), groups // times)

    return jax.lax.platform_dependent(x, kernel, tpu=merged, default=apart) if times > 1 else apart(x, kernel)


def merge_groups(kernel: jax.Array, groups: int, times: int) -> jax.Array:
    """The kernel of the same convolution with ``times`` groups merged to one: zeros between those that do not meet.

    >>> merge_groups(jnp.arange(1.0, 5).reshape(1, 1, 1, 4), groups=4, times=2)[0, 0]
    Array([[1., 0., 3., 0.],
           [0., 2., 0., 4.]], dtype=float32)

    Args:
        kernel: (kh, kw, C / groups, F).
        groups: that it has.
        times: how many become one; divides ``groups``.

    Returns:
        (kh, kw, times * C / groups, F) of the kernel's dtype.
    """
    *window, channels, outputs = kernel.shape
    blocks = kernel.reshape(*window, 1, channels, groups // times, times, outputs // groups)
    diagonal = jnp.eye(times, dtype=bool).reshape(1, 1, times, 1, 1, times, 1)
    return jnp.where(diagonal, blocks, 0).reshape(*window, times * channels, outputs)
