"""The one train loop: a stage of a config becomes a trained detector in a folder.

A stage's folder holds ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoints/`` and, once finished,
``model/`` (the trained detector alone), ``method/`` (what the method learnt, if anything), ``detections.json`` (of the
images that are drawn) and ``result.json``.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from kdjax.checkpoint import Checkpoints, load_method, load_student, read_model_description, save_method, save_model
from kdjax.config import Scaled, differences, scaled_schedule
from kdjax.data.batches import train_batches
from kdjax.data.sources import Source, open_source
from kdjax.data.statistics import class_statistics
from kdjax.devices import AXIS, parallel, replicate, split
from kdjax.distill import distill_step
from kdjax.errors import NumericError, UserError
from kdjax.evaluate import ImageDetections, Metrics, evaluate, make_predict
from kdjax.losses import ClassStatistics, uniform_statistics
from kdjax.methods import build_method
from kdjax.methods.levels import describe_pairs
from kdjax.models import build_detector
from kdjax.optim import by_part, make_optimizer, make_schedule, trained_norm
from kdjax.report import MetricWriter, Throughput, parameter_table, progress_line, write_json
from kdjax.state import TrainState, Variables, init_state
from kdjax.types import Features, Targets
from kdjax.weights import inherit, load_into

# Forced CPU devices abort when too many steps are in flight.
_MOST_STEPS_IN_FLIGHT = 20

# Keys that change nothing that a stage computes: a run may be resumed with other values.
_WITHOUT_EFFECT = ("log_every", "checkpoint_every", "keep_checkpoints", "threads", "data_dir")


class Teacher(NamedTuple):
    """A trained detector that teaches."""

    module: nn.Module
    variables: Variables


class Run(NamedTuple):
    """Everything that the steps of a stage need, built once."""

    student: nn.Module
    teacher: Teacher | None
    step: Any
    """The distillation step mapped over devices: (state, teacher variables, batch, key) -> (state, metrics)."""
    learning_rate: Any
    """The schedule: learning rate by step."""
    schedule: Scaled
    state: TrainState


def train_stage(config: ConfigDict, name: str, folder: Path, models: Mapping[str, Path]) -> dict[str, Any]:
    """Trains one stage of a config, or continues it, or finds it finished.

    Args:
        config: the whole config, checked.
        name: of the stage: its section is ``config[name]``.
        folder: the stage's own.
        models: folders of the models of earlier stages by name.

    Returns:
        what ``result.json`` holds: "metrics" (percent), "steps", "images_per_second", "parameters".

    Raises:
        UserError: something that the config names does not fit, or the AP ends below the stage's floor.
        NumericError: the loss is not finite.
    """
    stage = config[name]
    _claim(folder, _effective(config, name))
    result_file = folder / "result.json"
    if result_file.exists():
        result = _read_result(result_file)
        print(f"[{name}] finished earlier: AP {result['metrics']['AP']:.1f}. Nothing to do.", flush=True)
        return result
    train_source = _open(config, config.data.train_split)
    eval_source = _open(config, config.data.eval_split)
    run = _prepare(config, name, models, train_source)
    state = run.state
    checkpoints = Checkpoints(folder / "checkpoints", keep=stage.keep_checkpoints)
    if checkpoints.latest() is not None:
        state = checkpoints.restore(state)
        print(f"[{name}] continues from the checkpoint of step {int(state.step)}.", flush=True)
    predict = make_predict(run.student)
    evaluation = functools.partial(
        evaluate, predict, source=eval_source, batch_size=config.eval_batch_size, image_size=config.data.image_size
    )

    steps, first = run.schedule.steps, int(state.step)
    throughput = Throughput(steps, stage.batch_size)
    teacher_variables = run.teacher and replicate(run.teacher.variables)
    key = jax.random.key(config.seed)
    batches = train_batches(
        train_source,
        batch_size=stage.batch_size,
        image_size=config.data.image_size,
        max_objects=config.data.max_objects,
        seed=config.seed,
        first_step=first,
        flip=config.data.flip,
        num_threads=config.data.threads,
    )
    metrics: Metrics | None = None
    recent: list[dict[str, jax.Array]] = []
    started = time.perf_counter()
    with MetricWriter(folder, first) as writer:
        for done in range(first + 1, steps + 1):
            state, values = run.step(state, teacher_variables, split(next(batches)), key)
            recent.append(values)
            if done == first + 1:
                jax.block_until_ready(values)
                throughput.measure(done)
                print(f"[{name}] first step after {time.perf_counter() - started:.0f} s of compilation.", flush=True)
            if done % _MOST_STEPS_IN_FLIGHT == 0:
                jax.block_until_ready(values)
            if done % stage.log_every == 0 or done == steps:
                means = {key: float(np.mean([x[key] for x in recent])) for key in values}
                recent = []
                _check_finite(name, done, means)
                rate = throughput.measure(done)
                learning_rate = float(run.learning_rate(done - 1))
                writer.write(
                    done, {**means, "learning_rate": learning_rate, "images_per_second": rate.images_per_second}
                )
                shares = {key.removeprefix("loss/"): x for key, x in means.items() if key.startswith("loss/")}
                print(f"[{name}] {progress_line(done, steps, shares, learning_rate, *rate)}", flush=True)
            due = done % run.schedule.checkpoint_every == 0 and done < steps
            if run.schedule.eval_every and done % run.schedule.eval_every == 0 and done < steps:
                with throughput.paused():
                    metrics, _ = evaluation(variables=state.student())
                _report_metrics(name, done, metrics, writer)
                checkpoints.save(state, metrics)
            elif due:
                checkpoints.save(state)

        metrics, detections = evaluation(variables=state.student())
        _report_metrics(name, steps, metrics, writer)
    if checkpoints.latest() != steps:
        checkpoints.save(state, metrics)
    checkpoints.close()
    if state.params["method"]:
        save_method(folder / "method", state.params["method"], stage.method.to_dict())
    return _finish(config, name, folder, state.student(), train_source, metrics, detections, throughput, steps)


def build_run(
    config: ConfigDict,
    name: str,
    num_classes: int,
    teacher: Teacher | None,
    start: Callable[[Variables], Variables],
    given: Mapping[str, Any] | None = None,
    statistics: ClassStatistics | None = None,
) -> Run:
    """Builds the student, the method, the optimiser, the mapped step and the state of step 0.

    Args:
        config: the whole config, checked.
        name: of the stage.
        num_classes: of the data.
        teacher: detector whose features are distilled, or None.
        start: takes the student's fresh variables to those that it starts from.
        given: parts of the method's parameters, by name, that an earlier stage learnt; they do not move.
        statistics: of the training set's boxes; None for :func:`kdjax.losses.uniform_statistics`.

    Raises:
        UserError: the method cannot pair the two pyramids.
    """
    stage = config[name]
    dtype = jnp.dtype(stage.dtype)
    student = build_detector(stage.model.to_dict(), num_classes=num_classes, axis_name=AXIS, dtype=dtype)
    schedule = scaled_schedule(stage)
    statistics = statistics or uniform_statistics(num_classes)
    method = build_method(schedule.method, statistics=statistics, axis_name=AXIS, dtype=dtype)
    key = jax.random.key(config.seed)
    images = jnp.zeros((1, *config.data.image_size, 3))
    variables = start(init_jit(student.clone(axis_name=None).init)(key, images))
    features, taught = _pyramid(student, images), {}
    if "teacher" in method.needs and teacher:
        taught = _pyramid(teacher.module, images)
        print(f"[{name}] {_refusing(describe_pairs, features, taught)}", flush=True)
    if stage.imitate_boxes and teacher:
        _refusing(_try_imitation, student, teacher.module, images)
    elif not taught:
        teacher = None
    method_variables = _init_method(method, features, taught, images, key)
    given = given or {}
    if given:
        params = method_variables["params"]
        wanted = {part: params[part] for part in given if part in params}
        filled, report = _refusing(load_into, wanted, given, origin=stage.method_init)
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
        weights=stage.weights.to_dict(),
        imitate_boxes=stage.imitate_boxes,
        axis_name=AXIS,
        accumulate=stage.accumulate,
        ema_decay=stage.ema_decay,
        norm=functools.partial(trained_norm, freeze=(*freeze, *(["method"] if separate else []))),
    )
    state = init_state(variables, method_variables, optimizer, ema=stage.ema_decay > 0)
    return Run(
        student=student,
        teacher=teacher,
        step=parallel(step, in_axes=(None, None, 0, None), replicated=True),
        learning_rate=learning_rate,
        schedule=schedule,
        state=replicate(state),
    )


def _optimizer(stage: ConfigDict, section: str) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step, and the optimiser, of a section of a stage."""
    options, schedule = stage[section], scaled_schedule(stage, section)
    learning_rate = make_schedule(
        options.schedule,
        schedule.learning_rate,
        schedule.steps,
        milestones=options.milestones,
        final_factor=options.final_factor,
        warmup_steps=schedule.warmup_steps,
        warmup_factor=options.warmup_factor,
    )
    optimizer = make_optimizer(
        learning_rate,
        name=options.name,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        decay_all=options.decay_norm_and_bias,
        clip_norm=options.clip_norm or None,
    )
    return learning_rate, optimizer


