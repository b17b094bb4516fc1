"""Masked Distillation with Receptive Tokens: Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589.

Two methods for two stages: "maskd_tokens" learns tokens in the teacher's feature space, "maskd" distils the regions
that they attend to. What is learnt; the mathematics is in :mod:`kdjax.losses.maskd`.
"""

import functools
from typing import Annotated, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import maskd_loss, masked_features, token_dice_loss, token_masks, token_weights
from kdjax.methods.levels import Conv, pair_levels, show, valid
from kdjax.options import FLAG, whole
from kdjax.types import Features, MethodTerms, OwnLoss, View

_weighting_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2 / (k * k * out)), not truncated."""


class LevelTokens(NamedTuple):
    """What the tokens of one level see in its features; see :class:`ReceptiveTokens`."""

    tokens: jax.Array
    """(K, C)."""
    weights: jax.Array | None
    """(N, K), or None where the masks are plain."""


class ReceptiveTokens(nn.Module):
    """Tokens E, from N(0, 0.01^2), and the convolutions of the mask weighting module P of one level [code].

    >>> features, where = jnp.ones((2, 8, 8, 16)), jnp.ones((2, 8, 8), bool)
    >>> learnt, _ = jax.eval_shape(ReceptiveTokens(6, True).init_with_output, jax.random.key(0), features, where=where)
    >>> learnt.tokens.shape, learnt.weights.shape
    ((6, 16), (2, 6))
    """

    tokens: int
    weighted: bool

    @nn.compact
    def __call__(self, features: jax.Array, *, where: jax.Array) -> LevelTokens:
        """The tokens and their weights in each image.

        Args:
            features: (N, H, W, C) of the teacher.
            where: (N, H, W) bool, the valid positions.
        """
        channels = features.shape[-1]
        tokens = self.param("tokens", nn.initializers.normal(0.01), (self.tokens, channels))
        if not self.weighted:
            return LevelTokens(tokens, None)
        # Not nn.Conv: what the convolutions give is computed without convolving.
        shapes = (3, 3, channels, channels), (1, 1, channels, self.tokens)
        kernels = self.param("kernel_0", _weighting_init, shapes[0]), self.param("kernel_1", _weighting_init, shapes[1])
        zeros = nn.initializers.zeros
        biases = self.param("bias_0", zeros, (channels,)), self.param("bias_1", zeros, (self.tokens,))
        return LevelTokens(tokens, token_weights(features, kernels, biases, where=where))


class AllTokens(nn.Module):
    """The tokens of all levels: what the first stage learns and the second one is given, under one name.

    >>> features, where = {"p3": jnp.ones((2, 8, 8, 16))}, {"p3": jnp.ones((2, 8, 8), bool)}
    >>> learnt, _ = jax.eval_shape(AllTokens(6, True).init_with_output, jax.random.key(0), features, where=where)
    >>> jax.tree.map(jnp.shape, learnt)
    {'p3': LevelTokens(tokens=(6, 16), weights=(2, 6))}
    """

    tokens: int
    weighted: bool

    @nn.compact
    def __call__(self, features: Features, *, where: Features) -> dict[str, LevelTokens]:
        """Level by level, features (N, H, W, C) and valid positions (N, H, W) to tokens and their weights."""
        return {
            level: ReceptiveTokens(self.tokens, self.weighted, name=level)(x, where=where[level])
            for level, x in features.items()
        }


class MasKDTokens(nn.Module):
    """Stage "tokens": the teacher, frozen, detects from features that the tokens' masks let through [code]::

        F'   = F * sum_k M_k(F) P_k(F)
        loss = the teacher's task loss on F' + sum over levels of the dice loss

    The detector of this stage is the teacher itself, so its features are the student's of the contract.

    >>> view = View({"p3": jnp.ones((1, 8, 8, 16))}, {"p3": 8})
    >>> given = {"size": jnp.array([[64, 64]]), "own_loss": lambda masked: {"box": jnp.mean(masked["p3"])}}
    >>> init = lambda key: MasKDTokens().init_with_output(key, view, None, **given)
    >>> jax.tree.map(jnp.shape, jax.eval_shape(init, jax.random.key(0))[0])
    {'dice': {'p3': ()}, 'masked_box': ()}
    """

    tokens: Annotated[int, whole(2), "K, the number of tokens at each level."] = 6
    weighted: Annotated[bool, FLAG, "Whether masks are weighted by P; the plain sum otherwise."] = True
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "own_loss")
    requires: ClassVar[tuple[str, ...]] = ()
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"masked_*": ("method",), "dice": ("method",)}
    still: ClassVar[dict[str, tuple[str, ...]]] = {"dice": ("kernel_0", "bias_0", "kernel_1", "bias_1")}
    """What weighs masks changes none."""

    @nn.compact
    def __call__(self, student: View, teacher: View | None, *, size: jax.Array, own_loss: OwnLoss) -> MethodTerms:
        """The terms of ``own_loss`` on masked features, as "masked_<term>", and "dice"; see :mod:`kdjax.methods`."""
        features = jax.lax.stop_gradient(student.features)
        where = valid(student, size)
        learnt = AllTokens(self.tokens, self.weighted, name="tokens")(features, where=where)
        masks = {level: token_masks(x, learnt[level].tokens, where=where[level]) for level, x in features.items()}
        masked = {level: masked_features(x, masks[level], learnt[level].weights) for level, x in features.items()}
        terms = {f"masked_{name}": value for name, value in own_loss(masked).items()}
        return terms | {"dice": {level: token_dice_loss(x) for level, x in masks.items()}}


class MasKD(nn.Module):
    """Stage "student": the sum over levels of :func:`kdjax.losses.maskd_loss`, with the first stage's tokens [code].

    The student is aligned by a 1x1 convolution even where its width is the teacher's: the tokens live in the teacher's
    space. The tokens never get a gradient. The paper's loss_weight is the weight of the term "maskd": 7 for RetinaNet,
    10 for FCOS and RepPoints, 1 for two-stage detectors.

    >>> student = View({"p3": jnp.ones((1, 8, 8, 16))}, {"p3": 8})
    >>> teacher = View(student.features | {"p4": jnp.ones((1, 4, 4, 16))}, {"p3": 8, "p4": 16})
    >>> given = {"size": jnp.array([[64, 64]]), "step": 0}
    >>> params = jax.eval_shape(MasKD().init, jax.random.key(0), student, teacher, **given)["params"]
    >>> sorted(params), sorted(params["tokens"])
    (['align_p3', 'tokens'], ['p3', 'p4'])
    """

    tokens: Annotated[int, whole(2), "K, the number of tokens at each level; that of the first stage."] = 6
    weighted: Annotated[
        bool,
        FLAG,
        "Whether masks are weighted by P, as in the first stage; the plain mean otherwise.",
    ] = True
    warmup_steps: Annotated[
        int,
        whole(0),
        "Steps before the student's own masks take part: in the paper 5000 to 8500 of 180000.",
    ] = 5000
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "step")
    requires: ClassVar[tuple[str, ...]] = ("teacher", "init")
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"maskd": ("student", "method")}
    still: ClassVar[dict[str, tuple[str, ...]]] = {"maskd": ("tokens",)}
    """Learnt in the stage before."""

    @nn.compact
    def __call__(self, student: View, teacher: View, *, size: jax.Array, step: jax.Array) -> MethodTerms:
        """The term "maskd" of each pair of levels; see the contract of :mod:`kdjax.methods`."""
        # Of all levels, as the first stage learnt them, though some may have no partner here.
        everywhere = valid(teacher, size)
        learnt = AllTokens(self.tokens, self.weighted, name="tokens")(teacher.features, where=everywhere)
        loss = {}
        for level, ours, theirs, where in pair_levels(student, teacher, size):
            tokens = learnt[level].tokens
            show(self, level, tokens=functools.partial(token_masks, theirs, tokens, where=where))
            loss[level] = maskd_loss(
                Conv(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours),
                theirs,
                tokens=jax.lax.stop_gradient(tokens),
                weights=learnt[level].weights,
                step=step,
                warmup=self.warmup_steps,
                where=where,
            )
        return {"maskd": loss}
