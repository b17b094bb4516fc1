"""RetinaNet: its head, its loss and its decoding, on predictions made by hand wherever no network is needed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import boxes
from kdjax.models import FPN, RetinaNet
from kdjax.models.assign import assign_by_iou
from kdjax.models.retinanet import RetinaNetHead, RetinaNetPredictions
from kdjax.types import Targets

CLASSES = 3
LEVELS = (3, 4)
SIZE = 64, 96


class Nothing(nn.Module):
    """Stands for a backbone where only the pure methods are tested."""


def detector(**fields):
    return RetinaNet(backbone=Nothing(), neck=FPN(), num_classes=CLASSES, anchor_scale=2.0, max_detections=20, **fields)


DETECTOR = detector()


def sizes(height, width):
    return {f"p{level}": (-(-height // 2**level), -(-width // 2**level)) for level in LEVELS}


def random_predictions(images, height=64, width=96, seed=0):
    rng = np.random.default_rng(seed)
    return RetinaNetPredictions(
        *(
            {
                k: rng.normal(mean, 1, (images, *size, 9 * n)).astype(np.float32)
                for k, size in sizes(height, width).items()
            }
            for n, mean in ((CLASSES, -2), (4, 0))
        )
    )


def random_targets(counts, height=64, width=96, seed=0, room=5):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.6, (len(counts), room, 2)) * [width, height]
    objects = np.concatenate([corner, corner + rng.uniform(10, 25, corner.shape)], axis=-1)
    valid = np.arange(room)[None] < np.array(counts)[:, None]
    return Targets(
        boxes=np.where(valid[..., None], objects, 0).astype(np.float32),
        labels=np.where(valid, rng.integers(0, CLASSES, valid.shape), 0).astype(np.int32),
        valid=valid,
    )


def full(targets):
    """The sizes of images that fill their canvas."""
    return np.full((len(targets.boxes), 2), SIZE, np.int32)


def flat(maps, size):
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1, size) for x in maps.values()], axis=1)


assign = jax.jit(assign_by_iou, static_argnames="claim")


def assignment(predictions, targets, image, convention="mmdet"):
    kind = detector(convention=convention)
    anchors = np.concatenate(list(kind.places_of(predictions).values()))
    inside = np.ones(len(anchors), bool)
    parts = assign(anchors, targets.boxes[image], targets.valid[image], inside, claim=kind.facts.claim)
    return anchors, *(np.asarray(part) for part in parts)


@functools.cache
def differentiate(detector):
    """(predictions, targets) to ((the sum of the terms, the terms), its gradient)."""

    def total(predictions, targets):
        terms = detector.loss(predictions, targets, full(targets))
        return sum(terms.values()), terms

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def loss(predictions, targets):
    return differentiate(DETECTOR)(predictions, targets)[0][1]


def loss_by_loops(predictions, targets, convention="mmdet"):
    """Sums of the focal and the L1 loss of each image, and its number of positives, in float64."""
    logits, deltas = flat(predictions.logits, CLASSES), flat(predictions.deltas, 4)
    rows = []
    for image in range(len(logits)):
        anchors, matched, positive, negative = assignment(predictions, targets, image, convention)
        cls = box = 0.0
        for i in np.flatnonzero(positive | negative):
            for c in range(CLASSES):
                p = 1 / (1 + np.exp(-logits[image, i, c]))
                if positive[i] and targets.labels[image, matched[i]] == c:
                    cls += -0.25 * (1 - p) ** 2 * np.log(p)
                else:
                    cls += -0.75 * p**2 * np.log(1 - p)
        for i in np.flatnonzero(positive):
            a, b = anchors[i], targets.boxes[image, matched[i]]
            size, anchor_size = b[2:] - b[:2], a[2:] - a[:2]
            goal = [*((b[2:] + b[:2] - a[2:] - a[:2]) / 2 / anchor_size), *np.log(size / anchor_size)]
            box += np.abs(deltas[image, i] - goal).sum()
        rows.append((cls, box, positive.sum()))
    return np.array(rows).T


def test_loss_is_the_sum_over_anchors_by_the_number_of_positives():
    predictions, targets = random_predictions(2), random_targets([5, 0])
    cls, box, count = loss_by_loops(predictions, targets)
    assert count[0] > 5
    assert count[1] == 0
    terms = loss(predictions, targets)
    # MMDetection counts an image without positives as one.
    np.testing.assert_allclose(terms["cls"], cls.sum() / np.maximum(count, 1).sum(), rtol=1e-5)
    np.testing.assert_allclose(terms["box"], box.sum() / np.maximum(count, 1).sum(), rtol=1e-5)


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
def test_every_box_loss_vanishes_at_the_perfect_deltas(box_loss):
    targets = random_targets([4, 2])
    predictions = perfect_predictions(targets)
    run = differentiate(detector(box_loss=box_loss))
    (_, terms), _ = run(predictions, targets)
    assert abs(float(terms["box"])) < 1e-4
    (_, terms), _ = run(predictions._replace(deltas=jax.tree.map(lambda x: x + 0.3, predictions.deltas)), targets)
    assert terms["box"] > 0.1


def perfect_predictions(targets, height=64, width=96):
    """Logits of +-10 and deltas such that every positive anchor says exactly what it was assigned."""
    predictions = random_predictions(len(targets.boxes), height, width)
    logits, deltas = np.full_like(flat(predictions.logits, CLASSES), -10), flat(predictions.deltas, 4)
    for image in range(len(logits)):
        anchors, matched, positive, _ = assignment(predictions, targets, image)
        logits[image, positive, targets.labels[image, matched[positive]]] = 10
        deltas[image] = boxes.encode(targets.boxes[image][matched], anchors)
    cuts = np.cumsum([9 * h * w for h, w in sizes(height, width).values()])[:-1]
    return RetinaNetPredictions(
        *(
            {
                level: jnp.asarray(part.reshape(len(logits), h, w, -1), jnp.float32)
                for (level, (h, w)), part in zip(sizes(height, width).items(), np.split(x, cuts, axis=1), strict=True)
            }
            for x in (logits, deltas)
        )
    )


decode = jax.jit(DETECTOR.decode)


def apart(counts):
    """Targets whose boxes do not overlap, so that suppression keeps them all."""
    targets = random_targets(counts)
    places = np.array([[4, 4], [36, 4], [68, 4], [4, 36], [40, 36]], np.float32)
    size = np.array([[24, 20], [18, 26], [22, 22], [30, 16], [16, 24]], np.float32)
    objects = np.concatenate([places, places + size], axis=-1)[None]
    return targets._replace(boxes=np.where(targets.valid[..., None], objects, 0).astype(np.float32))


def test_decoding_perfect_predictions_returns_the_objects():
    targets = apart([5, 2])
    found = jax.tree.map(np.asarray, decode(perfect_predictions(targets), full(targets)))
    for image, count in enumerate([5, 2]):
        assert found.valid[image].sum() == count
        assert found.valid[image, :count].all()
        by_place = sorted(zip(found.boxes[image, :count].tolist(), found.labels[image], strict=False))
        expected = sorted(zip(targets.boxes[image, :count].tolist(), targets.labels[image], strict=False))
        np.testing.assert_allclose([b for b, _ in by_place], [b for b, _ in expected], atol=1e-3)
        assert [label for _, label in by_place] == [label for _, label in expected]
        np.testing.assert_allclose(found.scores[image, :count], 1 / (1 + np.exp(-10)), rtol=1e-6)
        assert not found.boxes[image, count:].any()
        assert not found.scores[image, count:].any()


def test_detections_are_sorted_clipped_and_above_the_threshold():
    size = np.array([[64, 96], [40, 50]], np.int32)
    found = jax.tree.map(np.asarray, decode(random_predictions(2), size))
    assert found.valid.all()
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores > 0.05).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes[..., 2:] <= size[:, None, ::-1]).all()
    assert (boxes.area(found.boxes) > 0).all()


@pytest.mark.parametrize(("convention", "scale"), [("mmdet", 16 / 1000), ("torchvision", 0)])
def test_only_mmdetection_limits_how_far_a_box_shrinks(convention, scale):
    kind, image_size = detector(convention=convention), np.array([SIZE])
    predictions = jax.tree.map(lambda x: np.full_like(x, -20), random_predictions(1))
    # One class of one square anchor, number 3 of those at P3's location (4, 6), is sure of a tiny box.
    predictions.logits["p3"][0, 4, 6, 3 * CLASSES] = 5
    predictions.deltas["p3"][0, 4, 6, 3 * 4 : 4 * 4] = [0, 0, -30, -30]
    found = kind.decode(predictions, image_size)
    np.testing.assert_array_equal(found.valid[0], np.arange(20) == 0)
    np.testing.assert_allclose(found.boxes[0, 0], np.array([48, 32, 48, 32]) + 8 * scale * np.array([-1, -1, 1, 1]))


def test_mmdetection_drops_boxes_that_clipping_leaves_empty_and_torchvision_keeps_them():
    predictions, image_size = random_predictions(1), np.array([SIZE])
    outside = predictions._replace(deltas=jax.tree.map(lambda x: np.full_like(x, -20), predictions.deltas))
    assert not detector().decode(outside, image_size).valid.any()
    assert detector(convention="torchvision").decode(outside, image_size).valid.any()


def pad(predictions, height, width, fill):
    """The same predictions on a larger canvas, ``fill`` where the padding is."""
    return jax.tree.map(
        lambda x, size: np.pad(
            x, ((0, 0), (0, size[0] - x.shape[1]), (0, size[1] - x.shape[2]), (0, 0)), constant_values=fill
        ),
        predictions,
        RetinaNetPredictions(sizes(height, width), sizes(height, width)),
    )


def test_padding_has_no_influence():
    predictions, targets = random_predictions(2), random_targets([3, 2])
    padded = pad(predictions, 128, 160, fill=50.0)
    (value, _), gradient = differentiate(DETECTOR)(padded, targets)
    np.testing.assert_allclose(value, sum(loss(predictions, targets).values()), rtol=1e-5)
    for maps in gradient:
        for level, (height, width) in sizes(64, 96).items():
            assert not maps[level][:, height:].any()
            assert not maps[level][:, :, width:].any()
    found, expected = decode(padded, full(targets)), decode(predictions, full(targets))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("convention", ["mmdet", "torchvision"])
def test_a_batch_without_objects_is_all_background(convention):
    predictions, targets = random_predictions(2), random_targets([0, 0])
    (_, terms), gradient = differentiate(detector(convention=convention))(predictions, targets)
    p = 1 / (1 + np.exp(-flat(predictions.logits, CLASSES)))
    np.testing.assert_allclose(terms["cls"], (-0.75 * p**2 * np.log(1 - p)).sum() / 2, rtol=1e-5)
    assert terms["box"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
def test_extreme_predictions_keep_the_loss_and_its_gradient_finite(box_loss):
    predictions = jax.tree.map(lambda x: x * 1e4, random_predictions(2))
    results = differentiate(detector(box_loss=box_loss))(predictions, random_targets([4, 0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_torchvision_divides_image_by_image():
    predictions, targets = random_predictions(2), random_targets([5, 1])
    cls, box, count = loss_by_loops(predictions, targets, "torchvision")
    (_, terms), _ = differentiate(detector(convention="torchvision"))(predictions, targets)
    np.testing.assert_allclose(terms["cls"], np.mean(cls / np.maximum(count, 1)), rtol=1e-5)
    np.testing.assert_allclose(terms["box"], np.mean(box / np.maximum(count, 1)), rtol=1e-5)


def test_eight_devices_give_the_global_loss():
    # Positives fall very unevenly: some devices have none.
    predictions, targets = random_predictions(8), random_targets([5, 0, 0, 1, 4, 0, 2, 0])

    def step(predictions, targets):
        (_, terms), gradient = differentiate(detector(axis_name="devices"))(predictions, targets)
        return jax.lax.pmean(terms, "devices"), gradient

    def shard(tree):
        return jax.tree.map(lambda x: x[:, None], tree)

    terms, gradient = jax.pmap(step, axis_name="devices", out_axes=(None, 0))(shard(predictions), shard(targets))
    (_, expected), whole = differentiate(DETECTOR)(predictions, targets)
    for term, value in expected.items():
        np.testing.assert_allclose(terms[term], value, rtol=1e-5)
    # Each device holds one image of eight, and gradients are averaged over devices.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0] / 8, b, rtol=1e-4, atol=1e-7), gradient, whole)


def test_bfloat16_predictions_give_float32_losses_and_detections():
    predictions, targets = random_predictions(2), random_targets([3, 2])
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), predictions)
    terms = loss(rounded, targets)
    expected = loss(jax.tree.map(lambda x: np.asarray(x, np.float32), rounded), targets)
    for term, value in terms.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[term], rtol=1e-6)
    found = jax.eval_shape(decode, rounded, full(targets))
    assert found.boxes.dtype == found.scores.dtype == jnp.float32


FEATURES = {"p3": jnp.ones((1, 4, 6, 16)), "p4": jnp.ones((1, 2, 3, 16))}


def test_head_starts_from_the_prior_and_is_shared_by_the_levels():
    head = RetinaNetHead(CLASSES, convs=2)
    predictions, variables = jax.jit(head.init_with_output)(jax.random.key(0), FEATURES)
    params = variables["params"]
    assert set(params) == {"cls_logits", "box_deltas"} | {f"{kind}_conv_{i}" for kind in ("cls", "box") for i in (0, 1)}
    assert params["cls_conv_0"]["kernel"].shape == (3, 3, 16, 16)
    np.testing.assert_allclose(jax.nn.sigmoid(params["cls_logits"]["bias"]), 0.01, rtol=1e-5)
    assert predictions.logits["p3"].shape == (1, 4, 6, 9 * CLASSES)
    assert predictions.deltas["p4"].shape == (1, 2, 3, 9 * 4)


def test_head_with_group_norm():
    head = RetinaNetHead(CLASSES, convs=1, norm="group", dtype=jnp.bfloat16)
    predictions, variables = jax.eval_shape(lambda: head.init_with_output(jax.random.key(0), FEATURES))
    assert set(variables["params"]["cls_conv_0"]) == {"kernel"}
    assert set(variables["params"]["box_norm_0"]) == {"scale", "bias"}
    assert predictions.logits["p3"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
