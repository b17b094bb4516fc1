"""From a config to a plan: typed, frozen, checked, scaled. Nothing above this floor reads a ConfigDict.

No file is read here, but the existence of those that a config names is asked for. The file is long because keys that
contradict each other, or the number of devices, have a sentence each.
"""

import copy
import dataclasses
import os
import zlib
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from kdjax.config.files import config_names
from kdjax.config.schema import LOSS_WEIGHT, Data, MethodSection, Optimizer, Run, Stage
from kdjax.errors import UserError
from kdjax.methods import RESERVED, build_method, method_class, method_options, term_names
from kdjax.models import build_model, model_class
from kdjax.options import check, declared, defaults, hint, parse
from kdjax.paths import as_path
from kdjax.tasks import build_task
from kdjax.types import Task
from kdjax.weights import SOURCES

BASELINE = "baseline"
"""The stage that ``compare`` adds: the identical student without the methods' terms. Those that come before it, where
the student starts from another one, are called ``baseline_<name of that stage>``."""

_SECTIONS = ("model", "methods", "loss_weights", "optimizer")
"""Keys of a stage that are sections of their own."""


@dataclasses.dataclass(frozen=True)
class MethodPlan:
    """A method of a stage, scaled as that is."""

    config: Mapping[str, Any]
    """As :func:`kdjax.methods.build_method` takes it."""
    levels: tuple[str, ...]
    init: str
    optimizer: Optimizer | None


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage, with all that its actual batch size scales (Goyal et al., 2017)."""

    name: str
    number: int
    """In [0, 2**32): what its batches and random numbers are drawn from, beside the seed.

    It is made of the stage's name: two stages of one run see other batches, and a stage goes on as it began when others
    are added before it. A baseline has the number of its twin, and sees what that sees."""
    options: Stage
    """As the config quotes them."""
    section: Mapping[str, Any]
    """The same as the config has them, plain: what a stage is known by."""
    methods: Mapping[str, MethodPlan]
    """By name, in the order of their names."""
    optimizer: Optimizer
    """Scaled."""
    steps: int
    eval_every: int
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run."""

    run: Run
    data: Data
    task: Task
    stages: tuple[StagePlan, ...]
    """In the order in which they run; those that ``compare`` adds are last."""
    student: str
    """Name of the stage whose model the run is for."""
    content: Mapping[str, Any]
    """The config as plain dicts, with the sections that ``compare`` adds."""

    def __getitem__(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def __contains__(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    @property
    def baseline(self) -> StagePlan | None:
        """What the student is compared with; None where it is not."""
        return next((stage for stage in self.stages if stage.name == BASELINE), None)


def with_seed(plan: Plan, seed: int) -> Plan:
    """The one run of a seed, of a plan of several."""
    run = dataclasses.replace(plan.run, seed=seed, seeds=())
    return dataclasses.replace(plan, run=run, content={**plan.content, "seed": seed, "seeds": ()})


def resolve(config: ConfigDict, devices: int) -> Plan:
    """The plan of a config, or the reason why it cannot run, before anything is loaded or compiled.

    Args:
        config: of the schema in :mod:`kdjax.config.schema`.
        devices: number of devices that share a batch.

    Raises:
        UserError: one sentence with the key, its value and what is allowed.
    """
    content = config.to_dict()
    sections = _sections(content)
    _check_keys(content, sections)
    for section in sections.values():
        _complete(section)
    content = defaults(Run) | content | {"data": defaults(Data) | content.get("data", {})}
    run = parse(Run, {key: value for key, value in content.items() if not isinstance(value, dict)}, "config")
    data = parse(Data, content["data"], "config.data")
    if data.processes and not hasattr(os, "memfd_create"):
        raise UserError(f"config.data.processes is {data.processes}; it must be 0 where there is no Linux.")
    task = _task(run, data)
    for section in sections.values():
        if section["steps"]:
            task.complete_model(section["model"])
    options = {name: _parse_stage(name, section) for name, section in sections.items()}
    _check_run(run, options, devices)
    for position, name in enumerate(run.stages):
        _check_stage(name, options[name], earlier=run.stages[:position], devices=devices, task=task)
    return _planned(content, run, data, task, compared=bool(run.compare or run.seeds))


def restored(content: Mapping[str, Any]) -> Plan:
    """The plan of a run, of one seed, from its ``content`` in JSON: to be read, not to be run.

    What it names may be elsewhere by now, and devices may be others.

    Raises:
        UserError: a value that this version does not know.
    """
    content = {key: _with_tuples(value) for key, value in content.items()}
    run = parse(Run, {key: value for key, value in content.items() if not isinstance(value, dict)}, "config")
    data = parse(Data, content["data"], "config.data")
    return _planned(content, run, data, _task(run, data), compared=BASELINE in content)


def _with_tuples(value: Any) -> Any:
    """JSON's lists as configs have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _planned(content: dict[str, Any], run: Run, data: Data, task: Task, compared: bool) -> Plan:
    """The plan of a config that is complete, whose student is compared with its twin or not."""
    added = _add_baselines(content, run.stages) if compared else {}
    twins = {name: name for name in run.stages} | added
    options = {name: _parse_stage(name, content[name]) for name in twins}
    return Plan(
        run=run,
        data=data,
        task=task,
        stages=tuple(_scaled(name, twin, options[name], content[name]) for name, twin in twins.items()),
        student=run.stages[-1],
        content=content,
    )


def check_files(plan: Plan) -> None:
    """Raises UserError where a file of weights that the config names is not there."""
    for stage in plan.stages:
        weights = stage.options.weights
        if weights and not as_path(weights).is_file():
            raise UserError(f"config.{stage.name}.weights is {weights!r}, but there is no such file; give its path.")


def _task(run: Run, data: Data) -> Task:
    try:
        return build_task(run.task, data)
    except UserError as error:
        raise UserError(f"config.task: {error}") from error


def _sections(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of all stages by name; refuses what is no section where one must be, or the other way round."""
    stages = content.get("stages", ())
    for name in stages if isinstance(stages, tuple) else ():
        if not isinstance(content.get(name), dict) or not isinstance(content[name].get("model"), dict):
            raise UserError(
                f"config.stages names {name!r}, but there is no stage config.{name}, a section with the section model."
            )
    sections = {key: value for key, value in content.items() if isinstance(value, dict) and "model" in value}
    _check_section("data", content.get("data", {}))
    for name, section in sections.items():
        for part in _SECTIONS:
            _check_section(f"{name}.{part}", section.get(part, {}))
        for key, method in section.get("methods", {}).items():
            _check_section(f"{name}.methods.{key}", method)
            _check_section(f"{name}.methods.{key}.optimizer", method.get("optimizer", {}))
    for key in declared(Run):
        if isinstance(content.get(key), dict):
            raise UserError(f"config.{key} is a section; it must be {declared(Run)[key].rule.words}.")
    return sections


def _check_section(path: str, part: Any) -> None:
    if not isinstance(part, dict):
        raise UserError(f"config.{path} is {part!r}; it must be a section with keys of its own.")


def _complete(section: dict[str, Any]) -> None:
    """Gives a stage the keys that its config leaves out, at their defaults."""
    section |= defaults(Stage) | section
    section |= {"loss_weights": section.get("loss_weights", {})}
    section["optimizer"] = defaults(Optimizer) | section.get("optimizer", {})
    section["methods"] = dict(sorted(section.get("methods", {}).items()))
    for name, method in section["methods"].items():
        method |= {"name": name} | method
        method |= method_options(method["name"]) | defaults(MethodSection) | method
        if "optimizer" in method:
            method["optimizer"] = defaults(Optimizer) | method["optimizer"]


def _check_keys(content: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a key that nothing knows, with the one that was meant."""
    known = [*declared(Run), *(f"data.{key}" for key in declared(Data))]
    for name, section in sections.items():
        known += [f"{name}.{key}" for key in declared(Stage)]
        known += [f"{name}.optimizer.{key}" for key in declared(Optimizer)]
        for key, method in section.get("methods", {}).items():
            path = f"{name}.methods.{key}"
            known += [f"{path}.{option}" for option in (*RESERVED[:-1], *_method_options(path, key, method))]
            known += [f"{path}.optimizer.{option}" for option in declared(Optimizer)]
    free = tuple(f"{name}.{part}." for name in sections for part in ("model", "loss_weights"))
    for path in flatten_dict(content, sep="."):
        if path in known or path.startswith(free):
            continue
        stage, methods, key = path.partition(".methods.")
        if methods and stage in sections:
            raise _no_option(stage, key, path, sections[stage]["methods"])
        raise UserError(f"config.{path} is not a key that kdjax knows; {hint(path, known)}.")


def _no_option(stage: str, key: str, path: str, methods: Mapping[str, Mapping[str, Any]]) -> UserError:
    """Says that a key below a method of a stage is none of that method's options."""
    section = key.partition(".")[0]
    name = methods[section].get("name", section)
    options = ", ".join(_method_options(f"{stage}.methods.{section}", section, methods[section])) or "none"
    own = f"--config={name}" if name in config_names() else "a file with kdjax.config.method_config"
    return UserError(
        f"config.{path} is not a key of the method {name!r}, whose options are: {options}; a method comes with its "
        f"config, {own}."
    )


def _method_options(path: str, key: str, method: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a method of a stage, whose section is at ``path`` under ``key``."""
    try:
        return declared(method_class(method.get("name", key)))
    except UserError as error:
        raise UserError(f"config.{path}.name: {error}") from error


def _parse_stage(name: str, section: Mapping[str, Any]) -> Stage:
    """The section of a stage, each value held against its rule."""
    path = f"config.{name}"
    plain = {key: value for key, value in section.items() if key not in _SECTIONS}
    check(declared(Stage), plain, path)
    for term, weight in section["loss_weights"].items():
        if not LOSS_WEIGHT.holds(weight):
            raise UserError(f"{path}.loss_weights.{term} is {weight!r}; it must be {LOSS_WEIGHT.words}.")
    return Stage(
        model=section["model"],
        methods={key: _parse_method(f"{name}.methods.{key}", key, x) for key, x in section["methods"].items()},
        loss_weights=section["loss_weights"],
        optimizer=parse(Optimizer, section["optimizer"], f"{path}.optimizer"),
        **plain,
    )


def _parse_method(path: str, key: str, section: Mapping[str, Any]) -> MethodSection:
    """The section of a method, each value held against its rule."""
    options = {option: x for option, x in section.items() if option not in RESERVED}
    check(_method_options(path, key, section), options, f"config.{path}")
    plain = {option: section[option] for option in declared(MethodSection)}
    check(declared(MethodSection), plain, f"config.{path}")
    optimizer = section.get("optimizer")
    if optimizer is not None:
        optimizer = parse(Optimizer, optimizer, f"config.{path}.optimizer")
    return MethodSection(name=section["name"], options=options, optimizer=optimizer, **plain)


def _check_run(run: Run, stages: Mapping[str, Stage], devices: int) -> None:
    if not run.stages:
        raise UserError("config.stages is empty; it must name at least one stage.")
    check_eval_batch(run, devices)
    for position, name in enumerate(run.stages):
        if name in run.stages[:position] or name.startswith(BASELINE):
            raise UserError(f"config.stages is {run.stages!r}; each name must be there once, and none be '{BASELINE}'.")
    last = run.stages[-1]
    compared = "config.compare is True" if run.compare else f"config.seeds is {run.seeds}" if run.seeds else ""
    if compared and not stages[last].teacher:
        raise UserError(f"{compared}, but the last stage, {last!r}, has no teacher to leave out.")


def check_eval_batch(run: Run, devices: int) -> None:
    """Raises UserError where as many devices cannot share the batches of an evaluation evenly."""
    if run.eval_batch_size % devices:
        raise UserError(
            f"config.eval_batch_size is {run.eval_batch_size}, which the {devices} devices cannot share evenly; it "
            f"must be a multiple of {devices}."
        )


def _check_stage(name: str, stage: Stage, earlier: tuple[str, ...], devices: int, task: Task) -> None:
    """Refuses a stage whose keys contradict each other, or what a run has."""
    try:
        model = build_model(stage.model, num_classes=1)
    except UserError as error:
        raise UserError(f"config.{name}.model: {error}") from error
    where = f"config.{name}.model is {stage.model['name']!r}"
    if model.task != task.name:
        raise UserError(
            f"{where}, a model for {model.task}, and config.task is for {task.name}; both must be the same."
        )
    if stage.steps:
        task.check_model(model, where)
    share = devices * stage.accumulate
    if stage.steps and stage.batch_size % share:
        raise UserError(
            f"config.{name}.batch_size is {stage.batch_size}, which {devices} devices in {stage.accumulate} part(s) "
            f"each cannot share evenly; it must be a multiple of {share}."
        )
    terms = _terms(name, stage, model.terms, task)
    for term in stage.loss_weights:
        if term not in terms:
            raise UserError(
                f"config.{name}.loss_weights has the term {term!r}, but this stage's loss has: {', '.join(terms)}."
            )
    _check_origins(name, stage, earlier, parts=(*model_class(stage.model["name"]).parts, "head"))


def _terms(name: str, stage: Stage, own: tuple[str, ...], task: Task) -> list[str]:
    """Names of all terms of a stage's loss; refuses methods that lack something, fit another task, or share a term."""
    terms = list(own)
    for key, section in stage.methods.items():
        path = f"config.{name}.methods.{key}"
        method = build_method({"name": section.name, **section.options})
        fitting = getattr(method, "tasks", ())
        if fitting and task.name not in fitting:
            raise UserError(
                f"{path} is the method {section.name!r}, which is for {', '.join(fitting)}, not {task.name}."
            )
        for needed in method.requires:
            where = f"config.{name}.teacher" if needed == "teacher" else f"{path}.{needed}"
            if not (stage.teacher if needed == "teacher" else getattr(section, needed)):
                raise UserError(f"{path} is the method {section.name!r}, which needs {where}.")
        names = term_names(method, own)
        if twice := [term for term in names if term in terms]:
            raise UserError(f"{path} has the term {twice[0]!r}, which another part of this stage's loss has too.")
        terms += names
    return terms


def _check_origins(name: str, stage: Stage, earlier: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Refuses what a stage starts and learns from where it is nowhere."""
    origins = [("init", "model", stage.init), ("teacher", "model", stage.teacher)]
    origins += [(f"methods.{key}.init", "method", method.init) for key, method in stage.methods.items()]
    for field, kind, origin in origins:
        known = as_path(origin).is_dir() or (kind == "method" and as_path(origin).is_file())
        if origin and origin not in earlier and not ("/" in origin and known):
            raise UserError(
                f"config.{name}.{field} is {origin!r}; it must be empty, the path of a {kind} folder that exists (with "
                f"a slash, such as ./{kind}), or an earlier stage ({', '.join(earlier) or 'there is none'})."
            )
    if stage.weights and not stage.source:
        raise UserError(
            f"config.{name}.source is empty, but config.{name}.weights names a file: say where it is from, one of "
            f"{', '.join(SOURCES)}."
        )
    if stage.weights and stage.init:
        raise UserError(f"config.{name} has both weights and init; a stage starts from one of them.")
    if not stage.steps and not (stage.weights or stage.init):
        raise UserError(f"config.{name}.steps is 0, which takes over weights: give config.{name}.weights or init.")
    for part in stage.inherit:
        if part not in parts:
            raise UserError(f"config.{name}.inherit has {part!r}; the parts of this model are {', '.join(parts)}.")
    if stage.inherit and not stage.teacher:
        raise UserError(f"config.{name}.inherit is {stage.inherit!r}, which needs config.{name}.teacher.")


def _add_baselines(content: dict[str, Any], stages: tuple[str, ...]) -> dict[str, str]:
    """Adds what a gain is quoted against: the last stage with the same start, without its methods.

    Where that stage starts from another one with a teacher, the baseline starts from that one's baseline.

    Returns:
        the names of the new sections in order, ``BASELINE`` last, and whose twins they are.
    """
    chain = [stages[-1]]
    while (origin := content[chain[0]]["init"]) in stages and content[origin]["teacher"]:
        chain.insert(0, origin)
    names = [f"{BASELINE}_{stage}" for stage in chain[:-1]] + [BASELINE]
    for position, (stage, name) in enumerate(zip(chain, names, strict=True)):
        section = copy.deepcopy(content[stage])
        section["methods"] = {}
        section["freeze"] = tuple(path for path in section["freeze"] if path.split("/")[0] != "method")
        if position:
            section["init"] = names[position - 1]
        content[name] = section
    return dict(zip(names, chain, strict=True))


def _scaled(name: str, twin: str, stage: Stage, section: Mapping[str, Any]) -> StagePlan:
    """A stage at its actual batch size: rates scale linearly with it, counts of steps inversely."""
    factor = stage.batch_size / stage.base_batch

    def count(steps: int) -> int:
        return max(1, round(steps / factor)) if steps else 0

    def scaled(optimizer: Optimizer) -> Optimizer:
        rate, warmup = optimizer.learning_rate * factor, count(optimizer.warmup_steps)
        return dataclasses.replace(optimizer, learning_rate=rate, warmup_steps=warmup)

    def method(section: MethodSection) -> MethodPlan:
        warmup = {key: count(value) for key, value in section.options.items() if key == "warmup_steps"}
        config = {"name": section.name, **section.options, **warmup}
        return MethodPlan(config, section.levels, section.init, section.optimizer and scaled(section.optimizer))

    return StagePlan(
        name=name,
        number=zlib.crc32(twin.encode()),
        options=stage,
        section=section,
        methods={key: method(section) for key, section in stage.methods.items()},
        optimizer=scaled(stage.optimizer),
        steps=count(stage.steps),
        eval_every=count(stage.eval_every),
        checkpoint_every=count(stage.checkpoint_every),
    )
