"""How programs end: by one table, in code and in words, whichever program it is and whichever process is at fault."""

import os
import re
import subprocess
import types
from pathlib import Path

import jax
import pytest
import yaml

from kdjax import benchmark, convert, evaluate, html_report, inspect, main, predict, preflight, processes, show
from kdjax.errors import DataError, Exit, NumericError, StorageError, UnreachedError, UsageError, UserError
from kdjax.processes import everywhere
from kdjax.run import pipeline

DOCS = Path(__file__).parents[1] / "docs"
PROGRAMS = {
    "main": (main, "kdjax.run.pipeline.run"),
    "evaluate": (evaluate, "kdjax.evaluate.begin"),
    "convert": (convert, "kdjax.convert.convert"),
    "report": (html_report, "kdjax.html_report._folders"),
    "show": (show, "kdjax.show.exists"),
    "inspect": (inspect, "kdjax.inspect.opened"),
    "predict": (predict, "kdjax.predict.predict"),
    "preflight": (preflight, "kdjax.preflight.preflight"),
    "benchmark": (benchmark, "kdjax.benchmark.resolve"),
}
"""Each with a function that it calls."""
ENDS = {
    Exit.USAGE: UsageError("as it is"),
    Exit.DATA: DataError("as it is"),
    Exit.NUMBERS: NumericError("as it is"),
    Exit.STORAGE: StorageError("as it is"),
    Exit.AGAIN: UnreachedError("as it is"),
    Exit.CONFIG: UserError("as it is"),
    Exit.INTERRUPTED: KeyboardInterrupt(),
}


def raises(error):
    def work(*_, **__):
        raise error

    return work


def given(value):
    return types.SimpleNamespace(value=value)


@pytest.fixture
def flags(monkeypatch):
    """What the programs that are called here without a command line would know from one."""
    monkeypatch.setattr(main, "begin", lambda workdir="": None)
    monkeypatch.setattr(main.config_flags, "get_config_filename", lambda flag: "configs/none.py")
    monkeypatch.setattr(main.flags, "FLAGS", {"config": None})
    monkeypatch.setattr(main, "WORKDIR", given("run"))
    monkeypatch.setattr(main, "_REQUIRE_GAIN", given(False))
    for program, _ in PROGRAMS.values():
        if program not in (predict, html_report, show):
            monkeypatch.setattr(program, "CONFIG", given({}))
    for flag in ("_WEIGHTS", "_SOURCE", "_OUTPUT", "_STAGE", "_KEY"):
        monkeypatch.setattr(convert, flag, given("x"))
    monkeypatch.setattr(convert, "_CLASS_NAMES", given(""))
    for flag in ("_MODEL", "_INPUT", "_OUTPUT", "_THRESHOLD", "_BATCH_SIZE", "_PICTURES", "_ANNOTATIONS"):
        monkeypatch.setattr(predict, flag, given("x"))
    for flag in ("_TOPOLOGY", "_PER_CHIP", "_CLASSES", "_BISECT"):
        monkeypatch.setattr(preflight, flag, given(None))
    monkeypatch.setattr(preflight, "_OUTPUT", given(""))
    monkeypatch.setattr(benchmark, "begin", lambda: None)
    monkeypatch.setattr(inspect, "resolve", lambda config, devices: None)
    yield monkeypatch
    jax.config.update("jax_enable_compilation_cache", True)  # Which the benchmark turns off.


@pytest.mark.parametrize("code", ENDS, ids=lambda code: code.name)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_ends_by_the_same_codes(name, code, flags, capsys):
    program, function = PROGRAMS[name]
    flags.setattr(function, raises(ENDS[code]))
    assert program.main([]) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0] == "kdjax: as it is" or code == Exit.INTERRUPTED


