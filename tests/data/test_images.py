"""Image files of every kind that people have, sound and broken, alone and in a folder with annotations."""

import contextlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from kdjax.data.batches import train_batches
from kdjax.data.images import ImageError, UndecodableError, decode, read_header
from kdjax.data.sizing import MOST_PIXELS
from kdjax.errors import UserError
from kdjax.tasks import Detection
from tests.data.folders import content, encoded, write
from tests.data.test_coco import flaws, opened


def saved(pixels, kind="PNG", mode=None, **options):
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind, **options)
    return file.getvalue()


def header(data):
    return read_header(io.BytesIO(data))


NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
GREY = NOISE[..., 0]
WIDE = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)

# Encoded image, and the RGB it must become; None where a lossy format makes that inexact.
SOUND = {
    "RGB": (saved(NOISE), NOISE),
    "grey": (saved(GREY), np.repeat(GREY[..., None], 3, 2)),
    "one bit": (encoded(30, 40, "1"), None),
    "grey and alpha": (encoded(30, 40, "LA"), None),
    "16 bits": (saved(WIDE), np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, 2)),
    "16 bits, TIFF": (saved(WIDE, "TIFF"), np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, 2)),
    "palette": (encoded(30, 40, "P"), None),
    "palette with a transparent colour": (encoded(30, 40, "P", transparency=3), None),
    "palette with transparencies": (encoded(30, 40, "P", transparency=bytes(range(256))), None),
    "RGBA": (saved(np.dstack([NOISE, GREY])), NOISE),
    "CMYK": (encoded(30, 40, "CMYK", "JPEG"), None),
    "JPEG": (saved(NOISE, "JPEG"), None),
    "grey JPEG": (saved(GREY, "JPEG"), None),
    "progressive JPEG": (saved(NOISE, "JPEG", progressive=True), None),
    "JPEG with bytes after its end": (saved(NOISE, "JPEG") + bytes(500), None),
    "WebP": (saved(NOISE, "WEBP", lossless=True), NOISE),
    "BMP": (saved(NOISE, "BMP"), NOISE),
    "TIFF": (saved(NOISE, "TIFF"), NOISE),
    "GIF": (saved(NOISE, "GIF"), None),
    "broken ICC profile": (saved(NOISE, "PNG", icc_profile=b"no profile"), NOISE),
}


@pytest.mark.parametrize("name", SOUND)
def test_every_sound_image_becomes_rgb(name):
    """Items 19, 20 and 23."""
    data, expected = SOUND[name]
    assert header(data)[:3] == ((30, 40), 1, False)
    image = decode(data)
    assert (image.shape, image.dtype) == ((30, 40, 3), np.uint8)
    assert image.std() > 10
    if expected is not None:
        np.testing.assert_array_equal(image, expected)


