"""Folders of images and label maps: index maps, VOC's and Cityscapes', sound and spoilt in one place."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from kdjax.data.flaws import Checks
from kdjax.data.folders import NoSplitError
from kdjax.data.manifest import MANIFEST_FILE, check_manifest, look
from kdjax.data.sizing import Reading
from kdjax.data.sources import open_source
from kdjax.data.vocabularies import CITYSCAPES, VOC_CLASSES
from kdjax.errors import DataError, StorageError, UserError
from tests.data.folders import encoded
from tests.data.test_class_folders import put
from tests.data.test_coco import flaws

NAMES = ("a", "b", "sub/c", "d")
SIZE = (20, 30)


def map_of(values, mode="L", kind="PNG", palette=None):
    """An encoded label map."""
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette(palette or [*range(256), *range(256)][::-1])
    elif mode != "L":
        image = image.convert(mode)
    image.save(file, kind)
    return file.getvalue()


def truth(number, top=3, size=SIZE):
    """Classes below ``top``, and some pixels that are ignored."""
    values = np.random.default_rng(number).integers(0, top, size, np.uint8)
    values[0, : number + 1] = 255
    return values


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.txt").write_text("background\ncell\ndebris\n")
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            kind = "JPEG" if number % 2 else "PNG"
            ending = "jpg" if number % 2 else "png"
            seed = number + 10 * (split == "val")
            put(tmp_path / "images" / split / f"{name}.{ending}", encoded(*SIZE, kind=kind, seed=seed))
            put(tmp_path / "labels" / split / f"{name}.png", map_of(truth(number), "P" if number % 2 else "L"))
    return tmp_path


def opened(folder, split="train", kind="index_maps", **checks):
    return open_source(f"{kind}:{folder}", split, checks=Checks(**checks))


def refused(folder, match, **options):
    """Is refused in one sentence."""
    with pytest.raises(UserError, match=match) as error:
        opened(folder, **options)
    assert "\n" not in str(error.value)


def test_grey_and_palette_maps_are_the_numbers_of_classes(folder):
    source = opened(folder)
    assert source.class_names == ("background", "cell", "debris")
    assert [source.name(k) for k in range(4)] == [
        *("images/train/a.png", "images/train/b.jpg", "images/train/d.jpg", "images/train/sub/c.png")
    ]
    for row, number in enumerate((0, 1, 3, 2)):
        np.testing.assert_array_equal(source.classes(row), truth(number))
        example = source[row]
        np.testing.assert_array_equal(example.classes, truth(number))
        assert example.classes.dtype == np.uint8
        assert (example.image.shape, example.image_id) == ((*SIZE, 3), row + 1)
    counts = source.report_dict()
    assert counts["ignored_pixels"] == 1 + 2 + 3 + 4
    assert sum(counts["pixels_of_class"].values()) == 4 * 600 - 10
    assert counts["images_of_class"]["debris"] == 4
    assert "4 images with label maps of 3 classes, 99.6 % of the pixels labelled." in source.report_lines()[0]
    assert flaws(source) == {}


@pytest.mark.parametrize(("split", "count"), [("validation", 4), ("train[1:3]", 2), ("train[held_out]", 1)])
def test_splits_and_parts_are_found(folder, split, count):
    assert len(opened(folder, split)) == count


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA"])
def test_other_ways_to_write_a_number_are_read(folder, mode):
    put(folder / "labels" / "train" / "a.png", map_of(truth(0), mode))
    source = opened(folder)
    np.testing.assert_array_equal(source.classes(0), truth(0))
    repaired = {"label maps with three equal channels, of which one is taken": ("repaired", [1])}
    assert flaws(source) == ({} if mode == "LA" else repaired)


def test_single_bits_are_two_classes(folder):
    mask = truth(0) == 1
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    put(folder / "labels" / "train" / "a.png", file.getvalue())
    np.testing.assert_array_equal(opened(folder).classes(0), mask.astype(np.uint8))


def coloured():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (*SIZE, 3), np.uint8) * 100).save(file, "PNG")
    return file.getvalue()


def wide(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG" if values.dtype == np.uint16 else "TIFF")
    return file.getvalue()


BAD = {
    "another size": (
        map_of(truth(0, size=(30, 20))),
        r"labels/train/a.png is 20 x 30 pixels and images/train/a.png 30 x 20",
    ),
    "other values": (
        map_of(truth(0, top=5)),
        r"none of its 3 classes: labels/train/a.png has 3 in \d+ pixels, 4 in \d+ pixels; pixels are 0 to 2",
    ),
    "colours": (
        coloured(),
        r"a.png is in colours \(#000000, .*\), not of numbers: each pixel must be the number of its class",
    ),
    "a JPEG": (map_of(truth(0), kind="JPEG"), "is in the format JPEG, which changes values; it must be a PNG"),
    "wide values": (wide(np.full(SIZE, 700, np.uint16)), "has values from 700 to 700; pixels are 0 to 2"),
    "fractions": (wide(np.full(SIZE, 0.5, np.float32)), "has floating-point values"),
    "no image": (b"text", "is no image that can be read"),
    "nothing": (b"", "is no image that can be read|is empty"),
    "half a file": (map_of(truth(0))[:90], "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_maps_that_do_not_fit_are_refused_or_left_out(folder, name):
    data, message = BAD[name]
    put(folder / "labels" / "train" / "a.png", data)
    refused(folder, f"{folder} train has label maps .*{message}")
    source = opened(folder, lenient=True)
    assert [source.name(k)[-5:] for k in range(len(source))] == ["b.jpg", "d.jpg", "c.png"]
    np.testing.assert_array_equal(source.classes(1), truth(3))
    ((outcome, ids),) = flaws(source).values()
    assert (outcome, ids) == ("left out", [1])


def test_images_and_maps_without_the_other_are_named(folder):
    (folder / "labels" / "train" / "b.png").rename(folder / "labels" / "train" / "b_mask.png")
    refused(
        folder,
        r"images without a label map: images/train/b.jpg has no labels/train/b.png, but there is .*/b_mask.png",
    )
    source = opened(folder, lenient=True)
    assert flaws(source) == {
        "images without a label map": ("left out", [2]),
        "label maps without an image": ("left out", [0]),
    }
    assert len(source) == 3


def test_two_images_of_one_name_are_refused(folder):
    put(folder / "images" / "train" / "a.jpg", encoded(*SIZE, kind="JPEG"))
    refused(folder, r"images/train/a.jpg and images/train/a.png, which only their endings tell apart")


def test_no_map_at_all_says_where_they_must_be(folder):
    (folder / "labels").rename(folder / "masks")
    refused(folder, r"no label map in labels/train: that of images/train/a.png is labels/train/a.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no classes.txt: the name of a class in each line"),
        ("a\nb\na\n", "names 'a' twice"),
        ("a\n", "names 1 classes; there must be 2 to 255"),
    ],
)
def test_classes_are_named(folder, text, message):
    (folder / "classes.txt").unlink()
    if text is not None:
        (folder / "classes.txt").write_text(text)
    refused(folder, message)


def test_masks_of_black_and_white_are_answered_with_what_is_meant(folder):
    for path in (folder / "labels" / "train").rglob("*.png"):
        path.write_bytes(map_of(255 * (truth(0) == 1)))
    refused(folder, r"all values of its label maps are 0 and 255, and 255 is ignored; of two classes they are 0 and 1")


def test_ignored_images_and_absent_classes_are_said(folder):
    for name in NAMES:
        put(folder / "labels" / "train" / f"{name}.png", map_of(truth(1, top=2)))
    put(folder / "labels" / "train" / "a.png", map_of(np.full(SIZE, 255)))
    found = flaws(opened(folder))
    assert found["images all of whose pixels are ignored"] == ("kept", [1])
    assert found["classes that no image shows"] == ("kept", [2])
    kept = opened(folder, skip_empty=True)
    assert len(kept) == 3
    np.testing.assert_array_equal(kept.classes(0), truth(1, top=2))
    assert kept[0].image_id == 2
    for name in NAMES:
        put(folder / "labels" / "train" / f"{name}.png", map_of(np.full(SIZE, 255)))
    refused(folder, "has no labelled pixel: all are ignored")


def test_a_split_that_is_not_there_names_those_that_are(folder):
    with pytest.raises(
        NoSplitError, match=r"has no folder images/test: name one of the folders that it has \(train, val\)"
    ):
        opened(folder, "test")
    refused(folder / "images", "has no folder images: images are images/train/<name>")


def test_an_orientation_mark_turns_no_map(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(folder / "images" / "train" / "b.jpg", encoded(*SIZE, kind="JPEG", exif=exif.tobytes()))
    assert flaws(opened(folder)) == {"images with an orientation mark (EXIF), which is not applied": ("kept", [2])}
    refused(
        folder, "labels/train/b.png is 30 x 20 pixels and images/train/b.jpg 20 x 30", reading=Reading(upright=True)
    )


def test_the_same_image_with_another_map_is_said(folder):
    data = (folder / "images" / "train" / "a.png").read_bytes()
    put(folder / "images" / "train" / "e.png", data)
    put(folder / "labels" / "train" / "e.png", map_of(truth(9)))
    found = flaws(opened(folder))
    assert found == {"images with the same file as another, and another truth": ("kept", [4])}


def test_fingerprint_and_manifest_know_label_files(folder):
    source = opened(folder)
    check_manifest(folder / MANIFEST_FILE, look({"train": source}), begun=False, whole=False)
    put(folder / "labels" / "train" / "a.png", map_of(truth(8)))
    changed = opened(folder)
    assert source.fingerprint.partition(";")[0] != changed.fingerprint.partition(";")[0]
    assert source.fingerprint.partition(";")[2] == changed.fingerprint.partition(";")[2]
    with pytest.raises(DataError, match=r"has 1 label map file \(labels/train/a.png\) with other bytes"):
        check_manifest(folder / MANIFEST_FILE, look({"train": changed}), begun=True, whole=False)


def test_a_map_that_changes_or_goes_later_is_one_sentence(folder):
    source = opened(folder)
    put(folder / "labels" / "train" / "a.png", map_of(truth(0, size=(4, 4))))
    with pytest.raises(DataError, match=r"labels/train/a.png \(of image 1\) has changed since its size was read"):
        source.classes(0)
    put(folder / "labels" / "train" / "a.png", b"x")
    with pytest.raises(DataError, match=r"labels/train/a.png \(of image 1\) is no image .*, unlike when it was opened"):
        source[0]
    (folder / "labels" / "train" / "a.png").unlink()
    with pytest.raises(StorageError, match=r"labels/train/a.png \(of image 1\) cannot be read any more"):
        source[0]


def test_vocs_lists_say_which_images_are_in_a_split(tmp_path):
    for number in range(3):
        put(tmp_path / "JPEGImages" / f"2007_{number}.jpg", encoded(*SIZE, kind="JPEG", seed=number))
        put(tmp_path / "SegmentationClass" / f"2007_{number}.png", map_of(truth(number, top=21), "P"))
    put(tmp_path / "ImageSets" / "Segmentation" / "train.txt", b"2007_2\n2007_0\n")
    put(tmp_path / "ImageSets" / "Segmentation" / "val.txt", b"2007_1\n2007_9\n")
    source = opened(tmp_path, kind="voc_maps")
    assert source.class_names == VOC_CLASSES
    assert len(source.class_names) == 21
    assert [source.name(k) for k in range(2)] == ["JPEGImages/2007_0.jpg", "JPEGImages/2007_2.jpg"]
    np.testing.assert_array_equal(source.classes(1), truth(2, top=21))
    assert flaws(source) == {}
    refused(tmp_path, r"no image JPEGImages/2007_9.jpg, which .*val.txt names", kind="voc_maps", split="validation")
    refused(tmp_path, r"no list ImageSets/Segmentation/test.txt: .*\(train, val\)", kind="voc_maps", split="test")
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(22))))
    assert len(opened(tmp_path, kind="voc_maps").class_names) == 22
    with pytest.raises(UserError, match=f"voc_maps:{tmp_path}"):
        open_source(str(tmp_path), "train")


def city_of(folder, endings=("labelIds",)):
    values = np.arange(600, dtype=np.uint8).reshape(SIZE) % 34
    for city, frame in (("aachen", 1), ("bochum", 2)):
        stem = f"{city}/{city}_00000{frame}_000019"
        put(folder / "leftImg8bit" / "train" / f"{stem}_leftImg8bit.png", encoded(*SIZE, seed=frame))
        put(folder / "gtFine" / "train" / f"{stem}_gtFine_color.png", coloured())
        for ending in endings:
            put(folder / "gtFine" / "train" / f"{stem}_gtFine_{ending}.png", map_of(values))
    return values


def test_the_label_ids_of_cityscapes_become_its_classes(tmp_path):
    ids = city_of(tmp_path)
    source = opened(tmp_path, kind="cityscapes")
    assert (len(source), source.class_names[0], source.class_names[18]) == (2, "road", "bicycle")
    assert source.category_ids == (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    found = source.classes(0)
    for label, number in enumerate(CITYSCAPES.values()):
        assert set(found[ids == number].tolist()) == {label}
    assert set(found[~np.isin(ids, list(CITYSCAPES.values()))].tolist()) == {255}
    name = "aachen/aachen_000001_000019"
    put(tmp_path / "gtFine" / "train" / f"{name}_gtFine_labelIds.png", map_of(ids + 30))
    refused(tmp_path, r"none of its 19 classes: .*_labelIds.png has 34 in .*; label ids are 0 to 33", kind="cityscapes")
    (tmp_path / "gtFine" / "train" / f"{name}_gtFine_labelIds.png").unlink()
    refused(tmp_path, f"_leftImg8bit.png has no gtFine/train/{name}_gtFine_labelIds.png;", kind="cityscapes")


def test_maps_of_classes_are_taken_where_cityscapes_has_no_ids(tmp_path):
    city_of(tmp_path, ())
    refused(
        tmp_path,
        "no label map in gtFine/train: that of .* is gtFine/train/aachen/.*_gtFine_labelIds.png",
        kind="cityscapes",
    )
    for path in (tmp_path / "gtFine").rglob("*_color.png"):
        put(path.with_name(path.name.replace("_color", "_labelTrainIds")), map_of(truth(0, top=19)))
    np.testing.assert_array_equal(opened(tmp_path, kind="cityscapes").classes(0), truth(0, top=19))
    with pytest.raises(UserError, match=f"cityscapes:{tmp_path}"):
        open_source(str(tmp_path), "train")


def test_links_and_what_is_no_file_are_not_read(folder, tmp_path_factory):
    outside = put(tmp_path_factory.mktemp("outside") / "a.png", map_of(truth(0)))
    path = folder / "labels" / "train" / "a.png"
    path.unlink()
    path.symlink_to(outside)
    refused(
        folder, r"links to files outside .*'labels/train/a.png' is a link to .*; config.data.follow_links=True takes"
    )
    np.testing.assert_array_equal(opened(folder, follow_links=True).classes(0), truth(0))
    path.unlink()
    os.mkfifo(path)
    refused(folder, "labels/train/a.png is no file")
    assert len(opened(folder, lenient=True)) == 3


def test_the_plain_path_is_answered_with_its_kind(folder):
    with pytest.raises(UserError, match=f"index_maps:{folder}"):
        open_source(str(folder), "train")
