import itertools

import jax
import numpy as np
import pytest

from kdjax.data.batches import eval_batches, train_batches
from kdjax.data.sources import open_source
from tests.data.conftest import Marks

SIZE = {"image_size": (32, 32), "max_objects": 3}


def take(count, source, **options):
    options = {"batch_size": 4, "seed": 5, "num_threads": 2} | SIZE | options
    return list(itertools.islice(train_batches(source, **options), count))


def names(batches):
    """Which example each image is: the red value of its first row."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch["images"]]


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_shapes_and_dtypes():
    (batch,) = take(1, Marks(9))
    specs = jax.tree.map(lambda array: (array.shape, array.dtype.name), batch)
    assert specs["images"] == ((4, 32, 32, 3), "uint8")
    assert specs["index"] == ((4,), "int32")
    assert specs["targets"]._asdict() == {
        "boxes": ((4, 3, 4), "float32"),
        "labels": ((4, 3), "int32"),
        "valid": ((4, 3), "bool"),
        "image_size": ((4, 2), "int32"),
    }


def test_every_epoch_has_each_example_once_in_a_new_order():
    """10 examples in batches of 4: the third batch spans the epochs, and nothing is dropped."""
    stream = names(take(10, Marks(10), flip=0.0))
    epochs = [stream[10 * epoch : 10 * epoch + 10] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides():
    assert_equal(take(6, Marks(10)), take(6, Marks(10), num_threads=0))
    assert names(take(6, Marks(10))) != names(take(6, Marks(10), seed=6))


def test_first_step_is_skipping():
    everything = take(9, Marks(10))
    for first in (1, 4, 7):
        assert_equal(everything[first:], take(9 - first, Marks(10), first_step=first))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_one_global_batch(count):
    everything = take(6, Marks(10), batch_size=8)
    slices = [
        take(4, Marks(10), batch_size=8, first_step=2, process_index=i, process_count=count) for i in range(count)
    ]
    for step, parts in enumerate(zip(*slices, strict=True)):
        assert_equal(everything[2 + step], jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts))
    np.testing.assert_array_equal(everything[0]["index"], np.arange(8))


def test_boxes_are_where_the_marks_are():
    """Every valid box is filled with the value of its label, except where a later object covers it."""
    seen = flipped = 0
    for batch in take(12, Marks(16)):
        targets = batch["targets"]
        for image, boxes, labels, valid, size in zip(batch["images"], *targets, strict=True):
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
    for batch in take(16, source):
        for name, boxes in zip(names([batch]), batch["targets"].boxes, strict=True):
            orders.setdefault(name, set()).add(boxes.tobytes())
    assert len(orders[0]) == 1  # No objects, nothing to see.
    assert all(len(orders[name]) == 2 for name in (1, 2, 3))


def test_the_largest_objects_are_kept():
    source = Marks(16)
    for batch in take(8, source, max_objects=2, flip=0.0):
        for name, labels, valid in zip(names([batch]), batch["targets"].labels, batch["targets"].valid, strict=True):
            largest = np.argsort(-source[name].area, kind="stable")[:2]
            assert sorted(labels[valid]) == sorted(source[name].labels[largest])


def test_crowds_are_no_targets():
    for batch in take(4, Marks(16, crowd=True)):
        for name, labels, valid in zip(names([batch]), batch["targets"].labels, batch["targets"].valid, strict=True):
            assert list(labels[valid]) == list(range(1, name % 4))


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
    assert all(batch["images"].shape == (4, 40, 48, 3) for batch in batches)
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    real = found["real"]
    assert list(np.flatnonzero(real)) == list(range(length))
    assert list(found["image_id"][real]) == [1000 + i for i in range(length)]
    assert list(found["image_id"][~real]) == [-1] * (~real).sum()
    assert not found["images"][~real].any()
    for index in range(length):
        height, width = source[index].image.shape[:2]
        assert list(found["original_size"][index]) == [height, width]
        scale = min(40 / height, 48 / width)
        assert list(found["image_size"][index]) == [round(height * scale), round(width * scale)]


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
    batch = next(train_batches(source, batch_size=8, image_size=(128, 128), max_objects=8, seed=0))
    assert batch["images"].shape == (8, 128, 128, 3)
    assert (batch["targets"].image_size.max(axis=1) == 128).all()
    assert (batch["targets"].valid.sum(axis=1) >= 1).all()
