"""What ends as a sentence, and what keeps its traceback: the user's mistakes are the former, ours the latter."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdjax.errors import UserError, parsing
from kdjax.run import pipeline
from tests.runs import tiny, with_teacher

ROOT = Path(__file__).parents[1]
NONE, MGD = (ROOT / "configs" / f"{name}.py" for name in ("none", "mgd"))


def bug(*_, **__):
    """The commonest mistake of a developer: NumPy raises a ValueError for it, as people's mistakes do."""
    return np.zeros(3) + np.zeros(4)


PLANTED = {
    "a transform": (NONE, "kdjax.data.batches.augment"),
    "a loss": (MGD, "kdjax.methods.mgd.mgd_loss"),
    "a writer": (NONE, "kdjax.report.MetricWriter.write"),
    "a reader": (NONE, "kdjax.data.indexed.decode"),
}


@pytest.mark.parametrize("place", PLANTED)
def test_a_bug_is_no_sentence(place, teacher, data_dir, tmp_path, monkeypatch):
    path, name = PLANTED[place]
    config = tiny(path, data_dir)
    workdir = with_teacher(teacher, tmp_path)
    monkeypatch.setattr(name, bug)
    with pytest.raises(ValueError, match="could not be broadcast together") as raised:
        pipeline.run(config, workdir)
    assert type(raised.value) is ValueError


def test_a_bug_ends_the_program_with_its_traceback_and_exit_code_1(tmp_path):
    program = (
        "import sys, numpy as np; from absl import app; from kdjax import main; from kdjax.run import pipeline\n"
        "pipeline.opened = lambda *_: np.zeros(3) + np.zeros(4)\n"
        "app.run(main.main, flags_parser=main.parse)"
    )
    flags = [f"--config={NONE}:tiny", f"--workdir={tmp_path}"]
    run = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "Traceback (most recent call last)" in run.stderr
    assert "could not be broadcast together" in run.stderr


def test_a_library_that_fails_over_damaged_input_is_quoted():
    with pytest.raises(UserError, match=r"^not a whole file$"), parsing():
        raise RuntimeError("not a\n  whole file.")
    with pytest.raises(UserError, match=r"^KeyError$"), parsing():
        raise KeyError
