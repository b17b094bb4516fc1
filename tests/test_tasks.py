"""A task from outside goes through everything that detection goes through, and the loop speaks of no task's metric."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import kdjax
from kdjax.checkpoint import Checkpoints
from kdjax.config import load_config, method_config
from kdjax.data.sizing import Augmentation
from kdjax.errors import UserError
from kdjax.plan import resolve
from kdjax.run import pipeline
from kdjax.run.verdict import judge
from kdjax.saved import load_variables
from tests.classification import CLASSES, Patterns, Right, Stripes
from tests.runs import rows
from tests.slow import slow_but
from tests.test_checkpoint import state

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "classification.py"


def run(config, workdir) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        pipeline.run(config, workdir)
    return shown.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a whole run, and what it printed."""
    workdir = tmp_path_factory.mktemp("classification")
    config = load_config(str(CONFIG))
    config.compare = True
    return workdir, run(config, workdir)


@pytest.mark.slow
def test_a_classifier_is_trained_distilled_and_compared_by_its_own_metric(finished):
    workdir, shown = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["primary"] == "right"
    assert all(summary[role]["right"] > 60 for role in ("teacher", "student", "baseline"))
    assert re.search(r"^model +share right +params$", shown, re.MULTILINE)
    assert "[teacher] step 50: right " in shown
    assert "[student] mgd distils c5." in shown
    assert "AP" not in shown
    row = rows(workdir / "stages" / "student")[-1]
    assert row["raw/mgd/c5"] == row["raw/mgd"] > 0
    with Image.open(workdir / "predictions.png") as picture:
        assert picture.width > 100


@pytest.mark.slow
def test_it_goes_on_after_a_kill_to_the_bit(finished, tmp_path):
    workdir, _ = finished
    killed = tmp_path / "killed"
    shutil.copytree(workdir, killed)
    stage = killed / "stages" / "student"
    last = max(int(step.name) for step in (stage / "checkpoints").glob("[0-9]*"))
    # As a kill between the last two checkpoints leaves it.
    shutil.rmtree(stage / "checkpoints" / str(last))
    (stage / "result.json").unlink()
    config = load_config(str(CONFIG))
    assert "[student] continues from the checkpoint of step 30" in run(config, killed)
    (_, again), (_, whole) = (kdjax.load_student(folder / "student") for folder in (killed, workdir))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.slow
def test_its_student_loads_and_says_classes(finished):
    module, variables = kdjax.load_student(finished[0] / "student")
    images = np.zeros((2, 64, 64, 3), np.uint8)
    source = Stripes("validation")
    for k in range(2):
        height, width = source.size(k)
        images[k, :height, :width] = source[k].image
    said = module.apply(variables, images, jnp.array([source.size(k) for k in range(2)]), method="predict")
    np.testing.assert_allclose(said.sum(axis=-1), 1, rtol=1e-5)
    assert said.shape == (2, len(CLASSES))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["evaluate", "inspect", "benchmark"])
