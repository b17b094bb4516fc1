"""Every kind of bad annotation file, and what must become of it; the numbers are those of ``folders.content``."""

import copy
import json
import os
import random

import numpy as np
import pytest

from kdjax.data.flaws import Checks
from kdjax.data.masks import rasterize
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from tests.data.folders import content, encoded, write

FILE = "annotations_train.json"


def opened(folder, split="train", **checks):
    return open_source(f"coco_json:{folder}", split, checks=Checks(**checks))


def flaws(source):
    return {entry["what"]: (entry["outcome"], entry["ids"]) for entry in source.report_dict()["flaws"]}


def edited(path, value):
    """An edit of the content: ``annotations.0.bbox`` and the like becomes ``value``, or goes if that is ``del``."""

    def edit(tree):
        *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in keys:
            tree = tree[key]
        if value is del_:
            del tree[last]
        else:
            tree[last] = value

    return edit


del_ = object()


def test_reads_what_was_written(tmp_path):
    source = opened(write(tmp_path, content()))
    assert len(source) == 3
    assert source.class_names == ("cat", "dog")
    assert source.category_ids == (1, 2)
    assert flaws(source) == {}
    for index, image_id in enumerate((5, 7, 9)):
        example, objects = source[index], source.objects(index)
        assert example.image_id == objects.image_id == image_id
        assert example.image.shape == (*objects.size, 3) == (30, 40, 3)
        assert example.segmentation is objects.segmentation is None
        for name in ("boxes", "labels", "crowd", "area"):
            np.testing.assert_array_equal(getattr(example, name), getattr(objects, name))
    np.testing.assert_array_equal(source[0].boxes, [[2, 3, 12, 23], [20.5, 3, 28.75, 9]])
    np.testing.assert_array_equal(source[0].labels, [0, 1])
    np.testing.assert_array_equal(source[0].area, [150, 40.5])
    assert source[2].boxes.shape == (0, 4)
    dtypes = [array.dtype for array in (source[0].boxes, source[0].labels, source[0].crowd, source[0].area)]
    assert dtypes == [np.float32, np.int32, np.bool_, np.float32]
    with pytest.raises(IndexError):
        source[3]


