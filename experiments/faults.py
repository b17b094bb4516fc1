"""Kills, signals, flipped bits and bad data, and what is lost by them: ``python -m experiments.faults``.

Everything runs on this machine's CPU, configs as their ``tiny`` runs, at moments and places drawn from a seed:

- *kills*: each method's run, killed (SIGKILL) again and again until it ends, must end as the run that nobody stopped:
  the same losses of every step, and the same weights, to the bit.
- *terms*: the same with SIGTERM, which must end with exit code 75 and lose no step; and with SIGTERM and SIGKILL, a
  second apart.
- *tails*: a run that goes on from the checkpoint of each of its steps must end as the one that nobody stopped.
- *repeats*: so must the same run on one core, with other numbers of threads, and compiled anew.
- *several*: the same kills, of one of several processes; the others must end by themselves, to be started again.
- *moves*: a run that goes on with other numbers of processes and devices must do so from the same state, and see the
  same images.
- *flips*: one bit of a file of a run's folder flipped, of every kind of file that is read again. What is read then is
  what was written, or the damage is said; anything else is *silent*.
- *mutations*: changed annotations and images are read, or what is wrong with them is said.

The exit code is 1 where something was lost.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import app, flags, logging

from experiments import together
from experiments.mutations import met
from experiments.together import Running, Topology
from experiments.witness import seen
from kdjax.checkpoint import Checkpoints, abstract
from kdjax.errors import Exit, UserError
from kdjax.files import write_json
from kdjax.optim import make_optimizer
from kdjax.saved import load_method, load_student, load_variables
from kdjax.state import init_state

_WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "Folder for all runs.")
_METHODS = flags.DEFINE_list("methods", ["mgd", "maskd", "icd", "dmkd", "dfmsd"], "Configs that are killed.")
_KILLS = flags.DEFINE_integer("kills", 20, "Kills of each method.")
_TERMS = flags.DEFINE_integer("terms", 20, "Signals that ask for an end, and as many that are not waited for.")
_TAILS = flags.DEFINE_bool("tails", True, "Let the first method's run go on from each of its steps.")
_REPEATS = flags.DEFINE_bool("repeats", True, "Repeat the first method's run where nothing of it may change.")
_SEVERAL = flags.DEFINE_integer("several", 10, "Kills of the first method in each topology of several processes.")
_MOVES = flags.DEFINE_bool("moves", True, "Let the first method's run go on in other topologies.")
_FLIPS = flags.DEFINE_integer("flips", 1000, "Flipped bits.")
_MUTATIONS = flags.DEFINE_integer("mutations", 2000, "Changed annotation files, JPEG files and PNG files each.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and places of each part.")

_STEPS = 40
_EVERY = 4
"""Steps between checkpoints."""
_MOST_OF_ONE = 5
"""Times that one run is stopped."""
_MIDDLE = 20
"""The step after which a run goes on elsewhere."""
_APART = 1e-6
"""Relative difference of losses of the step after it: sums in another order."""
_GRACE = 1.0
"""Seconds from one signal to the next, of those that are sent one after the other."""
_TOLD = {Exit.AGAIN, -signal.SIGABRT}
"""Exit codes of processes that are to be started again: ours, and that of JAX, which finds a peer dead in C++."""
_ONE = Topology(1, 8)
_SEVERAL_PROCESSES = (Topology(2, 4), Topology(4, 2))
_BEGUN = (_ONE, *_SEVERAL_PROCESSES)
_GONE_ON = (*_BEGUN, Topology(1, 4), Topology(1, 1), Topology(2, 2))


Signals = tuple[signal.Signals, ...]
"""What a process is sent, one after the other."""
_KILL: Signals = (signal.SIGKILL,)
_TERM: Signals = (signal.SIGTERM,)
_IMPATIENT: Signals = (signal.SIGTERM, signal.SIGKILL)


def command(method: str, workdir: Path) -> list[str]:
    """A config's ``tiny`` run, whose last stage is long enough to be stopped in."""
    return [
        *("kdjax.main", f"--config={method}:tiny", f"--workdir={workdir}"),
        *(f"--config.student.steps={_STEPS}", f"--config.student.checkpoint_every={_EVERY}"),
        *("--config.student.log_every=1", "--config.student.eval_every=16", "--config.sinks=()"),
    ]


