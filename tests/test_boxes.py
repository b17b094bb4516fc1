"""Box arithmetic against loops."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import boxes

RNG = np.random.default_rng(0)


def random_boxes(count):
    corner = RNG.uniform(0, 50, (count, 2))
    return np.concatenate([corner, corner + RNG.uniform(1, 40, (count, 2))], axis=-1).astype(np.float32)


def overlap(a, b):
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def area(a):
    return (a[2] - a[0]) * (a[3] - a[1])


def test_shares_of_every_pair():
    first, second = random_boxes(20), random_boxes(30)
    iou = [[overlap(a, b) / (area(a) + area(b) - overlap(a, b)) for b in second] for a in first]
    coverage = [[overlap(a, b) / area(a) for b in second] for a in first]
    np.testing.assert_allclose(boxes.pairwise_iou(first, second), iou, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(boxes.pairwise_coverage(first, second), coverage, rtol=1e-4, atol=1e-6)


def test_coverage_counts_the_area_of_the_first_box_alone():
    small, large = np.array([[2, 2, 4, 4]], np.float32), np.array([[0, 0, 10, 10]], np.float32)
    assert boxes.pairwise_coverage(small, large).item() == 1
    np.testing.assert_allclose(boxes.pairwise_coverage(large, small).item(), 0.04, rtol=1e-6)


def test_empty_and_inverted_boxes_share_nothing():
    odd = jnp.array([[5, 5, 5, 9], [5, 5, 5, 5], [9, 9, 5, 5.0]])
    for share in (boxes.pairwise_iou, boxes.pairwise_coverage):
        np.testing.assert_array_equal(share(odd, jnp.array([[0, 0, 20, 20.0]])), np.zeros((3, 1)))
        np.testing.assert_array_equal(share(odd, odd), np.zeros((3, 3)))
        gradient = jax.jit(jax.grad(lambda x, share=share: jnp.sum(share(x, x))))(odd)
        assert np.isfinite(gradient).all()


def test_decoding_inverts_encoding():
    anchors, objects = random_boxes(30), random_boxes(30)
    np.testing.assert_allclose(boxes.decode(boxes.encode(objects, anchors), anchors), objects, rtol=1e-4, atol=1e-3)
