"""Anchors of a feature pyramid, in the two kinds that published detectors were trained with.

Exact ones (MMDetection): of exact sizes, centred on (column * stride, row * stride).
Others (torchvision): the sizes cut to whole pixels and the corners rounded, and the stride of a level is the height
(width) of the padded image divided by that of the map, rounded down, which is not the stride where a map's size was
rounded up.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import centres_of


def base_anchors(
    stride: int, *, scale: float, octaves: int, ratios: tuple[float, ...], exact: bool = True
) -> np.ndarray:
    """The anchors of one location, centred on the origin: (len(ratios) * octaves, 4) float32, xyxy in pixels.

    Sizes are ``stride * scale * 2^(i / octaves)`` for i in 0..octaves-1, the square root of the anchor's area; ratios
    are height / width. Ratios vary slowest, as in both originals.
    """
    sizes = stride * scale * 2.0 ** (np.arange(octaves) / octaves)
    if not exact:
        sizes = np.floor(sizes)
    root = np.sqrt(np.asarray(ratios, np.float32))
    widths, heights = (np.outer(r, sizes.astype(np.float32)).reshape(-1) for r in (1 / root, root))
    anchors = np.stack([-widths, -heights, widths, heights], axis=-1) / 2
    return anchors if exact else np.round(anchors)


def grid_anchors(base: np.ndarray, size: tuple[int, int], strides: tuple[int, int]) -> jax.Array:
    """Anchors ``base`` (B, 4) at every location of a map of ``size`` (H, W): (H * W * B, 4), row-major, base fastest.

    ``strides`` are the vertical and the horizontal distance of two locations in pixels.
    """
    y, x = (jnp.arange(n, dtype=jnp.float32) * step for n, step in zip(size, strides, strict=True))
    y, x = (shift[..., None] for shift in jnp.meshgrid(y, x, indexing="ij"))
    shifts = jnp.concatenate([x, y, x, y], axis=-1)
    return (shifts[:, :, None] + base[None, None]).reshape(-1, 4)


def pyramid_anchors(
    sizes: Mapping[str, tuple[int, int]],
    strides: Mapping[str, int],
    *,
    scale: float,
    octaves: int,
    ratios: tuple[float, ...],
    exact: bool = True,
) -> dict[str, jax.Array]:
    """The anchors of a pyramid.

    Args:
        sizes: level name to (height, width) of its map, the finest level first.
        strides: level name to pixels of the image between two positions of its map.
        scale: size of the smallest anchor of a level in strides.
        octaves: anchors of a ratio, spread over one octave of size.
        ratios: height / width.
        exact: see the top of this file. Where they are not, the padded image is taken to be the finest map's size times
            its stride, that is, a multiple of that stride, as torchvision pads it.

    Returns:
        Level name to (height * width * anchors of a location, 4) float32, xyxy in pixels of the padded image.
    """
    finest = next(iter(sizes))
    anchors = {}
    for level, (height, width) in sizes.items():
        step = strides[level]
        base = base_anchors(step, scale=scale, octaves=octaves, ratios=ratios, exact=exact)
        steps = (step, step)
        if not exact:
            steps = (sizes[finest][0] * strides[finest] // height, sizes[finest][1] * strides[finest] // width)
        anchors[level] = grid_anchors(base, (height, width), steps)
    return anchors


def scale_for(sizes: Sequence[float], *, quantile: float, stride: int, least: float, most: float) -> float:
    """The scale, in quarters of a stride, that suits a quantile of the sizes of objects in pixels.

    >>> scale_for([10.0, 20.0, 30.0], quantile=0.5, stride=8, least=1.0, most=4.0)
    2.5
    """
    return float(np.clip(round(4 * float(np.quantile(sizes, quantile)) / stride) / 4, least, most))


def padded(image_size: jax.Array) -> jax.Array:
    """The next multiples of 32 of heights and widths (..., 2): to these the originals pad single images."""
    return -(-image_size // 32) * 32


def centres_inside(anchors: jax.Array, image_size: jax.Array) -> jax.Array:
    """Which anchors (A, 4) are centred inside an image of height and width ``image_size`` (2,): (A,) bool."""
    centre = centres_of(anchors)
    return jnp.all(centre < image_size[None, ::-1], axis=-1)
