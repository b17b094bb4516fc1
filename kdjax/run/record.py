"""What is kept of a stage: whose run its folder is, its model, and what that said."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from kdjax import __version__
from kdjax.charts import Chart, as_json, from_json
from kdjax.config.schema import Data, MethodSection, Optimizer, Run, Stage
from kdjax.distill import Applied, by_method
from kdjax.errors import DataError, StorageError, UserError, reason
from kdjax.files import read_json, sha256_of, write_json
from kdjax.methods import method_options
from kdjax.options import declared, defaults
from kdjax.paths import Path, as_path, exists
from kdjax.plan import Plan, StagePlan
from kdjax.run.data import Splits
from kdjax.saved import STAGE_FILE, describe, save_method, save_model
from kdjax.state import TrainState
from kdjax.types import FILES

_FIRST_VERSION = "0.1.0"
"""It wrote no version beside its stages, and all stages of a run drew the same batches."""

RESULT_FILE = "result.json"
CONFIG_FILE = "config.json"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
"""Those whose versions decide what is computed, or what processes tell each other."""

CHARTS_FILE = "charts.json"
"""What the judge of a stage's model has to show besides numbers."""
PREDICTIONS_FILE = "predictions.json"
_FORMER_PREDICTIONS_FILE = "detections.json"
"""Of version 0.1."""


class Finished(NamedTuple):
    """A stage that is done."""

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The folder of its trained detector."""
        return self.folder / "model"

    def method(self, name: str) -> Path:
        """The folder of what its method learnt; of several that learnt, of the one of that name."""
        folder = self.folder / "method"
        return folder / name if (folder / name).is_dir() else folder


def stage_folder(workdir: Path, name: str) -> Path:
    """Where a stage of a run of one seed is."""
    return workdir / "stages" / name


def seed_folder(workdir: Path, seed: int) -> Path:
    """Where the run of a seed is, of several."""
    return workdir / f"seed_{seed}"


def identity(plan: Plan, stage: StagePlan, splits: Splits) -> dict[str, Any]:
    """What determines a stage's result, as plain JSON: its section, the data, the seed, and all that it draws from.

    The data are known by their splits' fingerprints.
    """
    sources: dict[str, Any] = {}

    def learnt_from(origin: str) -> Any:
        if origin in plan:
            return identity(plan, plan[origin], splits)
        return (
            _sha256(f"An init of config.{stage.name}.methods", origin)
            if as_path(origin).is_file()
            else describe(origin)
        )

    for field in ("teacher", "init"):
        if origin := getattr(stage.options, field):
            sources[field] = learnt_from(origin)
    if given := {name: learnt_from(method.init) for name, method in stage.methods.items() if method.init}:
        sources["methods"] = given
    if stage.options.weights:
        sources["weights"] = _sha256(f"config.{stage.name}.weights", stage.options.weights)
    section, data = _effective(Stage, stage.section), _effective(Data, plan.content["data"])
    data |= {"train": splits.train.fingerprint, "eval": splits.evaluation.fingerprint}
    known = {"seed": plan.run.seed, "task": plan.run.task, "data": data, "stage": section, "from": sources}
    return json.loads(json.dumps(known))


def _sha256(what: str, path: str) -> str:
    try:
        return sha256_of(as_path(path))
    except OSError as error:
        raise StorageError(f"{what}={path} cannot be read ({reason(error)}).") from error


def is_begun(folder: Path) -> bool:
    """Whether a stage's folder has a result, or a checkpoint to go on from."""
    return (folder / RESULT_FILE).exists() or has_checkpoints(folder)