class End(NamedTuple):
    """How one start of a run ended."""

    code: int
    """Of the process that was sent the signal."""
    others: list[int]
    """Codes of the other processes."""
    seconds: float
    """From the signal to the end of all."""
    printed: str


def stopped(running: Running, signals: Signals, at: int, wait: float, victim: int) -> End:
    """Sends a process of a run signals so many seconds after it was printed that the run is behind step ``at``."""
    printed, sent = [], 0.0
    for line in running.printed:
        printed.append(line)
        step = re.match(rf"\[student\] step +(\d+)/{_STEPS}", line)
        if not sent and step and int(step[1]) > at:
            time.sleep(wait)
            for late, number in enumerate(signals):
                threading.Timer(_GRACE * late, running.processes[victim].send_signal, [number]).start()
            sent = time.monotonic()
    codes, _ = running.end()
    return End(codes.pop(victim), codes, time.monotonic() - sent if sent else 0.0, "".join(printed))


def finished(workdir: Path) -> dict[str, Any]:
    """What a run came to: the losses of its last stage by step, and the digest of its student."""
    rows = map(json.loads, (workdir / "stages" / "student" / "metrics.jsonl").read_text().splitlines())
    measured = {"wall_time", "images_per_second", "waited"}
    losses: dict[int, dict[str, Any]] = {}
    for row in rows:  # An evaluation that was made up for has a row of its own.
        losses.setdefault(row["step"], {}).update({key: row[key] for key in row.keys() - measured})
    return {"losses": losses, "sha256": json.loads((workdir / "student" / "model.json").read_text())["sha256"]}


def whole(method: str, topology: Topology, workdir: Path) -> Path:
    """A run that nobody stops."""
    own = workdir / f"{method}_{topology}_whole"
    if not (own / "summary.json").exists():
        if topology != _ONE:
            begun(method, workdir, own)
        together.run(command(method, own), topology)
    return own


def begun(method: str, workdir: Path, own: Path) -> None:
    """Makes ``own`` a run of which only what comes before its last stage is done, whatever it was."""
    shutil.rmtree(own, ignore_errors=True)
    for stage in (whole(method, _ONE, workdir) / "stages").iterdir():
        if stage.name != "student":
            shutil.copytree(stage, own / "stages" / stage.name)


def named(signals: Signals) -> str:
    """Signals in one word."""
    return "_".join(number.name for number in signals)


def interrupted(
    method: str, signals: Signals, count: int, workdir: Path, rng: random.Random, topology: Topology = _ONE
) -> dict[str, Any]:
    """A run that is stopped by signals ``count`` times, in as many runs as that takes, beside one that is not.

    Of several processes, one that is drawn anew each time is sent the signal.

    Returns:
        "stops", by "codes" how they ended, by "others" how the other processes did, how often all ended "by itself", to
        be started again, as on a machine so busy that they take each other for dead, "runs" that ended, how many of
        them "equal" the one that nobody stopped, the most "seconds" from a signal to the end of all, and the most steps
        that were "lost" by one.
    """
    reference = finished(whole(method, topology, workdir))
    codes: Counter[int] = Counter()
    others: Counter[int] = Counter()
    runs = equal = lost = by_itself = 0
    seconds = 0.0
    while runs == 0 or codes.total() < count:
        own = workdir / f"{method}_{topology}_{named(signals)}_{runs}"
        begun(method, workdir, own)
        come_to = kills = 0
        while True:
            more = codes.total() < count and kills < _MOST_OF_ONE
            at = rng.randrange(come_to, _STEPS) if more else _STEPS
            victim = rng.randrange(topology.processes)
            end = stopped(together.start(command(method, own), topology), signals, at, rng.uniform(0, 0.1), victim)
            if went_on := re.search(r"\[student\] continues from the checkpoint of step (\d+)", end.printed):
                lost = max(lost, come_to - int(went_on[1]))
            if not any((end.code, *end.others)):
                break
            unknown = {*end.others, *([] if end.seconds else [end.code])} - _TOLD
            if unknown:
                print(f"{own} ended with {end.code, end.others}:\n{end.printed[-4000:]}", flush=True)
            if end.seconds:
                codes[end.code] += 1
                others.update(end.others)
                kills += 1
                seconds = max(seconds, end.seconds)
            elif unknown:
                raise RuntimeError(f"{own} ended by itself, and not to be started again.")
            else:
                by_itself += 1
            steps = re.findall(rf"\[student\] step +(\d+)/{_STEPS}", end.printed)
            come_to = min(int(steps[-1]), _STEPS - 1) if steps else come_to
        runs += 1
        equal += finished(own) == reference
    return {
        "stops": codes.total(),
        "codes": dict(codes),
        "others": dict(others),
        "by itself": by_itself,
        "runs": runs,
        "equal": equal,
        "seconds": seconds,
        "lost": lost,
    }


