import numpy as np
import pytest

from kdjax.data import transforms
from kdjax.data.sources import Example


def marked(height, width, box):
    """A black image whose box is white."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    area = np.array([(x2 - x1) * (y2 - y1)], np.float32)
    return Example(image, 3, np.array([box], np.float32), np.array([2], np.int32), np.array([False]), area)


def box_of(image):
    """Bounds of the white region; a partly covered pixel at its edge counts by its share."""
    covered = image[:, :, 0].astype(np.float64) / 255
    bounds = []
    for profile in (covered.max(axis=0), covered.max(axis=1)):
        inside = np.flatnonzero(profile > 0.999)
        low, high = inside[0], inside[-1] + 1
        bounds.append((low - profile[:low].sum(), high + profile[high:].sum()))
    (x1, x2), (y1, y2) = bounds
    return [x1, y1, x2, y2]


CASES = [(40, 60, (5, 10, 25, 38)), (60, 40, (0, 0, 40, 60)), (33, 70, (20, 3, 69, 30)), (50, 50, (10, 20, 41, 45))]


@pytest.mark.parametrize(("height", "width", "box"), CASES)
@pytest.mark.parametrize("size", [(80, 80), (128, 96), (40, 40), (30, 60)])
def test_resize_moves_boxes_with_pixels(height, width, box, size):
    example = transforms.resize_to_fit(marked(height, width, box), *size)
    found_height, found_width = example.image.shape[:2]
    assert found_height <= size[0]
    assert found_width <= size[1]
    assert found_height == size[0] or found_width == size[1]
    assert found_height / found_width == pytest.approx(height / width, rel=0.03)
    assert example.image.dtype == np.uint8
    assert example.boxes.dtype == np.float32
    # Interpolation smears an edge over the width of its kernel, symmetrically: a pixel of either image.
    np.testing.assert_allclose(example.boxes[0], box_of(example.image), atol=0.75 * max(1, found_height / height))
    x1, y1, x2, y2 = example.boxes[0]
    assert example.area[0] == pytest.approx((x2 - x1) * (y2 - y1), rel=1e-5)


def test_resize_to_the_same_size_is_the_identity():
    example = marked(*CASES[0])
    assert transforms.resize_to_fit(example, 40, 60) is example
    assert transforms.resize_to_fit(example, 90, 60) is example


@pytest.mark.parametrize(("height", "width", "box"), CASES)
def test_flip_moves_boxes_with_pixels(height, width, box):
    example = marked(height, width, box)
    flipped = transforms.flip(example)
    np.testing.assert_array_equal(flipped.boxes[0], box_of(flipped.image))
    again = transforms.flip(flipped)
    np.testing.assert_array_equal(again.image, example.image)
    np.testing.assert_array_equal(again.boxes, example.boxes)


def test_random_flip_keeps_its_probability():
    example = marked(40, 60, (5, 10, 25, 38))
    rng = np.random.default_rng(0)
    moved = [transforms.random_flip(example, rng, 0.25).boxes[0, 0] != 5 for _ in range(400)]
    assert np.mean(moved) == pytest.approx(0.25, abs=0.08)
    assert transforms.random_flip(example, rng, 0.0) is example
    assert transforms.random_flip(example, rng, 1.0).boxes[0, 0] == 35


def test_images_without_objects():
    empty = marked(40, 60, (5, 10, 25, 38))
    empty = empty._replace(boxes=empty.boxes[:0], labels=empty.labels[:0], crowd=empty.crowd[:0], area=empty.area[:0])
    for example in (transforms.resize_to_fit(empty, 20, 20), transforms.flip(empty)):
        assert example.boxes.shape == (0, 4)
        assert example.area.shape == (0,)
