"""Pictures show every box, label and caption where they belong, at a readable size."""

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageChops

from kdjax.data.examples import Example
from kdjax.tasks.average_precision import ImageDetections
from kdjax.visualize import (
    FALSE_ALARM,
    HIT,
    IGNORED,
    MISS,
    MOST_BYTES,
    TRUTH,
    Mark,
    draw_boxes,
    judged_marks,
    save_predictions,
)

RED, BLUE = (255, 64, 64), (64, 64, 255)


class ListSource(list):
    class_names = ("cat", "dog")

    def image_id(self, index):
        return 7

    def name(self, index):
        return f"images/{index}.jpg"


def example(height=60, width=80, crowd=False) -> Example:
    return Example(
        image=np.full((height, width, 3), 128, np.uint8),
        image_id=7,
        boxes=np.array([[20, 20, 50, 40]], np.float32),
        labels=np.array([1], np.int32),
        crowd=np.array([crowd]),
        area=np.array([600], np.float32),
    )


def found(scores, boxes=None, labels=None) -> ImageDetections:
    boxes = (
        np.tile(np.array([[20, 20, 50, 40]], np.float32), (len(scores), 1))
        if boxes is None
        else np.array(boxes, np.float32)
    )
    return ImageDetections(
        7,
        boxes,
        np.asarray(scores, np.float32),
        np.ones(len(scores), np.int32) if labels is None else np.asarray(labels),
    )


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


BOX, AWAY = [20, 20, 50, 40], [60, 0, 75, 15]


@pytest.mark.parametrize(
    ("detections", "colours"),
    [
        (found([]), [MISS]),
        (found([0.29]), [MISS]),
        (found([0.31]), [HIT]),
        (found([0.9], [[20, 20, 50, 31]]), [HIT]),
        (found([0.9], [[20, 20, 50, 29]]), [FALSE_ALARM, MISS]),
        (found([0.9], labels=[0]), [FALSE_ALARM, MISS]),
        (found([0.9, 0.8], [BOX, AWAY]), [HIT, FALSE_ALARM]),
        # Of what overlaps, only the best is drawn, whatever its class; a worse one of the right class is no hit then.
        (found([0.8, 0.9], labels=[0, 1]), [HIT]),
        (found([0.8, 0.9], labels=[1, 0]), [FALSE_ALARM, MISS]),
        # One object is found once.
        (found([0.9, 0.8], [BOX, [20, 20, 50, 31]]), [HIT, FALSE_ALARM]),
    ],
)
def test_hits_misses_and_false_alarms(detections, colours):
    assert [mark.colour for mark in judged_marks(example(), detections, ("cat", "dog"), 0.3)] == colours


def test_what_is_found_in_a_crowd_counts_for_nothing_and_a_crowd_is_not_missed():
    crowd = example(crowd=True)
    assert [mark.colour for mark in judged_marks(crowd, found([0.9], [[22, 22, 30, 30]]), ("cat", "dog"), 0.3)] == [
        IGNORED
    ]
    assert judged_marks(crowd, found([]), ("cat", "dog"), 0.3) == []


def test_found_masks_are_tinted_under_their_boxes():
    half = np.zeros((60, 80), np.uint8)
    half[20:40, 20:35] = 1
    mask = coco_mask.encode(np.asfortranarray(half))
    (mark,) = judged_marks(example(), found([0.9])._replace(masks=(mask,)), ("cat", "dog"), 0.3)
    assert (mark.colour, mark.mask) == (HIT, mask)
    # Labels lie outside of the middle of the box.
    picture = np.asarray(draw_boxes(example().image, [mark], longest=80))
    np.testing.assert_array_equal(picture[25:35, 25:32], np.tile((128 + np.array(HIT)) // 2, (10, 7, 1)))
    np.testing.assert_array_equal(picture[25:35, 38:46], np.full((10, 8, 3), 128))


def near(picture: Image.Image, colour) -> np.ndarray:
    """(n, 2) x, y of the pixels that are nearly of a colour."""
    return np.argwhere((np.abs(np.asarray(picture).astype(int) - colour) < 5).all(axis=-1))[:, ::-1]


def test_colours_stand_in_their_columns_and_in_the_legend(tmp_path):
    predictions = {"good  AP 50.0": [found([0.9])], "bad  AP 1.0": [found([0.9], [AWAY])]}
    save_predictions(tmp_path / "a.png", ListSource([example()]), predictions)
    picture = saved(tmp_path / "a.png")
    column, legend = picture.width / 3, 35
    for colour, columns in ((TRUTH, {0}), (HIT, {1}), (MISS, {2}), (FALSE_ALARM, {2})):
        places = near(picture, colour)
        assert (places[:, 1] < legend).any()
        assert set((places[places[:, 1] > 100, 0] // column).astype(int).tolist()) == columns


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path):
    other = example()._replace(image_id=8)
    save_predictions(tmp_path / "a.png", ListSource([example(), other]), {"student": [found([0.9])] * 2})
    save_predictions(tmp_path / "b.png", ListSource([example()]), {"student": [found([0.9])]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("images", "size"), [(8, (480, 640)), pytest.param(32, (300, 200), marks=pytest.mark.slow)])
def test_noisy_photographs_make_a_small_file_whose_boxes_are_sharp(images, size, tmp_path):
    rng = np.random.default_rng(0)
    noise = [example()._replace(image=rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(images)]
    columns = {name: [found([0.9])] * images for name in ("teacher", "student", "baseline")}
    save_predictions(tmp_path / "a.png", ListSource(noise), columns)
    assert (tmp_path / "a.png").stat().st_size <= MOST_BYTES
    picture = saved(tmp_path / "a.png")
    assert picture.width > 1800
    assert len(near(picture, HIT)) > 200 * images


def test_small_pictures_keep_all_their_colours(tmp_path):
    save_predictions(tmp_path / "a.png", ListSource([example()]), {"student": [found([0.9])]})
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "RGB"


def test_a_name_that_is_too_long_keeps_its_end(tmp_path):
    class Long(ListSource):
        def name(self, index):
            return "valid/" + "x" * 300 + ".jpg"

    for kind in (ListSource, Long):
        save_predictions(tmp_path / f"{kind.__name__}.png", kind([example()]), {"student": [found([])]})
    _, _, right, _ = differs(*(saved(tmp_path / f"{name}.png") for name in ("ListSource", "Long")))
    assert right < 14 + 448 + 14


def test_the_truth_comes_first_and_names_crowds(tmp_path):
    for name, crowd in ("object", False), ("crowd", True):
        save_predictions(tmp_path / f"{name}.png", ListSource([example(crowd=crowd)]), {"student": [found([])]})
    one, other = (saved(tmp_path / f"{name}.png") for name in ("object", "crowd"))
    truth = 0, 35, one.width // 2, one.height
    assert differs(one.crop(truth), other.crop(truth)) is not None
    # In the other column an object is missed, and a crowd is not.
    student = one.width // 2, 100, one.width, one.height
    assert len(near(one.crop(student), MISS))
    assert not len(near(other.crop(student), MISS))


def test_columns_of_different_lengths_are_refused(tmp_path):
    source = ListSource([example(), example()])
    with pytest.raises(ValueError, match=r"same number of images, not \{'teacher': 2, 'student': 1\}"):
        save_predictions(tmp_path / "a.png", source, {"teacher": [found([0.9])] * 2, "student": [found([0.9])]})
