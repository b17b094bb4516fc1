"""Data sets that TFDS prepared, sound and damaged: tiny ones with the features of its COCO and VOC."""

import random
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pycocotools import mask as pycocotools_mask

from kdjax.data import prepared
from kdjax.data.batches import train_batches
from kdjax.data.flaws import Checks
from kdjax.data.sources import open_source
from kdjax.data.statistics import class_statistics
from kdjax.errors import UserError
from kdjax.tasks import Detection
from tests.data.folders import encoded
from tests.data.test_coco import flaws

CLASSES = ("aeroplane", "bicycle", "bird")


def coco_features(bbox=None):
    """As in tensorflow_datasets/object_detection/coco.py."""
    objects = {
        "area": np.int64,
        "bbox": bbox or tfds.features.BBoxFeature(),
        "id": np.int64,
        "is_crowd": np.bool_,
        "label": tfds.features.ClassLabel(num_classes=80),
    }
    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(objects),
    }


def voc_features():
    """As in tensorflow_datasets/object_detection/voc.py."""
    label = tfds.features.ClassLabel(names=CLASSES)
    objects = {
        "label": label,
        "bbox": tfds.features.BBoxFeature(),
        "pose": tfds.features.ClassLabel(names=("left", "right")),
        "is_truncated": np.bool_,
        "is_difficult": np.bool_,
    }
    return {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "objects": tfds.features.Sequence(objects),
        "labels": tfds.features.Sequence(label),
        "labels_no_difficult": tfds.features.Sequence(label),
    }


