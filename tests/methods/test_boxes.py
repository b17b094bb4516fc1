"""The imitation of a teacher's box regression; that of RoIs is tested beside RCNN, that of distances beside FCOS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.methods.boxes import BoxImitation
from kdjax.models.reppoints_head import RepPointsPredictions
from kdjax.models.retinanet import RetinaNetPredictions
from kdjax.types import View
from tests import tiny

SIZES = jnp.array([[64, 64], [32, 64]])
STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64}


def predictions(seed: int, *levels: str, channels: int = 36) -> RetinaNetPredictions:
    rng = np.random.default_rng(seed)
    shapes = {level: (2, 64 // STRIDES[level], 64 // STRIDES[level], channels) for level in levels}
    deltas = {level: jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for level, shape in shapes.items()}
    return RetinaNetPredictions(logits={}, deltas=deltas)


def loss(ours: RetinaNetPredictions, theirs: RetinaNetPredictions) -> jax.Array:
    return tiny.imitation(ours, theirs, strides=STRIDES, size=SIZES, targets=tiny.batch(2).targets)


def test_the_teachers_heads_are_asked_about_the_students_predictions_and_a_term_is_given_by_level():
    ours, asked = predictions(0, "p3", "p4"), []

    def teacher_heads(seen):
        asked.append(seen)
        return predictions(1, "p4", "p3")

    views = View({}, STRIDES, ours), View({}, STRIDES)
    given = {"size": SIZES, "targets": tiny.batch(2).targets, "teacher_heads": teacher_heads}
    terms = BoxImitation().apply({}, *views, **given)
    assert asked == [ours]
    assert list(terms["box_imitation"]) == ["p3", "p4"]
    assert all(part.shape == () and part.dtype == jnp.float32 for part in terms["box_imitation"].values())


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


def test_the_distance_may_be_absolute():
    ours, theirs = predictions(0, "p3"), predictions(1, "p3")
    views = View({}, STRIDES, ours), View({}, STRIDES)
    given = {"size": SIZES, "targets": tiny.batch(2).targets, "teacher_heads": lambda _: theirs}
    terms = BoxImitation(loss="l1").apply({}, *views, **given)
    distance = np.abs(ours.deltas["p3"] - theirs.deltas["p3"])
    expected = np.concatenate([distance[0].ravel(), distance[1, :4].ravel()]).mean()
    np.testing.assert_allclose(terms["box_imitation"]["p3"], expected, rtol=1e-5)


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


def test_the_points_of_reppoints_are_imitated_and_the_moves_count_twice_as_much():
    """Moves, not where they lead to."""
    rng = np.random.default_rng(0)

    def found():
        maps = [{"p3": jnp.asarray(rng.normal(0, 1, (2, 8, 8, 18)), jnp.float32)} for _ in range(2)]
        return RepPointsPredictions({}, *maps, {}, {})

    ours, theirs = found(), found()
    views = View({}, STRIDES, ours), View({}, STRIDES)
    given = {"size": SIZES, "targets": tiny.batch(2).targets, "teacher_heads": lambda _: theirs}
    terms = BoxImitation(beta=0.11).apply({}, *views, **given)["box_imitation"]
    assert list(terms) == ["p3_initial", "p3_refined"]
    for term, weight, (x, y) in zip(terms.values(), (0.5, 1.0), zip(ours[1:3], theirs[1:3], strict=True), strict=True):
        distance = np.abs(x["p3"] - y["p3"])
        error = np.where(distance < 0.11, distance**2 / 0.22, distance - 0.055)
        np.testing.assert_allclose(term, weight * np.concatenate([error[0], error[1, :4]]).mean(), rtol=1e-5)


def test_another_detectors_boxes_are_no_points():
    empty = RepPointsPredictions({}, {"p3": jnp.zeros((2, 8, 8, 18))}, {"p3": jnp.zeros((2, 8, 8, 18))}, {}, {})
    with pytest.raises(UserError, match=r"where both detectors are RepPoints with equal grids, .* the teacher's none"):
        loss(empty, predictions(0, "p3"))
