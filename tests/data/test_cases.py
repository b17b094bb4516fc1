"""Data that look sound and are not: kinds of mistakes that tools and people make, each in several forms."""

import io
import json
import math
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kdjax.data import indexed
from kdjax.data.images import ImageError, decode, measure, read_header
from kdjax.data.outlines import PolygonStore, outline_boxes
from kdjax.data.sizing import Reading, Sizing
from kdjax.errors import UserError
from kdjax.tasks import Detection
from kdjax.tasks.average_precision import ImageDetections, coco_metrics
from tests.data.folders import content, encoded, write
from tests.data.test_coco import FILE, flaws, opened

FOLDERS = Path(__file__).parents[1] / "files" / "cases.tar.gz"
"""Small sets as people sent them; what is right for each is below, where they are opened."""
UPRIGHT = {"reading": Reading(upright=True)}
SPREAD = {"reading": Reading(value_range=(0, 4095))}

# Folder; what is counted, how it comes out, and of how many; the checks under which nothing is wrong, None for none.
COUNTED = {
    "02a-exif-upside-down": ("images with an orientation mark", "kept", 6, UPRIGHT),
    "03-twelve-bits-in-sixteen": ("images of more than 8 bits", "kept", 6, SPREAD),
    "06-ignore-flag": ("objects marked to be ignored", "repaired", 10, None),
    "07-same-object-twice": ("objects with the image, the class", "left out", 14, None),
    "08-one-file-two-images": ("images with the same file as another", "repaired", 6, None),
    "09-rotated-boxes": ("boxes with a rotation", "repaired", 6, None),
    "12a-backslashes": ("file names that are spelled otherwise", "repaired", 6, None),
    "12b-percent-escapes": ("file names that are spelled otherwise", "repaired", 6, None),
    "17-more-than-a-hundred": ("images with more objects than config.data.max_detections", "kept", 1, {}),
}
REFUSED = {
    "10a-box-contradicts-outline": r"14 of 14 boxes .* these look like \[y, x, height, width\]",
    "11-corners-inside": r"18 of 18 boxes .* these look like \[x1, y1, x2, y2\]",
    "14-all-crowd": "has no object to find: all 14 are crowds",
}
SOUND = {
    "01-ids-beyond-double": "train",
    "18-class-names-in-other-scripts": "train",
    "24-brackets-in-names": "ann.json:images [v2]",
}

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases")
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(path, filter="data")
    assert {place.name for place in path.iterdir()} == COUNTED.keys() | REFUSED.keys() | SOUND.keys()
    return path


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_wrong_in_a_folder_is_counted_or_refused(folders, name):
    what, outcome, count, sound = COUNTED[name]
    found = flaws(opened(folders / name, max_detections=100))
    ((outcome_of, ids),) = [value for key, value in found.items() if key.startswith(what)]
    assert (outcome_of, len(ids)) == (outcome, count)
    with pytest.raises(UserError, match=r"im0\.|d\.png"):
        opened(folders / name, strict=True, max_detections=100)
    if sound is not None:
        assert flaws(opened(folders / name, strict=True, **sound)) == {}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_cannot_be_meant_is_refused(folders, name, split):
    message = REFUSED[name] if split == "train" else REFUSED[name].rpartition("these")[2].replace("14", r"\d+")
    with pytest.raises(UserError, match=message):
        opened(folders / name, split)


@pytest.mark.parametrize("name", SOUND)
def test_what_only_looks_odd_is_read(folders, name):
    assert flaws(opened(folders / name, SOUND[name], strict=True)) == {}


def test_the_boxes_of_an_upside_down_image_lie_on_its_objects(folders):
    """Every object of these sets is a rectangle of a colour unlike the ground's."""

    def on_ground(reading):
        source = opened(folders / "02a-exif-upside-down", reading=reading)
        found = []
        for example in (source[k] for k in range(len(source))):
            ground = np.median(example.image, axis=(0, 1))
            for x1, y1, x2, y2 in example.boxes.astype(int):
                colour = example.image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean(axis=(0, 1))
                found.append(np.abs(colour - ground).max() < 30)
        return np.mean(found)

    assert on_ground(Reading(upright=True)) == 0
    assert on_ground(Reading()) > 0.5


