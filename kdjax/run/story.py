"""What a workdir tells of its stages, finished or not: read for people, of whatever is there."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from kdjax.charts import Chart
from kdjax.errors import DataError
from kdjax.files import read_json
from kdjax.paths import Path, exists, is_file
from kdjax.plan import Plan, StagePlan
from kdjax.run.record import CONFIG_FILE, PREDICTIONS_FILE, RESULT_FILE, kept_charts, kept_predictions, stage_folder
from kdjax.run.result import restored


class Story(NamedTuple):
    """One stage, as far as it has come."""

    plan: StagePlan
    rows: list[dict[str, Any]]
    """Of ``metrics.jsonl``."""
    metrics: Mapping[str, Any] | None
    """What its model is worth; of one that is not finished, what it was worth last; None before that."""
    at: int | None
    """The step to which that belongs."""
    result: Mapping[str, Any] | None
    """Of a finished stage."""
    environment: Mapping[str, Any]
    """What it was computed with; {} of one that is not begun."""
    kept: list[Any]
    """What its model said of the first images of evaluation, by position."""
    charts: list[Chart]

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        if self.result is not None:
            return f"finished, {self.plan.steps} steps"
        if self.rows:
            return f"at step {self.rows[-1]['step']} of {self.plan.steps}"
        return "begun" if self.environment else "not begun"


def stories(plan: Plan, workdir: Path) -> dict[str, Story]:
    """What a workdir tells of all stages of a run of one seed, by name."""
    return {stage.name: _story(stage, stage_folder(workdir, stage.name)) for stage in plan.stages}


def _story(stage: StagePlan, folder: Path) -> Story:
    rows, result = _rows(folder / "metrics.jsonl"), _read(folder / RESULT_FILE)
    finished = isinstance(result.get("metrics"), dict)
    evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
    metrics, at = None, evaluated[-1]["step"] if evaluated else None
    if finished:
        metrics, at = restored(result["metrics"]), stage.steps
    elif evaluated:
        last = {key.removeprefix("eval/"): x for key, x in evaluated[-1].items() if key.startswith("eval/")}
        metrics = restored({name: x for name, x in last.items() if "/" not in name})
    return Story(
        plan=stage,
        rows=rows,
        metrics=metrics,
        at=at,
        result=result if finished else None,
        environment=_read(folder / CONFIG_FILE).get("environment", {}),
        kept=kept_predictions(folder) if is_file(folder / PREDICTIONS_FILE) else [],
        charts=kept_charts(folder),
    )


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} of one that is not there or damaged."""
    try:
        return read_json(path, dict) if exists(path) else {}
    except DataError as error:
        print(f"{error} The report is without it.", flush=True)
        return {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may be written meanwhile; what is no row is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if exists(path) else ():
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows
