"""RoIs pooled tile by tile have the values and gradients of the definition, sample by sample."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.boxes import area
from kdjax.models.roi_align import roi_align, roi_levels

CHANNELS = 5
SIZES = {4: (24, 41), 32: (3, 6)}
"""By stride."""


def pool(map_, box, *, scale, output_size, sampling_ratio, aligned, gradient=None):
    """One RoI of one map (H, W, C) by the definition, and the gradient of the map where that of the bins is given."""
    height, width, _ = map_.shape
    spread = np.zeros_like(map_)
    x1, y1, x2, y2 = (np.float32(v) * np.float32(scale) - np.float32(0.5 * aligned) for v in box)
    least = 0 if aligned else 1
    sides = max(y2 - y1, np.float32(least)), max(x2 - x1, np.float32(least))
    bin_sizes = [side / np.float32(output_size) for side in sides]
    counts = [sampling_ratio or math.ceil(size) for size in bin_sizes]
    pooled = np.zeros((output_size, output_size, map_.shape[2]))

    def corners(value, length):
        """The two cells next to a sample and their weights, the sample moved into the map first."""
        value = min(max(value, 0.0), length - 1.0)
        low = min(int(value), length - 1)
        return (low, 1 - (value - low)), (min(low + 1, length - 1), value - low)

    for p in range(output_size):
        for q in range(output_size):
            for i in range(counts[0]):
                for j in range(counts[1]):
                    y = y1 + p * bin_sizes[0] + (i + 0.5) * bin_sizes[0] / counts[0]
                    x = x1 + q * bin_sizes[1] + (j + 0.5) * bin_sizes[1] / counts[1]
                    for row, row_weight in corners(y, height):
                        for column, column_weight in corners(x, width):
                            weight = row_weight * column_weight / (counts[0] * counts[1])
                            pooled[p, q] += weight * map_[row, column]
                            if gradient is not None:
                                spread[row, column] += weight * gradient[p, q]
    return pooled, spread


class Scene(NamedTuple):
    """Two images with RoIs of all kinds."""

    maps: dict[int, np.ndarray]
    boxes: np.ndarray
    levels: np.ndarray


@pytest.fixture(scope="module")
def scene() -> Scene:
    rng = np.random.default_rng(0)
    maps = {stride: rng.normal(size=(2, *size, CHANNELS)).astype(np.float32) for stride, size in SIZES.items()}
    height, width = 96.0, 164.0
    corner, side = rng.uniform(0, [150, 80], (30, 2)), np.exp(rng.uniform(0, 4.5, (30, 2)))
    boxes = np.concatenate([corner, np.minimum(corner + side, [width, height])], axis=1)
    special = [
        [0, 0, width, height],  # The whole image.
        [0, 40, width, 42],  # A thin one.
        [-30, -20, 10, 12],  # Reaching out.
        [150, 90, 190, 130],
        [163.5, 95.5, width, height],  # Smaller than a cell, at the corner.
        [50, 30, 50, 30],  # Empty.
        [0, 0, 0, 0],
        [4, 4, 32, 60],  # On the borders of cells.
    ]
    boxes = np.concatenate([boxes, special]).reshape(2, -1, 4).astype(np.float32)
    levels = rng.choice([2, 3, 5], boxes.shape[:2]).astype(np.int32)
    levels.reshape(-1)[-8:] = [2, 2, 5, 2, 2, 2, 5, 2]
    return Scene(maps, boxes, levels)


@pytest.mark.parametrize(
    ("output_size", "sampling_ratio", "aligned"), [(3, 2, False), (2, 0, True)], ids=["torchvision", "mmdet"]
)
def test_values_and_gradients_are_those_of_the_definition(scene, output_size, sampling_ratio, aligned):
    options = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    upstream = np.random.default_rng(1).normal(size=(*scene.levels.shape, output_size, output_size, CHANNELS))
    expected = np.zeros_like(upstream)
    gradients = {stride: np.zeros(x.shape) for stride, x in scene.maps.items()}
    for image, roi in np.ndindex(*scene.levels.shape):
        stride = 2 ** int(scene.levels[image, roi])
        if stride == 8:  # Of which there is no map.
            continue
        expected[image, roi], spread = pool(
            scene.maps[stride][image].astype(float),
            scene.boxes[image, roi],
            scale=1 / stride,
            gradient=upstream[image, roi],
            **options,
        )
        gradients[stride][image] += spread

    @jax.jit
    def run(maps, boxes, levels, upstream):
        pooled, pull = jax.vjp(functools.partial(roi_align, **options), maps, boxes, levels)
        return pooled, *pull(upstream)[:2]

    pooled, actual, to_boxes = run(*scene, upstream.astype(np.float32))
    np.testing.assert_allclose(pooled, expected, atol=2e-5)
    for stride in SIZES:
        np.testing.assert_allclose(actual[stride], gradients[stride], atol=2e-5 * np.abs(gradients[stride]).max())
    assert not np.any(to_boxes)


def test_bfloat16_is_pooled_in_float32(scene):
    boxes, levels = scene.boxes, jnp.full_like(scene.levels, 5)

    @jax.jit
    def run(x):
        pooled, pull = jax.vjp(lambda x: roi_align(x, boxes, levels, output_size=2, sampling_ratio=0, aligned=True), x)
        return pooled, *pull(pooled)

    x = jnp.asarray(scene.maps[32], jnp.bfloat16)
    (pooled, gradient), (exact, _) = run({32: x}), run({32: x.astype(jnp.float32)})
    assert pooled.dtype == gradient[32].dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled, exact.astype(jnp.bfloat16))


def test_memory_does_not_grow_with_the_area_of_rois_and_hardly_with_their_number():
    def temporary(rois: int) -> int:
        x, boxes, levels = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((1, 64, 64, 32), jnp.float32), ((1, rois, 4), jnp.float32), ((1, rois), jnp.int32))
        )
        run = functools.partial(roi_align, output_size=7, sampling_ratio=0, aligned=True)
        return jax.jit(run).lower({4: x}, boxes, levels).compile().memory_analysis().temp_size_in_bytes

    # Beside the result, a block of tiles, some numbers for each RoI, and a truth for each pair of tile and RoI.
    assert temporary(2000) - temporary(1000) < 1000 * 512


@pytest.mark.parametrize(
    ("side", "torchvision", "mmdet"),
    [(0, 2, 2), (111.99, 2, 2), (112, 3, 3), (224, 4, 4), (447.9, 4, 4), (448, 5, 5), (2000, 5, 5)],
)
def test_levels_change_where_sides_double(side, torchvision, mmdet):
    boxes = jnp.array([[[10.0, 20.0, 10.0 + side, 20.0 + side]]])
    for nudge_side, expected in ((False, torchvision), (True, mmdet)):
        assert roi_levels(boxes, 2, 5, nudge_side=nudge_side).tolist() == [[expected]]


def test_levels_count_areas():
    boxes = jnp.array([[0.0, 0.0, 56.0, 224.0], [0.0, 0.0, 28.0, 1000.0]])
    np.testing.assert_allclose(area(boxes), [112**2, 28000])
    assert roi_levels(boxes, 2, 5, nudge_side=True).tolist() == [3, 3]
    assert roi_levels(boxes, 3, 3, nudge_side=True).tolist() == [3, 3]


@pytest.mark.parametrize(("platform", "block"), [("cpu", 64), ("tpu", 1024)])
def test_a_program_has_the_blocks_of_what_it_is_compiled_for_and_indexes_first_axes_alone(platform, block):
    """Windows that begin anywhere a TPU adds one after the other."""
    x, boxes, levels = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((2, 40, 44, 32), jnp.float32), ((2, 50, 4), jnp.float32), ((2, 50), jnp.int32))
    )

    def run(x, boxes, levels):
        pooled, pull = jax.vjp(
            lambda x: roi_align({4: x}, boxes, levels, output_size=7, sampling_ratio=2, aligned=True), x
        )
        return pull(pooled)

    text = jax.jit(run).trace(x, boxes, levels).lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<{block}x8x8x32xf32>" in text
    assert set(re.findall(r"start_index_map = \[([\d, ]*)\]", text)) == {"0"}
    assert set(re.findall(r"scatter_dims_to_operand_dims = \[([\d, ]*)\]", text)) == {"0"}


def test_the_number_of_images_may_be_left_open():
    (images,) = jax.export.symbolic_shape("images")
    pool = functools.partial(roi_align, output_size=2, sampling_ratio=0, aligned=True)
    maps = {4: jax.ShapeDtypeStruct((images, 8, 8, 3), jnp.float32)}
    boxes, levels = jax.ShapeDtypeStruct((images, 5, 4), jnp.float32), jax.ShapeDtypeStruct((images, 5), jnp.int32)
    exported = jax.export.export(jax.jit(pool), platforms=("cpu", "cuda", "tpu"))(maps, boxes, levels)
    assert exported.out_avals[0].shape == (images, 5, 2, 2, 3)
