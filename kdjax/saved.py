"""Trained models, and what methods learnt, as folders of their own.

The file is long because what is written into such a folder and what is read of it, now and from earlier versions, stand
beside each other.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import __version__
from kdjax.arrays import ADVICE, DamagedError, OthersError, alone, digest, read_arrays
from kdjax.checkpoint import REST, STUDENT, recorded
from kdjax.data.batches import padded
from kdjax.data.photographs import checked
from kdjax.data.sizing import READING, RESIZES, Reading, Size, Sizing, sizing
from kdjax.errors import DataError, UserError
from kdjax.files import seal
from kdjax.models import build_model
from kdjax.options import TEXT, Rule, number, whole
from kdjax.paths import Path, absolute, as_path, copy_files, in_bucket, remove
from kdjax.types import Model

MODEL_FILE = "model.json"
FORMAT = 1
"""Of what ``MODEL_FILE`` says: one that says something else by the same keys has a higher number. Earlier versions
wrote none, which counts as 0: they left out "task", "reading" and "dtype"."""
METHOD_FILE = "method.json"
STAGE_FILE = "description.json"
"""In the folder of a stage: what its checkpoints hold, as ``MODEL_FILE`` has it."""
ARRAYS_FOLDER = "variables"
_DESCRIPTIONS = {MODEL_FILE: {"model", "class_names", "image_size", "sha256"}, METHOD_FILE: {"method", "sha256"}}
"""What describes a folder of arrays, and the keys that it cannot do without."""
_DESCRIBED = {
    "model": Rule("a section with keys", lambda value: isinstance(value, dict)),
    "class_names": Rule(
        "a list of texts", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)
    ),
    "image_size": Rule(
        "two whole numbers below 65536",
        lambda value: (
            isinstance(value, list) and len(value) == 2 and all(type(x) is int and 0 < x < 2**16 for x in value)
        ),
    ),
    "format": whole(0),
    "task": TEXT,
    "threshold": number(0, 1),
}
"""What some of them may be, wherever they stand."""


def describe_model(
    model: Mapping[str, Any],
    class_names: Sequence[str],
    image_size: Size | Sizing,
    category_ids: Sequence[int] = (),
    *,
    task: str = "",
    reading: Reading = READING,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What is written beside a model's arrays, so that it can be rebuilt and used: plain JSON.

    Args:
        model: the plain dict that :func:`kdjax.models.build_model` takes.
        class_names: names of the labels, in order.
        image_size: height and width in pixels that the model was trained at; or a sizing, how images were scaled.
        category_ids: what the annotations that it learnt from call the labels, in order; () where that is not known.
        task: as configs name it; "" for that of the model, whatever that is.
        reading: how its image files were read.
        dtype: what it computed with in training.
    """
    scaled = sizing(image_size)
    return {
        "format": FORMAT,
        **({"task": task} if task else {}),
        "model": dict(model),
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "image_size": list(scaled.shapes[0]),
        "sizing": scaled.described(),
        "reading": reading._asdict(),
        "dtype": dtype,
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
        found = Sizing.of(description.get("sizing", {"image_size": [description["image_size"]]}))
        RESIZES[found.resize].side(1, float(found.scale(np.ones(2), np.array(found.shapes[0]))))  # All have meanings.
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder} is damaged: it does not say how its images were scaled; take an undamaged copy of that folder."
        ) from error


def known_sizing(folder: str | os.PathLike) -> Sizing:
    """As :func:`sizing_of`, of a model that is to be used.

    Raises:
        DataError: as there, or the folder does not say.
    """
    if (scaled := sizing_of(folder)) is None:
        raise DataError(f"{folder} does not say how its images were scaled; give the folder of a finished model.")
    return scaled


def task_of(folder: str | os.PathLike) -> str:
    """The task that a model is for, as configs name it; "" where its folder does not say what it is.

    Raises:
        DataError: if ``folder`` holds no model, or is damaged.
    """
    described = describe(folder)
    if "task" in described or "model" not in described:
        return described.get("task", "")
    return build_model(described["model"], num_classes=len(described["class_names"])).task


