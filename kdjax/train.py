"""The one train loop: a stage of a config becomes a trained detector in a folder.

A stage's folder holds ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoints/`` and, once finished,
``model/`` (the trained detector alone), ``method/`` (what the method learnt, if anything), ``detections.json`` (of the
images that are drawn) and ``result.json``.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from kdjax import __version__
from kdjax.checkpoint import (
    STAGE_FILE,
    Checkpoints,
    describe,
    describe_model,
    load_method,
    load_student,
    load_variables,
    save_method,
    save_model,
)
from kdjax.config import Scaled, differences, make_augmentation, make_sizing, scaled_schedule, stage_number
from kdjax.data.batches import train_batches
from kdjax.data.check import Checks, compare_classes
from kdjax.data.examples import Source
from kdjax.data.indexed import IndexedSource
from kdjax.data.sources import open_source
from kdjax.data.statistics import class_statistics
from kdjax.devices import AXIS, Prefetch, parallel, replicate
from kdjax.distill import distill_step, select_levels
from kdjax.errors import NumericError, UserError
from kdjax.evaluate import ImageDetections, Metrics, evaluate, make_predict
from kdjax.losses import ClassStatistics, uniform_statistics
from kdjax.methods import build_method
from kdjax.methods.levels import describe_pairs
from kdjax.models import build_detector, class_outputs, complete
from kdjax.optim import by_part, make_optimizer, make_schedule, paths, trained_norm, under
from kdjax.paths import local_path
from kdjax.report import MetricWriter, Throughput, parameter_table, progress_line, write_json
from kdjax.state import TrainState, Variables, init_state
from kdjax.types import Batch, Features, Sampling, Targets
from kdjax.weights import (
    COCO_NAMES,
    Imported,
    LoadReport,
    count_classes,
    expected_model,
    import_state_dict,
    inherit,
    load_into,
    merged,
    read_weights,
    without,
)

# Forced CPU devices abort when too many steps are in flight.
_MOST_STEPS_IN_FLIGHT = 20

# Keys that change nothing that a stage computes: a run may be resumed with other values.
_WITHOUT_EFFECT = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "teacher_floor",
    "published_ap",
    "threads",
    "data_dir",
    "download",
    "strict",
)

_FIRST_VERSION = "0.1.0"
"""It wrote no version beside its stages, and all stages of a run drew the same batches."""

_RESULT = "result.json"

MOST_PICTURES = 32
"""Images whose detections are kept for drawing."""


class Teacher(NamedTuple):
    """A trained detector that teaches."""

    module: nn.Module
    variables: Variables


class Run(NamedTuple):
    """Everything that the steps of a stage need, built once."""

    student: nn.Module
    model: Mapping[str, Any]
    """The student's section of the config, with what its first weights expect."""
    teacher: Teacher | None
    step: Any
    """The distillation step mapped over devices: (state, teacher variables, batch, key) -> (state, metrics)."""
    learning_rate: Any
    """The schedule: learning rate by step."""
    schedule: Scaled


