import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from kdjax.data import shapes
from kdjax.data.sources import open_source
from kdjax.errors import UserError


@pytest.mark.parametrize("name", ["shapes/tiny", "tfds:shapes/tiny"])
@pytest.mark.parametrize(("split", "length"), [("train", 32), ("validation", 12), ("train[4:10]", 6)])
def test_reads_back_what_was_drawn(data_dir, name, split, length):
    source = open_source(name, split, data_dir)
    assert len(source) == length
    assert source.class_names == shapes.CLASS_NAMES
    first = 4 if "[" in split else 0
    for index in (0, length - 1):
        example = source[index]
        scene = shapes.scene(split.partition("[")[0], first + index)
        boxes = shapes.boxes(scene.owner, len(scene.labels))
        np.testing.assert_array_equal(example.image, scene.image)
        assert example.image_id == first + index
        np.testing.assert_allclose(example.boxes, boxes, atol=1e-4)
        np.testing.assert_array_equal(example.labels, scene.labels)
        np.testing.assert_array_equal(example.area, [np.sum(scene.owner == k) for k in range(len(boxes))])
        assert not example.crowd.any()
        dtypes = (example.image.dtype, example.boxes.dtype, example.labels.dtype, example.crowd.dtype)
        assert dtypes == (np.uint8, np.float32, np.int32, np.bool_)


def test_needs_no_tensorflow(data_dir):
    open_source("shapes/tiny", "train", data_dir)[0]
    assert "tensorflow" not in sys.modules


def test_annotation_ids_are_unique_and_positive(data_dir):
    ids = open_source("shapes/tiny", "train", data_dir).annotations.identity
    assert len(set(ids.tolist())) == len(ids)
    assert min(ids) > 0


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("shape", "train", "unknown data source 'shape': choose shapes, shapes/tiny, tfds:<name>, or coco_json:"),
        ("shapes/huge", "train", "unknown data source 'shapes/huge'"),
        ("tfds:", "train", "unknown data source 'tfds:'"),
        ("shapes/tiny", "test", "shapes/tiny has no split 'test': choose train, validation"),
        ("tfds:coco/2017", "train", "prepare it with `tfds build coco/2017 --data_dir=.* --file_format=array_record`"),
    ],
)
def test_mistakes_are_one_sentence(data_dir, name, split, message):
    with pytest.raises(UserError, match=message) as error:
        open_source(name, split, data_dir)
    assert "\n" not in str(error.value)


def prepare(path, features, *examples):
    """Prepares a data set ``other`` through TFDS."""

    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": enumerate(examples)}

        def _generate_examples(self):
            raise NotImplementedError

    Other(data_dir=path).download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def test_other_features_are_refused_by_name(tmp_path):
    prepare(tmp_path, {"image/id": np.int64}, {"image/id": 1})
    with pytest.raises(UserError, match="tfds:other has no image, objects/bbox, objects/label: it needs the features"):
        open_source("tfds:other", "train", tmp_path)


def test_grey_images_and_images_without_objects_are_read(tmp_path, data_dir):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 9), 77, np.uint8)).save(file, "PNG")
    features = dict(shapes.Shapes(config="tiny", data_dir=data_dir).info.features)
    other = io.BytesIO()
    Image.fromarray(np.full((6, 9), 177, np.uint8)).save(other, "PNG")
    example = {"image": file.getvalue(), "image/filename": "grey.png", "image/id": 7, "objects": []}
    box = tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=0.5, xmax=0.5)
    # The run lengths of 54 pixels of no object.
    objects = [{"area": 9, "bbox": box, "id": 1, "is_crowd": False, "label": 0, "run_lengths": "f1"}]
    prepare(tmp_path, features, example, example | {"image": other.getvalue(), "image/id": 8, "objects": objects})
    found = open_source("tfds:other", "train", tmp_path)[0]
    np.testing.assert_array_equal(found.image, np.full((6, 9, 3), 77))
    assert found.boxes.shape == (0, 4)
    assert found.labels.shape == found.crowd.shape == found.area.shape == (0,)


def test_a_rival_that_prepares_first_is_no_error(tmp_path, monkeypatch):
    example, rivals = shapes._example, []

    def slow_example(split, index):
        if not rivals:
            rivals.append("started")
            assert len(open_source("shapes/tiny", "train", tmp_path)) == 32
        return example(split, index)

    monkeypatch.setattr(shapes, "_example", slow_example)
    assert len(open_source("shapes/tiny", "validation", tmp_path)) == 12
    assert [path.name for path in (tmp_path / "shapes" / "tiny").iterdir()] == [str(shapes.Shapes.VERSION)]


def test_an_interrupted_preparation_is_done_again(tmp_path, monkeypatch):
    example = shapes._example

    def interrupted(split, index):
        if index == 3:
            raise KeyboardInterrupt
        return example(split, index)

    monkeypatch.setattr(shapes, "_example", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source("shapes/tiny", "train", tmp_path)
    monkeypatch.undo()
    assert len(open_source("shapes/tiny", "train", tmp_path)) == 32


def test_a_path_without_its_kind_is_answered_with_it(tmp_path):
    with pytest.raises(UserError, match=f"unknown data source .*; for the folder {tmp_path}, coco_json:{tmp_path}"):
        open_source(str(tmp_path), "train")
