"""Orbax behind one file: a run's checkpoints, and the trained model as a folder of its own.

That is why the file is long: whatever Orbax raises, or leaves half done, is met in here.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from kdjax import __version__
from kdjax.data.batches import padded
from kdjax.data.sizing import Size, Sizing, sizing
from kdjax.devices import globalize
from kdjax.errors import DataError, UserError, parsing
from kdjax.models import build_model
from kdjax.paths import Path, absolute, as_path, files_in, in_bucket, remove
from kdjax.processes import on_main
from kdjax.state import TrainState
from kdjax.types import Model

MODEL_FILE = "model.json"
METHOD_FILE = "method.json"
STAGE_FILE = "description.json"
"""In the folder of a stage: what its checkpoints hold, as ``MODEL_FILE`` has it."""
ARRAYS_FOLDER = "variables"
_DESCRIPTIONS = {MODEL_FILE: {"model", "class_names", "image_size", "sha256"}, METHOD_FILE: {"method", "sha256"}}
"""What describes a folder of arrays, and the keys that it cannot do without."""
STUDENT, REST = "student", "rest"
"""The two items of a checkpoint."""


def _items(state: TrainState) -> dict[str, Any]:
    """A state in the two parts in which it is saved."""
    student = {"params": state.params["student"], "batch_stats": state.batch_stats}
    return {STUDENT: student, REST: state.replace(params={"method": state.params["method"]}, batch_stats={})}


class Best(NamedTuple):
    """The best checkpoint."""

    step: int
    value: float
    """Of the metric."""


def _merit(metrics: Mapping[str, float], *, metric: str, sign: int) -> float:
    """More is better."""
    return sign * metrics[metric]


class Checkpoints:
    """The checkpoints of one run: asynchronous, atomic; the newest ``keep`` and the best one stay.

    Every step holds the student's variables apart from the rest, so that they can be read without the method or the
    optimiser. A context manager: at its end, whatever ended it, everything is on disk.
    """

    def __init__(self, folder: Path, *, keep: int = 2, metric: str, higher_is_better: bool = True):
        """Opens or makes a folder of checkpoints.

        Args:
            folder: of the run.
            keep: how many of the newest stay.
            metric: the name of what says which is best.
            higher_is_better: of that metric.
        """
        self._metric = metric
        best = functools.partial(_merit, metric=metric, sign=1 if higher_is_better else -1)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._manager = ocp.CheckpointManager(
            str(folder) if in_bucket(folder) else os.path.abspath(folder),
            item_handlers={name: ocp.StandardCheckpointHandler() for name in (STUDENT, REST)},
            options=ocp.CheckpointManagerOptions(best_fn=best, preservation_policy=policy),
        )

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return on_main(self._manager.latest_step)

    def best(self) -> Best | None:
        """The best of the steps that were saved with a metric; None without one."""
        self._manager.wait_until_finished()

        def read() -> Best | None:
            step = self._manager.best_step()
            metrics = None if step is None else self._manager.metrics(step)
            return Best(step, metrics[self._metric]) if step is not None and metrics else None

        return on_main(read)

    def save(self, state: TrainState, value: float | None = None) -> None:
        """Starts saving ``state`` under its step; with the value of its metric it is a candidate for the best."""
        # A metric of nothing is NaN, which must not count as the best.
        metrics = {self._metric: value} if value is not None and math.isfinite(value) else None
        items = {name: ocp.args.StandardSave(item) for name, item in _items(globalize(state)).items()}
        self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """The saved state of a step, by default the newest, placed as the arrays of ``state`` are.

        Of ``state``, :func:`abstract` suffices.

        Raises:
            DataError: if what was saved cannot be read.
            UserError: if it has other parameters or shapes than ``state``.
        """
        self._manager.wait_until_finished()
        step, wanted = self.latest() if step is None else step, _items(abstract(state))
        what = f"The checkpoint of step {step} in {self._manager.directory}"
        advice = "move the folder of that step away"
        with _orbax(what, advice):
            metadata = self._manager.item_metadata(step)
            saved = {name: metadata[name].tree for name in wanted}
        if misfits := _misfits(saved, wanted):
            raise UserError(
                f"{what} belongs to another model, method or optimiser ({misfits}); choose another --workdir, or "
                "delete that folder."
            )
        args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
        with _orbax(what, advice):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        student, rest = restored[STUDENT], restored[REST]
        params = {"student": student["params"], **rest.params}
        return rest.replace(params=params, batch_stats=student["batch_stats"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


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
        DataError: if ``folder`` is neither, or damaged.
    """
    description = describe(folder)
    if "image_size" not in description:
        return None
    try:
        return Sizing.of(description.get("sizing", {"image_size": [description["image_size"]]}))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
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
        DataError: if it is no such folder, or damaged.
    """
    if not (as_path(folder) / METHOD_FILE).is_file():
        raise DataError(f"{folder} holds no method; give the folder `method` of a stage whose method learns something.")
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
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


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
        DataError: if ``folder`` is none of them.
    """
    for file, keys in _DESCRIPTIONS.items():
        path = as_path(folder) / file
        if path.is_file():
            return _described(path, keys)
    step = absolute(as_path(folder))
    if all((step / item).is_dir() for item in (STUDENT, REST)):
        stage = step.parents[1] / STAGE_FILE
        return {"checkpoint": str(step), **(_described(stage, set()) if stage.exists() else {})}
    raise DataError(
        f"{folder} holds no kdjax model; give the folder `student` of a finished run's workdir, or one step in the "
        "`checkpoints` of a stage."
    )


