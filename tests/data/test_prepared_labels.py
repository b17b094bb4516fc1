"""Data sets that TFDS prepared whose images have a class, or a label map: what a set is about is in its features."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kdjax.data.flaws import Checks
from kdjax.data.sources import open_source
from kdjax.errors import DataError, UserError
from tests.data.folders import encoded
from tests.data.test_coco import flaws
from tests.data.test_map_folders import map_of, truth
from tests.data.test_prepared import prepare

IMAGENET = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(names=["n01", "n02", "n03"]),
    "file_name": tfds.features.Text(),
}
PETS = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
}
CITIES = {
    "image_id": tfds.features.Text(),
    "image_left": tfds.features.Image(encoding_format="png"),
    "segmentation_label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
}


def jpeg(number):
    return encoded(20, 30, kind="JPEG", seed=number)


def opened(path, name, split="train", **checks):
    return open_source(f"tfds:{name}", split, path, checks=Checks(**checks))


def test_an_image_and_a_label_are_classification(tmp_path):
    splits = {
        "train": [{"image": jpeg(k), "label": k % 3, "file_name": f"n0{k % 3}_{k}.JPEG"} for k in range(7)],
        "validation": [{"image": jpeg(9), "label": 1, "file_name": "val_1.JPEG"}],
    }
    prepare("imagenet", "full", IMAGENET, splits, tmp_path)
    source = opened(tmp_path, "imagenet/full", "train[1:]")
    assert source.class_names == ("n01", "n02", "n03")
    assert [source.label(k) for k in range(6)] == [1, 2, 0, 1, 2, 0]
    assert source.name(0) == "n01_1.JPEG"
    assert source[2].image.shape == (20, 30, 3)
    assert (source.files, len(opened(tmp_path, "imagenet/full", "validation"))) == ((), 1)
    with pytest.raises(UserError, match="only sets of objects are taken one after the other"):
        opened(tmp_path, "imagenet/full+full")


def test_a_label_map_is_segmentation_and_its_values_are_counted_in_all_splits(tmp_path):
    splits = {
        name: [{"image": jpeg(k + start), "label": 0, "segmentation_mask": map_of(truth(k, top=top))} for k in range(3)]
        for name, start, top in (("train", 0, 3), ("test", 10, 4))
    }
    prepare("pets", "full", PETS, splits, tmp_path)
    source = opened(tmp_path, "pets/full")
    assert source.class_names == opened(tmp_path, "pets/full", "test").class_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(source.classes(2), truth(2))
    np.testing.assert_array_equal(source[2].classes, truth(2))
    assert source.name(1) == "record 1"
    assert flaws(source) == {"classes that no image shows": ("kept", [3])}


def test_cityscapes_is_known_by_its_features(tmp_path):
    ids = np.arange(600, dtype=np.uint8).reshape(20, 30) % 34
    example = {"image_id": "aachen_1", "image_left": encoded(20, 30), "segmentation_label": map_of(ids)}
    prepare("cities", "all", CITIES, {"train": [example]}, tmp_path)
    source = opened(tmp_path, "cities/all")
    assert (len(source.class_names), source.name(0)) == (19, "aachen_1")
    assert set(source.classes(0)[ids == 7].tolist()) == {0}


def test_maps_of_another_size_are_refused_by_record(tmp_path):
    example = {"image": jpeg(0), "label": 0, "segmentation_mask": map_of(truth(0, size=(5, 6)))}
    prepare("pets", "bad", PETS, {"train": [example]}, tmp_path)
    with pytest.raises(DataError, match="the segmentation_mask of record 0 is 6 x 5 pixels and record 0 30 x 20"):
        opened(tmp_path, "pets/bad")


def test_other_features_are_refused_with_what_is_needed(tmp_path):
    prepare("other", "x", {"image": tfds.features.Image()}, {"train": [{"image": jpeg(0)}]}, tmp_path)
    with pytest.raises(UserError, match=r"or an image with a label \(a ClassLabel\) or with a segmentation_mask"):
        opened(tmp_path, "other/x")
