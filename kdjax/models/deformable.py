"""Deformable convolution (Dai et al., Deformable Convolutional Networks, ICCV 2017), the first version, as MMCV has it.

The samples of one tap are gathered at a time, whole vectors of channels, and multiplied with that tap's part of the
kernel: memory holds the samples of a ninth of a 3x3 convolution. The backward pass is written out: it gathers each
tap's samples again and adds its gradients to those of the others in place, where what JAX derives makes an array as
large as the map for each of four cells of each tap.
"""

from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer


def deformable_conv(
    x: jax.Array, offsets: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> jax.Array:
    """A convolution whose taps are moved, at every position by other offsets.

    With p a position of the output, k a tap of the kernel and o the offset of that tap at that position (equation 2),

        y(p) = sum_k W_k x(stride p + dilation (k - centre) + o(p, k)).

    Between cells x is interpolated bilinearly (equations 3 and 4), where cells outside the map are zero. Samples
    outside (-1, H) x (-1, W) are zero and have no gradient: that is so of the taps on -1 too, which an offset of zero
    leaves there.

    Args:
        x: (N, H, W, C).
        offsets: (N, ceil(H / stride), ceil(W / stride), 2 * kh * kw), in cells: for each tap, row by row, along y and
            then along x.
        kernel: (kh, kw, C / groups, F), kh and kw odd.
        stride: cells from one position of the output to the next.
        dilation: cells from one tap to the next; with the padding of ``dilation * (kh // 2)`` that goes with it, as in
            MMDetection, the output has as many positions as the strides fit in.
        groups: into which channels and outputs are divided, as in ``flax.linen.Conv``; all have the same offsets.

    Returns:
        (N, ceil(H / stride), ceil(W / stride), F) of x's dtype; sums are float32.
    """
    n, height, width, channels = x.shape
    tall, wide, _, outputs = kernel.shape
    rows, columns, taps = -(-height // stride), -(-width // stride), tall * wide
    if offsets.shape != (n, rows, columns, 2 * taps):
        raise ValueError(
            f"The offsets are {offsets.shape}; a kernel of {tall}x{wide} with stride {stride} needs "
            f"{(n, rows, columns, 2 * taps)} on a map of {x.shape}."
        )
    moves = jnp.moveaxis(offsets.astype(jnp.float32).reshape(n, rows, columns, taps, 2), 3, 0)
    taps_at = dilation * (_grid(tall, wide) - jnp.array([[[tall // 2, wide // 2]]], jnp.float32))
    places = stride * _grid(rows, columns)[None, None] + taps_at.reshape(taps, 1, 1, 1, 2) + moves
    kernels = kernel.reshape(taps, channels // groups, groups, outputs // groups).swapaxes(1, 2)
    bordered = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    total = _sum_of_taps(bordered, places, kernels)
    return total.swapaxes(0, 1).reshape(n, rows, columns, outputs).astype(x.dtype)


@jax.custom_vjp
def _sum_of_taps(bordered: jax.Array, places: jax.Array, kernels: jax.Array) -> jax.Array:
    """The convolution, of a map with a border of one cell of zeros around it.

    Args:
        bordered: (N, H + 2, W + 2, C).
        places: (taps, N, R, S, 2) float32: where the samples are, y first, counted without the border.
        kernels: (taps, groups, C / groups, F / groups).

    Returns:
        (groups, N * R * S, F / groups) float32.
    """
    _, groups, inputs, outputs = kernels.shape
    size = places[0, ..., 0].size

    def add(total: jax.Array, tap: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        places, kernel = tap
        samples = jnp.zeros((size, groups * inputs))
        for corner in _corners(bordered, places):
            samples += corner.weight[:, None] * corner.of(bordered)
        samples = samples.astype(bordered.dtype)
        if groups > 1:  # Of one, the sum becomes a part of the product.
            samples = _written(samples)
        samples = samples.reshape(-1, groups, inputs).swapaxes(0, 1)
        return total + jnp.matmul(samples, kernel, preferred_element_type=jnp.float32), None

    return jax.lax.scan(add, jnp.zeros((groups, size, outputs)), (places, kernels))[0]


def _written(rows: jax.Array) -> jax.Array:
    """(P, C): the same, written to memory row by row, as the gathered cells are.

    Without that XLA takes the layout that the next product wants, and on a TPU transposes all four cells for it, in
    float32: two and a half times the traffic of a teacher's convolution.
    """
    return jax.lax.optimization_barrier(rows)


Saved = tuple[jax.Array, jax.Array, jax.Array]


def _forward(bordered: jax.Array, places: jax.Array, kernels: jax.Array) -> tuple[jax.Array, Saved]:
    return _sum_of_taps(bordered, places, kernels), (bordered, places, kernels)


def _backward(saved: Saved, upstream: jax.Array) -> Saved:
    """The gradients by the three arguments; that by the map is summed in float32."""
    bordered, places, kernels = saved
    _, groups, inputs, _ = kernels.shape
    upstream, channels = upstream.astype(bordered.dtype), groups * inputs

    def add(total: jax.Array, tap: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        places, kernel = tap
        pulled = jnp.matmul(upstream, kernel.swapaxes(1, 2), preferred_element_type=jnp.float32)
        pulled = _written(pulled.swapaxes(0, 1).reshape(-1, channels))
        samples, moved = jnp.zeros(pulled.shape), jnp.zeros((pulled.shape[0], 2))
        for corner in _corners(bordered, places):
            cells = corner.of(bordered)
            samples += corner.weight[:, None] * cells
            moved += corner.slope * jnp.sum(cells * pulled, axis=-1, keepdims=True)
            total = total.at[corner.cell].add(corner.weight[:, None] * pulled, mode="promise_in_bounds")
        samples = _written(samples.astype(bordered.dtype)).reshape(-1, groups, inputs)
        # In this order, and turned around afterwards: the other one is three times as slow on a CPU.
        by_kernel = jnp.einsum("gpo,pgi->goi", upstream, samples, preferred_element_type=jnp.float32)
        return total, (moved.reshape(places.shape), by_kernel.swapaxes(1, 2).astype(kernel.dtype))

    total, (moved, by_kernel) = jax.lax.scan(add, jnp.zeros((bordered[..., 0].size, channels)), (places, kernels))
    return total.reshape(bordered.shape).astype(bordered.dtype), moved, by_kernel


_sum_of_taps.defvjp(_forward, _backward)


class DeformableConv(nn.Module):
    """A deformable 3x3 convolution without a bias, whose offsets are given, or a plain 3x3 convolution of its input.

    That one begins with zeros: at first this is a plain convolution. Parameters are called as in MMDetection.

    Attributes:
        features: channels of the output.
        stride: see :func:`deformable_conv`.
        groups: likewise.
        kernel_init: of the kernel.
        dtype: of the computation; parameters and the places of samples are float32.
    """

    features: int
    stride: int = 1
    groups: int = 1
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, offsets: jax.Array | None = None) -> jax.Array:
        """(N, H, W, C) to (N, ceil(H / stride), ceil(W / stride), features); ``offsets`` as in the function."""
        x = x.astype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1] // self.groups, self.features))
        if offsets is None:
            offsets = nn.Conv(
                2 * 9,
                (3, 3),
                self.stride,
                padding=1,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name="conv_offset",
            )(x)
        return deformable_conv(x, offsets, kernel.astype(self.dtype), stride=self.stride, groups=self.groups)


def _grid(rows: int, columns: int) -> jax.Array:
    """(rows, columns, 2) float32: the index of each cell, y first."""
    return jnp.moveaxis(jnp.indices((rows, columns), dtype=jnp.float32), 0, -1)


class _Corner(NamedTuple):
    """One of the four cells around each of P samples."""

    cell: jax.Array
    """(P,) int32: its place among all cells of all maps."""
    weight: jax.Array
    """(P,) float32: how much of the sample it is."""
    slope: jax.Array
    """(P, 2) float32: how much more where the sample moves along y and along x."""

    def of(self, bordered: jax.Array) -> jax.Array:
        """(P, C): the cells of a map."""
        cells = bordered.reshape(-1, bordered.shape[-1])
        return jnp.take(cells, self.cell, axis=0, mode="clip")


def _corners(bordered: jax.Array, places: jax.Array) -> Iterator[_Corner]:
    """The cells between which a map with a border is interpolated at places (N, R, S, 2), see :func:`_sum_of_taps`."""
    n, height, width, _ = bordered.shape
    end = jnp.array([height - 2, width - 2], jnp.float32).reshape(1, 1, 1, 2)
    inside = jnp.all((places > -1) & (places < end), axis=-1)
    # Others are sampled somewhere, with the weight zero: what they are could be infinite.
    places = jnp.where(inside[..., None], places, 0)
    low = jnp.floor(places)
    y, x = jnp.moveaxis(low.astype(jnp.int32) + 1, -1, 0)
    y_share, x_share = jnp.moveaxis(places - low, -1, 0)
    first = (jnp.arange(n)[:, None, None] * height + y) * width + x
    for down, y_weight in ((0, 1 - y_share), (1, y_share)):
        for right, x_weight in ((0, 1 - x_share), (1, x_share)):
            slopes = inside * (2 * down - 1) * x_weight, inside * (2 * right - 1) * y_weight
            yield _Corner(
                (first + (down * width + right)).reshape(-1),
                (inside * y_weight * x_weight).reshape(-1),
                jnp.stack(slopes, axis=-1).reshape(-1, 2),
            )
