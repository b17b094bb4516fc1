"""Detection losses against float64 NumPy, value and derivative, and where naive formulas overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses.detection import (
    binary_cross_entropy,
    giou_loss,
    iou_loss,
    l1_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)

RNG = np.random.default_rng(0)


def focal(x, target, alpha, gamma):
    p = 1 / (1 + np.exp(-x))
    return np.where(target, -alpha * (1 - p) ** gamma * np.log(p), -(1 - alpha) * p**gamma * np.log(1 - p))


def derivative(f, x, step=1e-6):
    return (f(x + step) - f(x - step)) / (2 * step)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.75, 0.5)])
def test_focal_loss_and_its_gradient_are_the_papers(alpha, gamma):
    x, target = RNG.normal(0, 3, 200), RNG.random(200) < 0.5

    def ours(x):
        return sigmoid_focal_loss(x, target, alpha=alpha, gamma=gamma)

    x32 = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(ours(x32), focal(x, target, alpha, gamma), rtol=2e-5, atol=1e-7)
    gradient = jax.grad(lambda x: jnp.sum(ours(x)))(x32)
    np.testing.assert_allclose(gradient, derivative(lambda x: focal(x, target, alpha, gamma), x), rtol=1e-4, atol=1e-6)


def test_focal_loss_of_extreme_logits_is_finite_and_right():
    logits = jnp.array([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
    for target, expected in (
        (True, [0.25e30, 0.25e4, 25.0, 0.25 * 0.25 * np.log(2), 0, 0, 0]),
        (False, [0, 0, 0, 0.75 * 0.25 * np.log(2), 75.0, 0.75e4, 0.75e30]),
    ):
        targets = jnp.full(logits.shape, target)
        np.testing.assert_allclose(sigmoid_focal_loss(logits, targets), expected, rtol=1e-5, atol=1e-30)
        assert np.isfinite(jax.grad(lambda x, t=targets: jnp.sum(sigmoid_focal_loss(x, t)))(logits)).all()


def test_cross_entropy_and_its_gradient_are_the_formula():
    x, target = RNG.normal(0, 3, 50), RNG.random(50)
    p = 1 / (1 + np.exp(-x))
    expected = -target * np.log(p) - (1 - target) * np.log(1 - p)
    np.testing.assert_allclose(binary_cross_entropy(jnp.asarray(x, jnp.float32), target), expected, rtol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(binary_cross_entropy(x, target)))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gradient, p - target, rtol=1e-4, atol=1e-6)
    # Of extreme logits: one that is right, one that is wrong.
    np.testing.assert_allclose(binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([True, True])), [0, 1e4])


def test_l1_and_smooth_l1_by_hand():
    predictions, targets = jnp.array([0.0, 1.0, 3.0, -2.0]), jnp.array([0.0, 1.25, 1.0, -2.5])
    np.testing.assert_array_equal(l1_loss(predictions, targets), [0, 0.25, 2, 0.5])
    np.testing.assert_allclose(smooth_l1_loss(predictions, targets, beta=0.5), [0, 0.0625, 1.75, 0.25])
    slope = jax.grad(lambda x: jnp.sum(smooth_l1_loss(x, targets, beta=0.5)))(predictions)
    np.testing.assert_allclose(slope, [0, -0.5, 1, 1])


def test_giou_by_hand():
    box = [0.0, 0.0, 2.0, 2.0]
    others = jnp.array([box, [1, 0, 3, 2], [2, 2, 4, 4], [4, 0, 6, 2]])
    # IoU 1, 2/6, 0, 0; enclosing boxes of 4, 6, 16 and 12 pixels around unions of 4, 6, 8 and 8.
    expected = [0, 1 - 1 / 3, 1 + 8 / 16, 1 + 4 / 12]
    np.testing.assert_allclose(giou_loss(jnp.array([box] * 4), others), expected, rtol=1e-6, atol=1e-6)


def test_iou_by_hand():
    box = [0.0, 0.0, 2.0, 2.0]
    others = jnp.array([box, [1, 0, 3, 2], [2, 2, 4, 4]])
    # IoU 1, 2/6 and 0, which counts as 1e-6.
    np.testing.assert_allclose(iou_loss(jnp.array([box] * 3), others), np.log([1, 3, 1e6]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [iou_loss, giou_loss])
def test_overlap_of_empty_boxes_has_a_finite_gradient(loss):
    empty = jnp.zeros((1, 4))
    value, gradient = jax.value_and_grad(lambda box: jnp.sum(loss(box, empty)))(empty)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [l1_loss, smooth_l1_loss, iou_loss, giou_loss])
def test_regression_losses_are_computed_in_float32(loss):
    # 300 and 301 are one number in bfloat16, so are they after a subtraction in bfloat16.
    predictions = jnp.array([[1.0, 2.0, 3.0, 260.0]], jnp.bfloat16)
    targets = jnp.array([[1.0, 2.0, 3.0, 260.5]], jnp.float32)
    value = loss(predictions, targets)
    assert value.dtype == jnp.float32
    assert jnp.sum(value) > 0


def test_focal_loss_is_computed_in_float32():
    value = sigmoid_focal_loss(jnp.array([-3.0], jnp.bfloat16), jnp.array([False]))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, focal(-3.0, False, 0.25, 2.0), rtol=1e-5)
