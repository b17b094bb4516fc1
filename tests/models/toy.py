"""A small dense detector of one anchor a cell, and the same with one mistake each."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import boxes
from kdjax.losses.detection import binary_cross_entropy, l1_loss
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.anchors import centres_inside, pyramid_anchors
from kdjax.models.assign import Assignment, assign_by_iou
from kdjax.models.dense import DenseDetector, Learnt, conv3x3, prior_bias
from kdjax.models.retinanet import RetinaNetPredictions
from kdjax.types import Features, Targets, Terms


class ToyHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, features: Features) -> RetinaNetPredictions:
        logits = conv3x3(self.num_classes, bias_init=prior_bias(0.01), name="logits")
        deltas = conv3x3(4, name="deltas")
        return RetinaNetPredictions(
            {level: logits(x) for level, x in features.items()}, {level: deltas(x) for level, x in features.items()}
        )


class Toy(DenseDetector):
    terms: ClassVar[tuple[str, ...]] = ("cls", "box")

    def setup(self) -> None:
        self.head = ToyHead(self.num_classes)

    @nn.nowrap
    def places_of(self, predictions: Any) -> dict[str, jax.Array]:
        return pyramid_anchors(self.sizes(predictions.logits), self.strides, scale=2.5, octaves=1, ratios=(1.0,))

    @nn.nowrap
    def inside(self, places: jax.Array, image_size: jax.Array) -> jax.Array:
        return centres_inside(places, image_size)

    @nn.nowrap
    def assign(self, places: jax.Array, targets: Targets, inside: jax.Array) -> Assignment:
        return assign_by_iou(places, targets.boxes, targets.valid, inside, crowd=targets.crowd)

    @nn.nowrap
    def boxes_of(self, rows: Any, places: jax.Array) -> jax.Array:
        return boxes.decode(rows.deltas, places)

    @nn.nowrap
    def count(self, assignment: Assignment) -> jax.Array:
        return mean_count(jnp.sum(assignment.positive), self.axis_name)

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        positive, taking_part = learnt.assignment.positive, learnt.assignment.positive | learnt.assignment.negative
        classes = jnp.arange(self.num_classes)[None, None]
        goal = (positive[..., None] & (learnt.labels[..., None] == classes)).astype(jnp.float32)
        error = l1_loss(rows.deltas, boxes.encode(learnt.boxes, learnt.places))
        count = self.count(learnt.assignment)
        return {
            "cls": masked_sum(binary_cross_entropy(rows.logits, goal), taking_part[..., None]) / count,
            "box": masked_sum(error, positive[..., None]) / count,
        }


class CountsOnItsDevice(Toy):
    @nn.nowrap
    def count(self, assignment: Assignment) -> jax.Array:
        return mean_count(jnp.sum(assignment.positive))


class CountsPadding(Toy):
    @nn.nowrap
    def count(self, assignment: Assignment) -> jax.Array:
        return mean_count(jnp.array(assignment.positive.size), self.axis_name)


class LearnsInPadding(Toy):
    @nn.nowrap
    def inside(self, places: jax.Array, image_size: jax.Array) -> jax.Array:
        return jnp.ones(len(places), bool)


class FindsLogarithms(Toy):
    @nn.nowrap
    def confidence_of(self, scores: jax.Array, rows: Any) -> jax.Array:
        return jnp.log(scores)


class RanksLogarithms(Toy):
    @nn.nowrap
    def scores_of(self, rows: Any) -> jax.Array:
        return jax.nn.log_sigmoid(rows.logits)


class LearnsTheOpposite(Toy):
    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        return super().terms_of(rows._replace(logits=-rows.logits), learnt)


class LeavesItsBoxesAlone(Toy):
    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        return super().terms_of(jax.lax.stop_gradient(rows)._replace(logits=rows.logits), learnt)


class SaysItIsStill(Toy):
    still: ClassVar[tuple[str, ...]] = ("head",)