def tails(method: str, workdir: Path) -> dict[str, int]:
    """A run that goes on from the checkpoint of each of its steps: how many "went on", how many of them end "equal"."""
    reference, own = finished(whole(method, _ONE, workdir)), workdir / f"{method}_tail"
    each = workdir / f"{method}_each"
    keeping = ["--config.student.checkpoint_every=1", f"--config.student.keep_checkpoints={_STEPS}"]
    begun(method, workdir, each)
    together.run([*command(method, each), *keeping], _ONE)
    equal = 0
    for step in range(1, _STEPS):
        goes_on_from(step, each, own, method, workdir)
        together.run(command(method, own), _ONE)
        equal += finished(own) == reference
    return {"went on": _STEPS - 1, "equal": equal}


def goes_on_from(step: int, whole_run: Path, own: Path, method: str, workdir: Path) -> None:
    """Makes ``own`` a run that was stopped right after the checkpoint of a step."""
    begun(method, workdir, own)
    stage = Path("stages", "student")
    shutil.copytree(whole_run / stage / "checkpoints" / str(step), own / stage / "checkpoints" / str(step))
    for name in ("config.json", "description.json", "metrics.jsonl"):
        shutil.copy(whole_run / stage / name, own / stage / name)


def repeats(method: str, workdir: Path) -> dict[str, bool]:
    """Whether a run is the same to the bit where only what may not matter differs."""
    reference = finished(whole(method, _ONE, workdir))
    cores = os.sched_getaffinity(0)
    found = {}
    for what, options, environment, used in [
        ("again", [], {}, cores),
        ("compiled anew", [], {"JAX_ENABLE_COMPILATION_CACHE": "false"}, cores),
        ("one core", [], {}, {min(cores)}),
        *((f"{n} threads that prepare images", [f"--config.data.threads={n}"], {}, cores) for n in (1, 4, 8)),
    ]:
        own = workdir / f"{method}_repeated"
        begun(method, workdir, own)
        os.sched_setaffinity(0, used)
        with mock.patch.dict(os.environ, environment):
            together.run([*command(method, own), *options], _ONE)
        os.sched_setaffinity(0, cores)
        found[what] = finished(own) == reference
    return found


