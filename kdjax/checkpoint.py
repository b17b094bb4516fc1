"""The checkpoints of a run, by Orbax: what is kept, what comes back, and what is set aside as damaged.

One class and what it writes and reads: the file is long because a save, its failure and its damage are one matter.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from kdjax.arrays import DamagedError, OthersError, digests, read_arrays
from kdjax.devices import globalize
from kdjax.errors import StorageError, UnreachedError, UserError
from kdjax.files import AWAY_WORDS, refusal, seal, sync, unread
from kdjax.paths import Path, absolute, as_path, in_bucket, is_away, move, remove, set_aside
from kdjax.processes import are_several, gather, is_main, on_main
from kdjax.state import TrainState

STUDENT, REST, RECORD = "student", "rest", "record"
"""The items of a checkpoint: two of arrays, and what they were as they were saved."""
RECORD_FILE = "record.json"
"""In the last of them: the step, its metrics, and by item and path the shape and the digest of each array."""
_TEMPORARY = ".orbax-checkpoint-tmp"
"""In the names of folders that Orbax still writes."""
_COMMITTED = "commit_success.txt"
"""Orbax's last file of a folder in a bucket."""
_REPLACED = ".replaced"
"""Behind the number of a step that is being saved anew."""
_MOST_FAILURES = 3
"""Saves in a row that fail until a run ends."""


class Best(NamedTuple):
    """The best checkpoint."""

    step: int
    value: float
    """Of the metric."""


