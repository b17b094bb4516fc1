"""SOLO against its formulas written out in NumPy: which cells learn what, the loss, Matrix NMS, and what is found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.data.masks import mask_grid
from kdjax.errors import UserError
from kdjax.models import SOLO, build_model
from kdjax.models.nms import matrix_nms
from kdjax.models.solo import sampled
from kdjax.models.solo_head import SOLOPredictions, regional_resize
from kdjax.types import Masks, Targets

SIDE, CLASSES, ROOM = 128, 3, 3
SIZE = np.array([[128, 96], [64, 128]], np.int32)
GRIDS, STEPS = (8, 7, 6, 5, 4), (8, 8, 16, 32, 32)
RANGES = ((0, 24), (12, 48), (24, 96), (48, 192), (96, np.inf))
RNG = np.random.default_rng(0)


def detector(**head: object) -> SOLO:
    model = {"name": "solo", **SOLO.tiny}
    return build_model(model | {"head": {**model["head"], "range_scale": 24.0, **head}}, CLASSES)


def blobs() -> np.ndarray:
    """Masks (images, objects, H, W) of ellipses of several sizes, of which the last two of the first image overlap."""
    y, x = np.mgrid[:SIDE, :SIDE]
    ellipses = [[(40, 30, 9, 12), (70, 50, 24, 30), (72, 52, 24, 20)], [(30, 90, 20, 30), (20, 40, 8, 9), (0, 0, 0, 0)]]
    return np.array(
        [[((y - a) / max(h, 1)) ** 2 + ((x - b) / max(w, 1)) ** 2 < (h > 0) for a, b, h, w in row] for row in ellipses]
    )


MASKS = blobs()
VALID = MASKS.any(axis=(2, 3))


@functools.cache
def targets() -> Targets:
    boxes, grids, frames = np.zeros((2, ROOM, 4), np.float32), np.zeros((2, ROOM, 96, 96), bool), np.zeros((2, ROOM, 4))
    for image, row in enumerate(MASKS):
        for number, mask in enumerate(row):
            grids[image, number], frames[image, number] = mask_grid(mask, 96)
            if mask.any():
                ys, xs = np.nonzero(mask)
                boxes[image, number] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    labels = np.array([[0, 1, 2], [2, 0, 0]], np.int32)
    return Targets(boxes, labels, VALID, masks=Masks(grids, frames.astype(np.float32)))


def owners(image: int, level: int) -> np.ndarray:
    """(S, S): the object of each cell."""
    count, (low, high) = GRIDS[level], RANGES[level]
    height, width = SIZE[image]
    found = np.full((count, count), -1)
    for number in np.flatnonzero(VALID[image]):
        box, (ys, xs) = targets().boxes[image, number], np.nonzero(MASKS[image, number])
        (h, w), y, x = (box[3] - box[1], box[2] - box[0]), ys.mean(), xs.mean()
        if low <= np.sqrt(h * w) <= high:
            row, column = int(y / height * count), int(x / width * count)
            for i in range(max(0, row - 1), min(count, row + 2)):
                for j in range(max(0, column - 1), min(count, column + 2)):
                    inside_rows = int((y - 0.1 * h) / height * count) <= i <= int((y + 0.1 * h) / height * count)
                    inside_columns = int((x - 0.1 * w) / width * count) <= j <= int((x + 0.1 * w) / width * count)
                    if inside_rows and inside_columns:
                        found[i, j] = number
    return found


def random_predictions() -> SOLOPredictions:
    logits, features, kernels, biases = {}, {}, {}, {}
    for level, (count, step) in enumerate(zip(GRIDS, STEPS, strict=True)):
        name, side = f"p{level + 2}", 2 * SIDE // step
        logits[name] = RNG.normal(0, 2, (2, count, count, CLASSES)).astype(np.float32)
        features[name] = RNG.normal(0, 1, (2, side, side, 4)).astype(np.float32)
        kernels[name] = RNG.normal(0, 1, (2, count**2, 4)).astype(np.float32)
        biases[name] = RNG.normal(0, 1, (2, count**2)).astype(np.float32)
    return SOLOPredictions(logits, features, kernels, biases)


PREDICTIONS = random_predictions()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def mask_of(image: int, level: int, cell: int) -> np.ndarray:
    name = f"p{level + 2}"
    logits = PREDICTIONS.features[name][image] @ PREDICTIONS.kernels[name][image, cell]
    height, width = SIZE[image] // (STEPS[level] // 2)
    return sigmoid(logits + PREDICTIONS.biases[name][image, cell])[:height, :width]


def test_cells_learn_the_last_object_whose_middle_they_are():
    found = jax.jit(detector().assign)(targets(), SIZE)
    taken = 0
    for level, count in enumerate(GRIDS):
        for image in range(2):
            expected = owners(image, level)
            np.testing.assert_array_equal(np.reshape(found[f"p{level + 2}"][image], (count, count)), expected)
            taken += (expected >= 0).sum()
    assert taken > 10


def test_the_loss_is_the_papers():
    terms = jax.jit(detector().loss)(PREDICTIONS, targets(), SIZE)
    focal, dice = 0.0, []
    for image in range(2):
        for level, count in enumerate(GRIDS):
            owner = owners(image, level)
            p = sigmoid(PREDICTIONS.logits[f"p{level + 2}"][image])
            yes = (owner[..., None] >= 0) & (targets().labels[image][owner][..., None] == np.arange(CLASSES))
            focal += np.where(yes, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)).sum()
            step = STEPS[level] // 2
            for i, j in np.argwhere(owner >= 0):
                mask = MASKS[image, owner[i, j]].astype(float)
                # The four pixels at the centre of each position.
                corners = [
                    mask[a::step, b::step] for a in (step // 2 - 1, step // 2) for b in (step // 2 - 1, step // 2)
                ]
                found = mask_of(image, level, i * count + j)
                goal = (np.mean(corners, axis=0) >= 0.5)[: found.shape[0], : found.shape[1]]
                dice.append(1 - 2 * (found * goal).sum() / ((found**2).sum() + goal.sum() + 2e-3))
    assert float(terms["cls"]) == pytest.approx(focal / (len(dice) + 1), rel=1e-5)
    assert float(terms["mask"]) == pytest.approx(3 * np.mean(dice), rel=1e-5)


@pytest.mark.slow
def test_the_mask_loss_is_the_same_however_many_masks_exist_at_once(monkeypatch):
    def value_and_gradient():
        return jax.value_and_grad(lambda x: detector().loss(PREDICTIONS._replace(features=x), targets(), SIZE)["mask"])

    whole = jax.jit(value_and_gradient())(PREDICTIONS.features)
    monkeypatch.setattr("kdjax.models.solo.CHUNK", 2)
    parts = jax.jit(value_and_gradient())(PREDICTIONS.features)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), parts, whole)


def test_matrix_nms_is_its_formula():
    masks, labels = RNG.random((12, 6, 6)) < 0.4, RNG.integers(0, 2, 12)
    masks[3] = False
    scores = np.sort(RNG.random(12).astype(np.float32))[::-1]
    iou = np.zeros((12, 12))
    for j in range(12):
        for i in range(j):
            union = (masks[i] | masks[j]).sum()
            iou[i, j] = (masks[i] & masks[j]).sum() / union if union and labels[i] == labels[j] else 0
    covered = iou.max(axis=0)
    expected = [
        score * min([np.exp(-2 * iou[i, j] ** 2) / np.exp(-2 * covered[i] ** 2) for i in range(j)] + [1])
        for j, score in enumerate(scores)
    ]
    np.testing.assert_allclose(matrix_nms(masks, scores.copy(), labels, sigma=2.0), expected, rtol=1e-5)


def test_what_is_found_has_masks_boxes_around_them_and_falling_scores():
    found = jax.jit(detector(max_detections=20).decode)(PREDICTIONS, SIZE)
    assert found.whole_masks.shape == (2, 20, 32, 32)
    assert found.whole_masks.dtype == jnp.uint8
    for image in range(2):
        assert found.valid[image].sum() > 5
        scores = found.scores[image][found.valid[image]]
        assert (np.diff(scores) <= 0).all()
        assert (scores >= 0.05).all()
        for mask, box in zip(found.whole_masks[image], found.boxes[image], strict=True):
            ys, xs = np.nonzero(mask > 127)
            height, width = SIZE[image]
            around = (4 * xs.min(), 4 * ys.min(), 4 * xs.max() + 4, 4 * ys.max() + 4) if len(xs) else (0, 0, 0, 0)
            np.testing.assert_array_equal(box, np.minimum(around, (width, height, width, height)))
        # Beyond the padded image nothing is found.
        height, width = SIZE[image] // 4
        assert not found.whole_masks[image, :, height:].any()
        assert not found.whole_masks[image, :, :, width:].any()


def test_targets_of_coarser_objects_are_what_their_grid_says():
    grid, frame = mask_grid(MASKS[0, 1], 16)
    (found,) = sampled(Masks(grid[None], frame[None]), (32, 32), 4)
    expected = np.mean([MASKS[0, 1][a::4, b::4] for a in (1, 2) for b in (1, 2)], axis=0) >= 0.5
    assert 0.9 < np.mean(np.asarray(found, bool)[expected]) <= 1
    assert np.mean(np.asarray(found, bool) != expected) < 0.03


def test_a_resized_region_sees_nothing_of_the_padding():
    x = RNG.normal(size=(1, 6, 8, 2)).astype(np.float32)
    extent, other = np.array([[3, 4]]), np.array([[5, 6]])
    other_padding = x.copy()
    other_padding[:, 3:] = other_padding[:, :, 4:] = 100
    inner = regional_resize(jnp.asarray(x[:, :3, :4]), extent, other, (5, 6))
    for full in (x, other_padding):
        found = regional_resize(jnp.asarray(full), extent, other, (7, 9))
        np.testing.assert_allclose(found[:, :5, :6], inner, rtol=1e-5, atol=1e-6)


def test_every_level_has_a_grid():
    with pytest.raises(UserError, match=r"head.grids has 2 numbers for 5 levels \(p2, p3, p4, p5, p6\)"):
        detector(grids=(4, 2))


def test_there_are_no_boxes_to_imitate():
    with pytest.raises(UserError, match="no box regression to imitate"):
        PREDICTIONS.paired_boxes(PREDICTIONS, strides={}, image_size=jnp.asarray(SIZE), targets=targets())
