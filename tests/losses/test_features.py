import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses


@pytest.mark.parametrize("stride", [4, 8, 32])
def test_valid_positions_are_those_with_a_pixel_of_the_image(stride: int) -> None:
    sizes, padded = [(64, 96), (61, 33), (64, 1), (0, 0)], (64, 96)
    actual = losses.valid_positions(jnp.array(sizes), (padded[0] // stride, padded[1] // stride), stride)
    for (height, width), level in zip(sizes, actual, strict=True):
        pixels = np.zeros(padded, bool)
        pixels[:height, :width] = True
        cells = pixels.reshape(padded[0] // stride, stride, padded[1] // stride, stride)
        np.testing.assert_array_equal(level, cells.any(axis=(1, 3)))


def test_hide_keeps_dtype_and_keeps_nan_out() -> None:
    features = jnp.full((1, 2, 2, 3), jnp.nan, jnp.bfloat16).at[0, 0, 0].set(1)
    where = jnp.array([[[True, False], [False, False]]])
    hidden = losses.hide(features, where=where)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_array_equal(hidden.astype(jnp.float32).sum(), 3)


def test_nan_in_the_padding_has_no_value_and_no_gradient() -> None:
    student = jnp.ones((1, 2, 2, 3)).at[0, 1].set(jnp.nan)
    where = jnp.array([[[True, True], [False, False]]])
    loss = lambda student: losses.mimic_loss(student, jnp.zeros((1, 2, 2, 3)), where=where)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    assert float(value) == 1
    np.testing.assert_allclose(gradient[0], np.stack([np.full((2, 3), 1 / 3), np.zeros((2, 3))]), rtol=1e-6)


def test_small_differences_of_bfloat16_survive() -> None:
    """Taken in bfloat16 they would be rounded: 3.01 - 3.00 of 2**20 entries came out at 256 instead of 105."""
    student, teacher = jnp.full((1, 1, 1, 8), 3.01, jnp.bfloat16), jnp.full((1, 1, 1, 8), 3.0, jnp.bfloat16)
    expected = (np.asarray(student, np.float64) - 3.0) ** 2
    np.testing.assert_allclose(losses.squared_error(student, teacher), expected, rtol=1e-6)


def test_masked_reductions_against_numpy() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    where = np.random.default_rng(1).random((3, 4, 1)) < 0.5
    where[0] = False
    selected = np.broadcast_to(where, values.shape)
    np.testing.assert_allclose(losses.masked_sum(values, where), values[selected].sum(), rtol=1e-5)
    np.testing.assert_allclose(losses.masked_mean(values, where), values[selected].mean(), rtol=1e-5)
    by_row = [values[n][selected[n]].mean() if selected[n].any() else 0 for n in range(3)]
    np.testing.assert_allclose(losses.masked_mean(values, where, axis=(1, 2)), by_row, rtol=1e-5)
