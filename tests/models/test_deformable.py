"""Deformable convolution has the values and gradients of its definition, tap by tap, as a loop.

The loop is from the paper, with MMCV's borders; on such cases the function agreed with deform_conv2d of torchvision
0.29, values and gradients, to 1e-6 of the largest entry.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.deformable import DeformableConv, deformable_conv


class Case(NamedTuple):
    size: tuple[int, int]
    channels: int
    outputs: int
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    kernel: tuple[int, int] = (3, 3)


CASES = {
    "plain": Case((5, 6), 3, 4),
    "grouped": Case((4, 5), 6, 9, groups=3),
    "strided, odd": Case((7, 5), 4, 2, groups=2, stride=2),
    "strided, even": Case((6, 8), 2, 2, stride=2),
    "strided far": Case((7, 9), 2, 2, stride=3),
    "dilated": Case((6, 5), 4, 4, groups=4, dilation=2),
    "other taps": Case((5, 4), 2, 3, kernel=(1, 5)),
    "one cell": Case((1, 1), 2, 2),
}


def values(case):
    """x, offsets and a kernel; samples fall between cells, on them, around the border and far beyond it."""
    rng = np.random.default_rng(0)
    (height, width), (tall, wide) = case.size, case.kernel
    rows, columns = math.ceil(height / case.stride), math.ceil(width / case.stride)
    x = rng.normal(size=(2, height, width, case.channels))
    offsets = rng.normal(0, 1.5, (2, rows, columns, 2 * tall * wide))
    kind = rng.random(offsets.shape)
    offsets = np.where(kind < 0.1, np.round(offsets), np.where(kind > 0.95, 1000 * offsets, offsets))
    kernel = rng.normal(size=(tall, wide, case.channels // case.groups, case.outputs))
    return x, offsets, kernel


def reference(case, x, offsets, kernel):
    """Every position, tap and corner in turn."""
    (height, width), (tall, wide) = case.size, case.kernel
    images, rows, columns, _ = offsets.shape
    inputs, outputs = case.channels // case.groups, case.outputs // case.groups
    result = np.zeros((images, rows, columns, case.outputs))
    for image, row, column, i, j in np.ndindex(images, rows, columns, tall, wide):
        down, right = offsets[image, row, column, 2 * (i * wide + j) :][:2]
        y = case.stride * row + case.dilation * (i - tall // 2) + down
        x_ = case.stride * column + case.dilation * (j - wide // 2) + right
        if not (-1 < y < height and -1 < x_ < width):
            continue
        sample = np.zeros(case.channels)
        for cell_y in (math.floor(y), math.floor(y) + 1):
            for cell_x in (math.floor(x_), math.floor(x_) + 1):
                if 0 <= cell_y < height and 0 <= cell_x < width:
                    sample += (1 - abs(y - cell_y)) * (1 - abs(x_ - cell_x)) * x[image, cell_y, cell_x]
        for group in range(case.groups):
            own = slice(group * outputs, (group + 1) * outputs)
            result[image, row, column, own] += sample[group * inputs : (group + 1) * inputs] @ kernel[i, j][:, own]
    return result


def ours(case):
    return functools.partial(deformable_conv, stride=case.stride, dilation=case.dilation, groups=case.groups)


def as_float32(arrays):
    return [np.asarray(array, np.float32) for array in arrays]


@pytest.mark.parametrize("name", CASES)
def test_has_the_values_of_the_definition(name):
    case, arrays = CASES[name], as_float32(values(CASES[name]))
    expected = reference(case, *arrays)
    np.testing.assert_allclose(jax.jit(ours(case))(*arrays), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["grouped", "strided, odd", "dilated"])
def test_has_the_gradients_of_the_definition(name):
    """Along random directions, against central differences of the loop in float64."""
    case, (x, offsets, kernel) = CASES[name], values(CASES[name])
    rng = np.random.default_rng(1)
    offsets = np.where(offsets == np.round(offsets), offsets + 0.3, offsets)  # On cells there are kinks.
    arrays = x, offsets, kernel
    upstream = rng.normal(size=reference(case, *arrays).shape)
    _, pull = jax.vjp(jax.jit(ours(case)), *as_float32(arrays))
    gradients = pull(jnp.asarray(upstream, jnp.float32))
    for index in range(3):
        for _ in range(3):
            direction = rng.normal(size=arrays[index].shape)
            low, high = (
                np.sum(
                    upstream * reference(case, *arrays[:index], arrays[index] + step * direction, *arrays[index + 1 :])
                )
                for step in (-1e-6, 1e-6)
            )
            slope = np.sum(np.asarray(gradients[index], np.float64) * direction)
            np.testing.assert_allclose(slope, (high - low) / 2e-6, rtol=1e-3)


def plain(case, x, kernel):
    padding = [(case.dilation * (size // 2),) * 2 for size in case.kernel]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (case.stride, case.stride),
        padding,
        rhs_dilation=(case.dilation, case.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=case.groups,
        precision="highest",
    )


@pytest.mark.parametrize("name", CASES)
def test_without_offsets_it_is_a_convolution(name):
    case, (x, offsets, kernel) = CASES[name], as_float32(values(CASES[name]))
    actual = ours(case)(x, np.zeros_like(offsets), kernel)
    np.testing.assert_allclose(actual, plain(case, x, kernel), rtol=1e-5, atol=1e-5)


def test_whole_offsets_move_the_map_down_first_and_then_right():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    identity = np.eye(2, dtype=np.float32)[None, None]
    offsets = np.broadcast_to(np.array([2.0, -1.0], np.float32), (1, 4, 5, 2))
    expected = np.zeros_like(x)
    expected[:, :2, 1:] = x[:, 2:, :4]
    np.testing.assert_array_equal(deformable_conv(x, offsets, identity), expected)


def test_taps_on_the_cells_outside_the_map_have_no_gradient():
    """An offset of zero leaves the taps of the border there, where MMCV counts them as outside."""
    case = CASES["plain"]
    x, offsets, kernel = as_float32(values(case))
    gradient = jax.grad(lambda offsets: ours(case)(x, offsets, kernel).sum())(np.zeros_like(offsets))
    by_tap = np.asarray(gradient).reshape(*gradient.shape[:3], 3, 3, 2)
    assert not by_tap[:, 0, :, 0].any()
    assert not by_tap[:, :, 0, :, 0].any()
    assert not by_tap[:, -1, :, 2].any()
    assert not by_tap[:, :, -1, :, 2].any()
    assert by_tap[:, :, :, 1, 1].all()


@pytest.mark.parametrize("far", [1e9, -np.inf, np.inf, np.nan])
def test_offsets_without_bound_leave_values_and_gradients_finite(far):
    case = CASES["plain"]
    x, offsets, kernel = as_float32(values(case))
    offsets = np.full_like(offsets, far)
    result, pull = jax.vjp(ours(case), x, offsets, kernel)
    assert not result.any()
    for gradient in pull(jnp.ones_like(result)):
        assert not gradient.any()


def test_bfloat16_samples_at_places_of_float32():
    case = Case((40, 300), 4, 4)
    x, offsets, kernel = as_float32(values(case))
    low = [jnp.asarray(array, jnp.bfloat16) for array in (x, offsets, kernel)]
    result = ours(case)(*low)
    assert result.dtype == jnp.bfloat16
    expected = ours(case)(*(array.astype(jnp.float32) for array in low))
    np.testing.assert_allclose(result.astype(jnp.float32), expected, rtol=0, atol=1e-2 * float(jnp.abs(expected).max()))


def test_memory_holds_the_samples_of_one_tap_at_a_time():
    case = Case((64, 64), 128, 128, groups=4)
    arrays = [jax.ShapeDtypeStruct(array.shape, np.float32) for array in values(case)]

    def gradient(*arrays):
        return jax.vjp(ours(case), *arrays)[1](arrays[0])

    # In maps as large as x: all samples would be 9, and the cells next to them, which gradients take, 36.
    for function, limit in ((ours(case), 9), (gradient, 36)):
        memory = jax.jit(function).lower(*arrays).compile().memory_analysis()
        assert memory.temp_size_in_bytes < limit * 4 * math.prod(arrays[0].shape)


def test_offsets_of_another_shape_are_refused():
    x, offsets, kernel = as_float32(values(CASES["plain"]))
    with pytest.raises(
        ValueError, match=r"offsets are \(2, 5, 6, 18\); a kernel of 3x3 with stride 2 needs \(2, 3, 3,"
    ):
        deformable_conv(x, offsets, kernel, stride=2)


def test_the_layer_makes_its_offsets_of_its_input():
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 8)).astype(np.float32)
    layer = DeformableConv(4, stride=2, groups=2)
    result, variables = layer.init_with_output(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    assert jax.tree.map(np.shape, params) == {
        "kernel": (3, 3, 4, 4),
        "conv_offset": {"kernel": (3, 3, 8, 18), "bias": (18,)},
    }
    case = Case((7, 6), 8, 4, groups=2, stride=2)
    assert not any(map(np.any, params["conv_offset"].values()))
    np.testing.assert_allclose(result, plain(case, x, params["kernel"]), rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(1)
    params["conv_offset"] = {
        name: rng.normal(0, 0.2, array.shape).astype(np.float32) for name, array in params["conv_offset"].items()
    }
    offsets = plain(Case((7, 6), 8, 18, stride=2), x, params["conv_offset"]["kernel"])
    offsets = np.asarray(offsets) + params["conv_offset"]["bias"]
    expected = reference(case, x, offsets, params["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_program_loops_over_the_taps_alone_and_indexes_first_axes_alone(platform):
    """Forwards and backwards; what is scattered to cells by two indices a TPU adds one after the other."""
    x, offsets, kernel = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 10, 12, 8), (2, 10, 12, 18), (3, 3, 8, 4))
    )

    def run(*arrays):
        y, pull = jax.vjp(deformable_conv, *arrays)
        return y, pull(y)

    text = jax.jit(run).trace(x, offsets, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") == 2
    assert set(re.findall(r"start_index_map = \[([\d, ]*)\]", text)) == {"0"}
    assert set(re.findall(r"scatter_dims_to_operand_dims = \[([\d, ]*)\]", text)) == {"0"}