def _prepare(config: ConfigDict, name: str, models: Mapping[str, Path], source: Source) -> Run:
    """Builds a stage's run, and says what was loaded from where."""
    stage, class_names = config[name], source.class_names
    teacher = None
    if stage.teacher:
        origin = models.get(stage.teacher, stage.teacher)
        teacher = _load(origin, class_names, stage.dtype)
        print(f"[{name}] teacher {origin}: all {len(jax.tree.leaves(teacher.variables))} arrays loaded.", flush=True)

    def start(variables: Variables) -> Variables:
        if stage.init:
            origin = models.get(stage.init, stage.init)
            source = _load(origin, class_names, stage.dtype).variables
            variables, report = _refusing(load_into, variables, source, origin=str(origin))
            print(f"[{name}] starts from {origin}: {report}", flush=True)
        if teacher and stage.inherit:
            variables, report = _refusing(inherit, variables, teacher.variables, stage.inherit)
            print(f"[{name}] inherits {', '.join(stage.inherit)} from the teacher: {report}", flush=True)
        return variables

    given = None
    if stage.method_init:
        earlier = models.get(stage.method_init)
        given = _refusing(load_method, earlier.with_name("method") if earlier else stage.method_init)
    needs = build_method(stage.method.to_dict()).needs
    statistics = class_statistics(source) if "statistics" in needs else None
    run = build_run(config, name, len(class_names), teacher, start, given, statistics)
    table = {name: run.state.params["student"]}
    if run.state.params["method"]:
        table[f"method {stage.method.name}"] = run.state.params["method"]
    print(parameter_table(table), flush=True)
    if stage.batch_size != stage.base_batch:
        print(
            f"[{name}] batch {stage.batch_size} instead of {stage.base_batch}: learning rate "
            f"{run.schedule.learning_rate:g} instead of {stage.optimizer.learning_rate:g}, {run.schedule.steps} steps "
            f"instead of {stage.steps}.",
            flush=True,
        )
    return run


