"""Kernels in the dtype that layers multiply them in, for a model that only teaches."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.deformable import DeformableConv
from kdjax.types import Module

_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, DeformableConv)
"""Layers that convert a kernel before they do anything else with it. What is derived from one may not."""


def cast_kernels(model: Module, variables: dict[str, Any], dtype: Dtype, image_size: tuple[int, int]) -> dict[str, Any]:
    """The variables of a model that only teaches: kernels as its layers multiply them.

    A convolution or a linear layer that computes in ``dtype`` converts its kernel at every call, and finds the same
    numbers where that was done before. Kernels of all others, and whatever else a model has, stay as they are.

    >>> layer = nn.Dense(1, dtype=jnp.bfloat16)
    >>> variables = {"params": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)}}
    >>> cast_kernels(layer, variables, jnp.bfloat16, (32, 32))["params"]
    {'bias': Array([1.], dtype=float32), 'kernel': Array([[1],
           [1],
           [1]], dtype=bfloat16)}

    Args:
        model: takes images (N, H, W, 3).
        variables: of the model, float32.
        dtype: of its computation.
        image_size: height and width of images that it takes.
    """
    layers, dtype = set(), jnp.dtype(dtype)
    if dtype == jnp.float32:
        return variables

    def note(call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
        layer = context.module
        if type(layer) in _LAYERS and layer.dtype is not None and jnp.dtype(layer.dtype) == dtype:
            layers.add(layer.path)
        return call(*args, **options)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))

    def cast(path: Any, x: jax.Array) -> jax.Array:
        _, *layer, name = (entry.key for entry in path)
        return x.astype(dtype) if name == "kernel" and tuple(layer) in layers else x

    return jax.tree_util.tree_map_with_path(cast, variables)