class Finished(NamedTuple):
    """A stage that is done."""

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The folder of its trained detector."""
        return self.folder / "model"

    @property
    def method(self) -> Path:
        """The folder of what its method learnt."""
        return self.folder / "method"


def train_stage(config: ConfigDict, name: str, folder: Path, earlier: Mapping[str, Finished]) -> dict[str, Any]:
    """Trains one stage of a config, or continues it, or finds it finished.

    Args:
        config: the whole config, checked.
        name: of the stage: its section is ``config[name]``.
        folder: the stage's own.
        earlier: the stages before it, by name.

    Returns:
        what ``result.json`` holds: "metrics" (percent), those of the "teacher" or None, "steps", "images_per_second",
        "parameters".

    Raises:
        UserError: something that the config names does not fit, or the teacher's AP is below ``teacher_floor``.
        NumericError: the loss is not finite.
    """
    stage = config[name]
    if done_before := finished_result(folder):
        print(f"[{name}] finished earlier: AP {done_before['metrics']['AP']:.1f}. Nothing to do.", flush=True)
        return done_before
    train_source = open_split(config, training=True)
    eval_source = open_split(config, training=False)
    evaluation = functools.partial(
        evaluate, source=eval_source, batch_size=config.eval_batch_size, image_size=make_sizing(config.data)
    )
    run, state, teacher = _prepare(config, name, earlier, train_source)
    steps = run.schedule.steps
    teacher_metrics = _check_teacher(config, name, earlier, teacher, evaluation, eval_source.class_names)
    predict = make_predict(run.student)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"kdjax": __version__, **identity(config, name)})
    classes = train_source.class_names, make_sizing(config.data).shapes[0], train_source.category_ids
    write_json(folder / STAGE_FILE, describe_model(run.model, *classes))
    with Checkpoints(folder / "checkpoints", keep=stage.keep_checkpoints) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            print(f"[{name}] continues from the checkpoint of step {int(state.step)}.", flush=True)
        first = int(state.step)
        batches = iter(()) if first == steps else open_batches(config, name, first)
        teacher_variables = run.teacher and replicate(run.teacher.variables)
        key = replicate(stage_key(config, name))
        throughput = Throughput(steps, stage.batch_size)
        recent: list[dict[str, jax.Array]] = []
        compiled: set[tuple[int, int]] = set()
        with MetricWriter(folder, first) as writer, Prefetch(batches, parts=stage.accumulate) as placed:
            for done in range(first + 1, steps + 1):
                if not placed.ready():
                    # What the devices still have to do is no waiting for data.
                    jax.block_until_ready(state)
                with throughput.waiting():
                    batch = next(placed)
                height, width = batch["images"].shape[2:4]
                if (height, width) in compiled:
                    state, values = run.step(state, teacher_variables, batch, key)
                else:
                    compiled.add((height, width))
                    started = time.perf_counter()
                    with throughput.paused(steps=1):
                        state, values = jax.block_until_ready(run.step(state, teacher_variables, batch, key))
                    seconds = time.perf_counter() - started
                    print(f"[{name}] first step of {height}x{width} took {seconds:.0f} s with compilation.", flush=True)
                recent.append(values)
                if done == first + 1:
                    throughput.measure(done)
                evaluates = done == steps or _due(done, run.schedule.eval_every)
                saves = evaluates or _due(done, run.schedule.checkpoint_every)
                if saves or _due(done, stage.log_every):
                    means = _means(recent)
                    recent = []
                    row = _report_progress(name, run, done, means, throughput)
                    finite = all(map(math.isfinite, means.values()))
                    if evaluates and finite:
                        with throughput.paused():
                            metrics, detections = evaluation(predict, state.student())
                        print(f"[{name}] step {done}: {_in_words(metrics)}", flush=True)
                        row["eval"] = metrics
                    writer.write(done, row)
                    if not finite:
                        raise _not_finite(name, done, means)
                    if saves:
                        checkpoints.save(state, ap=metrics["AP"] if evaluates else None)
                elif done % _MOST_STEPS_IN_FLIGHT == 0:
                    jax.block_until_ready(values)
    if first == steps:
        metrics, detections = evaluation(predict, state.student())
    _export(config, name, folder, state, eval_source, detections)
    result: dict[str, Any] = {
        "metrics": metrics,
        "teacher": teacher_metrics,
        "steps": steps,
        "images_per_second": throughput.images_per_second,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params["student"])),
    }
    # Last: it marks the stage as finished.
    write_json(folder / _RESULT, result)
    return result


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(recent: list[dict[str, jax.Array]]) -> dict[str, float]:
    values = jax.device_get(recent)
    return {name: float(np.mean([x[name] for x in values])) for name in values[0]}


def _report_progress(
    name: str, run: Run, done: int, means: Mapping[str, float], throughput: Throughput
) -> dict[str, Any]:
    """Prints the line of a step, and returns its row of ``metrics.jsonl``."""
    rate = throughput.measure(done)
    learning_rate = float(run.learning_rate(done - 1))
    shares = {key.removeprefix("loss/"): x for key, x in means.items() if key.startswith("loss/")}
    print(f"[{name}] {progress_line(done, run.schedule.steps, shares, learning_rate, *rate)}", flush=True)
    return {**means, "learning_rate": learning_rate, "images_per_second": rate.images_per_second, "waited": rate.waited}


def _in_words(metrics: Mapping[str, Any]) -> str:
    return "  ".join(f"{key} {metrics[key]:.1f}" for key in ("AP", "AP50", "AP75", "mask_AP") if key in metrics)


def _check_teacher(
    config: ConfigDict,
    name: str,
    earlier: Mapping[str, Finished],
    teacher: Teacher | None,
    evaluation: Callable[..., tuple[Metrics, list[ImageDetections]]],
    class_names: Sequence[str],
) -> Mapping[str, Any] | None:
    """The teacher's metrics on the evaluation split; a teacher below the stage's floor stops the run."""
    stage = config[name]
    if teacher is None:
        return None
    if stage.teacher in earlier:
        metrics: Mapping[str, Any] = earlier[stage.teacher].metrics
    else:
        metrics, _ = evaluation(make_predict(teacher.module), teacher.variables)
        print(f"[{name}] teacher: {_in_words(metrics)}", flush=True)
    floor = teacher_floor(config, name, class_names)
    if not (metrics["AP"] >= floor or floor == 0):
        known = "" if stage.teacher_floor is not None else ", which is known of it"
        raise UserError(
            f"The teacher of stage {name!r}, {stage.teacher!r}, reaches AP {metrics['AP']:.1f}, below "
            f"config.{name}.teacher_floor = {floor:g}{known}: check its weights, train it longer, or lower the floor."
        )
    return metrics


SHAPES_FLOOR = 10.0
"""AP that the teacher of every config reaches on the embedded data, well below its 24."""
_PUBLISHED_SLACK = 1.0


def teacher_floor(config: ConfigDict, name: str, class_names: Sequence[str]) -> float:
    """The AP below which a stage's teacher may not teach.

    Where the config says none, that is what is known of the teacher: ``SHAPES_FLOOR`` on the embedded data; one below
    the AP that a model zoo states of weights which are taken over as they are, on COCO's classes; and 0 elsewhere, for
    nobody knows what a teacher reaches on somebody's own data.
    """
    stage = config[name]
    if stage.teacher_floor is not None:
        return stage.teacher_floor
    if config.data.name == "shapes":
        return SHAPES_FLOOR
    teacher = config.get(stage.teacher) if stage.teacher else None
    if teacher and not teacher.steps and tuple(class_names) == COCO_NAMES:
        return max(teacher.published_ap - _PUBLISHED_SLACK, 0.0)
    return 0.0


def build_run(
    config: ConfigDict,
    name: str,
    num_classes: int,
    teacher: Teacher | None,
    start: Callable[[Variables], Variables],
    given: dict[str, Any] | None = None,
    statistics: ClassStatistics | None = None,
    model: Mapping[str, Any] | None = None,
) -> tuple[Run, TrainState]:
    """Builds the student, the method, the optimiser and the mapped step; and the state of step 0.

    Args:
        config: the whole config, checked.
        name: of the stage.
        num_classes: of the data.
        teacher: detector whose features are distilled, or None.
        start: takes the student's fresh variables to those that it starts from.
        given: parts of the method's parameters, by name, that an earlier stage learnt; they do not move.
        statistics: of the training set's boxes; None for :func:`kdjax.losses.uniform_statistics`.
        model: config of the student, where its first weights expect something else than the stage's section says.

    Raises:
        UserError: the method cannot pair the two pyramids, or a frozen path is in neither of them.
    """
    stage = config[name]
    dtype = jnp.dtype(stage.dtype)
    model = model or stage.model.to_dict()
    student = build_detector(model, num_classes=num_classes, axis_name=AXIS, dtype=dtype)
    schedule = scaled_schedule(stage)
    statistics = statistics or uniform_statistics(num_classes)
    method = build_method(schedule.method, statistics=statistics, axis_name=AXIS, dtype=dtype)
    key = stage_key(config, name)
    images = jnp.zeros((1, *make_sizing(config.data).shapes[0], 3))
    variables = start(init_jit(student.clone(axis_name=None).init)(key, images))
    features, taught = select_levels(_pyramid(student, images), stage.levels), {}
    if "teacher" in method.needs and teacher:
        taught = select_levels(_pyramid(teacher.module, images), stage.levels)
        print(f"[{name}] {describe_pairs(features, taught)}", flush=True)
    if stage.imitate_boxes and teacher:
        _try_imitation(student, teacher.module, images)
    elif not taught:
        teacher = None
    method_variables = _init_method(method, features, taught, images, key)
    given = given or {}
    if given:
        params = method_variables["params"]
        wanted = {part: params[part] for part in given if part in params}
        filled, report = load_into(wanted, given, origin=stage.method_init)
        print(f"[{name}] the method's {', '.join(given)} from {stage.method_init}: {report}", flush=True)
        method_variables = {"params": params | filled}
    freeze = (*stage.freeze, *(f"method/{part}" for part in given))

    learning_rate, optimizer = _optimizer(stage, "optimizer")
    separate = "method_optimizer" in stage
    method_optimizer = _optimizer(stage, "method_optimizer")[1] if separate else None
    optimizer = by_part(optimizer, method=method_optimizer, freeze=freeze)
    step = functools.partial(
        distill_step,
        student=student,
        teacher=teacher and teacher.module,
        method=method,
        optimizer=optimizer,
        loss_weights=stage.loss_weights.to_dict(),
        levels=stage.levels,
        imitate_boxes=stage.imitate_boxes,
        axis_name=AXIS,
        accumulate=stage.accumulate,
        ema_decay=stage.ema_decay,
        norm=functools.partial(trained_norm, freeze=(*freeze, *(["method"] if separate else []))),
    )
    state = init_state(variables, method_variables, optimizer, ema=stage.ema_decay > 0)
    for prefix in stage.freeze:
        if not any(under(path, (prefix,)) for path in jax.tree.leaves(paths(state.params))):
            raise UserError(f"config.{name}.freeze has {prefix!r}, below which there are no parameters.")
    run = Run(
        student=student,
        model=model,
        teacher=teacher,
        step=parallel(step, in_axes=(None, None, 0, None), replicated=True),
        learning_rate=learning_rate,
        schedule=schedule,
    )
    return run, replicate(state)


def stage_key(config: ConfigDict, name: str) -> jax.Array:
    """The PRNG key of a stage, from the run's seed and :func:`kdjax.config.stage_number`."""
    return jax.random.fold_in(jax.random.key(config.seed), stage_number(config, name))