def check_claim(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuses to go on in the folder of a run of another config; nothing is written.

    Says where a stage goes on with other packages or devices than before.

    Args:
        folder: of the stage.
        known: the stage's :func:`identity`.

    Raises:
        UserError: one sentence with the keys that differ.
        DataError: it cannot be known whose run the folder is.
    """
    if not is_begun(folder):
        return
    saved, finished = _saved_config(folder), (folder / RESULT_FILE).exists()
    version, before = saved.pop("kdjax", _FIRST_VERSION), saved.pop("environment", None)
    try:
        saved = _completed(saved)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / CONFIG_FILE} is damaged ({error!r}); {_MENDED}.") from error
    if changed := differences(saved, _as_far_as(saved, known)):
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or delete "
            "that folder to start it anew."
        )
    if version == _FIRST_VERSION and not finished:
        raise UserError(
            f"{folder} holds a stage that kdjax {version} began, and this version, {__version__}, draws other batches: "
            "finish it with that version, or delete that folder to start it anew."
        )
    if not finished and isinstance(before, dict) and (changed := differences(before, environment())):
        print(
            f"[{folder.name}] goes on with other packages or devices than before ({'; '.join(changed)}): its last "
            "digits may be others than theirs.",
            flush=True,
        )


_MENDED = "put an undamaged one in its place, or delete its folder to start the stage anew"


def has_checkpoints(folder: Path) -> bool:
    """Whether a stage's folder has checkpoints."""
    return any(step.name.isdecimal() for step in (folder / "checkpoints").glob("[0-9]*"))


def _saved_config(folder: Path) -> dict[str, Any]:
    """What the folder of a stage that was begun is known by.

    Raises:
        DataError: its file is not there, or damaged.
    """
    path = folder / CONFIG_FILE
    if not exists(path):
        raise DataError(f"{path}, which says of which run the stage in its folder is, is not there: {_MENDED}.")
    try:
        return read_json(path, dict)
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; {_MENDED}.") from error


def environment() -> dict[str, Any]:
    """What a stage is computed with: versions of packages and of Python, and the devices. It is not its identity."""
    versions = {package: _version(package) for package in _PACKAGES}
    devices = {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return {"kdjax": __version__, "python": platform.python_version(), **versions, **devices}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # Some are installed under other names.
        return "unknown"


def _as_far_as(saved: Any, known: Any) -> Any:
    """What is known, with fingerprints of data as far as a saved identity has them: that of 0.1 knows no files."""
    if isinstance(saved, dict) and isinstance(known, dict):
        return {key: _as_far_as(saved.get(key), value) for key, value in known.items()}
    if isinstance(saved, str) and isinstance(known, str) and known.startswith(saved + FILES):
        return saved
    return known


def check_twin(baseline: Path, twin: Path) -> None:
    """Refuses to compare a student that version 0.1 trained with a baseline of today's, which sees other batches.

    Args:
        baseline: folder of the baseline's stage.
        twin: of the stage that it is compared with.

    Raises:
        UserError: one sentence with both folders.
    """
    if (baseline / RESULT_FILE).exists() or not (twin / RESULT_FILE).exists() or not (twin / CONFIG_FILE).exists():
        return
    if json.loads((twin / CONFIG_FILE).read_text()).get("kdjax", _FIRST_VERSION) == _FIRST_VERSION:
        raise UserError(
            f"{twin} was trained by kdjax {_FIRST_VERSION}, and a baseline of this version, {__version__}, would see "
            "other batches: delete that folder, or compare in another --workdir."
        )


def _completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved identity with the keys that it lacks, because they came later, at their defaults."""
    if "stage" not in saved:
        return dict(saved)
    saved = _with_methods(saved)
    stage = _effective(Stage, defaults(Stage)) | saved["stage"]
    stage["optimizer"] = defaults(Optimizer) | stage["optimizer"]
    stage["methods"] = {key: _completed_method(method) for key, method in stage["methods"].items()}
    origins = {field: _completed(x) if isinstance(x, dict) else x for field, x in saved["from"].items()}
    origins |= {"methods": {k: _completed(x) for k, x in origins["methods"].items()}} if "methods" in origins else {}
    whole = {
        "task": defaults(Run)["task"],
        **saved,
        "stage": stage,
        "data": _effective(Data, defaults(Data)) | saved["data"],
        "from": origins,
    }
    return json.loads(json.dumps(whole))


def _completed_method(method: Mapping[str, Any]) -> dict[str, Any]:
    whole = method_options(method["name"]) | defaults(MethodSection) | dict(method)
    return whole | ({"optimizer": defaults(Optimizer) | whole["optimizer"]} if "optimizer" in whole else {})


def _with_methods(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved identity of version 0.1, whose stages had one method and keys about it beside it, as it is today."""
    if "method" not in saved["stage"]:
        return saved
    stage, origins, methods = dict(saved["stage"]), dict(saved["from"]), {}
    method, optimizer = stage.pop("method"), stage.pop("method_optimizer", None)
    entry = {"levels": stage.pop("levels", ()), "init": stage.pop("method_init", ""), **method}
    if method["name"] != "none":
        methods[method["name"]] = entry | ({"optimizer": optimizer} if optimizer else {})
    if stage.pop("imitate_boxes", False):
        methods["box_imitation"] = {"name": "box_imitation"}
    if "method_init" in origins:
        origins["methods"] = {method["name"]: origins.pop("method_init")}
    return {**saved, "stage": stage | {"methods": dict(sorted(methods.items()))}, "from": origins}


def _effective(kind: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section changes what is computed."""
    return {key: value for key, value in section.items() if key not in declared(kind) or declared(kind)[key].effect}


def claim(folder: Path, known: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Makes a folder that of a stage: with its identity, and with what its checkpoints are going to hold.

    What the stage is computed with stands beside its identity, and is no part of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, {"kdjax": __version__, "environment": environment(), **known})
    write_json(folder / STAGE_FILE, description)


def differences(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What changed between two plain configs, one ``key: old -> new`` for each key."""
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in changes(saved, config)]


def changes(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The same as keys with their old and their new values, "absent" of one that is not there.

    >>> changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": (3,)}})
    [('a.c', 2, 'absent'), ('a.d', 'absent', [3])]
    """

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {path: leaf for key, value in tree.items() for path, leaf in flat(value, f"{prefix}.{key}").items()}

    old, new = (flat(json.loads(json.dumps(tree))) for tree in (saved, config))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [(key[1:], old.get(key, "absent"), new.get(key, "absent")) for key in changed]


def export(
    stage: StagePlan,
    methods: Mapping[str, Applied],
    folder: Path,
    state: TrainState,
    kept: Mapping[int, Any],
) -> None:
    """Writes the trained model, what its methods learnt, and what the model said of the first images, by position."""
    save_model(folder / "model", state.student(), json.loads((folder / STAGE_FILE).read_text()))
    learnt = {name: x for name, x in by_method(state.params["method"], methods).items() if x}
    for name, params in learnt.items():
        options = stage.options.methods[name]
        place = folder / "method" if len(learnt) == 1 else folder / "method" / name
        save_method(place, params, {"name": options.name, **options.options})
    write_json(folder / PREDICTIONS_FILE, [kept[position] for position in sorted(kept)])


def write_charts(folder: Path, charts: Sequence[Chart]) -> None:
    """Writes what the judge of a stage's model has to show."""
    write_json(folder / CHARTS_FILE, [as_json(chart) for chart in charts])


def kept_charts(folder: Path) -> list[Chart]:
    """The same again; [] where there is none."""
    path = folder / CHARTS_FILE
    try:
        return [from_json(chart) for chart in read_json(path, list)] if exists(path) else []
    except (DataError, TypeError) as error:
        print(f"[{folder.name}] has no charts: {error}", flush=True)
        return []


def kept_predictions(folder: Path) -> list[Any]:
    """What the model of a finished stage said of the first images, as its task draws it; [] where that is lost."""
    path = folder / PREDICTIONS_FILE
    try:
        return read_json(path if exists(path) else folder / _FORMER_PREDICTIONS_FILE, list)
    except DataError as error:
        print(f"[{folder.name}] is not drawn: {error}", flush=True)
        return []
