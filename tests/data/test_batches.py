"""Batches of small marked images: what is in them, and that nothing but (seed, step) decides it."""

import itertools
import threading

import jax
import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask

from kdjax.data.batches import batch_positions, eval_batches, padded, train_batches
from kdjax.data.masks import mask_grid, rasterize
from kdjax.data.sizing import Augmentation, Sizing
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from kdjax.tasks import Detection, detection
from tests.data.conftest import Marks

SIZE = {"image_size": (32, 32), "task": Detection(3)}
FLIP = Augmentation(flip=0.5)
EVERYTHING = {
    "image_size": Sizing(((48, 64), (64, 48), (48, 48)), (32, 40, 48), 64),
    "augmentation": Augmentation(flip=0.5, color=0.3),
}
JITTER = {"image_size": (48, 40), "augmentation": Augmentation(flip=0.5, jitter=(0.3, 2.0), color=0.3)}


def take_one_by_one(count, source, **options):
    options = {"batch_size": 4, "seed": 5, "num_threads": 2} | SIZE | options
    return itertools.islice(train_batches(source, **options), count)


def take(count, source, **options):
    return list(take_one_by_one(count, source, **options))


def names(batches):
    """Which example each image is: the red value of its first row."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch.images]


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_shapes_and_dtypes():
    (batch,) = take(1, Marks(9))
    specs = jax.tree.map(lambda array: (array.shape, array.dtype.name), batch)
    assert specs.images == ((4, 32, 32, 3), "uint8")
    assert specs.size == ((4, 2), "int32")
    assert specs.index == ((4,), "int32")
    assert specs.targets._asdict() == {
        "boxes": ((4, 3, 4), "float32"),
        "labels": ((4, 3), "int32"),
        "valid": ((4, 3), "bool"),
        "crowd": ((4, 3), "bool"),
        "masks": None,
    }


def test_every_epoch_has_each_example_once_in_a_new_order():
    """10 examples in batches of 4: the third batch spans the epochs, and nothing is dropped."""
    stream = names(take(10, Marks(10)))
    epochs = [stream[10 * epoch : 10 * epoch + 10] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("options", [{}, EVERYTHING, JITTER], ids=["plain", "shapes", "jitter"])
def test_the_seed_decides_and_threads_do_not(options):
    expected = take(6, Marks(20), **options)
    for threads in (1, 7):
        assert_equal(expected, take(6, Marks(20), num_threads=threads, **options))
    assert names(expected) != names(take(6, Marks(20), seed=6, **options))


@pytest.mark.parametrize("options", [{}, EVERYTHING, JITTER], ids=["plain", "shapes", "jitter"])
def test_any_step_can_be_the_first(options):
    everything = take(14, Marks(30), **options)
    for first in (1, 6, 7, 8, 12):
        assert_equal(everything[first : first + 2], take(2, Marks(30), first_step=first, **options))


def test_a_later_step_decodes_no_earlier_image():
    source, asked = Marks(40), []

    class Asked(Marks):
        def __getitem__(self, index):
            asked.append(index)
            return source[index]

    (batch,) = take(1, Asked(40), first_step=7)
    assert set(names([batch])) <= set(asked)
    # Two threads keep at most two batches under way, besides the one that is taken.
    assert len(asked) <= 4 * 3


@pytest.mark.parametrize("options", [{}, EVERYTHING, JITTER], ids=["plain", "shapes", "jitter"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_one_global_batch(count, options):
    options = options | {"batch_size": 8}
    everything = take(6, Marks(30), **options)
    slices = [take(4, Marks(30), first_step=2, process_index=i, process_count=count, **options) for i in range(count)]
    for step, parts in enumerate(zip(*slices, strict=True)):
        assert_equal(everything[2 + step], jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))
    np.testing.assert_array_equal(everything[0].index, np.arange(8))


@pytest.mark.parametrize("size", [SIZE["image_size"], EVERYTHING["image_size"]], ids=["plain", "shapes"])
def test_which_images_a_step_sees_is_known_without_them(size):
    for step, batch in enumerate(take(20, Marks(30), image_size=size)):
        assert batch_positions(Marks(30), batch_size=4, image_size=size, seed=5, step=step) == names([batch])


def test_a_part_of_a_batch_holds_the_same_images_however_many_processes_share_it():
    (whole,) = take(1, Marks(40), batch_size=16)
    shares = [take(1, Marks(40), batch_size=16, parts=2, process_index=i, process_count=2)[0] for i in range(2)]
    for part in (0, 1):
        rows = np.concatenate([share.index.reshape(2, 4)[part] for share in shares])
        np.testing.assert_array_equal(rows, np.arange(8 * part, 8 * part + 8))
    for share in shares:
        assert_equal(share, jax.tree.map(lambda array, rows=share.index: array[rows], whole))


def test_boxes_are_where_the_marks_are():
    """Every valid box is filled with the value of its label, except where a later object covers it."""
    seen = flipped = 0
    for batch in take(12, Marks(16), augmentation=FLIP):
        targets = batch.targets
        for image, boxes, labels, valid, size in zip(batch.images, *targets[:3], batch.size, strict=True):
            example = Marks(16)[int(image[0, 0, 0])]
            assert valid.sum() == len(example.boxes)
            assert not image[size[0] :].any()
            assert not image[:, size[1] :].any()
            last = valid.sum() - 1
            if last < 0:
                continue
            ratio = size[0] / example.image.shape[0]
            x1, y1, x2, y2 = (boxes[last] + [ratio, ratio, -ratio, -ratio]).round().astype(int)
            seen += 1
            flipped += boxes[0, 0] != example.boxes[0, 0] * ratio
            assert (np.abs(image[y1:y2, x1:x2, 1].astype(int) - 50 * (labels[last] + 1)) <= 2).all()
            assert not boxes[~valid].any()
            assert not labels[~valid].any()
    assert 0 < flipped < seen


def test_augmentation_changes_between_epochs():
    source = Marks(4)
    orders = {}
    for batch in take(16, source, augmentation=FLIP):
        for name, boxes in zip(names([batch]), batch.targets.boxes, strict=True):
            orders.setdefault(name, set()).add(boxes.tobytes())
    assert len(orders[0]) == 1  # No objects, nothing to see.
    assert all(len(orders[name]) == 2 for name in (1, 2, 3))


def test_the_largest_objects_are_kept():
    source = Marks(16)
    for batch in take(8, source, task=Detection(2)):
        for name, labels, valid in zip(names([batch]), batch.targets.labels, batch.targets.valid, strict=True):
            largest = np.argsort(-source[name].area, kind="stable")[:2]
            assert sorted(labels[valid]) == sorted(source[name].labels[largest])


def test_every_image_has_the_shape_that_fits_it_and_all_of_a_batch_the_same():
    source, said, stream = Marks(30), [], []
    batches = take(60, source, log=said.append, **(EVERYTHING | {"augmentation": Augmentation()}))
    for batch in batches:
        for name, (height, width) in zip(names([batch]), batch.size.tolist(), strict=True):
            full = source[name].image.shape[:2]
            assert batch.images.shape[1:3] == {(24, 32): (48, 64), (32, 24): (64, 48)}.get(full, (48, 48))
            assert height / width == pytest.approx(full[0] / full[1], abs=0.05)
            assert min(height, width) in (32, 40, 48)
            stream.append(name)
    assert {batch.images.shape[1:3] for batch in batches} == {(48, 64), (64, 48), (48, 48)}
    # 240 images are 8 epochs; what is left over of a shape waits for the next epoch, less than a batch of each.
    times = np.bincount(stream, minlength=30)
    assert times.min() >= 7
    assert times.max() <= 9
    counts = [sum(source[i].image.shape[:2] == size for i in range(30)) for size in ((24, 32), (32, 24))]
    assert said == [
        "Padded images have one of 3 shapes, height x width "
        f"(48x64: {counts[0]}, 64x48: {counts[1]}, 48x48: {30 - sum(counts)})."
    ]


def boxes_by_example(source, **options):
    found = {}
    for batch in take(4, source, **options):
        targets = batch.targets
        for name, *rows in zip(
            names([batch]), targets.boxes, targets.labels, targets.valid, targets.crowd, strict=True
        ):
            found[name] = rows
    return found


def test_crowds_are_regions_behind_the_objects():
    source = Marks(16, crowd=True)
    for name, (boxes, labels, valid, crowd) in boxes_by_example(source, task=Detection(4), image_size=(32, 32)).items():
        example, count = source[name], name % 4
        ratio = 32 / max(example.image.shape[:2])
        objects = max(count - 1, 0)
        assert valid.tolist() == [True] * objects + [False] * (4 - objects)
        assert crowd.tolist() == [i == objects and count > 0 for i in range(4)]
        assert labels[valid].tolist() == list(range(1, count))
        assert not labels[~valid].any()
        np.testing.assert_allclose(boxes[:count], ratio * np.roll(example.boxes, -1, axis=0), rtol=1e-6)
        assert not boxes[count:].any()


def test_objects_come_before_crowds_where_room_is_short():
    for name, (_, _, valid, crowd) in boxes_by_example(Marks(16, crowd=True), task=Detection(2)).items():
        assert valid.sum() == max(name % 4 - 1, 0)
        assert crowd.sum() == (name % 4 in (1, 2))


def test_boxes_without_area_are_no_objects():
    class Flat(Marks):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            boxes = example.boxes.copy()
            boxes[1:2, 3] = boxes[1:2, 1]
            return example._replace(boxes=boxes)

    for name, (_, labels, valid, _) in boxes_by_example(Flat(16)).items():
        assert labels[valid].tolist() == [label for label in range(name % 4) if label != 1]


def test_memory_that_somebody_still_holds_is_never_overwritten_and_the_rest_is_used_again():
    """Somebody holds a batch, only a view of one, or what JAX made of one (which may share its memory)."""
    holders = [lambda x: x, lambda x: x.reshape(4, -1)[1:, 7:900:3], lambda x: jax.device_put(x.reshape(2, 2, -1))]
    held, expected, addresses = [], [], []
    for step, batch in enumerate(take_one_by_one(40, Marks(30))):
        addresses.append(batch.images.ctypes.data)
        if step % 8 == 0:
            holder = holders[step // 8 % 3]
            held.append(holder(batch.images))
            expected.append(np.array(holder(batch.images.copy())))
        del batch
    assert len(set(addresses)) < 20
    for found, copy in zip(held, expected, strict=True):
        np.testing.assert_array_equal(found, copy)


class Outlined(Marks):
    """Marks with the outlines of their rectangles, every other one as run lengths."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        outlines = []
        for k, (x1, y1, x2, y2) in enumerate(example.boxes.astype(int).tolist()):
            mask = np.zeros(example.image.shape[:2], np.uint8, order="F")
            mask[y1:y2, x1:x2] = 1
            polygon = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            outlines.append(coco_mask.encode(mask) if k % 2 else polygon)
        return example._replace(segmentation=tuple(outlines))


