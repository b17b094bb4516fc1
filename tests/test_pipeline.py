"""The whole program, two steps of everything: skipping, resuming after a kill, refusing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import kdjax
from kdjax.config import base_config
from kdjax.config import tiny as tiny_config
from kdjax.errors import DataError, UserError
from kdjax.lock import take
from kdjax.models import build_model
from kdjax.plan import resolve
from kdjax.run import page, pipeline
from kdjax.run.build import stage_key
from kdjax.run.data import open_batches, open_split, open_splits
from kdjax.run.record import check_twin, differences, identity
from tests.data import folders
from tests.runs import rows, tiny, with_teacher

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_comparing_later_trains_only_the_baseline_which_starts_as_the_student_did(teacher, data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    workdir = with_teacher(teacher, tmp_path)
    pipeline.run(config, workdir)
    config.compare = True
    capsys.readouterr()
    summary = pipeline.run(config, workdir)
    shown = capsys.readouterr().out
    assert "[student] finished earlier" in shown
    assert re.search(r"^baseline +\d.*\ngain ", shown, re.MULTILINE)
    assert "[baseline] stage 3 of 3: 2 steps of 8 images, 0.5 epochs of 32." in shown
    assert re.search(r"^\[baseline\] stage 3 of 3 took \d+:\d\d\.$", shown, re.MULTILINE)
    assert re.search(r"^\d+:\d\d in all. Everything is in", shown, re.MULTILINE)
    flags = f"--config.data.name=shapes/tiny --config.data.data_dir={data_dir}"
    assert f"python -m kdjax.evaluate --model={workdir / 'student'} {flags}\n" in shown
    assert f"python -m kdjax.evaluate --model={workdir / 'stages' / 'baseline' / 'model'} {flags}\n" in shown
    assert f"kdjax.load_student('{workdir / 'student'}')" in shown
    assert summary["baseline"].keys() == summary["student"].keys()
    student, baseline = (rows(workdir / "stages" / name)[0] for name in ("student", "baseline"))
    assert student["epoch"] == 0.5
    assert student["wall_time"] < baseline["wall_time"]
    assert "raw/mimic" in student
    assert "raw/mimic" not in baseline
    plan = resolve(config, devices=8)
    source = open_split(plan.data, plan.task, training=True)
    batches = {stage.name: next(open_batches(plan, stage, source, 1)) for stage in plan.stages}
    assert list(batches) == ["teacher", "student", "baseline"]
    np.testing.assert_array_equal(batches["student"].images, batches["baseline"].images)
    assert not np.array_equal(batches["student"].images, batches["teacher"].images)
    keys = {stage.name: stage_key(plan.run.seed, stage) for stage in plan.stages}
    assert keys["student"] == keys["baseline"] != keys["teacher"]


def test_a_stage_begun_by_a_version_that_drew_other_batches_is_refused_and_a_finished_one_taken_over(
    teacher, data_dir, tmp_path
):
    config = tiny(ROOT / "configs" / "none.py", data_dir)
    config.stages = ("teacher",)
    folder = with_teacher(teacher, tmp_path) / "stages" / "teacher"
    written = json.loads((folder / "config.json").read_text())
    assert written.pop("kdjax") == kdjax.__version__
    # Keys that came later are as if they had been there.
    del written["stage"]["accumulate"], written["stage"]["optimizer"]["beta2"], written["data"]["color"]
    (folder / "config.json").write_text(json.dumps(written))
    pipeline.run(config, tmp_path)
    # But nothing of today's is compared with it.
    with pytest.raises(UserError, match=r"teacher was trained by kdjax 0.1.0, and a baseline of this version"):
        check_twin(tmp_path / "stages" / "baseline", folder)
    (folder / "result.json").unlink()
    with pytest.raises(UserError, match=r"holds a stage that kdjax 0.1.0 began, and this version, 0.2.0"):
        pipeline.run(config, tmp_path)


def test_a_finished_stage_that_is_damaged_is_finished_again_and_is_the_same(teacher, data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "none.py", data_dir)
    config.stages = ("teacher",)
    folder = with_teacher(teacher, tmp_path) / "stages" / "teacher"
    file = max((folder / "model" / "variables").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    pipeline.run(config, tmp_path)
    assert re.search(r"\[teacher\] is finished, but damaged: The arrays in .*/model/variables", capsys.readouterr().out)
    ours, theirs = (json.loads((workdir / "summary.json").read_text()) for workdir in (tmp_path, teacher))
    assert ours["student"] == theirs["student"]
    arrays = [kdjax.load_student(workdir / "student")[1] for workdir in (tmp_path, teacher)]
    jax.tree.map(np.testing.assert_array_equal, *arrays)
    assert (folder / "model.corrupt").is_dir()
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"teacher/config.json, which says of which run the stage .* is not there"):
        pipeline.run(config, tmp_path)


def test_a_finished_run_has_a_report_and_ends_well_where_it_fails(teacher, data_dir, tmp_path, monkeypatch, capsys):
    config = tiny(ROOT / "configs" / "none.py", data_dir)
    config.stages = ("teacher",)
    workdir = with_teacher(teacher, tmp_path)
    summary = pipeline.run(config, workdir)
    text = (workdir / "report.html").read_text()
    assert "only its identical twin can tell" in text
    assert "What is taken for what, teacher" in text
    monkeypatch.setattr(page, "page", lambda *_: 1 / 0)
    capsys.readouterr()
    assert pipeline.run(config, workdir) == summary
    shown = capsys.readouterr()
    assert "report.html is not made (ZeroDivisionError: division by zero)" in shown.out
    assert "Traceback" in shown.err


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
    with pytest.raises(UserError, match=r"'teacher', reaches AP .* worse than config.student.teacher_floor = 99"):
        pipeline.run(config, workdir)
    assert not (workdir / "stages" / "student" / "checkpoints").exists()
    config.student.teacher_floor = 0.0
    assert pipeline.run(config, workdir)["steps"] == 2


def test_nothing_is_prepared_for_a_teacher_below_the_floor(teacher, data_dir, tmp_path):
    """MasKD's tokens would learn for 2000 steps from it."""
    config = tiny(ROOT / "configs" / "maskd.py", data_dir)
    config.student.teacher_floor = 99.0
    workdir = with_teacher(teacher, tmp_path)
    with pytest.raises(UserError, match=r"teacher of stage 'student', 'teacher', reaches AP .* worse than"):
        pipeline.run(config, workdir)
    assert not (workdir / "stages" / "tokens").exists()


