"""``~`` is the home directory in every path that a person gives; URLs of what is not known are refused."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import kdjax
from kdjax.config import load_config
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from kdjax.paths import as_path
from kdjax.plan import resolve
from kdjax.run import pipeline
from kdjax.saved import describe, load_variables
from kdjax.weights import read_weights
from tests.data.folders import content, write
from tests.runs import tiny

NONE = Path(__file__).parents[1] / "configs" / "none.py"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folders = tmp_path / "home", tmp_path / "elsewhere"
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("HOME", str(folders[0]))
    monkeypatch.chdir(folders[1])
    return folders[0]


def test_a_run_in_the_home_directory_is_there_with_all_that_it_reads(home, teacher, data_dir):
    shutil.copytree(teacher, home / "run")
    config = tiny(NONE, data_dir)
    config.stages = ("teacher",)
    pipeline.run(config, "~/run")
    assert not Path("~").exists()
    module, variables = kdjax.load_student("~/run/student")
    assert module.num_classes == len(describe("~/run/student")["class_names"])
    jax.tree.map(np.testing.assert_array_equal, load_variables("~/run/student"), variables)
    config = tiny(NONE, data_dir)
    config.stages, config.student.teacher = ("student",), "~/run/student"
    resolve(config, devices=8)


def test_files_in_the_home_directory_are_found(home):
    np.savez(home / "weights.npz", a=np.ones(3, np.float32))
    assert read_weights("~/weights.npz").tensors.keys() == {"a"}
    write(home / "data", content())
    assert len(open_source("coco_json:~/data", "train")) == len(open_source("coco_json:data", "train", "~")) == 3
    assert open_source("shapes/tiny", "train", "~/sets").report.origin == "shapes/tiny train"
    assert (home / "sets" / "shapes").is_dir()
    assert not Path("~").exists()
    shutil.copy(NONE, home / "mine.py")
    assert load_config("~/mine.py:tiny").student.steps == 2


def test_an_unknown_home_and_urls_are_refused_in_words():
    with pytest.raises(UserError, match=r"~nobody-at-all/runs begins with a home directory that is not known"):
        as_path("~nobody-at-all/runs")
    for url in ("s3://bucket/x", "https://x.org/x", "gs://", Path("s3://bucket/x")):
        with pytest.raises(UserError, match=r"is in no place that is known: name a local folder or gs://"):
            as_path(url)
    for read in (kdjax.load_student, read_weights):
        with pytest.raises(UserError, match=r"s3://bucket/x.pth is in no place that is known"):
            read("s3://bucket/x.pth")


def test_a_bucket_without_the_packages_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for url in ("gs://nobody/x", Path("gs://nobody/x")):
        with pytest.raises(UserError, match=r"^gs://nobody needs the package gcsfs: .*pip install 'kdjax\[gcs\]'"):
            as_path(url)
