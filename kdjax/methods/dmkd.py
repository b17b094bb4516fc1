"""Dual Masked Knowledge Distillation: Yang et al., ICASSP 2024, https://arxiv.org/abs/2309.02719.

What is learnt; the mathematics, and what of it is our reconstruction, is in :mod:`kdjax.losses.dmkd`.
"""

import functools
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import dmkd_loss, dual_keep
from kdjax.losses.dmkd import Generate
from kdjax.methods.levels import Align, pair_levels
from kdjax.methods.mgd import Generation
from kdjax.options import choice, number
from kdjax.types import Features, Targets, Task, Terms


def branches(level: str, where: jax.Array, dtype: jnp.dtype) -> tuple[Generate, Generate]:
    """G_sp and G_ch of one level: MGD's block each, for positions ``where`` (N, H, W) bool.

    To be called in a module's ``nn.compact`` method, whose parts they become.

    >>> class Both(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return [generate(x) for generate in branches("p3", jnp.ones(x.shape[:3], bool), jnp.float32)]
    >>> maps, variables = jax.eval_shape(Both().init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    >>> jax.tree.map(jnp.shape, maps), sorted(variables["params"])
    ([(1, 8, 8, 4), (1, 8, 8, 4)], ['channel_p3', 'spatial_p3'])
    """
    spatial, channel = (Generation(dtype=dtype, name=f"{branch}_{level}") for branch in ("spatial", "channel"))
    return functools.partial(spatial, where=where), functools.partial(channel, where=where)


class DMKD(nn.Module):
    """Sum over levels of :func:`kdjax.losses.dmkd_loss` [recon].

    alpha is the weight of the term "dmkd": 2e-5 for one-stage detectors, 5e-7 for two-stage detectors.

    >>> features = {"p3": jnp.ones((1, 8, 8, 4))}
    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool), jnp.array([[64, 64]]))
    >>> given = {"keys": jax.random.split(jax.random.key(1), 1), "step": 0}
    >>> variables = jax.eval_shape(DMKD().init, jax.random.key(0), features, features, targets, **given)
    >>> sorted(variables["params"])
    ['channel_p3', 'fusion_p3', 'spatial_p3']
    """

    spatial_ratio: Annotated[
        float,
        number(0, 1),
        "Share of the positions to hide: 0.65 for one-stage detectors, 0.45 for two-stage detectors.",
    ] = 0.65
    channel_ratio: Annotated[float, number(0, 1), "Share of the channels to hide."] = 0.5
    tau: Annotated[float, number(0, above=True), "Temperature of both attentions: 0.5, for FCOS 0.8."] = 0.5
    select: Annotated[
        str,
        choice("ratio", "threshold"),
        '"ratio", or "threshold" to hide what passes the threshold, whatever its share.',
    ] = "ratio"
    threshold: Annotated[
        float,
        number(0),
        'For "threshold": the attention from which on places are hidden; 1 is an image\'s mean.',
    ] = 1.0
    hide: Annotated[str, choice("high", "low"), 'Hide the places of "high" or of "low" attention.'] = "high"
    keep_probability: Annotated[
        float,
        number(0, 1),
        "Probability with which a selected place stays selected, hence hidden.",
    ] = 1.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"dmkd": ("student", "method")}

    @nn.compact
    def __call__(
        self,
        student: Features,
        teacher: Features,
        targets: Targets,
        *,
        keys: jax.Array,
        step: jax.Array,
        task: Task | None = None,
    ) -> Terms:
        """The term "dmkd" over all pairs of levels; see the contract of :mod:`kdjax.methods`."""
        loss = jnp.zeros(())
        for index, (level, ours, theirs, where) in enumerate(pair_levels(student, teacher, targets)):
            keep = dual_keep(
                theirs,
                spatial_ratio=self.spatial_ratio,
                channel_ratio=self.channel_ratio,
                tau=self.tau,
                select=self.select,
                threshold=self.threshold,
                hide=self.hide,
                keep_probability=self.keep_probability,
                keys=jax.vmap(jax.random.fold_in, (0, None))(keys, index),
                where=where,
            )
            loss += dmkd_loss(
                Align(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours),
                theirs,
                keep=keep,
                generate=branches(level, where, self.dtype),
                fusion=self.param(f"fusion_{level}", nn.initializers.zeros, (2,)),
                where=where,
            )
        return {"dmkd": loss}