@pytest.mark.slow
def test_a_teacher_by_path_is_evaluated_too(teacher, data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    config.stages = ("student",)
    config.student.teacher = str(teacher / "student")
    summary = pipeline.run(config, tmp_path)
    assert "[student] teacher: AP" in capsys.readouterr().out
    assert summary["teacher"]["AP"] == json.loads((teacher / "summary.json").read_text())["student"]["AP"]


def test_a_sink_that_is_not_installed_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(pipeline, "opened", pytest.fail)
    config = tiny_config(base_config())
    config.sinks = ("tensorboard", "wandb")
    with pytest.raises(UserError, match="the package wandb cannot be imported"):
        pipeline.run(config, tmp_path)


@pytest.mark.slow
def test_a_term_that_is_nearly_all_of_the_first_loss_is_explained_once(teacher, data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    config.student.loss_weights.mimic = 1e4
    config.student.log_every, config.sinks = 1, ()
    workdir = with_teacher(teacher, tmp_path)
    pipeline.run(config, workdir)
    shown = capsys.readouterr().out
    assert len(re.findall(r"\[student\] mimic is \d+% of the loss: .*config.student.loss_weights.mimic", shown)) == 1
    assert not list((workdir / "stages" / "student").glob("events*"))


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


def test_other_annotations_under_the_same_name_are_other_data(tmp_path):
    config = tiny_config(base_config())
    content = folders.content()
    for images, file in (("train", "annotations_train.json"), ("val", "annotations_val.json")):
        folders.write(tmp_path / "data", content, file, images)
    config.data.name = f"coco_json:{tmp_path / 'data'}"
    plan = resolve(config, devices=8)

    def identified():
        return identity(plan, plan["student"], open_splits(plan))

    before = identified()
    assert identified() == before
    content["annotations"][0]["bbox"][0] = 4
    folders.write(tmp_path / "data", content)
    changed = differences(before, identified())
    assert [change.partition(":")[0] for change in changed] == ["data.train", "from.teacher.data.train"]


def torch_names(path: str) -> str:
    """What PyTorch calls an array of a ResNet: ``layer1_0/bn1/scale`` is ``layer1.0.bn1.weight``."""
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    *layer, leaf = re.sub(r"(layer\d)_(\d)", r"\1.\2", path).split("/")
    layer = ".".join(layer).replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return f"{layer}.{names.get(leaf, leaf)}"


def test_a_stage_of_no_steps_takes_over_a_file_and_teaches(data_dir, tmp_path, capsys):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    module = build_model(config.teacher.model.to_dict(), num_classes=6)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.uniform(0.1, 1, x.shape).astype(np.float32)
        for collection in ("params", "batch_stats")
        for path, x in flatten_dict(shapes[collection]["backbone"], sep="/").items()
    }
    torch = {torch_names(path): x.transpose(3, 2, 0, 1) if x.ndim == 4 else x for path, x in arrays.items()}
    np.savez(tmp_path / "backbone.npz", **torch)
    config.teacher.update(weights=str(tmp_path / "backbone.npz"), source="timm", steps=0)
    summary = pipeline.run(config, tmp_path / "run")
    shown = capsys.readouterr().out
    assert f"[teacher] starts from {tmp_path / 'backbone.npz'}: {len(torch)} tensors taken" in shown
    assert summary["teacher"].keys() == summary["student"].keys()
    _, variables = kdjax.load_student(tmp_path / "run" / "stages" / "teacher" / "model")
    taken = {**flatten_dict(variables["params"]["backbone"], sep="/")}
    taken |= flatten_dict(variables["batch_stats"]["backbone"], sep="/")
    assert taken.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(taken[path], array)
    # Another file of the same name is another run.
    np.savez(tmp_path / "backbone.npz", **{name: 2 * x for name, x in torch.items()})
    with pytest.raises(UserError, match=r"stages/teacher holds a run of another config \(from.weights"):
        pipeline.run(config, tmp_path / "run")


def test_a_workdir_that_another_run_is_in_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "opened", pytest.fail)
    with take(tmp_path), pytest.raises(UserError, match=rf"{tmp_path} is in use: by process {os.getpid()} on "):
        pipeline.run(tiny_config(base_config()), tmp_path)


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_an_unusable_workdir_is_refused(kind, tmp_path):
    blocker = tmp_path / "taken"
    blocker.write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        pipeline.run(base_config(), blocker if kind == "file" else blocker / "run")


