"""Where the scalars of a stage go besides ``metrics.jsonl``; a service's package is imported only where it is named."""

import contextlib
import importlib
import math
import os
import pathlib
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from kdjax.errors import DataError, UserError, parsing
from kdjax.files import read_json, write_json
from kdjax.paths import Path, in_bucket


class Sink(Protocol):
    """Where the scalars of a stage go besides ``metrics.jsonl``; made of the stage's folder and its finished steps."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of one step by name, such as ``loss/box``; some may not be finite."""

    def close(self) -> None:
        """Ends the record."""


class _TensorBoard:
    """Events in the stage's folder; one in a bucket gets all of them again with each step's."""

    package = "tensorboardX"

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        # tensorboardX names a file by the second: a writer that starts within it would overwrite the last one's events.
        suffix = f".{time.time_ns()}"
        # tensorboardX knows buckets, but writes there once more as Python ends, which without a network takes minutes.
        self._folder, self._aside = folder, tempfile.TemporaryDirectory() if in_bucket(folder) else None
        place = self._aside.name if self._aside else str(folder)
        # TensorBoard hides the events of earlier files from ``purge_step`` on.
        self._events = SummaryWriter(place, purge_step=step + 1, filename_suffix=suffix)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        self._copy()

    def close(self) -> None:
        self._events.close()
        self._copy()
        if self._aside:
            self._aside.cleanup()

    def _copy(self) -> None:
        for file in pathlib.Path(self._aside.name).iterdir() if self._aside else ():
            (self._folder / file.name).write_bytes(file.read_bytes())


class _WeightsAndBiases:
    """A run of Weights & Biases for each stage; a stage that is resumed goes on in its run.

    Steps that a killed process recorded after its last checkpoint are not recorded twice: W&B keeps the first.
    """

    package = "wandb"

    def __init__(self, folder: Path, step: int):
        wandb = importlib.import_module(self.package)
        run = _known_run(folder, "wandb", step) or uuid.uuid4().hex
        project = os.environ.get("WANDB_PROJECT", "kdjax")
        # What it keeps of its own on this machine is beside everything else, or where it likes.
        place = None if in_bucket(folder) else str(folder)
        with _starting("wandb"):
            self._run = wandb.init(project=project, id=run, name=_title(folder), dir=place, resume="allow")
        _remember_run(folder, "wandb", run)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow for each stage, in the experiment that MLflow's environment names; resumed as the stage is."""

    package = "mlflow"

    def __init__(self, folder: Path, step: int):
        self._mlflow = importlib.import_module(self.package)
        with _starting("mlflow"):
            run = self._mlflow.start_run(run_id=_known_run(folder, "mlflow", step), run_name=_title(folder))
        _remember_run(folder, "mlflow", run.info.run_id)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        # It refuses names with other characters, of which classes may have some, and not every store knows NaN.
        named = {re.sub(r"[^/\w.\- ]", "_", name): x for name, x in scalars.items() if math.isfinite(x)}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


SINKS: Mapping[str, type[_TensorBoard | _WeightsAndBiases | _MLflow]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
"""What ``config.sinks`` may name; a package is imported only where it is named."""


def check_sinks(names: Sequence[str]) -> None:
    """Raises UserError where the package of a sink is not there."""
    for name in names:
        package = SINKS[name].package
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"config.sinks has {name!r}, but the package {package} cannot be imported ({error}): install it with "
                f"pip install {package}, or leave it out."
            ) from error


_RUNS_FILE = "sinks.json"


def _known_run(folder: Path, sink: str, step: int) -> str | None:
    """What a sink calls the run of a stage that goes on after ``step``; None of a new one."""
    return _known_runs(folder).get(sink) if step else None


def _remember_run(folder: Path, sink: str, run: str) -> None:
    write_json(folder / _RUNS_FILE, _known_runs(folder) | {sink: run})


def _known_runs(folder: Path) -> dict[str, str]:
    """What the sinks call a stage's runs, by sink; {} where that is not known."""
    path = folder / _RUNS_FILE
    try:
        return {sink: str(run) for sink, run in read_json(path, dict).items()} if path.exists() else {}
    except DataError as error:
        print(f"{error} What goes on is recorded in a new run.", flush=True)
        return {}


def _title(folder: Path) -> str:
    """What a person knows a stage's folder ``<workdir>/stages/<name>`` by.

    >>> _title(pathlib.Path("runs/first/stages/student"))
    'first/student'
    """
    return "/".join(part for part in folder.parts[-3:] if part != "stages")


@contextlib.contextmanager
def _starting(sink: str) -> Iterator[None]:
    """Says which sink is at fault where its service cannot be reached."""
    try:
        with parsing():
            yield
    except UserError as error:
        raise UserError(f"config.sinks has {sink!r}, which does not start: {error}.") from error
