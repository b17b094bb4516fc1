"""Assignment of hand-made boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.assign import assign_by_iou

assign = jax.jit(assign_by_iou, static_argnames=("positive_iou", "negative_iou", "best_iou", "claim"))

# Over the object 0..10, strips from the left: a strip of width w has IoU w / 10.
STRIPS = np.array([[0, 0, width, 10] for width in (9, 5, 4.5, 4, 3.9, 0)], np.float32)
OBJECT = np.array([[0, 0, 10, 10]], np.float32)


def run(anchors, boxes, *, valid=None, inside=None, **options):
    anchors, boxes = np.asarray(anchors, np.float32), np.asarray(boxes, np.float32)
    valid = np.ones(len(boxes), bool) if valid is None else np.asarray(valid)
    inside = np.ones(len(anchors), bool) if inside is None else np.asarray(inside)
    return [np.asarray(x).tolist() for x in assign(anchors, boxes, valid, inside, **options)]


def test_thresholds():
    _, positive, negative = run(STRIPS, OBJECT)
    assert positive == [True, True, False, False, False, False]
    assert negative == [False, False, False, False, True, True]


def test_an_object_keeps_its_best_anchor_however_low():
    _, positive, negative = run(STRIPS[3:], OBJECT)
    assert positive == [True, False, False]
    assert negative == [False, True, True]


def test_all_of_an_objects_equally_good_anchors_are_positive():
    _, positive, _ = run([[0, 0, 3, 10], [7, 0, 10, 10], [0, 0, 2, 10]], OBJECT)
    assert positive == [True, True, False]


@pytest.mark.parametrize(
    ("best_iou", "expected"), [(0.25, [True, True]), (0.35, [False, True]), (None, [False, False])]
)
def test_an_objects_best_anchor_may_need_some_overlap(best_iou, expected):
    # Each of two objects has one anchor, of IoU 0.3 and of 0.4.
    anchors = [[0, 0, 3, 10], [20, 0, 24, 10]]
    _, positive, negative = run(anchors, [[0, 0, 10, 10], [20, 0, 30, 10]], best_iou=best_iou, negative_iou=0.5)
    assert positive == expected
    assert negative == [not x for x in expected]


def test_an_object_that_nothing_overlaps_makes_nothing_positive():
    _, positive, negative = run(STRIPS, [[50, 50, 60, 60]])
    assert not any(positive)
    assert all(negative)


def test_positives_learn_the_object_they_overlap_most():
    matched, positive, _ = run([[0, 0, 10, 10], [20, 0, 30, 10]], [[21, 0, 31, 10], [1, 0, 11, 10]])
    assert positive == [True, True]
    assert matched == [1, 0]


@pytest.mark.parametrize(("claim", "expected"), [(True, 1), (False, 0)])
def test_the_best_anchor_of_one_object_that_overlaps_another_more(claim, expected):
    # The anchor has IoU 0.8 with object 0, which has a better one, and 0.1 with object 1, which has none.
    anchors = [[0, 0, 10, 10], [0, 0, 8, 10]]
    objects = [[0, 0, 8, 10], [9, 0, 10, 10]]
    matched, positive, _ = run(anchors, objects, claim=claim)
    assert positive == [True, True]
    assert matched == [expected, 0]


def test_the_last_of_several_objects_claims_their_best_anchor():
    matched, positive, _ = run([[0, 0, 10, 10]], [[0, 0, 4, 10], [0, 0, 3, 10], [0, 0, 2, 10]])
    assert positive == [True]
    assert matched == [2]


def test_empty_slots_have_no_influence():
    boxes = [[0, 0, 9, 10], [0, 0, 10, 10], [0, 0, 0, 0]]
    matched, positive, negative = run(STRIPS, boxes, valid=[False, True, False])
    alone = run(STRIPS, OBJECT)
    assert [positive, negative] == alone[1:]
    assert matched[0] == matched[1] == 1


def test_without_objects_everything_inside_is_negative():
    inside = [True, False, True, True, True, True]
    _, positive, negative = run(STRIPS, OBJECT, valid=[False], inside=inside)
    assert not any(positive)
    assert negative == inside


def test_anchors_outside_take_no_part():
    # The best anchor lies outside: the next one serves the object instead.
    _, positive, negative = run(STRIPS[[0, 3, 5]], OBJECT, inside=[False, True, True])
    assert positive == [False, True, False]
    assert negative == [False, False, True]


def test_what_would_be_negative_in_a_crowd_is_ignored():
    # Strips of which 60, 50 and 0 % lie in the crowd, and one that serves an object within it.
    anchors = [[4, 0, 14, 10], [5, 0, 15, 10], [10, 0, 20, 10], [0, 0, 5, 10]]
    boxes = [[0, 0, 10, 10], [0, 0, 5, 10]]
    crowd = np.array([True, False])
    _, positive, negative = run(anchors, boxes, valid=~crowd, crowd=crowd)
    assert positive == [False, False, False, True]
    assert negative == [False, True, True, False]
    # It serves as nobody's best, and a box that is neither valid nor a crowd hides nothing.
    _, positive, negative = run(anchors, boxes, valid=~crowd, crowd=np.zeros(2, bool))
    assert positive == [False, False, False, True]
    assert negative == [True, True, True, False]


def test_agrees_with_loops_on_random_boxes():
    rng = np.random.default_rng(0)
    # Multiples of 4 pixels: IoUs tie, and are exact enough for the thresholds to be met alike.
    corner = 4 * rng.integers(0, 12, (3, 150, 2))
    anchors = np.concatenate([corner, corner + 4 * rng.integers(1, 6, (3, 150, 2))], axis=-1).astype(np.float32)
    for claim in (True, False):
        for a in anchors:
            boxes, valid, inside = a[:7] + 4, np.arange(7) != 3, rng.random(150) < 0.9
            matched, positive, negative = (np.asarray(x) for x in assign(a, boxes, valid, inside, claim=claim))
            expected = loops(a, boxes, valid, inside, claim)
            np.testing.assert_array_equal(np.where(positive, matched, np.where(negative, -1, -2)), expected)


def loops(anchors, boxes, valid, inside, claim):
    """The object of every anchor, -1 for negatives, -2 for ignored, as MMDetection describes it: one by one."""
    overlap = np.full((len(anchors), len(boxes)), -1.0, np.float32)
    for i, a in enumerate(anchors):
        for j, b in enumerate(boxes):
            if valid[j] and inside[i]:
                sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
                both = np.prod(np.maximum(sides, 0))
                overlap[i, j] = both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)
    result = np.full(len(anchors), -2)
    for i in np.flatnonzero(inside):
        best = overlap[i].max()
        result[i] = overlap[i].argmax() if best >= 0.5 else -1 if best < 0.4 else -2
    for j in np.flatnonzero(valid):
        for i in np.flatnonzero(overlap[:, j] == overlap[:, j].max()):
            if overlap[i, j] > 0:
                result[i] = j if claim else overlap[i].argmax()
    return result


def test_is_mapped_over_images():
    boxes = jnp.asarray([OBJECT, OBJECT])
    valid = jnp.array([[True], [False]])
    inside = jnp.ones((2, len(STRIPS)), bool)
    both = jax.vmap(lambda b, v, i: assign_by_iou(jnp.asarray(STRIPS), b, v, i))(boxes, valid, inside)
    assert both.positive.sum(axis=1).tolist() == [2, 0]
