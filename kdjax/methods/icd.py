"""Instance-Conditional Distillation: Kang et al., NeurIPS 2021, https://arxiv.org/abs/2110.12724.

What is learnt; the mathematics is in :mod:`kdjax.losses.icd`.
"""

import functools
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import (
    ClassStatistics,
    hide,
    icd_loss,
    instance_attention,
    instance_confidence_loss,
    instance_descriptors,
    instance_localization_loss,
    sample_queries,
    sine_position,
    split_heads,
)
from kdjax.losses.icd import NORM_EPSILON
from kdjax.methods.levels import Align, pair_levels, show, torch_uniform
from kdjax.options import number, whole
from kdjax.types import MethodTerms, Targets, View

_SHOWN_INSTANCES = 4
"""Of each image: those whose attention is shown."""


def linear(x: jax.Array, width: int, *, dtype: jnp.dtype, name: str) -> jax.Array:
    """A linear layer (..., C) to (..., width), initialised as PyTorch does by default, where the authors left it.

    To be called in a module's ``nn.compact`` method, whose part it becomes.

    >>> class Scores(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return linear(x, 3, dtype=jnp.float32, name="scores")
    >>> jax.eval_shape(Scores().init_with_output, jax.random.key(0), jnp.ones((2, 5, 16)))[0].shape
    (2, 5, 3)
    """
    bound = x.shape[-1] ** -0.5

    def bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, kernel_init=torch_uniform, bias_init=bias, dtype=dtype, name=name)(x)


def projection(x: jax.Array, *, dtype: jnp.dtype, name: str) -> jax.Array:
    """A projection of attention's (..., C) to (..., C), initialised as PyTorch's ``nn.MultiheadAttention`` does [code].

    The kernels of query, key and value are uniform with the variance that Xavier gives a packed one of (3 C, C),
    1 / (2 C); biases are zero. To be called as :func:`linear`.
    """
    kernel = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")
    return nn.Dense(x.shape[-1], kernel_init=kernel, dtype=dtype, name=name)(x)


class MLP(nn.Module):
    """Linear layers with ReLU between them [code]: the queries' encoder (C, C, C) and the predictor (C, C, 5).

    >>> jax.eval_shape(MLP((16, 16, 5)).init_with_output, jax.random.key(0), jnp.ones((1, 12, 16)))[0].shape
    (1, 12, 5)
    """

    widths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., C) to (..., widths[-1])."""
        for index, width in enumerate(self.widths):
            x = linear(nn.relu(x) if index else x, width, dtype=self.dtype, name=f"layer_{index}")
        return x


class Values(nn.Module):
    """The value projection of the student's decoder layer [code]: the only part of that decoder that is ever used.

    >>> jax.eval_shape(Values(heads=2).init_with_output, jax.random.key(0), jnp.ones((1, 80, 16)))[0].shape
    (1, 2, 80, 8)
    """

    heads: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features (N, S, C) to values (N, heads, S, C / heads)."""
        return split_heads(projection(features, dtype=self.dtype, name="value"), self.heads)


