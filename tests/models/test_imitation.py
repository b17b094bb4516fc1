"""The imitation of a teacher's box regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.retinanet import RetinaNetPredictions
from tests import tiny

SIZES = jnp.array([[64, 64], [32, 64]])
TARGETS = tiny.batch(2)["targets"]._replace(image_size=SIZES)


def predictions(seed: int, *levels: str, channels: int = 36) -> RetinaNetPredictions:
    rng = np.random.default_rng(seed)
    shapes = {level: (2, 64 >> int(level[1:]), 64 >> int(level[1:]), channels) for level in levels}
    deltas = {level: jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for level, shape in shapes.items()}
    return RetinaNetPredictions(logits={}, deltas=deltas)


def loss(ours: RetinaNetPredictions, theirs: RetinaNetPredictions) -> jax.Array:
    return tiny.detector().imitate_boxes(ours, theirs, TARGETS)


def test_value_is_the_sum_over_common_levels_of_the_mean_over_valid_positions():
    ours, theirs = predictions(0, "p3", "p4", "p5"), predictions(1, "p4", "p3", "p6")
    expected = 0.0
    for level, rows in (("p3", (8, 4)), ("p4", (4, 2))):
        errors = []
        for image, height in enumerate(rows):
            distance = np.abs(ours.deltas[level][image, :height] - theirs.deltas[level][image, :height])
            errors.append(np.where(distance < 1, distance**2 / 2, distance - 0.5).ravel())
        expected += np.concatenate(errors).mean()
    np.testing.assert_allclose(loss(ours, theirs), expected, rtol=1e-5)


def test_the_teacher_gets_no_gradient():
    ours, theirs = predictions(0, "p3"), predictions(1, "p3")
    moved, fixed = jax.grad(loss, (0, 1))(ours, theirs)
    assert jnp.abs(moved.deltas["p3"][1, :4]).max() > 0
    assert jnp.abs(moved.deltas["p3"][1, 4:]).max() == 0
    assert jnp.abs(fixed.deltas["p3"]).max() == 0


@pytest.mark.parametrize(
    "theirs", [predictions(1, "p6"), predictions(1, "p3", channels=12), {"boxes": jnp.zeros((2, 4))}],
    ids=["other levels", "other anchors", "another head"],
)  # fmt: skip
def test_heads_that_cannot_be_compared_are_refused_in_words(theirs):
    with pytest.raises(ValueError, match=r"student's maps are p3 \(8, 8, 36\) and the teacher's"):
        loss(predictions(0, "p3"), theirs)
