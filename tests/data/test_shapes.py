import hashlib
import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask

from kdjax.data import shapes
from kdjax.data.batches import train_batches
from kdjax.data.sizing import Augmentation
from kdjax.data.sources import open_source
from kdjax.tasks import Detection

SCENES = [shapes.scene("train", index) for index in range(40)]


def test_a_scene_is_a_function_of_split_and_index():
    again = [shapes.scene("train", index) for index in reversed(range(8))][::-1]
    for first, second in zip(SCENES, again, strict=False):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_another_process_draws_the_same_pixels():
    code = (
        "import hashlib; from kdjax.data import shapes\n"
        "arrays = [array for index in range(4) for array in shapes.scene('train', index)]\n"
        "print(hashlib.sha256(b''.join(array.tobytes() for array in arrays)).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip()
    arrays = [array for scene in SCENES[:4] for array in scene]
    assert found == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_scenes_and_splits_differ():
    images = [scene.image.tobytes() for scene in SCENES] + [
        shapes.scene("validation", i).image.tobytes() for i in (0, 1)
    ]
    assert len(set(images)) == len(images)


def test_every_object_is_visible_and_its_box_is_tight():
    for scene in SCENES:
        height, width, _ = scene.image.shape
        assert max(height, width) == 128
        assert min(height, width) in (96, 112, 128)
        assert 1 <= len(scene.labels) <= shapes.MAX_OBJECTS
        assert scene.owner.max() == len(scene.labels) - 1
        boxes = shapes.boxes(scene.owner, len(scene.labels))
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            mine = scene.owner == k
            assert mine.sum() >= shapes.MIN_VISIBLE
            inside = mine[y1:y2, x1:x2]
            assert inside.sum() == mine.sum()
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_coverage_agrees_with_the_area_of_the_outline(name):
    rng = np.random.default_rng(0)
    for diameter in (14, 40, 100):
        outline = shapes._placed(rng, shapes._OUTLINES[name], diameter, 0, 0)
        outline = outline.moved(np.eye(2), np.array([100, 100]))
        _, _, coverage = shapes._coverage(outline, 200, 200)
        assert coverage.sum() == pytest.approx(outline.area(), rel=0.1 if diameter == 14 else 0.04)


def test_every_class_is_drawn_with_every_colour_and_size():
    """No class can be told by its mean colour: over many objects, the class means agree within their noise."""
    colours: dict[int, list[np.ndarray]] = {}
    for index in range(150):
        scene = SCENES[index] if index < len(SCENES) else shapes.scene("train", index)
        for k, label in enumerate(scene.labels.tolist()):
            colours.setdefault(label, []).append(scene.image[scene.owner == k].mean(axis=0))
    assert sorted(colours) == list(range(len(shapes.CLASS_NAMES)))
    everything = np.concatenate(list(colours.values()))
    for found in colours.values():
        error = everything.std(axis=0) / np.sqrt(len(found))
        assert (np.abs(np.mean(found, axis=0) - everything.mean(axis=0)) < 4 * error).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Of pycocotools with NumPy 2.
@pytest.mark.parametrize("split", shapes.SPLITS)
def test_the_outlines_are_the_visible_pixels(data_dir, split):
    """As pycocotools decodes them, and as many as the area says."""
    source = open_source("shapes/tiny", split, data_dir)
    for index in range(len(source)):
        owner, objects = shapes.scene(split, index).owner, source.objects(index)
        assert len(objects.segmentation) == len(objects.labels)
        for k, runs in enumerate(objects.segmentation):
            np.testing.assert_array_equal(pycocotools_mask.decode(runs), owner == k)
            assert pycocotools_mask.area(runs) == objects.area[k]


def test_a_batch_has_the_masks_of_its_objects(data_dir):
    """Not scaled, a cell of the grid is a pixel; which scene an image is, its pixels say."""
    source = open_source("shapes/tiny", "train", data_dir)
    scenes = {scene.image.tobytes(): scene.owner for scene in (shapes.scene("train", k) for k in range(len(source)))}
    sizes = {"image_size": (128, 128), "task": Detection(6, 128)}
    batch = next(train_batches(source, batch_size=8, seed=0, augmentation=Augmentation(flip=0.5), **sizes))
    flipped = 0
    targets = batch.targets
    for image, valid, (height, width), grid, frame in zip(
        batch.images, targets.valid, batch.size, *targets.masks, strict=True
    ):
        image = image[:height, :width]
        owner = scenes.get(image.tobytes())
        if owner is None:
            owner, flipped = scenes[image[:, ::-1].tobytes()][:, ::-1], flipped + 1
        assert valid.sum() == owner.max() + 1
        for k in range(valid.sum()):
            left, top = frame[k, :2].astype(int)
            expected = np.pad(owner == k, ((0, 128), (0, 128)))[top : top + 128, left : left + 128]
            np.testing.assert_array_equal(grid[k], expected)
    assert 0 < flipped < 8


def test_the_features_are_those_of_tfds_coco_and_masks(data_dir):
    """Names and types as in tensorflow_datasets/object_detection/coco.py, class names as in ours."""
    import tensorflow_datasets as tfds

    features = shapes.Shapes(config="tiny", data_dir=data_dir).info.features
    objects = features["objects"].feature
    assert {name: (f.shape, np.dtype(f.np_dtype)) for name, f in features.items() if name != "objects"} == {
        "image": ((None, None, 3), np.dtype(np.uint8)),
        "image/filename": ((), np.dtype(object)),
        "image/id": ((), np.dtype(np.int64)),
    }
    assert {name: (f.shape, np.dtype(f.np_dtype)) for name, f in objects.items()} == {
        "area": ((), np.dtype(np.int64)),
        "bbox": ((4,), np.dtype(np.float32)),
        "id": ((), np.dtype(np.int64)),
        "is_crowd": ((), np.dtype(np.bool_)),
        "label": ((), np.dtype(np.int64)),
        "run_lengths": ((), np.dtype(object)),
    }
    assert isinstance(features["image"], tfds.features.Image)
    assert isinstance(objects["bbox"], tfds.features.BBoxFeature)
    assert isinstance(objects["label"], tfds.features.ClassLabel)
    assert tuple(objects["label"].names) == shapes.CLASS_NAMES
