"""MasKD against the formulas as they stand, with the convolution and the (N, H, W, K, C) tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

N, H, W, C, D, K = 3, 7, 6, 8, 5, 4


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


STUDENT, TEACHER, TOKENS = draw(0, N, H, W, C), draw(1, N, H, W, C), draw(2, K, C)
KERNELS, BIASES = (draw(3, 3, 3, C, D), draw(4, 1, 1, D, K)), (draw(5, D), draw(6, K))
WHERE = np.asarray(losses.valid_positions(jnp.array([[7, 6], [5, 3], [1, 1]]), (H, W), 1))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def weights_by_convolution(features: np.ndarray) -> np.ndarray:
    """P of one image (h, w, C) without padding: the convolution, tap by tap, then the mean, then the softmax."""
    height, width, _ = features.shape
    padded = np.pad(features.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    result = np.zeros((height, width, D))
    for row in range(height):
        for column in range(width):
            result[row, column] = np.einsum("ijc,ijcd->d", padded[row : row + 3, column : column + 3], KERNELS[0])
    logits = (result.mean(axis=(0, 1)) + BIASES[0]) @ KERNELS[1][0, 0] + BIASES[1]
    return np.exp(logits) / np.exp(logits).sum()


def loss_of_one_image(student: np.ndarray, teacher: np.ndarray, customised: bool, weights: np.ndarray) -> float:
    masks = sigmoid(teacher @ TOKENS.T) * (sigmoid(student @ TOKENS.T) if customised else 1)
    error = masks[..., None] * (student.astype(np.float64) - teacher)[..., None, :]
    return float(np.sum(weights * np.square(error).mean(axis=-1).sum(axis=(0, 1)) / masks.sum(axis=(0, 1))))


def crops(*arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    return [tuple(array[n, : WHERE[n].any(1).sum(), : WHERE[n].any(0).sum()] for array in arrays) for n in range(N)]


def test_weights_are_those_of_the_convolution_over_the_valid_area() -> None:
    expected = [weights_by_convolution(teacher) for (teacher,) in crops(TEACHER)]
    actual = losses.token_weights(jnp.asarray(TEACHER), KERNELS, BIASES, where=jnp.asarray(WHERE))
    np.testing.assert_allclose(actual, expected, rtol=2e-4)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("step", [9, 10])
def test_loss_is_the_formula_and_warm_up_counts_steps(weighted: bool, step: int) -> None:
    expected = []
    for student, teacher in crops(STUDENT, TEACHER):
        weights = weights_by_convolution(teacher) if weighted else np.full(K, 1 / K)
        expected.append(loss_of_one_image(student, teacher, step >= 10, weights))

    @jax.jit
    def loss(step: jax.Array) -> jax.Array:
        where = jnp.asarray(WHERE)
        weights = losses.token_weights(jnp.asarray(TEACHER), KERNELS, BIASES, where=where) if weighted else None
        return losses.maskd_loss(
            jnp.asarray(STUDENT),
            jnp.asarray(TEACHER),
            tokens=jnp.asarray(TOKENS),
            weights=weights,
            step=step,
            warmup=10,
            where=where,
        )

    np.testing.assert_allclose(loss(step), np.mean(expected), rtol=1e-4)


def test_dice_is_the_mean_over_ordered_pairs() -> None:
    masks = np.random.default_rng(0).random((N, H, W, K))
    pairs = [
        2 * np.sum(masks[n, ..., a] * masks[n, ..., b]) / np.sum(masks[n, ..., a] ** 2 + masks[n, ..., b] ** 2)
        for n in range(N)
        for a in range(K)
        for b in range(K)
        if a != b
    ]
    np.testing.assert_allclose(losses.token_dice_loss(jnp.asarray(masks)), np.mean(pairs), rtol=1e-5)


def test_dice_of_empty_masks_is_zero_with_zero_gradient() -> None:
    value, gradient = jax.value_and_grad(losses.token_dice_loss)(jnp.zeros((2, 3, 3, 4)))
    assert float(value) == 0
    assert not np.any(gradient)


def test_dice_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="2 tokens or more"):
        losses.token_dice_loss(jnp.ones((1, 2, 2, 1)))


def test_masked_features_keep_their_dtype() -> None:
    masked = losses.masked_features(jnp.ones((1, 2, 2, 3), jnp.bfloat16), jnp.full((1, 2, 2, 4), 0.5))
    assert masked.dtype == jnp.bfloat16
    np.testing.assert_array_equal(masked.astype(jnp.float32), np.full((1, 2, 2, 3), 2.0))


def test_nothing_of_size_tokens_times_channels_is_made() -> None:
    """The temporaries of value and gradient stay below a single such tensor."""
    student = jnp.zeros((1, 64, 64, 64))
    loss = lambda student: losses.maskd_loss(student, student, tokens=jnp.zeros((6, 64)), step=0, warmup=0)  # noqa: E731
    memory = jax.jit(jax.value_and_grad(loss)).lower(student).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 64 * 64 * 64 * 6 / 4
