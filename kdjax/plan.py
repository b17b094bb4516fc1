"""From a config to a plan: typed, frozen, checked, scaled. Nothing above this floor reads a ConfigDict.

No file is read here, but the existence of those that a config names is asked for.
"""

import copy
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax.config.files import config_names
from kdjax.config.schema import LOSS_WEIGHT, Data, Optimizer, Run, Stage
from kdjax.errors import UserError
from kdjax.methods import build_method, method_class, method_options, term_names
from kdjax.models import build_detector
from kdjax.options import check, declared, defaults, hint, parse
from kdjax.paths import local_path
from kdjax.weights import SOURCES

BASELINE = "baseline"
"""The stage that ``compare`` adds: the identical student without the method's terms. Those that come before it, where
the student starts from another one, are called ``baseline_<name of that stage>``."""

PARTS = ("backbone", "neck", "head")
"""What every detector is made of, and what a student may inherit."""

_SECTIONS = ("model", "method", "loss_weights", "optimizer", "method_optimizer")
"""Keys of a stage that are sections of their own."""


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
    method: Mapping[str, Any]
    """As :func:`kdjax.methods.build_method` takes it, its counts of steps scaled."""
    optimizer: Optimizer
    """Scaled."""
    method_optimizer: Optimizer | None
    """Scaled."""
    steps: int
    eval_every: int
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run."""

    run: Run
    data: Data
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
    options = {name: _parse_stage(name, section) for name, section in sections.items()}
    _check_run(run, options, devices)
    for position, name in enumerate(run.stages):
        _check_stage(name, options[name], earlier=run.stages[:position], devices=devices, masks=data.masks)
    added = _add_baselines(content, run.stages) if run.compare or run.seeds else {}
    twins = {name: name for name in run.stages} | added
    options |= {name: _parse_stage(name, content[name]) for name in added}
    return Plan(
        run=run,
        data=data,
        stages=tuple(_scaled(name, twin, options[name], content[name]) for name, twin in twins.items()),
        student=run.stages[-1],
        content=content,
    )


def _sections(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of all stages by name; refuses what is no section where one must be, or the other way round."""
    stages = content.get("stages", ())
    for name in stages if isinstance(stages, tuple) else ():
        if not isinstance(content.get(name), dict) or not isinstance(content[name].get("model"), dict):
            raise UserError(
                f"config.stages names {name!r}, but there is no stage config.{name}, a section with the section model."
            )
    sections = {key: value for key, value in content.items() if isinstance(value, dict) and "model" in value}
    parts = [("data", content.get("data", {}))]
    parts += [
        (f"{name}.{part}", section[part]) for name, section in sections.items() for part in _SECTIONS if part in section
    ]
    for path, part in parts:
        if not isinstance(part, dict):
            raise UserError(f"config.{path} is {part!r}; it must be a section with keys of its own.")
    for key in declared(Run):
        if isinstance(content.get(key), dict):
            raise UserError(f"config.{key} is a section; it must be {declared(Run)[key].rule.words}.")
    return sections


def _complete(section: dict[str, Any]) -> None:
    """Gives a stage the keys that its config leaves out, at their defaults."""
    method = section.get("method", {})
    method = {"name": "none"} | method
    section |= defaults(Stage) | section
    section |= {"method": method_options(method["name"]) | method, "loss_weights": section.get("loss_weights", {})}
    section["optimizer"] = defaults(Optimizer) | section.get("optimizer", {})
    if "method_optimizer" in section:
        section["method_optimizer"] = defaults(Optimizer) | section["method_optimizer"]


