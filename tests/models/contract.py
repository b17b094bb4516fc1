"""What every detector promises in numbers, as functions that a detector passes or not.

A case is a detector and how its ideal predictions are made: those that say of every place exactly what it learns.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdjax import boxes
from kdjax.models import class_outputs, gfl, with_classes
from kdjax.models.atss import SPREAD, ATSSPredictions
from kdjax.models.dense import DenseDetector, joined
from kdjax.models.fcos import centrality
from kdjax.models.fcos_head import FCOSPredictions
from kdjax.models.masks import mask_targets
from kdjax.models.reppoints_head import RepPointsPredictions
from kdjax.models.retinanet import RetinaNetPredictions
from kdjax.models.roi import STAGES, RCNNPredictions, RoIPredictions
from kdjax.models.rpn import Matches, RPNPredictions
from kdjax.models.solo import sampled
from kdjax.models.solo_head import SOLOPredictions
from kdjax.types import Masks, Sampling, Targets
from tests.models.iou_aware import IoUPredictions

CLASSES = 3
CANVAS, LARGER = (128, 128), (192, 256)
SURE = 8.0
"""A logit that means yes; its negative means no."""
SIZE = np.array([[128, 128], [96, 112], [128, 80], [64, 64]], np.int32)
"""Of four images. Objects fall unevenly: of two devices the second has one of six."""
OBJECTS = (
    ((4, 4, 124, 124, 0), (20, 20, 37, 38, 1), (66, 58, 104, 108, 2)),
    ((8, 10, 42, 52, 2), (60, 30, 102, 88, 0)),
    ((8, 60, 70, 118, 1),),
    (),
)
"""Their boxes and classes."""


def truth() -> Targets:
    room = 4
    padded = np.array([[*objects, *[(0,) * 5] * (room - len(objects))] for objects in OBJECTS])
    valid = np.arange(room)[None] < np.array([[len(objects)] for objects in OBJECTS])
    corners = padded[..., :4].astype(np.float32)
    left_half = np.broadcast_to(np.arange(32) < 16, (4, room, 32, 32)) & valid[..., None, None]
    return Targets(corners, padded[..., 4].astype(np.int32), valid, masks=Masks(left_half, corners))


TRUTH = truth()


def keys(images: int = 4) -> jax.Array:
    return jax.random.split(jax.random.key(0), images)


class Case(NamedTuple):
    """A detector and its ideal predictions."""

    detector: Any
    ideal: Callable[[Any, Targets, tuple[int, int]], Any]
    """(detector, targets, canvas) to predictions of images of ``SIZE`` on a canvas of that height and width."""
    moving: tuple[str, ...]
    """Names of the fields of predictions that come out of the network; what else they hold is given."""
    shown: Callable[[tuple[int, ...]], tuple[float, ...]] = lambda found: found
    """What is found of an object of ``OBJECTS``: its box and class."""
    near: float = 1e-2
    """Pixels by which a found box may differ."""
    rounding: float = 0.0
    """By how much what is found may differ, relatively, on another canvas, where sums are taken in another order."""


# --- Ideal predictions of each kind of detector.


def shapes(detector: Any, canvas: tuple[int, int], images: int, channels: int = 1) -> dict[str, jax.Array]:
    """Maps of zeros."""
    return {
        level: jnp.zeros((images, -(-canvas[0] // stride), -(-canvas[1] // stride), channels))
        for level, stride in detector.strides.items()
    }


def as_maps(rows: jax.Array, like: dict[str, jax.Array], per_place: int = 1) -> dict[str, jax.Array]:
    """Rows (N, A, size) of all levels to maps (N, H, W, per_place * size)."""
    counts = [x.shape[1] * x.shape[2] * per_place for x in like.values()]
    parts = jnp.split(rows, np.cumsum(counts)[:-1], axis=1)
    return {level: part.reshape(*x.shape[:3], -1) for (level, x), part in zip(like.items(), parts, strict=True)}


class Learning(NamedTuple):
    """What the places of a dense detector learn."""

    places: Any
    objects: jax.Array
    logits: jax.Array
    positive: jax.Array


def learning(detector: Any, targets: Targets, blank: Any) -> Learning:
    places = detector.places_of(blank)
    learnt = DenseDetector.learn(detector, blank, places, targets, SIZE)
    positive = learnt.assignment.positive
    yes = positive[..., None] & (learnt.labels[..., None] == jnp.arange(CLASSES)[None, None])
    objects = jnp.where(positive[..., None], learnt.boxes, jnp.array([0.0, 0, 10, 10])[None, None])
    return Learning(joined(places), objects, jnp.where(yes, SURE, -SURE), positive)


def ideal_retinanet(detector: Any, targets: Targets, canvas: tuple[int, int]) -> RetinaNetPredictions:
    like = shapes(detector, canvas, len(targets.boxes))
    learnt = learning(detector, targets, RetinaNetPredictions(like, like))
    anchors = getattr(detector, "anchor_octaves", 1) * len(getattr(detector, "anchor_ratios", (1,)))
    deltas = boxes.encode(learnt.objects, learnt.places[None])
    return RetinaNetPredictions(as_maps(learnt.logits, like, anchors), as_maps(deltas, like, anchors))


def ideal_iou_aware(detector: Any, targets: Targets, canvas: tuple[int, int]) -> IoUPredictions:
    logits, deltas = ideal_retinanet(detector, targets, canvas)
    sure = {level: jnp.full((*x.shape[:3], x.shape[3] // 4), SURE) for level, x in deltas.items()}
    return IoUPredictions(logits, deltas, sure)


def ideal_fcos(detector: Any, targets: Targets, canvas: tuple[int, int]) -> FCOSPredictions:
    like = shapes(detector, canvas, len(targets.boxes))
    learnt = learning(detector, targets, FCOSPredictions(like, like, like))
    distances = boxes.distances_to(learnt.places.centres[None], learnt.objects)
    central = jnp.clip(centrality(distances), 1e-3, 1 - 1e-3)
    rows = learnt.logits, jnp.where(learnt.positive[..., None], distances, 1.0), jax.scipy.special.logit(central)
    return FCOSPredictions(as_maps(rows[0], like), as_maps(rows[1], like), as_maps(rows[2][..., None], like))


def ideal_atss(detector: Any, targets: Targets, canvas: tuple[int, int]) -> ATSSPredictions:
    like = shapes(detector, canvas, len(targets.boxes))
    learnt = learning(detector, targets, ATSSPredictions(like, like, like))
    deltas = boxes.encode(learnt.objects, learnt.places[None]) / jnp.array(SPREAD)[None, None]
    central = centrality(boxes.distances_to(boxes.centres_of(learnt.places[None]), learnt.objects))
    sure = jax.scipy.special.logit(jnp.clip(central, 1e-3, 1 - 1e-3))[..., None]
    return ATSSPredictions(as_maps(learnt.logits, like), as_maps(deltas, like), as_maps(sure, like))


def ideal_gfl(detector: Any, targets: Targets, canvas: tuple[int, int]) -> gfl.GFLPredictions:
    """Whose distributions are the two whole numbers beside every distance, as far as they may be."""
    like = shapes(detector, canvas, len(targets.boxes))
    learnt = learning(detector, targets, gfl.GFLPredictions(like, like))
    places = learnt.places[None]
    distances = boxes.distances_to(boxes.centres_of(places), learnt.objects) / detector.strides_of(places)
    away = jnp.abs(jnp.clip(distances, 0, gfl.FARTHEST)[..., None] - jnp.arange(gfl.BINS)[None, None, None])
    rows = jnp.log(jnp.maximum(1 - away, 1e-9)).reshape(*distances.shape[:2], -1)
    return gfl.GFLPredictions(as_maps(learnt.logits, like), as_maps(rows, like))


def ideal_reppoints(detector: Any, targets: Targets, canvas: tuple[int, int]) -> RepPointsPredictions:
    """Both boxes are the object's where the initial points learn one, and small everywhere else: nobody else learns."""
    like = shapes(detector, canvas, len(targets.boxes))
    learnt = learning(detector, targets, RepPointsPredictions(like, like, like, like, like))
    centres, strides = (x[None] for x in learnt.places)
    cells = (learnt.objects - jnp.tile(centres, (1, 1, 2))) / strides[..., None]
    cells = jnp.where(learnt.positive[..., None], cells, jnp.array([-0.1, -0.1, 0.1, 0.1])[None, None])
    points = shapes(detector, canvas, len(targets.boxes), 18)
    boxes_found = as_maps(cells, like)
    return RepPointsPredictions(as_maps(learnt.logits, like), points, points, boxes_found, boxes_found)


