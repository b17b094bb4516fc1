"""Batches from other processes: they are those of threads, and what goes wrong there is said here."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import cloudpickle
import jax
import numpy as np
import pytest

from kdjax.data.batches import train_batches
from kdjax.data.sizing import Augmentation
from kdjax.data.sources import open_source
from kdjax.errors import Exit, UserError
from kdjax.run import pipeline
from kdjax.tasks import Detection
from tests.data import test_map_folders, test_voc, test_yolo
from tests.data.folders import content, write
from tests.data.test_images import flaws, folder_with, opened, spoilt
from tests.runs import rows, tiny

OPTIONS = {"image_size": (32, 32), "task": Detection(4), "seed": 1}


def children():
    """Numbers of the processes that this one has started and that have not ended."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # A thread that has ended meanwhile.
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def taken(source, count, **options):
    """So many batches; the processes that made them end."""
    before = children()
    batches = train_batches(source, **OPTIONS, **options)
    try:
        return [jax.tree.map(np.array, batch) for batch in itertools.islice(batches, count)]
    finally:
        batches.close()
        assert not children() - before


def same(ours, theirs):
    assert len(ours) == len(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_they_are_those_of_threads_whatever_the_number_of_processes(data_dir):
    source = open_source("shapes/tiny", "train", data_dir)
    options = {"batch_size": 6, "augmentation": Augmentation(flip=0.5, color=0.5), "first_step": 3}
    expected = taken(source, 5, **options)
    same(taken(source, 5, num_workers=2, num_threads=4, **options), expected)


_MAP = test_map_folders.map_of(test_map_folders.truth(0, size=(30, 40)))
FOLDERS = {
    "yolo:": test_yolo.LAYOUTS["ultralytics"],
    "voc:": test_voc.LAYOUTS["voc"],
    "class_folders:": ({f"train/{kind}/{k}.png": None for kind in "ab" for k in range(2)}, "train"),
    "index_maps:": (
        {"classes.txt": "a\nb\nc\n", "images/train/a.png": None, "labels/train/a.png": _MAP},
        "train",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_data_of_every_kind_can_be_passed_on(kind, tmp_path):
    files, split = FOLDERS[kind]
    test_yolo.put(tmp_path, files)
    source = open_source(f"{kind}{tmp_path}", split)
    there = cloudpickle.loads(cloudpickle.dumps(source))
    assert (len(there), there.fingerprint) == (len(source), source.fingerprint)
    np.testing.assert_array_equal(there[0].image, source[0].image)


def test_an_image_that_cannot_be_decoded_there_is_said_and_counted_once_here(tmp_path, capfd):
    folder_with(tmp_path, spoilt())
    expected = taken(opened(tmp_path), 6, batch_size=2)
    capfd.readouterr()
    source = opened(tmp_path)
    same(taken(source, 6, batch_size=2, num_workers=2), expected)
    assert flaws(source) == {"images that cannot be decoded": ("left out", [7])}
    assert capfd.readouterr().err.count("7.png (image 7) cannot be decoded") == 1


def test_what_is_wrong_there_is_the_sentence_that_it_is_here(tmp_path):
    source = opened(write(tmp_path, content()))
    (tmp_path / "train" / "7.png").unlink()
    with pytest.raises(UserError, match=r"7.png .image 7. cannot be read any more"):
        taken(source, 2, batch_size=3, num_workers=1)


class Unready:
    """Data that another process cannot read."""

    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        raise urllib.error.HTTPError("http://x", 404, "not there", None, None)

    def __reduce__(self):
        return Unready, (self.source,)


class Locked(Unready):
    """Data that nobody can pass on."""

    def __reduce__(self):
        raise TypeError("cannot pickle a lock")


def test_a_mistake_of_somebodys_own_data_has_its_traceback_or_its_sentence(tmp_path):
    source = opened(write(tmp_path, content()))
    with pytest.raises(RuntimeError, match=r"failed:(.|\n)*in __getitem__(.|\n)*HTTP Error 404: not there"):
        taken(Unready(source), 2, batch_size=2, num_workers=1)
    with pytest.raises(
        UserError, match=r"cannot be passed on to other processes .TypeError: cannot pickle a lock.: set"
    ):
        taken(Locked(source), 2, batch_size=2, num_workers=1)


@pytest.mark.parametrize("victim", range(3))
def test_one_that_is_ended_from_outside_is_said_and_no_signal_to_the_run_is_meant_for_it(tmp_path, victim):
    before = children()
    source = opened(write(tmp_path, content()))
    with contextlib.closing(train_batches(source, batch_size=2, num_workers=3, **OPTIONS)) as batches:
        next(batches)
        workers = sorted(children() - before)
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker, number)
        next(batches)
        os.kill(workers[victim], signal.SIGKILL)
        with pytest.raises(UserError, match=r"prepares images was ended, with exit code -9: where that") as ended:
            list(itertools.islice(batches, 20))
    assert ended.value.exit_code == Exit.AGAIN
    assert not children() - before


SCRIPT = """
import sys
from kdjax.data.batches import train_batches
from kdjax.data.sources import open_source
from kdjax.tasks import Detection
source = open_source(sys.argv[1], "train")
batches = train_batches(source, batch_size=2, image_size=(32, 32), task=Detection(4), seed=1, num_workers=2)
print(next(batches).images.shape)
"""


def test_a_script_needs_no_guard(tmp_path):
    name = f"coco_json:{write(tmp_path, content())}"
    run = subprocess.run([sys.executable, "-", name], input=SCRIPT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "(2, 32, 32, 3)\n"), run.stderr
    assert run.stderr.count("Traceback") == 0


@pytest.mark.slow
def test_a_run_with_processes_has_the_losses_of_one_with_threads(tmp_path, data_dir):
    losses = []
    for processes in (0, 2):
        config = tiny(Path(__file__).parents[2] / "configs" / "mgd.py", data_dir)
        config.data.processes = processes
        pipeline.run(config, tmp_path / str(processes))
        losses.append([row["loss"] for row in rows(tmp_path / str(processes) / "stages" / "student") if "loss" in row])
    assert losses[0] == losses[1] != []