def reading_of(folder: str | os.PathLike) -> Reading:
    """How image files were read for a model; the usual way where its folder does not say.

    Raises:
        DataError: if ``folder`` holds no model, or is damaged.
    """
    said = describe(folder).get("reading", {})
    try:
        found = Reading(**said)
        low, high = found.value_range or (0, 1)
        return Reading(bool(found.upright), found.value_range and (float(low), float(high)), int(found.most_pixels))
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder} is damaged: it does not say how image files are read ({said!r:.100}).") from error


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
    description = {"kdjax": __version__, **description, "sha256": digest(arrays)}
    with replacing(folder) as partial:
        with alone() as checkpointer:
            # On the host: of arrays on the devices of one process among several Orbax wants nothing to do.
            checkpointer.save(partial / ARRAYS_FOLDER, dict(jax.device_get(arrays)))
        (partial / file).write_text(json.dumps(description, indent=2) + "\n")


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
        if in_bucket(source):
            copy_files(source, partial, MODEL_FILE)
        else:
            shutil.copytree(source, partial, dirs_exist_ok=True)


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder of arrays says of itself.

    Args:
        folder: of a model ("model", "class_names", "image_size", "sizing": how images were scaled, which version 0.1
            did not write, "format", "task", "reading": of image files, and "dtype", which earlier did not, "sha256",
            "kdjax": the version that wrote it; and "threshold", where somebody has added it), of a method ("method",
            "sha256", "kdjax"), or one step of a run's checkpoints ("checkpoint": the sha256 of its record, or its path
            where version 0.1 wrote none, and what is said of its model).

    Raises:
        DataError: if ``folder`` is none of them, or its description or record is damaged.
    """
    for file, keys in _DESCRIPTIONS.items():
        path = as_path(folder) / file
        if path.is_file():
            return _described(path, keys)
    step = absolute(as_path(folder))
    if all((step / item).is_dir() for item in (STUDENT, REST)):
        stage = step.parents[1] / STAGE_FILE
        record = recorded(step)
        known = seal(record) if record else str(step)
        return {"checkpoint": known, **(_described(stage, set()) if stage.exists() else {})}
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
    known = description if isinstance(description, dict) else {}
    if whole(FORMAT + 1).holds(known.get("format")):
        raise DataError(
            f"{path} was written by kdjax {known.get('kdjax', '')}, in format {known['format']}, and kdjax "
            f"{__version__} knows formats up to {FORMAT}: install a newer one."
        )
    if not isinstance(description, dict) or keys - description.keys():
        missing = keys - set(description if isinstance(description, dict) else ())
        raise DataError(
            f"{path} is damaged: it lacks {', '.join(sorted(missing))}; take an undamaged copy of that folder."
        )
    for key, rule in _DESCRIBED.items():
        if key in description and not rule.holds(description[key]):
            shown = repr(description[key])[:100]
            raise DataError(f"{path} is damaged: {key} is {shown}, and must be {rule.words}.")
    return description


def load_variables(folder: str | os.PathLike) -> dict[str, Any]:
    """The variables {"params": ..., "batch_stats": ...} in a model folder or in one step of a run's checkpoints.

    Raises:
        DataError: if ``folder`` is neither, or damaged.
    """
    return _read(folder, describe(folder))


def load_checkpointed_methods(folder: str | os.PathLike) -> dict[str, Any]:
    """What the methods had learnt at one step of a run's checkpoints, as ``params["method"]`` of the state has it.

    Raises:
        DataError: if ``folder`` is no step.
        DamagedError: its arrays cannot be read, or are not those that were saved.
    """
    describe(folder)
    return _item(absolute(as_path(folder)), REST)["params"].get("method", {})


def _item(step: Path, item: str) -> dict[str, Any]:
    """The arrays of one item of a checkpoint, held against its record where there is one."""
    record = recorded(step)
    return read_arrays(step / item, None, record and record[item])


def _read(folder: str | os.PathLike, description: Mapping[str, Any], like: Any = None) -> dict[str, Any]:
    """The arrays in a folder, on the default device, held against their digests where the folder has some.

    Args:
        folder: of a model, of a method, or of one step of a run's checkpoints.
        description: what :func:`describe` says of it.
        like: the shapes and dtypes that the arrays must have; None takes whatever there is.

    Raises:
        DataError: they are others than wanted.
        DamagedError: they cannot be read, or are not those that were saved.
    """
    folder = absolute(as_path(folder))
    if "checkpoint" in description:
        return _item(folder, STUDENT)
    arrays = folder / ARRAYS_FOLDER
    try:
        read = read_arrays(arrays, like)
    except OthersError as error:
        raise DataError(f"The arrays in {arrays} are not those of the model in {MODEL_FILE}: {error}.") from error
    if description["sha256"] != digest(read):
        raise DamagedError(f"The arrays in {arrays} are damaged: their sha256 is not the one that was saved; {ADVICE}.")
    return read


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
    try:
        module = build_model(
            description["model"],
            num_classes=len(description["class_names"]),
            dtype=jnp.dtype(dtype),
        )
    except UserError as error:
        raise DataError(f"The model that {folder} describes cannot be built: {error}") from error
    images = jax.ShapeDtypeStruct((1, *description["image_size"], 3), jnp.float32)
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
        DataError: the folder holds no model, or does not say how its images were scaled; or these are no photographs,
            such as images of floats.
    """
    images = checked(images)
    scaled = known_sizing(folder)
    return padded(images, scaled)
