"""The table of all methods on the embedded data: ``python -m experiments.table --workdir=runs/table``.

Runs the teacher once a seed and every method's protocol upon it, then writes a Markdown table of the primary metric, AP
of ``--task=detection``, mean and standard deviation over the seeds, with the gain over the identical student alone and
its interval, and below it every run with its commit. Stop it at any time: the same command goes on, and what is
finished is not run again. ``--seeds=1 --methods=none,mgd`` runs a part of it.
"""

import contextlib
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from kdjax.config import config_names, load_config
from kdjax.devices import cache_compilations
from kdjax.errors import UserError
from kdjax.run import pipeline
from kdjax.run.fit import with_keys
from kdjax.run.verdict import judge

VARIANTS = {"detection": "shapes", "segmentation": "segmentation", "classification": "classification"}
"""By task, the variant of configs that has it on the embedded data."""

_WORKDIR = flags.DEFINE_string("workdir", "runs/table", "Folder for all runs.")
_TASK = flags.DEFINE_enum("task", "detection", VARIANTS, "What models learn.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0 to this minus 1.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", None, "Which rows of the table; all by default.")
_OUTPUT = flags.DEFINE_string("output", None, "Markdown file to write; <workdir>/table.md by default.")


def run(name: str, config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """One run of the seed that its config says: what is in the table, its commit and its machine.

    Teachers that the run "none" of this seed has trained are taken over, where they are the same model.

    Args:
        name: of the run: its row in the table, and its folder.
        config: what to run.
        workdir: of all runs.
    """
    seed = config.seed
    own = workdir / f"seed_{seed}" / name
    record = own / "record.json"
    if record.exists():
        return json.loads(record.read_text())
    alone = student_alone(config.task)
    for stage in config.stages:
        shared = workdir / f"seed_{seed}" / "none" / "stages" / stage
        same = shared.exists() and config[stage].model == alone[stage].model
        if same and not config[stage].teacher and not (own / "stages" / stage).exists():
            shutil.copytree(shared, own / "stages" / stage)
    summary = pipeline.run(config, own)
    found = {role: summary[role] and summary[role][summary["primary"]] for role in ("teacher", "student", "baseline")}
    said = {"method": name, "seed": seed, "metric": summary["primary"], **found, **conditions(config)}
    record.write_text(json.dumps(said))
    return json.loads(record.read_text())


def student_alone(task: str) -> ConfigDict:
    """The config that the others are compared with."""
    return load_config(f"none:{VARIANTS[task]}")


def methods_of(task: str) -> tuple[str, ...]:
    """Every config that has a task; the student alone first, with which the others are compared."""
    found = []
    for name in config_names():
        with contextlib.suppress(UserError):
            load_config(f"{name}:{VARIANTS[task]}")
            found.append(name)
    return ("none", *(name for name in found if name != "none"))


def protocol(method: str, task: str, seed: int) -> ConfigDict:
    """The config of a method on the embedded data of a task, with a seed.

    A student that starts from another stage is compared with one that was trained in as many stages, and one that is
    another model than that of ``none`` with its own kind; all others with the run of ``none``.
    """
    config = load_config(f"{method}:{VARIANTS[task]}")
    config.seed = seed
    config.compare = bool(config.student.init) or config.student.model != student_alone(task).student.model
    return config


def judged_last(config: ConfigDict) -> ConfigDict:
    """A config whose stages are evaluated at their end alone."""
    return with_keys(config, {f"{stage}.eval_every": 0 for stage in config.stages})


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each method, then a row for each run."""
    metric = runs[0]["metric"]

    def spread(values: Sequence[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    alone = {run["seed"]: run["student"] for run in runs if run["method"] == "none"}
    lines = [
        f"| method | seeds | teacher {metric} | student {metric} | the identical student alone | gain (95 % of it) |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        row = [f"`{method}`", str(len(own)), *(spread([run[role] for run in own]) for role in ("teacher", "student"))]
        bases: list[Any] = [alone.get(run["seed"]) if run["baseline"] is None else run["baseline"] for run in own]
        if method != "none" and None not in bases:
            verdict = judge([run["student"] for run in own], bases, metric)
            interval = f" ({verdict.interval[0]:+.1f} to {verdict.interval[1]:+.1f})" if verdict.interval else ""
            row += [spread(bases), f"{verdict.mean:+.1f}{interval}"]
        lines.append(" | ".join(["", *row, *[""] * (6 - len(row)), ""]).strip())
    columns = list(runs[0])
    lines += ["", "Every run:", "", " | ".join(["", *columns, ""]).strip(), "|---" * len(columns) + "|"]
    lines += [" | ".join(["", *(_shown(run[column]) for column in columns), ""]).strip() for run in runs]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def conditions(config: ConfigDict) -> dict[str, str]:
    """Weights of the method's terms, commit and machine."""
    student = config.student
    weights = {term: weight for term, weight in student.loss_weights.items() if weight != 1}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores of {platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    return {
        "weights": ", ".join(f"{term} {weight:g}" for term, weight in weights.items()),
        "commit": commit,
        "machine": machine,
    }


def tabulate(rows: Mapping[str, Callable[[int], ConfigDict]]) -> None:
    """Runs what is missing, as the flags say, and writes the table after every run.

    Args:
        rows: of the table, by name: from a seed to the config to run. "none", the student alone, is first.
    """
    logging.set_verbosity(logging.ERROR)
    cache_compilations()
    workdir = Path(_WORKDIR.value)
    output = Path(_OUTPUT.value or workdir / "table.md")
    chosen, runs = _METHODS.value or list(rows), []
    if unknown := [name for name in chosen if name not in rows]:
        raise app.UsageError(f"--methods names {', '.join(unknown)}; there are {', '.join(rows)}.")
    for seed in range(_SEEDS.value):
        for name in chosen:
            runs.append(run(name, rows[name](seed), workdir))
            output.write_text(table(runs))
    print(output.read_text())


def main(_: Sequence[str]) -> None:
    """The table of all methods."""
    tabulate({method: functools.partial(protocol, method, _TASK.value) for method in methods_of(_TASK.value)})


if __name__ == "__main__":
    app.run(main)
