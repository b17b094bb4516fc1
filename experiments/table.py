"""The table of all methods on the embedded data: ``python -m experiments.table --workdir=runs/table``.

Runs the teacher once a seed and every method's protocol upon it, then writes a Markdown table of AP, mean and standard
deviation over the seeds, with the gain over the student alone. Stop it at any time: the same command goes on, and what
is finished is not run again. ``--seeds=1 --methods=none,mgd`` runs a part of it.
"""

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from kdjax import pipeline
from kdjax.config import load_config
from kdjax.devices import cache_compilations

METHODS = ("none", "mimic", "mgd", "maskd", "icd", "dmkd", "dfmsd")

_WORKDIR = flags.DEFINE_string("workdir", "runs/table", "Folder for all runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0 to this minus 1.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Configs of configs/ to run.")
_OUTPUT = flags.DEFINE_string("output", None, "Markdown file to write; <workdir>/table.md by default.")


def run(method: str, seed: int, workdir: Path) -> dict[str, Any]:
    """One method's summary; stages that another method of this seed has trained alike are taken over."""
    config = load_config(f"configs/{method}.py")
    config.seed = seed
    own = workdir / f"seed_{seed}" / method
    for name in config.stages:
        shared = workdir / f"seed_{seed}" / "none" / "stages" / name
        if not config[name].teacher and shared.exists() and not (own / "stages" / name).exists():
            shutil.copytree(shared, own / "stages" / name)
    return pipeline.run(config, own)


def table(summaries: dict[str, list[dict[str, Any]]], steps: str) -> str:
    """A row for each method: AP of its students, and of their teachers."""

    def spread(values: Sequence[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    alone = [summary["student"]["AP"] for summary in summaries.get("none", [])]
    lines = ["| method | seeds | teacher AP | student AP | gain over the student alone |", "|---|---|---|---|---|"]
    for method, runs in summaries.items():
        found = [summary["student"]["AP"] for summary in runs]
        gains = [ap - base for ap, base in zip(found, alone, strict=False)]
        gain = spread(gains) if gains and method != "none" else ""
        teachers = spread([summary["teacher"]["AP"] for summary in runs])
        lines.append(f"| `{method}` | {len(runs)} | {teachers} | {spread(found)} | {gain} |")
    return "\n".join(lines) + f"\n\n{steps}\n"


def conditions() -> str:
    """Commit and machine, for the line below the table."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = jax.devices()[0].device_kind
    return f"Commit {commit}; {os.cpu_count()} cores of {platform.machine()}, device {device}, jax {jax.__version__}."


def main(_: Sequence[str]) -> None:
    """Runs what is missing and writes the table after every run."""
    logging.set_verbosity(logging.ERROR)
    cache_compilations()
    workdir = Path(_WORKDIR.value)
    output = Path(_OUTPUT.value or workdir / "table.md")
    summaries: dict[str, list[dict[str, Any]]] = {}
    for seed in range(_SEEDS.value):
        for method in _METHODS.value:
            summaries.setdefault(method, []).append(run(method, seed, workdir))
            output.write_text(table(summaries, conditions()))
    print(output.read_text())


if __name__ == "__main__":
    app.run(main)
