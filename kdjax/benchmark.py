"""Measures a config's last stage on this machine: ``python -m kdjax.benchmark --config=configs/mgd.py``.

Prints compile time, images per second, FLOPs and memory of the plain student step, the teacher's forward pass and the
distillation step, and what distilling costs over its parts, with random weights. Then how fast the input
pipeline alone makes the batches that the step would consume.
"""

import dataclasses
import functools
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from kdjax.devices import device_count, globalize, replicate, split
from kdjax.errors import Exit
from kdjax.main import CONFIG, begin, ended, parse
from kdjax.models.kernels import cast_kernels
from kdjax.plan import Plan, StagePlan, resolve
from kdjax.processes import everywhere
from kdjax.run.agreement import check_agreement, open_alike
from kdjax.run.build import Facts, build, first_state, initialize, stage_key
from kdjax.run.data import open_batches
from kdjax.run.fit import opened
from kdjax.run.lowered import as_it_is, teacher_forward, teacher_of
from kdjax.run.start import Teacher
from kdjax.types import Batch, Source

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed calls of each part, in turn.", lower_bound=1)


class Part(NamedTuple):
    """One compiled part of the step."""

    name: str
    compiled: Any
    compile_seconds: float
    arguments: list[Any]
    """The training state first, where there is one: it is donated and comes back as the first output."""
    trains: bool

    def call(self) -> float:
        """Runs once; the seconds it took."""
        start = time.perf_counter()
        output = jax.block_until_ready(self.compiled(*self.arguments))
        seconds = time.perf_counter() - start
        if self.trains:
            self.arguments[0] = output[0]
        return seconds


def parts_of(plan: Plan, first: Batch, classes: int) -> dict[str, Callable[[], Part]]:
    """What compiles the "student step" and, where the last stage has a teacher, "teacher forward", "distillation step".

    The weights are random.

    Args:
        plan: of a run.
        first: the batch that all take, on the host.
        classes: of the data.
    """
    stage = plan[plan.student]
    options, image_size = stage.options, (first.images.shape[1], first.images.shape[2])
    batch = split(first, parts=options.accumulate)
    key = replicate(stage_key(plan.run.seed, stage))

    def training(label: str, stage: StagePlan, teacher: Teacher | None) -> Part:
        built = build(stage, Facts(plan.task, classes, image_size, teacher=teacher and teacher.module))
        state = first_state(stage, built, stage_key(plan.run.seed, stage), as_it_is, {})
        variables = teacher.variables if teacher and built.teacher else None
        return _compile(label, built.step, [state, variables, batch, key], trains=True)

    alone = dataclasses.replace(stage, methods={})
    parts: dict[str, Callable[[], Part]] = {"student step": functools.partial(training, "student step", alone, None)}
    module = teacher_of(plan, stage, classes)
    if module is None:
        return parts
    images = jnp.zeros((1, *image_size, 3))
    variables = cast_kernels(module, initialize(module.init, jax.random.key(0), images), options.dtype, image_size)
    teacher = Teacher(module, replicate(variables))

    arguments = [teacher.variables, batch]
    parts["teacher forward"] = functools.partial(_compile, "teacher forward", teacher_forward(module), arguments)
    parts["distillation step"] = functools.partial(training, "distillation step", stage, teacher)
    return parts


def _compile(name: str, function: Any, arguments: list[Any], trains: bool = False) -> Part:
    lowered = function.lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    # What is compiled takes nothing but arrays of all processes, unlike the function that it is of.
    of_all = [globalize(x, mapped=isinstance(x, Batch)) for x in arguments]
    return Part(name, compiled, seconds, of_all, trains)


def input_rate(plan: Plan, source: Source) -> float:
    """Images a second that the input pipelines of all processes make for the last stage where nothing else is to do.

    Args:
        plan: the whole run.
        source: its training split.
    """
    # Timed ones, many more than are made ahead, and equally many of each process; as many come before them.
    batches = 6 * max(10, plan.data.processes)
    with closing(open_batches(plan, plan[plan.student], source, 0, processes=plan.data.processes)) as stream:
        for _ in itertools.islice(stream, batches):
            pass
        start = time.perf_counter()
        images = sum(len(batch.images) for batch in itertools.islice(stream, batches))
        return images * jax.process_count() / (time.perf_counter() - start)


def main(_: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    logging.set_verbosity(logging.FATAL)
    return ended(_measured, "nothing was written")


def _measured() -> int:
    """Measures, and prints what was found."""
    jax.config.update("jax_enable_compilation_cache", False)  # JAX remembers it from its first compile on.
    begin()
    plan = everywhere(lambda: resolve(CONFIG.value, devices=device_count()))
    plan, splits = open_alike(plan.content, plan.data, plan.task, lambda: opened(CONFIG.value, plan))
    check_agreement({"data": [source.fingerprint for source in splits], "--rounds": _ROUNDS.value})
    source = splits.train
    first = next(open_batches(plan, plan[plan.student], source, 0))
    parts = [compiled() for compiled in parts_of(plan, first, len(source.class_names)).values()]
    batch_size = plan[plan.student].options.batch_size
    for part in parts:
        part.call()
    seconds: dict[str, list[float]] = {part.name: [] for part in parts}
    for _round in range(_ROUNDS.value):
        for part in parts:
            seconds[part.name].append(part.call())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    # XLA counts one turn of the loop over the parts of a batch, of which the teacher alone has none.
    turns = {part.name: plan[plan.student].options.accumulate if part.trains else 1 for part in parts}
    flops = {part.name: turns[part.name] * part.compiled.cost_analysis()["flops"] / 1e9 for part in parts}
    device = jax.local_devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, batch {batch_size}, jax {jax.__version__}")
    print(f"{'part':18} {'compile s':>10} {'ms':>9} {'images/s':>9} {'GFLOP':>8} {'temp MiB':>9}  of one device")
    for part in parts:
        temporary = part.compiled.memory_analysis().temp_size_in_bytes / 2**20
        median = medians[part.name]
        print(
            f"{part.name:18} {part.compile_seconds:10.1f} {1e3 * median:9.1f} {batch_size / median:9.1f} "
            f"{flops[part.name]:8.1f} {temporary:9.0f}"
        )
    if len(parts) == 3:
        plain, forward, distill = (part.name for part in parts)
        print(f"overhead in time:  {medians[distill] / (medians[plain] + medians[forward]):.3f}")
        print(f"overhead in FLOPs: {flops[distill] / (flops[plain] + flops[forward]):.3f}")
    rate, step = input_rate(plan, source), batch_size / medians[parts[-1].name]
    print(f"input pipeline alone: {rate:.0f} images/s, {rate / step:.1f} times as many as the {parts[-1].name}")
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    of_device = f"{peak / 2**20:.0f} MiB of the device, " if peak else ""
    print(f"peak memory of this process, all parts together: {of_device}{host:.0f} MiB of the host")
    return Exit.FINISHED


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