def _check_keys(content: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a key that nothing knows, with the one that was meant."""
    known = [*declared(Run), *(f"data.{key}" for key in declared(Data))]
    for name, section in sections.items():
        known += [f"{name}.{key}" for key in declared(Stage)]
        known += [f"{name}.{part}.{key}" for part in ("optimizer", "method_optimizer") for key in declared(Optimizer)]
        known += [f"{name}.method.{key}" for key in ("name", *_method_options(name, section.get("method", {})))]
    free = tuple(f"{name}.{part}." for name in sections for part in ("model", "loss_weights"))
    for path, _ in _leaves(content):
        stage, _, key = path.partition(".method.")
        if path in known or path.startswith(free):
            continue
        if key and stage in sections:
            method = sections[stage]["method"]["name"]
            options = ", ".join(_method_options(stage, sections[stage]["method"])) or "none"
            own = f"--config={method}" if method in config_names() else "a file with kdjax.config.method_config"
            raise UserError(
                f"config.{path} is not a key of the method {method!r}, whose options are: {options}; a method comes "
                f"with its config, {own}."
            )
        raise UserError(f"config.{path} is not a key that kdjax knows; {hint(path, known)}.")


def _method_options(name: str, method: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the method that a stage names."""
    try:
        return declared(method_class(method.get("name", "none")))
    except UserError as error:
        raise UserError(f"config.{name}.method.name: {error}") from error


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse_stage(name: str, section: Mapping[str, Any]) -> Stage:
    """The section of a stage, each value held against its rule."""
    path, method = f"config.{name}", section["method"]
    check(_method_options(name, method), {key: x for key, x in method.items() if key != "name"}, f"{path}.method")
    plain = {key: value for key, value in section.items() if key not in _SECTIONS}
    check(declared(Stage), plain, path)
    for term, weight in section["loss_weights"].items():
        if not LOSS_WEIGHT.holds(weight):
            raise UserError(f"{path}.loss_weights.{term} is {weight!r}; it must be {LOSS_WEIGHT.words}.")
    own = section.get("method_optimizer")
    return Stage(
        model=section["model"],
        method=method,
        loss_weights=section["loss_weights"],
        optimizer=parse(Optimizer, section["optimizer"], f"{path}.optimizer"),
        method_optimizer=None if own is None else parse(Optimizer, own, f"{path}.method_optimizer"),
        **plain,
    )


def _check_run(run: Run, stages: Mapping[str, Stage], devices: int) -> None:
    if not run.stages:
        raise UserError("config.stages is empty; it must name at least one stage.")
    if run.eval_batch_size % devices:
        raise UserError(
            f"config.eval_batch_size is {run.eval_batch_size}, which the {devices} devices cannot share evenly; it "
            f"must be a multiple of {devices}."
        )
    for position, name in enumerate(run.stages):
        if name in run.stages[:position] or name.startswith(BASELINE):
            raise UserError(f"config.stages is {run.stages!r}; each name must be there once, and none be '{BASELINE}'.")
    last = run.stages[-1]
    compared = "config.compare is True" if run.compare else f"config.seeds is {run.seeds}" if run.seeds else ""
    if compared and not stages[last].teacher:
        raise UserError(f"{compared}, but the last stage, {last!r}, has no teacher to leave out.")


def _check_stage(name: str, stage: Stage, earlier: tuple[str, ...], devices: int, masks: bool) -> None:
    """Refuses a stage whose keys contradict each other, or what a run has."""
    try:
        model = build_detector(stage.model, num_classes=1)
    except UserError as error:
        raise UserError(f"config.{name}.model: {error}") from error
    try:
        method = build_method(stage.method)
    except UserError as error:
        raise UserError(f"config.{name}.method: {error}") from error
    learns_masks = any(term == "mask" or term.endswith("_mask") for term in model.terms)
    if stage.steps and learns_masks and not masks:
        raise UserError(
            f"config.data.masks is False, but config.{name}.model is {stage.model['name']!r}, which learns masks: set "
            "config.data.masks=True, with data that have outlines."
        )
    share = devices * stage.accumulate
    if stage.batch_size % share:
        raise UserError(
            f"config.{name}.batch_size is {stage.batch_size}, which {devices} devices in {stage.accumulate} part(s) "
            f"each cannot share evenly; it must be a multiple of {share}."
        )
    terms = (*model.terms, *term_names(method, model.terms), *(["box_imitation"] if stage.imitate_boxes else []))
    for term in stage.loss_weights:
        if term not in terms:
            raise UserError(
                f"config.{name}.loss_weights has the term {term!r}, but this stage's loss has: {', '.join(terms)}."
            )
    _check_origins(name, stage, earlier)
    for field in method.needs:
        if getattr(stage, field, True) in ("", ()):
            raise UserError(f"config.{name}.method is {stage.method['name']!r}, which needs config.{name}.{field}.")


def _check_origins(name: str, stage: Stage, earlier: tuple[str, ...]) -> None:
    """Refuses what a stage starts and learns from where it is nowhere."""
    for field, kind in (("init", "model"), ("teacher", "model"), ("method_init", "method")):
        origin = getattr(stage, field)
        if origin and origin not in earlier and not ("/" in origin and local_path(origin).is_dir()):
            raise UserError(
                f"config.{name}.{field} is {origin!r}; it must be empty, the path of a {kind} folder that exists (with "
                f"a slash, such as ./{kind}), or an earlier stage ({', '.join(earlier) or 'there is none'})."
            )
    if stage.weights and not stage.source:
        raise UserError(
            f"config.{name}.source is empty, but config.{name}.weights names a file: say where it is from, one of "
            f"{', '.join(SOURCES)}."
        )
    if stage.weights and not local_path(stage.weights).is_file():
        raise UserError(f"config.{name}.weights is {stage.weights!r}, but there is no such file; give its path.")
    if stage.weights and stage.init:
        raise UserError(f"config.{name} has both weights and init; a stage starts from one of them.")
    if not stage.steps and not (stage.weights or stage.init):
        raise UserError(f"config.{name}.steps is 0, which takes over weights: give config.{name}.weights or init.")
    for part in stage.inherit:
        if part not in PARTS:
            raise UserError(f"config.{name}.inherit has {part!r}; the parts of a detector are {', '.join(PARTS)}.")
    for field in ("inherit", "imitate_boxes"):
        if getattr(stage, field) and not stage.teacher:
            raise UserError(f"config.{name}.{field} is {getattr(stage, field)!r}, which needs config.{name}.teacher.")


def _add_baselines(content: dict[str, Any], stages: tuple[str, ...]) -> dict[str, str]:
    """Adds what a gain is quoted against: the last stage with the same start, without the method.

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
        section |= {"method": {"name": "none"}, "method_init": "", "imitate_boxes": False}
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

    warmup = {key: count(value) for key, value in stage.method.items() if key == "warmup_steps"}
    return StagePlan(
        name=name,
        number=zlib.crc32(twin.encode()),
        options=stage,
        section=section,
        method=dict(stage.method) | warmup,
        optimizer=scaled(stage.optimizer),
        method_optimizer=stage.method_optimizer and scaled(stage.method_optimizer),
        steps=count(stage.steps),
        eval_every=count(stage.eval_every),
        checkpoint_every=count(stage.checkpoint_every),
    )
