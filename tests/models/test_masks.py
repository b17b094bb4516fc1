"""Mask targets are what RoIAlign of the whole mask image gives."""

import functools

import jax
import numpy as np
import pytest

from kdjax.data.masks import mask_grid
from kdjax.models.masks import mask_targets
from kdjax.types import Masks
from tests.models.test_roi_align import pool

HEIGHT, WIDTH, SIZE = 40, 56, 6

targets = jax.jit(mask_targets, static_argnames=("size", "aligned", "binary"))


def objects() -> np.ndarray:
    """Three masks (3, 40, 56) bool: in the middle, at two borders, and a frame around the image."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ragged = np.random.default_rng(0).normal(0, 2, (HEIGHT, WIDTH))
    frame = (np.minimum(y, HEIGHT - 1 - y) < 3) | (np.minimum(x, WIDTH - 1 - x) < 3)
    return np.stack([np.hypot(y - 20, x - 25) + ragged < 11, (y + ragged > 30) & (x > 40), frame])


def batch(cells: int) -> Masks:
    """One image with these objects."""
    grids, frames = zip(*(mask_grid(mask, cells) for mask in objects()), strict=True)
    return Masks(np.stack(grids)[None], np.stack(frames)[None])


def rois(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """RoIs inside the image, some of them up to its borders, and the objects that they have."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.uniform(-4, [WIDTH + 4, HEIGHT + 4], (20, 2, 2)), axis=1).reshape(20, 4)
    boxes = np.clip(ends, 0, [WIDTH, HEIGHT] * 2).astype(np.float32)
    boxes[0] = 0, 0, WIDTH, HEIGHT
    return boxes[None], rng.integers(0, 3, (1, 20)).astype(np.int32)


@pytest.mark.parametrize("mmdet", [True, False])
def test_masks_on_pixels_are_pooled_exactly(mmdet):
    boxes, matched = rois(1)
    limits = np.array([[HEIGHT, WIDTH]], np.int32)
    actual = targets(batch(WIDTH), boxes, matched, limits, size=SIZE, aligned=mmdet, binary=mmdet)
    pooled = np.stack(
        [
            pool(mask[..., None], box, scale=1, output_size=SIZE, sampling_ratio=0, aligned=mmdet)[0]
            for mask, box in zip(objects()[matched[0]].astype(float), boxes[0], strict=True)
        ]
    )[..., 0]
    assert 0.2 < pooled.mean() < 0.8
    if mmdet:
        clear = np.abs(pooled - 0.5) > 1e-5
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(actual[0][clear], pooled[clear] >= 0.5)
    else:
        np.testing.assert_allclose(actual[0], pooled, atol=1e-5)


def test_the_border_is_where_the_mask_image_ends():
    # Where a mask image is padded, an object at the border of the image fades into the padding.
    boxes, matched = np.array([[[40.0, 20.0, WIDTH, HEIGHT]]], np.float32), np.array([[1]], np.int32)
    run = functools.partial(targets, batch(WIDTH), boxes, matched, size=28, aligned=False, binary=False)
    at_the_border, inside = (run(np.array([size], np.int32)) for size in ((HEIGHT, WIDTH), (HEIGHT, WIDTH + 8)))
    np.testing.assert_array_equal(at_the_border[..., :-2], inside[..., :-2])
    assert (at_the_border[0, 0, -1, -1], inside[0, 0, -1, -1]) == (1, pytest.approx(0.286, abs=1e-3))


def test_masks_on_larger_cells_are_nearly_the_same():
    boxes, matched = rois(2)
    limits = np.array([[HEIGHT, WIDTH]], np.int32)
    exact, coarse = (
        targets(batch(cells), boxes, matched, limits, size=SIZE, aligned=True, binary=True) for cells in (WIDTH, 22)
    )
    large = np.prod(boxes[0, :, 2:] - boxes[0, :, :2], axis=1) > 100
    assert large.sum() > 10
    assert np.mean(exact[0][large] != coarse[0][large]) < 0.05
