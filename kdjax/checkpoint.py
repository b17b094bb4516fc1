"""Orbax behind one file: a run's checkpoints, and the trained model as a folder of its own.

That is why the file is long: whatever Orbax raises, or leaves half done, is met in here.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from kdjax import __version__
from kdjax.data.batches import padded
from kdjax.data.sizing import Size, Sizing, sizing
from kdjax.devices import globalize
from kdjax.errors import DataError, StorageError, UserError, parsing
from kdjax.files import refusal, sync
from kdjax.models import build_model
from kdjax.paths import Path, absolute, as_path, files_in, in_bucket, move, remove
from kdjax.processes import gather, is_main, on_main
from kdjax.state import TrainState
from kdjax.types import Model

MODEL_FILE = "model.json"
METHOD_FILE = "method.json"
STAGE_FILE = "description.json"
"""In the folder of a stage: what its checkpoints hold, as ``MODEL_FILE`` has it."""
ARRAYS_FOLDER = "variables"
_DESCRIPTIONS = {MODEL_FILE: {"model", "class_names", "image_size", "sha256"}, METHOD_FILE: {"method", "sha256"}}
"""What describes a folder of arrays, and the keys that it cannot do without."""
STUDENT, REST, RECORD = "student", "rest", "record"
"""The items of a checkpoint: two of arrays, and what they were as they were saved."""
RECORD_FILE = "record.json"
"""In the last of them: the step, its metrics, and by item and path the shape and the digest of each array."""
_TEMPORARY = ".orbax-checkpoint-tmp"
"""In the names of folders that Orbax still writes."""
_COMMITTED = "commit_success.txt"
"""Orbax's last file of a folder in a bucket."""


def _items(state: TrainState) -> dict[str, Any]:
    """A state in the two parts in which it is saved."""
    student = {"params": state.params["student"], "batch_stats": state.batch_stats}
    return {STUDENT: student, REST: state.replace(params={"method": state.params["method"]}, batch_stats={})}


class DamagedError(DataError):
    """What was saved is not there any more, or not as it was saved."""


class Best(NamedTuple):
    """The best checkpoint."""

    step: int
    value: float
    """Of the metric."""