class Checkpoints:
    """The checkpoints of one run: asynchronous, atomic; the newest ``keep`` and the best one stay.

    Every step holds the student's variables apart from the rest, so that they can be read without the method or the
    optimiser, and the digests of all arrays, which they are held against whenever they are read. A step that is damaged
    is set aside, as ``<step>.corrupt``, which is said. Where saving fails, the earlier ones stay as they are, and the
    next save tries again; of several processes the one that cannot save ends, for the others wait for its part.

    A context manager: at its end everything is on disk.
    """

    def __init__(self, folder: Path, *, keep: int = 2, metric: str, higher_is_better: bool = True):
        """Opens or makes a folder of checkpoints; what is seen to be damaged without reading arrays is set aside.

        Args:
            folder: of the run.
            keep: how many of the newest stay.
            metric: the name of what says which is best.
            higher_is_better: of that metric.
        """
        self._metric, self._keep = metric, keep
        self._folder = absolute(as_path(folder))
        best = functools.partial(_merit, metric=metric, sign=1 if higher_is_better else -1)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._options = ocp.CheckpointManagerOptions(best_fn=best, preservation_policy=policy)
        self._saving = False
        self._saved: int | None = None
        """The last step."""
        self._failures = 0
        """In a row."""
        self._refused: type[UserError] = StorageError
        """What the last of them is."""
        self._stuck = False
        """Whether threads of this process wait for what never comes."""
        self._manager = self._opened()
        self._inode = None if in_bucket(self._folder) else self._folder.stat().st_ino
        self._lost = any(on_main(lambda: [path.name for path in self._folder.glob("*.corrupt*")]))

    def _opened(self) -> "_Manager":
        on_main(lambda: _tidy(self._folder))
        handlers = {name: ocp.StandardCheckpointHandler() for name in (STUDENT, REST)}
        return _Manager(str(self._folder), item_handlers={**handlers, RECORD: _RecordHandler()}, options=self._options)

    def check_room(self, state: TrainState) -> None:
        """Refuses to begin where there is no room for the checkpoints: the newest, the best and the one being saved.

        Raises:
            StorageError: with both figures.
        """
        each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

        def check() -> None:
            if in_bucket(self._folder) or not (usage := shutil.disk_usage(self._folder)).total:
                return  # Some file systems do not say.
            files = (file for step in self._folder.glob("[0-9]*") if step.name.isdecimal() for file in step.rglob("*"))
            free = usage.free + sum(file.stat().st_size for file in files if file.is_file())
            if free < (needed := (self._keep + 2) * each):
                raise StorageError(
                    f"{self._folder} has room for {free / 1e6:.0f} MB, but the {self._keep} newest checkpoints, the "
                    f"best and the one being saved need {needed / 1e6:.0f} MB: make room, keep fewer, or take another "
                    "--workdir."
                )

        on_main(check)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return on_main(self._manager.latest_step)

    def value(self, step: int) -> float | None:
        """Of the metric that a step was saved with; None without one."""

        def read() -> float | None:
            metrics = self._manager.metrics(step)
            return metrics[self._metric] if metrics else None

        return on_main(read)

    def best(self) -> Best | None:
        """The best of the steps that were saved with a metric; None without one."""
        self.settle()
        step = on_main(self._manager.best_step)
        value = None if step is None else self.value(step)
        return None if step is None or value is None else Best(step, value)

    def save(self, state: TrainState, value: float | None = None) -> None:
        """Starts saving ``state`` under its step; with the value of its metric it is a candidate for the best.

        A step that is there already is saved anew.

        Raises:
            StorageError: its folder is gone, or the storage has refused several times in a row.
            UnreachedError: a bucket was out of reach as often.
        """
        self.settle()
        self._check_folder()
        # A metric of nothing is NaN, which must not count as the best.
        metrics = {self._metric: value} if value is not None and math.isfinite(value) else None
        step, items = int(state.step), _items(state)
        if step in self._manager.all_steps():
            on_main(lambda: move(self._folder / str(step), self._folder / f"{step}{_REPLACED}", _COMMITTED))
            self._manager.reload()
        record = _Record({"step": step, "metrics": metrics}, jax.device_get(items) if is_main() else {})
        saved = {name: ocp.args.StandardSave(item) for name, item in globalize(items).items()}
        args = ocp.args.Composite(**saved, **{RECORD: record})
        self._saved = step
        self._saving = self._attempt(lambda: self._manager.save(step, args=args, metrics=metrics, force=True))

    def settle(self) -> bool:
        """Waits for what is being saved; whether what was saved last is on disk.

        Raises:
            StorageError: as :meth:`save`.
        """
        if self._saving:
            self._saving = False
            if self._attempt(self._finish):
                self._failures = 0
                on_main(lambda: _drop_replaced(self._folder))
        return self._failures == 0

    def commit(self, state: TrainState, value: float | None = None) -> None:
        """As :meth:`save`, unless that step was saved last, and waits until it is on disk.

        Raises:
            StorageError: it cannot be saved.
            UnreachedError: as :meth:`save`.
        """
        if self._saved != int(state.step) or not self.settle():
            self.save(state, value)
        if not self.settle():
            raise self._refused(f"The checkpoint of step {int(state.step)} cannot be saved in {self._folder}.")

    def _finish(self) -> None:
        while are_several() and self._manager.is_saving_in_progress():
            if self._manager.failure:
                raise self._manager.failure
            time.sleep(0.05)
        self._manager.wait_until_finished()

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Whether the storage let this process do its work."""
        try:
            work()
        except Exception as error:
            what = refusal(error, self._folder) or "it is gone" * (not self._is_there())
            if not what:
                raise
            away = is_away(error) or any(words in str(error) for words in AWAY_WORDS)
            self._refused = UnreachedError if away else StorageError
            self._recover(what)
            return False
        return True

    def _recover(self, what: str) -> None:
        """Removes what is left of a save that failed, so that the next one can be tried."""
        self._failures += 1
        self._stuck = are_several()
        if not self._stuck:
            self._check_folder()
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._opened()
        if self._stuck or self._failures >= _MOST_FAILURES:
            times = "" if self._stuck else f" {self._failures} times in a row"
            raise self._refused(
                f"No checkpoint could be saved in {self._folder}{times} ({what}); the earlier ones are intact. Make "
                "room, or mend it; the same command goes on from there."
            )
        print(
            f"A checkpoint could not be saved in {self._folder} ({what}); the earlier ones are intact, and the next "
            "save tries again.",
            flush=True,
        )

    def _is_there(self) -> bool:
        """Whether the folder is the one that was opened: one that is gone Orbax may have made anew, without steps."""
        if in_bucket(self._folder):
            return True
        # Some file systems number a folder anew, and somebody may have made room by removing steps.
        same = self._folder.is_dir() and self._folder.stat().st_ino == self._inode
        return same or any((self._folder / str(step)).exists() for step in self._manager.all_steps())

    def _check_folder(self) -> None:
        if not on_main(self._is_there):
            raise StorageError(f"{self._folder} is not there any more: bring it back, or begin in another --workdir.")

    def is_empty(self) -> bool:
        """Whether nothing was ever saved here."""
        return self.latest() is None and not self._lost

    def resume(self, state: TrainState) -> TrainState:
        """The newest state that is sound, as :meth:`restore` has it.

        Raises:
            UserError: as :meth:`restore`.
            DamagedError: there is none.
        """
        return self._sound(state, self.latest)

    def restore_best(self, state: TrainState) -> TrainState:
        """The best state that is sound, as :meth:`restore` has it.

        Raises:
            UserError: as :meth:`restore`.
            DamagedError: there is none.
        """
        return self._sound(state, lambda: None if (best := self.best()) is None else best.step)

    def _sound(self, state: TrainState, find: Callable[[], int | None]) -> TrainState:
        """The state of the first step that ``find`` gives and that is sound; those that are not are set aside."""
        while (step := find()) is not None:
            if (restored := self.restore(state, step)) is not None:
                return restored
        raise DamagedError(
            f"No checkpoint in {self._folder} is sound: put a sound one in its place, or delete that folder to begin "
            "the stage anew."
        )

    def restore(self, state: TrainState, step: int) -> TrainState | None:
        """The saved state of a step, placed as the arrays of ``state`` are; None of one that is damaged, and set aside.

        Of ``state``, :func:`abstract` suffices.

        Raises:
            UserError: it belongs to another model: it has other parameters or shapes than ``state``.
        """
        self.settle()
        folder, restored, words = self._folder / str(step), None, ""
        try:
            restored = _read_state(folder, state)
        except DamagedError as error:
            words = str(error)
        words = next(filter(None, gather(words)), "")
        if not words:
            return restored
        on_main(lambda: _set_aside(folder, words))
        self._manager.reload()
        return None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if self._stuck:
            return
        with contextlib.suppress(Exception):  # One error is enough, and the others may not be there any more.
            self._manager.close()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.settle()
        self._manager.close()


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and places of a state's arrays, without the arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def _items(state: TrainState) -> dict[str, Any]:
    """A state in the two parts in which it is saved."""
    student = {"params": state.params["student"], "batch_stats": state.batch_stats}
    return {STUDENT: student, REST: state.replace(params={"method": state.params["method"]}, batch_stats={})}


def _merit(metrics: Mapping[str, float], *, metric: str, sign: int) -> float:
    """More is better."""
    return sign * metrics[metric]


class _Manager(ocp.CheckpointManager):
    failure: Exception | None = None
    """What went wrong with the arrays of this process, while Orbax goes on to wait for the others."""

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def reached_preemption(self, step: int) -> bool:
        """Never: when to stop is agreed on elsewhere."""
        return False


class _RecordHandler(ocp.AsyncCheckpointHandler):
    """Writes ``RECORD_FILE`` as an item of a checkpoint; the digests are made while the training goes on."""

    async def async_save(self, directory: epath.Path, args: "_Record") -> list[ocp.future.Future]:
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name="record")]

    async def _write(self, directory: epath.Path, args: "_Record") -> None:
        if is_main():
            record = {**args.known, **{item: digests(arrays) for item, arrays in args.arrays.items()}}
            (directory / RECORD_FILE).write_text(json.dumps({**record, "sha256": seal(record)}, indent=1) + "\n")

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Nobody saves checkpoints at once."""
        raise NotImplementedError

    def restore(self, *args: Any, **kwargs: Any) -> None:
        """Nobody reads it through Orbax."""
        raise NotImplementedError