def _described(path: Path, keys: Set[str]) -> dict[str, Any]:
    """What a file says of the arrays beside it, ``keys`` at least."""
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not isinstance(description, dict) or keys - description.keys():
        missing = keys - set(description if isinstance(description, dict) else ())
        raise DataError(
            f"{path} is damaged: it lacks {', '.join(sorted(missing))}; take an undamaged copy of that folder."
        )
    return description


def load_variables(folder: str | os.PathLike) -> dict[str, Any]:
    """The variables {"params": ..., "batch_stats": ...} in a model folder or in one step of a run's checkpoints.

    Raises:
        DataError: if ``folder`` is neither, or damaged.
    """
    return _read(folder, describe(folder))


def _read(folder: str | os.PathLike, description: Mapping[str, Any], like: Any = None) -> dict[str, Any]:
    """The arrays in a folder, on the default device, held against their digest where the folder has one.

    Args:
        folder: of a model, of a method, or of one step of a run's checkpoints.
        description: what :func:`describe` says of it.
        like: the shapes and dtypes that the arrays must have; None takes whatever there is.

    Raises:
        DataError: they cannot be read, are others than wanted, or not those that were saved.
    """
    arrays = absolute(as_path(folder)) / (STUDENT if "checkpoint" in description else ARRAYS_FOLDER)
    what, advice = f"The arrays in {arrays}", "take an undamaged copy of that folder, or make it anew"
    with _alone() as checkpointer:
        with _orbax(what, advice):
            saved = checkpointer.metadata(arrays).item_metadata.tree
        if like is not None and (misfits := _misfits(saved, like)):
            raise DataError(f"{what} are not those of the model in {MODEL_FILE}: {misfits}.")
        with _orbax(what, advice):
            read = checkpointer.restore(arrays, jax.tree.map(_on_default_device, saved if like is None else like))
    saved_digest = description.get("sha256")
    if saved_digest and saved_digest != _digest(read):
        raise DataError(f"{what} are damaged: their sha256 is not the one that was saved with them; {advice}.")
    return read


@contextlib.contextmanager
def _orbax(what: str, advice: str) -> Iterator[None]:
    """Says what cannot be read where Orbax fails: it raises whatever missing or damaged files lead it to."""
    try:
        with parsing():
            yield
    except DataError as error:
        if isinstance(error.__cause__, jax.errors.JaxRuntimeError | MemoryError):
            # The files may be sound: there is no room for them.
            raise error.__cause__ from None
        raise DataError(f"{what} cannot be read ({str(error)[:200]}); {advice}.") from error


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
        DataError: if the folder holds no model, is damaged, or its arrays are not those of its config.
    """
    description = describe(folder)
    if "model" not in description:
        raise DataError(f"{folder} holds no kdjax model; give the folder `student` of a finished run's workdir.")
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
        DataError: the folder holds no model, or does not say how its images were scaled.
    """
    scaled = sizing_of(folder)
    if scaled is None:
        raise DataError(f"{folder} does not say how its images were scaled; give the folder of a finished model.")
    return padded(images, scaled)


def _misfits(saved: Any, wanted: Any) -> str:
    """The first arrays of which shape or dtype differ between two trees, in words; "" where none does.

    Orbax would say so only for some, in pages, and casts another dtype silently.
    """

    def described(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name}{list(x.shape)}"
            for path, x in leaves
        }

    old, new = described(saved), described(wanted)
    paths = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
    lines = [f"{path} is {old.get(path, 'absent')}, wanted {new.get(path, 'absent')}" for path in paths[:3]]
    return "; ".join(lines) + f" and {len(paths) - 3} more" * (len(paths) > 3)


def _on_default_device(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
