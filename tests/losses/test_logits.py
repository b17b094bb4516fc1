"""Knowledge distillation and channel-wise distillation by hand, and what they keep of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import cwd_loss, kd_loss


def draw(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, *shape)).astype(np.float32)
    return student, teacher


def divergence(student: np.ndarray, teacher: np.ndarray) -> float:
    """KL of two rows of logits, one number at a time."""
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (teacher, student))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def test_kd_of_images_is_the_mean_of_their_divergences() -> None:
    student, teacher = draw(3, 5)
    expected = 9 * np.mean([divergence(s / 3, t / 3) for s, t in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(kd_loss(jnp.array(student), jnp.array(teacher), temperature=3.0), expected, rtol=1e-5)


def test_cwd_compares_where_each_class_is() -> None:
    student, teacher = draw(2, 4, 3, 5)
    where = np.ones((2, 4, 3), bool)
    where[1, 2:] = False
    channels = [
        divergence(student[n][where[n]][:, c] / 4, teacher[n][where[n]][:, c] / 4) for n in range(2) for c in range(5)
    ]
    actual = cwd_loss(jnp.array(student), jnp.array(teacher), where=jnp.array(where))
    np.testing.assert_allclose(actual, 16 * np.mean(channels), rtol=1e-5)


@pytest.mark.parametrize("loss", [kd_loss, cwd_loss])
def test_other_shapes_are_refused_with_both(loss) -> None:
    student, teacher = draw(2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 5\).*\(2, 4, 3, 4\)"):
        loss(jnp.array(student), jnp.array(teacher[..., :4]))


@pytest.mark.parametrize("loss", [kd_loss, cwd_loss])
def test_next_to_nothing_is_kept_besides_the_logits(loss) -> None:
    """For the backward pass; what is as large as the logits is the logits themselves."""
    student, teacher = map(jnp.array, draw(2, 8, 8, 16))
    _, backward = jax.vjp(loss, student, teacher)
    kept = {id(x): x for x in jax.tree.leaves(backward) if hasattr(x, "size") and x.size >= student.size}
    assert len(kept) <= 2
