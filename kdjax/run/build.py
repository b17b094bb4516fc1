"""The modules, the optimiser and the mapped step of a stage, and its state of step 0."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import operations
from kdjax.config.schema import Optimizer
from kdjax.devices import AXIS, parallel, replicate
from kdjax.distill import Applied, by_method, distill_step, own_keys, place, term_gradient, together
from kdjax.errors import UserError
from kdjax.losses import ClassStatistics, uniform_statistics
from kdjax.methods import build_method
from kdjax.methods.levels import describe_pairs
from kdjax.models import build_model
from kdjax.optim import by_part, layer_norms, make_optimizer, make_schedule, paths, trained_norm, under
from kdjax.plan import StagePlan
from kdjax.state import TrainState, Variables, init_state
from kdjax.types import Model, Sampling, Task, View
from kdjax.weights import load_into


class Facts(NamedTuple):
    """What a stage's modules depend on besides its plan: what data, files and earlier stages decide."""

    task: Task
    num_classes: int
    """Of the data."""
    image_size: tuple[int, int]
    """Height and width of the padded images; of several shapes, the first."""
    model: Mapping[str, Any] | None = None
    """Config of the student, where its first weights expect something else than the plan says."""
    teacher: Model | None = None
    """Model that teaches."""
    given: Mapping[str, Collection[str]] = {}
    """By method: parts that an earlier stage learnt; they do not move."""
    statistics: ClassStatistics | None = None
    """Of the training set's boxes; None for :func:`kdjax.losses.uniform_statistics`."""


class Built(NamedTuple):
    """Everything that the steps of a stage need."""

    student: Model
    teacher: Model | None
    """None where no method asks for it."""
    methods: Mapping[str, Applied]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    step: Callable[..., Any]
    """The distillation step mapped over devices: (state, teacher variables, batch, key) -> (state, metrics)."""
    term_norms: Callable[[str], Callable[..., Any]]
    """From the name of a term to what has the arguments of ``step``, and returns the norms of that term's gradient by
    layer, (D,) float32, equal on all devices."""
    images: jax.Array
    """(1, H, W, 3) zeros: what modules are initialised with."""
    init_methods: Callable[[jax.Array], Any]
    """From a PRNG key to the parameters of all methods that learn."""
    freeze: tuple[str, ...]
    """Paths below which no parameter moves."""


def build(stage: StagePlan, facts: Facts, devices: list[jax.Device] | None = None) -> Built:
    """Builds the student, its methods, the optimiser and the mapped step; nothing is initialised.

    Args:
        stage: of the plan.
        facts: what else the modules depend on.
        devices: what the step is mapped over, all by default; it can be compiled for some that are not there.

    Raises:
        UserError: a method does not fit the two models: levels that cannot be paired, boxes that cannot be compared.
    """
    options, dtype = stage.options, jnp.dtype(stage.options.dtype)
    model, teacher = facts.model or options.model, facts.teacher
    student = build_model(model, num_classes=facts.num_classes, axis_name=AXIS, dtype=dtype)
    methods = {
        name: Applied(build_method(method.config, axis_name=AXIS, dtype=dtype), method.levels)
        for name, method in stage.methods.items()
    }
    if not any("teacher" in method.module.requires for method in methods.values()):
        teacher = None
    statistics = facts.statistics or uniform_statistics(facts.num_classes)
    images = jnp.zeros((1, *facts.image_size, 3))
    example = example_of(student, teacher, images, facts.task.targets(1, facts.image_size), statistics)
    for name, method in methods.items():
        _try(stage.name, name, method, example)
    places = {name: place(name, methods) for name in methods}
    freeze = (*options.freeze, *(f"{places[name]}/{part}" for name, parts in facts.given.items() for part in parts))
    learning_rate, optimizer = _optimizer(stage.optimizer, stage.steps)
    own = {
        places[name]: _optimizer(method.optimizer, stage.steps)[1]
        for name, method in stage.methods.items()
        if method.optimizer
    }
    optimizer = by_part(optimizer, own=own, freeze=freeze)
    setting: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "methods": methods,
        "loss_weights": dict(options.loss_weights),
        "statistics": statistics,
        "axis_name": AXIS,
        "accumulate": options.accumulate,
        "method_share": options.method_share,
    }
    step = functools.partial(
        distill_step,
        **setting,
        optimizer=optimizer,
        ema_decay=options.ema_decay,
        norm=functools.partial(trained_norm, freeze=(*freeze, *own)),
        whole_norm=functools.partial(trained_norm, freeze=freeze),
    )
    in_axes = (None, None, 0, None)
    mapped = parallel(step, in_axes=in_axes, replicated=True, devices=devices)

    def term_norms(term: str) -> Callable[..., Any]:
        def norms(*arguments: Any) -> Any:
            return layer_norms(term_gradient(*arguments, term=term, **setting), freeze)

        # Not as one logical array: the state is needed again.
        return parallel(norms, in_axes=in_axes, replicated=False, devices=devices)

    init = functools.partial(init_methods, methods, example)
    return Built(student, teacher, methods, optimizer, learning_rate, mapped, term_norms, images, init, freeze)


