"""Faster R-CNN, Mask R-CNN and their cascades, at a tiny size."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.models import FPN, RCNN
from kdjax.models.retinanet import RetinaNetPredictions
from kdjax.models.roi import RCNNPredictions, RoIDeltas, RoIPredictions
from kdjax.models.rpn import Matches, Proposals, RPNPredictions
from kdjax.types import Detections, Masks, Sampling, Targets
from tests import tiny

CLASSES = 3
SIDE = 64
IMAGE_SIZE = np.array([[64, 64], [48, 40]], np.int32)
STEPS = 200


def detector(**fields):
    few = {"train_candidates": 40, "train_proposals": 30, "candidates": 30, "proposals": 20, "anchor_samples": 32}
    return RCNN(
        backbone=tiny.TinyBackbone(),
        neck=FPN(8, min_level=3, max_level=6, extra_from="pool"),
        num_classes=CLASSES,
        **{"head_channels": 32, "anchor_scale": 2.5, "roi_samples": 24, "max_detections": 10, **few, **fields},
    )


DETECTOR = detector(stages=2, masks=True)
"""A cascade with masks has every part there is."""


def some_targets(objects=(2, 1), crowd=False):
    """Objects of two images; the left half of each box is its mask."""
    boxes = np.array([[[8, 8, 28, 32], [30, 20, 60, 60]], [[6, 12, 36, 44], [0, 0, 0, 0]]], np.float32)
    valid = np.arange(2)[None] < np.array(objects)[:, None]
    boxes = np.where(valid[..., None], boxes, 0)
    grid = np.zeros((2, 2, SIDE, SIDE), bool)
    for image, place in np.argwhere(valid):
        x1, y1, x2, y2 = boxes[image, place].astype(int)
        grid[image, place, : y2 - y1, : (x2 - x1) // 2] = True
    frame = np.concatenate([boxes[..., :2], boxes[..., :2] + SIDE], axis=-1)
    is_crowd = np.zeros((2, 2), bool)
    if crowd:
        is_crowd[0, 1], valid[0, 1] = True, False
    labels = np.where(valid, [[0, 1], [2, 0]], 0).astype(np.int32)
    return Targets(boxes, labels, valid, is_crowd, Masks(grid, frame))


def images():
    """Noise, in it every object in its class's colours, left and right."""
    pixels = np.random.default_rng(0).integers(0, 60, (2, SIDE, SIDE, 3), np.uint8)
    targets = some_targets()
    for image, place in np.argwhere(targets.valid):
        x1, y1, x2, y2 = targets.boxes[image, place].astype(int)
        colour = np.roll([250, 40, 40], targets.labels[image, place])
        pixels[image, y1:y2, x1:x2] = colour // 2
        pixels[image, y1:y2, x1 : (x1 + x2) // 2] = colour
    pixels[1, 48:] = pixels[1, :, 40:] = 0
    return pixels


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), 2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(DETECTOR.init)(jax.random.key(0), jnp.zeros((2, SIDE, SIDE, 3)))


class Outcome(NamedTuple):
    """Of a step on the images."""

    terms: dict
    predictions: RCNNPredictions
    batch_stats: dict
    features: dict


@jax.jit
def train(variables, targets, keys):
    """To the outcome, and the gradient of the sum of the terms."""

    def loss(params):
        (features, predictions), updates = DETECTOR.apply(
            {**variables, "params": params},
            DETECTOR.preprocess(images(), IMAGE_SIZE),
            IMAGE_SIZE,
            train=True,
            sampling=Sampling(targets, keys),
            mutable=["batch_stats"],
        )
        terms = DETECTOR.loss(predictions, targets, IMAGE_SIZE)
        return sum(terms.values()), Outcome(terms, predictions, updates["batch_stats"], features)

    gradient, outcome = jax.grad(loss, has_aux=True)(variables["params"])
    return outcome, gradient


@pytest.fixture(scope="module")
def run(variables):
    return functools.partial(train, variables)


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_every_part_learns_from_its_terms(run):
    (terms, *_), gradient = run(some_targets(), keys())
    assert set(terms) == set(DETECTOR.terms)
    assert all(value > 0 and value.shape == () and value.dtype == jnp.float32 for value in terms.values())
    assert is_finite(gradient)
    parts = gradient["head"]
    assert set(parts) == {"rpn"} | {f"{kind}_{stage}" for kind in ("box", "mask") for stage in range(2)}
    assert all(leaf.any() for leaf in jax.tree.leaves(parts))
    # Of the coarser levels every anchor crosses the border, and such anchors learn nothing in a cascade.
    assert all(gradient["neck"][name]["kernel"].any() for name in ("output_p3", "lateral_c5"))
    assert gradient["backbone"]["conv2"]["kernel"].any()


