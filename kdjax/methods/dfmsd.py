"""Dual Feature Masking Stage-wise Distillation: Zhang et al., 2024, https://arxiv.org/abs/2407.13147.

What is learnt; the mathematics, and what of it is our reconstruction, is in :mod:`kdjax.losses.dfmsd`. The stages are
stages of a config, each with a stronger teacher, that start from the student of the stage before: ``configs/dfmsd.py``.
What a stage learns beside the student, its layers that adapt included, starts anew with its teacher.
"""

import functools
from collections.abc import Callable
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import dfmsd_loss, dmkd_loss, object_positions, pearson_loss, stage_keep
from kdjax.methods.dmkd import Branches, show_masks
from kdjax.methods.levels import Align, Conv, keys_of, pair_levels
from kdjax.options import FLAG, check_fields, choice, number, whole
from kdjax.types import MethodTerms, Targets, View


class Adaptation(nn.Module):
    """Adapts a student's feature map to a stage's teacher by a 1x1 convolution, also where the widths agree [recon].

    There it starts as the identity: a student that inherits the teacher's neck has channels that mean the same, and of
    any other student nothing is lost, while a square of random numbers all but loses some directions. It has no bias,
    which the norm would take away.

    >>> x = jnp.ones((1, 8, 8, 4))
    >>> y, variables = Adaptation(4).init_with_output(jax.random.key(0), x)
    >>> bool(jnp.all(y == x)), variables["params"]["align"]["kernel"].shape
    (True, (1, 1, 4, 4))
    """

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, channels)."""
        if x.shape[-1] != self.channels:
            return Conv(self.channels, dtype=self.dtype, name="align")(x)
        return nn.Conv(self.channels, (1, 1), use_bias=False, kernel_init=_identity, dtype=self.dtype, name="align")(x)


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """A kernel (1, 1, C, C)."""
    del key
    return jnp.eye(shape[-1], dtype=dtype)[None, None]


class DFMSD(nn.Module):
    """One stage: the sum over levels of :func:`kdjax.losses.dfmsd_loss` [recon].

    At each level the student is adapted by :class:`Adaptation`, the masks are those of
    :func:`kdjax.losses.stage_keep`, strengthened with the stage and the more so where objects are, and both sides are
    aligned semantically by a norm of their channels.

    The weight of the term "dfmsd" is 10 for one-stage teachers, 6 for two-stage and transformer teachers. With
    ``alignment = "separate"`` it is a sum over positions, of MGD's scale (2e-5, two-stage 5e-7), and the semantic
    alignment is a term of its own, "dfmsd_alignment".

    >>> view, method = View({"p3": jnp.ones((1, 8, 8, 4))}, {"p3": 8}), DFMSD(stage=2, alignment="separate")
    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool))
    >>> given = {"size": jnp.array([[64, 64]]), "targets": targets, "keys": jax.random.split(jax.random.key(1), 1)}
    >>> terms, _ = jax.eval_shape(method.init_with_output, jax.random.key(0), view, view, **given)
    >>> jax.tree.map(jnp.shape, terms)
    {'dfmsd': {'p3': ()}, 'dfmsd_alignment': {'p3': ()}}
    """

    stage: Annotated[int, whole(1), "1 for the weakest teacher, 2 for the next, and so on."] = 1
    eta: Annotated[
        float,
        number(0),
        "What each stage adds to the factor of the attention inside ground-truth boxes, which is 1 elsewhere: 0 hides "
        "objects no sooner than their surroundings.",
    ] = 1.0
    spatial_ratio: Annotated[
        float, number(0, 1), "Share of the positions to hide in the first stage, and 0.1 more in each stage after it."
    ] = 0.45
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
    adapt: Annotated[
        bool, FLAG, "Whether a 1x1 convolution adapts the student; False for one only where widths differ."
    ] = True
    alignment: Annotated[
        str,
        choice("norm", "separate"),
        'Semantic alignment: "norm", features are normalised before they are compared, or "separate".',
    ] = "norm"
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "targets", "keys")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("detection",)

    @property
    def still(self) -> dict[str, tuple[str, ...]]:
        """The norm takes every channel's mean away, and what a bias adds to it."""
        return {"dfmsd": ("align_*/align/conv/bias",)} if self.alignment == "norm" else {}

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @property
    def terms(self) -> dict[str, tuple[str, ...]]:
        """Which parameters each term may move."""
        names = ("dfmsd",) if self.alignment == "norm" else ("dfmsd", "dfmsd_alignment")
        return dict.fromkeys(names, ("student", "method"))

    @nn.compact
    def __call__(
        self, student: View, teacher: View, *, size: jax.Array, targets: Targets, keys: jax.Array
    ) -> MethodTerms:
        """The terms of each pair of levels; see the contract of :mod:`kdjax.methods`."""
        terms: dict[str, dict[str, jax.Array]] = {name: {} for name in self.terms}
        adaptation = Adaptation if self.adapt else Align
        for index, (level, ours, theirs, where) in enumerate(pair_levels(student, teacher, size)):
            _, height, width = where.shape
            aligned = adaptation(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours)
            keep = stage_keep(
                theirs,
                stage=self.stage,
                objects=object_positions(targets, (height, width), teacher.stride(level)),
                eta=self.eta,
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
            reconstruction_loss: Callable[..., jax.Array] = dmkd_loss
            if self.alignment == "norm":
                reconstruction_loss = functools.partial(dfmsd_loss, axis_name=self.axis_name)
            else:
                alignment = pearson_loss(aligned, theirs, where=where, axis_name=self.axis_name)
                terms["dfmsd_alignment"][level] = alignment
            branches = Branches(f"_{level}", dtype=self.dtype).beside(self)
            terms["dfmsd"][level] = branches(aligned, theirs, keep=keep, where=where, loss=reconstruction_loss)
        return {**terms}
