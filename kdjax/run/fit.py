"""What a config leaves open about data of somebody's own is chosen from the training split, and said.

The configs that come with kdjax say what suits the embedded data. On other data, keys that are still as those have them
are chosen by the task from the images and what they show: how large images are, how they are changed, the room for
objects, the sizes that detectors look for, how long a teacher learns; and where there is no validation split, images
are held out. Whatever a config or a flag says otherwise is left as it is; a flag that says what those configs have
anyway cannot be told from them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kdjax.config.presets import EVAL_EVERY, SMALL_DETECTORS, TEACHER_STEPS
from kdjax.config.schema import Data
from kdjax.data.folders import NoSplitError
from kdjax.devices import device_count
from kdjax.models import model_class
from kdjax.options import defaults
from kdjax.plan import Plan, StagePlan, resolve
from kdjax.run.data import Splits, is_open, open_splits
from kdjax.types import Source

_HELD_OUT = {"train_split": "train[kept]", "eval_split": "train[held_out]"}
"""Keys of the data where nobody has made a validation split."""
_TEACHER_STEPS = 1600
"""Of a teacher: a student gains what its teacher is ahead. On 160 photographs that was 1 AP after 800 steps, 7 after
these."""
_PRESETS = [small.preset(18, 1.0) for small in SMALL_DETECTORS.values()]
_EVALUATIONS = 5
"""Of a stage that is trained, one at its end."""


def opened(config: ConfigDict, plan: Plan) -> tuple[Plan, Splits]:
    """The plan of a config with what is chosen from the data, which is printed, and its splits, checked.

    Raises:
        UserError: the config or the data cannot be used.
    """
    keys: dict[str, Any] = {}
    try:
        splits = open_splits(plan)
    except NoSplitError as error:
        usual = defaults(Data)
        named = any(getattr(plan.data, key) != usual[key] for key in _HELD_OUT)
        if error.split != plan.data.eval_split or named or not plan.data.fit:
            raise
        print(f"{error}\nA fifth of the training images is held out instead, drawn by their names.")
        keys = {f"data.{key}": value for key, value in _HELD_OUT.items()}
        plan = resolve(with_keys(config, keys), devices=device_count())
        splits = open_splits(plan)
    if keys := keys | chosen(plan, splits.train):
        print(in_words(keys), flush=True)
        plan = resolve(with_keys(config, keys), devices=device_count())
    for line in plan.task.remarks(splits.train, plan.data.sizing):
        print(line, flush=True)
    return plan, splits


def chosen(plan: Plan, train: Source) -> dict[str, Any]:
    """Keys of a config to what the training split suggests for them, where they are open; {} where none is.

    Detectors look for other sizes only where none of them knows anything yet: weights of a file, of a folder or of a
    teacher from elsewhere belong to the sizes that they were trained with. Nor where somebody chose them for one stage.
    """
    suggestion = plan.task.suggest(train) if is_open(plan.data, plan.task) else None
    if suggestion is None:
        return {}
    usual = defaults(Data) | {"image_size": plan.data.image_size}
    keys = {
        f"data.{key}": value
        for key, value in suggestion.data.items()
        if getattr(plan.data, key) == usual[key] and value != usual[key]
    }
    stages = [plan[name] for name in plan.run.stages]
    from_elsewhere = [
        origin
        for stage in stages
        for origin in (_detector_file(stage), stage.options.init, stage.options.teacher)
        if origin and origin not in plan
    ]
    heads = {stage.name: _suited(stage.options.model, suggestion.sizes) for stage in stages}
    if not from_elsewhere and None not in heads.values():
        keys |= {f"{name}.model.head.{field}": x for name, head in heads.items() for field, x in (head or {}).items()}
    taught_by = {stage.options.teacher for stage in stages}
    for stage in stages:
        steps = stage.options.steps
        if stage.name in taught_by and not stage.options.teacher and steps == TEACHER_STEPS:
            keys[f"{stage.name}.steps"] = steps = _TEACHER_STEPS
        if stage.steps and stage.options.eval_every in (0, EVAL_EVERY):
            keys[f"{stage.name}.eval_every"] = max(1, steps // _EVALUATIONS)
            keys[f"{stage.name}.export"] = "best"
    return keys


def _detector_file(stage: StagePlan) -> str:
    """The file that a stage's whole detector starts from; "" where there is none, or of its backbone alone.

    No published detector has heads as short as the presets'.
    """
    model = stage.options.model
    short = any(x.name == model["name"] and x.head.convs == model.get("head", {}).get("convs") for x in _PRESETS)
    return "" if short else stage.options.weights


def _suited(model: Mapping[str, Any], sizes: Sequence[float]) -> dict[str, Any] | None:
    """Fields of a model's head that suit objects of these sizes; None where one is as neither preset nor model has it.

    Then somebody chose it, and heads that inherit from each other must go on looking for the same sizes.
    """
    kind, head = model_class(model["name"]), model.get("head", {})
    presets = [preset.head for preset in _PRESETS if preset.name == model["name"]]
    usual = [defaults(kind), *presets]
    suited = kind.suited(sizes)
    for field in suited:
        if head.get(field, usual[0][field]) not in [known[field] for known in usual if field in known]:
            return None
    return suited


def with_keys(config: ConfigDict, keys: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with other values of some keys, which are named by dotted paths."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked(), changed.ignore_type():
        for path, value in keys.items():
            *sections, key = path.split(".")
            section = changed
            for name in sections:
                section = section[name]
            section[key] = value
    return changed


def in_words(keys: Mapping[str, Any]) -> str:
    """What was chosen, as flags that say the same."""
    flags = " ".join(f'--config.{path}="{value}"' for path, value in keys.items())
    return f"Chosen from the data, as these flags would say (config.data.fit=False chooses nothing): {flags}"
