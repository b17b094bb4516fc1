"""The step of a stage, lowered and compiled with abstract arguments: for devices that are here, or that are not."""

import contextlib
import dataclasses
import io
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import operations
from kdjax.devices import parallel
from kdjax.distill import by_method
from kdjax.errors import quoted
from kdjax.hlo import Program, collectives, open_loops, read_program, traffic, uncounted_flops
from kdjax.models import build_model
from kdjax.models.kernels import cast_kernels
from kdjax.optim import paths, under
from kdjax.plan import Plan, StagePlan
from kdjax.run.build import Facts, build, first_state
from kdjax.run.start import learnt_elsewhere
from kdjax.saved import describe
from kdjax.types import Batch, Model

_REFUSED = re.compile(
    r"Used [\d.]+\w? of [\d.]+\w? hbm|HLO temporaries \([\d.]+\w?\)( exceeds available HBM \([\d.]+\w?\))?"
    r"|Ran out of memory[^.]*"
)


class Step(NamedTuple):
    """The step of a run's last stage, lowered for some devices with abstract arguments."""

    lowered: Any
    trained_parameters: int
    teacher: Any
    """The teacher's forward pass alone, lowered as well; None where no method asks for one."""


def lower_step(plan: Plan, stage: StagePlan, devices: Sequence[jax.Device], *, share: int, classes: int) -> Step:
    """Lowers the step of a stage: nothing is read, initialised or placed.

    Args:
        plan: of the run.
        stage: of it, perhaps with other methods.
        devices: what the step is mapped over; they need not be there.
        share: images of a step on each of them.
        classes: of the data.
    """
    shape = max(plan.data.training_shapes, key=math.prod)
    batch = _abstract_batch(plan, (len(devices), share), shape)
    key = jax.eval_shape(lambda: jax.random.key(0))
    facts = Facts(plan.task, classes, shape, teacher=teacher_of(plan, stage, classes))
    with contextlib.redirect_stdout(io.StringIO()):
        facts = facts._replace(given=_given(plan, stage, facts))
        built = build(stage, facts, list(devices))
        state = jax.eval_shape(lambda key: first_state(stage, built, key, as_it_is, {}), key)
    step, forward, variables, teacher = cast(Any, built.step), None, None, built.teacher
    if teacher:
        variables = jax.eval_shape(
            lambda *x: cast_kernels(teacher, teacher.init(*x), stage.options.dtype, shape), key, built.images
        )
        forward = teacher_forward(teacher, list(devices)).lower(variables, batch)
    trained = [
        x.size
        for path, x in zip(jax.tree.leaves(paths(state.params)), jax.tree.leaves(state.params), strict=True)
        if not under(path, built.freeze)
    ]
    return Step(step.lower(state, variables, batch, key), sum(trained), forward)


def _given(plan: Plan, stage: StagePlan, facts: Facts) -> dict[str, list[str]]:
    """By method: the parts of its parameters that it takes over, from an earlier stage of the plan or elsewhere."""
    given = {}
    for name, method in stage.methods.items():
        if method.init in plan:
            earlier = build(plan[method.init], facts)
            learnt = by_method(jax.eval_shape(earlier.init_methods, jax.random.key(0)), earlier.methods)
            given[name] = list(learnt.get(name) or next(iter(learnt.values())))
        elif method.init:
            given[name] = list(learnt_elsewhere(method, facts.teacher.strides if facts.teacher else ()))
    return given


def teacher_forward(teacher: Model, devices: list[jax.Device] | None = None) -> Any:
    """A teacher's part of a step, its features alone, mapped over devices: (variables, batch) -> features."""

    def forward(variables: Any, batch: Batch) -> Any:
        return operations.features(teacher, variables, teacher.preprocess(batch.images, batch.size))

    return parallel(forward, in_axes=(None, 0), replicated=False, devices=devices)


def written_flops(plan: Plan, *, share: int, classes: int) -> dict[str, float]:
    """Floating-point operations of a step by image, as they are written, before a compiler changes anything.

    Those of the "student" with its optimiser, of the "teacher" and of the "method", of a step on one device.
    """
    stage, here = plan[plan.student], jax.local_devices()[:1]
    # Of the loop over parts the products alone would be counted in every turn.
    stage = dataclasses.replace(stage, options=dataclasses.replace(stage.options, accumulate=1))
    whole = lower_step(plan, stage, here, share=share, classes=classes)
    alone = lower_step(plan, dataclasses.replace(stage, methods={}), here, share=share, classes=classes)
    student, teacher = _written(alone.lowered), _written(whole.teacher) if whole.teacher else 0.0
    flops = {"student": student, "teacher": teacher, "method": _written(whole.lowered) - student - teacher}
    return {name: x / share for name, x in flops.items()}


def _written(lowered: Any) -> float:
    return _flops(lowered, read_program(lowered.as_text("hlo")))


def _flops(step: Any, program: Program) -> float:
    """Of a step, lowered or compiled, and its text."""
    return float(step.cost_analysis()["flops"]) + uncounted_flops(program)


def as_it_is(variables: Any) -> Any:
    """What a student starts from where nothing is given: its fresh variables."""
    return variables


def teacher_of(plan: Plan, stage: StagePlan, classes: int) -> Model | None:
    """The model that teaches a stage, of an earlier one or of a folder; None where there is none."""
    origin = stage.options.teacher
    if not origin:
        return None
    known = plan[origin].options.model if origin in plan else describe(origin)["model"]
    return build_model(known, num_classes=classes, dtype=jnp.dtype(stage.options.dtype))


def _abstract_batch(plan: Plan, shares: tuple[int, int], shape: tuple[int, int]) -> Batch:
    """A batch (D, N / D, ...) of shapes and dtypes."""

    def array(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((*shares, *sizes), dtype)

    targets = jax.tree.map(lambda x: array(x.dtype, *x.shape[1:]), plan.task.targets(1, shape))
    return Batch(array(np.uint8, *shape, 3), array(np.int32, 2), array(np.int32), targets)


def examine(step: Step, share: int) -> dict[str, Any]:
    """Compiles a step and says what the compiler says, per chip.

    Args:
        step: lowered.
        share: images of a step on one chip.

    Returns:
        "fits" alone, and "refused", where the compiler finds no room.
    """
    started = time.monotonic()
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _REFUSED.search(str(error))
        return {"fits": False, "refused": found[0] if found else quoted(error)}
    memory, program = compiled.memory_analysis(), read_program(compiled.as_text())
    told = collectives(program)
    return {
        "fits": True,
        "compile_seconds": time.monotonic() - started,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops_per_image": _flops(compiled, program) / share,
        "traffic_bytes_per_image": traffic(program) / share,
        "open_loops": open_loops(program),
        "collectives": told.operations,
        "all_reduce_elements": sum(told.elements.values()),
        "all_reduce_bf16_elements": told.elements.get("bf16", 0),
        "all_reduce_elements_by_dtype": dict(told.elements),
        "trained_parameters": step.trained_parameters,
    }