def test_without_objects_losses_and_gradients_are_finite_and_nothing_is_regressed(run):
    (terms, predictions, *_), gradient = run(some_targets((0, 0)), keys())
    assert is_finite((terms, gradient))
    for name, value in terms.items():
        assert (value > 0) == name.endswith("cls")
    assert not any(stage.matches.positive.any() for stage in predictions.stages)


def test_every_stage_sees_a_sample_with_the_objects_in_it(run):
    targets = some_targets()
    (_, predictions, *_), _ = run(targets, keys())
    for stage in predictions.stages:
        matches = stage.matches
        assert stage.rois.shape == (2, 24, 4)
        assert stage.masks.shape == (2, 6, 28, 28, CLASSES)
        assert (matches.positive.sum(axis=1) <= 6).all()
        np.testing.assert_array_equal(stage.valid, matches.positive | matches.negative)
        for image, count in enumerate([2, 1]):
            distance = np.abs(np.asarray(stage.rois)[image][:, None] - targets.boxes[image][None, :count]).max(-1)
            found = np.argwhere((distance == 0) & np.asarray(matches.positive[image])[:, None])
            assert sorted(found[:, 1]) == list(range(count))
            assert (np.asarray(matches.matched)[image][found[:, 0]] == found[:, 1]).all()


def test_the_sample_depends_on_each_images_key_alone(run):
    first, again, other = (run(some_targets(), keys(seed))[0].predictions for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.anchor_matches.candidate != other.anchor_matches.candidate).any()
    mixed = jnp.stack([keys(0)[0], keys(1)[1]])
    both = run(some_targets(), mixed)[0].predictions
    np.testing.assert_array_equal(both.stages[0].rois[0], first.stages[0].rois[0])
    np.testing.assert_array_equal(both.stages[0].rois[1], other.stages[0].rois[1])


def inside(boxes, region):
    corner, opposite = np.maximum(boxes[:, :2], region[:2]), np.minimum(boxes[:, 2:], region[2:])
    return np.prod(np.maximum(opposite - corner, 0), axis=1) / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def test_regions_in_a_crowd_are_not_negative(run):
    shares = []
    for crowd in (False, True):
        targets = some_targets((1, 1)) if not crowd else some_targets(crowd=True)
        (terms, predictions, *_), gradient = run(targets, keys())
        assert is_finite((terms, gradient))
        first = predictions.stages[0]
        rois = np.asarray(first.rois[0])[np.asarray(first.matches.negative[0])]
        shares.append(inside(rois, some_targets().boxes[0, 1]))
    assert shares[0].max() > 0.6
    assert shares[1].max() <= 0.5


def test_padding_has_no_influence(run, variables):
    """In training anchors there get no gradient and propose nothing, however sure they are."""
    targets = some_targets()
    (_, predictions, *_), _ = run(targets, keys())

    def total(predictions):
        return sum(DETECTOR.loss(predictions, targets, IMAGE_SIZE).values())

    gradient = jax.jit(jax.grad(total, allow_int=True))(predictions)
    for maps in gradient.rpn:
        for level, x in maps.items():
            cells = np.arange(x.shape[1]) * DETECTOR.strides[level]
            assert not x[1, cells >= 48].any()
            assert not x[1][:, cells >= 40].any()
    for boxes, valid in [(predictions.proposals.boxes, predictions.proposals.valid)] + [
        (stage.rois, stage.valid) for stage in predictions.stages
    ]:
        assert np.asarray(valid)[1].any()
        assert (np.asarray(boxes)[1] <= [40, 48, 40, 48]).all()


def test_eight_devices_give_the_global_loss(run):
    # Positives fall unevenly: the second image of a pair has one object or none.
    (_, predictions, *_), _ = run(some_targets((2, 0)), keys())
    targets = some_targets((2, 0))

    def step(*inputs):
        return jax.lax.pmean(DETECTOR.clone(axis_name="devices").loss(*inputs), "devices")

    split = jax.tree.map(lambda x: x[:, None], (predictions, targets, IMAGE_SIZE))
    terms = jax.pmap(step, axis_name="devices", out_axes=None, devices=jax.devices()[:2])(*split)
    expected = jax.jit(DETECTOR.loss)(predictions, targets, IMAGE_SIZE)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)


