"""Batch normalisation that trains as PyTorch's does, the layer that it makes with a convolution, and group norm."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

NORMS = ("", "group")
"""What may follow the convolutions of necks and of heads."""

_he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

_KEPT = 0.9
"""What a step leaves of the running statistics."""

_FEW = 256
"""Values of a channel on a device."""


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy, 2015), with PyTorch's statistics.

    In training ``y = scale (x - mean) / sqrt(var + epsilon) + bias`` with the mean and the biased variance of the n
    values of a channel, on all devices of ``axis_name`` together. The running statistics follow by a tenth (PyTorch's
    momentum 0.1): ``mean``, and the unbiased variance ``n / (n - 1) var``, where Flax's own module keeps the biased
    one; of a single value it is 0. Parameters ``scale`` and ``bias`` and statistics ``mean`` and ``var``, all (C,)
    float32, are named as Flax's.

    >>> norm = BatchNorm(train=True)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, updated = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    >>> updated["batch_stats"]["var"].round(4)  # 0.9 * 1 + 0.1 * 2
    Array([1.1], dtype=float32)

    Attributes:
        train: normalise with the batch's statistics and update the running ones; otherwise the running statistics are
            used and left alone.
        epsilon: added to variances.
        axis_name: mapped axis over which statistics are averaged; None outside of one.
        dtype: of the result; statistics are computed in float32, those of float64 in float64.
    """

    train: bool
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) to (..., C)."""
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if self.train:
            axis_name = None if self.is_initializing() else self.axis_name
            mean, var = _statistics(x, axis_name)
            if not self.is_initializing():
                count = x.size // x.shape[-1] * (jax.lax.psum(1, axis_name) if axis_name else 1)
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = _KEPT * running_mean.value + (1 - _KEPT) * mean
                running_var.value = _KEPT * running_var.value + (1 - _KEPT) * unbiased
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean, var, scale, bias = (part.reshape(*[1] * (x.ndim - 1), -1) for part in (mean, var, scale, bias))
        return ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias and batch norm: (N, H, W, C) to (N, H/stride, W/stride, channels)."""

    channels: int
    size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Its output, before any activation; ``train`` as in the backbones."""
        x = nn.Conv(
            self.channels,
            (self.size, self.size),
            self.stride,
            padding=self.size // 2 * self.dilation,
            kernel_dilation=self.dilation,
            feature_group_count=self.groups,
            use_bias=False,
            kernel_init=_he,
            dtype=self.dtype,
            name="conv",
        )(x)
        return BatchNorm(train, axis_name=self.axis_name, dtype=self.dtype, name="bn")(x)


def group_norm(channels: int, *, dtype: Dtype, name: str | None = None) -> nn.GroupNorm:
    """Group normalisation (Wu and He, 2018) of maps of as many channels: of at most 32 groups of at least 8 of them.

    >>> group_norm(256, dtype=jnp.float32).num_groups, group_norm(24, dtype=jnp.float32).num_groups
    (32, 1)
    """
    return nn.GroupNorm(groups_of(channels), epsilon=1e-5, dtype=dtype, name=name)


def groups_of(channels: int) -> int:
    """The groups of :func:`group_norm`."""
    return math.gcd(32, max(1, channels // 8))


def _statistics(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of (..., C) over all other axes and over devices: (C,) each, at least float32.

    The variance comes from the mean of squares, so that both take one pass over ``x``, of differences from one of the
    values: of values far from 0 that are nearly equal, squares would leave few digits right. Devices exchange both at
    once, but what they have few values of: there the spread is between them, and comes from differences too.
    """
    x, axes = x.astype(jnp.promote_types(x.dtype, jnp.float32)), tuple(range(x.ndim - 1))
    near = jax.lax.stop_gradient(x[(0,) * len(axes)])
    difference = x - near.reshape(*[1] * len(axes), -1)
    offset, squares = difference.mean(axes), jnp.square(difference).mean(axes)
    mean, var = near + offset, jnp.maximum(0.0, squares - jnp.square(offset))
    if axis_name is None:
        return mean, var
    if x.size // x.shape[-1] <= _FEW:
        whole = jax.lax.pmean(mean, axis_name)
        return whole, jax.lax.pmean(var + jnp.square(mean - whole), axis_name)
    whole, var, squares = jax.lax.pmean(jnp.stack([mean, var, jnp.square(mean)]), axis_name)
    return whole, var + jnp.maximum(0.0, squares - jnp.square(whole))
