"""What segmenters learn by: bilinear resizing as PyTorch does it, and cross-entropy over index maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses.features import einsum
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.types import IGNORED

_ROWS_FIRST = [(0, 2), (0, 1)]
"""In which order a product with the matrices of rows and of columns is taken."""


@functools.cache
def bilinear(size: int, other: int, align_corners: bool) -> np.ndarray:
    """What the positions of a line of ``size`` give to one of ``other``: (other, size) float32, rows of sum 1.

    PyTorch's ``interpolate(mode="bilinear")`` without antialiasing: position i of the result lies at
    ``(i + 1/2) size / other - 1/2``, or at ``i (size - 1) / (other - 1)`` where corners are aligned.

    >>> bilinear(2, 4, False)
    array([[1.  , 0.  ],
           [0.75, 0.25],
           [0.25, 0.75],
           [0.  , 1.  ]], dtype=float32)
    >>> bilinear(2, 3, True)
    array([[1. , 0. ],
           [0.5, 0.5],
           [0. , 1. ]], dtype=float32)

    Args:
        size: positions that there are.
        other: positions that there will be.
        align_corners: whether the centres of the outermost positions of both coincide, and not their outer edges.
    """
    places = np.arange(other)
    at = places * ((size - 1) / max(other - 1, 1)) if align_corners else (places + 0.5) * (size / other) - 0.5
    at = np.clip(at, 0, size - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(size)), 0).astype(np.float32)


def resize(x: jax.Array, size: tuple[int, ...], *, align_corners: bool) -> jax.Array:
    """Maps at another size, see :func:`bilinear`.

    A product with a matrix for each axis, so that the gradient is one too.

    >>> resize(jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1), (1, 4), align_corners=False).ravel()
    Array([0., 1., 3., 4.], dtype=float32)

    Args:
        x: (N, h, w, C), any float dtype, which the result has; computed in float32.
        size: height H and width W.
        align_corners: see :func:`bilinear`.

    Returns:
        (N, H, W, C).
    """
    rows, columns = _matrices(x, size, align_corners)
    return einsum("Hh,Ww,nhwc->nHWc", rows, columns, x.astype(jnp.float32), optimize=_ROWS_FIRST).astype(x.dtype)


def pixel_logits(logits: jax.Array, size: tuple[int, ...], *, align_corners: bool) -> jax.Array:
    """The logits of every pixel, see :func:`resize`: (N, h, w, K), any float dtype, to (N, K, H, W) float32.

    Classes stand before positions here. Some devices fill the last axis of what they keep up to a multiple of 128,
    which of the logits of few classes would make many times their size.
    """
    rows, columns = _matrices(logits, size, align_corners)
    return einsum("Hh,Ww,nhwk->nkHW", rows, columns, logits.astype(jnp.float32), optimize=_ROWS_FIRST)


def segmentation_loss(
    logits: jax.Array,
    classes: jax.Array,
    *,
    align_corners: bool,
    labelled_only: bool,
    axis_name: str | None = None,
) -> jax.Array:
    """Cross-entropy of an index map and of coarser logits, resized to it: ``sum_p -log softmax(z_p)[y_p] / count``.

    The sum is over the labelled pixels p, on all devices; the count is that of the same pixels, or of all pixels there
    are (MMSegmentation's default, ``avg_non_ignore=False``), those in the padding included. Where nothing is labelled
    the loss is 0, and so is its gradient.

    Of the resized logits nothing is kept for the backward pass, which makes them anew, image by image.

    >>> logits, classes = jnp.zeros((1, 1, 1, 4)), jnp.array([[[3, IGNORED]]], jnp.uint8)
    >>> for labelled_only in (True, False):  # log 4, and half of it
    ...     print(segmentation_loss(logits, classes, align_corners=False, labelled_only=labelled_only).round(4))
    1.3863
    0.6931

    Args:
        logits: (N, h, w, K), any float dtype.
        classes: (N, H, W) integers in [0, K), or ``IGNORED``.
        align_corners: see :func:`bilinear`.
        labelled_only: whether the count is of labelled pixels.
        axis_name: mapped axis over which the count is averaged: the mean over devices of the result is then the global
            loss, however unevenly labelled pixels fall on them. None outside of one.

    Returns:
        A float32 scalar.
    """

    @jax.checkpoint
    def total(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits, classes = image
        z = pixel_logits(logits[None], classes.shape, align_corners=align_corners)[0]
        chosen = jnp.arange(len(z))[:, None, None] == classes[None]
        loss = jax.nn.logsumexp(z, axis=0) - jnp.sum(jnp.where(chosen, z, 0), axis=0)
        return masked_sum(loss, classes != IGNORED)

    sums = jax.lax.map(total, (logits, classes))
    if labelled_only:
        return jnp.sum(sums) / mean_count(jnp.sum(classes != IGNORED), axis_name)
    return jnp.sum(sums) / classes.size


def _matrices(x: jax.Array, size: tuple[int, ...], align_corners: bool) -> tuple[jax.Array, jax.Array]:
    """What the rows and the columns of (N, h, w, C) are multiplied with to have a size."""
    height, width = size
    return jnp.asarray(bilinear(x.shape[1], height, align_corners)), jnp.asarray(
        bilinear(x.shape[2], width, align_corners)
    )
