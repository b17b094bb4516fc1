"""Cost of functions that are run in turn, in one process."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Cost(NamedTuple):
    """Of one compiled function."""

    ms: float
    """Median of the timed calls, milliseconds."""
    cpu_ms: float
    """Likewise, the time that the host's cores spent, all threads together: what a busy machine distorts least."""
    mib: float
    """Temporary memory beside arguments and results, MiB."""
    compile_s: float
    """Tracing and compiling, seconds."""


def measure(functions: Sequence[Callable[..., Any]], arguments: Sequence[Any], rounds: int) -> list[Cost]:
    """Compiles the functions and calls them in turn on the same arguments, ``rounds`` times after a first one."""
    arguments = jax.device_put(arguments)
    compiled, compile_s = [], []
    for function in functions:
        start = time.perf_counter()
        compiled.append(jax.jit(function).lower(*arguments).compile())
        compile_s.append(time.perf_counter() - start)
    seconds: list[list[tuple[float, float]]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for times, function in zip(seconds, compiled, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*arguments))
            if round_:  # The first call warms up.
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
    costs = []
    for times, function, spent in zip(seconds, compiled, compile_s, strict=True):
        ms, cpu_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        memory: Any = function.memory_analysis()
        costs.append(Cost(ms, cpu_ms, memory.temp_size_in_bytes / 2**20, spent))
    return costs


def check_agree(functions: Sequence[Callable[..., Any]], arguments: Sequence[Any]) -> None:
    """Raises AssertionError unless two functions have the same result; to be called after they are measured.

    Large arrays that were just freed would make what is timed next wait for fresh memory.
    """
    results = (jax.tree.leaves(jax.jit(function)(*arguments)) for function in functions)
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
