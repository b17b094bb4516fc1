"""What every task promises, on the dict of tasks and on one from outside; a new one without an entry here is red."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from kdjax.data.batches import eval_batches, train_batches
from kdjax.data.sizing import Augmentation
from kdjax.data.sources import open_source
from kdjax.data.transforms import move_classes, whole
from kdjax.tasks import TASKS, Classification, Detection, Segmentation
from kdjax.types import Batch, Detections
from tests.classification import Patterns, Stripes


class Entry(NamedTuple):
    task: Any
    source: Callable[[Any], Any]
    """From the data directory of the tests."""
    perfect: Callable[[Any, Batch], Any]
    """From a source and a batch of it to what a perfect model says of the batch, as NumPy arrays."""
    worst: float
    """The primary metric of a model that is always wrong."""
    image_size: tuple[int, int] = (64, 96)
    """Of the padded images."""


def detections(source, batch: Batch) -> Detections:
    slots = (len(batch.index), 16)
    boxes, valid = np.zeros((*slots, 4), np.float32), np.zeros(slots, bool)
    labels = np.zeros(slots, np.int32)
    for row, position in enumerate(batch.index.tolist()):
        if position < 0:
            valid[row, 0] = True  # What is found in a blank image counts nowhere.
            continue
        objects = source.objects(position)
        ratio = (batch.size[row] / np.array(objects.size))[[1, 0, 1, 0]]
        count = len(objects.labels)
        boxes[row, :count], labels[row, :count] = objects.boxes * ratio, objects.labels
        valid[row, :count] = True
    return Detections(boxes, np.where(valid, 0.9, 0.0).astype(np.float32), labels, valid)


def classes(source, batch: Batch) -> np.ndarray:
    return np.eye(len(source.class_names))[[source.label(max(position, 0)) for position in batch.index.tolist()]]


def maps(source, batch: Batch) -> np.ndarray:
    said = np.zeros(batch.images.shape[:3], np.uint8)
    for row, position in enumerate(batch.index.tolist()):
        if position >= 0:
            height, width = batch.size[row].tolist()
            said[row, :height, :width] = move_classes(
                source.classes(position), whole(source.size(position), (height, width))
            )
    return said


def another(outputs: Any) -> Any:
    """The same with every class taken for the next one."""
    if isinstance(outputs, Detections):
        return outputs._replace(labels=(outputs.labels + 1) % 6)
    if outputs.dtype == np.uint8:
        return (outputs + 1) % 7
    return np.roll(outputs, 1, axis=-1)


ENTRIES = {
    "detection": Entry(
        Detection(16), lambda data_dir: open_source("shapes/tiny", "validation", data_dir), detections, 0.0
    ),
    # Larger than the images: what is made smaller by the nearest pixel does not come back whole.
    "segmentation": Entry(
        Segmentation(), lambda data_dir: open_source("shapes/maps/tiny", "validation", data_dir), maps, 0.0, (256, 256)
    ),
    "classification": Entry(
        Classification(), lambda data_dir: open_source("shapes/crops/tiny", "validation", data_dir), classes, 0.0
    ),
    "tests.classification:Patterns": Entry(Patterns(), lambda _: Stripes("validation"), classes, 0.0),
}


def test_every_task_has_an_entry():
    assert set(TASKS) <= set(ENTRIES)


@pytest.fixture(scope="module", params=ENTRIES)
def entry(request):
    return ENTRIES[request.param]


@pytest.fixture(scope="module")
def source(entry, data_dir):
    return entry.source(data_dir)


def batches(entry, source, count: int = 1):
    parts = [
        eval_batches(source, batch_size=8, image_size=entry.image_size, process_index=k, process_count=count)
        for k in range(count)
    ]
    return [list(part) for part in parts]


def test_facts_are_of_their_kinds(entry):
    task = entry.task
    assert task.primary == task.spoken[0]
    assert task.primary in task.columns.values()
    assert isinstance(task.higher_is_better, bool)
    assert isinstance(type(task).of, Callable)


def test_the_judge_of_the_truth_is_perfect_and_of_the_opposite_is_not(entry, source):
    for change, expected in ((lambda x: x, 100.0), (another, entry.worst)):
        judge = entry.task.judge(source)
        for batch in batches(entry, source)[0]:
            judge.add(change(entry.perfect(source, batch)), batch)
        metrics = judge.merge([judge.state()])
        assert metrics[entry.task.primary] == pytest.approx(expected)
        assert metrics.keys() >= set(entry.task.spoken[:1])
        assert len(judge.kept(5)) == 5


@pytest.mark.parametrize("count", [2, 4])
def test_the_states_of_several_processes_merge_to_the_whole(entry, source, count):
    """Whatever the order; half of the images are judged wrongly, and some processes see blank images."""

    def judged(parts):
        states = []
        for part in parts:
            judge = entry.task.judge(source)
            for batch in part:
                said = entry.perfect(source, batch)
                judge.add(another(said) if batch.index.max() % 16 < 8 else said, batch)
            states.append(judge.state())
            assert all(isinstance(array, np.ndarray) for array in states[-1].values())
        return entry.task.judge(source).merge(states[::-1])

    parts = batches(entry, source, count)
    flat = [[batch for batches in zip(*parts, strict=True) for batch in batches]]
    np.testing.assert_equal(judged(parts), judged(flat))


def test_a_row_of_targets_is_filled_and_no_other(entry, source):
    """Rows that show nothing stay as they were made; what is drawn is a function of the seed and the step."""
    options = {
        "batch_size": 4,
        "image_size": (64, 64),
        "seed": 3,
        "augmentation": Augmentation(flip=0.5, jitter=(0.5, 2)),
    }
    first, again = (next(train_batches(source, task=entry.task, **options)) for _ in range(2))
    empty = entry.task.targets(5, (64, 64))
    for one, other, blank in zip(first.targets, again.targets, empty, strict=True):
        if one is None:
            continue
        np.testing.assert_array_equal(one, other)
        assert one.shape[1:] == blank.shape[1:]
        assert one.dtype == blank.dtype
        assert (blank == blank.flat[0]).all()
    assert any(x is not None and (x != x.flat[0]).any() for x in first.targets)


def test_a_result_is_what_was_said_in_the_photographs_own_pixels(entry, source):
    if not hasattr(entry.task, "results"):
        pytest.skip("the task does everything but predict")
    results = entry.task.results(source.class_names, tuple(range(len(source.class_names))), None)
    batch = batches(entry, source)[0][0]
    outputs = entry.perfect(source, batch)
    for row, position in enumerate(batch.index.tolist()):
        result = results.of(outputs, row, tuple(batch.size[row].tolist()), source.size(position))
        example = source[position]
        if entry.task.name == "detection":
            np.testing.assert_allclose(result.boxes, example.boxes, atol=1e-3)
            assert result.names == tuple(source.class_names[label] for label in example.labels.tolist())
        elif entry.task.name == "segmentation":
            np.testing.assert_array_equal(result.classes, example.classes)
        else:
            assert result.names[0] == source.class_names[example.label]
        assert results.drawn(example.image, result).image.shape == example.image.shape
