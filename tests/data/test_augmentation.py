"""What training of segmenters and classifiers changes: crops, areas, centre crops, distortion, mixtures."""

import itertools

import numpy as np
import pytest

from kdjax.data import transforms
from kdjax.data.batches import eval_batches, train_batches
from kdjax.data.distortion import Step, distort, drawn_steps
from kdjax.data.examples import ClassifiedImage, MappedImage
from kdjax.data.sizing import Augmentation, Sizing, sizing
from kdjax.data.transforms import MIXUP, NUMBERS, Geometry
from kdjax.errors import UserError
from kdjax.types import IGNORED, Labels


class Coded:
    """Images whose pixels say where they are: red the row, green the column; their maps are of blocks of 8 pixels."""

    class_names, category_ids, origin, fingerprint = ("a", "b", "c"), (), "coded", "coded"

    def __init__(self, count=12, size=None):
        self._count, self._size = count, size

    def __len__(self):
        return self._count

    def size(self, index):
        return self._size or (40 + 8 * (index % 4), 64 - 8 * (index % 3))

    def image_id(self, index):
        return index

    def image(self, index):
        height, width = self.size(index)
        rows, columns = np.mgrid[:height, :width]
        return np.stack([rows, columns, np.full_like(rows, 20 * index)], axis=-1).astype(np.uint8)


class Maps(Coded):
    def __getitem__(self, index):
        return MappedImage(self.image(index), index, self.classes(index))

    def classes(self, index):
        height, width = self.size(index)
        rows, columns = np.mgrid[:height, :width] // 8
        return ((rows + columns + index) % 3).astype(np.uint8)


class Classes(Coded):
    def __getitem__(self, index):
        return ClassifiedImage(self.image(index), index, self.label(index))

    def label(self, index):
        return index % 3


class MapTask:
    """Fills label maps."""

    def targets(self, images, shape):
        return Labels(np.full((images, *shape), IGNORED, np.uint8))

    def fill(self, targets, row, example, geometry):
        height, width = geometry.size
        targets.classes[row, :height, :width] = transforms.move_classes(example.classes, geometry)


class ClassTask:
    """Fills classes, mixed ones too."""

    def targets(self, images, shape):
        return Labels(np.zeros(images, np.int32), np.zeros(images, np.int32), np.zeros(images, np.float32))

    def fill(self, targets, row, example, geometry):
        targets.classes[row], targets.other[row], targets.share[row] = example.label, example.other, example.share


def take(count, source, augmentation, image_size=(64, 64), batch_size=4, **options):
    task = MapTask() if isinstance(source, Maps) else ClassTask()
    options = dict(seed=5, num_threads=2) | options
    batches = train_batches(
        source, batch_size=batch_size, image_size=image_size, task=task, augmentation=augmentation, **options
    )
    return list(itertools.islice(batches, count))


def draws(count=200, seed=0):
    return np.random.default_rng(seed).random((count, NUMBERS))


CROP = Augmentation(flip=0.5, crop=(32, 48), jitter=(0.5, 2.0))
OPTIONS = {
    "crop": (Maps(), CROP),
    "steps and shares": (Maps(), CROP._replace(jitter_steps=16, cat_max_ratio=0.45)),
    "distortion": (Maps(), CROP._replace(photometric=True)),
    "area": (Classes(), Augmentation(flip=0.5, area=(0.08, 1.0))),
    "mixup": (Classes(), Augmentation(area=(0.3, 1.0), mixup=0.4)),
}


def arrays(batch):
    return [batch.images, batch.size, batch.index, *(x for x in batch.targets if x is not None)]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_depends_on_seed_and_step_alone(name):
    source, augmentation = OPTIONS[name]
    expected = take(5, source, augmentation)
    for options in ({"first_step": 3}, {"first_step": 3, "num_threads": 5}):
        for before, after in zip(expected[3:], take(2, source, augmentation, **options), strict=True):
            for x, y in zip(arrays(before), arrays(after), strict=True):
                np.testing.assert_array_equal(x, y)
    halves = [take(2, source, augmentation, process_index=k, process_count=2) for k in range(2)]
    for step, pair in enumerate(zip(*halves, strict=True)):
        for x, parts in zip(arrays(expected[step]), zip(*map(arrays, pair), strict=True), strict=True):
            np.testing.assert_array_equal(x, np.concatenate(parts))
    assert (expected[0].images != take(1, source, augmentation, seed=6)[0].images).any()


def test_training_arrays_have_the_shape_of_the_crop_and_padding_is_black_and_ignored():
    seen = set()
    for batch in take(20, Maps(), CROP._replace(jitter=(0.5, 2.0))):
        assert batch.images.shape == (4, 32, 48, 3)
        assert batch.targets.classes.shape == (4, 32, 48)
        for image, (height, width), classes in zip(
            batch.images, batch.size.tolist(), batch.targets.classes, strict=True
        ):
            for array, nothing in ((image, 0), (classes, IGNORED)):
                assert (array[height:] == nothing).all()
                assert (array[:, width:] == nothing).all()
            assert (classes[:height, :width] != IGNORED).all()
            seen.add((height < 32, width < 48))
    assert (False, False) in seen
    assert len(seen) > 1