def test_masks_are_where_the_marks_are():
    """At their own size a cell is a pixel, and the last object, which no other covers, is all of its colour."""
    seen = set()
    for batch in take(12, Outlined(16, crowd=True), task=Detection(4, 14), augmentation=FLIP):
        targets = batch.targets
        assert targets.masks.grid.shape == (4, 4, 14, 14)
        assert targets.masks.frame.shape == (4, 4, 4)
        assert not targets.masks.grid[~targets.valid].any()
        for image, row in zip(batch.images, range(4), strict=True):
            last = targets.valid[row].sum() - 1
            if last < 0 or image[0, 0, 0] not in OWN_SIZE:
                continue
            painted = np.zeros((64, 64), bool)
            x1, y1, x2, y2 = targets.masks.frame[row, last].astype(int)
            assert (x2 - x1, y2 - y1) == (14, 14)
            painted[y1:y2, x1:x2] = targets.masks.grid[row, last]
            np.testing.assert_array_equal(painted[:32, :32], image[:, :, 1] == 50 * (targets.labels[row, last] + 1))
            seen.add(int(targets.labels[row, last]))
    assert seen == {1, 2}


OWN_SIZE = [i for i in range(16) if max(Marks(16)[i].image.shape) == 32]


def test_only_the_window_around_polygons_is_filled_and_that_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(60):
        centre, size = rng.uniform(-10, 60, 2), rng.uniform(0.5, 40)
        outline = [(centre + rng.uniform(-size, size, (n, 2))).ravel().tolist() for n in rng.integers(3, 9, 2)]
        grid, frame = detection._mask(outline, (40, 50), 16)
        expected, expected_frame = mask_grid(rasterize(outline, (40, 50)), 16)
        np.testing.assert_array_equal(grid, expected)
        if expected.any():
            np.testing.assert_array_equal(frame, expected_frame)