def given_rois(targets: Targets) -> tuple[jax.Array, jax.Array]:
    """RoIs (N, 12, 4) that are not quite the objects, and some of the background, and which of them are real."""
    n = len(targets.boxes)
    corner = targets.boxes[..., :2]
    size = targets.boxes[..., 2:] - corner
    near = [jnp.concatenate([corner + s * size, corner + (1 + s) * size], axis=-1) for s in (0.02, -0.02)]
    far = jnp.broadcast_to(jnp.array([[[40, 2, 60, 18], [2, 44, 20, 58], [44, 44, 56, 58], [0, 0, 0, 0]]]), (n, 4, 4))
    real = jnp.broadcast_to(jnp.array([[True, True, True, False]]), (n, 4))
    return jnp.concatenate([*near, far], axis=1), jnp.concatenate([targets.valid, targets.valid, real], axis=1)


def ideal_rcnn(detector: Any, targets: Targets, canvas: tuple[int, int]) -> RCNNPredictions:
    """Of all anchors, and of given RoIs: those of a cascade's later stages are what the stages before make of them."""
    n, anchors = len(targets.boxes), len(detector.anchor_ratios)
    like = shapes(detector, canvas, n)
    blank = RPNPredictions(like, like)
    matches = detector.match_anchors(blank, SIZE, Sampling(targets, keys(n)))
    places = jnp.concatenate(list(detector.anchors(blank).values()))
    image = jnp.arange(n)[:, None]
    positive = jnp.zeros((n, len(places)), bool).at[image, matches.candidate].max(matches.positive)
    # Slots that are empty name any anchor.
    learnt = jnp.where(matches.positive, matches.matched, 0)
    matched = jnp.zeros((n, len(places)), jnp.int32).at[image, matches.candidate].max(learnt)
    goal = jnp.take_along_axis(targets.boxes, matched[..., None], axis=1)
    deltas = jnp.where(positive[..., None], boxes.encode(goal, places[None]), 0)
    objectness = jnp.where(positive, SURE, -SURE)[..., None]
    rpn = RPNPredictions(as_maps(objectness, like, anchors), as_maps(deltas, like, anchors))

    rois, valid = given_rois(targets)
    stages = []
    for stage in STAGES[: detector.stages]:
        iou = jnp.where(targets.valid[:, None], boxes.pairwise_iou(rois, targets.boxes), -1)
        matched, positive = jnp.argmax(iou, axis=2).astype(jnp.int32), valid & (jnp.max(iou, axis=2) >= stage.iou)
        candidate = jnp.broadcast_to(jnp.arange(rois.shape[1], dtype=jnp.int32)[None], matched.shape)
        learnt = Matches(candidate, matched, positive, valid & ~positive)
        labels = jnp.where(positive, jnp.take_along_axis(targets.labels, matched, axis=1), CLASSES)
        logits = jnp.where(labels[..., None] == jnp.arange(CLASSES + 1)[None, None], SURE, -SURE)
        objects = jnp.take_along_axis(targets.boxes, matched[..., None], axis=1)
        deltas = jnp.where(positive[..., None], boxes.encode(objects, rois) / stage.spread, 0)
        regressed = jnp.tile(deltas, CLASSES if detector.stages == 1 else 1)
        masks = mask_logits(detector, targets, rois, matched) if detector.masks else None
        stages.append(RoIPredictions(rois, valid, logits, regressed, learnt, masks))
        rois = jnp.where(positive[..., None], objects, rois)
    return RCNNPredictions(rpn, detector.propose(rpn, SIZE), tuple(stages), matches)