def written(tmp_path, edit, images=True):
    """A folder whose content is edited; with ``images`` False, the files keep their names."""
    tree = content()
    write(tmp_path, tree)
    edit(tree)
    return write(tmp_path, tree) if images else rewritten(tmp_path, tree)


def rewritten(folder, tree):
    (folder / FILE).write_text(json.dumps(tree))
    return folder


def assert_counted(folder, what, outcome, ids, hint="", **checks):
    """A flaw is counted by default, named by file in the lines, and refused by strict."""
    source = opened(folder, **checks)
    found = {key: value for key, value in flaws(source).items() if key.startswith(what)}
    assert list(found.values()) == [(outcome, ids)], flaws(source)
    (line,) = [line for line in source.report_lines() if what in line]
    assert ".png" in line
    assert hint in line
    with pytest.raises(UserError, match=r"\.png"):
        opened(folder, strict=True, **checks)
    return source


@pytest.mark.parametrize("start", [2**53, 2**62, -(2**63)])
def test_ids_beyond_double_change_no_metric(tmp_path, start):
    """Boxes of the neighbouring image score as little, and the right ones as much, as with small ids."""
    tree = content()
    for k, entry in enumerate(tree["images"]):
        entry["id"] = start + k
    tree["annotations"] = [
        {"id": start + k, "image_id": start + k, "category_id": 1, "bbox": [12 * k, 3, 10, 20]} for k in range(3)
    ]
    source = opened(write(tmp_path, tree))
    assert source.report_dict()["images"] == 3

    def score(shift):
        found = [
            ImageDetections(
                k, source.objects((k + shift) % 3).boxes, np.array([0.9], np.float32), np.zeros(1, np.int32)
            )
            for k in range(3)
        ]
        return coco_metrics(source, found)["AP"]

    assert score(0) == pytest.approx(100)
    assert score(1) == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mark", range(2, 9))
def test_orientation_is_said_or_applied(tmp_path, kind, mark):
    exif = Image.Exif()
    exif[0x0112] = mark
    options = {"lossless": True} if kind == "WEBP" else {}
    marked, plain = io.BytesIO(), io.BytesIO()
    Image.fromarray(NOISE).save(marked, kind, exif=exif, **options)
    Image.fromarray(NOISE).save(plain, kind, **options)
    stored = decode(plain.getvalue())
    shown = Image.fromarray(stored)
    shown.getexif()[0x0112] = mark
    upright = np.asarray(ImageOps.exif_transpose(shown))
    for reading, expected in ((Reading(), stored), (Reading(upright=True), upright)):
        np.testing.assert_array_equal(decode(marked.getvalue(), reading), expected)
        assert read_header(marked, reading).size == expected.shape[:2]

    write(tmp_path, content())
    (tmp_path / "train" / "7.png").write_bytes(marked.getvalue())
    assert_counted(tmp_path, "images with an orientation mark", "kept", [7], "config.data.upright=True")
    tree = content()
    tree["images"][1] |= {"height": upright.shape[0], "width": upright.shape[1]}
    tree["annotations"][2]["bbox"] = [0, 0, 5, 6]
    del tree["annotations"][2]["area"]
    source = opened(rewritten(tmp_path, tree), reading=Reading(upright=True), strict=True)
    np.testing.assert_array_equal(source[1].image, upright)


def wide(values, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("bits", "kind"), [(12, "PNG"), (10, "PNG"), (13, "TIFF")])
def test_few_bits_in_sixteen_are_said_and_spread(tmp_path, bits, kind):
    write(tmp_path, content())
    for k in (5, 7, 9):
        values = np.random.default_rng(k).integers(0, 2**bits, (30, 40)).astype(np.uint16)
        (tmp_path / "train" / f"{k}.png").write_bytes(wide(values, kind))
    hint = f"config.data.value_range=(0, {2**bits - 1}) takes them for {bits} bits"
    assert_counted(tmp_path, "images of more than 8 bits with values from ", "kept", [5, 7, 9], hint)
    source = opened(tmp_path, reading=Reading(value_range=(0, 2**bits - 1)), strict=True)
    assert source[0].image.min() < 3
    assert source[0].image.max() > 252