def test_cmyk_and_grey_keep_their_meaning():
    """A red picture stays red; Adobe's files store CMYK inverted, which Pillow knows."""
    red = np.zeros((16, 16, 3), np.uint8) + np.array([250, 5, 5], np.uint8)
    file = io.BytesIO()
    Image.fromarray(red).convert("CMYK").save(file, "JPEG", quality=95)
    np.testing.assert_allclose(decode(file.getvalue()).mean((0, 1)), [250, 5, 5], atol=12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_not_applied(orientation):
    """Item 21."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(NOISE, "JPEG", exif=exif)
    assert header(data)[:3] == ((30, 40), orientation, False)
    np.testing.assert_array_equal(decode(data), decode(saved(NOISE, "JPEG")))


def test_broken_exif_is_no_matter():
    """Item 23."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(saved(NOISE, "JPEG", exif=exif))
    place = data.find(b"Exif") + 6
    data[place : place + 8] = b"\xff" * 8
    assert header(bytes(data)).orientation == 1
    np.testing.assert_array_equal(decode(bytes(data)), decode(saved(NOISE, "JPEG")))


def bomb(side):
    """A PNG of a few bytes that claims to be large; what matters is that nobody tries."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    start = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BROKEN = {
    "empty": (b"", ImageError, "is empty"),
    "a page of HTML": (b"<!DOCTYPE html><html>404</html>", ImageError, "is no image that can be read .*DOCTYPE"),
    "a text": (b"x", ImageError, "is no image"),
    "a JPEG's first bytes": (saved(NOISE, "JPEG")[:20], ImageError, "is no image"),
    "a JPEG cut off": (saved(NOISE, "JPEG")[:-400], UndecodableError, r"cannot be decoded \(image file is truncated"),
    "a PNG cut off": (saved(NOISE)[:-400], UndecodableError, "cannot be decoded"),
    "12 bits a channel": (
        saved(NOISE, "JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"),
        ImageError,
        "is no image|cannot be decoded",
    ),
    "floats": (saved(WIDE.astype(np.float32), "TIFF"), UndecodableError, "floating-point pixels"),
    "32 bits": (saved(WIDE.astype(np.int32) * 300, "TIFF"), UndecodableError, "not of 16 bits"),
    "51 million pixels": (bomb(7142), ImageError, r"has 7142 x 7142 pixels, more than the 50,000,000"),
    "100 million pixels": (bomb(10_000), ImageError, "more than the 50,000,000|has more than the 50,000,000"),
    "400 million pixels": (bomb(20_000), ImageError, "has more than the 50,000,000 pixels"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_one_sentence(name):
    """Items 14, 17, 19, 22 and 23."""
    data, kind, message = BROKEN[name]
    with pytest.raises(kind, match=message) as error:
        header(data)
    assert type(error.value) is kind or name.startswith("12")
    assert "\n" not in str(error.value)


def test_a_bomb_is_not_decoded(monkeypatch):
    """Item 22: the cap holds before Pillow makes room for the pixels."""
    assert MOST_PIXELS == 50_000_000

    def explode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", explode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    for function in (header, decode):
        with pytest.raises(ImageError, match="50,000,000"):
            function(bomb(7142))


def folder_with(tmp_path, data, name="7.png"):
    write(tmp_path, content())
    (tmp_path / "train" / name).write_bytes(data)
    return tmp_path


def test_all_unusable_files_are_named_at_once(tmp_path):
    """Item 14."""
    tree = content()
    tree["images"] += [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in (20, 21, 22)]
    write(tmp_path, tree)
    images = tmp_path / "train"
    (images / "5.png").unlink()
    (images / "7.png").unlink()
    (images / "7.png").mkdir()
    (images / "9.png").write_bytes(b"")
    (images / "20.png").unlink()
    os.mkfifo(images / "20.png")
    (images / "21.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"annotations_train\.json has images that cannot be used: ") as error:
        opened(tmp_path)
    for words in (
        "5.png (image 5) is missing, ",
        "7.png (image 7) is a folder, ",
        "9.png (image 9) is empty, ",
        "20.png (image 20) is no file, ",
        "21.png (image 21) is no image that can be read",
        "config.data.lenient=True leaves them out.",
    ):
        assert words in str(error.value)


@pytest.mark.skipif(not os.geteuid(), reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path, content())
    (tmp_path / "train" / "7.png").chmod(0)
    with pytest.raises(UserError, match=r"7.png .image 7. cannot be read .Permission denied."):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["WebP", "BMP", "TIFF", "GIF", "grey JPEG", "CMYK"])
def test_the_content_counts_not_the_name(tmp_path, name):
    """Item 19."""
    source = opened(folder_with(tmp_path, SOUND[name][0]))
    assert flaws(source) == {}
    assert source[1].image.shape == (30, 40, 3)


def test_of_an_animation_the_first_picture_counts(tmp_path):
    """Item 19."""
    frames = [Image.fromarray(np.full((30, 40), value, np.uint8)) for value in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    source = opened(folder_with(tmp_path, file.getvalue()))
    assert flaws(source) == {"animated images, of which the first picture is taken": ("repaired", [7])}
    np.testing.assert_array_equal(source[1].image, np.full((30, 40, 3), 10))
    with pytest.raises(UserError, match=r"animated images.*7\.png"):
        opened(tmp_path, strict=True)


def test_a_turned_size_is_explained(tmp_path):
    """Item 21: annotated as viewers show it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    folder_with(tmp_path, saved(NOISE.swapaxes(0, 1).copy(), "JPEG", exif=exif))
    with pytest.raises(UserError, match=r"7.png .image 7. is 30 x 40 pixels and annotated as 40 x 30, which its EXIF"):
        opened(tmp_path)


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bomb_is_refused_by_name(tmp_path):
    """Item 22."""
    folder_with(tmp_path, bomb(7142))
    with pytest.raises(UserError, match=r"7.png .image 7. has 7142 x 7142 pixels"):
        opened(tmp_path)


def test_an_image_cut_off_is_left_out_at_the_start(tmp_path):
    """Item 17."""
    source = opened(folder_with(tmp_path, saved(NOISE, "JPEG")[:-400]))
    assert flaws(source) == {"images that cannot be decoded": ("left out", [7])}
    assert [source[k].image_id for k in range(len(source))] == [5, 9]
    with pytest.raises(UserError, match=r"7.png .image 7. cannot be decoded .image file is truncated"):
        opened(tmp_path, strict=True)


def spoilt():
    """A PNG with a sound header and end, whose pixels fail their checksum."""
    data = bytearray(saved(NOISE))
    data[len(data) // 2] ^= 1
    return bytes(data)


def test_an_image_that_breaks_later_is_replaced_by_the_next(tmp_path, capsys):
    """Item 18: found when it is decoded, named once, counted; the same images come up in any order of reading."""
    source = opened(folder_with(tmp_path, spoilt()))
    assert flaws(source) == {}
    assert [source[k].image_id for k in (2, 1, 0, 1)] == [9, 9, 5, 9]
    np.testing.assert_array_equal(source[1].image, source[2].image)
    assert flaws(source) == {"images that cannot be decoded": ("left out", [7])}
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("kdjax: 7.png (image 7) cannot be decoded (")
    (tmp_path / "train" / "9.png").write_bytes(spoilt())
    assert [source[k].image_id for k in range(3)] == [5, 5, 5]
    (tmp_path / "train" / "5.png").write_bytes(spoilt())
    with pytest.raises(
        ValueError, match=r"7\.png .image 7. and those that follow it cannot be decoded; check the disk"
    ):
        source[1]


def test_strict_refuses_an_image_that_breaks_later(tmp_path):
    source = opened(folder_with(tmp_path, spoilt()), strict=True)
    with pytest.raises(UserError, match=r"images that cannot be decoded: 7.png .image 7."):
        source[1]


def test_batches_with_broken_images_are_a_function_of_the_step(tmp_path):
    folder_with(tmp_path, spoilt())
    options = {"batch_size": 2, "image_size": (32, 32), "task": Detection(4), "seed": 1}
    batches = [next(train_batches(opened(tmp_path), first_step=step, **options)) for step in range(4)]
    stream = train_batches(opened(tmp_path), **options)
    for batch in batches:
        np.testing.assert_array_equal(batch.images, next(stream).images)


@pytest.mark.parametrize("change", ["gone", "resized", "no image"])
def test_files_that_change_during_a_run_stop_it(tmp_path, change):
    source = opened(write(tmp_path, content()))
    path = tmp_path / "train" / "7.png"
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(encoded(31, 40) if change == "resized" else b"<html>")
    with pytest.raises(UserError, match=r"7.png .image 7. (cannot be read any more|has changed|is no image)"):
        source[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_mutated_images_are_read_or_refused(kind):
    """Nothing but the two errors comes out of 60 random mutations of each format."""
    rng = np.random.default_rng(len(kind))
    sound = saved(NOISE, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            data = bytearray(sound)
            for place in rng.integers(0, len(data), rng.integers(1, 8)):
                data[place] = rng.integers(256)
            data = data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data
            with contextlib.suppress(ImageError):
                assert header(bytes(data)).size == decode(bytes(data)).shape[:2]