@ocp.args.register_with_handler(_RecordHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Record(ocp.args.CheckpointArgs):
    """What a checkpoint is about, and the arrays, on the host, whose digests are to be written with it."""

    known: Mapping[str, Any]
    arrays: Mapping[str, Any]


def _tidy(folder: Path) -> None:
    """Removes what is left of saves that were cut off, and sets aside steps that can be seen to be damaged."""
    if not folder.is_dir():
        return
    _drop_replaced(folder)
    for step in sorted(folder.iterdir()):
        unfinished = in_bucket(step) and step.name.isdecimal() and not (step / _COMMITTED).exists()
        if unfinished or _TEMPORARY in step.name:
            remove(step)
        elif step.name.isdecimal():
            try:
                recorded(step)
            except DamagedError as error:
                _set_aside(step, str(error))


def _drop_replaced(folder: Path) -> None:
    """Removes what steps were before they were saved anew, or puts it back where that was cut off."""
    for former in folder.glob(f"*{_REPLACED}"):
        step = former.with_name(former.name.removesuffix(_REPLACED))
        if step.exists() and (not in_bucket(step) or (step / _COMMITTED).exists()):
            remove(former)
        else:
            remove(step)
            move(former, step, _COMMITTED)
    sync(folder)


def _set_aside(step: Path, words: str) -> None:
    """Keeps a damaged step under a name under which nobody looks for one."""
    name = set_aside(step).name
    print(f"{words.rstrip('.')}: it is set aside as {name}, and the newest sound checkpoint counts.", flush=True)


def recorded(step: Path) -> dict[str, Any] | None:
    """What a checkpoint's record says; None where it has none, as those of version 0.1.

    Raises:
        DamagedError: it cannot be what was saved.
    """
    what = f"The checkpoint of step {step.name} in {step.parent} is damaged"
    if missing := [item for item in (STUDENT, REST) if not (step / item).is_dir()]:
        raise DamagedError(f"{what}: it lacks {' and '.join(missing)}.")
    file, metrics = step / RECORD / RECORD_FILE, step / "metrics" / "metrics"
    try:
        judged = json.loads(metrics.read_text()) if metrics.exists() else None
        if not file.exists():
            return None
        record = json.loads(file.read_text())
        if record.pop("sha256") != seal(record):
            raise DamagedError(f"{what}: what {file.name} says is not what was written.")
    except (OSError, ValueError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        if words := unread(error):
            raise StorageError(f"{step} cannot be read ({words}); mend that, and start again.") from error
        raise DamagedError(f"{what}: {metrics.name} or {file.name} cannot be read ({error}).") from error
    if str(record["step"]) != step.name or record["metrics"] != judged:
        raise DamagedError(f"{what}: {file.name} is of step {record['step']}, with the metrics {record['metrics']}.")
    return record


def _read_state(step: Path, state: TrainState) -> TrainState:
    """What :meth:`Checkpoints.restore` reads.

    Raises:
        DamagedError: it is not what was saved.
        UserError: it is of another model.
    """
    record, read = recorded(step), {}
    for item, like in _items(abstract(state)).items():
        try:
            read[item] = read_arrays(step / item, like, record and record[item])
        except OthersError as error:
            raise UserError(
                f"The checkpoint of step {step.name} in {step.parent} belongs to another model, method or optimiser "
                f"({error}); choose another --workdir, or delete that folder."
            ) from error
    student, rest = read[STUDENT], read[REST]
    if str(int(rest.step)) != step.name:
        raise DamagedError(
            f"The checkpoint of step {step.name} in {step.parent} is damaged: it is of step {rest.step}."
        )
    return rest.replace(params={"student": student["params"], **rest.params}, batch_stats=student["batch_stats"])
