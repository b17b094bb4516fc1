"""Box imitation: the student's box regression learns that of the teacher, beside any other method.

MasKD's configs for RetinaNet and for two-stage detectors have such a term, of weight 1, and that for RepPoints two, of
its points (Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589, the authors' configs).
"""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import masked_mean
from kdjax.losses.detection import l1_loss, smooth_l1_loss
from kdjax.options import choice, number
from kdjax.types import MethodTerms, Targets, TeacherHeads, View


class BoxImitation(nn.Module):
    """L1 or smooth L1 between the box regression of student and teacher, in maps or on the student's RoIs.

    Maps are averaged over their valid positions, where the authors average over the padding too, and summed over common
    levels; RoIs are averaged over all sampled ones [code]. What can be compared, and what each map counts, is said by
    :meth:`kdjax.types.BoxPredictions.paired_boxes`.
    """

    loss: Annotated[str, choice("smooth_l1", "l1"), 'Of each number: "smooth_l1" or "l1".'] = "smooth_l1"
    beta: Annotated[float, number(0, above=True), 'Where "smooth_l1" turns from a parabola to a line.'] = 1.0
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "targets", "teacher_heads")
    requires: ClassVar[tuple[str, ...]] = ("teacher",)
    tasks: ClassVar[tuple[str, ...]] = ("detection",)
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"box_imitation": ("student",)}

    def __call__(
        self, student: View, teacher: View, *, size: jax.Array, targets: Targets, teacher_heads: TeacherHeads
    ) -> MethodTerms:
        """The term "box_imitation" of each map; see the contract of :mod:`kdjax.methods`."""
        theirs = teacher_heads(student.predictions)
        pairs = student.predictions.paired_boxes(
            theirs, strides=dict(student.strides), image_size=size, targets=targets
        )
        loss = {}
        for name, pair in pairs.items():
            teacher_boxes = jax.lax.stop_gradient(pair.teacher)
            if self.loss == "l1":
                error = l1_loss(pair.student, teacher_boxes)
            else:
                error = smooth_l1_loss(pair.student, teacher_boxes, beta=self.beta)
            loss[name] = pair.weight * masked_mean(error, pair.where, axis_name=self.axis_name)
        return {"box_imitation": loss}
