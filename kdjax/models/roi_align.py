"""RoIAlign over a feature pyramid (He et al., Mask R-CNN, 2017; Lin et al., Feature Pyramid Networks, 2017).

A bin of an RoI is the mean of bilinear samples on a regular grid. Bilinear interpolation and the grid are separable, so
that the bins of an RoI are ``Wy F Wx^T``, where row p of ``Wy`` says how much of each row of the map enters bin p.

Of the map only the cells under the RoI have weight. They are covered by square tiles, few for small RoIs and many for
large ones, and the tiles of all RoIs of a level are worked off in blocks of equally many: work follows the cells that
RoIs cover, memory does not, and neither the number of samples nor the size of an RoI is bounded.

A tile may begin in any row of the map, but in every eighth column only. It is thus made of whole segments of rows, and
to gather segments, and to add to them, is to index the first axis of an array, which all processors do well. Windows
that begin anywhere a TPU would add one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import boxes as box_ops

_TILE = 8
"""Cells along the side of a tile."""
_BLOCK = 64
"""Tiles that are worked off together on a CPU, as many as its caches hold; other devices get 16 times as many."""


def roi_levels(boxes: jax.Array, lowest: int, highest: int, *, nudge_side: bool) -> jax.Array:
    """The pyramid level that each RoI is pooled from: (..., 4) to (...) int32, i for the map of stride 2^i.

    Large RoIs come from coarse levels: ``floor(4 + log2(sqrt(area) / 224) + 1e-6)`` in torchvision (FPN, equation
    1), and ``2 + floor(log2(sqrt(area) / 56 + 1e-6))`` in MMDetection, the same but for rounding.

    Args:
        boxes: xyxy in pixels of the padded image.
        lowest: finest level there is; smaller RoIs are pooled from it as well.
        highest: coarsest level there is.
        nudge_side: whether the side is what 1e-6 is added to (MMDetection), or the level (torchvision).
    """
    side = jnp.sqrt(box_ops.area(boxes))
    level = 2 + jnp.floor(jnp.log2(side / 56 + 1e-6)) if nudge_side else jnp.floor(4 + jnp.log2(side / 224) + 1e-6)
    return jnp.clip(level, lowest, highest).astype(jnp.int32)


def roi_align(
    maps: dict[int, jax.Array],
    boxes: jax.Array,
    levels: jax.Array,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> jax.Array:
    """Pools R RoIs of each image, every one from its own level.

    As the operators of that name in torchvision and MMCV, with samples outside the map taking the value of its border.
    That is how torchvision's implementation in Python does it; compiled ones count samples further out than one cell as
    zero, which of RoIs inside the image only concerns those smaller than a cell, at the lower or right border, where
    ``aligned`` is False. Boxes and levels get no gradient.

    Args:
        maps: by their strides, {4: (N, H, W, C), ...}, powers of two.
        boxes: (N, R, 4) xyxy in pixels of the padded image.
        levels: (N, R) int32 of :func:`roi_levels`; an RoI of a level that is not in ``maps`` is pooled to zeros.
        output_size: o, bins along each side.
        sampling_ratio: samples of a bin along each axis; 0 is as many as the bin has cells, rounded up, of each RoI and
            axis (MMDetection's default).
        aligned: whether a cell's value stands for its centre (MMDetection). Otherwise for its upper left corner, and
            RoIs are at least one cell wide and high (torchvision's detectors).

    Returns:
        (N, R, o, o, C) of the features' dtype.
    """
    return _pool(_Grid(output_size, sampling_ratio, aligned), maps, boxes, levels)


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
        begin, end = _extent(interval, aligned)
        size = (end - begin) / bins
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


class _Grid(NamedTuple):
    """How an RoI is sampled; see :func:`roi_align`."""

    bins: int
    sampling_ratio: int
    aligned: bool


class _Tiles(NamedTuple):
    """A block of B tiles of one level's map, each as one RoI sees it."""

    roi: jax.Array
    """(B,) int32, ascending: the RoIs that they belong to, counted over all images."""
    segments: jax.Array
    """(B, tile) int32: the segments of :func:`_cut` that they are made of."""
    rows: jax.Array
    """(B, o, tile) float32: their part of ``Wy``, zero where there is no tile."""
    columns: jax.Array
    """(B, o, tile) float32: their part of ``Wx``, likewise."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(grid: _Grid, maps: dict[int, jax.Array], boxes: jax.Array, levels: jax.Array) -> jax.Array:
    """See :func:`roi_align`."""
    return _by_platform(_pooled, grid, maps, boxes, levels)


def _pool_forward(
    grid: _Grid, maps: dict[int, jax.Array], boxes: jax.Array, levels: jax.Array
) -> tuple[jax.Array, tuple]:
    return _pool(grid, maps, boxes, levels), (maps, boxes, levels)


def _pool_backward(grid: _Grid, saved: tuple, gradient: jax.Array) -> tuple[dict[int, jax.Array], None, None]:
    return _by_platform(_spread, grid, *saved, gradient), None, None


_pool.defvjp(_pool_forward, _pool_backward)


def _by_platform(function: Callable[..., Any], grid: _Grid, *arrays: Any) -> Any:
    """``function(grid, block, *arrays)`` with blocks of tiles as large as suits what the program is compiled for."""
    small, large = (functools.partial(function, grid, block) for block in (_BLOCK, 16 * _BLOCK))
    return jax.lax.platform_dependent(*arrays, cpu=small, default=large)


def _pooled(grid: _Grid, block: int, maps: dict[int, jax.Array], boxes: jax.Array, levels: jax.Array) -> jax.Array:
    """The bins of all RoIs, tile by tile."""
    channels, dtype = next((x.shape[-1], x.dtype) for x in maps.values())

    def add_bins(cells: jax.Array, pooled: jax.Array, tiles: _Tiles) -> jax.Array:
        bins = _contract(tiles.rows, tiles.columns, cells.at[tiles.segments].get(mode="clip"))
        return pooled.at[tiles.roi].add(bins, indices_are_sorted=True, mode="clip")

    pooled = jnp.zeros((levels.size, grid.bins, grid.bins, channels), jnp.float32)
    for stride, x in maps.items():
        add = functools.partial(add_bins, _cut(x))
        pooled = _over_tiles(add, pooled, grid, block, stride, x.shape, boxes, levels)
    return pooled.reshape(*levels.shape, *pooled.shape[1:]).astype(dtype)


def _spread(
    grid: _Grid, block: int, maps: dict[int, jax.Array], boxes: jax.Array, levels: jax.Array, gradient: jax.Array
) -> dict[int, jax.Array]:
    """The gradients of the maps: those of the bins spread over the cells, ``Wy^T G Wx`` for each RoI."""
    bins = gradient.reshape(levels.size, *gradient.shape[2:])

    def add_cells(spread: jax.Array, tiles: _Tiles) -> jax.Array:
        rows, columns = (jnp.swapaxes(weights, 1, 2) for weights in (tiles.rows, tiles.columns))
        seen = bins.at[tiles.roi].get(indices_are_sorted=True, mode="clip")
        return spread.at[tiles.segments].add(_contract(rows, columns, seen), mode="clip")

    spread = {}
    for stride, x in maps.items():
        start = jnp.zeros(jax.eval_shape(_cut, x).shape, jnp.float32)
        cells = _over_tiles(add_cells, start, grid, block, stride, x.shape, boxes, levels)
        spread[stride] = _join(cells, x.shape).astype(x.dtype)
    return spread


def _cut(x: jax.Array) -> jax.Array:
    """A map (N, H, W, C) as the segments of its rows, (N * H * ceil(W / tile), tile, C), zeros beyond its border."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _TILE), (0, 0)))
    return x.reshape(-1, _TILE, x.shape[3])


def _join(segments: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`_cut`, for a map of ``shape``."""
    n, height, width, channels = shape
    return segments.reshape(n, height, -1, channels)[:, :, :width]


def _over_tiles(
    function: Callable[[jax.Array, _Tiles], jax.Array],
    total: jax.Array,
    grid: _Grid,
    block: int,
    stride: int,
    shape: tuple[int, ...],
    boxes: jax.Array,
    levels: jax.Array,
) -> jax.Array:
    """``function(total, tiles)`` of all tiles of the map of ``stride`` and ``shape``, ``block`` after ``block``."""
    _, height, width, _ = shape
    lengths = jnp.array([[height, width]])

    # Of each RoI, along y and x: where it lies, where the first of its tiles begins, and how many it has.
    intervals = jnp.swapaxes(boxes.reshape(-1, 2, 2), 1, 2)[:, ::-1] / stride
    begin, end = _extent(intervals, grid.aligned)
    first, last = (jnp.clip(jnp.floor(x), 0, lengths - 1).astype(jnp.int32) for x in (begin, end + 1))
    first -= first % jnp.array([[1, _TILE]])
    tiles = (last - first) // _TILE + 1
    number = jnp.where(levels.reshape(-1) == stride.bit_length() - 1, tiles[:, 0] * tiles[:, 1], 0)
    ends = jnp.cumsum(number)

    def tiles_of(index: jax.Array) -> _Tiles:
        item = index * block + jnp.arange(block)
        # The first RoI whose tiles end behind the item; searchsorted takes no number of RoIs that is left open.
        roi = jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32)
        roi = jnp.minimum(roi, levels.size - 1)
        own, across = item - (ends[roi] - number[roi]), tiles[:, 1][roi]
        corner = first[roi] + _TILE * jnp.stack([own // across, own % across], axis=1)
        cells = corner[..., None] + jnp.arange(_TILE)[None, None]
        weights = axis_weights(intervals[roi], cells, lengths, **grid._asdict())
        there = item < ends[-1]
        # Cells beyond the map have no weight, and the last row stands for them.
        lines = height * (roi // levels.shape[1])[:, None] + jnp.minimum(cells[:, 0], height - 1)
        segments = -(-width // _TILE) * lines + corner[:, 1:] // _TILE
        weights = jnp.where(there[:, None, None, None], weights, 0)
        return _Tiles(roi, jnp.where(there[:, None], segments, 0), rows=weights[:, 0], columns=weights[:, 1])

    _, total = jax.lax.while_loop(
        lambda state: state[0] * block < ends[-1],
        lambda state: (state[0] + 1, function(state[1], tiles_of(state[0]))),
        (jnp.int32(0), total),
    )
    return total


def _contract(rows: jax.Array, columns: jax.Array, cells: jax.Array) -> jax.Array:
    """``rows cells columns^T``: (B, p, y), (B, q, x) and (B, y, x, C) to (B, p, q, C) float32.

    As two batched matrix products of arrays that lie in memory as they are, which einsum would transpose.
    """
    batch, p, y = rows.shape
    q, x = columns.shape[1:]
    multiply = functools.partial(jnp.matmul, precision="highest")
    mixed = multiply(rows, cells.astype(jnp.float32).reshape(batch, y, -1)).reshape(batch * p, x, -1)
    return multiply(jnp.repeat(columns, p, axis=0), mixed).reshape(batch, p, q, -1)


def _extent(interval: jax.Array, aligned: bool) -> tuple[jax.Array, jax.Array]:
    """Where samples begin and end: intervals (..., 2) in cells to two arrays (...), in indices of cells."""
    if aligned:
        return interval[..., 0] - 0.5, jnp.maximum(interval[..., 1], interval[..., 0]) - 0.5
    return interval[..., 0], jnp.maximum(interval[..., 1], interval[..., 0] + 1)
