"""What a person reads during and after a run, and what its files record."""

import contextlib
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clu import parameter_overview
from flax.traverse_util import flatten_dict

from kdjax.files import plain, replace_text
from kdjax.paths import Path, as_path, in_bucket
from kdjax.sinks import SINKS, Sink


class MetricWriter:
    """Appends metrics to ``metrics.jsonl`` in a folder, and hands them to the sinks.

    In a bucket nothing can be appended to: there all rows are written again with each.

    Whatever was recorded after the step at which the writer starts is dropped, so that a run resumed from a checkpoint
    reads as one that was never stopped. One process of a run has one.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        step: int = 0,
        sinks: Sequence[str] = ("tensorboard",),
        clock: Callable[[], float] = time.time,
    ):
        """Opens the file and the sinks, keeping what earlier writers recorded up to ``step``.

        Args:
            workdir: folder for all files; made if missing.
            step: finished steps, 0 for a new run.
            sinks: keys of ``SINKS``.
            clock: seconds since 1970.

        Raises:
            UserError: a sink does not start.
        """
        path = as_path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _recorded(path, step) if path.exists() else ""
        if path.exists():
            replace_text(path, kept)
        self._clock = clock
        with contextlib.ExitStack() as opened:
            self._lines = opened.enter_context(_Rewritten(path, kept) if in_bucket(path) else path.open("a"))
            self._sinks: list[Sink] = []
            for name in sinks:
                self._sinks.append(opened.enter_context(contextlib.closing(SINKS[name](path.parent, step))))
            self._opened = opened.pop_all()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the scalars of one step; the row of ``metrics.jsonl`` is on its way to disk when this returns.

        Args:
            step: finished steps.
            metrics: name to number or to a mapping of the same kind: ``{"loss": {"box": 0.4}}`` becomes ``loss/box``.
                Numbers that are not finite become null in the JSON, whose rows have the time as well.
        """
        scalars = {name: float(value) for name, value in flatten_dict(dict(metrics), sep="/").items()}
        row = {"step": step, "wall_time": self._clock(), **scalars}
        self._lines.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._lines.flush()
        for sink in self._sinks:
            sink.write(int(step), scalars)

    def close(self) -> None:
        """Ends the file and the sinks."""
        self._opened.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Rewritten(io.StringIO):
    """A text that grows in a bucket: each time that it is flushed it is written whole."""

    def __init__(self, path: Path, text: str):
        super().__init__()
        self._path = path
        self.write(text)

    def flush(self) -> None:
        self._path.write_text(self.getvalue())