NOT_JSON = {
    "empty": b"",
    "truncated": json.dumps(content()).encode()[:-9],
    "not json": b"images: none",
    "latin-1": json.dumps(content(), ensure_ascii=False).replace("cat", "kat\xe9").encode("latin-1"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(content()).encode(),
    "UTF-16": json.dumps(content()).encode("utf-16"),
    "a list": b"[]",
    "a number": b"1" * 5000,
    "deeply nested": b"[" * 200_000 + b"]" * 200_000,
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_annotation_file_is_refused(tmp_path, name):
    """Items 1 and 15."""
    write(tmp_path, content())
    (tmp_path / FILE).write_bytes(NOT_JSON[name])
    with pytest.raises(UserError, match=FILE) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_a_huge_annotation_file_is_refused_unread(tmp_path):
    """Item 15."""
    write(tmp_path, content())
    os.truncate(tmp_path / FILE, Checks().most_json_bytes + 1)
    with pytest.raises(
        UserError,
        match=rf"{FILE} has 1,000,000,001 bytes, more than the 1,000,000,000 that are read; config.data.max_json_bytes",
    ):
        opened(tmp_path)
    write(tmp_path, content())
    with pytest.raises(UserError, match=r"more than the 10 that are read"):
        opened(tmp_path, most_json_bytes=10)


REFUSED = {
    "2 no images": (edited("images", del_), "has no 'images'"),
    "2 no annotations": (edited("annotations", del_), "has no 'annotations'"),
    "2 no categories": (edited("categories", del_), "has no 'categories'"),
    "2 images are an object": (edited("images", {}), "'images' must be a list of objects"),
    "2 an annotation is a text": (edited("annotations.1", "x"), "'annotations' must be a list of objects"),
    "2 image without id": (edited("images.1.id", del_), "image number 2 has id missing; it must be an integer"),
    "2 image id is a text": (edited("images.1.id", "7"), "image number 2 has id '7'; it must be an integer"),
    "2 image id is too large": (edited("images.1.id", 2**64), "id 18446744073709551616 of an image is beyond 64 bits"),
    "2 no file name": (edited("images.1.file_name", del_), "image 7 has file_name missing; it must be a text"),
    "2 height is a text": (
        edited("images.1.height", "30"),
        "'7.png' .image 7. has height '30'; it must be an integer or absent",
    ),
    "2 height is below -1": (edited("images.1.height", -2), "'7.png' .image 7. has height -2; it must be positive"),
    "2 a category without name": (edited("categories.1.name", del_), "category 2 has name missing; it must be a text"),
    "2 no category": (edited("categories", []), "has no category"),
    "2 iscrowd is two": (edited("annotations.2.iscrowd", 2), "annotation 13 of 7.png .image 7. has iscrowd 2"),
    "2 area is a text": (edited("annotations.2.area", "9"), "annotation 13 of 7.png .image 7. has area '9'"),
    "3 image id twice": (edited("images.1.id", 5), "image id 5 is there 2 times"),
    "3 annotation id twice": (edited("annotations.1.id", 11), "annotation id 11 is there 2 times"),
    "3 category id twice": (edited("categories.1.id", 1), "category id 1 is there 2 times"),
    "4 unknown image": (edited("annotations.1.image_id", 6), "annotation 12 has image_id 6"),
    "4 unknown category": (edited("annotations.1.category_id", 9), "annotation 12 has category_id 9"),
    "6 three numbers": (edited("annotations.1.bbox", [1, 2, 3]), r"annotation 12 of 5.png .*, bbox \[1, 2, 3\]"),
    "6 five numbers": (edited("annotations.1.bbox", [1] * 5), "annotation 12 of 5.png"),
    "6 texts": (edited("annotations.1.bbox", ["1"] * 4), "annotation 12 of 5.png"),
    "6 null": (edited("annotations.1.bbox", None), "annotation 12 of 5.png .*, bbox None"),
    "6 no box": (edited("annotations.1.bbox", del_), "annotation 12 of 5.png .*, bbox None"),
    "6 bool": (edited("annotations.1.bbox", [True, 1, 2, 3]), "annotation 12 of 5.png"),
    "6 NaN": (edited("annotations.1.bbox.0", float("nan")), r"annotation 12 of 5.png .*, bbox \[nan, 3"),
    "6 infinite": (edited("annotations.1.bbox.2", float("inf")), "annotation 12 of 5.png"),
    "6 1e308": (edited("annotations.1.bbox.2", 1e308), "annotation 12 of 5.png"),
    "6 a number of 400 digits": (edited("annotations.1.bbox.2", 10**400), "annotation 12 of 5.png"),
    "8 corners for corner and size": (
        edited("annotations", [{"id": k, "image_id": 7, "category_id": 1, "bbox": [15, 9, 38, 29]} for k in (21, 22)]),
        r"2 of 2 boxes that leave their image: annotation 21 of 7.png .*; these look like \[x1, y1, x2, y2\] where",
    ),
    "9 no object at all": (edited("annotations", []), "has no object in any of its 3 images"),
    "9 no image": (edited("images", []), "annotation 11 has image_id 5"),
    "12 another size": (edited("images.1.width", 41), "7.png .image 7. is 40 x 30 pixels and annotated as 41 x 30"),
    "12 another size on its side": (edited("images.1.height", 40), "7.png .image 7. is 40 x 30 pixels and .* 40 x 40"),
    "13 upwards": (edited("images.1.file_name", "../train/7.png"), "image 7, '../train/7.png' leads upwards"),
    "13 upwards with backslashes": (edited("images.1.file_name", "..\\7.png"), "image 7, .* leads upwards"),
    "13 absolute": (edited("images.1.file_name", "/etc/passwd"), "image 7, '/etc/passwd' is absolute"),
    "13 a drive": (edited("images.1.file_name", "C:\\7.png"), "image 7, .* is absolute"),
    "13 NUL": (edited("images.1.file_name", "7.png\0"), "image 7, .* holds a NUL byte"),
    "13 too long": (edited("images.1.file_name", 300 * "x"), "image 7, .* has a part of 300 bytes"),
    "13 a URL": (edited("images.1.file_name", "http://a.b/7.png"), "image 7, 'http://a.b/7.png' is a URL"),
    "13 empty": (edited("images.1.file_name", ""), "image 7, '' names no file"),
    "13 no text": (edited("images.1.file_name", "\ud800"), "image 7, .* is no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_annotations_are_refused_by_file_and_id(tmp_path, name):
    edit, message = REFUSED[name]
    write(tmp_path, content())
    tree = content()
    edit(tree)
    (tmp_path / FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path)
    assert str(tmp_path / FILE) in str(error.value)
    assert "\n" not in str(error.value)


def test_boxes_in_fractions_of_the_image_are_refused(tmp_path):
    tree = content()
    for entry in tree["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(UserError, match=r"3 of 3 boxes of less than a pixel.* fractions of the image"):
        opened(write(tmp_path, tree))


def test_lenient_leaves_out_what_is_otherwise_refused(tmp_path):
    """Items 4, 12 and 14."""
    tree = content()
    tree["annotations"][0]["image_id"] = 6
    tree["annotations"][1]["category_id"] = 6
    tree["annotations"].append({"id": 14, "image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2]})
    tree["images"][1]["width"] = 41
    write(tmp_path, tree)
    (tmp_path / "train" / "7.png").write_bytes(encoded(30, 40))
    (tmp_path / "train" / "5.png").unlink()
    source = opened(tmp_path, lenient=True)
    assert [source[index].image_id for index in range(len(source))] == [9]
    assert flaws(source) == {
        "annotations of images that are not listed": ("left out", [11]),
        "annotations of categories that are not listed": ("left out", [12]),
        "images that cannot be used": ("left out", [5]),
        "images of another size than annotated": ("left out", [7]),
    }


def box(value):
    return edited("annotations.0.bbox", value)


# Edit; what is counted, its outcome and ids; the boxes of image 5 that remain, besides the sound one of annotation 12.
COUNTED = {
    "7 no height": (box([2, 3, 10, 0]), "boxes without area", "left out", [11], None),
    "7 no width": (box([2, 3, 0.0, 20]), "boxes without area", "left out", [11], None),
    "7 no height on the edge": (box([2, 30, 10, 0]), "boxes without area", "left out", [11], None),
    "8 negative width": (box([12, 3, -10, 20]), "boxes with a negative", "repaired", [11], [2, 3, 12, 23]),
    "8 negative height": (box([2, 23, 10, -20]), "boxes with a negative", "repaired", [11], [2, 3, 12, 23]),
    "8 negative x": (box([-3, 3, 10, 20]), "boxes that left their image", "repaired", [11], [0, 3, 7, 23]),
    "8 half a pixel over": (box([32, 3, 8.5, 20]), "boxes that left their image", "repaired", [11], [32, 3, 40, 23]),
    "8 far over": (box([32, 3, 99, 99]), "boxes that left their image", "repaired", [11], [32, 3, 40, 30]),
    "8 wholly to the right": (box([40, 3, 10, 20]), "boxes wholly outside", "left out", [11], None),
    "8 wholly above": (box([2, -30, 10, 20]), "boxes wholly outside", "left out", [11], None),
    "10 area is negative": (edited("annotations.0.area", -1), "objects without a usable area", "repaired", [11], ...),
    "10 area is NaN": (edited("annotations.0.area", float("nan")), "objects without a", "repaired", [11], ...),
    "5 one name twice": (edited("categories.1.name", "cat"), "categories with the name", "repaired", [2], ...),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flaws_are_repaired_or_left_out_and_counted(tmp_path, name):
    edit, what, outcome, ids, remaining = COUNTED[name]
    tree = content()
    edit(tree)
    source = opened(write(tmp_path, tree))
    ((found, counted),) = flaws(source).items()
    assert found.startswith(what)
    assert counted == (outcome, ids)
    assert f"  {outcome}: 1 {found}" in source.report_lines()[1]
    expected = [[2, 3, 12, 23] if remaining is ... else remaining] if remaining else []
    np.testing.assert_array_equal(source.objects(0).boxes, [*expected, [20.5, 3, 28.75, 9]])
    if what.startswith("objects"):
        assert source.objects(0).area[0] == 200
    with pytest.raises(UserError, match=f"{FILE} has {what}.*(annotation|category) {ids[0]}"):
        opened(tmp_path, strict=True)


def test_every_category_id_is_an_id(tmp_path):
    """Item 5: 0, negative, above 90, with gaps, in any order; labels follow the ids."""
    tree = content()
    tree["categories"] = [{"id": k, "name": f"class {k}"} for k in (700, -4, 0, 91)]
    for entry, category in zip(tree["annotations"], (700, -4, 91), strict=True):
        entry["category_id"] = category
    source = opened(write(tmp_path, tree))
    assert source.category_ids == (-4, 0, 91, 700)
    assert source.class_names == ("class -4", "class 0", "class 91", "class 700")
    np.testing.assert_array_equal(source.annotations.labels, [3, 0, 2])
    assert source.report_dict()["classes"] == {"class -4": -4, "class 0": 0, "class 91": 91, "class 700": 700}
    assert flaws(source) == {}


def test_images_without_objects_are_kept_or_skipped(tmp_path):
    """Item 9."""
    write(tmp_path, content())
    assert [opened(tmp_path)[k].image_id for k in range(3)] == [5, 7, 9]
    source = opened(tmp_path, skip_empty=True)
    assert [source[k].image_id for k in range(len(source))] == [5, 7]
    np.testing.assert_array_equal(source.objects(1).boxes, [[0, 0, 40, 30]])
    assert "2 images, 0 of them without objects" in source.report_lines()[0]


def test_crowds_are_kept(tmp_path):
    """Item 10: an image of crowds alone, a crowd as run lengths, and iscrowd missing or a bool."""
    tree = content()
    runs = {"size": [30, 40], "counts": [0, 1200]}
    tree["annotations"][2] |= {"iscrowd": True, "segmentation": runs}
    del tree["annotations"][0]["iscrowd"]
    tree["annotations"][0]["segmentation"] = [[2, 3, 12, 3, 12, 23.125]]
    tree["annotations"][1]["segmentation"] = [[21, 3, 28, 3, 25, 9], [21, 3, 28, 3, 25, 8, 22, 8]]
    source = opened(write(tmp_path, tree))
    np.testing.assert_array_equal(source.annotations.crowd, [False, False, True])
    assert tuple(source.objects(0).segmentation) == (
        [[2, 3, 12, 3, 12, 23.125]],
        [[21, 3, 28, 3, 25, 9], [21, 3, 28, 3, 25, 8, 22, 8]],
    )
    assert list(source[1].segmentation) == [runs]
    assert len(source[2].segmentation) == 0
    assert source[0].segmentation[-1][0] == source[0].segmentation[1:][0][0] == [21, 3, 28, 3, 25, 9]
    assert flaws(source) == {}
    for entry in tree["annotations"]:
        entry["iscrowd"] = 1
    (tmp_path / FILE).write_text(json.dumps(tree))
    with pytest.raises(
        UserError, match=r"has no object to find: all 3 are crowds \(iscrowd 1, or marked to be ignored"
    ):
        opened(tmp_path)


UNUSABLE = {
    "missing": del_,
    "null": None,
    "empty": [],
    "a flat list": [1, 2, 3, 4, 5, 6],
    "texts": [["1", "2", "3", "4", "5", "6"]],
    "points": [[[1, 2], [3, 4], [5, 6]]],
    "two points": [[1, 2, 3, 4]],
    "odd": [[1, 2, 3, 4, 5, 6, 7]],
    "NaN": [[1, 2, 3, 4, 5, float("nan")]],
    "far away": [[1, 2, 3, 4, 5, -121]],
    "runs of another size": {"size": [40, 30], "counts": [1200]},
    "runs too short": {"size": [30, 40], "counts": [1199]},
    "runs negative": {"size": [30, 40], "counts": [1201, -1]},
    "runs of texts": {"size": [30, 40], "counts": ["1200"]},
    "runs without counts": {"size": [30, 40]},
    "compressed runs of another length": {"size": [30, 40], "counts": "PPYo1"},
    "compressed runs of other characters": {"size": [30, 40], "counts": "\u00e9 "},
    "compressed runs cut off": {"size": [30, 40], "counts": "P"},
    "no compressed runs": {"size": [30, 40], "counts": ""},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_object_without_segmentation_gets_its_box_where_others_have_one(tmp_path, name):
    tree = content()
    edited("annotations.0.segmentation", 0)(tree)
    edited("annotations.0.segmentation", UNUSABLE[name])(tree)
    tree["annotations"][1]["segmentation"] = [[1, 2, 3, 4], [21, 3, 28, 3, 25, 9]]
    tree["annotations"][2]["segmentation"] = {"size": [30, 40], "counts": "`U1"}
    source = opened(write(tmp_path, tree))
    assert tuple(source.objects(0).segmentation) == ([[2, 3, 12, 3, 12, 23, 2, 23]], [[21, 3, 28, 3, 25, 9]])
    assert tuple(source.objects(1).segmentation) == ({"size": [30, 40], "counts": "`U1"},)
    (counted,) = flaws(source).values()
    assert counted == ("repaired", [11])


def test_objects_beyond_the_room_of_a_batch_are_counted(tmp_path):
    """Item 11."""
    write(tmp_path, content())
    assert flaws(opened(tmp_path, max_objects=2)) == {}
    source = opened(tmp_path, max_objects=1)
    assert flaws(source) == {"images with more objects than config.data.max_objects": ("truncated", [5])}
    assert len(source.objects(0).boxes) == 2
    with pytest.raises(UserError, match=r"max_objects: 5.png .image 5. has 2 of 1"):
        opened(tmp_path, max_objects=1, strict=True)


def test_tiny_and_long_images_are_kept(tmp_path):
    """Item 12: 1 x 1, 1 x n, 1:100; sizes that the file does not say are those of the images."""
    tree = content()
    for entry, (width, height) in zip(tree["images"], ((1, 1), (1, 60), (300, 3)), strict=True):
        entry |= {"width": width, "height": height}
    for entry, image in zip(tree["annotations"], (5, 7, 9), strict=True):
        entry |= {"image_id": image, "bbox": [0, 0, 1, 1]}
    write(tmp_path, tree)
    for entry in tree["images"]:
        del entry["width"], entry["height"]
    (tmp_path / FILE).write_text(json.dumps(tree))
    source = opened(tmp_path)
    assert [source.objects(k).size for k in range(3)] == [(1, 1), (60, 1), (3, 300)]
    assert [source[k].image.shape[:2] for k in range(3)] == [(1, 1), (60, 1), (3, 300)]


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    """Item 13; a link to another place within it is not."""
    folder = write(tmp_path / "data", content())
    (folder / "all").mkdir()
    (folder / "train" / "7.png").rename(folder / "all" / "7.png")
    (folder / "train" / "7.png").symlink_to("../all/7.png")
    assert opened(folder)[1].image_id == 7
    (tmp_path / "secret.png").write_bytes(encoded(30, 40))
    (folder / "train" / "7.png").unlink()
    (folder / "train" / "7.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(
        UserError, match=rf"{FILE} has images that are links .*: image 7, '7.png' is a link to .*secret.png"
    ):
        opened(folder)
    (folder / "train" / "7.png").unlink()
    (folder / "train" / "sub").symlink_to(tmp_path)
    tree = content()
    tree["images"][1]["file_name"] = "sub/secret.png"
    (folder / FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"image 7, 'sub/secret.png' is a link to .*secret.png"):
        opened(folder, lenient=True)
    assert opened(folder, follow_links=True)[1].image_id == 7


def test_the_folder_of_images_may_itself_be_a_link(tmp_path):
    write(tmp_path / "disk", content(), images="pictures")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE).write_text(json.dumps(content()))
    (tmp_path / "data" / "train").symlink_to(tmp_path / "disk" / "pictures")
    assert len(opened(tmp_path / "data")) == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_the_file_means_nothing(tmp_path, seed):
    """Item 16."""
    write(tmp_path, content())
    ordered = opened(tmp_path)
    tree = content()
    rng = random.Random(seed)
    for section in tree.values():
        rng.shuffle(section)
    (tmp_path / FILE).write_text(json.dumps(tree))
    shuffled = opened(tmp_path)
    assert shuffled.fingerprint == ordered.fingerprint
    for index in range(3):
        for ours, theirs in zip(shuffled.objects(index), ordered.objects(index), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_fingerprint_tells_data_apart(tmp_path):
    tree = content()
    before = opened(write(tmp_path, tree)).fingerprint
    tree["annotations"][0]["bbox"][2] += 0.5
    after = opened(write(tmp_path, tree)).fingerprint
    assert before != after
    assert opened(tmp_path).fingerprint == after


LAYOUTS = [
    ("annotations/instances_train2017.json", "train2017", "train"),
    ("annotations/instances_train2017.json", "images/train2017", "train"),
    ("annotations/instances_train2017.json", "train2017", "train2017"),
    ("annotations/instances_val2014.json", "val2014", "validation"),
    ("annotations/instances_val.json", "val", "validation"),
    ("annotations_val.json", "val", "validation"),
    ("annotations_train.json", "train", "train"),
    ("annotations_val.json", "validation", "validation"),
    ("valid/_annotations.coco.json", "valid", "validation"),
    ("test/_annotations.coco.json", "test", "test"),
    ("train/labels.json", "train/data", "train"),
    ("annotations/train.json", "images", "train"),
    ("train.json", ".", "train"),
    ("train_annotations.json", "data", "train"),
    ("odd/place.json", "my pictures/here", "odd/place.json:my pictures/here"),
    ("odd/place.json", "images", "odd/place.json"),
]


@pytest.mark.parametrize(("file", "images", "split"), LAYOUTS)
def test_files_and_folders_are_found_by_their_usual_names(tmp_path, file, images, split):
    write(tmp_path, content(), file, images)
    for other in ("captions_train2017.json", "person_keypoints_train2017.json", "instances_odd.json"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / other).write_text("{}")
    assert len(opened(tmp_path, split)) == 3
    assert [source.image_id for source in (opened(tmp_path, f"{split}[1:]")[k] for k in range(2))] == [7, 9]


def test_a_relative_folder_is_one_of_the_data_dir(tmp_path):
    write(tmp_path / "mine", content())
    assert len(open_source("coco_json:mine", "train", tmp_path)) == 3


@pytest.mark.parametrize(
    ("part", "ids"),
    [("[:2]", [5, 7]), ("[-1:]", [9]), ("[:67%]", [5, 7]), ("[34%:]", [7, 9]), ("[1:2]", [7]), ("", [5, 7, 9])],
)
def test_a_slice_takes_images_by_id(tmp_path, part, ids):
    tree = content()
    tree["annotations"].append({"id": 14, "image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2]})
    source = opened(write(tmp_path, tree), f"train{part}")
    assert [source[k].image_id for k in range(len(source))] == ids
    assert len(source.annotations.image) == sum(entry["image_id"] in ids for entry in tree["annotations"])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "has no annotation file for the split 'test'; it has annotations_train.json.*: name the file and"),
        (
            "validation",
            r"several annotation files for the split 'validation' \(annotations_val.json, .*val.json\): name",
        ),
        ("train[::2]", r"'train\[::2\]' is no split; it must be a name, or a name and a slice"),
        ("train[x:]", "is no split"),
        ("train[3:]", r"annotations_train.json\[3:\] has no image"),
        ("none.json:train", "none.json is no file that can be read"),
        ("annotations_train.json:none", "none is no folder that can be read"),
    ],
)
def test_mistakes_in_the_name_are_one_sentence(tmp_path, split, message):
    write(tmp_path, content())
    write(tmp_path, content(), "annotations_val.json")
    write(tmp_path, content(), "annotations/instances_val.json")
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, split)
    assert str(tmp_path) in str(error.value) or "is no split" in message
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=f"coco_json:{tmp_path}/none is no folder"):
        opened(tmp_path / "none")


VALUES = [
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "5.png",
    "\ud800",
    [],
    [[]],
    {},
    [1, 2, 3, 4],
]


def spoil(tree, rng):
    """Puts an odd value in a random place of the content, or takes the place away, or doubles it."""
    while True:
        place = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[place], (dict, list)) and tree[place] and rng.random() < 0.98:
            tree = tree[place]
            continue
        if rng.random() < 0.1:
            del tree[place]
        elif isinstance(tree, list) and rng.random() < 0.2:
            tree.append(copy.deepcopy(tree[place]))
        else:
            tree[place] = copy.deepcopy(rng.choice(VALUES))
        return


def test_whatever_is_in_the_file_is_read_or_refused_in_a_sentence(tmp_path):
    """Item 15 and the rest: 300 files with odd values and odd bytes; some of each outcome are met."""
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    tree = content()
    tree["annotations"][0]["segmentation"] = [[2, 3, 12, 3, 12, 23.125]]
    tree["annotations"][1]["segmentation"] = {"size": [30, 40], "counts": "`U1"}
    write(tmp_path, tree)
    for _ in range(300):
        spoilt = json.loads(json.dumps(tree))
        spoil(spoilt, rng)
        data = bytearray(json.dumps(spoilt).encode())
        if rng.random() < 0.1:
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / FILE).write_bytes(data)
        try:
            source = opened(tmp_path, lenient=rng.random() < 0.5)
        except UserError as error:
            outcomes["refused"] += 1
            assert "annotations_train.json" in str(error), error  # noqa: PT017
            continue
        outcomes["read"] += 1
        for index in range(len(source)):
            example = source[index]
            assert len(example.boxes) == len(example.labels) == len(example.area)
            assert np.isfinite(example.boxes).all()
            assert (example.boxes[:, 2:] > example.boxes[:, :2]).all()
            for segmentation in example.segmentation or ():
                rasterize(segmentation, example.image.shape[:2])
    assert min(outcomes.values()) > 30


def test_a_fifth_is_held_out_and_photographs_stay_together(tmp_path):
    tree = content()
    names = [f"{folder}/photo{k}_jpg.rf.{copy}.png" for k in range(10) for copy in "ab" for folder in ("one", "two")]
    tree["images"] = [{"id": k, "file_name": name, "width": 40, "height": 30} for k, name in enumerate(names)]
    tree["annotations"] = [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 1, 9, 9]} for k in range(40)]
    write(tmp_path, tree)
    kept, held_out = (opened(tmp_path, f"train[{part}]") for part in ("kept", "held_out"))
    assert (len(kept), len(held_out)) == (32, 8)
    first, second = ({source.name(k)[4:10] for k in range(len(source))} for source in (kept, held_out))
    assert not first & second
    assert held_out.origin.endswith("annotations_train.json[held_out]")


@pytest.mark.parametrize("file", ["result.json", "annotations/instances_default.json"])
def test_the_only_annotation_file_of_a_folder_is_its_training_split(tmp_path, file):
    write(tmp_path, content(), file, "images/default" if "default" in file else "images")
    assert len(opened(tmp_path)) == 3
    with pytest.raises(UserError, match=r"no annotation file for the split 'validation'.*train\[held_out\]"):
        opened(tmp_path, "validation")
    write(tmp_path, content(), "annotations_val.json", "val")
    with pytest.raises(UserError, match="no annotation file for the split 'train'"):
        opened(tmp_path)
