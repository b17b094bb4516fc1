"""Every method in one, two and four processes of the same four devices: ``python -m experiments.processes``.

Each config's ``tiny`` run, and how far its losses in several processes are from those in one; the exit code is 1 where
a relative difference is above 1e-4. Everything runs on this machine's CPU. Stop it at any time: finished runs are not
run again.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments import together
from experiments.together import Topology
from kdjax.config import config_names

_DEVICES = 4
_MOST = 1e-4
"""Relative difference of losses: float32 sums of other orders, through a few steps of an optimiser. Divergences of
nearly equal distributions, as LD's, are small differences of such."""

_WORKDIR = flags.DEFINE_string("workdir", "runs/processes", "Folder for all runs.")
_METHODS = flags.DEFINE_list("methods", list(config_names()), "Configs to run.")
_PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes, each a divisor of four.")


def run(method: str, processes: int, workdir: Path) -> Path:
    """Runs a config's ``tiny`` in so many processes; returns its workdir.

    Raises:
        RuntimeError: a process failed; with what it printed.
    """
    own = workdir / f"{method}_{processes}"
    if (own / "summary.json").exists():
        return own
    topology = Topology(processes, _DEVICES // processes)
    together.run(["kdjax.main", f"--config={method}:tiny", f"--workdir={own}"], topology)
    return own


def losses(workdir: Path) -> dict[str, float]:
    """Every loss of every step of every stage, by stage, step and name."""
    found: dict[str, float] = {}
    for path in sorted((workdir / "stages").glob("*/metrics.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            names = [name for name in row if name.startswith(("loss", "raw/"))]
            found |= {f"{path.parent.name}/{row['step']}/{name}": row[name] for name in names}
    return found


def main(_: Sequence[str]) -> int:
    """Prints the largest difference of each run; returns the exit code."""
    worst = 0.0
    for method in _METHODS.value:
        workdir = Path(_WORKDIR.value).absolute()
        alone = losses(run(method, 1, workdir))
        for processes in map(int, _PROCESSES.value):
            together = losses(run(method, processes, workdir))
            assert together.keys() == alone.keys()
            gaps = {name: abs(together[name] - x) / max(abs(x), 1e-6) for name, x in alone.items()}
            name = max(gaps, key=lambda name: gaps[name])
            worst = max(worst, gaps[name])
            print(f"{method} in {processes}: {len(gaps)} losses, at most {gaps[name]:.1e} apart ({name})", flush=True)
    return int(worst > _MOST)


if __name__ == "__main__":
    app.run(main)
