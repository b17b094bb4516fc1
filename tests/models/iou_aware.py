"""A dense detector that is no part of kdjax: what somebody writes who has an idea for a RetinaNet.

Wu et al., "IoU-aware Single-stage Object Detector for Accurate Localization", 2020: every anchor also predicts the IoU
of its box with its object, which learns by a binary cross-entropy and counts in the score as much as the class.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses.detection import binary_cross_entropy, iou_loss
from kdjax.losses.reduce import masked_sum
from kdjax.models import RetinaNet
from kdjax.models.dense import Learnt, conv3x3
from kdjax.models.retinanet import RetinaNetHead
from kdjax.types import Features, Terms


class IoUPredictions(NamedTuple):
    logits: Features
    deltas: Features
    iou: Features


class IoUHead(RetinaNetHead):
    @nn.nowrap
    def outputs(self, cls: Features, box: Features) -> IoUPredictions:
        iou = conv3x3(self.anchors, dtype=self.dtype, name="iou")
        return IoUPredictions(*super().outputs(cls, box), {level: iou(x) for level, x in box.items()})


class IoUAwareRetinaNet(RetinaNet):
    terms: ClassVar[tuple[str, ...]] = ("cls", "box", "iou")
    head_type: ClassVar[type[RetinaNetHead]] = IoUHead

    @nn.nowrap
    def scores_of(self, rows: Any) -> jax.Array:
        return jnp.sqrt(super().scores_of(rows) * jax.nn.sigmoid(rows.iou))

    @nn.nowrap
    def sums_of(self, rows: Any, learnt: Learnt) -> Terms:
        iou = jax.lax.stop_gradient(jnp.exp(-iou_loss(self.boxes_of(rows, learnt.places), learnt.boxes)))
        entropy = binary_cross_entropy(rows.iou[..., 0], iou)
        return super().sums_of(rows, learnt) | {"iou": masked_sum(entropy, learnt.assignment.positive, axis=1)}