def first_state(
    stage: StagePlan,
    built: Built,
    key: jax.Array,
    start: Callable[[Variables], Variables],
    given: Mapping[str, Variables],
) -> TrainState:
    """The state of step 0, on all devices.

    Args:
        stage: of the plan.
        built: of that stage.
        key: weights that start from nothing are drawn from it.
        start: takes the student's fresh variables to those that it starts from.
        given: by method, parts of its parameters, by name, that an earlier stage learnt.

    Raises:
        UserError: what is given does not fit a method, or a frozen path is nowhere.
    """
    options = stage.options
    variables = start(initialize(built.student.clone(axis_name=None).init, key, built.images))
    learnt, reports = with_given(stage, by_method(built.init_methods(key), built.methods), given)
    for report in reports:
        print(report, flush=True)
    params = {"params": together(learnt)}
    scaled = options.method_share > 0 and bool(built.methods)
    state = init_state(variables, params, built.optimizer, ema=options.ema_decay > 0, scaled=scaled)
    for prefix in options.freeze:
        if not any(under(path, (prefix,)) for path in jax.tree.leaves(paths(state.params))):
            raise UserError(f"config.{stage.name}.freeze has {prefix!r}, below which there are no parameters.")
    return replicate(state)


def with_given(
    stage: StagePlan, learnt: Mapping[str, Any], given: Mapping[str, Variables]
) -> tuple[dict[str, Any], list[str]]:
    """The parameters of each method with those that an earlier stage learnt, and a sentence on each that has some.

    Raises:
        UserError: what is given does not fit a method.
    """
    found, reports = dict(learnt), []
    for name, parts in given.items():
        origin = stage.methods[name].init
        wanted = {part: learnt[name][part] for part in parts if part in learnt[name]}
        filled, report = load_into(wanted, parts, origin=origin)
        reports.append(f"[{stage.name}] {name}'s {', '.join(parts)} from {origin}: {report}")
        found[name] = learnt[name] | filled
    return found, reports


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
        power=options.power,
        end_at_last=options.end_at_last,
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
        decay_bias=options.decay_bias,
        bias_rate=options.bias_rate,
        clip_norm=options.clip_norm or None,
        clip_value=options.clip_value or None,
    )
    return learning_rate, optimizer


def initialize(init: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's ``init`` returns: computed once, by the host's processor and compiled without optimisation.

    To compile one detector's takes 5 s so, 16 with optimisation, 14 for a TPU and 25 for a GPU. Inside of
    ``jax.eval_shape`` or another transformation it is ``init`` as it stands; where ``JAX_PLATFORMS`` names accelerators
    alone it is compiled for one.

    Args:
        init: of a module, or a function that calls one.
        *arguments: a random key first.

    Returns:
        arrays that JAX may move to any device, on the host if it can be.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
        return init(*arguments)
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.jit(init)(*arguments)
    with jax.default_device(host):
        return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})(*arguments)


class Example(NamedTuple):
    """What methods see and may need of one image that shows nothing, as shapes: nothing of it takes memory."""

    student: View
    teacher: View | None
    arrays: dict[str, Any]
    functions: dict[str, Any]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def example_of(
    student: Model, teacher: Model | None, images: jax.Array, targets: Any, statistics: ClassStatistics
) -> Example:
    """What methods see and may need of two models, with images (1, H, W, 3) and the task's truth of one."""
    key, alone = jax.random.key(0), student.clone(axis_name=None)
    arrays = {
        "size": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "targets": targets,
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "statistics": statistics,
    }

    def seen(targets: Any) -> Any:
        size = jnp.asarray(images.shape[1:3])[None]
        return alone.init_with_output(key, images, size, sampling=Sampling(targets, key[None]))[0]

    features, predictions = jax.eval_shape(seen, _zeros(targets))

    def paired_sides(theirs: Any) -> Any:
        return alone.paired_sides(*_zeros((predictions, theirs, targets, arrays["size"])))

    functions: dict[str, Any] = {
        "own_loss": lambda _: {},
        "prediction_loss": lambda _: {},
        "paired_sides": paired_sides,
    }
    theirs = None
    if teacher is not None:
        plain = teacher.clone(axis_name=None)
        taught = jax.eval_shape(functools.partial(operations.init_features, plain), key, images)
        theirs = View(taught, teacher.strides)

        def teacher_heads(predictions: Any) -> Any:
            return operations.init_heads_at(plain, key, _zeros(taught), predictions, _zeros(arrays["size"]))

        functions["teacher_heads"] = teacher_heads
    return Example(View(features, student.strides, predictions), theirs, arrays, functions)


def _call(method: Applied, example: Example, key: jax.Array) -> Any:
    """The terms of a method on an example, and its variables; to be traced."""
    plain = method.module.clone(axis_name=None)
    known = {**_zeros(example.arrays), "keys": key[None], **example.functions}
    views = map(method.sees, _zeros((example.student, example.teacher)))
    return plain.init_with_output(key, *views, **{need: known[need] for need in plain.needs})


def _try(stage: str, name: str, method: Applied, example: Example) -> None:
    """Lets a method refuse models that it does not fit, and says which levels it pairs."""
    ours, theirs = example.student, example.teacher
    there = {**ours.features, **(theirs.features if theirs else {})}
    if unknown := [level for level in method.levels if level not in there]:
        raise UserError(
            f"config.{stage}.methods.{name}.levels has {unknown[0]!r}, which neither model has; there are "
            f"{', '.join(there)}."
        )
    jax.eval_shape(functools.partial(_call, method, example), jax.random.key(0))
    student, teacher = method.sees(ours), method.sees(theirs)
    if student and teacher and "teacher_heads" not in method.module.needs:
        print(f"[{stage}] {name} {describe_pairs(student, teacher)}", flush=True)


def init_methods(methods: Mapping[str, Applied], example: Example, key: jax.Array) -> Any:
    """The parameters of all methods that learn."""
    learners = {name: method for name, method in methods.items() if method.learns}
    params = {}
    for name, method in learners.items():
        variables = initialize(lambda key, method=method: _call(method, example, key)[1], own_keys(key, name, learners))
        params[name] = variables.get("params", {})
    return together(params)