def test_dark_images_of_eight_bits_are_said(tmp_path):
    """As 12 bits in 16 come out of a colour PNG, of which Pillow keeps the upper 8."""
    write(tmp_path, content())
    for k in (5, 7, 9):
        (tmp_path / "train" / f"{k}.png").write_bytes(
            wide(np.random.default_rng(k).integers(0, 16, (30, 40, 3), np.uint8))
        )
    assert_counted(tmp_path, "images of 8 bits with values from 0 to 15, which use 16 of 256", "kept", [5, 7, 9])


def test_floating_point_pixels_need_a_range():
    values = np.linspace(-1, 1, 1200, dtype=np.float32).reshape(30, 40)
    values[0, 1] = np.nan
    data = wide(values, "TIFF")
    with pytest.raises(ImageError, match=r"config\.data\.value_range"):
        decode(data)
    reading = Reading(value_range=(-1, 1))
    image = decode(data, reading)
    assert (image.shape, image[0, 0, 0], image[-1, -1, 0]) == ((30, 40, 3), 0, 255)
    assert measure(data, reading)[:3] == (True, -1, 1)


@pytest.mark.parametrize(
    "mark", [{"ignore": 1}, {"ignore": True}, {"difficult": 1.0}, {"attributes": {"ignore": True}}], ids=str
)
def test_objects_to_be_ignored_are_crowds(tmp_path, mark):
    folder = written(tmp_path, lambda tree: tree["annotations"][1].update(mark))
    source = assert_counted(folder, "objects marked to be ignored", "repaired", [12])
    np.testing.assert_array_equal(source.annotations.crowd, [False, True, False])


def test_marks_that_cannot_be_read_are_said(tmp_path):
    folder = written(tmp_path, lambda tree: tree["annotations"][1].update(ignore="maybe"))
    assert_counted(folder, "marks to ignore an object that are neither 0 nor 1", "kept", [12])


def test_crowds_alone_are_refused_and_many_are_said(tmp_path):
    def edit(tree):
        for entry in tree["annotations"][:2]:
            entry["iscrowd"] = 1

    folder = written(tmp_path, edit)
    assert_counted(folder, "crowds, more than half", "kept", [11, 12])
    tree = content()
    tree["annotations"] = tree["annotations"][:2]
    tree["annotations"][0]["iscrowd"], tree["annotations"][1]["ignore"] = 1, 1
    with pytest.raises(UserError, match=rf"{FILE} has no object to find: all 2 are crowds"):
        opened(rewritten(folder, tree))


@pytest.mark.parametrize("moved", [0, 1e-4, 0.3])
def test_an_object_twice_is_kept_once(tmp_path, moved):
    def edit(tree):
        again = tree["annotations"][0] | {"id": 20, "bbox": [2 + moved, 3, 10 - moved, 20]}
        other_class = tree["annotations"][0] | {"id": 21, "category_id": 2}
        tree["annotations"] += [again, other_class]

    source = assert_counted(written(tmp_path, edit), "objects with the image, the class and", "left out", [20])
    assert source.annotations.identity.tolist() == [11, 12, 21, 13]


