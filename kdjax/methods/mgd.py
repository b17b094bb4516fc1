"""Masked Generative Distillation: Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import keep_mask, mgd_loss
from kdjax.methods.levels import Align, Conv, common_levels, valid
from kdjax.types import Features, Targets, Terms


class Generation(nn.Module):
    """MGD's generation block: a 3x3 convolution, ReLU and a 3x3 convolution, all of the input's width [code]."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, C)."""
        channels = x.shape[-1]
        x = nn.relu(Conv(channels, 3, dtype=self.dtype, name="conv_0")(x))
        return Conv(channels, 3, dtype=self.dtype, name="conv_1")(x)


class MGD(nn.Module):
    """Sum over levels of :func:`kdjax.losses.mgd_loss`, each level with its own generation block [code].

    The student is aligned by a 1x1 convolution where its width is not the teacher's. The paper's alpha is the weight
    of the term "mgd": 2e-5 for one-stage detectors, 5e-7 for two-stage detectors.
    """

    mask_ratio: float = 0.65
    """Probability of hiding a position (or channel), in [0, 1]."""
    mask: str = "spatial"
    """"spatial" for detection and segmentation, "channel" for classification."""
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    terms: ClassVar[dict[str, tuple[str, ...]]] = {"mgd": ("student", "method")}
    """Which parameters each term may move."""

    @nn.compact
    def __call__(
        self, student: Features, teacher: Features, targets: Targets, *, keys: jax.Array, step: jax.Array
    ) -> Terms:
        """The term "mgd" over all common levels; see the contract of :mod:`kdjax.methods`."""
        loss = jnp.zeros(())
        for index, level in enumerate(common_levels(student, teacher)):
            shape = teacher[level].shape
            level_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            loss += mgd_loss(
                Align(shape[-1], dtype=self.dtype, name=f"align_{level}")(student[level]),
                teacher[level],
                keep=keep_mask(shape, keys=level_keys, mask_ratio=self.mask_ratio, mask=self.mask),
                generate=Generation(dtype=self.dtype, name=f"generation_{level}"),
                where=valid(targets, teacher, level),
            )
        return {"mgd": loss}
