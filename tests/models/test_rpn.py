"""Region proposals: which are made, which anchors learn, and their loss, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses.detection import l1_loss
from kdjax.models.anchors import pyramid_anchors
from kdjax.models.rpn import RPNPredictions, match, propose, rpn_loss
from kdjax.types import Targets

SIZES = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6)}
IMAGE_SIZE = np.array([[64, 96], [50, 60]], np.int32)
STRIDES = {"p2": 4, "p3": 8, "p4": 16}
ANCHORS = pyramid_anchors(SIZES, STRIDES, scale=4.0, octaves=1, ratios=(0.5, 1.0, 2.0))
ALL_ANCHORS = np.concatenate(list(ANCHORS.values()))


def random_predictions(seed=0):
    rng = np.random.default_rng(seed)
    objectness = {k: rng.normal(0, 2, (2, *size, 3)).astype(np.float32) for k, size in SIZES.items()}
    deltas = {k: rng.normal(0, 0.5, (2, *size, 12)).astype(np.float32) for k, size in SIZES.items()}
    return RPNPredictions(objectness, deltas)


def some_targets(crowd=((False, False), (False, False))):
    objects = np.array([[[8, 8, 26, 24], [40, 20, 70, 60]], [[10, 12, 40, 44], [0, 0, 0, 0]]], np.float32)
    valid = np.array([[True, True], [True, False]])
    return Targets(objects, np.array([[0, 1], [2, 0]], np.int32), valid, np.array(crowd))


def iou(a, b):
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def proposals_by_loops(predictions, image, candidates, limit, smallest):
    height, width = IMAGE_SIZE[image]
    kept = []
    for level, anchors in ANCHORS.items():
        scores = predictions.objectness[level][image].reshape(-1).astype(np.float64)
        deltas = predictions.deltas[level][image].reshape(-1, 4).astype(np.float64)
        anchors = np.asarray(anchors, np.float64)
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        scores[(centres >= [width, height]).any(axis=1)] = -np.inf
        mine = []
        for i in np.argsort(-scores, kind="stable")[:candidates]:
            size = anchors[i, 2:] - anchors[i, :2]
            centre, half = centres[i] + deltas[i, :2] * size, size * np.exp(deltas[i, 2:]) / 2
            box = np.clip([*(centre - half), *(centre + half)], 0, [width, height, width, height])
            large = (box[2:] - box[:2] > smallest).all()
            if scores[i] > -np.inf and large and all(iou(box, other) <= 0.7 for _, other in mine):
                mine.append((scores[i], box))
        kept += mine
    kept.sort(key=lambda entry: -entry[0])
    return kept[:limit]


@pytest.mark.parametrize("smallest", [0, 1e-3])
def test_proposals_are_the_best_regions_of_each_level_that_do_not_overlap(smallest):
    predictions = random_predictions()
    run = jax.jit(
        functools.partial(propose, candidates=60, proposals=50, limit_shrinking=not smallest, smallest=smallest)
    )
    found = jax.tree.map(np.asarray, run(predictions, ANCHORS, IMAGE_SIZE, IMAGE_SIZE))
    assert found.boxes.shape == (2, 50, 4)
    for image in range(2):
        expected = proposals_by_loops(predictions, image, 60, 50, smallest)
        assert found.valid[image].sum() == len(expected)
        np.testing.assert_allclose(found.boxes[image, : len(expected)], [box for _, box in expected], atol=1e-3)
        scores = 1 / (1 + np.exp([-score for score, _ in expected]))
        np.testing.assert_allclose(found.scores[image, : len(expected)], scores, rtol=1e-5)
        assert not found.boxes[image, len(expected) :].any()


def test_there_are_no_more_slots_than_candidates():
    shapes = jax.eval_shape(
        functools.partial(propose, candidates=20, proposals=1000, limit_shrinking=True, smallest=0),
        random_predictions(), ANCHORS, IMAGE_SIZE, IMAGE_SIZE,
    )  # fmt: skip
    assert shapes.boxes.shape == (2, 60, 4)


@functools.partial(jax.jit, static_argnames="number")
def match_anchors(targets, keys, *, number):
    anchors = jnp.stack([jnp.asarray(ALL_ANCHORS)] * 2)
    inside = jnp.ones(anchors.shape[:2], bool)
    return match(
        anchors, inside, targets, keys, number=number, fraction=0.5,
        positive_iou=0.7, negative_iou=0.3, best_iou=0.3, claim=True,
    )  # fmt: skip


def run_match(targets, *, number, key=0):
    return jax.tree.map(np.asarray, match_anchors(targets, jax.random.split(jax.random.key(key), 2), number=number))


def test_without_a_number_every_candidate_is_kept():
    matches = run_match(some_targets(), number=0)
    for image, objects in enumerate([2, 1]):
        overlap = np.array(
            [[iou(a, b) for b in some_targets().boxes[image, :objects]] for a in ALL_ANCHORS.astype(np.float64)]
        )
        sampled = matches.positive[image] | matches.negative[image]
        assert len(set(matches.candidate[image][sampled])) == sampled.sum()
        negative = set(matches.candidate[image][matches.negative[image]])
        assert negative == set(np.flatnonzero(overlap.max(axis=1) < 0.3)) - set(
            matches.candidate[image][matches.positive[image]]
        )
        assert set(matches.candidate[image][matches.positive[image]]) >= set(np.flatnonzero(overlap.max(axis=1) >= 0.7))


def test_a_sample_is_random_by_its_key_and_at_most_half_positive():
    first, again, other = (run_match(some_targets(), number=16, key=key) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.candidate != other.candidate).any()
    assert (first.sampled.sum(axis=1) == 16).all()
    assert (first.positive.sum(axis=1) <= 8).all()
    assert first.positive.any(axis=1).all()


def test_what_lies_in_a_crowd_is_no_negative():
    targets = some_targets(crowd=((False, True), (False, False)))._replace(
        valid=np.array([[True, False], [True, False]])
    )
    matches = run_match(targets, number=0)
    x1, y1, x2, y2 = targets.boxes[0, 1]
    for image, expected in enumerate([False, True]):
        anchors = ALL_ANCHORS[matches.candidate[image][matches.negative[image]]]
        within = (anchors[:, :2] >= [x1, y1]).all(axis=1) & (anchors[:, 2:] <= [x2, y2]).all(axis=1)
        assert within.any() == expected


def loss(predictions, targets, matches, least=1):
    return rpn_loss(predictions, ANCHORS, matches, targets, box_loss=l1_loss, least=least)


def test_losses_are_sums_over_the_sample_by_its_size():
    predictions, targets = random_predictions(1), some_targets()
    matches = run_match(targets, number=40)
    logits = np.concatenate([x.reshape(2, -1) for x in predictions.objectness.values()], axis=1)
    deltas = np.concatenate([x.reshape(2, -1, 4) for x in predictions.deltas.values()], axis=1)
    cls = box = 0.0
    for image in range(2):
        for k, i in enumerate(matches.candidate[image]):
            p = 1 / (1 + np.exp(-np.float64(logits[image, i])))
            cls -= np.log(p) if matches.positive[image, k] else np.log(1 - p)
            if matches.positive[image, k]:
                a, b = ALL_ANCHORS[i], targets.boxes[image, matches.matched[image, k]]
                size, goal = a[2:] - a[:2], b[2:] - b[:2]
                expected = [*((b[2:] + b[:2] - a[2:] - a[:2]) / 2 / size), *np.log(goal / size)]
                box += np.abs(deltas[image, i] - expected).sum()
    terms = jax.jit(loss)(predictions, targets, matches)
    assert matches.positive.any()
    assert matches.sampled.all()
    np.testing.assert_allclose(terms["rpn_cls"], cls / 80, rtol=1e-5)
    np.testing.assert_allclose(terms["rpn_box"], box / 80, rtol=1e-5)


@pytest.mark.parametrize(("least", "count"), [(1, 82), (0, 80)])
def test_without_objects_there_is_nothing_to_regress_and_mmdetection_counts_one_positive_each(least, count):
    targets = some_targets()._replace(valid=np.zeros((2, 2), bool))
    predictions, matches = random_predictions(1), run_match(targets, number=40)
    value_and_grad = jax.value_and_grad(lambda *args: sum(loss(*args, least).values()))
    value, gradient = jax.jit(value_and_grad)(predictions, targets, matches)
    logits = np.concatenate([x.reshape(2, -1) for x in predictions.objectness.values()], axis=1).astype(np.float64)
    expected = np.log1p(np.exp(np.take_along_axis(logits, matches.candidate, axis=1))).sum() / count
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not any(leaf.any() for leaf in gradient.deltas.values())