def test_what_is_no_gain_has_a_code_where_that_is_asked_for(flags):
    flags.setattr(main, "CONFIG", given({"seeds": (0, 1)}))
    for asked, outcome, code in (
        (True, "loss", Exit.NO_GAIN),
        (False, "loss", Exit.FINISHED),
        (True, "gain", Exit.FINISHED),
    ):
        flags.setattr(main, "_REQUIRE_GAIN", given(asked))
        flags.setattr(pipeline, "run", lambda *_, outcome=outcome: {"verdict": {"outcome": outcome}})
        assert main.main([]) == code


def test_no_code_is_left_out_and_each_stands_in_the_documentation():
    # A bug ends by its traceback, see test_errors.
    assert {*ENDS, Exit.FINISHED, Exit.NO_GAIN, Exit.BUG} == {*Exit}
    rows = [line for line in (DOCS / "exit-codes.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert rows == [f"| {code.value} | {code.cause} | {code.remedy} |" for code in Exit]


@pytest.mark.parametrize(("told", "code"), [(("it is damaged", 65), 65), (("ValueError()", None), Exit.BUG)])
def test_the_code_of_another_process_is_that_of_all(told, code, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, told])
    with pytest.raises(UserError, match=re.escape(f"Process 1 cannot go on: {told[0]}")) as raised:
        everywhere(lambda: None)
    assert raised.value.exit_code == code
    monkeypatch.setattr(processes, "gather", lambda value: [value, None])
    with pytest.raises(DataError) as raised:
        everywhere(raises(DataError("mine")))
    assert raised.value.everywhere


def blocks(kind, heading="## Starting again by itself"):
    """The code of one kind in docs/hosts.md, below a heading."""
    text = (DOCS / "hosts.md").read_text().partition(heading)[2]
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def stand_in(folder, name, lines):
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)


def of_a_slice(folder):
    """The script that the page has every host of a slice run, as its own command writes it."""
    stand_in(folder, "gcloud", "")
    (writing,) = [block for block in blocks("sh", "## A slice of Cloud TPUs") if "run.sh" in block]
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", f"on_all() {{ :; }}\n{writing}"], cwd=folder, env=environment, check=True)
    (folder / "kdjax" / ".venv" / "bin").mkdir(parents=True)
    (folder / "kdjax" / ".venv" / "bin" / "python").symlink_to(folder / "python")
    return (folder / "run.sh").read_text()


@pytest.mark.parametrize("script", [lambda folder: blocks("sh")[0], of_a_slice], ids=["loop", "slice"])
@pytest.mark.parametrize("code", [Exit.FINISHED, Exit.BUG, Exit.DATA, Exit.CONFIG, Exit.INTERRUPTED])
def test_the_loops_of_the_documentation_start_again_and_stop(code, script, tmp_path):
    codes = tmp_path / "codes"
    codes.write_text("".join(f"{code}\n" for code in (int(Exit.AGAIN), 134, int(Exit.AGAIN), int(code), 0)))
    stand_in(tmp_path, "python", f"code=$(head -n 1 {codes}); sed -i 1d {codes}; exit $code")
    stand_in(tmp_path, "sleep", "")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", script(tmp_path)], cwd=tmp_path, env={"PATH": path}, check=False)
    assert done.returncode == code
    assert codes.read_text() == "0\n"


@pytest.mark.parametrize("code", [Exit.AGAIN, 134, Exit.FINISHED, Exit.DATA])
def test_the_script_for_slurm_queues_itself_again_after_the_same_codes(code, tmp_path):
    stand_in(tmp_path, "srun", f"exit {int(code)}")
    stand_in(tmp_path, "scontrol", 'echo "$@" > queued')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["sh", "-c", blocks("sh", "## Slurm")[0]], cwd=tmp_path, env=env, check=False)
    again = code in (Exit.AGAIN, 134)
    assert done.returncode == (0 if again else code)
    assert (tmp_path / "queued").exists() == again


def test_the_job_of_gke_fails_after_other_codes():
    job = yaml.safe_load(blocks("yaml")[0])
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "FailJob"]
    assert rules[1]["onExitCodes"] == {"operator": "NotIn", "values": [int(Exit.AGAIN), 134, 139]}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