def random_rois(images=2, rois=6, stages=1, seed=0, agnostic=False):
    """Predictions of inference, made up."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 30, (images, rois, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 30, corner.shape)], axis=-1).astype(np.float32)
    valid = np.ones((images, rois), bool)
    valid[:, -1] = False
    made = [
        RoIPredictions(
            boxes + stage,
            valid,
            rng.normal(0, 1.5, (images, rois, CLASSES + 1)).astype(np.float32),
            rng.normal(0, 0.5, (images, rois, 4 * (1 if agnostic or stages > 1 else CLASSES))).astype(np.float32),
        )
        for stage in range(stages)
    ]
    return RCNNPredictions(RPNPredictions({}, {}), Proposals(boxes, valid, valid), tuple(made))


@pytest.mark.parametrize(
    ("stages", "convention", "agnostic"),
    [(1, "mmdet", False), (1, "mmdet", True), (3, "mmdet", True), (3, "detectron2", True), (1, "torchvision", False)],
)
def test_decoding_scores_every_class_of_every_region(stages, convention, agnostic):
    most = {"iou_threshold": 1.0, "max_detections": 18, "score_threshold": 0.1}
    kind = detector(stages=stages, convention=convention, class_agnostic=agnostic, **most)
    predictions = random_rois(stages=stages, agnostic=agnostic)
    found = jax.tree.map(np.asarray, jax.jit(kind.decode)(predictions, IMAGE_SIZE))
    last = predictions.stages[-1]
    logits = np.array([stage.logits for stage in predictions.stages], np.float64)
    if convention != "detectron2":
        logits = logits.mean(axis=0, keepdims=True)
    probabilities = np.mean(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True), axis=0)
    scale = np.array({1: [0.1, 0.1, 0.2, 0.2], 3: [0.033, 0.033, 0.067, 0.067]}[stages])
    if convention == "detectron2":
        scale = np.array([1, 1, 2, 2]) / 30
    for image, (height, width) in enumerate(IMAGE_SIZE):
        expected = []
        for i in range(5):
            scores = probabilities[image, i]
            x1, y1, x2, y2 = last.rois[image, i].astype(np.float64)
            for label in range(CLASSES):
                deltas = last.deltas[image, i].reshape(-1, 4)[0 if agnostic else label] * scale
                centre = np.array([x1 + x2, y1 + y2]) / 2 + deltas[:2] * [x2 - x1, y2 - y1]
                half = np.array([x2 - x1, y2 - y1]) * np.exp(deltas[2:]) / 2
                box = np.clip([*(centre - half), *(centre + half)], 0, [width, height, width, height])
                if scores[label] > 0.1 and (convention != "torchvision" or (box[2:] - box[:2] >= 0.01).all()):
                    expected.append((scores[label], label, box))
        expected.sort(key=lambda entry: -entry[0])
        count = len(expected)
        assert found.valid[image].sum() == count > 5
        np.testing.assert_allclose(found.scores[image, :count], [score for score, _, _ in expected], rtol=1e-5)
        assert found.labels[image, :count].tolist() == [label for _, label, _ in expected]
        np.testing.assert_allclose(found.boxes[image, :count], [box for _, _, box in expected], atol=1e-3)


def test_many_classes_are_decoded_as_few_are():
    """Only as many classes of a region are ranked as can be above the threshold."""
    rng = np.random.default_rng(0)
    predictions = random_rois()
    logits = rng.normal(0, 3, (2, 6, 41)).astype(np.float32)
    deltas = rng.normal(0, 0.5, (2, 6, 160)).astype(np.float32)
    predictions = predictions._replace(stages=(predictions.stages[0]._replace(logits=logits, deltas=deltas),))
    kind = detector().clone(num_classes=40, iou_threshold=1.0, max_detections=60)
    found = jax.jit(kind.decode)(predictions, IMAGE_SIZE)
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for image in range(2):
        best = np.sort(scores[image, :5, :-1].ravel())[::-1]
        best = best[best > 0.05]
        assert int(found.valid[image].sum()) == len(best)
        np.testing.assert_allclose(found.scores[image, : len(best)], best, rtol=1e-5)


def test_a_cascade_of_detectron2_has_one_mask_head_and_its_features_get_the_mean_gradient_of_its_stages():
    ours, theirs = (detector(stages=3, masks=True, convention=name) for name in ("mmdet", "detectron2"))
    assert [term for term in theirs.terms if "mask" in term] == ["s0_mask"]
    assert len([term for term in ours.terms if "mask" in term]) == 3
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert [name for name in shapes["params"]["head"] if "mask" in name] == ["mask_0"]
    variables = jax.tree.map(lambda x: np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32), shapes)
    features = {f"p{level}": jnp.ones((1, 64 >> level, 64 >> level, 8)) for level in range(3, 7)}
    rois = jnp.array([[[4.0, 4.0, 40.0, 44.0]]])

    @jax.jit
    def seen(features):
        def look(kind, features):
            logits, deltas = kind.apply(variables, 1, features, rois, method="look")
            return jnp.sum(logits) + jnp.sum(deltas)

        return [jax.value_and_grad(functools.partial(look, kind))(features) for kind in (ours, theirs)]

    (value, whole), (same, third) = seen(features)
    assert value == same
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 3 * y, rtol=1e-4, atol=1e-6), whole, third)


@pytest.mark.slow
def test_learns_to_find_objects_and_their_masks(variables):
    """The same images, over and over: the loss falls, and what is detected is the objects and their masks.

    The rate falls to zero, so that the weights come to rest: on the way there, boxes are up to 8 pixels off, on one
    processor here, on another there.
    """
    targets, optimizer = some_targets(), optax.adam(optax.cosine_decay_schedule(0.01, STEPS))

    @jax.jit
    def update(variables, state, gradient, batch_stats):
        updates, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], updates), "batch_stats": batch_stats}, state

    state, values, compiled = optimizer.init(variables["params"]), [], train._cache_size()
    for index in range(STEPS):
        outcome, gradient = train(variables, targets, keys(index))
        values.append(float(sum(outcome.terms.values())))
        variables, state = update(variables, state, gradient, outcome.batch_stats)
    assert train._cache_size() == max(compiled, 1)
    assert np.mean(values[-10:]) < 0.3 * values[0]
    found = jax.jit(functools.partial(DETECTOR.apply, method="detect"))(variables, images(), IMAGE_SIZE)
    assert isinstance(found, Detections)
    assert found.masks.shape == (2, 10, 28, 28)
    for image, count in enumerate([2, 1]):
        for box, label in zip(targets.boxes[image, :count], targets.labels[image], strict=False):
            distance = np.abs(np.asarray(found.boxes[image]) - box).max(axis=-1)
            place = distance.argmin()
            assert found.valid[image, place]
            assert found.scores[image, place] > 0.5
            assert found.labels[image, place] == label
            assert distance[place] < 5
            assert found.masks[image, place, 6:22, 3:11].mean() > 0.7
            assert found.masks[image, place, 6:22, 17:25].mean() < 0.3


# --- What students imitate.


def sampled_rois(channels, seed=0):
    rng = np.random.default_rng(seed)
    positive = np.array([[True, True, False, False], [True, False, False, False]])
    negative = np.array([[False, False, True, False], [False, True, True, True]])
    matched = np.array([[1, 0, 0, 0], [0, 0, 0, 0]], np.int32)
    matches = Matches(matched, matched, positive, negative)
    deltas = jnp.asarray(rng.normal(0, 2, (2, 4, channels)), jnp.float32)
    rois = RoIPredictions(jnp.zeros((2, 4, 4)), matches.sampled, jnp.zeros((2, 4, CLASSES + 1)), deltas, matches)
    return RCNNPredictions(RPNPredictions({}, {}), Proposals(None, None, None), (rois,))


def smooth(a, b):
    distance = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    return np.where(distance < 1, distance**2 / 2, distance - 0.5)


def imitate(ours, theirs):
    return tiny.imitation(ours, theirs, strides=DETECTOR.strides, size=IMAGE_SIZE, targets=some_targets())


def test_imitation_is_the_mean_over_sampled_regions():
    ours, theirs = sampled_rois(12), sampled_rois(12, seed=1).stages[0].deltas
    sampled = np.asarray(ours.stages[0].valid)
    expected = smooth(ours.stages[0].deltas, theirs)[sampled].mean()
    np.testing.assert_allclose(imitate(ours, RoIDeltas(theirs)), expected, rtol=1e-5)


def test_the_teacher_sees_the_students_regions_and_gets_no_gradient(run, variables):
    (_, predictions, _, features), _ = run(some_targets(), keys())
    teach = jax.jit(functools.partial(DETECTOR.apply, method="heads_at"))
    theirs = teach(variables, features, predictions, IMAGE_SIZE)
    # The same detector on the same regions: nothing is left to imitate.
    np.testing.assert_allclose(theirs.deltas, predictions.stages[0].deltas, atol=1e-5)
    np.testing.assert_allclose(imitate(predictions, theirs), 0, atol=1e-8)
    student = sampled_rois(12)
    given = jax.grad(lambda theirs: imitate(student, RoIDeltas(theirs)))(sampled_rois(12, 1).stages[0].deltas)
    assert not given.any()


def test_teachers_that_cannot_be_compared_are_refused_in_words(variables):
    with pytest.raises(ValueError, match=r"regresses 3 boxes of an RoI and the teacher 1 box: .*head.class_agnostic"):
        imitate(sampled_rois(12), RoIDeltas(jnp.zeros((2, 4, 4))))
    with pytest.raises(ValueError, match="of a teacher with proposals only"):
        imitate(sampled_rois(12), {"p3": jnp.zeros((2, 8, 8, 36))})
    with pytest.raises(ValueError, match="this student has none"):
        jax.eval_shape(functools.partial(DETECTOR.apply, method="heads_at"), variables, tiny.pyramid(8), {})
    student = RetinaNetPredictions({}, {"p3": jnp.zeros((2, 8, 8, 36))})
    with pytest.raises(ValueError, match="both detectors are RetinaNets"):
        imitate(student, RoIDeltas(jnp.zeros((2, 4, 12))))


# --- What it is made of, and what it refuses.


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, {"cls", "box"}),
        ({"masks": True}, {"cls", "box", "mask"}),
        ({"stages": 2}, {"s0_cls", "s0_box", "s1_cls", "s1_box"}),
    ],
)
def test_terms_are_known_before_anything_runs(fields, names):
    assert set(detector(**fields).terms) == {"rpn_cls", "rpn_box"} | names


@pytest.mark.parametrize(("fields", "boxes"), [({}, 3), ({"class_agnostic": True}, 1), ({"stages": 2}, 1)])
def test_an_rois_boxes_are_one_for_each_class_or_for_all(fields, boxes):
    shapes = jax.eval_shape(detector(**fields).init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    assert shapes["params"]["head"]["box_0"]["deltas"]["bias"].shape == (4 * boxes,)


def test_computing_in_bfloat16_leaves_parameters_losses_and_detections_in_float32():
    kind = detector(masks=True, dtype=jnp.bfloat16)
    pixels = jnp.zeros((2, SIDE, SIDE, 3))
    (_, predictions), variables = jax.eval_shape(lambda: kind.init_with_output(jax.random.key(0), pixels))
    assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float32)}
    assert predictions.stages[0].logits.dtype == jnp.bfloat16

    def everything(variables):
        targets = some_targets()
        _, predictions = kind.apply(variables, pixels, IMAGE_SIZE, sampling=Sampling(targets, keys()))
        return kind.loss(predictions, targets, IMAGE_SIZE), kind.apply(variables, pixels, IMAGE_SIZE, method="predict")

    terms, found = jax.eval_shape(everything, variables)
    assert {x.dtype for x in terms.values()} == {jnp.dtype(jnp.float32)}
    assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == jnp.float32


def test_mistakes_are_one_clear_sentence():
    with pytest.raises(ValueError, match="made without it"):
        detector().loss(random_rois(), some_targets(), IMAGE_SIZE)
    made = random_rois()._replace(anchor_matches=sampled_rois(12).stages[0].matches)
    with pytest.raises(ValueError, match="learns masks, but its targets have none"):
        detector(masks=True).loss(made, some_targets()._replace(masks=None), IMAGE_SIZE)
    with pytest.raises(ValueError, match="convention is 'detectron'; it must be one of mmdet"):
        detector(convention="detectron")
    with pytest.raises(ValueError, match="1 to 3 stages, not 4"):
        detector(stages=4)
    with pytest.raises(ValueError, match="train_proposals is 0; it must be a whole number of at least 1"):
        detector(train_proposals=0)
    with pytest.raises(ValueError, match="roi_samples is -1; it must be a whole number of at least 0"):
        detector(roi_samples=-1)
