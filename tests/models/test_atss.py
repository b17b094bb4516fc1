"""ATSS against loops over objects and levels in float64, written from the paper."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.boxes import decode
from kdjax.errors import UserError
from kdjax.models import ATSS, FPN
from kdjax.models.anchors import pyramid_anchors
from kdjax.models.assign import assign_by_atss
from kdjax.models.atss import ATSSPredictions
from kdjax.models.retinanet import RetinaNetPredictions
from kdjax.types import Targets

SIZES = {"p3": (12, 16), "p4": (6, 8), "p5": (3, 4), "p6": (2, 2)}
STRIDES = {level: 8 << index for index, level in enumerate(SIZES)}
CLASSES = 3
assign = jax.jit(assign_by_atss, static_argnames="nearest")


class Nothing(nn.Module):
    """Stands for a backbone where only the pure methods are tested."""


@functools.cache
def anchors(scale: float = 8.0) -> list[np.ndarray]:
    made = jax.jit(lambda: pyramid_anchors(SIZES, STRIDES, scale=scale, octaves=1, ratios=(1.0,)))()
    return [np.asarray(x) for x in made.values()]


def overlaps(box, other):
    """IoU and GIoU of two boxes."""
    inner = max(0, min(box[2], other[2]) - max(box[0], other[0])) * max(
        0, min(box[3], other[3]) - max(box[1], other[1])
    )
    union = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1]) - inner
    hull = (max(box[2], other[2]) - min(box[0], other[0])) * (max(box[3], other[3]) - min(box[1], other[1]))
    return inner / union, inner / union - (hull - union) / hull


def candidates_of(levels, box, inside, nearest=9):
    """{anchor: its IoU with the object} of the nearest of every level, and the threshold of the object."""
    everything = np.concatenate(levels).astype(np.float64)
    centres, candidates = (everything[:, :2] + everything[:, 2:]) / 2, {}
    for start, end in itertools.pairwise(np.cumsum([0, *map(len, levels)])):
        away = np.sqrt(((centres[start:end] - (box[:2] + box[2:]) / 2) ** 2).sum(1))
        away[~inside[start:end]] = np.inf
        order = start + np.argsort(away, kind="stable")[:nearest]
        candidates |= {place: overlaps(everything[place], box)[0] for place in order if inside[place]}
    ious = np.array(list(candidates.values()))
    return candidates, ious.mean() + ious.std(ddof=1)


def reference(levels, objects, inside):
    """(A,) the object that each anchor learns, or -1, object by object (Zhang et al., algorithm 1)."""
    everything = np.concatenate(levels).astype(np.float64)
    learns, best = np.full(len(everything), -1), np.full(len(everything), -1.0)
    for index, box in enumerate(objects.astype(np.float64)):
        candidates, threshold = candidates_of(levels, box, inside)
        for place, iou in candidates.items():
            (x, y), within = (everything[place, :2] + everything[place, 2:]) / 2, 0.01
            central = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > within
            if iou >= threshold and central and iou > best[place]:
                learns[place], best[place] = index, iou
    return learns


def objects_of(rng, count):
    centre, size = rng.uniform(5, 90, (count, 2)), rng.uniform(4, 80, (count, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(96, 128), (50, 70)])
def test_assignment_is_that_of_loops(seed, size):
    rng = np.random.default_rng(seed)
    objects = objects_of(rng, 7)
    valid = np.array([True] * 6 + [False])
    inside = [((x[:, 1] + x[:, 3]) / 2 < size[0]) & ((x[:, 0] + x[:, 2]) / 2 < size[1]) for x in anchors()]
    matched, positive, negative = map(np.asarray, assign(anchors(), objects, valid, inside))
    expected = reference(anchors(), objects[:6], np.concatenate(inside))
    np.testing.assert_array_equal(np.where(positive, matched, -1), expected)
    np.testing.assert_array_equal(negative, np.concatenate(inside) & (expected < 0))
    assert len(set(expected[expected >= 0])) > 2


def test_at_equal_distances_the_first_are_candidates():
    """All 16 anchors are equally far, and equally overlapped: the first nine learn."""
    square = np.array([[-4, -4, 4, 4]], np.float32)
    ring = np.array([[np.cos(a), np.sin(a)] for a in np.arange(16) * np.pi / 2], np.float32).round() * 2
    level = np.concatenate([ring, ring], axis=1) + square
    _, positive, _ = assign([level], np.array([[-3, -3, 3, 3]], np.float32), np.array([True]), [np.ones(16, bool)])
    assert np.flatnonzero(positive).tolist() == list(range(9))


def test_nothing_is_learnt_without_objects_and_nothing_outside():
    inside = [np.arange(len(x)) % 2 == 0 for x in anchors()]
    objects = np.array([[0, 0, 0, 0], [10, 10, 60, 60]], np.float32)
    _, positive, negative = assign(anchors(), objects, np.zeros(2, bool), inside)
    assert not positive.any()
    np.testing.assert_array_equal(negative, np.concatenate(inside))
    _, positive, negative = assign(anchors(), objects, np.array([False, True]), inside)
    assert positive.any()
    assert not ((positive | negative) & ~np.concatenate(inside)).any()


def test_what_would_be_negative_in_a_crowd_is_ignored():
    inside = [np.ones(len(x), bool) for x in anchors()]
    objects = np.array([[10, 10, 60, 60], [0, 0, 128, 96]], np.float32)
    plain = assign(anchors(), objects, np.array([True, False]), inside)
    crowded = assign(anchors(), objects, np.array([True, False]), inside, crowd=np.array([False, True]))
    np.testing.assert_array_equal(plain.positive, crowded.positive)
    ignored = np.asarray(plain.negative & ~crowded.negative)
    everything = np.concatenate(anchors())
    width = np.clip(everything[:, 2::4], 0, 128) - np.clip(everything[:, 0::4], 0, 128)
    height = np.clip(everything[:, 3::4], 0, 96) - np.clip(everything[:, 1::4], 0, 96)
    covered = (width * height)[:, 0] > 0.5 * ((everything[:, 2] - everything[:, 0]) ** 2)
    np.testing.assert_array_equal(ignored, covered & ~np.asarray(plain.positive))


DETECTOR = ATSS(backbone=Nothing(), neck=FPN(max_level=6), num_classes=CLASSES, anchor_scale=4.0)


def maps(rng, channels):
    return {level: rng.normal(size=(2, *size, channels)).astype(np.float32) for level, size in SIZES.items()}


def rows(levels):
    return np.concatenate([x.reshape(2, -1, x.shape[-1]) for x in levels.values()], axis=1).astype(np.float64)


def truth(rng) -> Targets:
    boxes = np.stack([objects_of(rng, 3), np.zeros((3, 4), np.float32)])
    labels = np.array([[0, 1, 2], [0, 0, 0]], np.int32)
    return Targets(boxes, labels, np.array([[True] * 3, [False] * 3]))


def learnt_of(targets):
    """Of both images what each anchor learns, or -1; the second image has no objects."""
    everything = np.concatenate(anchors(4.0))
    first = reference(anchors(4.0), targets.boxes[0], np.ones(len(everything), bool))
    return np.stack([first, np.full(len(everything), -1)])


def test_loss_is_the_formula():
    rng = np.random.default_rng(3)
    targets = truth(rng)
    predictions = ATSSPredictions(maps(rng, CLASSES), maps(rng, 4), maps(rng, 1))
    terms = jax.jit(DETECTOR.loss)(predictions, targets, np.array([[96, 128]] * 2))
    learnt, everything = learnt_of(targets), np.concatenate(anchors(4.0)).astype(np.float64)
    logits, deltas, centerness = map(rows, predictions)
    found = np.asarray(decode(jnp.asarray(deltas * [0.1, 0.1, 0.2, 0.2], jnp.float32), jnp.asarray(everything)[None]))
    cls = box = central = weights = 0.0
    for image, place in np.ndindex(learnt.shape):
        index = learnt[image, place]
        for kind in range(CLASSES):
            yes = index >= 0 and targets.labels[image, index] == kind
            z = logits[image, place, kind] * (1 if yes else -1)
            p = 1 / (1 + np.exp(-z))
            cls -= (0.25 if yes else 0.75) * (1 - p) ** 2 * np.log(p)
        if index < 0:
            continue
        goal, anchor = targets.boxes[image, index].astype(np.float64), everything[place]
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        left, top, right, bottom = x - goal[0], y - goal[1], goal[2] - x, goal[3] - y
        t = np.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        z = centerness[image, place, 0]
        central += np.log1p(np.exp(z)) - t * z
        box += t * (1 - overlaps(found[image, place], goal)[1])
        weights += t
    count = (learnt >= 0).sum() + 1  # The image without objects counts as one.
    assert count > 4
    expected = {"cls": cls / count, "box": 2 * box / max(weights, 1), "centerness": central / count}
    assert {term: float(value) for term, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_boxes_of_another_kind_are_not_imitated():
    rng = np.random.default_rng(0)
    ours = ATSSPredictions(maps(rng, CLASSES), maps(rng, 4), maps(rng, 1))
    facts = {"strides": STRIDES, "image_size": np.array([[96, 128]] * 2), "targets": truth(rng)}
    pairs = ours.paired_boxes(ours, **facts)
    assert list(pairs) == list(SIZES)
    np.testing.assert_array_equal(pairs["p4"].student, ours.deltas["p4"])
    with pytest.raises(UserError, match="both detectors are ATSS with equal anchors"):
        ours.paired_boxes(RetinaNetPredictions(ours.logits, ours.deltas), **facts)


def test_the_anchor_suits_the_median_object():
    assert ATSS.suited([16.0, 32.0, 300.0]) == {"anchor_scale": 4.0}
    assert ATSS.suited([100.0]) == {"anchor_scale": 8.0}
    assert ATSS.suited([]) == {}