def _merit(metrics: Mapping[str, float], *, metric: str, sign: int) -> float:
    """More is better."""
    return sign * metrics[metric]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: when to stop is agreed on elsewhere."""
        return False


class _RecordHandler(ocp.AsyncCheckpointHandler):
    """Writes ``RECORD_FILE`` as an item of a checkpoint; the digests are made while the training goes on."""

    async def async_save(self, directory: epath.Path, args: "_Record") -> list[ocp.future.Future]:
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name="record")]

    async def _write(self, directory: epath.Path, args: "_Record") -> None:
        if is_main():
            record = {**args.known, **{item: _digests(arrays) for item, arrays in args.arrays.items()}}
            (directory / RECORD_FILE).write_text(json.dumps({**record, "sha256": _seal(record)}, indent=1) + "\n")

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


class Checkpoints:
    """The checkpoints of one run: asynchronous, atomic; the newest ``keep`` and the best one stay.

    Every step holds the student's variables apart from the rest, so that they can be read without the method or the
    optimiser, and the digests of all arrays, which they are held against whenever they are read. A step that is damaged
    is set aside, as ``<step>.corrupt``, which is said. Where saving fails, the earlier ones stay as they are, and the
    next save tries again.

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
        self._metric = metric
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
        self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        on_main(lambda: _tidy(self._folder))
        handlers = {name: ocp.StandardCheckpointHandler() for name in (STUDENT, REST)}
        return _Manager(str(self._folder), item_handlers={**handlers, RECORD: _RecordHandler()}, options=self._options)

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
        """
        self.settle()
        # A metric of nothing is NaN, which must not count as the best.
        metrics = {self._metric: value} if value is not None and math.isfinite(value) else None
        step, items = int(state.step), _items(state)
        record = _Record({"step": step, "metrics": metrics}, jax.device_get(items) if is_main() else {})
        saved = {name: ocp.args.StandardSave(item) for name, item in globalize(items).items()}

        def begin() -> None:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.Composite(**saved, **{RECORD: record}), metrics=metrics, force=True)

        self._saved, self._saving = step, self._attempt(begin)

    def settle(self) -> bool:
        """Waits for what is being saved; whether what was saved last is on disk.

        Raises:
            StorageError: as :meth:`save`.
        """
        if self._saving:
            self._saving = False
            if self._attempt(self._manager.wait_until_finished):
                self._failures = 0
                on_main(lambda: sync(self._folder))
        return self._failures == 0

    def commit(self, state: TrainState, value: float | None = None) -> None:
        """As :meth:`save`, unless that step was saved last, and waits until it is on disk.

        Raises:
            StorageError: it cannot be saved.
        """
        if self._saved != int(state.step) or not self.settle():
            self.save(state, value)
        if not self.settle():
            raise StorageError(f"The checkpoint of step {int(state.step)} cannot be saved in {self._folder}.")

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Whether the storage let all processes do their work."""
        what = ""
        try:
            work()
        except Exception as error:
            what = refusal(error, self._folder)
            if not what:
                raise
        what = next(filter(None, gather(what)), "")
        if what:
            self._recover(what)
        return not what

    def _recover(self, what: str) -> None:
        """Removes what is left of a save that failed; the next one can be tried."""
        self._failures += 1
        if not on_main(self._folder.is_dir):
            raise StorageError(f"{self._folder} is not there any more ({what}); bring it back, or begin elsewhere.")
        if self._failures >= _MOST_FAILURES:
            raise StorageError(
                f"No checkpoint could be saved in {self._folder} {self._failures} times in a row ({what}); the earlier "
                "ones are intact. Make room, or mend it; the same command goes on from there."
            )
        print(
            f"A checkpoint could not be saved in {self._folder} ({what}); the earlier ones are intact, and the next "
            "save tries again.",
            flush=True,
        )
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._opened()

    def resume(self, state: TrainState) -> TrainState | None:
        """The newest state that is sound, as :meth:`restore` has it; None without one."""
        while (step := self.latest()) is not None:
            if (restored := self.restore(state, step)) is not None:
                return restored
        return None

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
        with contextlib.suppress(Exception):  # One error is enough, and the others may not be there any more.
            self._manager.close()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.settle()
        self._manager.close()


_MOST_FAILURES = 3
"""Saves in a row that fail until a run ends."""


def _tidy(folder: Path) -> None:
    """Removes what is left of saves that were cut off, and sets aside steps that can be seen to be damaged."""
    for step in sorted(folder.iterdir()) if folder.is_dir() else ():
        unfinished = in_bucket(step) and step.name.isdecimal() and not (step / _COMMITTED).exists()
        if unfinished or _TEMPORARY in step.name:
            remove(step)
        elif step.name.isdecimal():
            try:
                _recorded(step)
            except DamagedError as error:
                _set_aside(step, str(error))


def _set_aside(step: Path, words: str) -> None:
    """Keeps a damaged step under a name under which nobody looks for one."""
    taken = {path.name for path in step.parent.iterdir()}
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    name = next(name for suffix in suffixes if (name := f"{step.name}.corrupt{suffix}") not in taken)
    move(step, step.with_name(name))
    print(f"{words.rstrip('.')}: it is set aside as {name}, and the newest sound checkpoint counts.", flush=True)


