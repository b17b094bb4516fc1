"""Methods, detectors and data sets of somebody else's package, from the command line to a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdjax.errors import Exit
from tests.forks import ends

ROOT = Path(__file__).parents[1]

PACKAGE = '''
from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from kdjax.data.sources import open_source
from kdjax.methods.levels import Conv, pair_levels
from kdjax.models import RetinaNet
from kdjax.options import number


class Cosine(nn.Module):
    """One minus the cosine between the features of student and teacher, position by position."""

    power: Annotated[float, number(0, above=True), "Exponent of the distance."] = 1.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar = ("size",)
    requires: ClassVar = ("teacher",)
    terms: ClassVar = {"cosine": ("student", "method")}

    @nn.compact
    def __call__(self, student, teacher, *, size):
        loss = {}
        for level, ours, theirs, where in pair_levels(student, teacher, size):
            ours = Conv(theirs.shape[-1], name=f"align_{level}")(ours)
            norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
            distance = 1 - jnp.sum(ours * theirs, axis=-1) / (norms + 1e-6)
            loss[level] = jnp.mean(jnp.maximum(distance, 1e-6) ** self.power, where=where)
        return {"cosine": loss}


class SharpRetinaNet(RetinaNet):
    """A RetinaNet that keeps few detections."""

    max_detections: int = 7


def few(name, split, data_dir, checks, download):
    """A data set of theirs: the first images of the embedded one."""
    return open_source("shapes/tiny", f"{split}[:9]", data_dir, checks=checks)


class NoMethod(nn.Module):
    """Lacks what methods have."""
'''

CONFIG = """
from kdjax.config import base_config, method_config, tiny


def get_config():
    config = tiny(base_config())
    config.student.methods.cosine = method_config("theirs.parts:Cosine", power=2.0)
    config.student.model.name = "theirs.parts:SharpRetinaNet"
    config.student.loss_weights.cosine = 0.5
    config.data.name = "theirs.parts:few"
    return config
"""

RELOAD = """
import json, sys
import jax.numpy as jnp
import kdjax
from kdjax.saved import describe, load_method
module, variables = kdjax.load_student("run/student")
images = jnp.zeros((1, 64, 64, 3), jnp.uint8)
found = module.apply(variables, images, jnp.array([[64, 64]]), method="detect")
learnt = load_method("run/stages/student/method")
method = describe("run/stages/student/method")["method"]
print(json.dumps([type(module).__name__, list(found.boxes.shape), sorted(learnt), method]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "__init__.py").touch()
    (folder / "theirs" / "parts.py").write_text(PACKAGE)
    (folder / "mine.py").write_text(CONFIG)
    return folder


def python(folder, *arguments):
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_method_and_a_detector_from_outside_train_and_reload_in_a_fresh_process(folder, data_dir):
    flags = ["--config=mine.py", "--workdir=run", f"--config.data.data_dir={data_dir}"]
    run = python(folder, "-m", "kdjax.main", *flags)
    assert run.returncode == 0, run.stderr
    assert "cosine" in run.stdout
    assert "shapes/tiny train[:9]: 9 images" in run.stdout
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["method"] == "theirs.parts:Cosine"
    again = python(folder, "-c", RELOAD)
    assert again.returncode == 0, again.stderr
    name, boxes, learnt, method = json.loads(again.stdout)
    assert (name, boxes) == ("SharpRetinaNet", [1, 7, 4])
    assert learnt == ["align_p3", "align_p4", "align_p5", "align_p6"]
    assert method == {"name": "theirs.parts:Cosine", "power": 2.0}


MISTAKES = {
    "--config.student.methods.cosine.power=-1.0": "cosine.power is -1.0; it must be a number above 0",
    "--config.student.methods.cosine.powr=1": "perhaps config.student.methods.cosine.power is meant",
    "--config.student.methods.cosine.name=theirs.parts:Cosin": "the module theirs.parts has no 'Cosin'",
    "--config.student.methods.cosine.name=theirs.part:Cosine": "there is no module theirs.part",
    "--config.student.methods.cosine.name=theirs.parts:NoMethod": "is no method: it has no 'terms', see kdjax.methods",
    "--config.data.name=theirs.parts:fewer": "'theirs.parts:fewer' names no data source: the module",
    "--config.student.model.name=theirs.parts:Sharp": "the module theirs.parts has no 'Sharp'",
}


@pytest.fixture(scope="module")
def ended(folder, tmp_path_factory):
    """How the program ends by each mistake."""
    starts = [["--config=mine.py", f"--workdir={folder}/other", flag] for flag in MISTAKES]
    return dict(zip(MISTAKES, ends("kdjax.main", starts, tmp_path_factory.mktemp("told"), cwd=folder), strict=True))


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_in_naming_them_is_one_sentence(flag, ended):
    end = ended[flag]
    assert end.code == Exit.CONFIG, end.told
    assert MISTAKES[flag] in end.told
    assert len(end.told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import no_such_package", "No module named 'no_such_package'"),
        ("import math; math.nothing", "module 'math' has no attribute 'nothing'"),
    ],
)
def test_a_bug_in_their_module_keeps_its_traceback(folder, line, words):
    (folder / "theirs" / "broken.py").write_text(f"{line}\n")
    flag = "--config.student.methods.cosine.name=theirs.broken:Cosine"
    run = python(folder, "-m", "kdjax.main", "--config=mine.py", f"--workdir={folder}/other", flag)
    assert run.returncode == 1
    assert words in run.stderr
    assert "Traceback" in run.stderr