def test_every_program_takes_it(program, finished, tmp_path):
    flags = {
        "evaluate": [f"--model={finished[0] / 'student'}", f"--json={tmp_path / 'numbers.json'}"],
        "inspect": [f"--picture={tmp_path / 'seen.png'}"],
        "benchmark": ["--rounds=1"],
    }[program]
    done = subprocess.run(
        [sys.executable, "-m", f"kdjax.{program}", f"--config={CONFIG}", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if program == "evaluate":
        known = json.loads((finished[0] / "summary.json").read_text())["student"]
        assert json.loads((tmp_path / "numbers.json").read_text()) == known
    else:
        assert {"inspect": "rows: 10 images", "benchmark": "distillation step"}[program] in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "detection"}, "a model for classification, and config.task is for detection; both must be the same"),
        (
            {"task": "tests.classification:Pattern"},
            "config.task: 'tests.classification:Pattern' names no",
        ),
        (
            {"method": "icd"},
            "config.student.methods.icd is the method 'icd', which is for detection, not classification",
        ),
        ({"inherit": ("neck",)}, "config.student.inherit has 'neck'; the parts of this model are backbone, head"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence(change, words):
    config = load_config(str(CONFIG))
    config.task = change.get("task", config.task)
    config.student.inherit = change.get("inherit", ())
    if "method" in change:
        config.student.methods.icd = method_config(change["method"])
    with pytest.raises(UserError, match=re.escape(words)):
        resolve(config, devices=8)


def test_a_teacher_below_what_the_task_knows_may_not_teach(tmp_path):
    config = load_config(str(CONFIG))
    config.teacher.steps = 1
    with pytest.raises(UserError, match=r"reaches right .*, worse than config.student.teacher_floor = 40"):
        run(config, tmp_path)


def test_the_judge_of_the_truth_is_perfect_and_halves_merge_to_the_whole():
    source = Stripes("validation")
    truth = np.eye(len(CLASSES))[[source[k].label for k in range(len(source))]]

    class Seen:
        def __init__(self, index):
            self.index = np.array(index)

    whole, *halves = (Right(source) for _ in range(3))
    wrong = np.roll(truth, 1, axis=1)
    for judge_, part in ((whole, range(40)), (halves[0], range(0, 40, 2)), (halves[1], range(1, 40, 2))):
        said = np.where(np.arange(40)[:, None] < 30, truth, wrong)[list(part)]
        judge_.add(np.concatenate([said, said[:1]]), Seen([*part, -1]))
    assert whole.merge([whole.state()]) == whole.merge([half.state() for half in halves]) == {"right": 75.0}
    perfect = Right(source)
    perfect.add(truth, Seen(range(40)))
    assert perfect.merge([perfect.state()]) == {"right": 100.0}


METRIC = re.compile(r"\bm?AP(50|75|_small|_medium|_large)?\b|\bmIoU\b|\btop-?1\b")
SPEAKERS = [
    "checkpoint.py",
    "saved.py",
    "distill.py",
    "evaluation.py",
    "report.py",
    "devices.py",
    "main.py",
    "run/*.py",
]


def test_nothing_above_the_tasks_names_a_metric_of_one():
    """But for examples in docstrings."""
    for pattern in SPEAKERS:
        for path in (ROOT / "kdjax").glob(pattern):
            code = "\n".join(line for line in path.read_text().splitlines() if ">>>" not in line)
            code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
            assert not METRIC.search(code), (path.name, METRIC.search(code))


def test_of_a_metric_of_which_less_is_better_the_least_is_kept_and_a_fall_is_a_gain(tmp_path):
    with Checkpoints(tmp_path / "steps", keep=1, metric="error", higher_is_better=False) as checkpoints:
        for step, error in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 40.0)):
            checkpoints.save(state(step), error)
    assert sorted(int(path.name) for path in (tmp_path / "steps").glob("[0-9]*")) == [2, 4]
    assert judge([10.0, 11.0], [20.0, 21.1], "error", higher_is_better=False).outcome == "gain"
    assert judge([20.0, 21.1], [10.0, 11.0], "error", higher_is_better=False).outcome == "loss"


def test_targets_follow_the_geometry_that_the_pixels_follow():
    """Of a classifier there is nothing to follow; of a detector tests/data/test_transforms.py sees it."""
    task = Patterns()
    targets = task.targets(3, (64, 64))
    task.fill(targets, 1, Stripes("train")[2], Augmentation())
    assert targets.classes.tolist() == [0, 2, 0]


@pytest.mark.parametrize("export", slow_but({"best"}, ["best", "last"]))
def test_the_best_checkpoint_is_kept_where_that_is_asked_for_and_overfitting_is_named(export, tmp_path, monkeypatch):
    """The judge is made to say that every evaluation is worse than the one before."""
    said = iter([90.0, 70.0, 50.0] + [90.0] * 9)
    monkeypatch.setattr(Right, "merge", lambda self, states: {"right": next(said)})
    config = load_config(str(CONFIG))
    config.stages = ("teacher",)
    config.teacher.update(steps=6, eval_every=2, export=export, keep_checkpoints=1)
    shown = run(config, tmp_path)
    kept = "keeps the best checkpoint, of step 2" if export == "best" else "keeps the last"
    assert f"[teacher] right was best, 90.0, at step 2, and is 50.0 at the end: {kept}" in shown
    assert "[teacher] It overfits: from step 2 on" in shown
    result = json.loads((tmp_path / "stages" / "teacher" / "result.json").read_text())
    assert result["metrics"]["right"] == (90.0 if export == "best" else 50.0)
    step = load_variables(tmp_path / "stages" / "teacher" / "checkpoints" / ("2" if export == "best" else "6"))
    _, student = kdjax.load_student(tmp_path / "student")
    jax.tree.map(np.testing.assert_array_equal, step, student)
