"""Kills, signals and flipped bits, and what is lost by them: ``python -m experiments.faults``.

Three parts, each of config's ``tiny`` runs on this machine's CPU, at moments and places drawn from a seed:

- *kills*: each method's run, killed (SIGKILL) again and again until it ends, must end as the run that nobody stopped:
  the same losses of every step, and the same weights, to the bit.
- *terms*: the same with SIGTERM, which must end with exit code 75 and lose no step.
- *flips*: one bit of a file of a run's folder flipped, of every kind of file that is read again. What is read then is
  what was written, or the damage is said; anything else is *silent*.

The exit code is 1 where something was lost.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from kdjax.checkpoint import Checkpoints, abstract
from kdjax.errors import UserError
from kdjax.files import write_json
from kdjax.optim import make_optimizer
from kdjax.saved import load_method, load_student, load_variables
from kdjax.state import init_state

_WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "Folder for all runs.")
_METHODS = flags.DEFINE_list("methods", ["mgd", "maskd", "icd", "dmkd", "dfmsd"], "Configs that are killed.")
_KILLS = flags.DEFINE_integer("kills", 20, "Kills of each method.")
_TERMS = flags.DEFINE_integer("terms", 20, "Signals that ask for an end.")
_FLIPS = flags.DEFINE_integer("flips", 1000, "Flipped bits.")
_SEED = flags.DEFINE_integer("seed", 0, "Of moments and places.")

_STEPS = 40
_EVERY = 4
"""Steps between checkpoints."""
_MOST_OF_ONE = 5
"""Times that one run is stopped."""


def command(method: str, workdir: Path) -> list[str]:
    """A config's ``tiny`` run, whose last stage is long enough to be stopped in."""
    return [
        *(sys.executable, "-m", "kdjax.main", f"--config={method}:tiny", f"--workdir={workdir}"),
        *(f"--config.student.steps={_STEPS}", f"--config.student.checkpoint_every={_EVERY}"),
        *("--config.student.log_every=1", "--config.student.eval_every=16", "--config.sinks=()"),
    ]


class End(NamedTuple):
    """How one start of a run ended."""

    code: int
    seconds: float
    """From the signal to the end."""
    printed: str


def stopped(arguments: Sequence[str], number: int, at: int, wait: float) -> End:
    """Starts a run and sends it a signal so many seconds after it has printed that it is behind step ``at``."""
    printed, sent = [], 0.0
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            step = re.match(rf"\[student\] step +(\d+)/{_STEPS}", line)
            if not sent and step and int(step[1]) > at:
                time.sleep(wait)
                process.send_signal(number)
                sent = time.monotonic()
    return End(process.returncode, time.monotonic() - sent if sent else 0.0, "".join(printed))


def finished(workdir: Path) -> dict[str, Any]:
    """What a run came to: the losses of its last stage by step, and the digest of its student."""
    rows = map(json.loads, (workdir / "stages" / "student" / "metrics.jsonl").read_text().splitlines())
    measured = {"wall_time", "images_per_second", "waited"}
    losses: dict[int, dict[str, Any]] = {}
    for row in rows:  # An evaluation that was made up for has a row of its own.
        losses.setdefault(row["step"], {}).update({key: row[key] for key in row.keys() - measured})
    return {"losses": losses, "sha256": json.loads((workdir / "student" / "model.json").read_text())["sha256"]}


def interrupted(method: str, number: int, count: int, workdir: Path, rng: random.Random) -> dict[str, Any]:
    """A run that is stopped by a signal ``count`` times, in as many runs as that takes, beside one that is not.

    Returns:
        "stops", by "codes" how they ended, "runs" that ended, how many of them "equal" the one that nobody stopped, the
        most "seconds" from a signal to the end, and the most steps that were "lost" by one.
    """
    reference = workdir / f"{method}_whole"
    subprocess.run(command(method, reference), check=True, capture_output=True)
    whole = finished(reference)
    codes: Counter[int] = Counter()
    runs = equal = lost = 0
    seconds = 0.0
    while runs == 0 or codes.total() < count:
        own = workdir / f"{method}_{signal.Signals(number).name}_{runs}"
        shutil.rmtree(own, ignore_errors=True)
        for stage in (reference / "stages").iterdir():
            if stage.name != "student":
                shutil.copytree(stage, own / "stages" / stage.name)
        come_to = kills = 0
        while True:
            more = codes.total() < count and kills < _MOST_OF_ONE
            at = rng.randrange(come_to, _STEPS) if more else _STEPS
            end = stopped(command(method, own), number, at, rng.uniform(0, 0.1))
            if went_on := re.search(r"\[student\] continues from the checkpoint of step (\d+)", end.printed):
                lost = max(lost, come_to - int(went_on[1]))
            if end.code == 0:
                break
            codes[end.code] += 1
            kills += 1
            seconds = max(seconds, end.seconds)
            steps = re.findall(rf"\[student\] step +(\d+)/{_STEPS}", end.printed)
            come_to = min(int(steps[-1]), _STEPS - 1) if steps else come_to
        runs += 1
        equal += finished(own) == whole
    return {
        "stops": codes.total(),
        "codes": dict(codes),
        "runs": runs,
        "equal": equal,
        "seconds": seconds,
        "lost": lost,
    }