def _batch_seed(config: ConfigDict, name: str) -> int:
    """The seed in [0, 2**32) of the order and the augmentation of a stage's batches, from the same two."""
    return int(np.random.SeedSequence((config.seed, stage_number(config, name))).generate_state(1)[0])


def _optimizer(stage: ConfigDict, section: str) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step, and the optimiser, of a section of a stage."""
    options, schedule = stage[section], scaled_schedule(stage, section)
    learning_rate = make_schedule(
        options.schedule,
        schedule.learning_rate,
        max(schedule.steps, 1),
        milestones=options.milestones,
        final_factor=options.final_factor,
        warmup_steps=schedule.warmup_steps,
        warmup_factor=options.warmup_factor,
    )
    optimizer = make_optimizer(
        learning_rate,
        name=options.name,
        momentum=options.momentum,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        decay_all=options.decay_norm_and_bias,
        clip_norm=options.clip_norm or None,
    )
    return learning_rate, optimizer


def _prepare(
    config: ConfigDict, name: str, earlier: Mapping[str, Finished], source: Source
) -> tuple[Run, TrainState, Teacher | None]:
    """Builds a stage's run and its first state, loads its teacher, and says what was loaded from where."""
    stage, class_names = config[name], source.class_names

    def folder(origin: str) -> Path:
        return earlier[origin].model if origin in earlier else local_path(origin)

    teacher = None
    if stage.teacher:
        teacher = _load(folder(stage.teacher), class_names, stage.dtype)
        report = LoadReport(tuple(jax.tree.leaves(paths(teacher.variables))), (), (), ())
        print(f"[{name}] teacher {folder(stage.teacher)}: {report}", flush=True)

    model, imported = stage.model.to_dict(), None
    if stage.weights:
        imported = _import(stage, name, class_names)
        model = imported.model
    elif stage.init:
        model = _as_expected(model, describe(folder(stage.init)).get("model", model), whole=stage.init_strict)

    def start(variables: Variables) -> Variables:
        if imported:
            variables, report = load_into(variables, imported.variables, origin=stage.weights, strict=False)
            print(f"[{name}] starts from {stage.weights}: {imported.report}; {report}", flush=True)
        if stage.init:
            saved = _saved(folder(stage.init), model, class_names, strict=stage.init_strict)
            variables, report = load_into(variables, saved, origin=str(folder(stage.init)), strict=stage.init_strict)
            print(f"[{name}] starts from {folder(stage.init)}: {report}", flush=True)
        if teacher and stage.inherit:
            variables, report = inherit(variables, teacher.variables, stage.inherit)
            print(f"[{name}] inherits {', '.join(stage.inherit)} from the teacher: {report}", flush=True)
        return variables

    given = None
    if stage.method_init:
        origin = stage.method_init
        given = load_method(earlier[origin].method if origin in earlier else origin)
    needs = build_method(stage.method.to_dict()).needs
    statistics = class_statistics(source) if "statistics" in needs else None
    run, state = build_run(config, name, len(class_names), teacher, start, given, statistics, model)
    table = {name: state.params["student"]}
    if state.params["method"]:
        table[f"method {stage.method.name}"] = state.params["method"]
    print(parameter_table(table), flush=True)
    if stage.batch_size != stage.base_batch:
        print(
            f"[{name}] batch {stage.batch_size} instead of {stage.base_batch}: learning rate "
            f"{run.schedule.learning_rate:g} instead of {stage.optimizer.learning_rate:g}, {run.schedule.steps} steps "
            f"instead of {stage.steps}.",
            flush=True,
        )
    return run, state, teacher


