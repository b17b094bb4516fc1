"""The variables of models, and what training changes: the state of a run."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.typing import Dtype

from kdjax.types import Module

Variables = dict[str, Any]
"""Flax variables: {"params": ..., "batch_stats": ...}."""


def cast_kernels(model: Module, variables: Variables, dtype: Dtype) -> Variables:
    """The variables of a model that only teaches: kernels as its layers multiply them.

    A layer that computes in ``dtype`` converts its kernel at every call, and finds the same numbers where that was done
    before. Kernels of layers of another dtype, and whatever else a model has, stay as they are.

    >>> layer = nn.Dense(1, dtype=jnp.bfloat16)
    >>> cast_kernels(layer, {"params": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)}}, jnp.bfloat16)["params"]
    {'bias': Array([1.], dtype=float32), 'kernel': Array([[1],
           [1],
           [1]], dtype=bfloat16)}

    Args:
        model: whose images have three channels.
        variables: of the model, float32, or their shapes.
        dtype: of its computation.
    """
    dtype, layers = jnp.dtype(dtype), set()
    if dtype == jnp.float32:
        return variables

    def note(call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
        own = getattr(context.module, "dtype", None)
        if own is not None and jnp.dtype(own) == dtype:
            layers.add(context.module.path)
        return call(*args, **options)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))

    def cast(path: Any, x: jax.Array) -> jax.Array:
        _, *layer, name = (entry.key for entry in path)
        return x.astype(dtype) if name == "kernel" and tuple(layer) in layers else x

    return jax.tree_util.tree_map_with_path(cast, variables)


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