def mask_logits(detector: Any, targets: Targets, rois: jax.Array, matched: jax.Array) -> jax.Array:
    facts = detector.facts
    how = {"aligned": facts.aligned, "binary": facts.binary_masks}
    goal = mask_targets(targets.masks, rois, matched, jnp.asarray(SIZE), size=28, **how)
    sure = jax.nn.sigmoid(SURE)
    return jnp.tile(jax.scipy.special.logit(jnp.clip(goal, 1 - sure, sure))[..., None], CLASSES)


def ideal_solo(detector: Any, targets: Targets, canvas: tuple[int, int]) -> SOLOPredictions:
    """A feature for each object, which is its mask, and kernels that take their cell's object."""
    logits, features, kernels, biases = {}, {}, {}, {}
    for level, owner in detector.assign(targets, SIZE).items():
        step, count = detector.steps[level] // 2, math.isqrt(owner.shape[1])
        size = canvas[0] // step, canvas[1] // step
        goal = jax.vmap(functools.partial(sampled, size=size, step=step))(targets.masks)
        features[level] = jnp.moveaxis(SURE * (2 * goal - 1), 1, -1)
        kernels[level] = jax.nn.one_hot(owner, goal.shape[1])
        biases[level] = jnp.zeros(owner.shape)
        labels = jnp.where(owner >= 0, jnp.take_along_axis(targets.labels, jnp.maximum(owner, 0), axis=1), CLASSES)
        yes = jax.nn.one_hot(labels, CLASSES).reshape(-1, count, count, CLASSES)
        logits[level] = SURE * (2 * yes - 1)
    return SOLOPredictions(logits, features, kernels, biases)


