"""What is RepPoints' own: which location learns an object, the boxes of points, and what methods see of the neck."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models import build_model
from kdjax.models.reppoints import RepPoints, assign_nearest
from kdjax.models.reppoints_head import box_by_moments, slowed

STRIDES = (8, 16, 32)
GRID = [
    (x * stride, y * stride, stride) for stride in STRIDES for y in range(64 // stride) for x in range(64 // stride)
]


def assigned(boxes, valid, scale):
    """One object after the other, as MMDetection's PointAssigner: {location: object}."""
    learnt, distances = {}, {}
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        if not valid[index]:
            continue
        width, height = max(x2 - x1, 1e-6), max(y2 - y1, 1e-6)
        level = int((np.log2(width / scale) + np.log2(height / scale)) / 2)
        stride = 2 ** min(max(level, 3), 5)
        distance, place = min(
            (np.hypot((x - (x1 + x2) / 2) / width, (y - (y1 + y2) / 2) / height), place)
            for place, (x, y, own) in enumerate(GRID)
            if own == stride
        )
        if distance < distances.get(place, np.inf):
            learnt[place], distances[place] = index, distance
    return learnt


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_nearest_location_of_its_level_learns_an_object(scale):
    """Also where several want the same one."""
    rng = np.random.default_rng(0)
    centres, strides = (jnp.array(np.array(x, np.float32)) for x in ([p[:2] for p in GRID], [p[2] for p in GRID]))
    assign = jax.jit(functools.partial(assign_nearest, scale=scale))
    collisions = 0
    for _ in range(20):
        corners = np.sort(rng.uniform(0, 64, (12, 2, 2)).astype(np.float32), axis=1).reshape(12, 4)
        valid = rng.random(12) < 0.8
        found = assign(centres, strides, corners, valid, np.ones(len(GRID), bool))
        expected = assigned(corners, valid, scale)
        actual = {int(place): int(found.matched[place]) for place in np.flatnonzero(found.positive)}
        assert actual == expected
        np.testing.assert_array_equal(found.negative, ~found.positive)
        collisions += valid.sum() - len(expected)
    assert collisions > 0


def test_of_equally_near_objects_the_first_is_learnt_and_nobody_learns_outside():
    box = np.array([[10, 10, 30, 30]] * 2, np.float32)
    centres, strides = np.array([[16.0, 16], [48, 48]], np.float32), np.full(2, 8, np.float32)
    both = np.ones(2, bool)
    found = assign_nearest(centres, strides, box, both, both, scale=4.0)
    assert found.positive.tolist() == [True, False]
    assert found.matched[0] == 0
    found = assign_nearest(centres, strides, box, both, np.array([False, True]), scale=4.0)
    assert found.positive.tolist() == [False, True]
    assert not found.negative.any()


def test_the_box_of_points_is_their_mean_and_spread():
    points = np.random.default_rng(0).normal(0, 3, (5, 9, 2)).astype(np.float32)
    multiplier = np.array([0.2, -0.1], np.float32)
    found = box_by_moments(jnp.array(points.reshape(5, 18)), jnp.array(multiplier))
    centre, half = points.mean(1)[:, ::-1], points.std(1, ddof=1)[:, ::-1] * np.exp(multiplier)
    np.testing.assert_allclose(found, np.concatenate([centre - half, centre + half], axis=1), rtol=1e-5, atol=1e-5)


def test_points_that_are_one_have_a_finite_gradient():
    gradient = jax.grad(lambda points: box_by_moments(points, jnp.zeros(2)).sum())(jnp.ones(18))
    assert np.isfinite(gradient).all()


def test_slowed_is_the_value_with_a_share_of_the_gradient():
    value, gradient = jax.value_and_grad(lambda x: slowed(x, 0.1))(3.0)
    np.testing.assert_allclose((value, gradient), (3.0, 0.1), rtol=1e-6)


def test_methods_may_see_the_neck_before_its_norm_and_the_heads_say_the_same():
    config = {"name": "reppoints", **RepPoints.tiny}
    images = np.random.default_rng(0).normal(0, 1, (1, 64, 64, 3)).astype(np.float32)

    def made(before_norm):
        return build_model(config | {"head": {"convs": 1, "before_norm": before_norm}}, num_classes=2)

    variables = jax.jit(made(False).init)(jax.random.key(0), images)
    (after, found), (before, same) = (jax.jit(made(x).apply)(variables, images) for x in (False, True))
    assert after.keys() == before.keys() == {"p3", "p4", "p5", "p6"}
    assert not any(np.allclose(after[level], before[level]) for level in after)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, same)
