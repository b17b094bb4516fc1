"""YOLO's text files: where tools put them, what their lines mean, and every mistake in one sentence."""

import numpy as np
import pytest

from kdjax.data.flaws import Checks
from kdjax.data.folders import NoSplitError
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from tests.data.folders import encoded

LINES = {"a": "0 0.5 0.5 0.5 0.2\n1 0.25 0.25 0.1 0.1\n", "b": "1 0.1 0.1 0.9 0.1 0.5 0.8\n", "c": ""}
"""A box in the middle and a small one; a triangle; nothing."""
YAML = "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"


def put(folder, files):
    """Writes texts and bytes, and pictures of 40 x 30 pixels where there is neither."""
    for number, (name, text) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.write_bytes(encoded(30, 40, seed=number))
        elif isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text)
    return folder


def pair(images, labels, lines=LINES):
    """Images and label files, whose places are given by what stands before their names."""
    return {f"{images}{stem}.png": None for stem in lines} | {
        f"{labels}{stem}.txt": text for stem, text in lines.items()
    }


def opened(folder, split="train", **checks):
    return open_source(f"yolo:{folder}", split, checks=Checks(**checks))


def flaws(source):
    return {entry["what"]: (entry["outcome"], entry["files"]) for entry in source.report_dict()["flaws"]}