def test_a_grid_of_equal_objects_has_no_repetition(tmp_path):
    tree = content()
    tree["annotations"] = [
        {"id": k, "image_id": 5, "category_id": 1, "bbox": [2 * (k % 20), 2 * (k // 20), 2, 2]} for k in range(300)
    ]
    assert flaws(opened(write(tmp_path, tree))) == {}


@pytest.mark.parametrize("form", ["one name", "link", "copy"])
def test_a_file_under_two_ids_is_one_image(tmp_path, form):
    tree = content()
    name = "5.png" if form == "one name" else "20.png"
    tree["images"].append({"id": 20, "file_name": name, "width": 40, "height": 30})
    tree["annotations"][1] |= {"image_id": 20, "segmentation": [[20.5, 3, 28.75, 3, 28.75, 9]]}
    write(tmp_path, tree)
    if form != "one name":
        (tmp_path / "train" / name).unlink()
    if form == "link":
        (tmp_path / "train" / name).symlink_to("5.png")
    if form == "copy":
        (tmp_path / "train" / name).write_bytes((tmp_path / "train" / "5.png").read_bytes())
    source = assert_counted(tmp_path, "images with the same file as another", "repaired", [20])
    assert [source.image_id(k) for k in range(len(source))] == [5, 7, 9]
    assert source.objects(0).segmentation[1] == [[20.5, 3, 28.75, 3, 28.75, 9]]
    np.testing.assert_array_equal(source.objects(0).boxes, [[2, 3, 12, 23], [20.5, 3, 28.75, 9]])
    with pytest.raises(UserError, match=rf"{name} .image 20. has that of 5\.png .image 5."):
        opened(tmp_path, strict=True)


def test_copies_with_the_same_objects_are_kept_and_said(tmp_path):
    def edit(tree):
        tree["images"].append({"id": 20, "file_name": "20.png", "width": 40, "height": 30})
        tree["annotations"].append(tree["annotations"][2] | {"id": 14, "image_id": 20})

    folder = written(tmp_path, edit)
    (folder / "train" / "20.png").write_bytes((folder / "train" / "7.png").read_bytes())
    assert len(assert_counted(folder, "images with the same file and the same objects", "kept", [20])) == 4


def test_large_files_that_differ_in_what_no_digest_sees_are_two(tmp_path):
    """The whole files decide, not the blocks by which they are compared first."""
    tree = content()
    for entry in tree["images"]:
        entry |= {"width": 400, "height": 30}
    write(tmp_path, tree)
    pixels = np.zeros((30, 400, 3), np.uint8)
    for value, name in ((0, "5.png"), (255, "7.png")):
        pixels[22, 100] = value
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "BMP")
        (tmp_path / "train" / name).write_bytes(file.getvalue())
    source = opened(tmp_path)
    assert source.images.digest[0] == source.images.digest[1]
    assert flaws(source) == {}


def test_images_of_both_splits_are_said(tmp_path):
    write(tmp_path, content())
    tree = content()
    tree["images"].append({"id": 20, "file_name": "copy of 9.png", "width": 40, "height": 30})
    write(tmp_path, tree, "annotations_val.json", "val")
    for name in ("9.png", "copy of 9.png"):
        (tmp_path / "val" / name).write_bytes((tmp_path / "train" / "7.png").read_bytes())
    train, evaluation = opened(tmp_path), opened(tmp_path, "validation")
    indexed.check_shared(train, evaluation)
    assert flaws(evaluation)["images that the training split holds too"] == ("kept", [9, 20])
    assert "image 9.png, copy of 9.png" in evaluation.report_lines()[-1]
    write(tmp_path, content(), "annotations_val.json", "val")
    (tmp_path / "val" / "9.png").write_bytes((tmp_path / "train" / "7.png").read_bytes())
    strict = opened(tmp_path, "validation", strict=True)
    with pytest.raises(UserError, match=r"9\.png .image 9. is 7\.png .image 7. of .*annotations_train\.json"):
        indexed.check_shared(train, strict)


def turned(key, value):
    return lambda tree: tree["annotations"][0].update({"bbox": [8, 12, 16, 4], "area": 64} | {key: value})


@pytest.mark.parametrize("edit", [turned("rotation", 45), turned("attributes", {"rotation": -135.0})])
def test_rotated_boxes_become_the_boxes_around_them(tmp_path, edit):
    source = assert_counted(written(tmp_path, edit), "boxes with a rotation", "repaired", [11])
    half = (16 + 4) / 2 / math.sqrt(2)
    np.testing.assert_allclose(source.objects(0).boxes[0], [16 - half, 14 - half, 16 + half, 14 + half], rtol=1e-6)
    assert source.objects(0).area[0] == 64


def test_rotations_that_mean_nothing_or_are_drawn_change_nothing(tmp_path):
    assert flaws(opened(written(tmp_path, turned("rotation", 180.0)))) == {}
    tree = content()
    tree["annotations"][0] |= {"rotation": 30, "segmentation": [[2, 3, 12, 3, 12, 23]]}
    assert "boxes with a rotation" not in str(flaws(opened(rewritten(tmp_path, tree))))


@pytest.mark.parametrize("edit", [turned("angle", 0.7), turned("rotation", "45"), turned("rotation", math.nan)])
def test_rotations_that_cannot_be_read_are_said(tmp_path, edit):
    assert_counted(written(tmp_path, edit), "boxes with an angle that is not read", "kept", [11], "degrees")


READINGS = {
    "[y, x, height, width]": lambda x, y, w, h: [y, x, h, w],
    "[x1, y1, x2, y2]": lambda x, y, w, h: [x, y, x + w, y + h],
    "[y1, x1, y2, x2]": lambda x, y, w, h: [y, x, y + h, x + w],
    "[centre x, centre y, width, height]": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "[x, y, width, height] from the lower left corner": lambda x, y, w, h: [x, 30 - y - h, w, h],
}
BOXES = ((2, 3, 5, 9), (14, 1, 11, 4), (4, 17, 12, 4), (22, 4, 4, 14))


def outlined(form, reading):
    tree = content()
    tree["annotations"] = []
    for k, (x, y, w, h) in enumerate(BOXES):
        mask = np.zeros((30, 40), np.uint8)
        mask[y : y + h, x : x + w] = 1
        ends = np.append(np.flatnonzero(np.diff(mask.T.ravel())) + 1, 1200)
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if form == "runs":
            outline = {"size": [30, 40], "counts": np.diff(ends, prepend=0).tolist()}
        tree["annotations"].append(
            {"id": k, "image_id": 5, "category_id": 1, "bbox": reading(x, y, w, h), "segmentation": outline}
        )
    return tree


@pytest.mark.parametrize("form", ["polygons", "runs"])
@pytest.mark.parametrize("words", READINGS)
def test_boxes_are_compared_with_outlines(tmp_path, form, words):
    tree = outlined(form, READINGS[words])
    with pytest.raises(UserError) as error:
        opened(write(tmp_path, tree))
    assert f"these look like {words} where [x, y, width, height] should be" in str(error.value)
    assert "5.png" in str(error.value)
    assert flaws(opened(rewritten(tmp_path, outlined(form, lambda *box: list(box))))) == {}


def test_one_box_beside_its_outline_is_said(tmp_path):
    tree = outlined("polygons", lambda *box: list(box))
    tree["annotations"][2]["bbox"] = [20, 10, 15, 12]
    assert_counted(write(tmp_path, tree), "objects whose box is not that of their outline", "kept", [2])


@pytest.mark.parametrize("first", [[], [1.0]])
def test_the_box_of_an_outline_is_that_of_all_its_polygons(first):
    """Also behind an odd number of other points, where x stands at odd places."""
    store = PolygonStore()
    polygons = [[2, 3, 12, 3, 12, 23], [5, 1, 6, 2, 5, 30]], [[7.5, 8, 7, 9, 9, 9]]
    entries = [store.take({"segmentation": outline})["segmentation"] for outline in ([first], *polygons)]
    found = outline_boxes(entries, store, np.full((3, 2), 40))
    np.testing.assert_array_equal(found, [[np.nan] * 4, [2, 1, 12, 30], [7, 8, 9, 9]])


def test_corners_inside_the_image_are_refused_by_their_area(tmp_path):
    def edit(tree):
        boxes = [2, 3, 12, 10], [5, 4, 15, 14], [3, 3, 18, 15]
        for entry, (x1, y1, x2, y2) in zip(tree["annotations"], boxes, strict=True):
            entry |= {"bbox": [x1, y1, x2, y2], "area": (x2 - x1) * (y2 - y1)}

    with pytest.raises(UserError, match=r"3 of 3 boxes whose width times.*5\.png.*these look like \[x1, y1, x2, y2\]"):
        opened(written(tmp_path, edit))


@pytest.mark.parametrize(("area", "outcome"), [(900, "kept"), (0.5, "kept"), (0, "repaired"), (-1, "repaired")])
def test_areas_that_cannot_be_are_said_or_replaced(tmp_path, area, outcome):
    folder = written(tmp_path, lambda tree: tree["annotations"][0].update(area=area))
    what = "objects whose area is larger than their box" if outcome == "kept" else "objects without a usable area"
    source = assert_counted(folder, what, outcome, [11])
    assert source.objects(0).area[0] == (area if outcome == "kept" else 200)


@pytest.mark.parametrize("number", [-1, -9999])
def test_an_unknown_box_is_left_out(tmp_path, number):
    folder = written(tmp_path, lambda tree: tree["annotations"][0].update(bbox=[number] * 4))
    source = assert_counted(folder, "boxes of one negative number", "left out", [11])
    assert len(flaws(source)) == 1


@pytest.mark.parametrize(("key", "value"), [("height", 0), ("width", -1)])
def test_an_unknown_size_is_that_of_the_file(tmp_path, key, value):
    write(tmp_path, content())
    tree = content()
    tree["images"][1][key] = value
    source = assert_counted(rewritten(tmp_path, tree), "images whose height or width is 0 or -1", "repaired", [7])
    assert source.size(1) == (30, 40)


NAMES = {
    "backslash": ("sub\\im a.png", "sub/im a.png"),
    "backslash and a folder": ("images\\im a.png", "im a.png"),
    "drive": (".\\im a.png", "im a.png"),
    "percent": ("im%20a.png", "im a.png"),
    "plus": ("im+a.png", "im a.png"),
    "case": ("IM A.PNG", "im a.png"),
    "NFC": (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
    "NFD": (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
    "a folder": ("train/im a.png", "im a.png"),
    "an escaped letter": ("%C3%A9.png", "é.png"),
}


def renamed(folder, said, there):
    tree = content()
    tree["images"][1]["file_name"] = there
    write(folder, tree)
    tree["images"][1]["file_name"] = said
    return rewritten(folder, tree)


@pytest.mark.parametrize("form", NAMES)
def test_a_name_that_means_a_file_finds_it(tmp_path, form):
    said, there = NAMES[form]
    folder = renamed(tmp_path, said, there)
    source = assert_counted(folder, "file names that are spelled otherwise", "repaired", [7])
    np.testing.assert_array_equal(source[1].image, decode((folder / "train" / there).read_bytes()))


def test_names_that_mean_several_files_or_none_are_missing(tmp_path):
    folder = renamed(tmp_path, "IM.png", "im.png")
    (folder / "train" / "Im.png").write_bytes(encoded(30, 40))
    with pytest.raises(UserError, match=r"IM\.png .image 7. is missing, and '[iI]m\.png' and '[iI]m\.png' are both"):
        opened(folder)
    with pytest.raises(UserError, match=r"is missing, unlike other\.png"):
        opened(renamed(folder, "other.jpg", "other.png"))
    with pytest.raises(UserError, match=r"is missing, with a backslash instead of a slash"):
        opened(renamed(folder, "a\\b.png", "c.png"))
    assert len(opened(folder, lenient=True)) == 2


def test_names_that_are_equal_are_found_wherever_the_folder_is(tmp_path):
    """The folder of the images is chosen by names that no file has exactly."""
    tree = content()
    write(tmp_path, tree, "annotations/instances_train.json", "images")
    (tmp_path / "train").mkdir()
    for entry in tree["images"]:
        entry["file_name"] = entry["file_name"].replace(".", "%2E")
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(tree))
    assert len(opened(tmp_path)) == 3


def test_links_can_be_followed(tmp_path):
    folder = write(tmp_path / "data", content())
    (tmp_path / "store").mkdir()
    for name in ("5.png", "7.png", "9.png"):
        (folder / "train" / name).rename(tmp_path / "store" / name)
        (folder / "train" / name).symlink_to(tmp_path / "store" / name)
    with pytest.raises(UserError, match=r"'5\.png' is a link to .*config\.data\.follow_links=True takes them"):
        opened(folder, lenient=True)
    assert flaws(opened(folder, follow_links=True, strict=True)) == {}
    (tmp_path / "store" / "5.png").unlink()
    with pytest.raises(UserError, match=r"5\.png .image 5. is a link to .*5\.png, which is missing"):
        opened(folder, follow_links=True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_other_pixels_have_another_fingerprint(tmp_path, kind):
    folder = write(tmp_path, content())
    path = folder / "train" / "7.png"
    path.write_bytes(encoded(30, 40, kind=kind))
    before = opened(folder).fingerprint
    os.utime(path, (0, 0))
    assert opened(folder).fingerprint == before
    file = io.BytesIO()
    Image.fromarray(255 - decode(path.read_bytes())).save(file, kind)
    path.write_bytes(file.getvalue())
    assert opened(folder).fingerprint != before


def test_more_objects_than_are_judged_are_said_and_can_be_judged(tmp_path):
    tree = content()
    tree["annotations"] = [
        {"id": k, "image_id": 5, "category_id": 1, "bbox": [2 * (k % 20), 2 * (k // 20), 2, 2]} for k in range(240)
    ]
    folder = write(tmp_path, tree)
    what = "images with more objects than config.data.max_detections"
    source = assert_counted(folder, what, "kept", [5], "raise it", max_detections=100)
    found = [ImageDetections(0, source.objects(0).boxes, np.full(240, 0.9, np.float32), np.zeros(240, np.int32))]
    assert coco_metrics(source, found)["AR100"] == pytest.approx(100 * 100 / 240)
    metrics = coco_metrics(source, found, 300)
    assert metrics["AP"] == metrics["AR300"] == pytest.approx(100)
    assert Detection(max_detections=300).judge(source).merge([]).keys() == metrics.keys()


def test_a_model_must_find_as_many_as_are_judged():
    class Model:
        learns_masks = False
        max_detections = 100

    Detection().check_model(Model(), "config.student.model is 'fcos'")
    with pytest.raises(UserError, match=r"returns 100: set config\.student\.model\.head\.max_detections=300"):
        Detection(max_detections=300).check_model(Model(), "config.student.model is 'fcos'")


def test_the_limit_of_pixels_is_a_key(tmp_path):
    write(tmp_path, content())
    with pytest.raises(UserError, match=r"5\.png .image 5. has 40 x 30 pixels.*\(config\.data\.max_pixels raises"):
        opened(tmp_path, reading=Reading(most_pixels=1199))
    assert len(opened(tmp_path, reading=Reading(most_pixels=1200))) == 3


def test_objects_that_are_too_small_are_said(tmp_path):
    folder = written(tmp_path, lambda tree: tree["annotations"][1].update(bbox=[20, 3, 0.5, 6], area=3))
    assert_counted(folder, "boxes less than a pixel high or wide", "kept", [12])
    tree = content()
    tree["annotations"][1] |= {"bbox": [20, 3, 18, 14], "area": 252}
    sizing = Sizing(((4, 4),))
    source = assert_counted(
        rewritten(folder, tree),
        "objects less than 2 pixels high or wide once images are scaled",
        "kept",
        [11, 12],
        "config.data.image_size",
        sizing=sizing,
    )
    told, warning = Detection().remarks(source, sizing)
    assert told.startswith("Boxes are 1 to 3 pixels large once images are scaled")
    assert "too small to be found: a larger config.data.image_size" in warning
    assert flaws(opened(folder, sizing=Sizing(((60, 80),)), strict=True)) == {}


@pytest.mark.parametrize("name", ["images [v2]", "[v2] images", "a [b] c"])
def test_brackets_belong_to_names(tmp_path, name):
    write(tmp_path, content(), "ann.json", name)
    assert len(opened(tmp_path, f"ann.json:{name}")) == 3
    tree = content()
    assert len(opened(tmp_path, f"ann.json:{name}[:2]")) == len(tree["images"]) - 1