def init_jit(init: Callable[..., Variables]) -> Callable[..., Variables]:
    """Compiles a module's ``init``, which runs once: on CPU without optimisation, which took 16 s for one detector."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)


def _pyramid(module: nn.Module, images: jax.Array) -> Features:
    """Zeros of the shapes and dtypes of a detector's features."""
    init = functools.partial(module.clone(axis_name=None).init_with_output, method="features")
    shapes, _ = jax.eval_shape(init, jax.random.key(0), images)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _try_imitation(student: nn.Module, teacher: nn.Module, images: jax.Array) -> None:
    """Raises ValueError unless the student's head can imitate the teacher's."""
    modules = [module.clone(axis_name=None) for module in (student, teacher)]

    def imitate() -> jax.Array:
        (_, ours), (_, theirs) = (module.init_with_output(jax.random.key(0), images)[0] for module in modules)
        return modules[0].imitate_boxes(ours, theirs, _no_targets(images))

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
    try:
        return init_jit(init)(key, student, teacher, _no_targets(images), keys=key[None])
    except ValueError as error:
        raise UserError(str(error)) from error


def _load(folder: str | Path, class_names: tuple[str, ...], dtype: str) -> Teacher:
    """A trained detector, which must know the classes of the data."""
    known = tuple(_refusing(read_model_description, folder)["class_names"])
    if known != class_names:
        raise UserError(
            f"The model in {folder} knows {len(known)} classes ({', '.join(known[:5])}, ...), the data have "
            f"{len(class_names)} ({', '.join(class_names[:5])}, ...): both must be the same, in the same order."
        )
    return Teacher(*_refusing(load_student, folder, dtype=dtype))


