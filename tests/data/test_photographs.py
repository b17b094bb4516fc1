"""Photographs that a model is asked about: what is none is refused in words, and what cannot be read is left out."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from kdjax.data.photographs import Photographs, checked
from kdjax.data.sizing import Reading
from kdjax.errors import DataError

PHOTOGRAPH = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_lists_of_photographs_and_one_array_of_several_are_taken_as_they_are():
    for given in ([PHOTOGRAPH, PHOTOGRAPH[:2]], np.stack([PHOTOGRAPH] * 2)):
        found = checked(given)
        assert len(found) == 2
        np.testing.assert_array_equal(found[0], PHOTOGRAPH)
    assert checked([]) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            [PHOTOGRAPH / np.float32(255)],
            r"photograph 0 is float32 with values from 0 to 0\.278431; it must be uint8, .*",
        ),
        ([PHOTOGRAPH / 255], r"give \(255 \* photograph\)\.round\(\)\.astype\(np\.uint8\)\.$"),
        ([PHOTOGRAPH.astype(np.int64)], r"int64 with values from 0 to 71; .*give photograph\.astype\(np\.uint8\)"),
        ([PHOTOGRAPH, PHOTOGRAPH[..., 0]], r"photograph 1 is grey, \(4, 6\); .*np\.repeat"),
        ([PHOTOGRAPH[..., :1]], r"is grey, \(4, 6, 1\)"),
        ([PHOTOGRAPH.transpose(2, 0, 1)], r"its channels first, \(3, 4, 6\); .*transpose\(1, 2, 0\)"),
        ([np.zeros((4, 6, 4), np.uint8)], r"four channels, \(4, 6, 4\); .*without alpha"),
        ([np.zeros((4, 6, 5), np.uint8)], r"has the shape \(4, 6, 5\); it must be \(H, W, 3\)"),
        ([PHOTOGRAPH[None]], r"has the shape \(1, 4, 6, 3\)"),
        ([PHOTOGRAPH[:0]], "has no pixels"),
        (PHOTOGRAPH, r"an array of shape \(4, 6, 3\) is given.*give \[photograph\] for one alone"),
        ("day/1.jpg", r"'day/1\.jpg' is one path, and a list is wanted"),
    ],
)
def test_what_is_no_photograph_is_refused_in_words(given, words):
    with pytest.raises(DataError, match=words):
        checked(given)
    with pytest.raises(DataError, match=words):
        Photographs(given)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Files of many kinds, some of which cannot be read."""
    rgb = Image.fromarray(np.full((30, 20, 3), (200, 100, 50), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "PNG")
    files = {
        "a.jpg": encoded(rgb, "JPEG"),
        "animated.gif": encoded(rgb, "GIF", save_all=True, append_images=[rgb]),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "cut.png": whole[:500] + bytes(500) + whole[1000:],
        "empty.jpg": b"",
        "grey.png": encoded(rgb.convert("L"), "PNG"),
        "marked.jpg": encoded(rgb, "JPEG", exif=exif),
        "text.jpg": b"no image",
        "wide.png": encoded(Image.fromarray(np.full((30, 20), 51200, np.uint16)), "PNG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path, [*files, "folder.jpg", "none.jpg"]


@pytest.mark.parametrize("upright", [False, True])
def test_files_are_decoded_as_those_of_data_sets_and_those_that_cannot_be_read_are_left_out(folder, upright):
    root, names = folder
    source = Photographs([root / name for name in names], Reading(upright=upright), names=names)
    assert source.names == [name for name in names if name.split(".")[0] not in ("empty", "text", "folder", "none")]
    assert source.left_out == {
        "empty.jpg": "is empty",
        "text.jpg": "is no image that can be read (it begins with b'no image')",
        "folder.jpg": "is a folder",
        "none.jpg": "is no file",
    }
    for position, name in enumerate(source.names):
        pixels = source[position]
        if name != "cut.png":
            assert pixels.image_id == source.image_id(position) == names.index(name) + 1
            assert pixels.image.shape == (*source.size(position), 3)
            assert pixels.image.dtype == np.uint8
    marked = source.names.index("marked.jpg")
    assert source.size(marked) == ((20, 30) if upright else (30, 20))
    assert (source[source.names.index("wide.png")].image == 200).all()
    np.testing.assert_allclose(source[source.names.index("cmyk.jpg")].image[0, 0], [200, 100, 50], atol=12)
    # That its pixels are not there is known once they are asked for.
    assert source[source.names.index("cut.png")].image_id is None
    assert source.left_out["cut.png"].startswith("cannot be decoded")


def test_paths_and_arrays_may_stand_side_by_side_and_a_pipe_is_not_waited_for(folder, tmp_path):
    root, _ = folder
    os.mkfifo(tmp_path / "pipe.jpg")
    source = Photographs([PHOTOGRAPH, str(root / "a.jpg"), tmp_path / "pipe.jpg"])
    assert source.names == ["photograph 0", str(root / "a.jpg")]
    assert [source.size(k) for k in range(2)] == [(4, 6), (30, 20)]
    assert source.left_out == {str(tmp_path / "pipe.jpg"): "is no file"}
