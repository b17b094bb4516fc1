"""Feature imitation: the plain mean squared error between aligned pyramids, the simplest baseline of every table."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import mimic_loss
from kdjax.methods.levels import Align, pair_levels
from kdjax.types import Features, Targets, Task, Terms


class Mimic(nn.Module):
    """Sum over levels of :func:`kdjax.losses.mimic_loss` between the aligned student and the teacher.

    >>> student, teacher = {"p3": jnp.full((1, 8, 8, 4), 3.0)}, {"p3": jnp.ones((1, 8, 8, 4))}
    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool), jnp.array([[64, 64]]))
    >>> given = {"keys": jax.random.split(jax.random.key(1), 1), "step": 0}
    >>> Mimic().apply({}, student, teacher, targets, **given)
    {'mimic': Array(4., dtype=float32)}
    """

    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"mimic": ("student", "method")}

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
        """The term "mimic" over all pairs of levels; see the contract of :mod:`kdjax.methods`."""
        loss = jnp.zeros(())
        for level, ours, theirs, where in pair_levels(student, teacher, targets):
            aligned = Align(theirs.shape[-1], dtype=self.dtype, name=f"align_{level}")(ours)
            loss += mimic_loss(aligned, theirs, where=where, axis_name=self.axis_name)
        return {"mimic": loss}
