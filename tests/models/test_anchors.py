"""Anchors by hand, and torchvision's well-known table of them."""

import numpy as np
import pytest

from kdjax.models.anchors import base_anchors, centres_inside, grid_anchors, padded, pyramid_anchors

RETINANET = dict(scale=4.0, octaves=3, ratios=(0.5, 1.0, 2.0))
STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64}


def test_base_anchors_have_the_areas_and_ratios_asked_for():
    anchors = base_anchors(8, **RETINANET)
    assert anchors.dtype == np.float32
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    np.testing.assert_allclose(anchors[:, :2], -anchors[:, 2:])
    np.testing.assert_allclose(np.sqrt(width * height), [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)] * 3, rtol=1e-6)
    np.testing.assert_allclose(height / width, np.repeat([0.5, 1, 2], 3), rtol=1e-6)


def test_torchvision_rounds_to_whole_pixels():
    # The first anchors of torchvision's RetinaNet, sizes 32, 40 and 50.
    expected = [[-23, -11, 23, 11], [-28, -14, 28, 14], [-35, -18, 35, 18], [-16, -16, 16, 16]]
    np.testing.assert_array_equal(base_anchors(8, **RETINANET, exact=False)[:4], expected)


def test_grid_is_row_major_with_the_anchor_fastest():
    base = np.array([[-1, -1, 1, 1], [-2, -1, 2, 1]], np.float32)
    anchors = np.asarray(grid_anchors(base, (2, 3), (10, 100)))
    expected = [[x + a, y + b, x + c, y + d] for y in (0, 10) for x in (0, 100, 200) for a, b, c, d in base]
    np.testing.assert_array_equal(anchors, expected)


def test_pyramid_has_a_stride_for_every_level():
    sizes = {"p3": (4, 5), "p4": (2, 3), "p5": (1, 2)}
    anchors = pyramid_anchors(sizes, STRIDES, scale=2.0, octaves=1, ratios=(1.0,))
    assert {level: a.shape for level, a in anchors.items()} == {"p3": (20, 4), "p4": (6, 4), "p5": (2, 4)}
    np.testing.assert_array_equal(anchors["p4"][4], [16 - 16, 16 - 16, 16 + 16, 16 + 16])
    np.testing.assert_array_equal(anchors["p5"][1], [32 - 32, 0 - 32, 32 + 32, 0 + 32])


def test_torchvision_strides_divide_the_padded_image():
    # 96 x 128 pixels: P6 is 2 x 2, so that its locations are 48 and 64 pixels apart; exact ones 64 and 64.
    sizes = {"p3": (12, 16), "p6": (2, 2)}
    for exact, vertical in ((False, 48), (True, 64)):
        anchors = pyramid_anchors(sizes, STRIDES, scale=4.0, octaves=1, ratios=(1.0,), exact=exact)["p6"]
        np.testing.assert_array_equal(anchors[:, 0] + 128, [0, 64, 0, 64])
        np.testing.assert_array_equal(anchors[:, 1] + 128, [0, 0, vertical, vertical])


@pytest.mark.parametrize(("height", "width", "expected"), [(16, 8, 2), (17, 8, 3), (17, 9, 6), (1, 1, 1)])
def test_inside_is_decided_by_the_centre(height, width, expected):
    anchors = grid_anchors(np.array([[-50, -50, 50, 50]], np.float32), (4, 4), (8, 8))
    assert centres_inside(anchors, np.array([height, width])).sum() == expected


def test_the_originals_pad_images_to_the_next_multiples_of_32():
    assert padded(np.array([[1, 32], [33, 800]])).tolist() == [[32, 32], [64, 800]]