def _recorded(path: Path, step: int) -> str:
    """The rows of a file up to a step; those that are damaged are dropped, and counted in a sentence.

    One that a kill cut short, which only the last one can be, is as one that was not begun.
    """
    lines = path.read_bytes().split(b"\n")
    steps = [_step(line) for line in lines]
    if damaged := steps[:-1].count(None):
        print(f"{path}: {damaged} of {len(lines) - 1} rows are damaged, and dropped.", flush=True)
    return "".join(f"{line.decode()}\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step)


def _step(line: bytes) -> int | None:
    r"""The step of a row; None of one that is damaged.

    >>> [_step(line) for line in (b'{"step": 2}', b'{"step": "2"}', b"[2]", b'{"step', b"\xff")]
    [2, None, None, None, None]
    """
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


class Rate(NamedTuple):
    """How fast a run goes; NaN before there is anything to measure."""

    images_per_second: float
    """Since the last measurement."""
    waited: float
    """Share of that time in which the devices had nothing to do but to wait for data."""
    eta: float
    """Seconds to the last step, at the mean speed so far."""


class Throughput:
    """Measures images per second and the time left, without compilation and pauses.

    The first measurement only starts the clock: taken after the first step, it leaves the compilation out. Measure
    where the host has waited for the device, for example where it has read a loss.
    """

    def __init__(self, steps: int, batch_size: int, clock: Callable[[], float] = time.perf_counter):
        """Measures nothing yet.

        Args:
            steps: the number of the last step.
            batch_size: images of a step, on all devices.
            clock: seconds, only ever growing.
        """
        self._steps, self._batch_size, self._clock = steps, batch_size, clock
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._paused = self._waited = 0.0
        self._left_out = 0

    def measure(self, step: int) -> Rate:
        """The rate between the last call and this one, which ``step`` steps have finished."""
        now = step - self._left_out, self._clock() - self._paused
        first, last = self._first or now, self._last or now
        waited, self._waited = self._waited, 0.0
        self._first, self._last = first, now
        return Rate(
            images_per_second=self._batch_size * _speed(last, now),
            waited=waited / (now[1] - last[1]) if now[1] > last[1] else math.nan,
            eta=(self._steps - step) / _speed(first, now),
        )

    @property
    def images_per_second(self) -> float:
        """The mean over everything measured so far."""
        return self._batch_size * _speed(self._first, self._last) if self._first and self._last else math.nan

    @contextlib.contextmanager
    def paused(self, steps: int = 0) -> Iterator[None]:
        """Leaves what happens inside out of the measurement: an evaluation, or steps that are compiled meanwhile."""
        self._left_out += steps
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data; enter it when the devices have nothing left to do."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start


def _speed(start: tuple[int, float], end: tuple[int, float]) -> float:
    """Steps per second between two (step, seconds); NaN where no step was made or no time has passed."""
    steps, seconds = end[0] - start[0], end[1] - start[1]
    return steps / seconds if steps > 0 and seconds > 0 else math.nan


def progress_line(
    step: int,
    steps: int,
    losses: Mapping[str, float],
    learning_rate: float,
    images_per_second: float,
    waited: float,
    eta: float,
    *,
    epochs: tuple[float, float],
    later: float = 0.0,
) -> str:
    """One line of training progress.

    Args:
        step: finished steps.
        steps: the number of the last step.
        losses: weighted terms, whose sum is the loss.
        learning_rate: of the last step.
        images_per_second: NaN where not known yet.
        waited: share of the time that the devices waited for data; NaN where not known yet.
        eta: seconds left; NaN where not known yet.
        epochs: how often the data have been seen, and will have been after the last step.
        later: seconds that the stages which follow take, about; 0 where none follows.

    >>> progress_line(120, 800, {"box": 0.41}, 0.01, 31.24, 0.02, 192, epochs=(0.4, 2.6667), later=60)
    'step 120/800  epoch 0.4/2.7  loss 0.410 (box 0.410)  lr 0.0100  31.2 img/s  data 2%  ETA 3:12, all stages 4:12'
    """
    seen, whole = epochs
    rest = f", all stages {duration(eta + later)}" if later else ""
    terms = " ".join(f"{name} {_number(value, 3)}" for name, value in losses.items())
    return (
        f"step {step:{len(str(steps))}}/{steps}  epoch {seen:.1f}/{whole:.1f}"
        f"  loss {_number(sum(losses.values()), 3)} ({terms})  lr {_number(learning_rate, 4)}"
        f"  {known(images_per_second, '.1f')} img/s  data {known(waited, '.0%')}  ETA {duration(eta)}{rest}"
    )


def _number(value: float, decimals: int) -> str:
    """Fixed decimals; with an exponent where they would leave less than two digits, or far too many."""
    fits = value == 0 or 10.0 ** (1 - decimals) <= abs(value) < 1e6 or not math.isfinite(value)
    return f"{value:.{decimals}f}" if fits else f"{value:.1e}"


def spoken(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    """Those of the metrics that have these names, in one line.

    >>> spoken({"AP": 41.04, "AP50": 60.0}, ("AP", "AP50", "mask_AP"))
    'AP 41.0  AP50 60.0'
    """
    return "  ".join(f"{name} {metrics[name]:.1f}" for name in names if name in metrics)


def known(value: float, form: str) -> str:
    """A formatted number, or a dash for NaN."""
    return "-" if math.isnan(value) else format(value, form)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3:12 or 1:03:12; a dash for NaN."""
    if math.isnan(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Row(NamedTuple):
    """One model of the table that ends a run."""

    model: str
    """Its name, for example ``student (mgd)``."""
    metrics: Mapping[str, Any]
    """What its judge said."""
    parameters: int
    """How many it has."""


def summary_table(rows: Sequence[Row], columns: Mapping[str, str], baseline: Row | None = None) -> str:
    """The table that ends a run.

    Args:
        rows: the models in order, the student last.
        columns: headings to metrics; a metric that no model has, or of which nothing can be said, is left out.
        baseline: the same student trained without a teacher: one more row, and below it what the teacher was worth.
    """
    models = [*rows, *([baseline] if baseline else [])]
    columns = {
        heading: name
        for heading, name in columns.items()
        if not all(math.isnan(model.metrics.get(name, math.nan)) for model in models)
    }
    table = [["model", *columns, "params"]]
    for model, metrics, parameters in models:
        values = [known(metrics.get(name, math.nan), ".1f") for name in columns.values()]
        table.append([model, *values, f"{parameters / 1e6:.2f} M"])
    if baseline:
        student = rows[-1].metrics
        gains = [
            known(student.get(name, math.nan) - baseline.metrics.get(name, math.nan), "+.1f")
            for name in columns.values()
        ]
        table.append(["gain", *gains, ""])
    lines = align(table)
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *(line.rstrip() for line in lines[1:])])


def align(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right.

    >>> align([["class", "AP"], ["cat", "41.0"]])
    ['class    AP', 'cat    41.0']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in table
    ]


@dataclasses.dataclass
class _ModuleRow:
    """A row of the parameter table."""

    model: str
    module: str
    parameters: int


def parameter_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """How many parameters each top-level module of each model has, and each model altogether.

    Args:
        models: name to parameter tree, for example ``{"teacher": variables["params"], **state.params}``.
    """
    rows = [
        _ModuleRow(model, module, int(parameter_overview.count_parameters({module: params})))
        for model, modules in models.items()
        for module, params in modules.items()
    ]
    totals = [f"{model} {parameter_overview.count_parameters(dict(modules)):,}" for model, modules in models.items()]
    return f"{parameter_overview.make_table(rows)}\nTotal: {', '.join(totals)}"
