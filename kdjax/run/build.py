"""The modules, the optimiser and the mapped step of a stage, and its state of step 0."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdjax.config.schema import Optimizer
from kdjax.devices import AXIS, parallel, replicate
from kdjax.distill import distill_step, select_levels
from kdjax.errors import UserError
from kdjax.losses import ClassStatistics, uniform_statistics
from kdjax.methods import build_method
from kdjax.methods.levels import describe_pairs
from kdjax.models import build_detector
from kdjax.optim import by_part, make_optimizer, make_schedule, paths, trained_norm, under
from kdjax.plan import StagePlan
from kdjax.state import TrainState, Variables, init_state
from kdjax.types import Features, Sampling, Targets
from kdjax.weights import load_into


class Facts(NamedTuple):
    """What a stage's modules depend on besides its plan: what data, files and earlier stages decide."""

    num_classes: int
    """Of the data."""
    image_size: tuple[int, int]
    """Height and width of the padded images; of several shapes, the first."""
    model: Mapping[str, Any] | None = None
    """Config of the student, where its first weights expect something else than the plan says."""
    teacher: nn.Module | None = None
    """Detector that teaches."""
    given: Collection[str] = ()
    """Parts of the method that an earlier stage learnt; they do not move."""
    statistics: ClassStatistics | None = None
    """Of the training set's boxes; None for :func:`kdjax.losses.uniform_statistics`."""


class Built(NamedTuple):
    """Everything that the steps of a stage need."""

    student: nn.Module
    teacher: nn.Module | None
    """None where nothing asks for its features."""
    method: nn.Module
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    step: Callable[..., Any]
    """The distillation step mapped over devices: (state, teacher variables, batch, key) -> (state, metrics)."""
    images: jax.Array
    """(1, H, W, 3) zeros: what modules are initialised with."""
    student_features: Features
    """Zeros of the shapes that the method sees of one image."""
    teacher_features: Features
    """Likewise; {} where the method needs no teacher."""


def build(stage: StagePlan, facts: Facts) -> Built:
    """Builds the student, the method, the optimiser and the mapped step; nothing is initialised.

    Raises:
        UserError: the method cannot pair the two pyramids, or the student's boxes cannot imitate the teacher's.
    """
    options, dtype = stage.options, jnp.dtype(stage.options.dtype)
    model, teacher = facts.model or options.model, facts.teacher
    student = build_detector(model, num_classes=facts.num_classes, axis_name=AXIS, dtype=dtype)
    statistics = facts.statistics or uniform_statistics(facts.num_classes)
    method = build_method(stage.method, statistics=statistics, axis_name=AXIS, dtype=dtype)
    images = jnp.zeros((1, *facts.image_size, 3))
    features: Features = select_levels(_pyramid(student, images), options.levels)
    taught: Features = {}
    if "teacher" in method.needs and teacher:
        taught = select_levels(_pyramid(teacher, images), options.levels)
        print(f"[{stage.name}] {describe_pairs(features, taught)}", flush=True)
    if options.imitate_boxes and teacher:
        _try_imitation(student, teacher, images)
    elif not taught:
        teacher = None
    freeze = (*options.freeze, *(f"method/{part}" for part in facts.given))
    learning_rate, optimizer = _optimizer(stage.optimizer, stage.steps)
    own = stage.method_optimizer and _optimizer(stage.method_optimizer, stage.steps)[1]
    optimizer = by_part(optimizer, method=own, freeze=freeze)
    step = functools.partial(
        distill_step,
        student=student,
        teacher=teacher,
        method=method,
        optimizer=optimizer,
        loss_weights=dict(options.loss_weights),
        levels=options.levels,
        imitate_boxes=options.imitate_boxes,
        axis_name=AXIS,
        accumulate=options.accumulate,
        ema_decay=options.ema_decay,
        norm=functools.partial(trained_norm, freeze=(*freeze, *(["method"] if own else []))),
    )
    mapped = parallel(step, in_axes=(None, None, 0, None), replicated=True)
    return Built(student, teacher, method, optimizer, learning_rate, mapped, images, features, taught)


def first_state(
    stage: StagePlan, built: Built, key: jax.Array, start: Callable[[Variables], Variables], given: Variables
) -> TrainState:
    """The state of step 0, on all devices.

    Args:
        stage: of the plan.
        built: of that stage.
        key: weights that start from nothing are drawn from it.
        start: takes the student's fresh variables to those that it starts from.
        given: parts of the method's parameters, by name, that an earlier stage learnt.

    Raises:
        UserError: what is given does not fit the method, or a frozen path is nowhere.
    """
    options = stage.options
    variables = start(init_jit(built.student.clone(axis_name=None).init)(key, built.images))
    learnt = _init_method(built, key)
    if given:
        params = learnt.get("params", {})
        wanted = {part: params[part] for part in given if part in params}
        filled, report = load_into(wanted, given, origin=options.method_init)
        print(f"[{stage.name}] the method's {', '.join(given)} from {options.method_init}: {report}", flush=True)
        learnt = {"params": params | filled}
    state = init_state(variables, learnt, built.optimizer, ema=options.ema_decay > 0)
    for prefix in options.freeze:
        if not any(under(path, (prefix,)) for path in jax.tree.leaves(paths(state.params))):
            raise UserError(f"config.{stage.name}.freeze has {prefix!r}, below which there are no parameters.")
    return replicate(state)


def stage_key(seed: int, stage: StagePlan) -> jax.Array:
    """The PRNG key of a stage, from the run's seed and the stage's number."""
    return jax.random.fold_in(jax.random.key(seed), stage.number)


def _optimizer(options: Optimizer, steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step, and the optimiser."""
    learning_rate = make_schedule(
        options.schedule,
        options.learning_rate,
        max(steps, 1),
        milestones=options.milestones,
        final_factor=options.final_factor,
        warmup_steps=options.warmup_steps,
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


def _init_method(built: Built, key: jax.Array) -> Variables:
    """The method's variables, from the shapes of both pyramids."""
    if not built.method.terms:
        return {}
    plain = built.method.clone(axis_name=None)
    init = functools.partial(plain.init, step=jnp.zeros((), jnp.int32), task=lambda _: {})
    targets = _no_targets(built.images)
    return init_jit(init)(key, built.student_features, built.teacher_features, targets, keys=key[None])
