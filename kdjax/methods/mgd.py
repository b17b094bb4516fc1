"""Masked Generative Distillation: Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529."""

import functools
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import hide, keep_mask, mgd_loss
from kdjax.methods.levels import Align, Conv, keys_of, pair_levels, show
from kdjax.options import choice, number
from kdjax.types import MethodTerms, View


class Generation(nn.Module):
    """MGD's generation block: a 3x3 convolution, ReLU and a 3x3 convolution, all of the input's width [code].

    >>> y, variables = jax.eval_shape(Generation().init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    >>> y.shape, variables["params"]["conv_0"]["conv"]["kernel"].shape
    ((1, 8, 8, 4), (3, 3, 4, 4))
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, C); a padded image gives what it gives without its padding.

        The input must be zero in the padding; the hidden map, where the bias has filled the padding, is zeroed there.

        Args:
            x: (N, H, W, C), any float dtype.
            where: (N, H, W) bool, the valid positions; None for all.
        """
        channels = x.shape[-1]
        x = nn.relu(Conv(channels, 3, dtype=self.dtype, name="conv_0")(x))
        return Conv(channels, 3, dtype=self.dtype, name="conv_1")(hide(x, where=where))


class MGD(nn.Module):
    """Sum over levels of :func:`kdjax.losses.mgd_loss`, each level with its own generation block [code].

    The student is aligned by a 1x1 convolution where its width is not the teacher's. The paper's alpha is the weight
    of the term "mgd": 2e-5 for one-stage detectors, 5e-7 for two-stage detectors.

    >>> view = View({"p3": jnp.ones((1, 8, 8, 4)), "p4": jnp.ones((1, 4, 4, 4))}, {"p3": 8, "p4": 16})
    >>> given = {"size": jnp.array([[64, 64]]), "keys": jax.random.split(jax.random.key(1), 1)}
    >>> variables = jax.eval_shape(MGD().init, jax.random.key(0), view, view, **given)
    >>> sorted(variables["params"])
    ['generation_p3', 'generation_p4']
    """

    mask_ratio: Annotated[float, number(0, 1), "Probability of hiding a position (or channel), in [0, 1]."] = 0.65
    mask: Annotated[
        str,
        choice("spatial", "channel"),
        '"spatial" for detection and segmentation, "channel" for classification.',
    ] = "spatial"
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "keys")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"mgd": ("student", "method")}

    @nn.compact
    def __call__(self, student: View, teacher: View, *, size: jax.Array, keys: jax.Array) -> MethodTerms:
        """The term "mgd" of each pair of levels; see the contract of :mod:`kdjax.methods`."""
        loss = {}
        for index, (level, ours, theirs, where) in enumerate(pair_levels(student, teacher, size)):
            level_keys = keys_of(keys, len(theirs), index)
            block = Generation(dtype=self.dtype, name=f"generation_{level}")
            keep = keep_mask(theirs.shape, keys=level_keys, mask_ratio=self.mask_ratio, mask=self.mask)
            show(self, level, **({"kept": keep} if self.mask == "spatial" else {"kept_channels": keep[:, 0, 0]}))
            loss[level] = mgd_loss(
                Align(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours),
                theirs,
                keep=keep,
                generate=functools.partial(block, where=where),
                where=where,
            )
        return {"mgd": loss}
