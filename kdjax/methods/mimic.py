"""Feature imitation: the plain mean squared error between aligned pyramids, the simplest baseline of every table."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import mimic_loss
from kdjax.methods.levels import Align, pair_levels
from kdjax.types import MethodTerms, View


class Mimic(nn.Module):
    """Sum over levels of :func:`kdjax.losses.mimic_loss` between the aligned student and the teacher.

    >>> student, teacher = (View({"p3": jnp.full((1, 8, 8, 4), x)}, {"p3": 8}) for x in (3.0, 1.0))
    >>> Mimic().apply({}, student, teacher, size=jnp.array([[64, 64]]))
    {'mimic': {'p3': Array(4., dtype=float32)}}
    """

    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size",)
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"mimic": ("student", "method")}

    @nn.compact
    def __call__(self, student: View, teacher: View, *, size: jax.Array) -> MethodTerms:
        """The term "mimic" of each pair of levels; see the contract of :mod:`kdjax.methods`."""
        loss = {}
        for level, ours, theirs, where in pair_levels(student, teacher, size):
            aligned = Align(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours)
            loss[level] = mimic_loss(aligned, theirs, where=where, axis_name=self.axis_name)
        return {"mimic": loss}