def import_detector(model: Mapping[str, Any], weights: str, source: str, num_classes: int | None = None) -> Imported:
    """The weights in a file, as those of a detector.

    Args:
        model: config of the detector, as :func:`kdjax.models.build_detector` takes it.
        weights: path of the file.
        source: a key of ``kdjax.weights.SOURCES``.
        num_classes: how many classes it must tell apart, without a background; None for as many as it does.

    Raises:
        UserError: one sentence says what does not fit.
    """
    file = read_weights(weights)
    expected = expected_model(complete(model), source, file.tensors)

    def like(classes: int) -> Any:
        module = build_detector(expected.model, num_classes=classes)
        return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))

    if num_classes is None:
        # A backbone alone tells nothing apart.
        num_classes = count_classes(file.tensors, source, model=expected.model, like=like(1), num_classes=1) or 1
    imported = import_state_dict(
        file.tensors, source, model=expected.model, like=like(num_classes), num_classes=num_classes, origin=weights
    )
    report = imported.report._replace(changes=(*expected.changes, *imported.report.changes))
    return imported._replace(report=report, class_names=file.class_names or imported.class_names)


def _import(stage: ConfigDict, name: str, class_names: tuple[str, ...]) -> Imported:
    """The weights in the file that a stage names, which must know the classes of the data where all are taken over."""
    otherwise = f"config.{name}.init_strict=False takes over what does not depend on classes, in a stage that trains"
    model = stage.model.to_dict()
    if not stage.init_strict:
        imported = import_detector(model, stage.weights, stage.source)
        kept = _of_classes(imported.variables, imported.model, imported.class_names, class_names)
        if len(jax.tree.leaves(kept)) < len(jax.tree.leaves(imported.variables)):
            changes = (*imported.report.changes, "what depends on its classes, which are not the data's, starts afresh")
            imported = imported._replace(report=imported.report._replace(changes=changes))
        return imported._replace(variables=kept)
    try:
        imported = import_detector(model, stage.weights, stage.source, len(class_names))
    except UserError as error:
        if len(class_names) == len(COCO_NAMES):
            raise
        raise UserError(
            f"{error} The data have {len(class_names)} classes; if the file has others, {otherwise}."
        ) from error
    known = imported.class_names or class_names
    if difference := other_classes(stage.weights, known, "the data", class_names):
        raise UserError(f"config.{name}.weights: {difference}; {otherwise}.")
    return imported


