"""Folders of images that are called as their classes are: what is found, what is said, what is refused."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from kdjax.data.flaws import Checks
from kdjax.data.folders import NoSplitError
from kdjax.data.indexed import check_shared
from kdjax.data.manifest import MANIFEST_FILE, check_manifest, look
from kdjax.data.sizing import Reading
from kdjax.data.sources import open_source
from kdjax.errors import DataError, UserError
from tests.data.folders import encoded
from tests.data.test_coco import flaws

CLASSES = ("cat", "dog", "\u732b")
COUNTS = {"train": 4, "val": 2}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def folder(tmp_path):
    for split, count in COUNTS.items():
        for label, kind in enumerate(CLASSES):
            for k in range(count):
                seed = 1000 * (split == "val") + 10 * label + k
                put(tmp_path / split / kind / f"{k}.png", encoded(20 + k, 30, seed=seed))
    return tmp_path


def opened(folder, split="train", **checks):
    return open_source(f"class_folders:{folder}", split, checks=Checks(**checks))


def test_images_have_the_class_of_their_folder_and_come_by_turns(folder):
    source = opened(folder)
    assert source.class_names == CLASSES
    assert [source.name(k) for k in range(4)] == ["cat/0.png", "dog/0.png", "\u732b/0.png", "cat/1.png"]
    assert [source.label(k) for k in range(12)] == [0, 1, 2] * 4
    example = source[4]
    assert (example.image.shape, example.image_id, example.label) == ((21, 30, 3), 5, 1)
    assert source.size(4) == (21, 30)
    with Image.open(folder / "train" / "dog" / "1.png") as image:
        np.testing.assert_array_equal(example.image, image)
    assert source.report_lines() == [f"{folder} train: 12 images of 3 classes, 4 to 4 of each."]
    assert source.report_dict()["images_of_class"] == dict.fromkeys(CLASSES, 4)
    assert {opened(folder, f"train[{part}]").label(k) for part in ("kept", "held_out") for k in range(3)} == {0, 1, 2}


@pytest.mark.parametrize(("split", "count"), [("validation", 6), ("val", 6), ("train[:5]", 5), ("train[held_out]", 3)])
def test_splits_and_parts_are_found(folder, split, count):
    assert len(opened(folder, split)) == count


def test_a_folder_of_classes_alone_is_the_training_split(folder):
    source = opened(folder / "train")
    assert (len(source), source.class_names) == (12, CLASSES)
    with pytest.raises(
        NoSplitError, match=r"no folder for the split 'validation', such as validation/<class>/<image>: .*held_out"
    ):
        opened(folder / "train", "validation")


def test_folders_of_splits_with_other_names_are_named(folder):
    (folder / "train").rename(folder / "first")
    (folder / "val").rename(folder / "second")
    with pytest.raises(NoSplitError, match=r"name one of the folders that it has \(first, second\)"):
        opened(folder)
    assert len(opened(folder, "first")) == 12


def test_a_class_that_a_split_lacks_is_said_and_the_splits_still_agree(folder):
    shutil.rmtree(folder / "val" / "dog")
    put(folder / "val" / "dgo" / "a.png", encoded(8, 8))
    train, evaluation = opened(folder), opened(folder, "validation")
    assert train.class_names == evaluation.class_names == ("cat", "dgo", "dog", "\u732b")
    assert flaws(train)["classes that no image shows"] == ("kept", [1])
    assert flaws(evaluation)["classes that no image shows"] == ("kept", [2])
    assert any("(category dgo)" in line for line in train.report_lines())
    with pytest.raises(DataError, match="classes that no image shows: 'dgo'"):
        opened(folder, strict=True)


def test_what_is_in_no_class_is_left_out_and_said(folder):
    put(folder / "train" / "stray.png", encoded(8, 8))
    put(folder / "train" / ".cache" / "thumb.png", encoded(8, 9))
    put(folder / "train" / "cat" / "notes.txt", b"")
    source = opened(folder)
    assert len(source) == 12
    assert flaws(source) == {"images in no folder of a class": ("left out", [0])}


def test_the_same_file_twice_is_said_by_whether_its_classes_agree(folder):
    data = (folder / "train" / "cat" / "0.png").read_bytes()
    for name in ("cat/copy.png", "dog/copy.png"):
        put(folder / "train" / name, data)
    put(folder / "val" / "cat" / "train.png", data)
    train, evaluation = opened(folder), opened(folder, "validation")
    found = flaws(train)
    assert len(found["images with the same file and the same truth as another"][1]) == 1
    assert len(found["images with the same file as another, and another truth"][1]) == 1
    with pytest.raises(DataError, match=r"the same truth as another: cat/copy.png \(image \d+\) is cat/0.png"):
        opened(folder, strict=True)
    check_shared(train, evaluation)
    assert len(flaws(evaluation)["images that the training split holds too"][1]) == 1


def test_files_that_cannot_be_used_are_refused_or_left_out(folder):
    put(folder / "train" / "cat" / "5.jpg", b"no image")
    put(folder / "train" / "dog" / "5.jpg", encoded(20, 30, kind="JPEG")[:-200])
    with pytest.raises(
        DataError, match=r"images that cannot be used: cat/5.jpg \(image 13\) is no image that can be read"
    ):
        opened(folder)
    source = opened(folder, lenient=True)
    assert len(source) == 12
    assert flaws(source)["images that cannot be decoded"] == ("left out", [14])
    assert source.label(1) == 1


def test_an_image_that_spoils_later_is_replaced_with_its_class(folder, capsys):
    source = opened(folder)
    path = folder / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    example = source[3]
    assert (example.image_id, example.label) == (5, 1)
    assert "cat/1.png (image 4)" in capsys.readouterr().err


def test_marks_and_wide_values_are_met_as_detections_are(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(folder / "train" / "cat" / "0.png", encoded(20, 30, kind="JPEG", exif=exif.tobytes()))
    assert flaws(opened(folder))["images with an orientation mark (EXIF), which is not applied"] == ("kept", [1])
    assert opened(folder, reading=Reading(upright=True)).size(0) == (30, 20)
    for label, kind in enumerate(CLASSES):
        for k in range(4):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng((label, k)).integers(0, 4096, (9, 9), np.uint16)).save(file, "PNG")
            put(folder / "train" / kind / f"{k}.png", file.getvalue())
    assert any("more than 8 bits with values from" in what for what in flaws(opened(folder)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no folder for the split 'train'"),
        (["train/cat/a.png"], "has one class alone, 'cat'; there must be two"),
        (
            ["train/a.png", "train/b.png"],
            "images, such as a.png, in no folder of a class: an image is train/<class>/a.png",
        ),
    ],
)
def test_too_little_is_one_sentence(tmp_path, names, message):
    for name in names:
        put(tmp_path / name, encoded(8, 8))
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_empty_splits_are_one_sentence(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with pytest.raises(DataError, match="validation has no image"):
        opened(folder, "validation")


def test_the_fingerprint_is_of_classes_and_of_bytes(folder):
    before = opened(folder).fingerprint
    assert before == opened(folder).fingerprint
    (folder / "train" / "cat" / "3.png").rename(folder / "train" / "dog" / "4.png")
    moved = opened(folder).fingerprint
    (folder / "train" / "cat" / "0.png").write_bytes(encoded(20, 30, seed=77))
    changed = opened(folder).fingerprint
    assert len({x.partition(";")[0] for x in (before, moved)}) == 2
    assert moved.partition(";")[0] == changed.partition(";")[0]
    assert moved != changed


def test_a_run_remembers_the_files(folder):
    check_manifest(folder / MANIFEST_FILE, look({"train": opened(folder)}), begun=False, whole=True)
    (folder / "train" / "cat" / "0.png").write_bytes(encoded(20, 30, seed=77))
    with pytest.raises(DataError, match=r"has 1 image file \(cat/0.png\) with other bytes"):
        check_manifest(folder / MANIFEST_FILE, look({"train": opened(folder)}), begun=True, whole=False)


def test_the_plain_path_is_answered_with_its_kind(folder):
    with pytest.raises(UserError, match=f"for the folder {folder}, class_folders:{folder}"):
        open_source(str(folder), "train")