def _recorded(step: Path) -> dict[str, Any] | None:
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
        if record.pop("sha256") != _seal(record):
            raise DamagedError(f"{what}: what {file.name} says is not what was written.")
    except (OSError, ValueError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
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
    record, read = _recorded(step), {}
    for item, like in _items(abstract(state)).items():
        try:
            read[item] = _read_arrays(step / item, like, record and record[item])
        except _OthersError as error:
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


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and places of a state's arrays, without the arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def describe_model(
    model: Mapping[str, Any],
    class_names: Sequence[str],
    image_size: Size | Sizing,
    category_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """What is written beside a detector's arrays, so that it can be rebuilt: plain JSON.

    Args:
        model: the plain dict that :func:`kdjax.models.build_model` takes.
        class_names: names of the labels, in order.
        image_size: height and width in pixels that the model was trained at; or a sizing, how images were scaled.
        category_ids: what the annotations that it learnt from call the labels, in order; () where that is not known.
    """
    scaled = sizing(image_size)
    return {
        "model": dict(model),
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "image_size": list(scaled.shapes[0]),
        "sizing": scaled.described(),
    }


def sizing_of(folder: str | os.PathLike) -> Sizing | None:
    """How images were scaled for a model; None where its folder does not say, as a checkpoint of version 0.1.

    Args:
        folder: of a model, or one step of a run's checkpoints.

    Raises:
        UserError: if ``folder`` is neither, or damaged.
    """
    description = describe(folder)
    if "image_size" not in description:
        return None
    try:
        return Sizing.of(description.get("sizing", {"image_size": [description["image_size"]]}))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged: it does not say how its images were scaled; take an undamaged copy of that folder."
        ) from error


