"""GFL's losses and boxes against loops in float64, written from the paper; its assignment is tested with ATSS."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses.detection import distribution_focal_loss, quality_focal_loss
from kdjax.models import FPN, GFL
from kdjax.models.atss import ATSSPredictions
from kdjax.models.gfl import GFLPredictions, mean_distances
from tests.models.test_atss import CLASSES, SIZES, STRIDES, Nothing, anchors, learnt_of, maps, overlaps, rows, truth

DETECTOR = GFL(backbone=Nothing(), neck=FPN(max_level=6), num_classes=CLASSES, anchor_scale=4.0)
SIZE = np.array([[96, 128]] * 2)


def softmax(x):
    shares = np.exp(x - x.max())
    return shares / shares.sum()


def predictions(seed):
    rng = np.random.default_rng(seed)
    return GFLPredictions(maps(rng, CLASSES), maps(rng, 4 * 17))


def test_loss_is_the_formula():
    targets, given = truth(np.random.default_rng(3)), predictions(4)
    terms = jax.jit(DETECTOR.loss)(given, targets, SIZE)
    learnt, everything = learnt_of(targets), np.concatenate(anchors(4.0)).astype(np.float64)
    logits, distributions = rows(given.logits), rows(given.distributions)
    cls = box = dfl = weights = 0.0
    for image, place in np.ndindex(learnt.shape):
        index, p = learnt[image, place], 1 / (1 + np.exp(-logits[image, place]))
        quality = np.zeros(CLASSES)
        if index >= 0:
            goal, anchor = targets.boxes[image, index].astype(np.float64), everything[place]
            stride, x, y = (anchor[2] - anchor[0]) / 4, (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
            shares = [softmax(side) for side in distributions[image, place].reshape(4, 17)]
            left, top, right, bottom = (float(share @ np.arange(17)) * stride for share in shares)
            found = np.array([x - left, y - top, x + right, y + bottom])
            iou, giou = overlaps(found, goal)
            quality[targets.labels[image, index]] = iou
            weight = p.max()
            weights += weight
            box += weight * (1 - giou)
            for share, distance in zip(shares, (x - goal[0], y - goal[1], goal[2] - x, goal[3] - y), strict=True):
                t = min(max(distance / stride, 0), 15.9)
                low = int(t)
                dfl -= weight / 4 * ((low + 1 - t) * np.log(share[low]) + (t - low) * np.log(share[low + 1]))
        entropy = -quality * np.log(p) - (1 - quality) * np.log(1 - p)
        cls += float(np.sum((quality - p) ** 2 * entropy))
    count = (learnt >= 0).sum() + 1  # The image without objects counts as one.
    expected = {"cls": cls / count, "box": 2 * box / max(weights, 1), "dfl": dfl / 4 / max(weights, 1)}
    assert weights > 1
    assert {term: float(value) for term, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_a_certain_distribution_is_found_where_it_is():
    """Left 1, top 2, right 3 strides, and a bottom half between 4 and 5."""
    sides = np.full((1, 4, 17), -30.0, np.float32)
    for side, distances in enumerate(((1,), (2,), (3,), (4, 5))):
        sides[0, side, list(distances)] = 30
    np.testing.assert_allclose(mean_distances(sides.reshape(1, -1)), [[1, 2, 3, 4.5]], rtol=1e-6)
    row = GFLPredictions(jnp.zeros((1, 1, CLASSES)), jnp.asarray(sides.reshape(1, 1, -1)))
    anchor = jnp.array([[16.0 - 32, 32 - 32, 16 + 32, 32 + 32]])[None]  # Of stride 16.
    np.testing.assert_allclose(DETECTOR.boxes_of(row, anchor)[0, 0], [0, 0, 64, 104], atol=1e-4)


def test_the_distribution_loss_is_least_at_its_target_and_finite_at_the_ends():
    loss, gradient = jax.vmap(jax.value_and_grad(distribution_focal_loss))(
        jnp.array([[0.0, 0, 0], [3, 0, 0], [0, 0, 90], [0, jnp.log(3), -90]]), jnp.array([0.5, 0, 0, 0.75])
    )
    np.testing.assert_allclose(loss, [np.log(3), np.log1p(2 * np.exp(-3)), 90, 2 * np.log(2) - 0.75 * np.log(3)], 1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[3], 0, atol=1e-6)


def test_the_quality_loss_and_its_gradient_are_finite_and_zero_where_right():
    logits = jnp.array([0.0, 1000, -1000, 1000, -1000])
    quality = jnp.array([0.5, 1, 0, 0, 1])
    loss, gradient = jax.vmap(jax.value_and_grad(quality_focal_loss))(logits, quality)
    np.testing.assert_allclose(loss, [0, 0, 0, 1000, 1000], atol=1e-6)
    assert np.isfinite(gradient).all()


def test_boxes_are_imitated_as_distances_in_strides():
    ours, theirs, facts = predictions(0), predictions(1), {"strides": STRIDES, "image_size": SIZE, "targets": None}
    pairs = ours.paired_boxes(theirs, **facts)
    assert list(pairs) == list(SIZES)
    np.testing.assert_allclose(pairs["p5"].teacher, mean_distances(theirs.distributions["p5"]))
    assert pairs["p5"].student.shape == (2, 3, 4, 4)
    other = ATSSPredictions(ours.logits, ours.logits, ours.logits)
    with pytest.raises(UserError, match="both detectors are GFLs with equal grids"):
        ours.paired_boxes(other, **facts)