def builder_of(name, config, features, splits, data_dir, version="1.1.0"):
    """A builder called ``name/config`` of examples by split."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012
        code_path = None

        def _info(self):
            content = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=content, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    return Builder(data_dir=data_dir, config=config)


def prepare(name, config, features, splits, data_dir, shards=1, version="1.1.0"):
    builder_of(name, config, features, splits, data_dir, version).download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards),
    )
    return data_dir


def relative(x1, y1, x2, y2, height=30, width=40):
    return tfds.features.BBox(ymin=y1 / height, xmin=x1 / width, ymax=y2 / height, xmax=x2 / width)


def coco_example(number, **image):
    """Image 100 + number with number % 3 objects, the second of which is a crowd."""
    objects = [
        {
            "area": 50 + k,
            "bbox": relative(2 + number, 3, 12 + number, 23 + k),
            "id": 1000 * number + k,
            "is_crowd": k == 1,
            "label": (number + k) % 80,
        }
        for k in range(number % 3)
    ]
    return {
        "image": encoded(30, 40, kind="JPEG", seed=number),
        "image/filename": f"{number:012d}.jpg",
        "image/id": 100 + number,
        "objects": objects,
    } | image


def voc_example(number, labels):
    objects = [
        {
            "label": label,
            "bbox": relative(2 + k, 3, 12 + k, 23),
            "pose": "left",
            "is_truncated": False,
            "is_difficult": k == 1,
        }
        for k, label in enumerate(labels)
    ]
    return {
        "image": encoded(30, 40, kind="JPEG", seed=number),
        "image/filename": f"{number:06d}.jpg",
        "objects": objects,
        "labels": labels,
        "labels_no_difficult": labels[:1],
    }


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    splits = {"train": [coco_example(k) for k in range(7)], "validation": [coco_example(k) for k in range(10, 13)]}
    return prepare("coco", "2017", coco_features(), splits, tmp_path_factory.mktemp("coco"), shards=3)


@pytest.fixture
def spoilt(coco, tmp_path):
    """A copy of the data set and the folder of its files, to be damaged."""
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "coco" / "2017" / "1.1.0"


def test_coco_is_read_as_it_was_written(coco):
    source = open_source("tfds:coco/2017", "train", coco)
    assert len(source) == 7
    assert source.class_names == tuple(map(str, range(80)))
    assert source.category_ids == tuple(range(80))
    assert flaws(source) == {}
    for number in range(7):
        example, objects = source[number], source.objects(number)
        assert example.image_id == objects.image_id == 100 + number
        assert example.image.shape == (*objects.size, 3) == (30, 40, 3)
        boxes = [[2 + number, 3, 12 + number, 23 + k] for k in range(number % 3)]
        np.testing.assert_allclose(example.boxes, np.reshape(boxes, (-1, 4)), rtol=1e-6)
        np.testing.assert_array_equal(example.labels, [number + k for k in range(number % 3)])
        np.testing.assert_array_equal(example.crowd, [k == 1 for k in range(number % 3)])
        np.testing.assert_array_equal(example.area, [50 + k for k in range(number % 3)])
        for name in ("boxes", "labels", "crowd", "area"):
            np.testing.assert_array_equal(getattr(example, name), getattr(objects, name))
    assert "tfds:coco/2017 train: 7 images, 3 of them without objects; 6 objects of 80 classes, 2 of them crowds." in (
        source.report_lines()
    )
    frequency = np.zeros(80)
    frequency[[1, 2, 4, 5]] = 1 / 4
    np.testing.assert_allclose(class_statistics(source).frequency, frequency)


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("train[2:4]", [102, 103]),
        ("train[-2:]+validation", [105, 106, 110, 111, 112]),
        ("train[:50%]", [100, 101, 102, 103]),
        ("validation", [110, 111, 112]),
    ],
)
def test_splits_have_slices_and_sums(coco, split, ids):
    source = open_source("tfds:coco/2017", split, coco)
    assert [source[k].image_id for k in range(len(source))] == ids


def test_the_newest_version_is_read(coco, tmp_path):
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    prepare("coco", "2017", coco_features(), {"train": [coco_example(5)]}, tmp_path, version="1.10.0")
    assert len(open_source("tfds:coco/2017", "train", tmp_path)) == 1


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    path = tmp_path_factory.mktemp("voc")
    years = {
        "2007": {"train": [voc_example(k, [0, 1]) for k in range(3)], "test": [voc_example(9, [2])]},
        "2012": {"train": [voc_example(k, [2]) for k in range(2)], "test": [voc_example(9, [])]},
    }
    for year, splits in years.items():
        prepare("voc", year, voc_features(), splits, path, version="5.0.0")
    return path


def test_two_years_of_voc_are_one_set(voc):
    """Ids are positions, areas those of the boxes, and difficult objects are what crowds are: not to be judged."""
    source = open_source("tfds:voc/2007+2012", "train", voc, checks=Checks(max_objects=1))
    assert source.class_names == CLASSES
    examples = [source[k] for k in range(len(source))]
    assert [example.image_id for example in examples] == list(range(5))
    assert [example.labels.tolist() for example in examples] == [[0, 1]] * 3 + [[2]] * 2
    assert [example.crowd.tolist() for example in examples] == [[False, True]] * 3 + [[False]] * 2
    np.testing.assert_allclose(examples[0].boxes, [[2, 3, 12, 23], [3, 3, 13, 23]], rtol=1e-6)
    np.testing.assert_allclose(examples[4].area, [200], rtol=1e-6)
    assert flaws(source) == {"images with more objects than config.data.max_objects": ("truncated", [0, 1, 2])}
    assert open_source("tfds:voc/2007", "train", voc)[2].image_id == 2
    np.testing.assert_allclose(class_statistics(source).frequency, [3 / 5, 0, 2 / 5])


def test_a_split_without_any_object_is_refused(voc):
    """Item 9: VOC 2012 has no annotations for its test images."""
    assert len(open_source("tfds:voc/2007", "test", voc)) == 1
    with pytest.raises(UserError, match="tfds:voc/2012 test has no object in any of its 1 images"):
        open_source("tfds:voc/2007+2012", "test", voc)


def test_joined_sets_must_have_the_same_classes(tmp_path):
    features = voc_features()
    prepare("voc", "2007", features, {"train": [voc_example(1, [0])]}, tmp_path, version="5.0.0")
    inner = dict(features["objects"].feature.items()) | {"label": tfds.features.ClassLabel(names=CLASSES[::-1])}
    features["objects"] = tfds.features.Sequence(inner)
    prepare("voc", "2012", features, {"train": [voc_example(1, [0])]}, tmp_path, version="5.0.0")
    with pytest.raises(
        ValueError, match="tfds:voc/2007 train and tfds:voc/2012 train have the same classes in another"
    ):
        open_source("tfds:voc/2007+2012", "train", tmp_path)


def shard(folder, number=1, count=3):
    return folder / f"coco-train.array_record-{number:05d}-of-{count:05d}"


def flipped(path):
    """Flips a bit of the longest run of image bytes."""
    data = bytearray(path.read_bytes())
    place = data.find(b"\xff\xd8\xff") + 300
    data[place] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "bit flip": (lambda folder: flipped(shard(folder)), r"record 2 in .*/1.1.0 cannot be read .*hash mismatch"),
    "truncated": (lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-70_000]), "00001-of-00003 is"),
    "emptied": (lambda folder: shard(folder).write_bytes(b""), "00001-of-00003 is damaged"),
    "missing": (lambda folder: shard(folder).unlink(), r"lacks coco-train.array_record-00001-of-00003 \(1 file"),
    "extra": (
        lambda folder: shutil.copy(shard(folder), shard(folder, 3)),
        "has besides its own files .*00003-of-00003",
    ),
    "of two versions": (
        lambda folder: shutil.copy(shard(folder), shard(folder, 1, 2)),
        "has besides its own files .*00001-of-00002",
    ),
    "one for another": (lambda folder: shutil.copy(shard(folder, 0), shard(folder)), "has 2 records instead of 3"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_at_the_start(spoilt, name):
    """Item 24."""
    root, folder = spoilt
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_source("tfds:coco/2017", "train", root)
    command = f"tfds build coco/2017 --data_dir={root} --file_format=array_record --overwrite"
    assert f"prepare it again with `{command}`" in str(error.value)
    assert str(error.value).startswith("tfds:coco/2017")
    assert "\n" not in str(error.value)
    assert len(open_source("tfds:coco/2017", "validation", root)) == 3


def test_no_flip_of_a_bit_changes_the_data(spoilt):
    """Item 24: 40 flips anywhere in a shard; each is refused, or was in nobody's bytes."""
    root, folder = spoilt
    sound = shard(folder).read_bytes()
    expected = open_source("tfds:coco/2017", "train", root)
    used = len(sound) - 65536
    refused, rng = 0, random.Random(0)
    for _ in range(40):
        data = bytearray(sound)
        data[rng.randrange(used)] ^= 1 << rng.randrange(8)
        shard(folder).write_bytes(data)
        try:
            source = open_source("tfds:coco/2017", "train", root)
        except UserError:
            refused += 1
            continue
        assert source.fingerprint == expected.fingerprint
        for index in range(7):
            np.testing.assert_array_equal(source[index].image, expected[index].image)
    assert refused


