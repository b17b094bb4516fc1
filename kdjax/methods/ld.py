"""LD, localization distillation (Zheng et al., CVPR 2022, https://arxiv.org/abs/2102.12252)."""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from kdjax.losses import ld_loss
from kdjax.options import number
from kdjax.types import MethodTerms, PairedSidesOf, TeacherHeads, View


class LD(nn.Module):
    """:func:`kdjax.losses.ld_loss` between the sides that student and teacher predict, summed over levels.

    It is the variant of MMDetection's LDHead [code]: in the main region alone, which is what the student's places learn
    an object in, each weighted by the highest score that the student gives it. Which places these are is said by
    :meth:`kdjax.types.Model.paired_sides`.
    """

    temperature: Annotated[float, number(0, above=True), "By which the logits of distances are divided."] = 10.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("teacher_heads", "paired_sides")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("detection",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"ld": ("student",)}

    def __call__(
        self, student: View, teacher: View, *, teacher_heads: TeacherHeads, paired_sides: PairedSidesOf
    ) -> MethodTerms:
        """The term "ld" of each level; see the contract of :mod:`kdjax.methods`."""
        pairs = paired_sides(teacher_heads(student.predictions))
        return {
            "ld": {
                level: ld_loss(pair.student, pair.teacher, weight=pair.weight, temperature=self.temperature)
                for level, pair in pairs.items()
            }
        }
