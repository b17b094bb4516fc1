"""Several processes: how they find each other, and that together they do what one process does."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import kdjax
from kdjax.errors import Exit, UnreachedError, UsageError, UserError
from kdjax.processes import connect, divided, everywhere, gather, on_main
from tests.data.folders import content, write

ROOT = Path(__file__).parents[1]
DIFFERENT = {"images_per_second", "waited", "wall_time"}
"""Of a row of metrics: what no two runs have in common."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher's variables, and nobody who waits five minutes for processes that never come."""
    ours = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for name in (*ours, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    met = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **patience: met.append(given))
    return met


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("10.0.0.1:8476", 2, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1 is no HOST:PORT"),
        (("10.0.0.1:99999", 2, 0), "is no HOST:PORT"),
        (("10.0.0.1:0", 2, 0), "is no HOST:PORT"),
        (("10.0.0.1:8476", 0, 0), r"--processes=0; it must be 1 or more"),
        (("10.0.0.1:8476", 2, 2), r"--process=2 of --processes=2; it must be from 0 to 1"),
    ],
)
def test_what_makes_no_sense_together_is_refused_in_words(given, words, alone):
    with pytest.raises(UserError, match=words):
        connect(*given)
    assert not alone


def test_a_launchers_number_that_is_none_is_refused(alone, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE is 'two'; it must be a whole number"):
        connect()


def test_flags_and_jaxs_own_variables_say_the_same(monkeypatch, alone):
    connect("10.0.0.1:8476", 2, 0)
    for name, value in {"COORDINATOR_ADDRESS": "10.0.0.1:8476", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    connect()
    assert alone == [("10.0.0.1:8476", 2, 0)] * 2
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(UserError, match="JAX_PROCESS_ID is 'first'; it must be a whole number"):
        connect()


def test_a_coordinator_that_nobody_is_is_said(monkeypatch, alone):
    monkeypatch.setattr("kdjax.processes._PATIENCE", -1.0)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ cannot be reached \(.*refused\): start process 0 there"):
        connect(f"127.0.0.1:{free_port()}", 2, 1)
    assert not alone


def test_a_first_process_that_stays_alone_says_so_and_asks_to_be_started_again():
    code = "from kdjax import processes; processes._PATIENCE = 1.5; "
    code += f"processes.connect('127.0.0.1:{free_port()}', 2, 0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == Exit.AGAIN
    assert re.fullmatch(
        r"kdjax: The processes of this run do not find each other at 127\.0\.0\.1:\d+: start one for each number, all "
        r"within five minutes, where all reach the coordinator\.\n",
        run.stderr,
    )


@pytest.mark.parametrize(("tasks", "expected"), [("1", []), ("4", [(None, None, None)])])
def test_a_launcher_of_several_processes_is_asked_and_of_one_is_not(tasks, expected, monkeypatch, alone):
    """One is also the step of the shell that ``salloc`` opens for a job of four."""
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[001-004]")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    connect()
    assert alone == expected


def test_a_launcher_that_jax_does_not_know_is_said(monkeypatch, alone):
    """As Open MPI 5, whose processes have other variables than those that JAX reads."""

    def unknown(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setattr("kdjax.processes._initialize", unknown)
    with pytest.raises(
        UsageError, match=r"where these 4 processes meet: say --coordinator=HOST:PORT, --processes=4 and"
    ):
        connect()


def test_a_cloud_that_does_not_say_who_the_others_are_asks_to_be_started_again(monkeypatch):
    """``requests``' errors are the operating system's."""

    def unanswered(*_, **__):
        raise ConnectionError("metadata.google.internal: Name or service not known")

    monkeypatch.setattr(jax.distributed, "initialize", unanswered)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[001-002]")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UnreachedError, match=r"do not find each other \(metadata\.google\.internal: Name or"):
        connect()


def test_one_process_talks_to_nobody():
    assert gather({"x": 2**40 + 1}) == [{"x": 2**40 + 1}]
    assert everywhere(lambda: 3) == on_main(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^as it is$"):
        on_main(lambda: refuse("as it is"))


def refuse(words):
    raise UserError(words)


def as_processes(count, work):
    """What ``work`` returns or raises in so many threads, each of which takes itself for a process of one run."""
    own, meeting, given = threading.local(), threading.Barrier(count, timeout=60), [None] * count

    def meet(value):
        given[own.number] = pickle.dumps(value)
        meeting.wait()
        everyone = [pickle.loads(data) for data in given]
        meeting.wait()
        return everyone

    def run(number):
        own.number = number
        try:
            return work()
        except (UserError, ValueError) as error:
            return error

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: own.number)
        patch.setattr("kdjax.processes.gather", meet)
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_does_an_equal_part_and_has_all_of_it(processes, count):
    done = []

    def work(numbers):
        done.extend(numbers)
        return [number**2 for number in numbers]

    expected = [number**2 for number in range(count)]
    assert as_processes(processes, lambda: everywhere(lambda: divided(work, count))) == [expected] * processes
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("wrong", ["before", "inside", "after"])
@pytest.mark.parametrize("kind", [UserError, ValueError])
def test_what_fails_on_one_process_fails_once_on_all(wrong, kind):
    def fail(when):
        if when == wrong and jax.process_index() == 1:
            raise kind("no file")

    def part(numbers):
        fail("inside")
        return list(numbers)

    def work():
        fail("before")
        divided(part, 5)
        fail("after")

    first, second, third = as_processes(3, lambda: everywhere(work))
    assert type(second) is kind
    assert str(second) == "no file"
    shown = "no file" if kind is UserError else "ValueError('no file')"
    assert str(first) == str(third) == f"Process 1 cannot go on: {shown}"
    assert first.everywhere == third.everywhere == (kind is UserError)
    assert getattr(second, "everywhere", True)
    # Nobody is left waiting, and the next thing is done by all.
    assert as_processes(3, lambda: everywhere(lambda: divided(list, 2))) == [[0, 1]] * 3


def test_processes_that_see_other_files_are_told():
    found = as_processes(2, lambda: everywhere(lambda: divided(list, 4 + jax.process_index())))
    assert [str(error) for error in found] == [
        "The processes do not find the same data (4, 5 of what they read together): start again when nobody changes "
        "them any more."
    ] * 2


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def started(flags, *, processes: int, of_each=lambda process: [], home_of=None) -> list[subprocess.Popen]:
    """``kdjax.main`` in so many processes that share four devices, each with flags and a home of its own."""
    environment = dict(os.environ)
    devices = f" --xla_force_host_platform_device_count={4 // processes}"
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(" --xla_force_host_platform_device_count=8", devices)
    joining = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"] if processes > 1 else []
    return [
        subprocess.Popen(
            [sys.executable, "-m", *flags, *joining, *([f"--process={process}"] * bool(joining)), *of_each(process)],
            cwd=ROOT,
            env=environment | ({"HOME": str(home_of(process))} if home_of else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]


def ended(running) -> list[tuple[int, str, str]]:
    """Exit codes and what was printed, once all have ended."""
    said = [process.communicate() for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def training(workdir: Path, *more: str) -> list[str]:
    return [
        "kdjax.main",
        "--config=mgd:tiny",
        f"--workdir={workdir}",
        "--config.teacher.steps=4",
        "--config.teacher.log_every=1",
        "--config.student.steps=6",
        "--config.student.log_every=1",
        "--config.student.checkpoint_every=2",
        "--config.student.accumulate=2",
        "--config.student.eval_every=3",
        *more,
    ]


def killed_and_resumed(workdir, *more: str) -> list[tuple[int, str, str]]:
    """Trains in two processes, one of which is killed in the middle, and goes on; what each printed at last."""
    running = started(training(workdir, *more), processes=2)
    for line in running[0].stdout:
        if "[student] step 5/6" in line:
            running[1].kill()
            break
    (code, _, stderr), (other, *_) = ended(running)
    assert other == -signal.SIGKILL
    # JAX may find out first, in C++.
    assert code in (Exit.AGAIN, -signal.SIGABRT), stderr
    return ended(started(training(workdir, *more), processes=2))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A run of two processes that went on after one was killed in the middle, and what each printed at last."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    return workdir, killed_and_resumed(workdir)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same run of one process on as many devices."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    [(code, _, stderr)] = ended(started(training(workdir), processes=1))
    assert code == 0, stderr
    return workdir


def rows(workdir: Path, stage: str) -> list[dict]:
    lines = (workdir / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in DIFFERENT} for line in lines]


@pytest.mark.slow
def test_the_main_process_alone_tells_and_writes(together):
    workdir, ((code, told, _), (other_code, nothing, stderr)) = together
    assert code == other_code == 0, stderr
    assert "continues from the checkpoint of step" in told
    assert "What comes next" in told
    # What the library that connects CPUs says comes from below Python.
    assert [line for line in nothing.splitlines() if "Gloo" not in line] == []
    assert len(list((workdir / "stages" / "student").glob("events*"))) <= 2
    assert not [path for path in workdir.rglob("*") if "partial" in path.name or path.name == ".writable"]


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_as_many_devices(together, single):
    # A student that learns from another teacher, equal but for rounding, is a little further away.
    for stage, later in (("teacher", 1e-5), ("student", 1e-4)):
        for number, (ours, theirs) in enumerate(zip(rows(together[0], stage), rows(single, stage), strict=True)):
            apart = 1e-6 if (stage, number) == ("teacher", 0) else later
            assert ours.keys() == theirs.keys()
            for name in ours:
                if name.startswith(("loss", "raw")):
                    assert ours[name] == pytest.approx(theirs[name], rel=apart, abs=1e-6), (stage, number, name)
    student, reference = (kdjax.load_student(workdir / "student")[1] for workdir in (together[0], single))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), student, reference)


@pytest.mark.slow
def test_what_two_processes_began_one_goes_on_with(together, tmp_path):
    begun, stage = together[0] / "stages" / "student", tmp_path / "stages" / "student"
    shutil.copytree(begun.parent / "teacher", stage.parent / "teacher")
    shutil.copytree(begun / "checkpoints" / "4", stage / "checkpoints" / "4")
    for name in ("config.json", "description.json", "metrics.jsonl"):
        shutil.copy(begun / name, stage / name)
    [(code, told, stderr)] = ended(started(training(tmp_path), processes=1))
    assert code == 0, stderr
    assert "continues from the checkpoint of step 4" in told
    ours, theirs = (rows(workdir, "student") for workdir in (tmp_path, together[0]))
    assert ours[:4] == theirs[:4]
    for name, loss in theirs[4].items():
        if name.startswith(("loss", "raw")):
            assert ours[4][name] == pytest.approx(loss, rel=1e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_process_ends_both_at_the_same_step(asked, together, tmp_path):
    workdir, _ = together
    shutil.copytree(workdir / "stages" / "teacher", tmp_path / "stages" / "teacher")
    flags = (*training(tmp_path), "--config.student.steps=400", "--config.student.eval_every=0")
    running = started(flags, processes=2)
    for line in running[0].stdout:
        if "[student] step   2/400" in line:
            running[asked].terminate()
            break
    ends = ended(running)
    assert [code for code, *_ in ends] == [75, 75], ends
    steps = [re.findall(r"stage 'student' is saved at step (\d+), and the same", stderr) for *_, stderr in ends]
    assert steps[0] == steps[1]
    assert steps[0][0] in os.listdir(tmp_path / "stages" / "student" / "checkpoints")


TALKING = """
import os, sys
from kdjax.main import ended
from kdjax.processes import connect, gather
me, victim = map(int, sys.argv[2:])
connect(sys.argv[1], 2, me)

def talk():
    for number in range(10**6):
        gather(number)
        if number == 20 and me == victim:
            os.kill(os.getpid(), 9)

sys.exit(ended(talk, "nothing is lost"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_whoever_is_killed_while_all_tell_each_other_something_ends_the_others_with_75(victim):
    command = [sys.executable, "-c", TALKING, f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(me), str(victim)], cwd=ROOT, **pipes) for me in range(2)]
    ends = ended(running)
    assert ends[victim][0] == -signal.SIGKILL
    code, _, stderr = ends[1 - victim]
    # JAX may find out first, in C++.
    assert code == -signal.SIGABRT or (code == 75 and "another process of this run is gone (" in stderr), stderr


FULL = """
import errno, sys
import jax.numpy as jnp
import numpy as np
from kdjax import checkpoint
from kdjax.devices import replicate
from kdjax.main import ended
from kdjax.optim import make_optimizer
from kdjax.processes import connect
from kdjax.state import init_state

connect(sys.argv[1], 2, int(sys.argv[2]))
state = init_state({"params": {"kernel": np.ones(3, np.float32)}, "batch_stats": {}}, {}, make_optimizer(lambda _: 0.1))

def refused(arrays):
    raise OSError(errno.ENOSPC, "No space left on device")

def work():
    with checkpoint.Checkpoints(sys.argv[3], metric="AP") as checkpoints:
        checkpoints.commit(replicate(state.replace(step=jnp.int32(1))))
        checkpoint.digests = refused  # Which the main process alone calls.
        checkpoints.commit(replicate(state.replace(step=jnp.int32(2))))

sys.exit(ended(work, "nothing is lost"))
"""


@pytest.mark.slow
def test_the_one_that_cannot_save_ends_at_once_and_so_do_the_others(tmp_path):
    command = [sys.executable, "-c", FULL, f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(me), str(tmp_path)], cwd=ROOT, **pipes) for me in range(2)]
    (code, _, stderr), (other, _, theirs) = ended(running)
    assert code == 74, stderr
    assert f"No checkpoint could be saved in {tmp_path} (No space left on device); the earlier ones are" in stderr
    assert other in (75, -signal.SIGABRT), theirs
    assert "1" in os.listdir(tmp_path)
    assert "2" not in os.listdir(tmp_path)


@pytest.mark.slow
def test_the_same_weights_are_judged_exactly_alike(together, tmp_path):
    """Ten images are no multiple of what two processes take at once."""
    student = shutil.copytree(together[0] / "student", tmp_path / "student")
    known = json.loads((student / "model.json").read_text())
    # It has learnt next to nothing: let it say what it believes least.
    known["model"]["head"]["score_threshold"] = 0.001
    (student / "model.json").write_text(json.dumps(known))
    numbers = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.json"
        flags = [
            "kdjax.evaluate",
            f"--model={student}",
            "--config=mgd:tiny",
            "--config.data.eval_split=validation[:10]",
        ]
        for code, _, stderr in ended(started([*flags, f"--json={file}"], processes=processes)):
            assert code == 0, stderr
        numbers.append(json.loads(file.read_text()))
    assert numbers[0] == numbers[1]
    assert numbers[0]["AR100"] > 0


@pytest.mark.slow
def test_whoever_would_judge_other_weights_is_named(together):
    step = max((together[0] / "stages" / "student" / "checkpoints").glob("[0-9]"))
    models = (together[0] / "student", step)
    flags = ["kdjax.evaluate", "--config=mgd:tiny"]
    for code, _, stderr in ended(started(flags, processes=2, of_each=lambda process: [f"--model={models[process]}"])):
        assert code == Exit.CONFIG
        assert "Process 1 on" in stderr
        assert "model.checkpoint: " in stderr


def refusals(workdir: Path, expected: Exit = Exit.CONFIG, *more: str, **different) -> list[str]:
    """What two processes that differ say as both are refused."""
    said = ended(started(training(workdir, *more), processes=2, **different))
    assert [code for code, *_ in said] == [expected] * 2
    return [stderr for *_, stderr in said]


@pytest.mark.slow
def test_whoever_would_run_something_else_is_named_with_what_differs(tmp_path):
    for sentence in refusals(tmp_path, of_each=lambda process: [f"--config.student.log_every={process + 1}"]):
        assert "Process 1" in sentence
        assert "config.student.log_every: 1 -> 2" in sentence
    assert not (tmp_path / "stages").exists()


@pytest.mark.slow
def test_a_workdir_that_only_one_process_sees_is_refused(tmp_path):
    for sentence in refusals(tmp_path, of_each=lambda process: [f"--workdir={tmp_path / str(process)}"]):
        assert "is another folder than that of process 0: name one that all hosts share" in sentence


@pytest.mark.slow
def test_what_is_wrong_for_one_process_ends_all_with_its_sentence_and_its_code(tmp_path):
    """The second one's home has the same data, damaged."""
    tree = content()
    tree["images"] += [dict(tree["images"][0], id=k, file_name=f"{k}.png") for k in range(20, 30)]
    for process in range(2):
        for split in ("train", "val"):
            write(tmp_path / str(process) / "data", tree, f"annotations_{split}.json", split)
    (tmp_path / "1" / "data" / "annotations_val.json").write_text("{")
    name = "--config.data.name=coco_json:~/data"
    main, other = refusals(tmp_path / "run", Exit.DATA, name, home_of=lambda process: tmp_path / str(process))
    assert "kdjax (process 0 of 2): Process 1 cannot go on: " in main
    assert "kdjax (process 1 of 2): " in other
    assert "val.json is not valid json" in main
    assert "val.json is not valid json" in other


@pytest.mark.slow
def test_the_benchmark_measures_what_two_processes_do_together():
    first, second = ended(started(["kdjax.benchmark", "--config=mgd:tiny", "--rounds=1"], processes=2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "4 x cpu, batch 8" in first[1]
    assert "overhead in time" in first[1]
    assert "overhead" not in second[1]