def with_inner(**changes):
    features = coco_features()
    inner = dict(features["objects"].feature.items()) | changes
    features["objects"] = tfds.features.Sequence({key: value for key, value in inner.items() if value is not None})
    return features


FEATURES = {
    "no boxes": (with_inner(bbox=None), "has no objects/bbox: it needs the features of TFDS's COCO or VOC"),
    "boxes without meaning": (
        with_inner(bbox=tfds.features.Tensor(shape=(4,), dtype=np.float32)),
        "the feature objects/bbox is Tensor.*; it must be a BBoxFeature of relative ymin, xmin, ymax, xmax",
    ),
    "boxes as corner and size": (
        with_inner(bbox=tfds.features.BBoxFeature(bbox_format="XYWH")),
        "the feature objects/bbox is .*; it must be a BBoxFeature of relative",
    ),
    "labels are numbers": (with_inner(label=np.int64), "the feature objects/label is .*; it must be a ClassLabel"),
    "crowd is a number": (with_inner(is_crowd=np.int64), "the feature objects/is_crowd is .*; it must be a bool"),
    "area is a text": (with_inner(area=tfds.features.Text()), "the feature objects/area is .*; it must be a number"),
    "image id is a text": (coco_features() | {"image/id": tfds.features.Text()}, "image/id is .* must be an integer"),
    "run lengths are numbers": (with_inner(run_lengths=np.int64), "objects/run_lengths is .*; it must be a text"),
    "no objects": ({"image": tfds.features.Image()}, "has no objects/bbox, objects/label"),
    "objects are a number": (coco_features() | {"objects": np.int64}, "has no objects/bbox, objects/label"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_other_features_are_refused(tmp_path, name):
    """Item 25; that the examples do not fit does not matter, for there are none."""
    features, message = FEATURES[name]
    info = builder_of("other", "1", features, {}, tmp_path).info.features
    with pytest.raises(UserError, match=f"tfds:other/1.*{message}") as error:
        prepared._check_features("tfds:other/1", info)
    assert "\n" not in str(error.value)


def of_boxes(path, *boxes):
    """A set whose boxes TFDS does not check when it writes them, as it did not in earlier versions."""
    boxes = np.array(boxes, np.float32)
    example = coco_example(1)
    example["objects"] = [example["objects"][0] | {"bbox": box, "id": 7 + k} for k, box in enumerate(boxes)]
    prepare("coco", "2017", coco_features(tfds.features.BBoxFeature(bbox_format=None)), {"train": [example]}, path)
    return open_source("tfds:coco/2017", "train", path)


SOUND_BOX = [0.1, 0.1, 0.5, 0.6]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [[3, 4, 20, 30], [1, 1, 9, 9]],
            r"2 of 2 boxes beyond their image: \[3.0, .* in 0{11}1.jpg.*; they must be frac",
        ),
        (
            [[0.5, 0.5, 0.2, 0.3], SOUND_BOX],
            "1 of 2 boxes that end before they begin.*; they must be ymin, xmin, ymax,",
        ),
        ([[np.nan, 0.1, 0.5, 0.6], SOUND_BOX, SOUND_BOX], "boxes that are not four finite numbers: annotation 7 of 0"),
    ],
)
def test_boxes_that_are_no_fractions_are_refused(tmp_path, boxes, message):
    """Item 25."""
    with pytest.raises(UserError, match=f"tfds:coco/2017 train has {message}"):
        of_boxes(tmp_path, *boxes)


