"""FCOS against loops over locations and objects in float64, written from the paper; and its head."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.boxes import box_of, distances_to
from kdjax.models import FCOS, FPN
from kdjax.models.fcos import assign_by_location
from kdjax.models.fcos_head import FCOSHead, FCOSPredictions
from kdjax.models.retinanet import RetinaNetPredictions
from kdjax.types import Targets
from tests import tiny

CLASSES = 3
LEVELS = (3, 4)
STRIDES = (("p3", 8), ("p4", 16))
SIZE = 64, 96
RANGE = 2.5


class Nothing(nn.Module):
    """Stands for a backbone where only the pure methods are tested."""


def detector(**fields):
    return FCOS(
        backbone=Nothing(), neck=FPN(), num_classes=CLASSES, range_scale=RANGE, max_detections=20, **fields
    )  # fmt: skip


FIRST = detector()
IMPROVED = detector(centre_radius=1.5, box_loss="giou")
TORCHVISION = detector(centre_radius=1.5, box_loss="giou", convention="torchvision")
KINDS = pytest.mark.parametrize("kind", [FIRST, IMPROVED, TORCHVISION], ids=["first", "improved", "torchvision"])


def sizes(height, width, levels=LEVELS):
    return {f"p{level}": (-(-height // 2**level), -(-width // 2**level)) for level in levels}


def random_predictions(images, seed=0, levels=LEVELS):
    rng = np.random.default_rng(seed)
    maps = sizes(*SIZE, levels)
    logits, distances, centerness = (
        {level: rng.normal(mean, 1, (images, *size, n)).astype(np.float32) for level, size in maps.items()}
        for n, mean in ((CLASSES, -2), (4, 2), (1, 0))
    )
    return FCOSPredictions(logits, jax.tree.map(np.exp, distances), centerness)


def random_targets(counts, height=64, width=96, seed=0, room=5):
    rng = np.random.default_rng(seed)
    # Multiples of two pixels: locations meet sides and ends of ranges exactly, and areas tie.
    corner = 2 * rng.integers(0, (width // 4, height // 4), (len(counts), room, 2))
    objects = np.concatenate([corner, corner + 2 * rng.integers(6, 20, corner.shape)], axis=-1)
    valid = np.arange(room)[None] < np.array(counts)[:, None]
    return Targets(
        boxes=np.where(valid[..., None], objects, 0).astype(np.float32),
        labels=np.where(valid, rng.integers(0, CLASSES, valid.shape), 0).astype(np.int32),
        valid=valid,
    )


def full(targets):
    """The sizes of images that fill their canvas."""
    return np.full((len(targets.boxes), 2), SIZE, np.int32)


def flat(maps):
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1]) for x in maps.values()], axis=1)


def grid(kind, levels=LEVELS):
    """Every location: its x and y, its stride, and the range of the farthest side."""
    rows = []
    for level, (h, w) in zip(levels, sizes(64, 96, levels).values(), strict=True):
        step = 2**level
        middle = 0.5 if kind.convention == "mmdet" else 0.0
        low, high = RANGE * step / 2, RANGE * step
        low, high = -1 if level == levels[0] else low, np.inf if level == levels[-1] else high
        rows += [((j + middle) * step, (i + middle) * step, step, low, high) for i in range(h) for j in range(w)]
    return np.array(rows)


def assign_by_loops(kind, targets, image, size=SIZE, levels=LEVELS):
    """The object of every location, -1 for background, -2 for what is ignored."""
    rows, (height, width) = [], size
    for x, y, step, low, high in grid(kind, levels):
        found, in_crowd = [], False
        for j, (x1, y1, x2, y2) in enumerate(targets.boxes[image].astype(np.float64)):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            if min(sides) <= 0:
                continue
            in_crowd |= targets.crowd is not None and targets.crowd[image, j]
            far = max(sides)
            fits = low <= far <= high if kind.convention == "mmdet" else low < far < high
            away = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
            near = not kind.centre_radius or away < kind.centre_radius * step
            if targets.valid[image, j] and fits and near:
                area = (x2 - x1) * (y2 - y1)
                found.append((area if kind.convention == "mmdet" else -np.float32(1e8 - area), j))
        middle = step / 2 if kind.convention == "mmdet" else 0
        outside = y - middle >= height or x - middle >= width
        rows.append(-2 if outside or (in_crowd and not found) else min(found)[1] if found else -1)
    return np.array(rows)


assign = jax.jit(assign_by_location, static_argnames=("radius", "closed_ranges", "coarse_areas"))


@KINDS
def test_assignment_is_that_of_loops(kind):
    levels = (3, 4, 5)
    targets = random_targets([5, 5, 4, 0, 5])
    targets.boxes[1, 0] = [4, 2, 90, 60]
    # A crowd among the objects, and an image that does not fill its canvas.
    crowd = np.arange(5)[None] == np.array([[5], [5], [4], [0], [1]])
    valid = targets.valid & ~crowd
    boxes = np.where(crowd[..., None], np.array([10, 10, 80, 50], np.float32), targets.boxes)
    size = full(targets) - np.array([[0, 0]] * 4 + [[20, 28]], np.int32)
    targets = targets._replace(boxes=boxes, valid=valid, crowd=crowd)
    parts = kind.places_of(random_predictions(1, levels=levels)).values()
    locations = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    seen = []
    for image in range(5):
        matched, positive, negative = assign(
            locations,
            boxes[image],
            valid[image],
            locations.inside(size[image]),
            crowd=crowd[image],
            radius=kind.centre_radius,
            closed_ranges=kind.facts.closed_ranges,
            coarse_areas=kind.facts.coarse_areas,
        )
        seen += [assign_by_loops(kind, targets, image, size[image], levels)]
        np.testing.assert_array_equal(np.where(positive, matched, np.where(negative, -1, -2)), seen[-1])
    seen = np.array(seen)
    assert {-2, -1, 0, 1, 2, 3, 4} <= set(seen.ravel())
    assert all((seen[:, grid(kind, levels)[:, 2] == 2**level] >= 0).any() for level in levels)


def test_only_mmdetection_closes_the_ranges():
    # From (36, 36), a location of P3 in MMDetection, the farthest side is 20 pixels away: the end of P3's range.
    location = FIRST.places_of(random_predictions(1))["p3"]
    box = np.array([[30, 30, 56, 44]], np.float32)
    for closed, expected in ((True, 1), (False, 0)):
        inside = jnp.all(location.centres == 36, axis=-1)
        found = assign(location, box, np.array([True]), inside, radius=0.0, closed_ranges=closed)
        assert found.positive.sum() == expected


@functools.cache
def differentiate(detector):
    """(predictions, targets, size) to ((the sum of the terms, the terms), its gradient)."""

    def total(predictions, targets, size=None):
        terms = detector.loss(predictions, targets, full(targets) if size is None else size)
        return sum(terms.values()), terms

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def centrality(x, y, box):
    ratios = [min(a, b) / max(a, b) for a, b in ((x - box[0], box[2] - x), (y - box[1], box[3] - y))]
    return np.sqrt(ratios[0] * ratios[1])


def overlap_loss(box, other, giou):
    def area(b):
        return max(b[2] - b[0], 0) * max(b[3] - b[1], 0)

    inner = area([*np.maximum(box[:2], other[:2]), *np.minimum(box[2:], other[2:])])
    outer = area([*np.minimum(box[:2], other[:2]), *np.maximum(box[2:], other[2:])])
    union = area(box) + area(other) - inner
    return 1 - inner / union + (outer - union) / outer if giou else -np.log(inner / union)


def loss_by_loops(kind, predictions, targets, size=None):
    size = full(targets) if size is None else size
    logits, distances, centerness = map(flat, predictions)
    cls = entropy = plain = weighted = weights = count = 0.0
    for image in range(len(logits)):
        found = assign_by_loops(kind, targets, image, size[image])
        for i, (x, y, *_) in enumerate(grid(kind)):
            for c in range(CLASSES):
                p = 1 / (1 + np.exp(-logits[image, i, c]))
                if found[i] >= 0 and targets.labels[image, found[i]] == c:
                    cls += -0.25 * (1 - p) ** 2 * np.log(p)
                elif found[i] >= -1:
                    cls += -0.75 * p**2 * np.log(1 - p)
            if found[i] >= 0:
                goal = targets.boxes[image, found[i]].astype(np.float64)
                side = distances[image, i]
                box = np.array([x - side[0], y - side[1], x + side[2], y + side[3]])
                weight, q = centrality(x, y, goal), 1 / (1 + np.exp(-centerness[image, i, 0]))
                error = overlap_loss(box, goal, kind.box_loss == "giou")
                plain, weighted, weights = plain + error, weighted + weight * error, weights + weight
                entropy += -weight * np.log(q) - (1 - weight) * np.log(1 - q)
                count += 1
    box = weighted / weights if kind.convention == "mmdet" else plain / count
    return {"cls": cls / count, "box": box, "centerness": entropy / count}


@KINDS
def test_loss_is_the_formula(kind):
    predictions, targets = random_predictions(2), random_targets([5, 0])
    (_, terms), _ = differentiate(kind)(predictions, targets)
    assert set(terms) == set(kind.terms)
    for term, expected in loss_by_loops(kind, predictions, targets).items():
        np.testing.assert_allclose(terms[term], expected, rtol=1e-5, err_msg=term)


@KINDS
def test_a_batch_without_objects_is_all_background(kind):
    predictions = random_predictions(2)
    (_, terms), gradient = differentiate(kind)(predictions, random_targets([0, 0]))
    p = 1 / (1 + np.exp(-flat(predictions.logits)))
    np.testing.assert_allclose(terms["cls"], (-0.75 * p**2 * np.log(1 - p)).sum(), rtol=1e-5)
    assert terms["box"] == terms["centerness"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@KINDS
@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_extreme_predictions_keep_the_loss_and_its_gradient_finite(kind, factor):
    predictions = jax.tree.map(lambda x: np.float32(factor) * x, random_predictions(2))
    results = differentiate(kind)(predictions, random_targets([4, 0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_padding_has_no_influence():
    predictions, targets = random_predictions(2), random_targets([3, 2], height=32, width=48)
    size = np.array([[32, 48], [64, 90]], np.int32)
    rows, columns = np.ogrid[:64, :96]

    def fill(x, value, size=size):
        seen = (rows < size[:, :1, None]) & (columns < size[:, 1:, None])
        return np.where(seen[:, :: 64 // x.shape[1], :: 96 // x.shape[2], None], x, np.float32(value))

    disturbed = jax.tree.map(lambda x: fill(x, 50), predictions)
    assert not np.array_equal(disturbed.logits["p4"], predictions.logits["p4"])
    (_, terms), gradient = differentiate(FIRST)(disturbed, targets, size)
    for term, expected in loss_by_loops(FIRST, predictions, targets, size).items():
        np.testing.assert_allclose(terms[term], expected, rtol=1e-5, err_msg=term)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, fill(x, 0)), gradient)
    # As far as the originals pad a single image, to the next multiple of 32, something is found in the padding.
    beyond = jax.tree.map(lambda x: fill(x, 50, -(-size // 32) * 32), predictions)
    found, expected = decode(beyond, size), decode(predictions, size)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.array_equal(decode(disturbed, size).scores[0], expected.scores[0])


def test_a_crowd_hides_only_what_is_not_positive():
    predictions, targets = random_predictions(2), random_targets([4, 2])
    crowd = np.arange(5)[None] == np.array([[4], [4]])
    boxes = np.where(crowd[..., None], np.array([0, 0, 70, 64], np.float32), targets.boxes)
    targets = targets._replace(boxes=boxes, crowd=crowd)
    found = np.stack([assign_by_loops(FIRST, targets, image) for image in range(2)])
    assert {-2, -1, 0, 1} <= set(found.ravel())
    terms = jax.jit(FIRST.loss)(predictions, targets, full(targets))
    for term, expected in loss_by_loops(FIRST, predictions, targets).items():
        np.testing.assert_allclose(terms[term], expected, rtol=1e-5, err_msg=term)


def test_eight_devices_give_the_global_loss():
    @functools.partial(jax.pmap, axis_name="devices", out_axes=None)
    def loss(*inputs):
        return jax.lax.pmean(detector(axis_name="devices").loss(*inputs), "devices")

    predictions = random_predictions(8)
    # Positives fall very unevenly; then there are fewer of them than devices.
    one = random_targets([1, 0, 0, 0, 0, 0, 0, 0])
    one.boxes[0, 0] = [20, 20, 30, 30]
    for targets in (random_targets([5, 0, 0, 1, 4, 0, 2, 0]), one):
        terms = loss(*jax.tree.map(lambda x: x[:, None], (predictions, targets, full(targets))))
        for term, expected in loss_by_loops(FIRST, predictions, targets).items():
            np.testing.assert_allclose(terms[term], expected, rtol=1e-5, err_msg=term)


decode = jax.jit(FIRST.decode)


def test_boxes_and_distances_are_inverse():
    rng = np.random.default_rng(0)
    centres, distances = rng.uniform(0, 100, (50, 2)), rng.uniform(0, 50, (50, 4))
    np.testing.assert_allclose(distances_to(centres, box_of(centres, distances)), distances, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(box_of(jnp.array([10.0, 20]), jnp.array([1.0, 2, 3, 4])), [9, 18, 13, 24])


@pytest.mark.parametrize("kind", [FIRST, TORCHVISION], ids=["mmdet", "torchvision"])
def test_decoding_perfect_predictions_returns_the_objects(kind):
    # Boxes that do not overlap; every location with an object is as sure of it as it is central.
    targets = random_targets([4])
    targets.boxes[0, :4] = [[4, 4, 28, 24], [36, 4, 54, 30], [4, 36, 36, 56], [44, 36, 92, 60]]
    predictions = random_predictions(1)
    joined = [flat(maps) for maps in predictions]
    joined[0][:] = -10
    best = np.zeros(4)
    found = assign_by_loops(kind, targets, 0)
    for i, (x, y, *_) in enumerate(grid(kind)):
        if (j := found[i]) >= 0:
            x1, y1, x2, y2 = targets.boxes[0, j]
            share = min(centrality(x, y, targets.boxes[0, j]), 0.999)
            joined[0][0, i, targets.labels[0, j]] = 10
            joined[1][0, i] = x - x1, y - y1, x2 - x, y2 - y
            joined[2][0, i] = np.log(share / (1 - share))
            best[j] = max(best[j], share / (1 + np.exp(-10)))
    cuts = np.cumsum([h * w for h, w in sizes(64, 96).values()])[:-1]
    predictions = FCOSPredictions(
        *(
            {
                level: jnp.asarray(part.reshape(1, h, w, -1), jnp.float32)
                for (level, (h, w)), part in zip(sizes(64, 96).items(), np.split(x, cuts, axis=1), strict=True)
            }
            for x in joined
        )
    )
    found = jax.tree.map(np.asarray, jax.jit(kind.decode)(predictions, full(targets)))
    np.testing.assert_array_equal(found.valid[0], np.arange(20) < 4)
    order = np.argsort(-best)
    scores = best if kind.convention == "mmdet" else np.sqrt(best)
    np.testing.assert_allclose(found.scores[0, :4], scores[order], rtol=1e-4)
    np.testing.assert_allclose(found.boxes[0, :4], targets.boxes[0, order], atol=1e-3)
    np.testing.assert_array_equal(found.labels[0, :4], targets.labels[0, order])
    assert not found.boxes[0, 4:].any()


def test_detections_are_sorted_clipped_and_not_empty():
    size = np.array([[64, 96], [40, 50]], np.int32)
    found = jax.tree.map(np.asarray, decode(random_predictions(2), size))
    assert found.valid.all()
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes[..., :2] >= 0).all()
    assert (found.boxes[..., :2] < found.boxes[..., 2:]).all()
    assert (found.boxes[..., 2:] <= size[:, None, ::-1]).all()


FEATURES = {"p3": np.random.default_rng(0).normal(size=(1, 4, 6, 16)), "p4": np.ones((1, 2, 3, 16), np.float32)}


def test_head_of_the_first_version():
    head = FCOSHead(CLASSES, STRIDES, convs=1)
    params, run = jax.jit(head.init)(jax.random.key(0), FEATURES)["params"], jax.jit(head.apply)
    predictions = run({"params": params}, FEATURES)
    assert set(params) == {
        "cls_conv_0", "cls_norm_0", "box_conv_0", "box_norm_0", "cls_logits", "box_distances", "centerness",
        "scale_p3", "scale_p4",
    }  # fmt: skip
    assert set(params["cls_conv_0"]) == {"kernel"}
    np.testing.assert_allclose(jax.nn.sigmoid(params["cls_logits"]["bias"]), 0.01, rtol=1e-5)
    assert predictions.logits["p3"].shape == (1, 4, 6, CLASSES)
    assert predictions.distances["p4"].shape == (1, 2, 3, 4)
    assert predictions.centerness["p4"].shape == (1, 2, 3, 1)
    # exp(2 x) is the square of exp(x), and P4 has a scale of its own.
    twice = run({"params": params | {"scale_p3": jnp.float32(2.0)}}, FEATURES)
    np.testing.assert_allclose(twice.distances["p3"], predictions.distances["p3"] ** 2, rtol=1e-5)
    np.testing.assert_allclose(twice.distances["p4"], predictions.distances["p4"], rtol=1e-6)
    # However large x is, it is a distance that can be squared.
    huge = run({"params": params | {"scale_p3": jnp.float32(1e9)}}, FEATURES)
    assert np.isfinite(huge.distances["p3"] ** 2).all()
    # The centerness follows the tower of the classes.
    moved = run({"params": params | {"box_norm_0": params["cls_norm_0"] | {"bias": jnp.ones(16)}}}, FEATURES)
    np.testing.assert_array_equal(moved.centerness["p3"], predictions.centerness["p3"])


def test_head_of_the_improved_version():
    head = FCOSHead(
        CLASSES,
        STRIDES,
        convs=1,
        conv_bias=True,
        norm_on_box=True,
        centerness_on_box=True,
        level_scale=False,
        dtype=jnp.bfloat16,
    )
    shapes = jax.eval_shape(head.init, jax.random.key(0), FEATURES)["params"]
    assert set(shapes["box_conv_0"]) == {"kernel", "bias"}
    assert not any(name.startswith("scale") for name in shapes)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params["box_norm_0"]["bias"] += 1
    params["centerness"]["kernel"] += 0.25
    params["box_distances"]["bias"] += np.array([3, 2, 0.5, -1], np.float32)
    predictions = jax.jit(head.apply)({"params": params}, FEATURES)
    assert predictions.logits["p3"].dtype == jnp.bfloat16
    # Distances are strides, 8 and 16 pixels, and none is negative; float32.
    assert predictions.distances["p3"].dtype == jnp.float32
    np.testing.assert_array_equal(predictions.distances["p3"][0, 1, 1], [24, 16, 4, 0])
    np.testing.assert_array_equal(predictions.distances["p4"][0, 1, 1], [48, 32, 8, 0])
    # The centerness follows the tower of the boxes: 9 positions of 16 channels with the value 1.
    np.testing.assert_array_equal(predictions.centerness["p3"][0, 1, 1], [36])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"norm": "batch"}, "FCOS's norm is 'batch'; it must be one of '', group"),
        ({"box_loss": "l1"}, "FCOS's box_loss is 'l1'; it must be one of iou, giou"),
        ({"convention": "detectron2"}, "FCOS's convention is 'detectron2'; it must be one of mmdet, torchvision"),
    ],
)
def test_mistakes_are_one_clear_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        detector(**fields)


def test_boxes_are_imitated_in_strides():
    ours, theirs = random_predictions(2), random_predictions(2, seed=1)
    given = {"strides": FIRST.strides, "size": np.array([[64, 96], [32, 96]]), "targets": random_targets([1, 1])}
    value, gradient = jax.jit(jax.value_and_grad(lambda ours: tiny.imitation(ours, theirs, **given)))(ours)
    expected = 0.0
    for level, maps in ours.distances.items():
        step = 2 ** int(level[1:])
        errors = []
        for image, height in enumerate((64, 32)):
            error = np.abs(maps - theirs.distances[level])[image, : height // step] / step
            errors.append(np.where(error < 1, error**2 / 2, error - 0.5).ravel())
        expected += np.concatenate(errors).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not gradient.distances["p3"][1, 4:].any()


def test_an_fcos_and_a_retinanet_cannot_imitate_each_other():
    ours, targets = random_predictions(1), random_targets([1])
    given = {"strides": FIRST.strides, "size": full(targets), "targets": targets}
    anchored = RetinaNetPredictions(logits=ours.logits, deltas={"p3": np.zeros((1, 8, 12, 36), np.float32)})
    with pytest.raises(ValueError, match=r"both detectors are FCOS .* student's maps are p3 .* the teacher's none"):
        tiny.imitation(ours, anchored, **given)
    with pytest.raises(ValueError, match=r"both detectors are RetinaNets .* maps are p3 .* the teacher's none"):
        tiny.imitation(anchored, ours, **given)


def test_a_few_steps_of_the_head_lower_every_term():
    features = {level: x for level, x in tiny.pyramid(8, images=4).items() if level in ("p3", "p4")}
    batch = tiny.batch(4)
    head = FCOSHead(tiny.CLASSES, STRIDES, convs=1)
    optimizer = optax.adam(1e-2)

    def total(params):
        terms = FIRST.loss(head.apply(params, features), batch.targets, batch.size)
        return sum(terms.values()), terms

    @jax.jit
    def step(params, moments):
        gradient, terms = jax.grad(total, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, terms

    params = jax.jit(head.init)(jax.random.key(0), features)
    moments, history = optimizer.init(params), []
    for _ in range(20):
        params, moments, terms = step(params, moments)
        history.append(terms)
    for term, value in history[-1].items():
        assert value < 0.95 * history[0][term], term
