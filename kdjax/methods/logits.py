"""What teaches by logits alone: knowledge distillation and channel-wise distillation, see :mod:`kdjax.losses.logits`.

They are the plain baselines of classification and of semantic segmentation.
"""

from typing import Annotated, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import cwd_loss, kd_loss, valid_positions
from kdjax.options import number
from kdjax.types import Logits, MethodTerms, TeacherHeads, View

_TEMPERATURE = number(0, above=True)


class LogitPair(NamedTuple):
    """The logits of student and teacher on the same images."""

    student: Logits
    teacher: Logits
    where: jax.Array | None
    """(N, h, w) bool: the positions of maps that lie in the image; None of images' logits."""


def pair_logits(student: View, teacher_heads: TeacherHeads, size: jax.Array) -> LogitPair:
    """What student and teacher say of images of ``size`` (N, 2); the teacher's has no gradient.

    Raises:
        UserError: one of them predicts no logits, or theirs differ in shape.
    """
    ours, theirs = student.predictions, teacher_heads(student.predictions)
    if not (isinstance(ours, Logits) and isinstance(theirs, Logits)):
        raise UserError("The student or the teacher predicts no logits of classes, by which this method teaches.")
    if ours.main.shape != theirs.main.shape:
        raise UserError(
            f"The student's logits are {ours.main.shape[1:]} and the teacher's {theirs.main.shape[1:]}, but this "
            "method compares them place by place: both must have the same classes and the same stride."
        )
    return LogitPair(ours, jax.lax.stop_gradient(theirs), valid_logits(student, size))


def valid_logits(view: View, size: jax.Array) -> jax.Array | None:
    """Which of the places (N, h, w) of a model's logits lie in images of ``size`` (N, 2); None of images' logits."""
    shape = view.predictions.main.shape
    if len(shape) == 2:
        return None
    # The logits have the places of the features that they are made of.
    stride = next(view.stride(level) for level, x in view.features.items() if x.shape[1:3] == shape[1:3])
    return valid_positions(size, shape[1:3], stride)


class KD(nn.Module):
    """Knowledge distillation: :func:`kdjax.losses.kd_loss` between the logits of student and teacher.

    >>> student = View({"c5": jnp.ones((1, 2, 2, 4))}, {"c5": 32}, Logits(jnp.array([[0.0, 1.0]])))
    >>> given = {"size": jnp.array([[64, 64]]), "teacher_heads": lambda ours: ours}
    >>> KD().apply({}, student, None, **given)
    {'kd': Array(0., dtype=float32)}
    """

    temperature: Annotated[float, _TEMPERATURE, "By which logits are divided."] = 4.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "teacher_heads")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("classification", "segmentation")
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"kd": ("student",)}

    def __call__(self, student: View, teacher: View, *, size: jax.Array, teacher_heads: TeacherHeads) -> MethodTerms:
        """The term "kd"; see the contract of :mod:`kdjax.methods`."""
        ours, theirs, where = pair_logits(student, teacher_heads, size)
        loss = kd_loss(ours.main, theirs.main, temperature=self.temperature, where=where, axis_name=self.axis_name)
        return {"kd": loss}


class CWD(nn.Module):
    """Channel-wise distillation: :func:`kdjax.losses.cwd_loss` between the logits of student and teacher.

    Its weight is 3 in the paper, and in MGD's segmentation, which adds it to its own term [code].

    >>> student = View({"c5": jnp.ones((1, 2, 2, 4))}, {"c5": 8}, Logits(jnp.ones((1, 2, 2, 3))))
    >>> given = {"size": jnp.array([[16, 16]]), "teacher_heads": lambda ours: ours}
    >>> CWD().apply({}, student, None, **given)
    {'cwd': Array(0., dtype=float32)}
    """

    temperature: Annotated[float, _TEMPERATURE, "By which logits are divided."] = 4.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "teacher_heads")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"cwd": ("student",)}

    def __call__(self, student: View, teacher: View, *, size: jax.Array, teacher_heads: TeacherHeads) -> MethodTerms:
        """The term "cwd"; see the contract of :mod:`kdjax.methods`."""
        ours, theirs, where = pair_logits(student, teacher_heads, size)
        return {"cwd": cwd_loss(ours.main, theirs.main, temperature=self.temperature, where=where)}