def moved(method: str, workdir: Path) -> dict[str, dict[str, Any]]:
    """A run that is begun in each of ``_BEGUN``, and goes on from the middle in each of ``_GONE_ON``.

    Returns:
        by "begun to gone on": whether the "state" that the run went on from is the one that was saved, and the "images"
        and targets of all steps after it those that the run would have seen where it was, both to the bit; and by which
        part of themselves losses differ at most, at the "first" of these steps and at "all" of them.
    """
    found = {}
    for begins in _BEGUN:
        stayed = workdir / f"{method}_{begins}_stayed"
        if not (stayed / "summary.json").exists():
            begun(method, workdir, stayed)
            together.run(witnessed(method, stayed), begins)
        saw, losses = seen(stayed), finished(stayed)["losses"]
        for goes_on in _GONE_ON:
            own = workdir / f"{method}_{begins}_{goes_on}"
            goes_on_from(_MIDDLE, stayed, own, method, workdir)
            together.run(witnessed(method, own), goes_on)
            sees, there = seen(own), finished(own)["losses"]
            gaps = [
                max(
                    abs(there[step][name] - x) / max(abs(x), 1e-6)
                    for name, x in losses[step].items()
                    if name.startswith(("loss", "raw/"))
                )
                for step in range(_MIDDLE + 1, _STEPS + 1)
            ]
            found[f"{begins} to {goes_on}"] = {
                "state": sees.restored == {_MIDDLE: saw.saved[_MIDDLE]},
                "images": all(sees.images[step] == saw.images[step] for step in range(_MIDDLE + 1, _STEPS + 1)),
                "first": gaps[0],
                "all": max(gaps),
            }
            print(f"{begins} to {goes_on}: {found[f'{begins} to {goes_on}']}", flush=True)
    return found


def witnessed(method: str, workdir: Path) -> list[str]:
    """:func:`command` under a witness, which keeps the checkpoints of the second half."""
    _, *given = command(method, workdir)
    return ["experiments.witness", *given, f"--config.student.keep_checkpoints={(_STEPS - _MIDDLE) // _EVERY + 1}"]


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


def drawn(part: str) -> random.Random:
    """What a part draws from, the same whatever other parts are run."""
    return random.Random(f"{_SEED.value} {part}")


def main(_: Sequence[str]) -> int:
    """Prints each part's figures, and writes them all as ``faults.json``."""
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda found: None  # TensorStore prints what it gives up over damaged files.
    workdir = Path(_WORKDIR.value).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    wrong = False
    first = _METHODS.value[0]
    parts = [(method, _KILL, _KILLS.value, _ONE) for method in _METHODS.value]
    parts += [(first, signals, _TERMS.value, _ONE) for signals in (_TERM, _IMPATIENT)]
    parts += [(first, _KILL, _SEVERAL.value, topology) for topology in _SEVERAL_PROCESSES]
    for method, signals, count, topology in parts:
        if count:
            part = f"{method} {named(signals)} {topology}"
            results[part] = result = interrupted(method, signals, count, workdir, drawn(part), topology)
            wrong |= result["equal"] < result["runs"] or not result["others"].keys() <= _TOLD
            wrong |= signals == _TERM and (set(result["codes"]) != {Exit.AGAIN} or result["lost"] > 0)
            print(f"{part}: {result}", flush=True)
    if _TAILS.value:
        results["tails"] = tails(first, workdir)
        wrong |= results["tails"]["equal"] < results["tails"]["went on"]
        print(f"tails: {results['tails']}", flush=True)
    if _REPEATS.value:
        results["repeats"] = repeats(first, workdir)
        wrong |= not all(results["repeats"].values())
        print(f"repeats: {results['repeats']}", flush=True)
    if _MOVES.value:
        results["moves"] = moved(first, workdir)
        wrong |= any(not (x["state"] and x["images"] and x["first"] < _APART) for x in results["moves"].values())
    if _FLIPS.value:
        found = flipped(whole(first, _ONE, workdir), _FLIPS.value, workdir, drawn("flips"))
        results["flips"] = {name: dict(outcomes) for name, outcomes in found.items()}
        wrong |= any(outcomes["silent"] or outcomes["blocked"] for outcomes in found.values())
        print(f"flips: {results['flips']}", flush=True)
    if _MUTATIONS.value:
        results["mutations"] = met(_MUTATIONS.value, workdir, drawn("mutations"))
        wrong |= any("wrong" in results["mutations"][kind] for kind in ("annotations", "jpg", "png"))
        print(f"mutations: {results['mutations']}", flush=True)
    write_json(workdir / "faults.json", results)
    return int(wrong)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    app.run(main)