def _refusing(function: Any, *args: Any, **options: Any) -> Any:
    """Calls ``function``; what it says against its input becomes what the user reads."""
    try:
        return function(*args, **options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _open(config: ConfigDict, split_name: str) -> Source:
    return _refusing(open_source, config.data.name, split_name, config.data.data_dir or None)


def _effective(config: ConfigDict, name: str) -> dict[str, Any]:
    """What determines a stage's result, as plain JSON."""
    sections = {"seed": config.seed, "data": config.data.to_dict(), "stage": config[name].to_dict()}
    return json.loads(json.dumps(sections))


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Makes the stage's folder, or checks that it belongs to the same config."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if path.exists():
        changed = [
            line
            for line in differences(json.loads(path.read_text()), config)
            if line.split(":")[0].rsplit(".", 1)[-1] not in _WITHOUT_EFFECT
        ]
        if changed:
            raise UserError(
                f"{folder} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or "
                "delete that folder to start it anew."
            )
    write_json(path, config)


def _check_finite(name: str, step: int, means: Mapping[str, float]) -> None:
    bad = [f"{key} {value}" for key, value in means.items() if not math.isfinite(value)]
    if bad:
        raise NumericError(
            f"Stage {name!r} left the finite numbers before step {step} ({', '.join(bad)}): lower "
            f"config.{name}.optimizer.learning_rate, or the weight of the first bad term in config.{name}.weights. "
            "Earlier checkpoints are intact."
        )


def _report_metrics(name: str, step: int, metrics: Metrics, writer: MetricWriter) -> None:
    writer.write(step, {"eval": metrics})
    print(
        f"[{name}] step {step}: AP {metrics['AP']:.1f}  AP50 {metrics['AP50']:.1f}  AP75 {metrics['AP75']:.1f}",
        flush=True,
    )


def _finish(
    config: ConfigDict,
    name: str,
    folder: Path,
    variables: Variables,
    source: Source,
    metrics: Metrics,
    detections: list[ImageDetections],
    throughput: Throughput,
    steps: int,
) -> dict[str, Any]:
    """Writes the trained model and the result; the result last, since it marks the stage as finished."""
    stage = config[name]
    save_model(folder / "model", variables, stage.model.to_dict(), source.class_names, config.data.image_size)
    write_json(folder / "detections.json", [found._asdict() for found in detections[: config.pictures]])
    result = {
        "metrics": metrics,
        "steps": steps,
        "images_per_second": throughput.images_per_second,
        "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
    }
    write_json(folder / "result.json", result)
    return _read_result(folder / "result.json")


def _read_result(path: Path) -> dict[str, Any]:
    """A stage's result; what JSON cannot hold (NaN, where there was nothing to find) is NaN again."""
    result = json.loads(path.read_text())
    result["metrics"] = {key: math.nan if value is None else value for key, value in result["metrics"].items()}
    return result