def save_model(folder: Path, variables: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Writes a trained detector alone, with the config that rebuilds it: what :func:`load_student` reads.

    The folder appears whole or not at all; one that exists is replaced.

    Args:
        folder: where to.
        variables: {"params": ..., "batch_stats": ...}.
        description: made by :func:`describe_model`.
    """
    _write(folder, variables, MODEL_FILE, description)


def save_method(folder: Path, params: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Writes what a method learnt, for a later stage to take over: what :func:`load_method` reads.

    The folder appears whole or not at all; one that exists is replaced.

    Args:
        folder: where to.
        params: the method's parameters.
        method: the plain dict that :func:`kdjax.methods.build_method` takes.
    """
    _write(folder, params, METHOD_FILE, {"method": dict(method)})


def load_method(folder: str | os.PathLike) -> dict[str, Any]:
    """The parameters in a folder that :func:`save_method` wrote.

    Raises:
        UserError: if it is no such folder, or damaged.
    """
    if not (as_path(folder) / METHOD_FILE).is_file():
        raise UserError(f"{folder} holds no method; give the folder `method` of a stage whose method learns something.")
    return _read(folder, describe(folder))


def _write(folder: Path, arrays: Mapping[str, Any], file: str, description: Mapping[str, Any]) -> None:
    """Writes a folder of arrays and the file that describes them, all at once."""
    # Two trainings of one config differ by the digest: whatever is learnt from these arrays is remembered with it.
    description = {"kdjax": __version__, **description, "sha256": _digest(arrays)}
    with replacing(folder) as partial:
        with _alone() as checkpointer:
            # On the host: of arrays on the devices of one process among several Orbax wants nothing to do.
            checkpointer.save(partial / ARRAYS_FOLDER, dict(jax.device_get(arrays)))
        (partial / file).write_text(json.dumps(description, indent=2) + "\n")


def _digest(arrays: Any) -> str:
    """Hexadecimal sha256 of all arrays' bytes, in the order of their paths."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def _digests(arrays: Any) -> dict[str, str]:
    """By path: what an array is, and the hexadecimal sha256 of its bytes."""
    kinds, leaves = _kinds(arrays), jax.tree.leaves(arrays)
    return {path: f"{kind} {_digest(x)}" for (path, kind), x in zip(kinds.items(), leaves, strict=True)}


def _seal(record: Mapping[str, Any]) -> str:
    """Hexadecimal sha256 of a record, however it is laid out in a file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _alone() -> ocp.StandardCheckpointer:
    """Writes and reads arrays for this process, whatever others do meanwhile."""
    me = jax.process_index()
    # The prefix keeps its barriers apart from those of another process that does the same.
    alone = ocp.options.MultiprocessingOptions(me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}")
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``folder`` at the end: it appears whole or not at all.

    Nothing moves in a bucket: there it is filled in its place. What describes it goes first and has to come last, and
    without that it is none.
    """
    folder = absolute(as_path(folder))
    if in_bucket(folder):
        for file in _DESCRIPTIONS:
            (folder / file).unlink(missing_ok=True)
        remove(folder)
        yield folder
        return
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    partial.mkdir(parents=True)
    yield partial
    remove(folder)
    partial.rename(folder)


def copy_model(source: Path, folder: Path) -> None:
    """Writes a model folder again elsewhere, as :func:`save_model` does; both on this machine or both in a bucket."""
    with replacing(folder) as partial:
        if not in_bucket(source):
            shutil.copytree(source, partial, dirs_exist_ok=True)
            return
        for file in sorted(files_in(source), key=lambda file: file.name == MODEL_FILE):
            (partial / file.relative_to(source)).write_bytes(file.read_bytes())


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder of arrays says of itself.

    Args:
        folder: of a model ("model", "class_names", "image_size", "sizing": how images were scaled, which version 0.1
            did not write, "sha256", "kdjax": the version that wrote it), of a method ("method", "sha256", "kdjax"), or
            one step of a run's checkpoints ("checkpoint": its path, and the model's "model", "class_names",
            "image_size" and "sizing", which version 0.1 did not write).

    Raises:
        UserError: if ``folder`` is none of them.
    """
    for file, keys in _DESCRIPTIONS.items():
        path = as_path(folder) / file
        if path.exists():
            return _described(path, keys)
    step = absolute(as_path(folder))
    if all((step / item).is_dir() for item in (STUDENT, REST)):
        stage = step.parents[1] / STAGE_FILE
        return {"checkpoint": str(step), **(_described(stage, set()) if stage.exists() else {})}
    raise UserError(
        f"{folder} holds no kdjax model; give the folder `student` of a finished run's workdir, or one step in the "
        "`checkpoints` of a stage."
    )


def _described(path: Path, keys: Set[str]) -> dict[str, Any]:
    """What a file says of the arrays beside it, ``keys`` at least."""
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(description, dict) or keys - description.keys():
        missing = keys - set(description if isinstance(description, dict) else ())
        raise UserError(
            f"{path} is damaged: it lacks {', '.join(sorted(missing))}; take an undamaged copy of that folder."
        )
    return description


def load_variables(folder: str | os.PathLike) -> dict[str, Any]:
    """The variables {"params": ..., "batch_stats": ...} in a model folder or in one step of a run's checkpoints.

    Raises:
        UserError: if ``folder`` is neither, or damaged.
    """
    return _read(folder, describe(folder))


def _read(folder: str | os.PathLike, description: Mapping[str, Any], like: Any = None) -> dict[str, Any]:
    """The arrays in a folder, on the default device, held against their digests where the folder has some.

    Args:
        folder: of a model, of a method, or of one step of a run's checkpoints.
        description: what :func:`describe` says of it.
        like: the shapes and dtypes that the arrays must have; None takes whatever there is.

    Raises:
        UserError: they are others than wanted.
        DamagedError: they cannot be read, or are not those that were saved.
    """
    folder = absolute(as_path(folder))
    if "checkpoint" in description:
        record = _recorded(folder)
        return _read_arrays(folder / STUDENT, None, record and record[STUDENT])
    arrays = folder / ARRAYS_FOLDER
    try:
        read = _read_arrays(arrays, like)
    except _OthersError as error:
        raise UserError(f"The arrays in {arrays} are not those of the model in {MODEL_FILE}: {error}.") from error
    if description["sha256"] != _digest(read):
        raise DamagedError(
            f"The arrays in {arrays} are damaged: their sha256 is not the one that was saved; {_ADVICE}."
        )
    return read


_ADVICE = "take an undamaged copy of that folder, or make it anew"


class _OthersError(Exception):
    """Arrays are sound, and others than wanted; it says which."""


def _read_arrays(arrays: Path, like: Any = None, known: Mapping[str, str] | None = None) -> Any:
    """The arrays in a folder of Orbax's, for this process alone.

    Args:
        arrays: the folder.
        like: their shapes and dtypes and where they are to be; None for all that there are, on the default device.
        known: what :func:`_digests` said of them before they were saved.

    Raises:
        DamagedError: they cannot be read, or are not those that were saved.
        _OthersError: they are, and others than wanted.
    """
    what = f"The arrays in {arrays}"
    before = {path: kind.partition(" ")[0] for path, kind in known.items()} if known is not None else None
    if like is not None and before is not None and (misfits := _misfits(before, _kinds(like))):
        raise _OthersError(misfits)
    with _alone() as checkpointer:
        with _orbax(what):
            saved = checkpointer.metadata(arrays).item_metadata.tree
        if before is not None and (misfits := _misfits(_kinds(saved), before)):
            raise DamagedError(f"{what} are damaged: {misfits}; {_ADVICE}.")
        if like is not None and (misfits := _misfits(_kinds(saved), _kinds(like))):
            raise _OthersError(misfits)
        with _orbax(what):
            read = checkpointer.restore(arrays, jax.tree.map(_on_default_device, saved) if like is None else like)
    if known is not None and (others := [path for path, x in _digests(read).items() if x != known[path]]):
        raise DamagedError(f"{what} are damaged: {', '.join(others[:3])} are not what was saved; {_ADVICE}.")
    return read


@contextlib.contextmanager
def _orbax(what: str) -> Iterator[None]:
    """Says what cannot be read where Orbax fails: it raises whatever missing or damaged files lead it to."""
    try:
        with parsing():
            yield
    except UserError as error:
        if isinstance(error.__cause__, jax.errors.JaxRuntimeError | MemoryError):
            # The files may be sound: there is no room for them.
            raise error.__cause__ from None
        raise DamagedError(f"{what} cannot be read ({str(error)[:200]}); {_ADVICE}.") from error


def load_student(folder: str | os.PathLike, *, dtype: str = "float32") -> tuple[Model, dict[str, Any]]:
    """Loads a trained detector: ``module, variables = kdjax.load_student("runs/mgd/student")``.

    Neither the teacher nor the method is needed. ``module.detect`` does everything from uint8 images to detections::

        detections = module.apply(variables, images, image_size, method="detect")

    Args:
        folder: a model folder, as a finished run leaves it in its workdir.
        dtype: compute dtype.

    Returns:
        the linen module and its variables, {"params": ..., "batch_stats": ...}, float32.

    Raises:
        UserError: if the folder holds no model, is damaged, or its arrays are not those of its config.
    """
    description = describe(folder)
    if "model" not in description:
        raise UserError(f"{folder} holds no kdjax model; give the folder `student` of a finished run's workdir.")
    module = build_model(
        description["model"],
        num_classes=len(description["class_names"]),
        dtype=jnp.dtype(dtype),
    )
    images = jnp.zeros((1, *description["image_size"], 3))
    like = jax.eval_shape(module.init, jax.random.key(0), images)
    return module, _read(folder, description, like)


def prepare(images: Sequence[np.ndarray], folder: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Photographs as a trained model wants them: ``images, size = kdjax.prepare(photographs, "runs/mgd/student")``.

    They are scaled as in the evaluations of that model's run, and all padded to the largest of them: what padding there
    is changes boxes a little, so give those of one shape together. What the model finds in image i is in pixels
    of the scaled one; ``boxes * (photograph's height / size[i, 0])`` is in the photograph's, of x likewise by widths.

    Args:
        images: each (H, W, 3) uint8, RGB, of any size.
        folder: of the model.

    Returns:
        the images, (N, H, W, 3) uint8, and their heights and widths without the padding, (N, 2) int32.

    Raises:
        UserError: the folder holds no model, or does not say how its images were scaled.
    """
    scaled = sizing_of(folder)
    if scaled is None:
        raise UserError(f"{folder} does not say how its images were scaled; give the folder of a finished model.")
    return padded(images, scaled)


def _kinds(tree: Any) -> dict[str, str]:
    """By path, dtype and shape of the arrays of a tree, such as float32[3,5]."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name}{list(x.shape)}".replace(
            " ", ""
        )
        for path, x in leaves
    }


def _misfits(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The first arrays that differ between two of :func:`_kinds`, in words; "" where none does.

    Orbax would say so only for some, in pages, and casts another dtype silently.
    """
    paths = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
    lines = [f"{path} is {old.get(path, 'absent')}, wanted {new.get(path, 'absent')}" for path in paths[:3]]
    return "; ".join(lines) + f" and {len(paths) - 3} more" * (len(paths) > 3)


def _on_default_device(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