def test_maps_follow_their_images():
    """Where neighbours are of one class, a pixel's row and column say which class it has."""
    for batch in take(10, Maps(), CROP._replace(jitter=(0.8, 2.0))):
        for image, (height, width), classes in zip(
            batch.images, batch.size.tolist(), batch.targets.classes, strict=True
        ):
            image, classes = image[:height, :width].astype(int), classes[:height, :width]
            expected = (image[..., 0] // 8 + image[..., 1] // 8 + image[..., 2] // 20) % 3
            inside = (abs(image[..., :2] % 8 - 3.5) < 2.5).all(axis=-1)
            assert inside.mean() > 0.1
            assert (expected == classes)[inside].mean() > 0.98


def test_a_crop_is_a_window_of_the_image_as_evaluation_scales_it_times_jitter():
    sizes = Sizing(((64, 128),))
    for image in ((64, 128), (32, 64), (100, 100)):
        scale = float(sizes.scale(np.array(image), np.array((64, 128))))
        for numbers in draws(50):
            found = transforms.draw(image, numbers, (64, 128), sizes, Augmentation(crop=(32, 32), jitter=(0.5, 2.0)))
            factor = scale * (0.5 + 1.5 * numbers[1])
            for side in (0, 1):
                wanted = min(32 / factor, image[side])
                assert abs(found.window[side] - wanted) <= 1
                assert found.size[side] == (32 if found.window[side] < image[side] else round(image[side] * factor))
                assert 0 <= found.corner[side] <= image[side] - found.window[side]
    plain = transforms.draw((64, 128), draws(1)[0], (64, 128), sizes, Augmentation(crop=(32, 32)))
    assert plain.window == plain.size == (32, 32)


def test_jitter_of_steps_has_as_many_factors_with_both_ends():
    sizes, augmentation = Sizing(((512, 512),)), Augmentation(crop=(64, 64), jitter=(0.5, 2.0), jitter_steps=16)
    windows = {
        transforms.draw((512, 512), numbers, (512, 512), sizes, augmentation).window[0] for numbers in draws(400)
    }
    assert windows == {round(64 / (0.5 + k / 10)) for k in range(16)}


def test_windows_that_one_class_fills_are_drawn_anew_up_to_ten_times():
    classes = np.zeros((64, 64), np.uint8)
    classes[:, 48:] = 1
    classes[:8] = IGNORED

    def share(geometry):
        (top, left), (height, width) = geometry.corner, geometry.window
        window = classes[top : top + height, left : left + width]
        count = np.bincount(window[window != IGNORED], minlength=2)
        assert transforms.largest_share(classes, geometry) == (count.max() / count.sum() if count.any() else 1)
        return count.max() / max(count.sum(), 1)

    def found(accepts):
        options = (64, 64), Sizing(((64, 64),)), Augmentation(crop=(32, 32))
        return [transforms.draw((64, 64), numbers, *options, accepts) for numbers in draws(200)]

    plain = [share(geometry) for geometry in found(lambda _: True)]
    chosen = [share(geometry) for geometry in found(lambda x: transforms.largest_share(classes, x) <= 0.75)]
    assert np.mean(np.array(plain) > 0.75) > 0.4
    assert np.mean(np.array(chosen) > 0.75) < 0.1
    # What is good at once stays as it is without the option.
    assert all(x == y for x, y in zip(plain, chosen, strict=True) if x <= 0.75)
    asked = []
    found(lambda geometry: asked.append(geometry) is not None)
    assert len(asked) == 200 * 11


def test_an_area_is_drawn_as_torchvision_does():
    """Share and logarithm of the ratio are uniform where every try fits; places are, within the room that is left."""
    augmentation, sizes = Augmentation(area=(0.08, 1.0)), sizing((32, 32))
    found = [transforms.draw((300, 400), numbers, (32, 32), sizes, augmentation) for numbers in draws(4000)]
    assert {x.size for x in found} == {(32, 32)}
    height, width = np.array([x.window for x in found]).T
    top, left = np.array([x.corner for x in found]).T
    assert (top >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, ratio = height * width / (300 * 400), width / height
    assert share.min() > 0.075
    assert share.max() <= 1
    assert 0.73 < ratio.min() < 0.77
    assert 1.29 < ratio.max() < 1.36
    small = share < 0.5
    assert np.mean(share[small]) == pytest.approx(0.29, abs=0.02)
    assert np.mean(np.log(ratio[small])) == pytest.approx(0, abs=0.02)
    assert np.mean((top / np.maximum(300 - height, 1))[small]) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("image", "corner", "window"),
    [((10, 400), (0, 193), (10, 13)), ((400, 10), (193, 0), (13, 10)), ((20, 21), (0, 0), (20, 21))],
)
def test_where_no_try_fits_the_middle_is_taken(image, corner, window):
    """A share above 1 never fits."""
    found = transforms.draw(image, draws(1)[0], (32, 32), sizing((32, 32)), Augmentation(area=(1.5, 1.6)))
    assert (found.corner, found.window, found.size) == (corner, window, (32, 32))


@pytest.mark.parametrize(
    ("image", "sides", "window", "corner"),
    [
        ((512, 512), (256,), (448, 448), (32, 32)),
        ((375, 500), (256,), (328, 328), (23, 86)),
        ((100, 300), (), (100, 100), (0, 100)),
        ((224, 224), (), (224, 224), (0, 0)),
        ((50, 50), (256,), (44, 44), (3, 3)),
    ],
)
def test_a_centre_crop_fills_the_array_from_the_middle(image, sides, window, corner):
    sizes = Sizing(((224, 224),), sides, centre_crop=True)
    found = transforms.fit(image, (224, 224), sizes)
    assert found == Geometry(image, corner, window, False, (224, 224), True)


def test_evaluation_sees_centre_crops_of_all_images_and_says_so():
    source, sizes = Classes(6), Sizing(((32, 32),), (36,), centre_crop=True)
    assert Sizing.of(sizes.described()) == sizes
    (batch,) = eval_batches(source, batch_size=6, image_size=sizes)
    np.testing.assert_array_equal(batch.size, np.full((6, 2), 32))
    for row, image in enumerate(batch.images):
        height, width = source.size(row)
        assert abs(image[..., 0].mean() - (height - 1) / 2) < 1
        assert abs(image[..., 1].mean() - (width - 1) / 2) < 1


def test_a_mixture_is_both_images_by_the_share_that_its_targets_have():
    """Blue says which image it is; without a change of place, both are known in every pixel."""
    source = Classes(12, size=(32, 32))
    shares = []
    mixtures, alone = (take(30, source, Augmentation(mixup=x), image_size=(32, 32)) for x in (0.5, 0.0))
    for batch, plain in zip(mixtures, alone, strict=True):
        for row, image in enumerate(batch.images):
            own, share = plain.images[row], batch.targets.share[row]
            assert batch.targets.classes[row] == plain.targets.classes[row] == (own[0, 0, 2] // 20) % 3
            others = [k for k in range(12) if k % 3 == batch.targets.other[row]]
            expected = [(1 - share) * own + share * source.image(k) for k in others]
            assert min(abs(x - image).max() for x in expected) <= 0.51
            shares.append(share)
    # The beta distribution of 1/2 and 1/2 has a variance of 1/8.
    assert np.mean(shares) == pytest.approx(0.5, abs=0.08)
    assert np.var(shares) == pytest.approx(0.125, abs=0.03)


def test_a_partner_is_any_image():
    source, numbers = Classes(5), draws(1)[0]
    assert {int(x * len(source)) for x in draws(200)[:, MIXUP.start]} == set(range(5))
    assert MIXUP.stop <= len(numbers)


@pytest.mark.parametrize(
    ("source", "augmentation", "message"),
    [
        (
            Classes(),
            Augmentation(cat_max_ratio=0.75),
            "config.data.cat_max_ratio is for label maps, which coded has",
        ),
        (Maps(), Augmentation(mixup=0.2), "config.data.mixup is for images of one class each, which coded has not"),
    ],
)
def test_options_without_their_truth_are_one_sentence(source, augmentation, message):
    with pytest.raises(UserError, match=message):
        take(1, source, augmentation)


def test_distortion_draws_each_change_half_of_the_time_and_contrast_second_or_last():
    drawn = [drawn_steps(numbers) for numbers in draws(2000)[:, :9]]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        amounts = [step.amount for steps in drawn for step in steps if step.name == name]
        assert len(amounts) / len(drawn) == pytest.approx(0.5, abs=0.05)
        assert low <= min(amounts) < max(amounts) <= high
        assert np.mean(amounts) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
    orders = {tuple(step.name for step in steps) for steps in drawn if len(steps) == 4}
    assert orders == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }


def test_distortion_keeps_grey_grey_and_nothing_is_nothing():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for step in (Step("hue", 9), Step("saturation", 1.4)):
        np.testing.assert_array_equal(distort(grey, [step]), grey)
    colours = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    np.testing.assert_array_equal(distort(colours, []), colours)
    assert abs(distort(colours, [Step("hue", 0)]).astype(int) - colours).max() <= 6
    assert distort(colours, [Step("brightness", -300)]).max() == 0


def test_one_option_more_changes_no_other():
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    for numbers in draws(20):
        first = transforms.augment(image, numbers, (32, 32), sizing((32, 32)), Augmentation(flip=0.5, crop=(32, 32)))
        options = Augmentation(flip=0.5, crop=(32, 32), photometric=True, color=0.2, cat_max_ratio=0.5, mixup=1.0)
        assert transforms.augment(image, numbers, (32, 32), sizing((32, 32)), options)[1] == first[1]
