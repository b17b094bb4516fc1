"""What does not go on is ended, with what it was doing; what is only slow, or stopped, is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from kdjax.errors import Exit
from kdjax.watchdog import LIMITS, Watchdog

ROOT = Path(__file__).parents[1]


@pytest.fixture
def codes():
    return []


@pytest.fixture
def watchdog(tmp_path, codes):
    """One that counts only the time that a test tells it of, and ends nothing."""
    return Watchdog(tmp_path / "hang_report.txt", limits={"step": 10.0, "evaluation": 100.0}, end=codes.append)


def test_what_is_done_in_time_goes_on(watchdog, codes):
    with watchdog.doing("step"):
        for _ in range(5):
            watchdog.passed(9.0)
            watchdog.fed()
    assert codes == []


def test_what_is_not_ends_the_process_with_the_stacks_of_all_threads(watchdog, codes, tmp_path, capsys):
    with watchdog.doing("step"):
        watchdog.passed(9.0)
        assert codes == []
        watchdog.passed(2.0)
    assert codes == [Exit.AGAIN]
    text = (tmp_path / "hang_report.txt").read_text()
    assert "test_what_is_not_ends_the_process_with_the_stacks_of_all_threads" in text
    assert "kdjax: it hangs: nothing was done for 0:10, while its step was under way." in text
    assert capsys.readouterr().err.strip() == text.strip()


def test_each_thing_has_its_own_limit_and_the_outer_one_counts_anew_after_it(watchdog, codes):
    with watchdog.doing("step"):
        watchdog.passed(9.0)
        with watchdog.doing("evaluation"):
            watchdog.passed(99.0)
        watchdog.passed(9.0)
        assert codes == []
        with pytest.raises(ZeroDivisionError), watchdog.doing("evaluation"):
            raise ZeroDivisionError
        watchdog.passed(11.0)
    assert codes == [Exit.AGAIN]


def test_nothing_has_no_limit(watchdog, codes):
    watchdog.passed(1e9)
    with watchdog.doing("step"):
        pass
    watchdog.passed(1e9)
    assert codes == []


@pytest.mark.parametrize(("patience", "ended"), [(0.0, False), (0.5, True), (2.0, False)])
def test_patience_scales_all_limits_and_0_knows_none(patience, ended, codes, tmp_path):
    watchdog = Watchdog(tmp_path / "hang_report.txt", patience, end=codes.append)
    with watchdog.doing("evaluation"):
        watchdog.passed(LIMITS["evaluation"])
    assert codes == [Exit.AGAIN] * ended


def test_a_report_that_cannot_be_written_keeps_no_process(codes, tmp_path, capsys):
    (tmp_path / "hang_report.txt").mkdir()
    watchdog = Watchdog(tmp_path / "hang_report.txt", limits={"step": 1.0}, end=codes.append)
    with watchdog.doing("step"):
        watchdog.passed(2.0)
    assert codes == [Exit.AGAIN]
    assert "it hangs" in capsys.readouterr().err


HANGS = """
import sys, threading
from pathlib import Path
import numpy as np
from kdjax.devices import Prefetch
from kdjax.watchdog import Watchdog

def hanging_loader():
    yield np.zeros((8, 2))
    threading.Event().wait()

with (
    Watchdog(Path(sys.argv[1]), limits={"step": 1.0}) as watchdog,
    watchdog.doing("step"),
    Prefetch(hanging_loader()) as batches,
):
    while True:
        next(batches)
        watchdog.fed()
        print("step", flush=True)
"""


def test_a_loader_that_hangs_ends_the_process_which_says_where(tmp_path):
    report = tmp_path / "hang_report.txt"
    run = subprocess.run([sys.executable, "-c", HANGS, str(report)], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (Exit.AGAIN, "step\n"), run.stderr
    assert "in hanging_loader" in report.read_text()
    assert "in hanging_loader" in run.stderr
