"""The head of SOLO (Wang et al., 2020), see :mod:`kdjax.models.solo`, and what it predicts."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.errors import UserError
from kdjax.models.dense import conv3x3, prior_bias, tower
from kdjax.types import Features, PairedBoxes, Targets


class SOLOPredictions(NamedTuple):
    """What the head says of the S x S cells of each level, in row-major order.

    The mask of a cell is a product that is taken where it is asked for: the masks of all cells of an image of 800 x
    1344 pixels are 200 million numbers. ``logit = features . kernel + bias`` at every position.
    """

    logits: Features
    """{"p2": (N, S, S, classes), ...}, before the sigmoid."""
    features: Features
    """{"p2": (N, h, w, C), ...}, twice as fine as the level: of strides 4, 4, 8, 16 and 16."""
    kernels: Features
    """{"p2": (N, S * S, C), ...}."""
    biases: Features
    """{"p2": (N, S * S), ...}."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: there are none.

        Raises:
            UserError: always.
        """
        raise UserError("SOLO finds masks without boxes, and there is no box regression to imitate: leave that out.")


class CellKernels(nn.Module):
    """The convolution 1x1 that makes a mask for each cell, as arrays: nothing is convolved here.

    Attributes:
        cells: number of cells.
        prior: probability that every position of every mask starts with.
    """

    cells: int
    prior: float

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """The kernels (cells, C) and the biases (cells,), float32."""
        kernel = self.param("kernel", nn.initializers.normal(0.01), (1, 1, channels, self.cells))
        return kernel[0, 0].T, self.param("bias", prior_bias(self.prior), (self.cells,))


class SOLOHead(nn.Module):
    """The tower of the classes, which sees S x S cells, and that of the masks, which sees where it is.

    Attributes:
        num_classes: number of classes, without a background.
        grids: S of each level, fine to coarse.
        convs: convolutions in each tower before the last one.
        prior: probability that every classifier and every mask starts with.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    grids: tuple[int, ...]
    convs: int = 7
    prior: float = 0.01
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features, extents: Mapping[str, jax.Array]) -> SOLOPredictions:
        """The predictions of a pyramid.

        Args:
            features: {"p2": (N, H, W, C), ...}, fine to coarse.
            extents: (N, 2) of each level, height and width of what shows the image, which the cells divide.
        """
        channels = next(iter(features.values())).shape[-1]
        seen, twice, cells = {}, {}, {}
        for (level, x), grid in zip(features.items(), self.grids, strict=True):
            seen[level] = jnp.concatenate([x, coordinates(x.shape, extents[level]).astype(x.dtype)], axis=-1)
            cells[level] = regional_resize(x, extents[level], jnp.full_like(extents[level], grid), (grid, grid))
        layers = functools.partial(
            tower, convs=self.convs, norm="group", bias=False, dtype=self.dtype, channels=channels
        )
        for level, x in layers(seen, "mask").items():
            size = 2 * x.shape[1], 2 * x.shape[2]
            twice[level] = regional_resize(x, extents[level], 2 * extents[level], size)
        classify = conv3x3(self.num_classes, bias_init=prior_bias(self.prior), dtype=self.dtype, name="cls_logits")
        logits = {level: classify(x) for level, x in layers(cells, "cls").items()}
        kernels, biases = {}, {}
        for level, grid in zip(features, self.grids, strict=True):
            kernel, bias = CellKernels(grid**2, self.prior, name=f"masks_{level}")(channels)
            images = features[level].shape[0]
            kernels[level] = jnp.broadcast_to(kernel, (images, *kernel.shape))
            biases[level] = jnp.broadcast_to(bias, (images, *bias.shape))
        return SOLOPredictions(logits, twice, kernels, biases)


def coordinates(shape: tuple[int, ...], extent: jax.Array) -> jax.Array:
    """Where each position of maps of ``shape`` (N, H, W, ...) is: (N, H, W, 2) float32, x and then y.

    -1 at the first and 1 at the last position of the extents (N, 2), beyond which it goes on.
    """
    last = jnp.maximum(extent - 1, 1).astype(jnp.float32)
    y, x = (2 * jnp.arange(size)[None] / last[:, axis, None] - 1 for axis, size in enumerate(shape[1:3]))
    return jnp.stack(jnp.broadcast_arrays(x[:, None, :], y[:, :, None]), axis=-1)


def interpolation(extent: jax.Array, other: jax.Array, size: int, other_size: int) -> jax.Array:
    """What the positions of lines give to lines of another length: (N, other_size, size) float32, rows of sum 1.

    As :func:`kdjax.losses.segmentation.bilinear` without aligned corners, of the first ``extent`` positions alone: what
    lies beyond is another image's padding. Rows from ``other`` on repeat the last position.

    Args:
        extent: (N,) positions that count.
        other: (N,) positions that there will be of them.
        size: positions in the array.
        other_size: rows.
    """
    scale = extent.astype(jnp.float32) / other.astype(jnp.float32)
    at = (jnp.arange(other_size)[None] + 0.5) * scale[:, None] - 0.5
    at = jnp.clip(at, 0, (extent - 1).astype(jnp.float32)[:, None])
    return jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(size)[None, None]), 0)


def regional_resize(x: jax.Array, extent: jax.Array, other: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps whose first ``extent`` (N, 2) rows and columns become the first ``other`` (N, 2), see ``interpolation``.

    Args:
        x: (N, h, w, C), any float dtype, which the result has.
        extent: (N, 2) int.
        other: (N, 2) int.
        size: height H and width W of the result.

    Returns:
        (N, H, W, C).
    """
    rows, columns = (
        interpolation(extent[:, axis], other[:, axis], x.shape[1 + axis], size[axis]).astype(x.dtype) for axis in (0, 1)
    )
    precision = "highest" if x.dtype == jnp.float32 else None
    x = jnp.einsum("nHh,nhwc->nHwc", rows, x, precision=precision)
    return jnp.einsum("nWw,nHwc->nHWc", columns, x, precision=precision)
