"""GFL: an ATSS whose scores are the quality of its boxes, and whose boxes are distributions.

Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection", 2020.
Each side of a box is a distribution over how many strides, 0 to 16, it is away from the location; its mean is where the
side is found.
"""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import boxes
from kdjax.losses.detection import distribution_focal_loss, giou_loss, paired_iou, quality_focal_loss
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.assign import valuable_region
from kdjax.models.atss import ATSS, BOX_WEIGHT, ATSSHead
from kdjax.models.dense import Learnt, pair_maps
from kdjax.types import Features, PairedBoxes, PairedSides, Targets, Terms

FARTHEST = 16
"""Strides that a side may be away from its location."""
BINS = FARTHEST + 1

DFL_WEIGHT = 0.25
"""Of the distribution focal loss in the whole."""

_BELOW_FARTHEST = 0.1
"""By how much what a distribution learns stays below ``FARTHEST``, as in the authors' code."""


class GFLPredictions(NamedTuple):
    """The maps of the head, level by level."""

    logits: Features
    """{"p3": (N, H, W, classes), ...}, before the sigmoid: of a class and the IoU of the box, at once."""
    distributions: Features
    """{"p3": (N, H, W, 4 * 17), ...} float32, before the softmax of each side: left, top, right, bottom, the number of
    strides varying fastest."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: the distances, in strides, of another GFL."""
        del targets

        def distances(predictions: GFLPredictions) -> Features:
            return {level: mean_distances(x) for level, x in predictions.distributions.items()}

        given = distances(theirs) if isinstance(theirs, GFLPredictions) else {}
        return pair_maps(distances(self), given, strides, image_size, kind="GFLs with equal grids")


def by_side(distributions: jax.Array) -> jax.Array:
    """Distributions (..., 4 * 17) to (..., 4, 17)."""
    return distributions.reshape(*distributions.shape[:-1], 4, BINS)


def mean_distances(distributions: jax.Array) -> jax.Array:
    """The means of the distributions (..., 4 * 17), in strides: (..., 4)."""
    share = jax.nn.softmax(by_side(distributions))
    strides = jnp.arange(BINS, dtype=share.dtype).reshape((1,) * (share.ndim - 1) + (-1,))
    return jnp.sum(share * strides, axis=-1)


def best_scores(rows: Any) -> jax.Array:
    """The highest score of each place, by which what it says of boxes is weighted: (N, rows), without a gradient."""
    return jax.lax.stop_gradient(jnp.max(jax.nn.sigmoid(rows.logits), axis=-1))


class GFLHead(ATSSHead):
    """The towers and scales of ATSS, without a centerness."""

    @nn.nowrap
    def outputs(self, cls: Features, box: Features) -> GFLPredictions:
        """The predictions from the maps of the two towers."""
        return GFLPredictions(self.logits(cls), self.scaled(box, 4 * BINS, "box_distributions"))


class GFL(ATSS):
    """The detector: its head, what it learns from targets, and what it finds."""

    terms: ClassVar[tuple[str, ...]] = ("cls", "box", "dfl")
    """Names of the loss terms."""
    decisive: ClassVar[tuple[str, ...]] = ()
    head_type: ClassVar[type[ATSSHead]] = GFLHead

    @nn.nowrap
    def strides_of(self, places: jax.Array) -> jax.Array:
        """The stride of each anchor's level in pixels: (..., 4) to (..., 1)."""
        return (places[..., 2:3] - places[..., :1]) / self.anchor_scale

    @nn.nowrap
    def boxes_of(self, rows: Any, places: jax.Array) -> jax.Array:
        """The boxes whose sides are at the means of the distributions."""
        return boxes.box_of(boxes.centres_of(places), mean_distances(rows.distributions) * self.strides_of(places))

    @nn.nowrap
    def confidence_of(self, scores: jax.Array, rows: Any) -> jax.Array:
        """The scores, which say how good the boxes are."""
        del rows
        return scores

    @nn.nowrap
    def paired_sides(
        self, predictions: Any, theirs: Any, targets: Targets, image_size: jax.Array
    ) -> dict[str, PairedSides]:
        """See :class:`kdjax.types.Model`: of a GFL with equal grids.

        Places that learn an object are weighted as in the loss; those near one by their IoU with it, see
        :func:`kdjax.models.assign.valuable_region`.
        """
        given = theirs.distributions if isinstance(theirs, GFLPredictions) else {}
        ours = predictions.distributions
        pairs = pair_maps(ours, given, self.strides, image_size, kind="GFLs with equal grids")
        by_level = self.places_of(predictions)
        learnt = self.learn(predictions, by_level, targets, image_size)
        main = jnp.where(learnt.assignment.positive, best_scores(self.rows_of(predictions, by_level)), 0)

        def region(targets: Targets, image_size: jax.Array) -> jax.Array:
            inside = [self.inside(x, image_size) for x in by_level.values()]
            return valuable_region(list(by_level.values()), targets.boxes, targets.valid, inside)

        valuable = jax.vmap(region)(targets._replace(masks=None), image_size)
        sizes = self.sizes(ours)
        ends = list(itertools.accumulate(height * width for height, width in sizes.values()))[:-1]
        parts = (jnp.split(weight, ends, axis=1) for weight in (main, valuable))
        weights = dict(zip(sizes, zip(*parts, strict=True), strict=True))
        return {
            level: PairedSides(pair.student, pair.teacher, *(x.reshape(pair.student.shape[:3]) for x in weights[level]))
            for level, pair in pairs.items()
        }

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        """{"cls": quality focal loss, "box": 2 GIoU losses, "dfl": a quarter of the distribution focal loss}.

        ``cls`` is the sum divided by the number of positive anchors in the global batch, an image without any counting
        as one; the others are means over positive anchors, and over the four sides, weighted by the highest score that
        an anchor has, by a sum of weights of at least 1. Their sum is the paper's loss, weighted and normalised as
        MMDetection does [code].
        """
        positive = learnt.assignment.positive
        found = self.boxes_of(rows, learnt.places)
        quality = jax.lax.stop_gradient(paired_iou(found, learnt.boxes))
        is_class = learnt.labels[..., None] == jnp.arange(self.num_classes)[None, None]
        goal = jnp.where(positive[..., None] & is_class, quality[..., None], 0)
        taking_part = positive | learnt.assignment.negative
        distances = boxes.distances_to(boxes.centres_of(learnt.places), learnt.boxes) / self.strides_of(learnt.places)
        inner = jnp.clip(distances, 0, FARTHEST - _BELOW_FARTHEST)
        dfl = jnp.mean(distribution_focal_loss(by_side(rows.distributions), inner), axis=-1)
        weight = best_scores(rows)
        total = mean_count(masked_sum(weight, positive), self.axis_name)
        cls = masked_sum(quality_focal_loss(rows.logits, goal), taking_part[..., None])
        return {
            "cls": cls / self.count(positive),
            "box": BOX_WEIGHT * masked_sum(weight * giou_loss(found, learnt.boxes), positive) / total,
            "dfl": DFL_WEIGHT * masked_sum(weight * dfl, positive) / total,
        }