def left_half(found: tuple[int, ...]) -> tuple[float, ...]:
    """What is around an object's mask."""
    return (*found[:2], (found[0] + found[2]) / 2, *found[3:])


# --- What is asked of them.


def ideal(case: Case, canvas: tuple[int, int] = CANVAS) -> Any:
    return _ideal(case.ideal, case.detector, canvas)


@functools.cache
def _ideal(make: Callable[..., Any], detector: Any, canvas: tuple[int, int]) -> Any:
    return jax.tree.map(np.asarray, jax.jit(lambda targets: make(detector, targets, canvas))(TRUTH))


def changed(case: Case, predictions: Any, change: Callable[[str, np.ndarray], np.ndarray]) -> Any:
    """Predictions with other values of what comes out of the network: ``change(name of the field, values)``."""

    def visit(path: Any, x: np.ndarray) -> np.ndarray:
        name = next((str(key.name) for key in reversed(path) if hasattr(key, "name")), "")
        return change(name, x).astype(x.dtype) if name in case.moving else x

    return jax.tree_util.tree_map_with_path(visit, predictions)


def poor(case: Case, seed: int = 0) -> Any:
    """Predictions of a network that knows little: unsure of everything, boxes somewhere."""
    rng = np.random.default_rng(seed)

    def change(name: str, x: np.ndarray) -> np.ndarray:
        noise = rng.normal(0, 1, x.shape)
        return x * np.exp(noise) + 1 if name == "distances" else x + noise if name == "deltas" else noise - 1

    return changed(case, ideal(case), change)


def between(case: Case, share: float) -> Any:
    """Predictions on the way from poor ones to the ideal ones."""

    def mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a + share * (b - a)).astype(a.dtype) if a.dtype.kind == "f" else a

    return jax.tree.map(mix, poor(case), ideal(case))


def enlarged(case: Case, predictions: Any, fill: float = 50.0) -> Any:
    """The same predictions on a larger canvas, sure of anything where the padding is."""
    other = ideal(case, LARGER)

    def visit(x: np.ndarray, room: np.ndarray) -> np.ndarray:
        if x.shape == room.shape:
            return x
        return np.pad(x, [(0, b - a) for a, b in zip(x.shape, room.shape, strict=True)], constant_values=fill)

    if case.detector.has_proposals:
        matches = other.anchor_matches  # Anchors are counted over the canvas.
        rest = jax.tree.map(visit, predictions._replace(anchor_matches=None), other._replace(anchor_matches=None))
        return rest._replace(anchor_matches=matches)
    return jax.tree.map(visit, predictions, other)


