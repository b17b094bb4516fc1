"""What training changes: the state of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Variables = dict[str, Any]
"""Flax variables: {"params": ..., "batch_stats": ...}."""


class TrainState(struct.PyTreeNode):
    """What training changes. The teacher's variables are outside it."""

    step: jax.Array
    """int32 scalar: finished steps."""
    params: dict[str, Any]
    """{"student": ..., "method": ...}."""
    batch_stats: Any
    """The student's batch-norm statistics."""
    opt_state: optax.OptState
    ema: Variables | None
    """Exponential moving average of the student's variables; None without one."""
    scale: jax.Array | None = None
    """float32 scalar: what the methods' terms are multiplied by, found in the first step in which they are anything, 0
    before; None where they are as their weights say."""

    def student(self) -> Variables:
        """The student's variables for inference: the moving average where one is kept."""
        return self.ema or {"params": self.params["student"], "batch_stats": self.batch_stats}


def init_state(
    student: Variables,
    method: Variables,
    optimizer: optax.GradientTransformation,
    ema: bool = False,
    scaled: bool = False,
) -> TrainState:
    """The state of step 0 from the variables of the student and of the method."""
    params = {"student": student["params"], "method": method.get("params", {})}
    batch_stats = student.get("batch_stats", {})
    average = {"params": params["student"], "batch_stats": batch_stats} if ema else None
    # A step donates its state: the average must not share buffers with what it averages.
    average = jax.tree.map(jnp.copy, average)
    scale = jnp.zeros(()) if scaled else None
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), average, scale)