def test_masks_of_a_source_without_outlines_are_refused():
    source = Marks(10)
    source.origin = "marks.json"
    with pytest.raises(UserError, match=r"config.data.masks is True, but marks.json has no outlines of its objects"):
        Detection(3, 14).check_source(source)


def test_an_error_in_a_thread_reaches_the_consumer_and_the_threads_end():
    class Broken(Marks):
        def __getitem__(self, index):
            if index == 7:
                raise ValueError("image 7 is gone")
            return super().__getitem__(index)

    before = threading.active_count()
    batches = train_batches(Broken(10), batch_size=4, seed=5, num_threads=3, **SIZE)
    with pytest.raises(ValueError, match="image 7 is gone"):
        list(itertools.islice(batches, 10))
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("length", [8, 9, 3])
def test_evaluation_sees_everything_once(length, count):
    source = Marks(length)
    parts = [
        list(eval_batches(source, batch_size=4, image_size=(40, 48), process_index=i, process_count=count))
        for i in range(count)
    ]
    assert all(len(batches) == -(-length // 4) for batches in parts)
    batches = [jax.tree.map(lambda *arrays: np.concatenate(arrays), *each) for each in zip(*parts, strict=True)]
    assert all(batch.images.shape == (4, 40, 48, 3) for batch in batches)
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    real = found.index >= 0
    assert list(np.flatnonzero(real)) == list(range(length))
    assert list(found.index[real]) == list(range(length))
    assert list(found.index[~real]) == [-1] * (~real).sum()
    assert not found.images[~real].any()
    for index in range(length):
        height, width = source[index].image.shape[:2]
        scale = min(40 / height, 48 / width)
        assert list(found.size[index]) == [round(height * scale), round(width * scale)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_goes_shape_by_shape_and_sees_everything_once(count):
    source, sizing = Marks(22), EVERYTHING["image_size"]
    options = {"batch_size": 4, "image_size": sizing, "process_count": count}
    batches = [list(eval_batches(source, process_index=i, **options)) for i in range(count)]
    joined = [jax.tree.map(lambda *arrays: np.concatenate(arrays), *each) for each in zip(*batches, strict=True)]
    shapes = [batch.images.shape[1:3] for batch in joined]
    assert list(dict.fromkeys(shapes)) == [(48, 64), (64, 48), (48, 48)]
    assert shapes == sorted(shapes, key=sizing.shapes.index)
    seen = []
    for batch in joined:
        real = batch.index >= 0
        for index, size, image in zip(batch.index[real], batch.size[real], batch.images[real], strict=True):
            height, width = source[int(index)].image.shape[:2]
            assert min(size) == 48
            assert size[0] * width == size[1] * height
            assert image[0, 0, 0] == index
            seen.append(index)
    assert sorted(seen) == list(range(22))
    assert sum(len(batch.index) for batch in joined) < 22 + 3 * 4


def test_evaluation_pads_to_the_next_multiples_where_that_is_asked_for():
    """To as many shapes as come of it, in which images are scaled as they are for one shape."""
    source = Marks(22)
    sizing = EVERYTHING["image_size"]._replace(eval_padding=16)
    batches = list(eval_batches(source, batch_size=4, image_size=sizing))
    others = list(eval_batches(source, batch_size=4, image_size=sizing._replace(eval_padding=0)))
    sizes = [
        {int(index): tuple(size) for batch in found for index, size in zip(batch.index, batch.size, strict=True)}
        for found in (batches, others)
    ]
    assert all(sizes[0][index] == sizes[1][index] for index in range(22))
    assert len({batch.images.shape for batch in batches}) > 1
    for batch in batches:
        for size in batch.size[batch.index >= 0]:
            assert batch.images.shape[1:3] == tuple(-(-size // 16) * 16)
    assert sum(int((batch.index >= 0).sum()) for batch in batches) == 22


@pytest.mark.parametrize("padding", [0, 16])
def test_images_of_somebodys_are_prepared_as_an_evaluation_sees_them(padding):
    source = Marks(6)
    sizing = EVERYTHING["image_size"]._replace(eval_padding=padding, resize="torchvision")
    images, size = padded([source[index].image for index in range(6)], sizing)
    assert images.dtype == np.uint8
    assert size.dtype == np.int32
    for batch in eval_batches(source, batch_size=2, image_size=sizing):
        for row, index in enumerate(batch.index.tolist()):
            if index >= 0:
                np.testing.assert_array_equal(size[index], batch.size[row])
                height, width = size[index]
                np.testing.assert_array_equal(images[index, :height, :width], batch.images[row, :height, :width])
                assert not images[index, height:].any()
                assert not images[index, :, width:].any()


def test_evaluation_sees_black_where_the_source_gives_another_image_in_place_of_a_broken_one():
    class Replacing(Marks):
        def __getitem__(self, index):
            return super().__getitem__(2 if index == 1 else index)

        def objects(self, index):
            return Marks(self.length).objects(index)

    (batch,) = eval_batches(Replacing(4), batch_size=4, image_size=(32, 32))
    assert batch.index.tolist() == [0, 1, 2, 3]
    height, width = Marks(4).objects(1).size
    assert batch.size[1].tolist() == [round(side * 32 / max(height, width)) for side in (height, width)]
    assert batch.images.reshape(4, -1).any(axis=1).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "the source has 10 examples, fewer than the batch of 11"),
        ({"batch_size": 4, "process_count": 3}, "a batch of 4 images cannot be divided among 3 processes"),
        ({"batch_size": 0}, "a batch of 0 images cannot be divided"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, r"process_index is 2, it must be in \[0, 2\)"),
    ],
)
def test_mistakes_are_errors_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(Marks(10), **({"seed": 0} | SIZE | options))


def test_evaluating_nothing_is_an_error():
    with pytest.raises(ValueError, match="the source has no examples"):
        eval_batches(Marks(0), batch_size=4, image_size=(8, 8))


def test_the_embedded_data_set_makes_batches(data_dir):
    source = open_source("shapes/tiny", "train", data_dir)
    batch = next(train_batches(source, batch_size=8, image_size=(128, 128), task=Detection(8), seed=0))
    assert batch.images.shape == (8, 128, 128, 3)
    assert (batch.size.max(axis=1) == 128).all()
    assert (batch.targets.valid.sum(axis=1) >= 1).all()
