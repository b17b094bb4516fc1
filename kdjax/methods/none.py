"""No distillation: the baseline that a gain is quoted against."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.types import Features, Targets, Task, Terms


class NoDistillation(nn.Module):
    """The identical student without a teacher: no terms, no parameters.

    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool), jnp.array([[64, 64]]))
    >>> given = {"keys": jax.random.split(jax.random.key(1), 1), "step": 0}
    >>> NoDistillation().apply({}, {"p3": jnp.ones((1, 8, 8, 4))}, {}, targets, **given)
    {}
    """

    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ()
    terms: ClassVar[dict[str, tuple[str, ...]]] = {}

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
        """Returns no terms."""
        return {}
