"""Pictures show every box, label and caption where they belong, at a readable size."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from kdjax.data.examples import Example
from kdjax.tasks.average_precision import ImageDetections
from kdjax.visualize import Mark, draw_boxes, save_predictions

RED, BLUE = (255, 64, 64), (64, 64, 255)


class ListSource(list):
    class_names = ("cat", "dog")


def example(height=60, width=80, crowd=False) -> Example:
    return Example(
        image=np.full((height, width, 3), 128, np.uint8),
        image_id=7,
        boxes=np.array([[20, 20, 50, 40]], np.float32),
        labels=np.array([1], np.int32),
        crowd=np.array([crowd]),
        area=np.array([600], np.float32),
    )


def found(scores, boxes=None) -> ImageDetections:
    boxes = np.tile(np.array([[20, 20, 50, 40]], np.float32), (len(scores), 1)) if boxes is None else np.asarray(boxes)
    return ImageDetections(7, boxes, np.asarray(scores, np.float32), np.ones(len(scores), np.int32))


def pixels(picture: Image.Image, colour) -> np.ndarray:
    """(n, 2) x, y of the pixels of a colour."""
    return np.argwhere((np.asarray(picture) == colour).all(axis=-1))[:, ::-1]


def saved(path) -> Image.Image:
    with Image.open(path) as file:
        assert file.format == "PNG"
        return file.convert("RGB")


def differs(a: Image.Image, b: Image.Image) -> tuple[int, int, int, int] | None:
    """The rectangle outside which two pictures are equal."""
    return ImageChops.difference(a, b).getbbox()


def test_boxes_are_drawn_where_they_are_and_scaled_with_the_image():
    image = np.zeros((50, 100, 3), np.uint8)
    picture = draw_boxes(image, [Mark(np.array([40.0, 10, 60, 30]), "", RED)])
    scale = picture.width / 100
    assert picture.width > 300
    assert picture.height == round(50 * scale)
    x, y = pixels(picture, RED).T
    # The empty label stands above the box: look below its upper edge.
    x, y = x[y > 10 * scale + 1], y[y > 10 * scale + 1]
    np.testing.assert_allclose([x.min(), x.max(), y.max()], np.array([40, 60, 30]) * scale, atol=1)
    inside = (x > 40 * scale + 3) & (x < 60 * scale - 3) & (y < 30 * scale - 3)
    assert not inside.any()


def test_large_images_are_reduced_and_small_ones_enlarged_to_the_same_size():
    sizes = {draw_boxes(np.zeros((*shape, 3), np.uint8), []).size for shape in [(16, 32), (1000, 2000)]}
    assert len(sizes) == 1


def test_labels_stay_inside_the_picture_and_apart():
    image = np.zeros((64, 64, 3), np.uint8)
    corner = np.array([0.0, 0, 64, 64])
    one = draw_boxes(image, [Mark(corner, "a long label", RED)])
    two = draw_boxes(image, [Mark(corner, "a long label", RED), Mark(corner, "another one", BLUE)])
    filled_alone, filled = len(pixels(one, RED)), len(pixels(two, RED))
    # The second label covers nothing of the first: at most the outline underneath it is lost.
    assert filled > 0.8 * filled_alone
    label = len(pixels(two, BLUE))
    assert label > 500


def test_a_picture_has_a_row_for_each_image_and_a_column_for_each_detector(tmp_path):
    source = ListSource([example(), example(height=80, width=60)])
    predictions = {"teacher": [found([0.9]), found([0.8])], "student": [found([0.7]), found([0.6])]}
    save_predictions(tmp_path / "a.png", source, predictions)
    picture = saved(tmp_path / "a.png")
    save_predictions(tmp_path / "b.png", source, {"teacher": predictions["teacher"]})
    narrow = saved(tmp_path / "b.png")
    assert picture.height == narrow.height
    column = picture.width - narrow.width
    assert narrow.width == pytest.approx(2 * column, abs=20)
    # The columns that both have are the same; the last one is not empty.
    assert differs(picture.crop((0, 0, *narrow.size)), narrow) is None
    assert differs(picture.crop((column, 0, column + narrow.width, picture.height)), narrow) is not None


def test_detections_below_the_threshold_are_not_drawn(tmp_path):
    source = ListSource([example()])
    for name, scores in ("none", []), ("low", [0.29]), ("high", [0.31]):
        save_predictions(tmp_path / f"{name}.png", source, {"student": [found(scores)]}, score_threshold=0.3)
    none, low, high = (saved(tmp_path / f"{name}.png") for name in ("none", "low", "high"))
    assert differs(none, low) is None
    left, top, right, bottom = differs(none, high)
    # Only the student's column, and only the box with its label, differ.
    assert left > none.width / 2
    assert (right - left) / (none.width / 2) == pytest.approx(30 / 80, abs=0.05)
    assert bottom - top > 20 / 80 * (right - left)


def test_the_truth_comes_first_and_names_crowds(tmp_path):
    for name, crowd in ("object", False), ("crowd", True):
        save_predictions(tmp_path / f"{name}.png", ListSource([example(crowd=crowd)]), {"student": [found([])]})
    left, _, right, _ = differs(*(saved(tmp_path / f"{name}.png") for name in ("object", "crowd")))
    assert 0 < left < right < saved(tmp_path / "crowd.png").width / 2


def test_columns_of_different_lengths_are_refused(tmp_path):
    source = ListSource([example(), example()])
    with pytest.raises(ValueError, match=r"same number of images, not \{'teacher': 2, 'student': 1\}"):
        save_predictions(tmp_path / "a.png", source, {"teacher": [found([0.9])] * 2, "student": [found([0.9])]})
