"""Feature imitation: the plain mean squared error between aligned pyramids, the simplest baseline of every table."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import mimic_loss
from kdjax.methods.levels import Align, common_levels, valid
from kdjax.types import Features, Targets, Terms


class Mimic(nn.Module):
    """Sum over levels of :func:`kdjax.losses.mimic_loss` between the aligned student and the teacher."""

    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    terms: ClassVar[dict[str, tuple[str, ...]]] = {"mimic": ("student", "method")}
    """Which parameters each term may move."""

    @nn.compact
    def __call__(
        self, student: Features, teacher: Features, targets: Targets, *, keys: jax.Array, step: jax.Array
    ) -> Terms:
        """The term "mimic" over all common levels; see the contract of :mod:`kdjax.methods`."""
        loss = jnp.zeros(())
        for level in common_levels(student, teacher):
            channels = teacher[level].shape[-1]
            aligned = Align(channels, dtype=self.dtype, name=f"align_{level}")(student[level])
            where = valid(targets, teacher, level)
            loss += mimic_loss(aligned, teacher[level], where=where, axis_name=self.axis_name)
        return {"mimic": loss}
