"""What a run remembers of its image files: other bytes are found, other times are not taken for them."""

import os
from pathlib import Path

import pytest

from kdjax.config import base_config
from kdjax.config import tiny as tiny_config
from kdjax.data.manifest import MANIFEST_FILE, check_manifest, look
from kdjax.data.sources import open_source
from kdjax.errors import DataError, StorageError
from kdjax.run import pipeline
from tests.data.folders import content, encoded, write
from tests.data.test_coco import opened

UNSEEN = 6000
"""A byte of the images below that no start reads of them, and one that it does."""
SEEN = 100


@pytest.fixture
def folder(tmp_path):
    """Images of 30 kB, of which opening reads about half."""
    tree = content()
    for image in tree["images"]:
        image.update(width=100, height=100)
    folder = write(tmp_path / "data", tree)
    for path in sorted((folder / "train").iterdir()):
        path.write_bytes(encoded(100, 100, kind="BMP", seed=int(path.stem)))
        os.utime(path, ns=(10**18, 10**18))
    return folder


def check(folder, *, begun=True, whole=False):
    check_manifest(folder / MANIFEST_FILE, look({"train": opened(folder)}), begun=begun, whole=whole)


def spoil(path: Path, place: int, time: int = 2 * 10**18):
    """Another byte at a place, and another time."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time, time))


def test_files_that_stay_as_they_are_say_nothing_and_write_nothing(folder, capsys):
    check(folder, begun=False)
    os.utime(folder / MANIFEST_FILE, ns=(0, 0))
    for whole in (False, False, True, True):
        check(folder, whole=whole)
    # What all bytes are was written once.
    first = (folder / MANIFEST_FILE).stat().st_mtime_ns
    check(folder)
    assert (folder / MANIFEST_FILE).stat().st_mtime_ns == first > 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("whole", [False, True])
def test_other_bytes_that_are_known_to_be_others_are_refused_by_name(folder, whole):
    check(folder, whole=whole)
    before = (folder / MANIFEST_FILE).read_bytes()
    spoil(folder / "train" / "7.png", SEEN)
    (folder / "train" / "9.png").write_bytes(encoded(100, 100, kind="PNG"))
    words = (
        r"annotations_train\.json has 2 image files \(7\.png, 9\.png\) with other bytes than when this run began: put"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=words):
            check(folder)
    assert (folder / MANIFEST_FILE).read_bytes() == before
    check(folder, begun=False)
    check(folder)


def test_bytes_that_no_start_reads_are_compared_where_they_are_known(folder):
    check(folder, whole=True)
    spoil(folder / "train" / "7.png", UNSEEN)
    with pytest.raises(DataError, match=r"has 1 image file \(7\.png\) with other bytes"):
        check(folder)


def test_where_they_are_not_known_another_time_is_said_once(folder, capsys):
    check(folder)
    for path in sorted((folder / "train").iterdir()):
        spoil(path, UNSEEN)
    check(folder)
    said = capsys.readouterr().out
    assert "annotations_train.json has 3 image files (5.png, 7.png, 9.png) with another time than at" in said
    assert "config.data.digest=True, from the first start on, compares all bytes" in said
    check(folder)
    assert capsys.readouterr().out == ""


def test_another_time_of_the_same_bytes_is_nothing(folder, capsys):
    check(folder, whole=True)
    for path in (folder / "train").iterdir():
        os.utime(path, (0, 0))
    check(folder)
    check(folder, whole=True)
    assert capsys.readouterr().out == ""


def test_a_change_that_hides_its_time_is_found_where_all_is_read(folder):
    check(folder, whole=True)
    spoil(folder / "train" / "5.png", UNSEEN, time=10**18)
    check(folder)
    with pytest.raises(DataError, match=r"has 1 image file \(5\.png\) with other bytes"):
        check(folder, whole=True)


def test_a_damaged_manifest_is_said_and_other_images_are_not_its_matter(folder):
    check(folder)
    (folder / MANIFEST_FILE).write_bytes((folder / MANIFEST_FILE).read_bytes()[:-30])
    with pytest.raises(DataError, match=r"data_manifest\.npz is damaged .*: delete it"):
        check(folder)
    (folder / MANIFEST_FILE).unlink()
    check(folder)
    tree = content()
    tree["images"] = tree["images"][:2]
    write(folder, tree)
    check(folder)


def test_a_file_that_is_gone_meanwhile_is_said(folder):
    source = opened(folder)
    (folder / "train" / "7.png").unlink()
    with pytest.raises(StorageError, match=r"7\.png \(image 7\) cannot be read any more"):
        check_manifest(folder / MANIFEST_FILE, look({"train": source}), begun=True, whole=False)


def test_a_manifest_that_cannot_be_written_is_a_matter_of_the_storage(folder):
    (folder / MANIFEST_FILE).mkdir()
    with pytest.raises(StorageError, match=r"data_manifest\.npz cannot be written \(Is a directory\)"):
        check(folder)


def test_records_of_larger_files_have_none(data_dir, tmp_path):
    source = open_source("shapes/tiny", "train", data_dir)
    check_manifest(tmp_path / MANIFEST_FILE, look({"train": source}), begun=True, whole=True)
    assert not (tmp_path / MANIFEST_FILE).exists()


def test_a_run_that_continues_holds_its_files_and_one_that_starts_anew_does_not(folder, tmp_path, monkeypatch):
    for path in (folder / "train").iterdir():
        path.rename(folder / path.name)
    write(folder, content(), "annotations_val.json", "val")
    config = tiny_config(base_config())
    config.data.update(name=f"coco_json:{folder}", train_split="annotations_train.json:.")
    config.data.digest = True
    for stage in config.stages:
        config[stage].batch_size = 2

    def finish(plan, workdir, *_):
        for stage in plan.stages:
            (workdir / "stages" / stage.name).mkdir(parents=True)
            (workdir / "stages" / stage.name / "result.json").write_text("{}")

    monkeypatch.setattr(pipeline, "device_count", lambda: 1)
    monkeypatch.setattr(pipeline, "_run", finish)
    monkeypatch.setattr(pipeline, "_closing", lambda *_: "")
    workdir = tmp_path / "run"
    pipeline.run(config, workdir)
    spoil(folder / "7.png", UNSEEN)
    with pytest.raises(DataError, match=r"has 1 image file \(7\.png\) with other bytes"):
        pipeline.run(config, workdir)
    (workdir / "stages").rename(tmp_path / "former")
    pipeline.run(config, workdir)
