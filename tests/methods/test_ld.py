"""LD against a loop over places and sides, with a GFL that says where they are and how much they count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import ld_loss
from kdjax.methods.ld import LD
from kdjax.models import FPN, RetinaNet
from kdjax.models.gfl import GFLPredictions
from kdjax.types import Targets, View
from tests.models.test_atss import SIZES, STRIDES, Nothing, anchors, candidates_of, learnt_of, overlaps, rows
from tests.models.test_gfl import CLASSES, DETECTOR, SIZE, predictions, softmax

OURS, THEIRS = predictions(4), predictions(5)
TARGETS = Targets(
    np.array([[[3, 5, 29, 31], [20, 10, 120, 90], [50, 40, 110, 92]], np.zeros((3, 4))], np.float32),
    np.array([[0, 1, 2], [0, 0, 0]], np.int32),
    np.array([[True] * 3, [False] * 3]),
)


def terms(ours, theirs, temperature=10.0):
    def sides(theirs):
        return DETECTOR.paired_sides(ours, theirs, TARGETS, SIZE)

    views = View({}, STRIDES, ours), View({}, STRIDES)
    method = LD(temperature=temperature)
    return method.apply({}, *views, teacher_heads=lambda seen: theirs, paired_sides=sides)


def region_by_loops(objects):
    """Of each anchor its IoU with the object whose region it is in, the largest; 0 outside (Zheng et al., algorithm 1).

    The centre of an object of which an anchor overlaps just enough to learn it may be too far for its DIoU.
    """
    levels = anchors(4.0)
    everything = np.concatenate(levels).astype(np.float64)
    region = np.zeros(len(everything))
    for box in objects.astype(np.float64):
        _, threshold = candidates_of(levels, box, np.ones(len(everything), bool))
        for place, anchor in enumerate(everything):
            iou, _ = overlaps(anchor, box)
            away = ((anchor[:2] + anchor[2:] - box[:2] - box[2:]) / 2) ** 2
            around = np.maximum(anchor[2:], box[2:]) - np.minimum(anchor[:2], box[:2])
            diou = iou - away.sum() / (around**2).sum()
            if threshold / 4 <= diou < threshold:
                region[place] = max(region[place], iou)
    return region


def divergence(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(p @ np.log(p / q))


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_the_terms_are_the_divergence_in_their_regions(temperature):
    """Where objects are learnt, weighted by the student's score, and near them, weighted by the IoU."""
    found = jax.jit(terms, static_argnums=2)(OURS, THEIRS, temperature)
    ends = np.cumsum([height * width for height, width in SIZES.values()])
    main = np.where(learnt_of(TARGETS) >= 0, 1 / (1 + np.exp(-rows(OURS.logits).max(axis=2))), 0)
    near = np.stack([region_by_loops(TARGETS.boxes[image][TARGETS.valid[image]]) for image in range(2)])
    ours, theirs = rows(OURS.distributions), rows(THEIRS.distributions)
    for term, weight in (("ld", main), ("ld_vlr", near)):
        expected = dict.fromkeys(SIZES, 0.0)
        for image, place in zip(*np.nonzero(weight), strict=True):
            sides = zip(ours[image, place].reshape(4, 17), theirs[image, place].reshape(4, 17), strict=True)
            level = list(SIZES)[int(np.searchsorted(ends, place, side="right"))]
            whole = sum(divergence(*side, temperature) for side in sides)
            expected[level] += weight[image, place] * temperature**2 * whole / (4 * 17) / 2
        assert sum(map(bool, expected.values())) > 1
        assert {level: float(value) for level, value in found[term].items()} == pytest.approx(expected, rel=1e-4)


def test_only_what_the_student_says_of_sides_is_moved():
    ours, theirs = jax.jit(jax.grad(lambda *x: sum(terms(*x)["ld"].values()), argnums=(0, 1)))(OURS, THEIRS)
    assert not any(np.any(x) for x in jax.tree.leaves((theirs, ours.logits)))
    moved = np.abs(rows(ours.distributions)).max(axis=2) > 0
    np.testing.assert_array_equal(moved, learnt_of(TARGETS) >= 0)


def test_a_student_that_says_the_same_has_nothing_to_learn():
    for value in jax.tree.leaves(jax.jit(terms)(OURS, OURS)):
        np.testing.assert_allclose(value, 0, atol=1e-5)


def test_detectors_without_distributions_are_refused_in_words():
    retinanet = RetinaNet(backbone=Nothing(), neck=FPN(), num_classes=CLASSES)
    with pytest.raises(UserError, match="A RetinaNet does not predict distributions of where the sides of boxes are"):
        retinanet.paired_sides(OURS, THEIRS, TARGETS, SIZE)
    coarser = GFLPredictions(THEIRS.logits, {level: x[:, ::2] for level, x in THEIRS.distributions.items()})
    for theirs in (coarser, {"boxes": 1}):
        with pytest.raises(UserError, match="both detectors are GFLs with equal grids"):
            terms(OURS, theirs)


def test_channels_that_are_not_of_four_sides_are_refused():
    with pytest.raises(ValueError, match="The maps have 6 channels; it must be a multiple of the four sides"):
        ld_loss(jnp.zeros((1, 2, 2, 6)), jnp.zeros((1, 2, 2, 6)))


def test_a_level_that_the_teacher_has_not_is_passed_over():
    def without(maps):
        return {level: x for level, x in maps.items() if level != "p6"}

    fewer = GFLPredictions(without(THEIRS.logits), without(THEIRS.distributions))
    found = jax.eval_shape(terms, OURS, fewer)
    assert [list(found[term]) for term in ("ld", "ld_vlr")] == [["p3", "p4", "p5"]] * 2