class DecoderLayer(nn.Module):
    """One layer of the teacher's decoder [code]; queries do not attend to each other::

        k = F + W_pos PE
        q <- LN(q + MHA(q, k, F))
        q <- LN(q + W_2 ReLU(W_1 q))            hidden 4 C

    >>> queries, features, position = jnp.ones((1, 12, 16)), jnp.ones((1, 80, 16)), jnp.ones((1, 80, 16))
    >>> masks = {"real": jnp.ones((1, 12), bool), "where": jnp.ones((1, 80), bool)}
    >>> init = DecoderLayer(heads=2).init_with_output
    >>> decoded, _ = jax.eval_shape(init, jax.random.key(0), queries, features, position, **masks)
    >>> jax.tree.map(jnp.shape, decoded)
    ((1, 12, 16), (1, 2, 80, 8), (1, 2, 80))
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
            return split_heads(projection(x, dtype=self.dtype, name=name), self.heads)

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
        # PyTorch's default kernel, and, as all biases of its attention, none at first.
        out = nn.Dense(channels, kernel_init=torch_uniform, dtype=self.dtype, name="out")(attended)
        queries = normalise(queries + out, "norm_0")
        hidden = nn.relu(linear(queries, 4 * channels, dtype=self.dtype, name="mlp_0"))
        queries = normalise(queries + linear(hidden, channels, dtype=self.dtype, name="mlp_1"), "norm_1")
        return queries, values, instance_mask


class ICD(nn.Module):
    """Where the teacher's instance queries look, the student imitates the teacher's values [code].

    The term "icd" is the mean over decoder layers of :func:`kdjax.losses.icd_loss`; its weight is 8 for one-stage
    detectors, 3 for two-stage. The terms "icd_confidence" and "icd_localization", sums over decoder layers, are the
    auxiliary task that teaches queries, teacher's decoder and predictor; they move neither detector. What the method
    learns has an optimiser of its own, ``method_optimizer`` of a stage: AdamW at 1e-4, clipped to a norm of 0.01.

    A student whose width is not the teacher's is aligned by a 1x1 convolution [recon]; the authors' have one width.

    >>> from kdjax.losses import uniform_statistics
    >>> view, keys = View({"p3": jnp.ones((1, 8, 8, 16))}, {"p3": 8}), jax.random.split(jax.random.key(1), 1)
    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool))
    >>> given = {"size": jnp.array([[64, 64]]), "targets": targets, "keys": keys, "step": 0}
    >>> given["statistics"] = uniform_statistics(5)
    >>> terms, _ = jax.eval_shape(ICD(heads=2).init_with_output, jax.random.key(0), view, view, **given)
    >>> jax.tree.map(jnp.shape, terms)
    {'icd': (), 'icd_confidence': (), 'icd_localization': ()}
    """

    heads: Annotated[int, whole(1), "Attention heads; divide the teacher's width."] = 8
    layers: Annotated[int, whole(1), "Layers of the decoder."] = 1
    temperature: Annotated[float, number(0, above=True), "Divides the logits of the instance masks."] = 1.0
    queries: Annotated[
        int,
        whole(1),
        "Queries per image at most, unless it has more boxes: 300 for one-stage detectors, 100 for two-stage.",
    ] = 300
    warmup_steps: Annotated[
        int,
        whole(0),
        'Steps before the term "icd" moves the student; its value projection learns from the start.',
    ] = 1000
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "targets", "keys", "step", "statistics")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("detection",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {
        "icd": ("student", "method"),
        "icd_confidence": ("method",),
        "icd_localization": ("method",),
    }
    still: ClassVar[dict[str, tuple[str, ...]]] = {
        "icd": ("encoder", "teacher_layer_*", "predictor"),
        **dict.fromkeys(
            ("icd_confidence", "icd_localization"), ("align_*", "student_layer_*", "key/bias", "position/bias")
        ),
    }
    """The auxiliary task alone teaches the queries where to look, and the teacher's side alone answers it; what is
    added to all keys alike shifts all logits of a query alike, which the softmax does not see."""

    @nn.compact
    def __call__(
        self,
        student: View,
        teacher: View,
        *,
        size: jax.Array,
        targets: Targets,
        keys: jax.Array,
        step: jax.Array,
        statistics: ClassStatistics,
    ) -> MethodTerms:
        """The terms over all pairs of levels; see the contract of :mod:`kdjax.methods`."""
        statistics = ClassStatistics(*(jnp.asarray(x, jnp.float32) for x in statistics))
        num_classes = len(statistics.frequency)
        pairs = pair_levels(student, teacher, size)
        channels = pairs[0].teacher.shape[-1]
        if channels % self.heads or channels % 4:
            raise UserError(
                f"The teacher's features have {channels} channels, which ICD's {self.heads} heads and 4 parts of the "
                "position code cannot share evenly; choose other heads."
            )

        def flat(levels: list[jax.Array]) -> jax.Array:
            """(N, H, W, ...) of each level to (N, S, ...), the finest level first."""
            return jnp.concatenate([x.reshape(len(x), -1, *x.shape[3:]) for x in levels], axis=1)

        queries = sample_queries(targets, image_size=size, keys=keys, statistics=statistics, limit=self.queries)
        descriptors = instance_descriptors(queries, image_size=size, num_classes=num_classes)
        where = flat([pair.where for pair in pairs])
        position = flat([sine_position(pair.where, channels) for pair in pairs])
        taught = flat([hide(jax.lax.stop_gradient(pair.teacher), where=pair.where) for pair in pairs])
        # Until the queries have learnt where to look, what the student learns there would be noise.
        detached = step < self.warmup_steps
        learning = flat(
            [
                Align(channels, dtype=self.dtype, name=f"align_{pair.level}")(
                    jnp.where(detached, jax.lax.stop_gradient(pair.student), pair.student)
                )
                for pair in pairs
            ]
        )

        def attention(layer: DecoderLayer, decoded: jax.Array, level: int) -> jax.Array:
            """Where each of the first real instances looks at a level, mean over heads: (N, H, W, instances)."""

            def looks(instance: jax.Array) -> jax.Array:
                real = queries.real & (jnp.arange(queries.real.shape[1]) == instance)[None]
                return jnp.mean(layer(decoded, taught, position, real=real, where=where)[2], axis=1)

            maps = jnp.stack(
                [looks(jnp.int32(x)) for x in range(min(_SHOWN_INSTANCES, queries.real.shape[1]))], axis=-1
            )
            start = sum(pair.where[0].size for pair in pairs[:level])
            here = pairs[level].where
            return maps[:, start : start + here[0].size].reshape(*here.shape, -1)

        decoded = MLP((channels,) * 3, dtype=self.dtype, name="encoder")(descriptors)
        predict = MLP((channels, channels, 5), dtype=self.dtype, name="predictor")
        terms = dict.fromkeys(self.terms, jnp.zeros(()))
        for index in range(self.layers):
            layer = DecoderLayer(self.heads, self.temperature, dtype=self.dtype, name=f"teacher_layer_{index}")
            for level, pair in enumerate(pairs if index == self.layers - 1 else ()):
                show(self, pair.level, attention=functools.partial(attention, layer, decoded, level))
            decoded, values, instance_mask = layer(decoded, taught, position, real=queries.real, where=where)
            outputs = predict(decoded)
            terms["icd_confidence"] += instance_confidence_loss(outputs[..., 0], queries, axis_name=self.axis_name)
            terms["icd_localization"] += instance_localization_loss(outputs[..., 1:], queries, axis_name=self.axis_name)
            own = Values(self.heads, dtype=self.dtype, name=f"student_layer_{index}")(learning)
            terms["icd"] += icd_loss(own, values, instance_mask=instance_mask) / self.layers
        return {**terms}
