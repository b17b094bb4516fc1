"""RepPoints (Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019).

A location predicts nine points, initial ones and then refined ones, and the box that each nine stand for. The initial
points of one location near an object's centre learn that object; the refined ones learn it wherever the initial box
overlaps it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.boxes import centres_of
from kdjax.losses.detection import smooth_l1_loss
from kdjax.losses.reduce import masked_sum
from kdjax.models.anchors import centres_inside, pyramid_anchors, scale_for
from kdjax.models.assign import Assignment, assign_by_iou
from kdjax.models.dense import DenseDetector, Learnt, focal_sums, joined, learnt_by
from kdjax.models.network import Network, Sections
from kdjax.models.norm import NORMS
from kdjax.models.reppoints_head import INITIAL_WEIGHT, RepPointsHead
from kdjax.options import FLAG, choice, number, whole
from kdjax.types import Features, Targets, Terms

BETA = 0.11
"""Of the smooth L1 loss, in ``point_scale`` strides."""


class Learning(NamedTuple):
    """What the locations learn: the initial points, and the refined ones and the classes."""

    initial: Learnt
    refined: Learnt


def assign_nearest(
    centres: jax.Array, strides: jax.Array, boxes: jax.Array, valid: jax.Array, inside: jax.Array, *, scale: float
) -> Assignment:
    """Assigns one location to each object of an image (Yang et al., section 4.2; MMDetection's ``PointAssigner``).

    An object belongs to the level whose stride is ``2^s``, where s is the mean of ``log2(width / scale)`` and
    ``log2(height / scale)`` cut to a whole number towards zero, as far as there are levels. Of that level the location
    nearest to its centre learns it, distances being measured in the object's width and height. Where several objects
    have the same nearest location, the nearest of them is learnt there, of equally near ones the first, and the others
    nowhere.

    Args:
        centres: (P, 2) float32: x and y of the locations of all levels.
        strides: (P,) float32, powers of two.
        boxes: (M, 4) xyxy.
        valid: (M,) bool: which of the boxes are objects; the others have no influence.
        inside: (P,) bool: which of the locations take part.
        scale: above 0.

    Returns:
        The assignment; every location inside that learns no object is negative.
    """
    size = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
    level = jnp.trunc(jnp.mean(jnp.log2(size / scale), axis=-1))
    levels = jnp.log2(strides)
    level = jnp.clip(level, jnp.min(levels), jnp.max(levels))
    middle = centres_of(boxes)
    distance = jnp.linalg.norm((centres[:, None] - middle[None]) / size[None], axis=-1)
    suited = inside[:, None] & valid[None] & (levels[:, None] == level[None])
    distance = jnp.where(suited, distance, jnp.inf)
    nearest = jnp.argmin(distance, axis=0)
    chosen = suited & (jnp.arange(centres.shape[0])[:, None] == nearest[None])
    matched = jnp.argmin(jnp.where(chosen, distance, jnp.inf), axis=1).astype(jnp.int32)
    positive = jnp.any(chosen, axis=1)
    return Assignment(matched=matched, positive=positive, negative=inside & ~positive)


class Locations(NamedTuple):
    """The P locations of a pyramid, each at the top left of its cell."""

    centres: jax.Array
    """(P, 2) float32: x and y, in pixels of the padded image."""
    strides: jax.Array
    """(P,) float32, in pixels."""


class RepPoints(DenseDetector):
    """The detector: its head, what it learns from targets, and what it finds.

    As in MMDetection, the neck's convolutions are followed by group norm too, and P6 and P7 are made of C5.
    """

    convs: Annotated[int, whole(0), "Convolutions in each tower before the last ones."] = 3
    norm: Annotated[str, choice(*NORMS), '"" or "group": what follows the convolutions of the towers.'] = "group"
    prior: Annotated[float, number(0, 1, above=True, below=True), "Probability that every classifier starts with."] = (
        0.01
    )
    point_scale: Annotated[
        float,
        number(0, above=True),
        "Size in strides from which objects belong to a level, and up to twice that; the finest level has smaller "
        "ones too, and the coarsest all larger ones. Losses of boxes are in that unit. 4 in the paper; small images "
        "need less.",
    ] = 4.0
    before_norm: Annotated[
        bool,
        FLAG,
        "Whether the features that methods see are the neck's maps before the norms of its outputs, as MGD's, or after "
        "them, as everybody else's. Its heads take them after the norms.",
    ] = False

    terms: ClassVar[tuple[str, ...]] = ("cls", "initial", "box")
    """Names of the loss terms."""
    decisive: ClassVar[tuple[str, ...]] = ("point_scale",)
    class_axis: ClassVar[Mapping[str, str]] = {"cls_logits": "fastest"}
    part_defaults: ClassVar[Sections] = {"neck": {"norm": "group", "extra_from": "c5", "extra_relu": False}}
    tiny: ClassVar[Sections] = {**DenseDetector.tiny, "head": {"convs": 1}}

    @classmethod
    def suited(cls, sizes: Sequence[float]) -> dict[str, Any]:
        """P3 learns the smaller three quarters of the objects."""
        return {"point_scale": scale_for(sizes, quantile=0.75, stride=16, least=1.0, most=4.0)} if sizes else {}

    def setup(self) -> None:
        """Makes the head; the backbone and the neck come from outside."""
        self.head = RepPointsHead(
            self.num_classes, convs=self.convs, norm=self.norm, prior=self.prior, dtype=self.dtype
        )

    def features(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to the neck's pyramid, see ``before_norm``; ``train`` as in every detector."""
        if not self.before_norm:
            return super().features(images, train)
        return self.neck.convolved(Network.features(self, images, train))

    def heads(self, features: Features, image_size: Any = None, sampling: Any = None) -> Any:
        """What :meth:`features` gave to predictions; the rest is for detectors with proposals."""
        return super().heads(self.neck.normed(features) if self.before_norm else features, image_size, sampling)

    @nn.nowrap
    def places_of(self, predictions: Any) -> dict[str, Locations]:
        """The locations of each level: what anchors of one stride are centred on."""
        anchors = pyramid_anchors(self.sizes(predictions.logits), self.strides, scale=1.0, octaves=1, ratios=(1.0,))
        return {
            level: Locations(centres_of(x), jnp.full(len(x), float(self.strides[level])))
            for level, x in anchors.items()
        }

    @nn.nowrap
    def inside(self, places: Locations, image_size: jax.Array) -> jax.Array:
        """Those inside the image take part."""
        return centres_inside(jnp.tile(places.centres, (1, 2)), image_size)

    @nn.nowrap
    def assign(self, places: Locations, targets: Targets, inside: jax.Array) -> Assignment:
        """The initial points, see :func:`assign_nearest`."""
        return assign_nearest(
            places.centres, places.strides, targets.boxes, targets.valid, inside, scale=self.point_scale
        )

    @nn.nowrap
    def learn(
        self, predictions: Any, places: Mapping[str, Locations], targets: Targets, image_size: jax.Array
    ) -> Learning:
        """The refined points by the IoU of the initial boxes, see :func:`kdjax.models.assign.assign_by_iou`."""
        everywhere = joined(places)
        rows = self.rows_of(jax.lax.stop_gradient(predictions), places)
        initial = in_pixels(rows.initial, jax.tree.map(lambda x: x[None], everywhere))

        def assign(boxes: jax.Array, targets: Targets, image_size: jax.Array) -> Assignment:
            inside = self.inside(everywhere, image_size)
            return assign_by_iou(boxes, targets.boxes, targets.valid, inside, crowd=targets.crowd)

        assignment = jax.vmap(assign)(initial, targets._replace(masks=None), image_size)
        return Learning(
            super().learn(predictions, places, targets, image_size), learnt_by(assignment, everywhere, targets)
        )

    @nn.nowrap
    def boxes_of(self, rows: Any, places: Locations) -> jax.Array:
        """The boxes that the refined points stand for."""
        return in_pixels(rows.boxes, places)

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learning) -> Terms:
        """{"cls": focal loss, "initial" and "box": smooth L1 loss of the corners of boxes, in ``point_scale`` strides}.

        Sums over the batch divided by the number of positive locations in the global batch, an image without any
        counting as one: of the initial points in "initial", which counts half, else of the refined ones.
        """

        def box(found: jax.Array, learnt: Learnt) -> jax.Array:
            unit = self.point_scale * learnt.places.strides[..., None]
            error = smooth_l1_loss(in_pixels(found, learnt.places) / unit, learnt.boxes / unit, beta=BETA)
            positive = learnt.assignment.positive
            return masked_sum(error, positive[..., None]) / self.count(positive)

        refined = learnt.refined
        cls = focal_sums(rows.logits, refined.labels, refined.assignment)
        return {
            "cls": jnp.sum(cls) / self.count(refined.assignment.positive),
            "initial": INITIAL_WEIGHT * box(rows.initial, learnt.initial),
            "box": box(rows.boxes, refined),
        }


def in_pixels(found: jax.Array, places: Locations) -> jax.Array:
    """Boxes (..., 4) in cells from their locations, in pixels of the padded image."""
    return found * places.strides[..., None] + jnp.tile(places.centres, (*[1] * (places.centres.ndim - 1), 2))
