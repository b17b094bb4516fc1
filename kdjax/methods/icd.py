"""Instance-Conditional Distillation: Kang et al., NeurIPS 2021, https://arxiv.org/abs/2110.12724.

What is learnt; the mathematics is in :mod:`kdjax.losses.icd`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses.icd import NORM_EPSILON, instance_attention, split_heads
from kdjax.methods.levels import torch_uniform


def linear(x: jax.Array, width: int, *, dtype: jnp.dtype, name: str) -> jax.Array:
    """A linear layer (..., C) to (..., width), initialised as PyTorch does by default, where the authors left it."""
    bound = x.shape[-1] ** -0.5

    def bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, kernel_init=torch_uniform, bias_init=bias, dtype=dtype, name=name)(x)


class MLP(nn.Module):
    """Linear layers with ReLU between them [code]: the queries' encoder (C, C, C) and the predictor (C, C, 5)."""

    widths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., C) to (..., widths[-1])."""
        for index, width in enumerate(self.widths):
            x = linear(nn.relu(x) if index else x, width, dtype=self.dtype, name=f"layer_{index}")
        return x


class Values(nn.Module):
    """The value projection of the student's decoder layer [code]: the only part of that decoder that is ever used."""

    heads: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features (N, S, C) to values (N, heads, S, C / heads)."""
        return split_heads(linear(features, features.shape[-1], dtype=self.dtype, name="value"), self.heads)


class DecoderLayer(nn.Module):
    """One layer of the teacher's decoder [code]; queries do not attend to each other::

    k = F + W_pos PE
    q <- LN(q + MHA(q, k, F))
    q <- LN(q + W_2 ReLU(W_1 q))            hidden 4 C
    """

    heads: int = 8
    temperature: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, queries: jax.Array, features: jax.Array, position: jax.Array, *, real: jax.Array, where: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Decodes queries from the features of all levels, one after another.

        Args:
            queries: (N, Q, C) encoded descriptors, or what the layer before made of them.
            features: (N, S, C) of the teacher.
            position: (N, S, C), :func:`kdjax.losses.icd.sine_position` of each level.
            real: (N, Q) bool, the queries that are ground truth.
            where: (N, S) bool, the valid positions.

        Returns:
            Decoded queries (N, Q, C), values (N, heads, S, C / heads) and the instance mask (N, heads, S).
        """
        channels = features.shape[-1]

        def project(x: jax.Array, name: str) -> jax.Array:
            return split_heads(linear(x, channels, dtype=self.dtype, name=name), self.heads)

        def normalise(x: jax.Array, name: str) -> jax.Array:
            return nn.LayerNorm(epsilon=NORM_EPSILON, dtype=self.dtype, name=name)(x)

        keys = features + linear(position, channels, dtype=self.dtype, name="position")
        values = project(features, "value")
        attended, instance_mask = instance_attention(
            project(queries, "query"),
            project(keys, "key"),
            values,
            real=real,
            where=where,
            temperature=self.temperature,
        )
        attended = attended.swapaxes(1, 2).reshape(queries.shape)
        queries = normalise(queries + linear(attended, channels, dtype=self.dtype, name="out"), "norm_0")
        hidden = nn.relu(linear(queries, 4 * channels, dtype=self.dtype, name="mlp_0"))
        queries = normalise(queries + linear(hidden, channels, dtype=self.dtype, name="mlp_1"), "norm_1")
        return queries, values, instance_mask
