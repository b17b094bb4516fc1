"""Dual Masked Knowledge Distillation: Yang et al., ICASSP 2024, https://arxiv.org/abs/2309.02719.

What is learnt; the mathematics, and what of it is our reconstruction, is in :mod:`kdjax.losses.dmkd`.
"""

import functools
from collections.abc import Callable
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import dmkd_loss, dual_keep
from kdjax.losses.dmkd import channel_attention, spatial_attention
from kdjax.methods.levels import Align, keys_of, pair_levels, show
from kdjax.methods.mgd import Generation
from kdjax.options import choice, number
from kdjax.types import MethodTerms, View


class Branches(nn.Module):
    """What DMKD learns of one level [recon]: a generation block for each branch, MGD's, and how both are fused.

    For a train step of your own, with maps of student and teacher that have one shape:

    >>> student, teacher, branches = jnp.ones((1, 8, 8, 4)), jnp.ones((1, 8, 8, 4)), Branches()
    >>> variables = branches.init(jax.random.key(0), student, teacher, keep=dual_keep(teacher))
    >>> sorted(variables["params"])
    ['channel', 'fusion', 'spatial']
    >>> branches.apply(variables, student, teacher, keep=dual_keep(teacher)).shape
    ()
    """

    suffix: str = ""
    """Of the names of its parameters: those of several levels stand side by side."""
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        student: jax.Array,
        teacher: jax.Array,
        *,
        keep: tuple[jax.Array, jax.Array],
        where: jax.Array | None = None,
        loss: Callable[..., jax.Array] = dmkd_loss,
    ) -> jax.Array:
        """How far the fused reconstruction is from the teacher: :func:`kdjax.losses.dmkd_loss`, a float32 scalar.

        Args:
            student: (N, H, W, C), aligned to the teacher's channels.
            teacher: (N, H, W, C); it gets no gradient.
            keep: bool masks (N, H, W, 1) and (N, 1, 1, C), see :func:`kdjax.losses.dual_keep`.
            where: (N, H, W) bool, the valid positions; None for all.
            loss: takes the place of ``dmkd_loss``, with the same arguments.
        """
        spatial, channel = (
            Generation(dtype=self.dtype, name=f"{branch}{self.suffix}") for branch in ("spatial", "channel")
        )
        return loss(
            student,
            teacher,
            keep=keep,
            generate=(functools.partial(spatial, where=where), functools.partial(channel, where=where)),
            fusion=self.param(f"fusion{self.suffix}", nn.initializers.zeros, (2,)),
            where=where,
        )

    @nn.nowrap
    def beside(self, parent: nn.Module) -> "Branches":
        """The same, with its parameters among those of ``parent``, in whose ``nn.compact`` method it was made."""
        nn.share_scope(parent, self)
        return self


def show_masks(
    method: nn.Module,
    level: str,
    keep: tuple[jax.Array, jax.Array],
    teacher: jax.Array,
    *,
    tau: float,
    where: jax.Array,
) -> None:
    """Shows both masks of a level, and the attentions of the teacher that they follow."""
    show(
        method,
        level,
        kept=keep[0],
        attention=lambda: spatial_attention(teacher, tau=tau, where=where),
        kept_channels=keep[1][:, 0, 0],
        attention_to_channels=lambda: channel_attention(teacher, tau=tau, where=where)[:, 0, 0],
    )


class DMKD(nn.Module):
    """Sum over levels of :func:`kdjax.losses.dmkd_loss` [recon].

    alpha is the weight of the term "dmkd": 2e-5 for one-stage detectors, 5e-7 for two-stage detectors.

    >>> view = View({"p3": jnp.ones((1, 8, 8, 4))}, {"p3": 8})
    >>> given = {"size": jnp.array([[64, 64]]), "keys": jax.random.split(jax.random.key(1), 1)}
    >>> variables = jax.eval_shape(DMKD().init, jax.random.key(0), view, view, **given)
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

    needs: ClassVar[tuple[str, ...]] = ("size", "keys")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"dmkd": ("student", "method")}

    @nn.compact
    def __call__(self, student: View, teacher: View, *, size: jax.Array, keys: jax.Array) -> MethodTerms:
        """The term "dmkd" of each pair of levels; see the contract of :mod:`kdjax.methods`."""
        loss = {}
        for index, (level, ours, theirs, where) in enumerate(pair_levels(student, teacher, size)):
            keep = dual_keep(
                theirs,
                spatial_ratio=self.spatial_ratio,
                channel_ratio=self.channel_ratio,
                tau=self.tau,
                select=self.select,
                threshold=self.threshold,
                hide=self.hide,
                keep_probability=self.keep_probability,
                keys=keys_of(keys, len(theirs), index),
                where=where,
            )
            show_masks(self, level, keep, theirs, tau=self.tau, where=where)
            aligned = Align(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours)
            branches = Branches(f"_{level}", dtype=self.dtype).beside(self)
            loss[level] = branches(aligned, theirs, keep=keep, where=where)
        return {"dmkd": loss}