def command(config: str, workdir: Path, data_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "kdjax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.student.steps=8",
        "--config.student.log_every=1",
        "--config.student.checkpoint_every=2",
        *more,
    ]


def interrupted(command, number, line_of_output):
    """Sends a signal to a run once it has printed a line; its exit code, and all that it printed."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line_of_output in line:
                process.send_signal(number)
                line_of_output = "nothing more"
    return process.returncode, "".join(printed)


MORE_STATE = {"batch_size": 16, "base_batch": 16, "accumulate": 2, "ema_decay": 0.5}
"""Options of a student with more than its weights to go on from."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("configs/mimic.py:tiny", {}),
        ("mgd:segmentation:tiny", MORE_STATE),
        ("mgd:classification:tiny", {"dtype": "bfloat16", **MORE_STATE}),
    ],
    ids=("detection", "segmentation", "classification"),
)
def test_a_run_stopped_and_then_killed_in_the_middle_continues_as_if_never_stopped(
    config, options, teacher, data_dir, tmp_path
):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    if "mimic" in config:
        for workdir in (reference, killed):
            with_teacher(teacher, workdir)
    more = [f"--config.student.{key}={value}" for key, value in options.items()]
    subprocess.run(command(config, reference, data_dir, *more), cwd=ROOT, check=True, capture_output=True)
    code, printed = interrupted(command(config, killed, data_dir, *more), signal.SIGTERM, "[student] step 1/8")
    assert code == 75
    (stopped,) = map(int, re.findall(r"^kdjax: stopped; stage 'student' is saved at step (\d),", printed, re.M))
    assert os.listdir(killed / "stages" / "student" / "checkpoints") == [str(stopped)]
    code, printed = interrupted(command(config, killed, data_dir, *more), signal.SIGKILL, "[student] step 7/8")
    assert code == -signal.SIGKILL
    assert f"continues from the checkpoint of step {stopped}" in printed
    assert not (killed / "student").exists()
    again = subprocess.run(
        command(config, killed, data_dir, *more), cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "continues from the checkpoint of step" in again.stdout

    def curve(workdir):
        stage = rows(workdir / "stages" / "student")
        return [{key: row[key] for key in row.keys() - {"images_per_second", "waited", "wall_time"}} for row in stage]

    assert curve(killed) == curve(reference)
    arrays = [kdjax.load_student(workdir / "student")[1] for workdir in (killed, reference)]
    jax.tree.map(np.testing.assert_array_equal, *arrays)
    assert not [name for name in os.listdir(killed) if "partial" in name]


def test_levels_that_neither_model_has_are_refused_before_anything_is_compiled(teacher, data_dir, tmp_path):
    config = tiny(ROOT / "configs" / "mimic.py", data_dir)
    config.student.methods.mimic.levels = ("p3", "p33")
    with pytest.raises(
        UserError, match=r"student.methods.mimic.levels has 'p33', which neither model has; there are p3,"
    ):
        pipeline.run(config, with_teacher(teacher, tmp_path))
