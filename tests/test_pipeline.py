"""The whole program, two steps of everything: every config, skipping, resuming after a kill, refusing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdjax
from kdjax import pipeline
from kdjax.config import base_config, with_variant
from kdjax.errors import NumericError, UserError
from tests.test_config import CONFIGS, load

ROOT = Path(__file__).parents[1]


def tiny(path: Path, data_dir: Path):
    config = load(path, "tiny")
    config.data.data_dir = str(data_dir)
    return config


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, data_dir):
    """A workdir whose teacher is trained: the stage that all configs share."""
    config = with_variant(base_config(), "tiny")
    config.data.data_dir = str(data_dir)
    config.stages = ("teacher",)
    workdir = tmp_path_factory.mktemp("teacher")
    pipeline.run(config, workdir)
    return workdir


def with_teacher(teacher: Path, workdir: Path) -> Path:
    shutil.copytree(teacher / "stages" / "teacher", workdir / "stages" / "teacher")
    return workdir


def rows(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_its_whole_protocol(path, teacher, data_dir, tmp_path, capsys):
    config = tiny(path, data_dir)
    summary = pipeline.run(config, with_teacher(teacher, tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text()).keys() == {
        "method", "teacher", "student", "baseline", "steps", "images_per_second"
    }  # fmt: skip
    assert summary["method"] == config.student.method.name
    assert summary["steps"] == 2
    assert summary["baseline"] is None
    assert 0 <= summary["student"]["AP"] <= 100
    module, variables = kdjax.load_student(tmp_path / "student")
    assert module.num_classes == len(summary["student"]["per_class"])
    assert variables.keys() == {"params", "batch_stats"}
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 3 * 100
    metrics = rows(tmp_path / "stages" / "student")
    assert {row["step"] for row in metrics} == {2}
    shown = capsys.readouterr().out
    assert "[teacher] finished earlier" in shown
    assert "inherits neck, head from the teacher" in shown
    assert "0 missing, 0 unexpected, 0 mismatched" in shown


def test_comparing_later_trains_only_the_baseline_which_starts_as_the_student_did(teacher, data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    pipeline.run(config, workdir)
    config.compare = True
    capsys.readouterr()
    summary = pipeline.run(config, workdir)
    shown = capsys.readouterr().out
    assert "[student] finished earlier" in shown
    assert "gain" in shown
    assert summary["baseline"].keys() == summary["student"].keys()
    student, baseline = (rows(workdir / "stages" / name)[0] for name in ("student", "baseline"))
    assert "raw/mimic" in student
    assert "raw/mimic" not in baseline


def test_another_config_in_the_same_workdir_is_refused_by_key(teacher, data_dir, tmp_path):
    config = tiny(ROOT / "configs" / "none.py", data_dir)
    config.teacher.optimizer.momentum = 0.8
    with pytest.raises(UserError, match=r"stage.optimizer.momentum: 0.9 -> 0.8"):
        pipeline.run(config, with_teacher(teacher, tmp_path))


def test_a_teacher_below_the_floor_stops_the_run_before_distillation_until_the_floor_is_lowered(
    teacher, data_dir, tmp_path
):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    config.student.teacher_floor = 99.0
    with pytest.raises(UserError, match=r"'teacher', reaches AP .* below config.student.teacher_floor = 99"):
        pipeline.run(config, workdir)
    assert not (workdir / "stages" / "student" / "checkpoints").exists()
    config.student.teacher_floor = 0.0
    assert pipeline.run(config, workdir)["steps"] == 2


def test_a_teacher_by_path_is_evaluated_too(teacher, data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    config.stages = ("student",)
    config.student.teacher = str(teacher / "student")
    summary = pipeline.run(config, tmp_path)
    assert "[student] teacher: AP" in capsys.readouterr().out
    assert summary["teacher"]["AP"] == json.loads((teacher / "summary.json").read_text())["student"]["AP"]


def test_a_mistake_found_late_can_be_corrected_in_the_same_workdir(teacher, data_dir, tmp_path):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    config.student.freeze = ("student/backbon",)
    with pytest.raises(UserError, match="freeze has 'student/backbon'"):
        pipeline.run(config, workdir)
    config.student.freeze = ("student/backbone",)
    assert pipeline.run(config, workdir)["steps"] == 2


def test_a_student_of_another_teacher_is_not_taken_for_finished(teacher, data_dir, tmp_path):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    pipeline.run(config, workdir)
    shutil.rmtree(workdir / "stages" / "teacher")
    config.teacher.optimizer.momentum = 0.8
    with pytest.raises(UserError, match=r"stages/student holds .*from.teacher.stage.optimizer.momentum: 0.9 -> 0.8"):
        pipeline.run(config, workdir)
    assert not (workdir / "stages" / "teacher").exists()


def test_a_loss_that_is_not_finite_ends_the_run_in_words(teacher, data_dir, tmp_path):
    config = tiny(ROOT / "configs" / "none.py", data_dir)
    config.student.optimizer.update(learning_rate=1e30, warmup_steps=0, clip_norm=0.0)
    config.student.steps = 4
    config.student.checkpoint_every = 1
    with pytest.raises(NumericError, match=r"left the finite numbers by step .*learning_rate"):
        pipeline.run(config, with_teacher(teacher, tmp_path))
    assert not (tmp_path / "stages" / "student" / "result.json").exists()
    saved = [int(path.name) for path in (tmp_path / "stages" / "student" / "checkpoints").glob("[0-9]*")]
    assert rows(tmp_path / "stages" / "student")[-1]["loss"] is None
    assert max(saved, default=0) < rows(tmp_path / "stages" / "student")[-1]["step"]


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_an_unusable_workdir_is_refused(kind, tmp_path):
    blocker = tmp_path / "taken"
    blocker.write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        pipeline.run(base_config(), blocker if kind == "file" else blocker / "run")


def command(workdir: Path, data_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "kdjax.main",
        "--config=configs/mimic.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.student.steps=6",
        "--config.student.log_every=1",
        "--config.student.checkpoint_every=2",
        *more,
    ]


def test_a_run_killed_in_the_middle_continues_as_if_never_stopped(teacher, data_dir, tmp_path):
    reference, killed = (with_teacher(teacher, tmp_path / name) for name in ("reference", "killed"))
    subprocess.run(command(reference, data_dir), cwd=ROOT, check=True, capture_output=True)
    with subprocess.Popen(command(killed, data_dir), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "[student] step 5/6" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert not (killed / "student").exists()
    again = subprocess.run(command(killed, data_dir), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "continues from the checkpoint of step" in again.stdout

    def curve(workdir):
        stage = rows(workdir / "stages" / "student")
        return [{key: value for key, value in row.items() if key != "images_per_second"} for row in stage]

    assert curve(killed) == curve(reference)
    arrays = [kdjax.load_student(workdir / "student")[1] for workdir in (killed, reference)]
    for a, b in zip(*map(_leaves, arrays), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not [name for name in os.listdir(killed) if "partial" in name]


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