@functools.cache
def graded(detector: Any) -> Callable[..., tuple[dict[str, jax.Array], Any]]:
    """(predictions, targets, size) to the terms, and the gradient of their sum by every float."""

    def run(predictions: Any, targets: Targets, size: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        leaves, tree = jax.tree.flatten(predictions)
        floats = [index for index, x in enumerate(leaves) if x.dtype == jnp.float32]

        def total(values: list[jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            given = dict(zip(floats, values, strict=True))
            terms = detector.loss(
                jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(leaves)]), targets, size
            )
            return sum(terms.values()), terms

        gradient, terms = jax.grad(total, has_aux=True)([leaves[index] for index in floats])
        if detector.axis_name:
            terms = jax.lax.pmean(terms, detector.axis_name)
        return terms, gradient

    return jax.jit(run)


@functools.cache
def decoder(detector: Any) -> Callable[..., Any]:
    """(predictions, size) to detections, and proposals where there are any."""

    def run(predictions: Any, size: jax.Array) -> Any:
        proposals = detector.propose(predictions.rpn, size) if detector.has_proposals else None
        return detector.decode(predictions, size), proposals

    return jax.jit(run)


def check_terms(case: Case) -> None:
    """The terms are those that the detector names, and finite."""
    terms, _ = graded(case.detector)(poor(case), TRUTH, SIZE)
    assert set(terms) == set(case.detector.terms)
    assert all(np.isfinite(value) and value > 0 for value in terms.values()), terms


def check_padding(case: Case) -> None:
    """What stands in the padding changes neither the loss nor what is found."""
    predictions = poor(case)
    larger = enlarged(case, predictions)
    terms, _ = graded(case.detector)(predictions, TRUTH, SIZE)
    padded, _ = graded(case.detector)(larger, TRUTH, SIZE)
    for term, value in terms.items():
        np.testing.assert_allclose(padded[term], value, rtol=1e-5, err_msg=term)
    found = decoder(case.detector)(predictions, SIZE)
    assert found[0].valid.any()

    def same(padded: np.ndarray, x: np.ndarray) -> None:
        part = tuple(slice(length) for length in x.shape)
        np.testing.assert_allclose(padded[part], x, rtol=case.rounding, atol=case.rounding)

    jax.tree.map(same, decoder(case.detector)(larger, SIZE), found)


def check_devices(case: Case) -> None:
    """Two devices with two images each give the loss and the gradient of one device with four."""
    predictions = poor(case)
    terms, gradient = graded(case.detector)(predictions, TRUTH, SIZE)
    step = jax.pmap(graded(case.detector.clone(axis_name="devices")), axis_name="devices", devices=jax.devices()[:2])
    halves = jax.tree.map(lambda x: np.reshape(x, (2, 2, *x.shape[1:])), (predictions, TRUTH, SIZE))
    shared, parts = step(*halves)
    for term, value in terms.items():
        np.testing.assert_allclose(shared[term], [value] * 2, rtol=1e-5, err_msg=term)
    # Gradients are averaged over devices, and each device has other images.
    for part, whole in zip(parts, gradient, strict=True):
        np.testing.assert_allclose(np.reshape(part, whole.shape) / 2, whole, rtol=1e-4, atol=1e-7)


def check_ideal(case: Case) -> None:
    """Ideal predictions are decoded to the truth, and nothing else, with scores that are probabilities."""
    found, proposals = jax.tree.map(np.asarray, decoder(case.detector)(ideal(case), SIZE))
    for image, objects in enumerate(OBJECTS):
        valid = found.valid[image]
        assert valid.sum() == len(objects), f"image {image} has {valid.sum()} detections for {len(objects)} objects"
        scores = found.scores[image][valid]
        assert ((scores > case.detector.score_threshold) & (scores <= 1)).all(), f"scores {scores}"
        rows = zip(found.boxes[image][valid].tolist(), found.labels[image][valid].tolist(), strict=True)
        actual = sorted((*box, label) for box, label in rows)
        expected = sorted(map(case.shown, objects))
        np.testing.assert_allclose(np.reshape(actual, (-1, 5)), np.reshape(expected, (-1, 5)), atol=case.near)
    if proposals is not None:
        check_proposals(case, proposals)


def check_proposals(case: Case, proposals: Any) -> None:
    """Every object that an anchor learns is proposed."""
    matches = ideal(case).anchor_matches
    for image, objects in enumerate(OBJECTS):
        for index in np.unique(matches.matched[image][matches.positive[image]]):
            near = np.abs(proposals.boxes[image] - np.array(objects[index][:4])).max(axis=-1) < 1e-2
            assert (near & proposals.valid[image] & (proposals.scores[image] > 0.5)).any(), objects[index]


def check_progress(case: Case) -> None:
    """The loss falls on the way from poor predictions to the ideal ones, and at the end every term has fallen."""
    start, half, end = (graded(case.detector)(between(case, share), TRUTH, SIZE)[0] for share in (0.0, 0.5, 1.0))
    whole = [float(sum(terms.values())) for terms in (start, half, end)]
    assert whole[0] > whole[1] > whole[2], f"the loss is {whole}"
    for term in case.detector.terms:
        assert start[term] > end[term], (term, start[term], end[term])


@functools.cache
def learner(detector: Any) -> tuple[Any, Callable[..., Any]]:
    """Fresh parameters, and (params, targets of two images) to the loss of these images and its gradient."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, *CANVAS, 3), np.uint8)
    variables = jax.jit(detector.init)(jax.random.key(0), jnp.zeros((1, *CANVAS, 3)))

    @jax.jit
    @jax.value_and_grad
    def learn(params: Any, images: jax.Array, targets: Targets) -> jax.Array:
        (_, predictions), _ = detector.apply(
            variables | {"params": params},
            detector.preprocess(images, SIZE[:2]),
            SIZE[:2],
            train=True,
            sampling=Sampling(targets, keys(2)),
            mutable=["batch_stats"],
        )
        return sum(detector.loss(predictions, targets, SIZE[:2]).values())

    return variables["params"], lambda params, targets: learn(params, pixels, targets)


def check_gradients(case: Case) -> None:
    """Every parameter moves, but those that are declared not to."""
    params, learn = learner(case.detector)
    _, gradient = learn(params, jax.tree.map(lambda x: x[:2], TRUTH))
    for path, value in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        still = not set(name.split("/")).isdisjoint(case.detector.still)
        assert bool(np.any(value)) != still, f"{name} {'moves' if still else 'gets no gradient'}"


ODD_BOXES = (
    ((10, 10, 10, 10), (20, 30, 20, 60), (4, 4, 124, 124), (4, 4, 124, 124)),
    ((0, 0, 112, 96), (50.5, 50.5, 50.5001, 50.5001), (30, 40, 70, 40), (111, 95, 112, 96)),
    ((100, 10, 120, 40), (1e4, 1e4, 2e4, 2e4), (-50, -50, -10, -10), (0, 0, 1e6, 1e6)),
    ((0, 0, 0, 0), (5, 5, 5, 5), (5, 5, 5, 5), (0, 0, 64, 64)),
)
"""Of no area, tiny, twice the same, all of the image, in the padding, outside."""


def check_odd_objects(case: Case) -> None:
    """Objects of any form, all, some or none of them, leave the loss and its gradient finite."""
    params, learn = learner(case.detector)
    rng = np.random.default_rng(0)
    for rows, share in (([0, 1], 1.0), ([2, 3], 1.0), ([1, 2], 0.5), ([0, 3], 0.0)):
        odd = np.array(ODD_BOXES, np.float32)[rows]
        valid = rng.random((2, 4)) < share
        grid = np.broadcast_to(rng.random((2, 4, 1, 1)) < 0.5, (2, 4, 32, 32)) & valid[..., None, None]
        targets = Targets(odd, TRUTH.labels[:2], valid, masks=Masks(grid, odd))
        for value in jax.tree.leaves(learn(params, targets)):
            assert np.isfinite(value).all(), (odd, valid)


def check_classes(case: Case, config: dict[str, Any]) -> None:
    """With its classes in another order a detector of this config finds the same, under their new labels."""
    detector, order = case.detector.clone(score_threshold=0.0), [2, 0, 1]
    rng = np.random.default_rng(0)
    images, size = rng.integers(0, 256, (1, 64, 64, 3), np.uint8), np.array([[64, 64]], np.int32)
    arrays = flatten_dict(jax.jit(detector.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3))), sep="/")
    told_apart = {path: arrays[path] + rng.normal(0, 0.5, arrays[path].shape) for path in class_outputs(config)}
    variables = unflatten_dict({**arrays, **told_apart}, sep="/")
    predict = jax.jit(functools.partial(detector.apply, method="predict"))
    before, after = (predict(x, images, size) for x in (variables, with_classes(config, variables, order)))
    np.testing.assert_array_equal(after.valid, before.valid)
    assert len(set(before.labels[before.valid].tolist())) == CLASSES
    np.testing.assert_array_equal(np.array(order)[after.labels[after.valid]], before.labels[before.valid])
    for name in ("boxes", "scores", "masks"):
        if getattr(before, name) is not None:
            kept = (getattr(found, name)[found.valid] for found in (after, before))
            np.testing.assert_allclose(*kept, rtol=1e-4, atol=1e-4)
