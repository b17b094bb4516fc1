"""A saved model measured from the command line: the numbers of the run that trained it, or one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax.config import load_config
from kdjax.config.schema import Data
from kdjax.data.sizing import Sizing
from kdjax.errors import Exit
from kdjax.evaluate import as_trained
from kdjax.models import with_classes
from kdjax.options import parse
from kdjax.run.start import load_model
from kdjax.saved import describe, describe_model, load_variables, save_model
from tests.forks import ends

ROOT = Path(__file__).parents[1]
TWELVE = [f"AP{x}" for x in ("", 50, 75, "_small", "_medium", "_large")]
TWELVE += [f"AR{x}" for x in (1, 10, 100, "_small", "_medium", "_large")]


def run(*flags):
    command = [sys.executable, "-m", "kdjax.evaluate", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def flags(teacher, data_dir):
    return f"--model={teacher / 'student'}", "--config.data.name=shapes/tiny", f"--config.data.data_dir={data_dir}"


def test_a_model_has_the_numbers_of_its_run_at_its_own_size(flags, teacher, tmp_path):
    done = run(*flags, f"--json={tmp_path / 'numbers.json'}")
    assert done.returncode == 0, done.stderr
    known = json.loads((teacher / "summary.json").read_text())["student"]
    assert json.loads((tmp_path / "numbers.json").read_text()) == known
    lines = [line.split() or [""] for line in done.stdout.splitlines()]
    first = next(k for k, line in enumerate(lines) if line[0] == "AP")
    assert [line[0] for line in lines[first : first + 12]] == TWELVE
    assert lines[first + 13] == ["class", "AP"]
    assert [line[0] for line in lines[first + 14 :]] == list(known["per_class"])


def test_images_are_scaled_as_they_were_for_the_model_unless_somebody_says_otherwise(tmp_path):
    described = describe_model({}, (), Sizing(((64, 96), (96, 64)), (60,), 90), task="detection")
    (tmp_path / "model.json").write_text(json.dumps({**described, "sha256": ""}))
    config = as_trained(load_config("none"), str(tmp_path), said=("long_side",))
    assert parse(Data, config.data.to_dict(), "config.data").sizing == Sizing(((64, 96), (96, 64)), (60,), 0)


def test_another_split_and_a_checkpoint_are_measured_as_well(flags, teacher):
    step = max((teacher / "stages" / "teacher" / "checkpoints").glob("[0-9]*"))
    done = run(f"--model={step}", *flags[1:], "--config.data.eval_split=train[:9]")
    assert done.returncode == 0, done.stderr
    assert "shapes/tiny train[:9]: 9 images" in done.stdout


def test_classes_in_another_order_are_put_in_that_of_the_data(teacher, tmp_path):
    folder = teacher / "student"
    description, variables = describe(folder), load_variables(folder)
    names = description["class_names"]
    order = [*range(1, len(names)), 0]
    turned = {**description, "class_names": [names[k] for k in order]}
    save_model(tmp_path / "turned", with_classes(description["model"], variables, order), turned)
    (_, found), words = load_model(tmp_path / "turned", tuple(names), "float32")
    assert words == "its classes are put in the order of the data's"
    jax.tree.map(np.testing.assert_array_equal, found, variables)


MISTAKES = {
    "--model=": (Exit.USAGE, "--model is missing; name a folder"),
    "--model=/no/such": (Exit.DATA, "/no/such holds no kdjax model"),
    "--config.data.eval_split=holiday": (Exit.CONFIG, "holiday"),
    "--config.eval_batch_size=0": (
        Exit.CONFIG,
        "config.eval_batch_size is 0; it must be a whole number of at least 1",
    ),
    "--config.task=classification": (Exit.CONFIG, "is a model for detection, and config.task is for classification"),
    "--config.task=pose": (Exit.CONFIG, "There is no task 'pose'; choose one of detection"),
    "--json=/no/such/file.json": (Exit.STORAGE, "--json=/no/such/file.json cannot be written"),
    "--config.data.image_siz=3": (Exit.CONFIG, "perhaps config.data.image_size is meant"),
}


@pytest.fixture(scope="module")
def ended(flags, tmp_path_factory):
    """How the program ends by each mistake."""
    starts = [[*flags, more] for more in MISTAKES]
    return dict(zip(MISTAKES, ends("kdjax.evaluate", starts, tmp_path_factory.mktemp("told")), strict=True))


@pytest.mark.parametrize("more", MISTAKES)
def test_a_mistake_is_one_sentence_and_an_exit_code(more, ended):
    (code, words), end = MISTAKES[more], ended[more]
    assert end.code == code, end.told
    assert words in end.told
    assert len(end.told.strip().splitlines()) == 1
