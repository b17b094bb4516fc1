"""A workdir is one run's: of several that come at once one is in it, and a dead one's is taken over."""

import errno
import json
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdjax import lock
from kdjax.errors import Exit, UserError
from kdjax.lock import LOCK_FILE, take

ROOT = Path(__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from kdjax.errors import UserError
from kdjax.lock import take
input()
try:
    with take(Path(sys.argv[1])):
        print("mine", flush=True)
        input()
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["flock", "renewed"])
def kind(request, monkeypatch):
    """By the kernel, and where a file system has no flock."""
    if request.param == "renewed":

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "no flock here")

        monkeypatch.setattr(lock.fcntl, "flock", refuse)
        monkeypatch.setattr(lock, "_SETTLING", 0.3)
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    return request.param


def holders(workdir: Path, count: int) -> list[subprocess.Popen]:
    """Processes that take a workdir as soon as a line is written to them, and give it back after another one."""
    command = [sys.executable, "-c", HOLD, str(workdir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(count)]


def tell(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_processes_that_begin_at_once_one_has_the_workdir_and_the_others_name_it(tmp_path):
    processes = holders(tmp_path / "run", 4)
    for _ in range(2):
        for process in processes:
            tell(process)
        said = [process.stdout.readline().strip() for process in processes]
        (winner,) = (process for process, words in zip(processes, said, strict=True) if words == "mine")
        for words in said:
            assert (
                words == "mine" or f"in use: by process {winner.pid} on {platform.node()}, which started at 2" in words
            )
        # It is taken over however its owner ends: nothing is left to clear away.
        winner.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate()
        assert (tmp_path / "run" / LOCK_FILE).exists()
        processes = holders(tmp_path / "run", 4)
    tell(processes[0])
    assert processes[0].stdout.readline().strip() == "mine"
    tell(processes[0])
    for process in processes:
        process.communicate()
    assert list((tmp_path / "run").iterdir()) == []


def contend(workdir: Path, count: int) -> list[UserError]:
    """What is said to those who do not get a workdir that so many threads want at once."""
    begin = threading.Barrier(count)
    decided = threading.Barrier(count)

    def attempt(_):
        begin.wait()
        try:
            with take(workdir):
                decided.wait()
        except UserError as error:
            decided.wait()
            return error

    with ThreadPoolExecutor(count) as pool:
        return [error for error in pool.map(attempt, range(count)) if error]


def test_of_threads_that_begin_at_once_one_has_the_workdir(kind, tmp_path):
    for _ in range(3):
        errors = contend(tmp_path, 8)
        assert len(errors) == 7
        assert {error.exit_code for error in errors} == {Exit.CONFIG}
        assert not (tmp_path / LOCK_FILE).exists()


def test_it_is_given_back_whatever_ends_it(kind, tmp_path):
    with pytest.raises(ZeroDivisionError), take(tmp_path):
        raise ZeroDivisionError
    with take(tmp_path), pytest.raises(UserError, match="is in use"):
        take(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"pid": 1}'])
def test_a_damaged_file_keeps_nobody_out(kind, text, tmp_path):
    (tmp_path / LOCK_FILE).write_text(text)
    with take(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == platform.node()


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize(
    ("owner", "code"),
    [
        ({"host": "elsewhere", "renewed": 10.0}, Exit.AGAIN),
        ({"host": "elsewhere", "renewed": 200.0}, None),
        ({"pid": 1, "renewed": 10.0}, Exit.CONFIG),
        ({"pid": 1, "renewed": 200.0}, None),
        # Of a container that was started again, whose first process has the number of the one before.
        ({"started": "earlier", "renewed": 10.0}, None),
        ({"pid": "ended", "renewed": 10.0}, None),
    ],
)
def test_where_there_is_no_flock_who_is_not_heard_of_for_three_minutes_is_dead(owner, code, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLING", 0.0)
    owner = {**lock._me(), **owner, "renewed": time.time() - owner["renewed"], "token": "theirs"}
    if owner["pid"] == "ended":
        owner["pid"] = ended_process()
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(owner))
    if code is None:
        with lock._renewed(path):
            assert lock._owner(path)["token"] != "theirs"
        assert not path.exists()
        return
    with (
        pytest.raises(UserError, match=f"in use: by process {owner['pid']} on {owner['host']}") as refused,
        lock._renewed(path),
    ):
        pass
    assert refused.value.exit_code == code
    assert lock._owner(path) == owner


def test_who_was_not_heard_of_and_lost_its_workdir_ends(tmp_path, monkeypatch, capsys):
    """It slept, and another run has begun meanwhile."""
    left = threading.Event()
    monkeypatch.setattr(lock, "_SETTLING", 0.0)
    monkeypatch.setattr(lock, "_RENEWAL", 0.01)
    codes = []

    def leave(code):
        codes.append(code)
        left.set()

    monkeypatch.setattr(lock.os, "_exit", leave)
    path = tmp_path / LOCK_FILE
    theirs = json.dumps({**lock._me(), "token": "theirs"})
    with lock._renewed(path):
        while not left.wait(0.02):
            path.write_text(theirs)
    assert codes == [Exit.AGAIN]
    assert "is in use" in capsys.readouterr().err
    assert path.read_text() == theirs


@pytest.mark.parametrize("blocked", ["workdir", "above"])
def test_a_workdir_that_cannot_be_one_is_refused(blocked, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--workdir=.* cannot be used \(.*\); name a folder that can be written"):
        take(tmp_path / "file" if blocked == "workdir" else tmp_path / "file" / "run")