LAYOUTS = {
    "ultralytics": ({"data.yaml": YAML} | pair("images/train/", "labels/train/"), "train"),
    "its validation": ({"data.yaml": YAML} | pair("images/val/", "labels/val/"), "validation"),
    "roboflow": (
        {"data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n"}
        | pair("valid/images/", "valid/labels/"),
        "validation",
    ),
    "cvat": (
        {
            "obj.names": "cat\ndog\n",
            "obj.data": "classes = 2\ntrain = data/train.txt\n",
            "train.txt": "".join(f"data/obj_train_data/{stem}.png\n" for stem in LINES),
        }
        | pair("obj_train_data/", "obj_train_data/"),
        "train",
    ),
    "label studio": ({"classes.txt": "cat\ndog\n", "notes.json": "{}"} | pair("images/", "labels/"), "train"),
    "labelimg": (pair("", "") | {"classes.txt": "cat\ndog\n"}, "train"),
    "folders": ({"classes.txt": "cat\ndog\n"} | pair("valid/", "valid/"), "validation"),
    "a list": (
        {
            "my.yaml": "train: lists/train.txt\nnames: [cat, dog]\n",
            "lists/train.txt": "images/a.png\nimages/b.png\nimages/c.png\n",
        }
        | pair("images/", "labels/"),
        "train",
    ),
    "several folders": (
        {"my.yaml": "train: [one/images, two/images]\nnames: [cat, dog]\n"}
        | pair("one/images/", "one/labels/", {k: LINES[k] for k in "ab"})
        | pair("two/images/", "two/labels/", {"c": ""}),
        "train",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_tools_are_read(tmp_path, layout):
    files, split = LAYOUTS[layout]
    source = opened(put(tmp_path, files), split)
    assert [source.name(k).rpartition("/")[2] for k in range(3)] == ["a.png", "b.png", "c.png"]
    assert source.class_names == ("cat", "dog")
    # The box of an outline is its outline where others have one.
    assert list(flaws(source)) == ["objects without a usable segmentation, whose box is taken for it"]
    np.testing.assert_allclose(source.objects(0).boxes, [[10, 12, 30, 18], [8, 6, 12, 9]], atol=1e-5)
    np.testing.assert_array_equal(source.objects(0).labels, [0, 1])
    np.testing.assert_allclose(source.objects(0).area, [120, 12], rtol=1e-5)
    np.testing.assert_allclose(source.objects(1).boxes, [[4, 3, 36, 24]], atol=1e-5)
    np.testing.assert_allclose(source.objects(1).segmentation[0], [[4, 3, 36, 3, 20, 24]], atol=1e-9)
    assert len(source.objects(2).boxes) == 0
    assert source[1].image.shape == (30, 40, 3)


def test_the_yaml_file_may_be_named(tmp_path):
    put(tmp_path, {"one.yaml": YAML, "two.yaml": "names: [x]"} | pair("images/train/", "labels/train/"))
    assert len(opened(tmp_path / "one.yaml")) == 3
    with pytest.raises(UserError, match=r"several yaml files with names \(one.yaml, two.yaml\): name one"):
        opened(tmp_path)


def test_other_yaml_files_are_left_alone(tmp_path):
    files = {"data.yaml": YAML, "hooks.yaml": "- a\n", "compose.yml": "services: {}\n"}
    assert len(opened(put(tmp_path, files | pair("images/train/", "labels/train/")))) == 3


def test_points_of_poses_are_not_read(tmp_path):
    yaml = YAML + "kpt_shape: [2, 3]\n"
    lines = {"a": "0 0.5 0.5 0.5 0.2 0.1 0.1 2 0.9 0.9 1\n"}
    source = opened(put(tmp_path, {"data.yaml": yaml} | pair("images/train/", "labels/train/", lines)))
    np.testing.assert_allclose(source.objects(0).boxes, [[10, 12, 30, 18]], atol=1e-5)


def test_images_without_and_labels_without_an_image_are_said(tmp_path):
    files = {"data.yaml": YAML} | pair("images/train/", "labels/train/")
    put(tmp_path, files | {"images/train/d.png": None, "labels/train/e.txt": LINES["a"]})
    with pytest.raises(UserError, match=r"images that cannot be used: images/train/e.jpg \(image 5\) is missing"):
        opened(tmp_path)
    source = opened(tmp_path, lenient=True)
    found = flaws(source)
    assert found["images without an annotation file, taken for scenes with nothing to find"] == (
        "kept",
        ["images/train/d.png"],
    )
    assert found["images that cannot be used"] == ("left out", ["images/train/e.jpg"])
    assert len(source) == 4
    assert len(opened(tmp_path, lenient=True, skip_empty=True)) == 2


WRONG = {
    "0 0.5 0.5 0.5": "line 1 of .*labels/train/a.txt has 4 numbers; each line must be a class and four numbers, or",
    "0 0.5 0.5 0.5 0.5 0.99": "has 6 numbers.*a sixth is a confidence",
    "cat 0.5 0.5 0.5 0.5": "line 1 of .*a.txt is 'cat 0.5 0.5 0.5 0.5'; each line must be",
    "0.5 0.5 0.5 0.5 0.5": "is '0.5 0.5 0.5 0.5 0.5'; each line",
    "0 0.5 nan 0.5 0.5": "is '0 0.5 nan 0.5 0.5'; each line",
    "2 0.5 0.5 0.5 0.5": "has class 2, and .*data.yaml has the classes 0 to 1; config.data.lenient=True leaves",
    "-1 0.5 0.5 0.5 0.5": "has class -1, and",
    "0 320 240 100 80": "1 of 1 objects with numbers above 2, such as line 1 of .*: these look like pixels where",
    "0 0.1 0.1 0.9 0.9\n0 0.2 0.3 0.95 0.9": "2 of 2 objects that leave their image, .*look like x1 y1 x2 y2",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_refused_by_file_and_line(tmp_path, line):
    put(tmp_path, {"data.yaml": YAML} | pair("images/train/", "labels/train/", {"a": line}))
    with pytest.raises(UserError, match=WRONG[line]) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_flaws_of_boxes_are_met_as_those_of_other_files(tmp_path):
    lines = {"a": "0 0.5 0.5 0.5 0.2\n0 0.5 0.5 0.5 0.2\n1 0.95 0.5 0.2 0.2\n1 0.5 0.5 0 0.2\n7 0.5 0.5 0.1 0.1\n"}
    put(tmp_path, {"data.yaml": YAML} | pair("images/train/", "labels/train/", lines))
    source = opened(tmp_path, lenient=True)
    assert {what: outcome for what, (outcome, _) in flaws(source).items()} == {
        "objects with the image, the class and the box of another": "left out",
        "boxes that left their image, cut at its edge": "repaired",
        "boxes without area": "left out",
        "annotations of categories that are not listed": "left out",
    }
    np.testing.assert_allclose(source.objects(0).boxes, [[10, 12, 30, 18], [34, 12, 40, 18]], atol=1e-5)


BAD = {
    "names: [cat, dog": "data.yaml is not valid yaml: ",
    "- cat": "holds a list; it must have names",
    "train: images/train\nnames: {1: cat, 2: dog}": "has names .*; they must be a list of classes, or",
    "train: images/train\nnames: []": "has names",
    "train: images/train\nnames: [cat, dog]\nnc: 3": "has nc 3 and 2 names; both",
    "train: images/none\nnames: [cat, dog]": "has train 'images/none', which is not there; it is looked for from",
    "train: 3\nnames: [cat, dog]": "has train 3; it must be a folder, a list of images, or several",
    "train: images\nnames: [cat, dog]\n!!python/object/apply:os.system ['true']: x": "not valid yaml",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_yaml_file_is_one_sentence(tmp_path, text):
    put(tmp_path, {"data.yaml": text} | pair("images/train/", "labels/train/"))
    with pytest.raises(UserError, match=BAD[text]) as error:
        opened(tmp_path / "data.yaml")
    assert "\n" not in str(error.value)


def test_classes_are_asked_for(tmp_path):
    put(tmp_path, pair("images/", "labels/"))
    with pytest.raises(UserError, match="says nowhere what its classes are: it must have a yaml file with names"):
        opened(tmp_path)


def test_no_label_file_at_all_is_refused(tmp_path):
    put(tmp_path, {"data.yaml": YAML, "images/train/a.png": None, "elsewhere/a.txt": LINES["a"]})
    with pytest.raises(
        UserError, match=r"no label file for any of the 1 images .*: that of images/train/a.png would be labels/"
    ):
        opened(tmp_path)


@pytest.mark.parametrize("yaml", [YAML, "train: images/train\nnames: [cat, dog]\n"])
def test_a_split_that_is_not_there_is_named(tmp_path, yaml):
    put(tmp_path, {"data.yaml": yaml} | pair("images/train/", "labels/train/", dict.fromkeys("abcde", LINES["a"])))
    with pytest.raises(NoSplitError, match=r"has no .*val.*config.data.eval_split='train\[held_out\]'"):
        opened(tmp_path, "validation")
    parts = [opened(tmp_path, f"train[{part}]") for part in ("kept", "held_out")]
    assert [len(part) for part in parts] == [4, 1]


def test_a_folder_is_taken_for_what_it_is(tmp_path):
    put(tmp_path, {"classes.txt": "cat"} | pair("images/", "labels/"))
    with pytest.raises(UserError, match=f"for the folder {tmp_path}, yolo:{tmp_path}"):
        open_source(str(tmp_path), "train")


def test_the_path_of_a_yaml_file_may_lead_elsewhere(tmp_path):
    put(tmp_path / "data", pair("images/train/", "labels/train/"))
    put(tmp_path / "configs", {"my.yaml": "path: ../data\ntrain: images/train\nnames: [cat, dog]\n"})
    assert [opened(tmp_path / "configs" / "my.yaml").name(k) for k in (0,)] == ["images/train/a.png"]
    (tmp_path / "link").symlink_to(tmp_path / "data")
    put(tmp_path / "data", {"data.yaml": f"path: {tmp_path / 'data'}\ntrain: images/train\nnames: [cat, dog]\n"})
    assert len(opened(tmp_path / "link")) == 3


def test_odd_things_beside_labels_are_no_labels(tmp_path):
    files = {"classes.txt": "cat\ndog\n", "train.txt": "000.png\n001.png\n", "notes.yaml": "a: !Ref b\n"}
    put(tmp_path, files | pair("", "", {"000": LINES["a"], "001": ""}))
    (tmp_path / "2.txt").mkdir()
    (tmp_path / "3.txt").symlink_to(tmp_path / "none")
    assert len(opened(tmp_path)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train: images/train\nnames: [yes, no]\n",
            "has names that yaml takes for true or false: write them in quotes",
        ),
        (f"train: {'x' * 300}\nnames: [cat, dog]\n", "has train 'xxx.*', which is not there"),
        ("a: !Ref b\n", "data.yaml is not valid yaml"),
    ],
)
def test_more_bad_yaml_files_are_one_sentence(tmp_path, text, words):
    put(tmp_path, {"data.yaml": text} | pair("images/train/", "labels/train/"))
    with pytest.raises(UserError, match=words) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)
