"""What marks a stage as finished: its result, with digests by which is known that what it left is as it was written."""

import math
from collections.abc import Mapping
from typing import Any

from kdjax.errors import DataError, StorageError, UnreachedError, UserError
from kdjax.files import plain, read_json, seal, sha256_of, write_json
from kdjax.paths import Path, exists, is_file, set_aside
from kdjax.plan import StagePlan
from kdjax.run.record import PREDICTIONS_FILE, RESULT_FILE, has_checkpoints
from kdjax.saved import METHOD_FILE, MODEL_FILE, load_method, load_variables


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Marks a stage as finished: its result, with the sha256 of what it left and of itself."""
    sealed = plain({**result, "files": _digests(folder)})
    write_json(folder / RESULT_FILE, {**sealed, "sha256": seal(sealed)})


def finished_result(stage: StagePlan, folder: Path, primary: str) -> dict[str, Any] | None:
    """The result of a finished stage, None for one that is not; what JSON cannot hold (NaN) is NaN again.

    A stage of which something is damaged is finished again from its last checkpoint: what is damaged is set aside, as
    ``<name>.corrupt``, which is said.

    Args:
        stage: of the plan.
        folder: the stage's own.
        primary: a metric that every result has.

    Raises:
        DataError: something is damaged, and there is no checkpoint.
    """
    path = folder / RESULT_FILE
    if not exists(path):
        return None
    result, damaged = None, {}
    try:
        result = _read_result(path, primary)
    except DataError as error:
        damaged[path] = str(error)
    damaged |= _damage(folder, result.pop("files", {}) if result else {})
    again = has_checkpoints(folder) or not stage.steps
    # Without checkpoints pictures alone are lost.
    if result and not (damaged if again else damaged.keys() - {folder / PREDICTIONS_FILE}):
        return {key: restored(value) if key != "teacher" or value else None for key, value in result.items()}
    words = f"[{stage.name}] is finished, but damaged: {' '.join(damaged.values())}"
    if not again:
        raise DataError(
            f"{words} There is no checkpoint to finish it from again: put undamaged files in their place, or delete "
            f"{folder} to start it anew."
        )
    print(f"{words} It is set aside, as <name>.corrupt, and the stage is finished again.", flush=True)
    for file in filter(exists, damaged):
        set_aside(file)
    path.unlink(missing_ok=True)
    return None


def restored(metrics: Any) -> Any:
    """Numbers by name that JSON could not hold are NaN again."""
    if isinstance(metrics, dict):
        return {key: restored(value) for key, value in metrics.items()}
    return math.nan if metrics is None else metrics


def _read_result(path: Path, primary: str) -> dict[str, Any]:
    """What a finished stage wrote.

    Raises:
        DataError: it is damaged.
    """
    result = read_json(path, dict)
    digest = result.pop("sha256", None)
    if digest and digest != seal(result):
        raise DataError(f"{path} is damaged (its sha256 is not the one that was written with it).")
    kinds = {
        "metrics": dict,
        "teacher": dict | None,
        "steps": int,
        "parameters": int,
        "images_per_second": float | int | None,
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(result.get(key, ()), kind)]
    if wrong or not isinstance(result["metrics"].get(primary, ()), float | int | None):
        raise DataError(f"{path} is damaged ({', '.join(wrong) or primary} is not what it should be).")
    return result


def _digests(folder: Path) -> dict[str, str]:
    """Hexadecimal sha256 of the files that a finished stage leaves, by their names in its folder; not of arrays."""
    methods = sorted((folder / "method").glob(f"*/{METHOD_FILE}"))
    files = [folder / "model" / MODEL_FILE, folder / "method" / METHOD_FILE, *methods, folder / PREDICTIONS_FILE]
    return {str(file.relative_to(folder)): sha256_of(file) for file in files if is_file(file)}


def _damage(folder: Path, digests: Mapping[str, str]) -> dict[Path, str]:
    """What of a finished stage is not as it was written, and a sentence on each.

    Args:
        folder: of the stage.
        digests: of its files; {} where they are not known, as earlier versions wrote none.
    """
    damaged = {}
    for name, digest in ({f"model/{MODEL_FILE}": ""} | _digests(folder) | dict(digests)).items():
        path = folder / name
        arrays = path.name in (MODEL_FILE, METHOD_FILE)
        try:
            if digest and digest != (sha256_of(path) if is_file(path) else ""):
                raise DataError(f"{path} is damaged (its sha256 is not the one that was written).")
            if arrays:
                (load_variables if path.name == MODEL_FILE else load_method)(path.parent)
        except (StorageError, UnreachedError):
            raise
        except UserError as error:
            damaged[path.parent if arrays else path] = str(error)
    return damaged
