"""Transforms against the pixels: a box is painted, the image transformed, and the paint found again."""

import colorsys

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageEnhance

from kdjax.data import transforms
from kdjax.data.examples import Example
from kdjax.data.objects import moved
from kdjax.data.sizing import RESIZES, Augmentation, Sizing, sizing
from kdjax.data.transforms import NUMBERS, whole
from kdjax.weights import SOURCES


def marked(height, width, box):
    """A black image whose box is white, and the box's outline: a polygon."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    area = np.array([(x2 - x1) * (y2 - y1)], np.float32)
    outline = ([[x1, y1, x2, y1, x2, y2, x1, y2]],)
    return Example(image, 3, np.array([box], np.float32), np.array([2], np.int32), np.array([False]), area, outline)


def applied(example, geometry):
    """Pixels and objects in a geometry."""
    return moved(example, geometry)._replace(image=transforms.move(example.image, geometry))


def resize(example, height, width):
    return applied(example, whole(example.image.shape[:2], (height, width)))


def flip(example):
    return applied(example, whole(example.image.shape[:2])._replace(mirrored=True))


def crop(example, top, left, height, width):
    window = (height, width)
    return applied(example, whole(example.image.shape[:2], window)._replace(corner=(top, left), window=window))


def fit(example, shape, sizing):
    return applied(example, transforms.fit(example.image.shape[:2], shape, sizing))


def recolor(example, *changes):
    return example._replace(image=transforms.recolor(example.image, *changes))


def augment(example, *arguments):
    image, geometry = transforms.augment(example.image, *arguments)
    return moved(example, geometry)._replace(image=image)


def with_run_lengths(example):
    """The same with the outline in COCO's other form."""
    mask = np.asfortranarray(example.image[:, :, 0] // 255)
    return example._replace(segmentation=(coco_mask.encode(mask),))


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


def assert_outline_is_where_the_paint_is(example, share=0.05):
    """The outline covers the white pixels, up to a share of them at the edges."""
    height, width = example.image.shape[:2]
    (outline,) = example.segmentation
    found = coco_mask.decode(coco_mask.segmToRle(outline, width, height)).astype(bool)
    painted = example.image[:, :, 0] > 127
    assert np.count_nonzero(found != painted) <= share * max(np.count_nonzero(painted), 40)


CASES = [(40, 60, (5, 10, 25, 38)), (60, 40, (0, 0, 40, 60)), (33, 70, (20, 3, 69, 30)), (50, 50, (10, 20, 41, 45))]
FORMS = pytest.mark.parametrize("form", [lambda x: x, with_run_lengths], ids=["polygon", "run lengths"])


@FORMS
@pytest.mark.parametrize(("height", "width", "box"), CASES)
@pytest.mark.parametrize("size", [(80, 120), (40, 40), (30, 60), (100, 41)])
def test_resize_moves_boxes_and_outlines_with_pixels(height, width, box, size, form):
    example = resize(form(marked(height, width, box)), *size)
    assert example.image.shape == (*size, 3)
    assert example.image.dtype == np.uint8
    assert example.boxes.dtype == np.float32
    # Interpolation smears an edge over the width of its kernel, symmetrically: a pixel of either image.
    stretch = max(1, size[0] / height, size[1] / width)
    np.testing.assert_allclose(example.boxes[0], box_of(example.image), atol=0.75 * stretch)
    x1, y1, x2, y2 = example.boxes[0]
    assert example.area[0] == pytest.approx((x2 - x1) * (y2 - y1), rel=1e-5)
    assert_outline_is_where_the_paint_is(example, share=0.12)


@pytest.mark.parametrize(
    ("resize", "photograph", "odd"),
    [
        # 640 x 800 / 480 is nearer to 1067 than to 1066; 2.5 is as near to 2 as to 3.
        ("torchvision", (800, 1066), (2, 7)),
        ("kdjax", (800, 1067), (2, 8)),
        ("mmdet", (800, 1067), (3, 8)),
        ("detectron2", (800, 1067), (3, 8)),
    ],
)
def test_sides_are_rounded_as_the_program_does_that_a_detector_is_from(resize, photograph, odd):
    scaled = Sizing(((800, 1344),), (800,), 1333, resize)
    assert transforms.fit((480, 640), (800, 1344), scaled).size == photograph
    assert transforms.fit((5, 15), (32, 32), Sizing(((32, 32),), (2.5,), 0, resize)).size == odd


def test_every_source_of_weights_says_how_its_images_were_scaled():
    assert {source.resize for source in SOURCES.values()} == RESIZES.keys() - {"kdjax"}


def test_without_antialiasing_each_pixel_is_between_its_four_neighbours():
    image = np.random.default_rng(0).integers(0, 256, (13, 9, 3), np.uint8)
    for height, width in ((5, 4), (20, 31), (7, 18), (13, 3)):
        sizing = Sizing(((32, 32),), resize="mmdet")
        geometry = transforms.fit((13, 9), (32, 32), sizing)._replace(size=(height, width))
        found = transforms.move(image, geometry)
        for y, x in np.ndindex(height, width):
            v, u = (y + 0.5) * 13 / height - 0.5, (x + 0.5) * 9 / width - 0.5
            v, u = min(max(v, 0), 12), min(max(u, 0), 8)
            rows, columns = [int(v), min(int(v) + 1, 12)], [int(u), min(int(u) + 1, 8)]
            shares = np.outer([1 - v % 1, v % 1], [1 - u % 1, u % 1])
            exact = np.sum(shares[..., None] * image[np.ix_(rows, columns)], axis=(0, 1))
            assert np.abs(found[y, x] - exact).max() <= 0.5 + 1e-3
    # Pillow averages where an image shrinks, and only there.
    pillow = [np.asarray(Image.fromarray(image).resize(s, Image.Resampling.BILINEAR)) for s in ((30, 40), (4, 5))]
    far = [
        np.abs(pillow[k] - transforms.interpolate(image, s).astype(int)).max() for k, s in enumerate(((40, 30), (5, 4)))
    ]
    assert far[0] <= 1
    assert far[1] > 20


def test_resize_to_the_same_size_is_the_identity():
    example = marked(*CASES[0])
    found = resize(example, 40, 60)
    assert all(a is b for a, b in zip(found, example, strict=True))


@FORMS
@pytest.mark.parametrize(("height", "width", "box"), CASES)
def test_flip_moves_boxes_and_outlines_with_pixels(height, width, box, form):
    example = form(marked(height, width, box))
    flipped = flip(example)
    np.testing.assert_array_equal(flipped.image, example.image[:, ::-1])
    np.testing.assert_array_equal(flipped.boxes[0], box_of(flipped.image))
    assert_outline_is_where_the_paint_is(flipped)
    again = flip(flipped)
    np.testing.assert_array_equal(again.image, example.image)
    np.testing.assert_array_equal(again.boxes, example.boxes)


@FORMS
@pytest.mark.parametrize(("height", "width", "box"), CASES)
@pytest.mark.parametrize("window", [(2, 5, 30, 28), (0, 0, 33, 40), (12, 3, 20, 36)])
def test_crop_clips_boxes_to_what_is_left_of_the_pixels(height, width, box, window, form):
    example = form(marked(height, width, box))
    top, left, rows, columns = window
    cropped = crop(example, *window)
    np.testing.assert_array_equal(cropped.image, example.image[top : top + rows, left : left + columns])
    np.testing.assert_array_equal(cropped.boxes[0], box_of(cropped.image))
    assert cropped.area[0] == pytest.approx(np.count_nonzero(cropped.image[:, :, 0]))
    assert cropped.boxes.dtype == cropped.area.dtype == np.float32
    assert_outline_is_where_the_paint_is(cropped)


@pytest.mark.parametrize(("crowd", "kept"), [(False, [3, 2]), (True, [3, 1, 2])])
def test_crop_drops_objects_of_which_too_little_is_left(crowd, kept):
    """Of a window of 20 x 20 at the upper left: all, 1/20, 1/5 and nothing of four boxes."""
    boxes = np.array([[2, 2, 12, 12], [19, 0, 39, 10], [16, 10, 36, 20], [20, 0, 30, 10]], np.float32)
    labels = np.array([3, 1, 2, 0], np.int32)
    outlines = tuple([[float(label)] * 6] for label in labels)
    flags = np.full(4, crowd) & (labels == 1)
    example = Example(np.zeros((40, 40, 3), np.uint8), 7, boxes, labels, flags, np.full(4, 100, np.float32), outlines)
    cropped = crop(example, 0, 0, 20, 20)
    assert cropped.labels.tolist() == kept
    assert len(cropped.boxes) == len(cropped.crowd) == len(cropped.area) == len(cropped.segmentation) == len(kept)
    assert [outline[0][0] for outline in cropped.segmentation] == kept
    np.testing.assert_array_equal(cropped.boxes[-1], [16, 10, 20, 20])
    assert cropped.area[-1] == pytest.approx(20)


def photograph(seed=0):
    """Soft colours, far enough from the limits that no change of a tenth meets them."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(60, 180, (6, 8, 3), dtype=np.uint8)).resize(
        (40, 30), Image.Resampling.BILINEAR
    )
    example = marked(30, 40, (3, 4, 20, 25))
    return example._replace(image=np.asarray(image))


@pytest.mark.parametrize(
    ("factors", "enhance"),
    [
        ((1.15, 1, 1), [(ImageEnhance.Brightness, 1.15)]),
        ((1, 0.6, 1), [(ImageEnhance.Contrast, 0.6)]),
        ((1, 1, 1.3), [(ImageEnhance.Color, 1.3)]),
        ((1, 1, 0), [(ImageEnhance.Color, 0)]),
        ((0.9, 1.2, 0.5), [(ImageEnhance.Brightness, 0.9), (ImageEnhance.Contrast, 1.2), (ImageEnhance.Color, 0.5)]),
    ],
)
def test_recolor_is_what_pillow_does_one_after_another(factors, enhance):
    example = photograph()
    expected = Image.fromarray(example.image)
    for enhancer, factor in enhance:
        expected = enhancer(expected).enhance(factor)
    found = recolor(example, *factors, 0.0)
    # Pillow rounds after each change, and the mean to a whole number.
    assert np.abs(found.image.astype(int) - np.asarray(expected).astype(int)).max() <= 2
    np.testing.assert_array_equal(found.boxes, example.boxes)


def test_recolor_turns_hues_and_keeps_brightness():
    example, turn = photograph(), 0.05
    found = recolor(example, 1, 1, 1, turn).image / 255
    assert np.abs(found * 255 - example.image).max() > 5
    for (r, g, b), new in zip(example.image.reshape(-1, 3)[::37] / 255, found.reshape(-1, 3)[::37], strict=True):
        y, i, q = colorsys.rgb_to_yiq(r, g, b)
        c, s = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
        expected = colorsys.yiq_to_rgb(y, c * i - s * q, s * i + c * q)
        np.testing.assert_allclose(new, expected, atol=1.2 / 255)
    grey = example._replace(image=np.full((4, 4, 3), 99, np.uint8))
    np.testing.assert_array_equal(recolor(grey, 1, 1.5, 0.3, 0.4).image, grey.image)


def test_recolor_cuts_off_at_the_limits():
    example = photograph()
    assert (recolor(example, 9, 1, 1, 0).image == 255).all()
    assert (recolor(example, 0, 1, 1, 0).image == 0).all()


COCO = Sizing(((800, 1344), (1344, 800), (1088, 1088)), (640, 800), 1333)


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        ((480, 640), (800, 1344), (800, 1067)),  # The shorter side to 800.
        ((640, 480), (1344, 800), (1067, 800)),
        ((360, 640), (800, 1344), (750, 1333)),  # The longer side to its limit.
        ((200, 2000), (800, 1344), (133, 1333)),
        ((640, 640), (800, 1344), (800, 800)),  # Fits all three; this is the smallest, and the first.
        ((1600, 1601), (800, 1344), (800, 800)),
    ],
)
def test_an_image_has_the_scale_of_the_field_and_the_smallest_shape_that_holds_it(size, shape, expected):
    chosen = COCO.shapes[COCO.choose(np.array([size]))[0]]
    assert chosen == shape
    example = fit(marked(*size, (10, 20, 90, 100)), chosen, COCO)
    assert example.image.shape[:2] == expected


def test_an_image_that_fits_no_shape_has_the_one_in_which_it_is_largest():
    sizing = Sizing(((64, 96), (96, 64), (64, 64)), (200,))
    sizes = np.array([[100, 150], [150, 100], [100, 100], [100, 101]])
    assert sizing.choose(sizes).tolist() == [0, 1, 2, 0]
    for size, index in zip(sizes.tolist(), sizing.choose(sizes), strict=True):
        shape = sizing.shapes[index]
        height, width = fit(marked(*size, (10, 20, 90, 100)), shape, sizing).image.shape[:2]
        assert height <= shape[0]
        assert width <= shape[1]
        assert height == shape[0] or width == shape[1]


def augmented(example, shape, sizing, augmentation, *, count=200):
    """The example with numbers as batches draw them, many times."""
    rng = np.random.default_rng(0)
    return [augment(example, rng.random(NUMBERS), shape, sizing, augmentation) for _ in range(count)]


def test_short_sides_are_drawn_in_training():
    sizing = Sizing(((64, 96),), (32, 40, 48, 64), 80)
    found = [x.image.shape[:2] for x in augmented(marked(40, 60, (5, 5, 50, 30)), (64, 96), sizing, Augmentation())]
    # 64 would need 96 pixels of width, of which the limit allows 80.
    assert set(found) == {(32, 48), (40, 60), (48, 72), (53, 80)}
    assert min(map(found.count, set(found))) > 30


def test_flips_keep_their_probability():
    sizes, example = sizing((40, 60)), marked(40, 60, (5, 10, 25, 38))
    found = augmented(example, (40, 60), sizes, Augmentation(flip=0.25))
    assert np.mean([x.boxes[0, 0] != 5 for x in found]) == pytest.approx(0.25, abs=0.08)
    plain = augmented(example, (40, 60), sizes, Augmentation(), count=5)
    assert all(x.image is example.image and x.boxes is example.boxes for x in plain)
    assert all(x.boxes[0, 0] == 35 for x in augmented(example, (40, 60), sizes, Augmentation(flip=1.0), count=5))


@FORMS
def test_jitter_scales_over_its_range_crops_what_is_too_large_and_moves_everything_along(form):
    example, shape = form(marked(60, 80, (20, 12, 64, 50))), (96, 96)
    found = augmented(example, shape, sizing(shape), Augmentation(flip=0.5, jitter=(0.25, 2.0)))
    scales, corners = [], set()
    for x in found:
        height, width = x.image.shape[:2]
        assert height <= 96
        assert width <= 96
        if not len(x.boxes):
            continue
        scale = np.sqrt(x.area[0] / np.prod(x.boxes[0, 2:] - x.boxes[0, :2]))
        assert scale == pytest.approx(1, abs=0.02)
        np.testing.assert_allclose(x.boxes[0], box_of(x.image), atol=0.75 * max(1, height / 60))
        assert_outline_is_where_the_paint_is(x, share=0.2)
        scales.append(height / 60 if height < 96 and width < 96 else np.nan)
        corners.add(tuple(x.boxes[0].round(2)))
    # At a factor of 1 the width fills the shape, at a scale of 1.2; above, but for the rounding of what is cropped.
    assert np.nanmin(scales) == pytest.approx(0.25 * 1.2, abs=0.05)
    assert np.mean([x.image.shape[1] < 94 for x in found]) == pytest.approx(0.75 / 1.75, abs=0.1)
    assert len(corners) > 150
    assert any(x.image.shape[:2] == (96, 96) for x in found)


def test_color_changes_pixels_alone_and_within_its_strength():
    example, shape = photograph(), (30, 40)
    found = augmented(example, shape, sizing(shape), Augmentation(color=0.2), count=50)
    change = [x.image.mean() / example.image.mean() for x in found]
    assert 0.78 <= min(change) < 0.85
    assert 1.15 < max(change) <= 1.22
    assert all(x.boxes is example.boxes for x in found)


@pytest.mark.parametrize("option", [{"color": 0.5}, {"jitter": (1.0, 1.0)}])
def test_an_option_more_changes_nothing_that_another_draws(option):
    example, numbers = photograph(), np.random.default_rng(3).random((50, NUMBERS))
    for row in numbers:
        plain, more = (
            augment(example, row, (30, 40), sizing((30, 40)), augmentation)
            for augmentation in (Augmentation(flip=0.5), Augmentation(flip=0.5, **option))
        )
        np.testing.assert_array_equal(plain.boxes, more.boxes)


def test_images_without_objects():
    empty = marked(40, 60, (5, 10, 25, 38))
    empty = empty._replace(
        boxes=empty.boxes[:0], labels=empty.labels[:0], crowd=empty.crowd[:0], area=empty.area[:0], segmentation=()
    )
    for example in (
        resize(empty, 20, 20),
        flip(empty),
        crop(empty, 3, 4, 20, 20),
        recolor(empty, 1.1, 1.1, 1.1, 0.1),
    ):
        assert example.boxes.shape == (0, 4)
        assert example.area.shape == (0,)
        assert example.segmentation == ()