def other_classes(file: str, known: Sequence[str], theirs: str, class_names: Sequence[str]) -> str:
    """How the classes of a file of weights differ from others, in words; empty if they are the same in the same order.

    Files write the same names in several ways: ``traffic_light``.
    """

    def plain(name: str) -> str:
        return name.lower().replace("_", " ")

    spelt = {plain(name): name for name in class_names}
    return compare_classes(file, [spelt.get(plain(name), name) for name in known], theirs, class_names)


def _of_classes(
    variables: Variables, model: Mapping[str, Any], known: Sequence[str] | None, class_names: Sequence[str]
) -> Variables:
    """A detector's variables without those that tell classes apart, unless they are known to be the data's.

    That there are as many says nothing.
    """
    if known and not other_classes("", known, "", class_names):
        return variables
    return without(variables, class_outputs(model))


_EXPECTED = {
    "backbone": ("style", "epsilon"),
    "neck": ("extra_relu",),
    "head": ("convention", "norm_on_box", "centerness_on_box"),
}
"""What weights decide and no array shows, by section; besides the statistics of pixels."""


def _as_expected(model: dict[str, Any], origin: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """The config of a detector with what the weights of another one, which it starts from, expect.

    A head that takes over only what fits goes on learning, as its own config says.
    """
    expected = {key: origin[key] for key in ("pixel_mean", "pixel_std") if key in origin}
    for section, fields in _EXPECTED.items():
        theirs = origin.get(section, {})
        if section != "head" or whole:
            expected[section] = {key: theirs[key] for key in fields if key in theirs}
    return merged(model, expected)


def init_jit(init: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a module's ``init``, which runs once: on CPU without optimisation, which took 16 s for one detector."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)


def _pyramid(module: nn.Module, images: jax.Array) -> Features:
    """Zeros of the shapes and dtypes of a detector's features."""
    init = functools.partial(module.clone(axis_name=None).init_with_output, method="features")
    shapes, _ = jax.eval_shape(init, jax.random.key(0), images)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _try_imitation(student: nn.Module, teacher: nn.Module, images: jax.Array) -> None:
    """Raises UserError unless the student's head can imitate the teacher's."""
    modules = [module.clone(axis_name=None) for module in (student, teacher)]

    def imitate() -> jax.Array:
        targets, key = _no_targets(images), jax.random.key(0)
        ours = modules[0].init_with_output(key, images, sampling=Sampling(targets, key[None]))[0][1]
        features = modules[1].init_with_output(key, images, method="features")[0]
        theirs = modules[1].init_with_output(key, features, ours, targets.image_size, method="regress")[0]
        return modules[0].imitate_boxes(ours, theirs, targets)

    jax.eval_shape(imitate)


def _no_targets(images: jax.Array) -> Targets:
    """One image without objects."""
    return Targets(
        boxes=jnp.zeros((1, 1, 4)),
        labels=jnp.zeros((1, 1), jnp.int32),
        valid=jnp.zeros((1, 1), bool),
        image_size=jnp.asarray(images.shape[1:3])[None],
    )


def _init_method(
    method: nn.Module, student: Features, teacher: Features, images: jax.Array, key: jax.Array
) -> Variables:
    """The method's variables, from the shapes of both pyramids."""
    if not method.terms:
        return {}
    init = functools.partial(method.clone(axis_name=None).init, step=jnp.zeros((), jnp.int32), task=lambda _: {})
    return init_jit(init)(key, student, teacher, _no_targets(images), keys=key[None])


def _saved(folder: Path, model: Mapping[str, Any], class_names: tuple[str, ...], strict: bool) -> Variables:
    """The variables of a trained detector to start from: all of them, or those that do not depend on its classes.

    Raises:
        UserError: ``strict``, and the detector tells other classes apart than the data do.
    """
    if strict:
        _check_classes(folder, class_names)
        return load_variables(folder)
    known = describe(folder)
    return _of_classes(load_variables(folder), known.get("model", model), known.get("class_names"), class_names)


def _load(folder: Path, class_names: tuple[str, ...], dtype: str) -> Teacher:
    """A trained detector, which must know the classes of the data."""
    _check_classes(folder, class_names)
    return Teacher(*load_student(folder, dtype=dtype))


def _check_classes(folder: Path, class_names: tuple[str, ...]) -> None:
    """Refuses a model of other classes than the data's, or in another order, where its folder says which."""
    known = tuple(describe(folder).get("class_names", class_names))
    if difference := compare_classes(f"the model in {folder}", known, "the data", class_names):
        raise UserError(f"{difference}; both must have the same classes in the same order.")


def open_split(config: ConfigDict, *, training: bool) -> IndexedSource:
    """The split that a config trains on, or the one that it is evaluated on; it is read once in a process.

    Raises:
        UserError: one sentence about the data or their name, or masks to train on that the split cannot give.
    """
    data = config.data
    checks = Checks(strict=data.strict, lenient=data.lenient)
    if training:
        checks = checks._replace(skip_empty=data.skip_empty, max_objects=data.max_objects)
    split_name = data.train_split if training else data.eval_split
    source = _opened(data.name, split_name, data.data_dir or None, checks=checks, download=data.download)
    if training and data.masks and source.outlines is None:
        raise UserError(
            f"config.data.masks is True, but config.data.name is {data.name!r}, whose split {split_name!r} has no "
            "outlines of its objects, of which masks are made: take coco_json:<folder> with segmentations, or shapes; "
            "where no stage learns masks, set config.data.masks=False."
        )
    return source


# The splits of the config at hand: stages share them.
_opened = functools.lru_cache(maxsize=2)(open_source)


def open_batches(config: ConfigDict, name: str, first_step: int) -> Iterator[Batch]:
    """The training batches of a stage from a step on, on the host.

    Raises:
        UserError: there can be none; or, in the middle, an image that was there at the start cannot be read any more.
    """
    return train_batches(
        open_split(config, training=True),
        batch_size=config[name].batch_size,
        image_size=make_sizing(config.data),
        max_objects=config.data.max_objects,
        seed=_batch_seed(config, name),
        first_step=first_step,
        augmentation=make_augmentation(config.data),
        mask_size=config.data.mask_size if config.data.masks else 0,
        num_threads=config.data.threads,
        log=lambda text: print(f"[{name}] {text}", flush=True),
    )


def check_data(config: ConfigDict) -> dict[str, IndexedSource]:
    """Opens both splits of a config, "train" and "eval", and prints what was found.

    Raises:
        UserError: a split cannot be used, or they differ in their classes.
    """
    splits = {name: open_split(config, training=name == "train") for name in ("train", "eval")}
    train, evaluation = splits.values()
    if difference := compare_classes(
        f"the split {config.data.train_split!r}",
        train.class_names,
        f"the split {config.data.eval_split!r}",
        evaluation.class_names,
    ):
        raise UserError(f"{config.data.name}: {difference}; both must have the same classes in the same order.")
    for source in splits.values():
        print("\n".join(source.report_lines()), flush=True)
    return splits


def identity(config: ConfigDict, name: str) -> dict[str, Any]:
    """What determines a stage's result, as plain JSON: its section, the data, the seed, and all that it draws from.

    The data are known by their splits' fingerprints.
    """
    stage = config[name]
    sources: dict[str, Any] = {
        field: identity(config, stage[field]) if stage[field] in config else describe(stage[field])
        for field in ("teacher", "init", "method_init")
        if stage[field]
    }
    section = {key: value for key, value in stage.to_dict().items() if key not in _WITHOUT_EFFECT}
    data = {key: value for key, value in config.data.to_dict().items() if key not in _WITHOUT_EFFECT}
    data |= {key: open_split(config, training=key == "train").fingerprint for key in ("train", "eval")}
    if stage.weights:
        try:
            with local_path(stage.weights).open("rb") as file:
                sources["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"config.{name}.weights={stage.weights} cannot be read ({error.strerror}).") from error
    return json.loads(json.dumps({"seed": config.seed, "data": data, "stage": section, "from": sources}))


def check_claim(config: ConfigDict, name: str, folder: Path) -> None:
    """Refuses to go on in the folder of a run of another config; nothing is written.

    Raises:
        UserError: one sentence with the keys that differ.
    """
    finished, begun = (folder / _RESULT).exists(), any((folder / "checkpoints").glob("[0-9]*"))
    if not (finished or begun) or not (folder / "config.json").exists():
        return
    saved = json.loads((folder / "config.json").read_text())
    version = saved.pop("kdjax", _FIRST_VERSION)
    changed = differences(saved, identity(config, name))
    if changed:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or delete "
            "that folder to start it anew."
        )
    if version == _FIRST_VERSION and not finished:
        raise UserError(
            f"{folder} holds a stage that kdjax {version} began, and this version, {__version__}, draws other batches: "
            "finish it with that version, or delete that folder to start it anew."
        )


def _not_finite(name: str, step: int, means: Mapping[str, float]) -> NumericError:
    bad = [f"{key} {value}" for key, value in means.items() if not math.isfinite(value)]
    return NumericError(
        f"Stage {name!r} left the finite numbers by step {step} ({', '.join(bad)}): lower "
        f"config.{name}.optimizer.learning_rate, or the weight of the first bad term in config.{name}.loss_weights. "
        "Earlier checkpoints are intact."
    )


def _export(
    config: ConfigDict,
    name: str,
    folder: Path,
    state: TrainState,
    evaluated_on: IndexedSource,
    detections: list[ImageDetections],
) -> None:
    """Writes the trained model, what its method learnt, and the detections of the first images."""
    stage = config[name]
    save_model(folder / "model", state.student(), json.loads((folder / STAGE_FILE).read_text()))
    if state.params["method"]:
        save_method(folder / "method", state.params["method"], stage.method.to_dict())
    write_json(folder / "detections.json", [_as_json(found, evaluated_on) for found in detections[:MOST_PICTURES]])


def _as_json(found: ImageDetections, source: IndexedSource) -> dict[str, Any]:
    """Detections under the data set's own id of their image."""
    fields = found._asdict()
    return {"image_id": source.objects(fields.pop("position")).image_id, **fields}


def finished_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished stage, None for one that is not; what JSON cannot hold (NaN) is NaN again."""

    def restored(metrics: Any) -> Any:
        if isinstance(metrics, dict):
            return {key: restored(value) for key, value in metrics.items()}
        return math.nan if metrics is None else metrics

    path = folder / _RESULT
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return {key: restored(value) if key != "teacher" or value else None for key, value in result.items()}
