"""LD, localization distillation (Zheng et al., CVPR 2022, https://arxiv.org/abs/2102.12252)."""

import functools
from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from kdjax.losses import ld_loss
from kdjax.options import number
from kdjax.types import MethodTerms, PairedSidesOf, TeacherHeads, View


class LD(nn.Module):
    """:func:`kdjax.losses.ld_loss` between the sides that student and teacher predict, summed over levels.

    The term "ld" is of the main region, the places that learn an object, each weighted by the highest score that the
    student gives it: all that MMDetection's LDHead has [code]. "ld_vlr" is of the valuable localization region, places
    near objects, weighted by their IoU with them, as the authors' code has it [code]; they divide it by four. Which
    places these are is said by :meth:`kdjax.types.Model.paired_sides`.
    """

    temperature: Annotated[float, number(0, above=True), "By which the logits of distances are divided."] = 10.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("teacher_heads", "paired_sides")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("detection",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"ld": ("student",), "ld_vlr": ("student",)}

    def __call__(
        self, student: View, teacher: View, *, teacher_heads: TeacherHeads, paired_sides: PairedSidesOf
    ) -> MethodTerms:
        """The terms "ld" and "ld_vlr" of each level; see the contract of :mod:`kdjax.methods`."""
        main, valuable = {}, {}
        for level, pair in paired_sides(teacher_heads(student.predictions)).items():
            loss = functools.partial(ld_loss, pair.student, pair.teacher, temperature=self.temperature)
            main[level], valuable[level] = loss(weight=pair.main), loss(weight=pair.valuable)
        return {"ld": main, "ld_vlr": valuable}
