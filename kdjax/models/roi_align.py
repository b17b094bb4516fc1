"""RoIAlign over a feature pyramid (He et al., Mask R-CNN, 2017; Lin et al., Feature Pyramid Networks, 2017).

A bin of an RoI is the mean of bilinear samples on a regular grid. Bilinear interpolation and the grid are separable, so
that the bins of an RoI are ``Wy F Wx^T``, where row p of ``Wy`` says how much of each row of the map enters bin p.
"""

import jax
import jax.numpy as jnp

from kdjax import boxes as box_ops
from kdjax.types import Features, stride


def roi_levels(boxes: jax.Array, lowest: int, highest: int, *, convention: str) -> jax.Array:
    """The pyramid level that each RoI is pooled from: (..., 4) to (...) int32, i for level "p<i>".

    Large RoIs come from coarse levels: ``floor(4 + log2(sqrt(area) / 224) + 1e-6)`` in torchvision (FPN, equation
    1), and ``2 + floor(log2(sqrt(area) / 56 + 1e-6))`` in MMDetection, the same but for rounding.

    Args:
        boxes: xyxy in pixels of the padded image.
        lowest: finest level there is; smaller RoIs are pooled from it as well.
        highest: coarsest level there is.
        convention: "mmdet" or "torchvision".
    """
    side = jnp.sqrt(box_ops.area(boxes))
    if convention == "torchvision":
        level = jnp.floor(4 + jnp.log2(side / 224) + 1e-6)
    else:
        level = 2 + jnp.floor(jnp.log2(side / 56 + 1e-6))
    return jnp.clip(level, lowest, highest).astype(jnp.int32)


def roi_align(
    features: Features, boxes: jax.Array, levels: jax.Array, *, output_size: int, sampling_ratio: int, aligned: bool
) -> jax.Array:
    """Pools R RoIs of each image, every one from its own level.

    As the operators of that name in torchvision and MMCV, with samples outside the map taking the value of its border.
    That is how torchvision's implementation in Python does it; compiled ones count samples further out than one cell as
    zero, which of RoIs inside the image only concerns those smaller than a cell, at the lower or right border, where
    ``aligned`` is False. Boxes and levels get no gradient.

    Args:
        features: {"p2": (N, H, W, C), ...}.
        boxes: (N, R, 4) xyxy in pixels of the padded image.
        levels: (N, R) int32 of :func:`roi_levels`; an RoI of a level that is not in ``features`` is pooled to zeros.
        output_size: o, bins along each side.
        sampling_ratio: samples of a bin along each axis; 0 is as many as the bin has cells, rounded up, of each RoI and
            axis (MMDetection's default).
        aligned: whether a cell's value stands for its centre (MMDetection). Otherwise for its upper left corner, and
            RoIs are at least one cell wide and high (torchvision's detectors).

    Returns:
        (N, R, o, o, C) of the features' dtype.
    """
    channels, dtype = next((x.shape[-1], x.dtype) for x in features.values())
    pooled = jnp.zeros((*levels.shape, output_size, output_size, channels), jnp.float32)
    for level, x in features.items():
        here = levels == int(level[1:])
        x_weights, y_weights = (
            axis_weights(
                boxes[..., [axis, axis + 2]] / stride(level),
                jnp.arange(x.shape[2 - axis]),
                jnp.int32(x.shape[2 - axis]),
                bins=output_size,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
            )
            for axis in (0, 1)
        )
        y_weights = jnp.where(here[..., None, None], y_weights, 0)
        rows = jnp.einsum("nrph,nhwc->nrpwc", y_weights, x.astype(jnp.float32))
        pooled += jnp.einsum("nrqw,nrpwc->nrpqc", x_weights, rows)
    return pooled.astype(dtype)


def axis_weights(
    interval: jax.Array,
    cells: jax.Array,
    length: jax.Array,
    *,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
) -> jax.Array:
    """How much of each cell of an axis enters each bin of an RoI: rows of RoIAlign's ``Wy`` or ``Wx``.

    A sample at y gives ``1 - |y - j|`` to the cells j next to it, so that the cells before t hold ``clip(t - y, 0, 1)``
    of it. With ``y_k = first + k * step`` for k in 0..s-1 the cells before t hold of all samples

        R(t) = G(t) - G(t - 1),    G(t) = sum_k max(t - y_k, 0) = n (t - first) - step n (n - 1) / 2,

    n being the number of samples before t, and cell j gets ``(R(j + 1) - R(j)) / s``: exact for any number of samples.
    At the border, where samples take the value of the outermost cell, R(0) is 0 and R(length) the number of samples.

    Args:
        interval: (..., 2) float32, where the RoI begins and ends, in cells.
        cells: (..., L) int32 or float32, the cells that are asked for.
        length: (...) or a scalar, cells of the whole axis.
        bins: o, bins of the RoI.
        sampling_ratio: see :func:`roi_align`.
        aligned: see :func:`roi_align`.

    Returns:
        (..., o, L) float32.
    """

    def weights(interval: jax.Array, cells: jax.Array, length: jax.Array) -> jax.Array:
        begin, end = interval[0] - 0.5 * aligned, interval[1] - 0.5 * aligned
        size = jnp.maximum(end - begin, 0.0 if aligned else 1.0) / bins
        samples = jnp.float32(sampling_ratio) if sampling_ratio else jnp.ceil(size)
        step = size / jnp.maximum(samples, 1)
        first = (begin + jnp.arange(bins) * size + 0.5 * step)[:, None]

        def ramps(t: jax.Array) -> jax.Array:  # G, of t relative to the first sample.
            n = jnp.clip(jnp.floor(t / jnp.maximum(step, 1e-6)) + 1, 0, samples)
            return n * t - step * n * (n - 1) / 2

        def held_before(cell: jax.Array) -> jax.Array:  # R
            t = jnp.clip(cell - first, 0, (samples - 1) * step + 1)  # Beyond, nothing changes; large numbers round.
            return jnp.where(cell <= 0, 0, jnp.where(cell >= length, samples, ramps(t) - ramps(t - 1)))

        cells = cells[None].astype(jnp.float32)
        return (held_before(cells + 1) - held_before(cells)) / jnp.maximum(samples, 1)

    return jnp.vectorize(weights, signature="(2),(l),()->(o,l)")(interval, cells, length)