Read = Callable[[Path], Any]


def kinds(run: Path) -> Iterator[tuple[str, Path, Read]]:
    """Every kind of thing that is read again: its name, its folder, and how it is read."""

    def state(folder: Path) -> Any:
        variables = load_variables(newest)
        like = abstract(init_state(variables, {}, make_optimizer(lambda step: 0.1)))
        with Checkpoints(folder, metric="AP") as checkpoints:
            found = checkpoints.resume(like)
            return found and (int(found.step), found)

    stage = run / "stages" / "student"
    newest = max((stage / "checkpoints").iterdir(), key=lambda path: int(path.name))
    yield "student", run / "student", lambda folder: load_student(folder)[1]
    yield "model", stage / "model", load_variables
    yield "method", stage / "method", load_method
    yield "one checkpoint", newest, load_variables
    small = run.parent / "small"
    if not small.exists():
        variables = load_variables(newest)
        first = init_state(variables, {}, make_optimizer(lambda step: 0.1))
        with Checkpoints(small, metric="AP") as checkpoints:
            for step in (1, 2):
                checkpoints.save(first.replace(step=np.int32(step)), float(step))
    yield "checkpoints", small, state


def flipped(run: Path, count: int, workdir: Path, rng: random.Random) -> dict[str, Counter[str]]:
    """By kind: how often a flipped bit was "said", changed nothing that is read ("harmless"), or was "silent".

    "blocked" is where a run would not go on, with a sound checkpoint beside the damaged one.
    """
    found: dict[str, Counter[str]] = {}
    everything = list(kinds(run))
    for number in range(count):
        name, original, read = everything[number % len(everything)]
        sound = read(original)
        copy = workdir / "flipped" / original.name
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(original, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            after = read(copy)
        except UserError:
            outcome = "blocked" if name == "checkpoints" else "said"
        else:
            outcome = "harmless" if same(after, sound) else "silent"
            if name == "checkpoints" and any(".corrupt" in step.name for step in copy.iterdir()):
                outcome = "said"
        found.setdefault(name, Counter())[outcome] += 1
        if outcome in ("silent", "blocked"):
            print(f"{outcome}: {path.relative_to(copy)}", flush=True)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same, to the bit."""
    ours, theirs = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (one, other))
    return len(ours) == len(theirs) and all(
        path == there and np.array_equal(x, y) for (path, x), (there, y) in zip(ours, theirs, strict=True)
    )


def main(_: Sequence[str]) -> int:
    """Prints each part's figures, and writes them all as ``faults.json``."""
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda found: None  # TensorStore prints what it gives up over damaged files.
    workdir, rng = Path(_WORKDIR.value).absolute(), random.Random(_SEED.value)
    workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    wrong = False
    parts = [(method, signal.SIGKILL, _KILLS.value) for method in _METHODS.value]
    parts.append((_METHODS.value[0], signal.SIGTERM, _TERMS.value))
    for method, number, count in parts:
        if count:
            result = interrupted(method, number, count, workdir, rng)
            results[f"{method} {number.name}"] = result
            wrong |= result["equal"] < result["runs"]
            wrong |= number == signal.SIGTERM and (set(result["codes"]) != {75} or result["lost"] > 0)
            print(f"{method} {number.name}: {result}", flush=True)
    if _FLIPS.value:
        run = workdir / f"{_METHODS.value[0]}_whole"
        if not run.exists():
            subprocess.run(command(_METHODS.value[0], run), check=True, capture_output=True)
        found = flipped(run, _FLIPS.value, workdir, rng)
        results["flips"] = {name: dict(outcomes) for name, outcomes in found.items()}
        wrong |= any(outcomes["silent"] or outcomes["blocked"] for outcomes in found.values())
        print(f"flips: {results['flips']}", flush=True)
    write_json(workdir / "faults.json", results)
    return int(wrong)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    app.run(main)