def test_flawed_boxes_are_counted(tmp_path):
    source = of_boxes(tmp_path, SOUND_BOX, [0.1, 0.2, 0.1, 0.9], [0.2, 0.2, 0.5, 1.005])
    assert flaws(source) == {
        "boxes without area": ("left out", [8]),
        "boxes that left their image, cut at its edge": ("repaired", [9]),
    }
    np.testing.assert_allclose(source.objects(0).boxes, [[4, 3, 24, 15], [8, 6, 40, 15]], rtol=1e-6)


def masked(number, *objects):
    """Image 100 + number with an object of id 7 for each pair of a box and run lengths."""
    entry = coco_example(1)["objects"][0] | {"id": 7}
    boxes = [entry | {"bbox": relative(*box), "run_lengths": counts} for box, counts in objects]
    return coco_example(number, objects=boxes)


def of_masks(path, *examples):
    prepare("coco", "2017", with_inner(run_lengths=tfds.features.Text()), {"train": examples}, path)
    return open_source("tfds:coco/2017", "train", path, checks=Checks(skip_empty=True))


def counts_of(mask):
    return pycocotools_mask.encode(np.asfortranarray(mask))["counts"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Of pycocotools with NumPy 2.
def test_masks_stay_with_their_objects(tmp_path):
    """The first image cannot be decoded, the second has no objects, and the middle one of the third no area."""
    masks = np.zeros((5, 30, 40), np.uint8)
    boxes = [(2 * k, 3 + k, 12 + k, 20 + k) for k in range(5)]
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    boxes[2] = (4, 4, 4, 9)
    a, b, c, d, e = zip(boxes, map(counts_of, masks), strict=True)
    broken = masked(1, a) | {"image": encoded(30, 40, kind="JPEG")[:-300]}
    source = of_masks(tmp_path, broken, masked(2), masked(3, b, c, d), masked(4, e))
    assert [source[k].image_id for k in range(len(source))] == [103, 104]
    found = [pycocotools_mask.decode(runs) for k in range(len(source)) for runs in source[k].segmentation]
    np.testing.assert_array_equal(found, masks[[1, 3, 4]])


SOUND_MASK = counts_of(np.eye(30, 40, dtype=np.uint8))


@pytest.mark.parametrize("others", [[], [SOUND_MASK]], ids=["alone", "after a sound one"])
@pytest.mark.parametrize(
    "counts",
    [b"", b"\xff\xfe", SOUND_MASK[:-1], counts_of(np.eye(40, 40, dtype=np.uint8)), b"Om"],
    ids=["empty", "no text", "cut off", "of another size", "endless"],
)
def test_run_lengths_of_no_mask_are_refused(tmp_path, counts, others):
    box = (2, 3, 12, 23)
    message = (
        r"objects whose run_lengths are not those of their image: annotation 7 of 0{11}4.jpg \(image 104\), x 2 to 12"
    )
    with pytest.raises(UserError, match=f"tfds:coco/2017 train has {message}") as error:
        of_masks(tmp_path, masked(4, *(((20, 3, 30, 23), text) for text in others), (box, counts)))
    assert "\n" not in str(error.value)


def test_sets_without_run_lengths_have_no_outlines(coco, voc):
    for name, folder in (("tfds:coco/2017", coco), ("tfds:voc/2007", voc)):
        assert open_source(name, "train", folder).objects(1).segmentation is None


def test_broken_images_are_left_out_or_refused(tmp_path):
    """Items 17 and 19."""
    broken = [coco_example(1), coco_example(2, image=encoded(30, 40, kind="JPEG")[:-300]), coco_example(4)]
    prepare("coco", "2017", coco_features(), {"train": broken}, tmp_path / "a")
    source = open_source("tfds:coco/2017", "train", tmp_path / "a")
    assert [source[k].image_id for k in range(len(source))] == [101, 104]
    np.testing.assert_allclose(source.objects(1).boxes, [[6, 3, 16, 23]], rtol=1e-6)
    assert flaws(source) == {"images that cannot be decoded": ("left out", [102])}
    broken[1]["image"] = b"<html>"
    prepare("coco", "2017", coco_features(), {"train": broken}, tmp_path / "b")
    with pytest.raises(UserError, match=r"train has images that cannot be used: 0{11}2.jpg .image 102. is no image"):
        open_source("tfds:coco/2017", "train", tmp_path / "b")
    assert len(open_source("tfds:coco/2017", "train", tmp_path / "b", checks=Checks(lenient=True))) == 2


def test_image_ids_are_unique(coco, tmp_path):
    prepare("coco", "2017", coco_features(), {"train": [coco_example(1), coco_example(1)]}, tmp_path)
    with pytest.raises(UserError, match="several images with the same image/id"):
        open_source("tfds:coco/2017", "train", tmp_path)
    with pytest.raises(UserError, match=r"tfds:coco/2017\+2017 train: images of different parts have the same id"):
        open_source("tfds:coco/2017+2017", "train", coco)


def test_images_left_out_leave_a_gap_in_the_numbers(tmp_path):
    broken = voc_example(0, [1]) | {"image": encoded(30, 40, kind="JPEG")[:-300]}
    for year, examples in (("2007", [broken, voc_example(1, [0])]), ("2012", [voc_example(2, [0])])):
        prepare("voc", year, voc_features(), {"train": examples}, tmp_path, version="5.0.0")
    source = open_source("tfds:voc/2007+2012", "train", tmp_path)
    assert [source[k].image_id for k in range(len(source))] == [1, 2]
    assert flaws(source) == {"images that cannot be decoded": ("left out", [0])}


def test_a_damaged_description_is_refused(spoilt):
    root, folder = spoilt
    info = folder / "dataset_info.json"
    info.write_text(info.read_text()[:-20])
    with pytest.raises(
        ValueError, match=r"tfds:coco/2017: .*/1.1.0 cannot be opened .*: prepare it again with `tfds build"
    ):
        open_source("tfds:coco/2017", "train", root)


def test_empty_and_small_splits_are_refused(coco, tmp_path):
    """Item 26."""
    with pytest.raises(UserError, match=r"tfds:coco/2017 has no split 'train\[7:\]'"):
        open_source("tfds:coco/2017", "train[7:]", coco)
    source = open_source("tfds:coco/2017", "train", coco)
    with pytest.raises(UserError, match="7 examples, fewer than the batch of 8"):
        train_batches(source, batch_size=8, image_size=(32, 32), task=Detection(4), seed=0)


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    """Item 27."""

    def refuse(*_, **__):
        raise AssertionError("asked TFDS for a data set")

    monkeypatch.setattr(tfds, "builder", refuse)
    command = f"tfds build coco/2017 --data_dir={tmp_path} --file_format=array_record"
    for half in ("", "incomplete.GYP3FE_1.1.0", "1.1.0"):
        if half:
            (tmp_path / "coco" / "2017" / half).mkdir(parents=True)
        with pytest.raises(UserError, match="tfds:coco/2017 is not prepared in") as error:
            open_source("tfds:coco/2017", "train", tmp_path)
        assert f"prepare it with `{command}`, or set config.data.download=True." in str(error.value)
        assert ("only begun" in str(error.value)) == bool(half)


def test_what_is_asked_for_is_prepared_once(tmp_path, monkeypatch):
    made = []

    def builder(name, data_dir, file_format):
        made.append((name, str(data_dir)))
        assert file_format == "array_record"
        made_here = builder_of("coco", "2017", coco_features(), {"train": [coco_example(1)]}, data_dir)
        options = tfds.download.DownloadConfig(try_download_gcs=False)
        monkeypatch.setattr(
            type(made_here),
            "download_and_prepare",
            lambda self: tfds.core.GeneratorBasedBuilder.download_and_prepare(
                self, file_format=file_format, download_config=options
            ),
        )
        return made_here

    monkeypatch.setattr(tfds, "builder", builder)
    for _ in range(2):
        assert len(open_source("tfds:coco/2017", "train", tmp_path, download=True)) == 1
    assert made == [("coco/2017", str(tmp_path))]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("no tensorflow"), r"can only be prepared with TensorFlow \(no tensorflow\): install it with"),
        (OSError("no network"), "tfds:coco/2017 cannot be prepared in .*: OSError: no network"),
    ],
)
def test_a_failed_preparation_is_one_sentence(tmp_path, monkeypatch, error, message):
    def builder(*_, **__):
        raise error

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(UserError, match=message):
        open_source("tfds:coco/2017", "train", tmp_path, download=True)
