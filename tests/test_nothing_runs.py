"""What is read is never executed: a whole run, and going on with it, without pickle and without PyTorch."""

import pickle
import sys
from pathlib import Path

import pytest

import kdjax
from kdjax.run import pipeline
from tests.runs import tiny, with_teacher

ROOT = Path(__file__).parents[1]


def forbid(*_, **__):
    raise AssertionError("Something was about to be unpickled.")


@pytest.mark.slow
def test_training_evaluating_restoring_and_loading_unpickle_nothing_and_import_no_torch(
    teacher, data_dir, tmp_path, monkeypatch
):
    for reader in ("Unpickler", "_Unpickler", "load", "loads", "_load", "_loads"):
        monkeypatch.setattr(pickle, reader, forbid)
    monkeypatch.setitem(sys.modules, "torch", None)
    config = tiny(ROOT / "configs" / "mgd.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    config.student.checkpoint_every = 1
    first = pipeline.run(config, workdir)
    (workdir / "stages" / "student" / "result.json").unlink()
    again = pipeline.run(config, workdir)
    assert first["student"] == again["student"]
    kdjax.load_student(workdir / "student")
