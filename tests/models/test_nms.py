"""Non-maximum suppression against the greedy algorithm written as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.nms import nms

run = jax.jit(nms, static_argnames=("iou_threshold", "max_outputs"))


def iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def greedy(boxes, scores, labels, valid, iou_threshold, max_outputs):
    kept = []
    for i in sorted(np.flatnonzero(valid), key=lambda i: -scores[i]):
        if all(labels[i] != labels[j] or iou(boxes[i], boxes[j]) <= iou_threshold for j in kept):
            kept.append(i)
    return kept[:max_outputs]


def check(boxes, scores, labels, valid, *, iou_threshold=0.5, max_outputs=40):
    arrays = (np.asarray(boxes, np.float32), np.asarray(scores, np.float32), np.asarray(labels, np.int32), valid)
    index, kept = run(*arrays, iou_threshold=iou_threshold, max_outputs=max_outputs)
    assert index.shape == kept.shape == (len(scores), max_outputs)
    for image in range(len(scores)):
        expected = greedy(*(x[image] for x in arrays), iou_threshold, max_outputs)
        assert np.asarray(index[image])[np.asarray(kept[image])].tolist() == expected


def random_candidates(images, size, *, spread, classes, seed):
    rng = np.random.default_rng(seed)
    # Whole pixels, so that areas and ties are exact in NumPy and in XLA; scores of two decimals tie often.
    corner = rng.integers(0, spread, (images, size, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 30, (images, size, 2))], axis=-1)
    scores = rng.integers(0, 100, (images, size)) / 100
    return boxes, scores, rng.integers(0, classes, (images, size)), rng.random((images, size)) < 0.9


@pytest.mark.parametrize(
    ("spread", "classes"),
    [(20, 1), (60, 3), (400, 5)],  # Nearly everything suppressed; some; nearly nothing, so that slots run out.
)
def test_keeps_what_the_greedy_algorithm_keeps(spread, classes):
    check(*random_candidates(3, 300, spread=spread, classes=classes, seed=spread))


def test_long_chains_of_suppression():
    # Each box overlaps the next by 2/3 only: every second one is kept, and each decision hangs on the one before.
    x = np.arange(200)
    boxes = np.stack([x * 2, 0 * x, x * 2 + 10, 0 * x + 10], axis=-1)[None]
    args = (boxes, 1 - x[None] / 200, np.zeros((1, 200)), np.ones((1, 200), bool))
    check(*args, iou_threshold=0.6, max_outputs=128)
    _, kept = run(*map(np.asarray, args), iou_threshold=0.6, max_outputs=128)
    assert kept.sum() == 100


def test_overlap_equal_to_the_threshold_is_kept():
    boxes = [[[0, 0, 2, 2], [0, 0, 2, 4]]]
    check(boxes, [[0.9, 0.8]], [[0, 0]], np.ones((1, 2), bool), iou_threshold=0.5, max_outputs=2)


def test_identical_boxes_leave_the_first():
    index, kept = run(
        jnp.tile(jnp.array([3.0, 4.0, 9.0, 9.0]), (2, 200, 1)),
        jnp.full((2, 200), 0.5),
        jnp.zeros((2, 200), jnp.int32),
        jnp.ones((2, 200), bool).at[1, :150].set(False),
        iou_threshold=0.5,
        max_outputs=3,
    )
    np.testing.assert_array_equal(kept, [[True, False, False]] * 2)
    np.testing.assert_array_equal(index[:, 0], [0, 150])


def test_empty_boxes_and_images_without_candidates():
    boxes, scores, labels, valid = random_candidates(3, 130, spread=50, classes=2, seed=1)
    boxes[0, :, 2:] = boxes[0, :, :2]
    valid[1] = False
    check(boxes, scores, labels, valid)


def test_one_image_does_not_depend_on_the_others():
    arrays = [np.asarray(x, np.float32) for x in random_candidates(3, 300, spread=60, classes=3, seed=9)]
    arrays[3] = arrays[3].astype(bool)
    suppress = functools.partial(run, iou_threshold=0.5, max_outputs=40)
    together = suppress(*arrays)
    alone = suppress(*(x[1:2] for x in arrays))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[1:2], b)
