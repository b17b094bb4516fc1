"""Pascal VOC's XML: where tools put it, what corners mean, and every mistake in one sentence."""

import numpy as np
import pytest

from kdjax.data.flaws import Checks
from kdjax.data.folders import NoSplitError
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from tests.data.test_yolo import flaws, put


def xml(*objects, image="a.png", size=(40, 30), head=""):
    """An annotation file; objects are (name, corners, difficult)."""
    listed = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{key}>{x}</{key}>" for key, x in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False))
        + "</bndbox></object>"
        for name, corners, difficult in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"{head}<annotation><folder>x</folder><filename>{image}</filename>{size}{listed}</annotation>"


DOG, CAT = ("dog", (3, 4, 12, 23), 0), ("cat", (1, 1, 40, 30), 1)
FILES = {"a": xml(DOG, CAT), "b": xml(("dog", (21, 4, 29, 9), 0), image="b.png"), "c": xml(image="c.png")}


def pair(images, labels, files=FILES):
    """Images and annotation files, whose places are given by what stands before their names."""
    return {f"{images}{stem}.png": None for stem in files} | {
        f"{labels}{stem}.xml": text for stem, text in files.items()
    }


def opened(folder, split="train", **checks):
    return open_source(f"voc:{folder}", split, checks=Checks(**checks))


LAYOUTS = {
    "voc": (
        pair("JPEGImages/", "Annotations/") | {"ImageSets/Main/train.txt": "a\nb\nc\n", "ImageSets/Main/val.txt": "x"},
        "train",
    ),
    "its classes": (
        pair("JPEGImages/", "Annotations/") | {"ImageSets/Main/dog_val.txt": "a  1\nb  1\nc -1\n"},
        "dog_val",
    ),
    "roboflow": (pair("valid/", "valid/"), "validation"),
    "folders of folders": (pair("train/images/", "train/annotations/"), "train"),
    "kaggle": (pair("images/", "annotations/"), "train"),
    "labelimg": (pair("", ""), "train"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_tools_are_read(tmp_path, layout):
    files, split = LAYOUTS[layout]
    source = opened(put(tmp_path, files), split)
    assert [source.name(k) for k in range(3)] == ["a.png", "b.png", "c.png"]
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.objects(0).boxes, [[2, 3, 12, 23], [0, 0, 40, 30]])
    np.testing.assert_array_equal(source.objects(0).labels, [1, 0])
    np.testing.assert_array_equal(source.objects(0).crowd, [False, True])
    np.testing.assert_array_equal(source.objects(1).boxes, [[20, 3, 29, 9]])
    assert len(source.objects(2).boxes) == 0
    assert list(flaws(source)) == [
        "objects marked to be ignored, which are taken for crowds: neither learnt nor judged"
    ]


@pytest.mark.parametrize("corner", [0, 2.5])
def test_corners_that_do_not_count_from_one_are_edges_and_said(tmp_path, corner):
    put(tmp_path, pair("", "", {"a": xml(DOG), "b": xml(("cat", (corner, 4, 29, 9), 0), image="b.png")}))
    source = opened(tmp_path)
    np.testing.assert_array_equal(source.objects(0).boxes, [[3, 4, 12, 23]])
    np.testing.assert_array_equal(source.objects(1).boxes, [[corner, 4, 29, 9]])
    what, (outcome, files) = next(iter(flaws(source).items()))
    assert (outcome, files) == ("kept", ["a.png", "b.png"])
    assert "corners are taken for edges from 0" in what


def test_all_splits_have_the_same_classes_and_meaning(tmp_path):
    put(
        tmp_path,
        pair("train/", "train/", {"a": xml(DOG)})
        | pair("valid/", "valid/", {"b": xml(("cat", (0, 0, 9, 9), 0), image="b.png")}),
    )
    train, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert train.class_names == validation.class_names == ("cat", "dog")
    np.testing.assert_array_equal(train.objects(0).boxes, [[3, 4, 12, 23]])
    # It is the other split's corner of 0 that decides, and this one's report says so too.
    assert "corners are taken for edges from 0" in next(iter(flaws(train)))


def test_any_folder_may_be_a_split(tmp_path):
    put(tmp_path, pair("train/", "train/", {"a": xml(DOG)}) | pair("holiday/", "holiday/", FILES))
    assert len(opened(tmp_path, "holiday")) == 3
    assert opened(tmp_path, "holiday").class_names == ("cat", "dog")


def test_names_that_contradict_each_other_and_images_without_a_file_are_said(tmp_path):
    put(tmp_path, pair("", "", FILES | {"a": xml(DOG, image="b.png")}) | {"d.png": None})
    found = flaws(opened(tmp_path))
    assert found["annotation files that name another image than that of their own name, which is taken"] == (
        "kept",
        ["a.png"],
    )
    assert found["images without an annotation file, taken for scenes with nothing to find"] == ("kept", ["d.png"])


def test_an_image_is_also_found_by_the_name_that_the_file_says(tmp_path):
    put(tmp_path, {"images/photo.png": None, "annotations/1.xml": xml(DOG, image="C:\\data\\photo.png")})
    assert opened(tmp_path).name(0) == "photo.png"
    put(tmp_path, {"annotations/2.xml": xml(DOG, image="gone.png")})
    with pytest.raises(UserError, match=r"images that cannot be used: gone.png \(image 2\) is missing"):
        opened(tmp_path)


WRONG = {
    "<annotation>": "a.xml is not valid XML: ",
    "<image></image>": "a.xml holds <image>; it must be an <annotation>",
    xml(DOG, head='<!DOCTYPE x [<!ENTITY e "e">]>'): "a.xml defines a document type; annotations have none",
    xml(
        ("dog", (1, 2, "x", 4), 0)
    ): "a.xml: object 1 has xmin '1', ymin '2', xmax 'x', ymax '4'; its bndbox must have four",
    xml(("dog", (), 0)): "object 1 has xmin ''.*; its bndbox must have four numbers",
    xml(("", (1, 2, 3, 4), 0)): "object 1 has no name, which is its class",
    xml(DOG, size=("wide", 30)): "has width 'wide'; it must be a whole number of pixels",
    xml(
        DOG, size=(400, 300)
    ): r"images of another size than annotated: a.png \(image 1\) is 40 x 30 pixels and annotated as",
    xml(("dog", (1, 1, "inf", 4), 0)): "boxes that are not four finite numbers",
    xml(("dog", (60, 4, 70, 23), 0)): "no object in any of its 1 images",
    xml(): "has no category|no class|no object",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files_are_refused_by_name(tmp_path, text):
    put(tmp_path, pair("", "", {"a": text}))
    with pytest.raises(UserError, match=WRONG[text]) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_there_is_named(tmp_path):
    put(tmp_path, pair("JPEGImages/", "Annotations/") | {"ImageSets/Main/train.txt": "a\nz\n"})
    with pytest.raises(
        NoSplitError, match=r"has no list ImageSets/Main/validation.txt and no folder .*train\[held_out\]"
    ):
        opened(tmp_path, "validation")
    with pytest.raises(UserError, match=r"has no z.xml, which the list of the split 'train' names"):
        opened(tmp_path)
    with pytest.raises(UserError, match=f"for the folder {tmp_path}, voc:{tmp_path}"):
        open_source(str(tmp_path), "train")
