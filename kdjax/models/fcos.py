"""FCOS (Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", 2019) and its later improvements.

A location of a pyramid level learns the smallest object that it lies in and whose size suits the level: the distances
to the object's four sides, its class, and how central the location is in it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import boxes
from kdjax.losses.detection import binary_cross_entropy, giou_loss, iou_loss
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.anchors import pyramid_anchors, scale_for
from kdjax.models.assign import Assignment
from kdjax.models.dense import DenseDetector, Learnt, focal_sums
from kdjax.models.fcos_head import FCOSHead
from kdjax.models.network import Sections
from kdjax.models.norm import NORMS
from kdjax.options import FLAG, choice, number, whole
from kdjax.types import Targets, Terms

BOX_LOSSES = ("iou", "giou")


class Convention(NamedTuple):
    """In which the published FCOS differ."""

    exact_cells: bool
    """Whether cells are whole strides apart, as the centres of exact anchors of :mod:`kdjax.models.anchors`."""
    centred: bool
    """Whether a location is in the middle of its cell, or at the top left."""
    closed_ranges: bool
    """Of :func:`assign_by_location`."""
    coarse_areas: bool
    """Of :func:`assign_by_location`."""
    level_scale: bool
    """Of :class:`kdjax.models.fcos_head.FCOSHead`."""
    central_boxes: bool
    """Whether centerness weights the loss of the boxes."""
    rank_by_both: bool
    """Whether a score is the square root of the class's probability times the centerness, throughout. Otherwise pairs
    are ranked and held against the threshold by the probability alone, suppressed and returned with that product."""
    drop_empty: bool
    """Whether boxes that are clipped to nothing are dropped."""


CONVENTIONS = {
    "mmdet": Convention(
        exact_cells=True,
        centred=True,
        closed_ranges=True,
        coarse_areas=False,
        level_scale=True,
        central_boxes=True,
        rank_by_both=False,
        drop_empty=True,
    ),
    "torchvision": Convention(
        exact_cells=False,
        centred=False,
        closed_ranges=False,
        coarse_areas=True,
        level_scale=False,
        central_boxes=False,
        rank_by_both=True,
        drop_empty=False,
    ),
}


class Locations(NamedTuple):
    """The P locations of a pyramid, and which objects suit them."""

    cells: jax.Array
    """(P, 2) float32: x and y where the location's cell begins, in pixels of the padded image."""
    centres: jax.Array
    """(P, 2) float32: x and y of the location."""
    strides: jax.Array
    """(P,) float32, in pixels."""
    nearest: jax.Array
    """(P,) float32: least distance, in pixels, of the farthest side of an object that the location may learn."""
    farthest: jax.Array
    """(P,) float32: its largest distance."""

    def inside(self, image_size: jax.Array) -> jax.Array:
        """Which of them have a cell that begins inside an image of height and width ``image_size`` (2,): (P,) bool."""
        return jnp.all(self.cells < image_size[None, ::-1], axis=-1)


def assign_by_location(
    locations: Locations,
    objects: jax.Array,
    valid: jax.Array,
    inside: jax.Array,
    *,
    crowd: jax.Array | None = None,
    radius: float = 0.0,
    closed_ranges: bool = True,
    coarse_areas: bool = False,
) -> Assignment:
    """Assigns the P locations of one image to its objects (Tian et al., section 3.1 and 3.2).

    A location is positive if it lies in an object, near its centre where ``radius`` is given, and the farthest of the
    object's sides is in the location's range; of several such objects it learns the one with the least area. Any other
    is negative, or ignored if it lies in a crowd.

    Args:
        locations: of all levels.
        objects: (M, 4) xyxy.
        valid: (M,) bool: which of the boxes are objects; the others have no influence.
        inside: (P,) bool: which of the locations take part; the others are ignored.
        crowd: (M,) bool or None: which of the boxes are regions to ignore; they are not valid.
        radius: how many strides a location may be away from the object's centre, horizontally and vertically (centre
            sampling); 0 for any distance.
        closed_ranges: whether the ends of a range belong to it (MMDetection) or not (torchvision).
        coarse_areas: whether areas are compared as float32 numbers below 1e8, so that those which differ by a few
            square pixels are equal (torchvision).

    Returns:
        The assignment; of equal areas the first object is learnt.
    """
    x, y = locations.centres[:, :1], locations.centres[:, 1:]
    x1, y1, x2, y2 = objects.T[:, None]
    sides = (x - x1, y - y1, x2 - x, y2 - y)
    in_box = jnp.minimum(jnp.minimum(sides[0], sides[1]), jnp.minimum(sides[2], sides[3])) > 0
    far = jnp.maximum(jnp.maximum(sides[0], sides[1]), jnp.maximum(sides[2], sides[3]))
    nearest, farthest = locations.nearest[:, None], locations.farthest[:, None]
    area = boxes.area(objects)
    fits = (nearest <= far) & (far <= farthest) if closed_ranges else (nearest < far) & (far < farthest)
    if coarse_areas:
        area -= 1e8
    candidate = in_box & fits & valid[None] & inside[:, None]
    if radius:
        away = jnp.maximum(jnp.abs(x - (x1 + x2) / 2), jnp.abs(y - (y1 + y2) / 2))
        candidate &= away < radius * locations.strides[:, None]
    positive = jnp.any(candidate, axis=1)
    negative = inside & ~positive
    if crowd is not None:
        negative &= ~jnp.any(in_box & crowd[None], axis=1)
    matched = jnp.argmin(jnp.where(candidate, area[None], jnp.inf), axis=1).astype(jnp.int32)
    return Assignment(matched=matched, positive=positive, negative=negative)


def centrality(distances: jax.Array) -> jax.Array:
    """How central locations with these distances (..., 4) are (Tian et al., equation 3): (...), 1 at the centre.

    ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))``; 0 on a side and outside of the box.
    """
    before, after = jnp.maximum(distances[..., :2], 0), jnp.maximum(distances[..., 2:], 0)
    longer = jnp.maximum(before, after)
    ratio = jnp.minimum(before, after) / jnp.where(longer > 0, longer, 1)
    return jnp.sqrt(ratio[..., 0] * ratio[..., 1])


class FCOS(DenseDetector):
    """The detector: its head, what it learns from targets, and what it finds.

    The defaults are the paper's first version. MMDetection's improved one has ``conv_bias``, ``norm_on_box`` and
    ``centerness_on_box``, ``centre_radius=1.5``, ``box_loss="giou"`` and ``iou_threshold=0.6``; torchvision's has these
    too, and ``convention="torchvision"`` and ``score_threshold=0.2``.
    """

    convs: Annotated[int, whole(0), "Convolutions in each tower before the last one."] = 4
    norm: Annotated[str, choice(*NORMS), '"" or "group": what follows the convolutions of the towers.'] = "group"
    conv_bias: Annotated[bool, FLAG, "Whether convolutions that a normalisation follows have a bias."] = False
    prior: Annotated[float, number(0, 1, above=True, below=True), "Probability that every classifier starts with."] = (
        0.01
    )
    norm_on_box: Annotated[bool, FLAG, "Whether distances are relu(x) strides, or exp(x) pixels."] = False
    centerness_on_box: Annotated[
        bool,
        FLAG,
        "Whether the centerness comes from the tower of the boxes, or from that of the classes.",
    ] = False
    range_scale: Annotated[
        float,
        number(0, above=True),
        "A level learns objects whose farthest side is range_scale / 2 to range_scale strides away, the finest "
        "level nearer ones too, and the coarsest all farther ones: 8 in the paper, 64 pixels at P3; small images "
        "need less.",
    ] = 8.0
    centre_radius: Annotated[
        float,
        number(0),
        "0, or the radius of centre sampling in strides, see assign_by_location.",
    ] = 0.0
    box_loss: Annotated[str, choice(*BOX_LOSSES), '"iou", minus the logarithm of the IoU, or "giou".'] = "iou"
    convention: Annotated[
        str,
        choice(*CONVENTIONS),
        '"mmdet" or "torchvision". Decides where in its cell a location is, in the middle or at the top left, and '
        "for torchvision how far apart cells are (kdjax.models.anchors); details of the assignment "
        "(assign_by_location); whether levels have a scale; whether centerness weights the loss of the boxes "
        "(loss); how it enters scores, and whether empty boxes are dropped (decode).",
    ] = "mmdet"

    terms: ClassVar[tuple[str, ...]] = ("cls", "box", "centerness")
    """Names of the loss terms."""
    decisive: ClassVar[tuple[str, ...]] = ("norm_on_box", "centerness_on_box", "range_scale", "convention")
    class_axis: ClassVar[Mapping[str, str]] = {"cls_logits": "fastest"}
    tiny: ClassVar[Sections] = {**DenseDetector.tiny, "head": {"convs": 1}}

    @property
    def facts(self) -> Convention:
        """What the convention decides."""
        return CONVENTIONS[self.convention]

    @property
    def drop_empty(self) -> bool:
        """Whether boxes that are clipped to nothing are dropped."""
        return self.facts.drop_empty

    @classmethod
    def suited(cls, sizes: Sequence[float]) -> dict[str, Any]:
        """P3 learns what reaches as far as three quarters of the median object."""
        if not sizes:
            return {}
        return {"range_scale": scale_for([0.75 * x for x in sizes], quantile=0.5, stride=8, least=1.5, most=8.0)}

    def setup(self) -> None:
        """Makes the head; the backbone and the neck come from outside."""
        self.head = FCOSHead(
            self.num_classes,
            tuple(self.strides.items()),
            convs=self.convs,
            norm=self.norm,
            conv_bias=self.conv_bias,
            prior=self.prior,
            norm_on_box=self.norm_on_box,
            centerness_on_box=self.centerness_on_box,
            level_scale=self.facts.level_scale,
            dtype=self.dtype,
        )

    @nn.nowrap
    def places_of(self, predictions: Any) -> dict[str, Locations]:
        """The locations of each level: what anchors of one stride, one at each location, are centred on."""
        sizes = self.sizes(predictions.logits)
        anchors = pyramid_anchors(
            sizes, self.strides, scale=1.0, octaves=1, ratios=(1.0,), exact=self.facts.exact_cells
        )
        levels, locations = list(sizes), {}
        for level in levels:
            step, reach = float(self.strides[level]), self.range_scale * self.strides[level]
            cells = boxes.centres_of(anchors[level])
            size = cells.shape[0]
            locations[level] = Locations(
                cells=cells,
                centres=cells + step / 2 if self.facts.centred else cells,
                strides=jnp.full(size, step),
                nearest=jnp.full(size, 0.0 if level == levels[0] else reach / 2),
                farthest=jnp.full(size, jnp.inf if level == levels[-1] else reach),
            )
        return locations

    @nn.nowrap
    def inside(self, places: Locations, image_size: jax.Array) -> jax.Array:
        """Those whose cell begins inside the image take part."""
        return places.inside(image_size)

    @nn.nowrap
    def assign(self, places: Locations, targets: Targets, inside: jax.Array) -> Assignment:
        """By where they are, see :func:`assign_by_location`."""
        return assign_by_location(
            places,
            targets.boxes,
            targets.valid,
            inside,
            crowd=targets.crowd,
            radius=self.centre_radius,
            closed_ranges=self.facts.closed_ranges,
            coarse_areas=self.facts.coarse_areas,
        )

    @nn.nowrap
    def boxes_of(self, rows: Any, places: Locations) -> jax.Array:
        """The boxes whose sides are at the distances from the locations."""
        return boxes.box_of(places.centres, rows.distances)

    @nn.nowrap
    def scores_of(self, rows: Any) -> jax.Array:
        """The probabilities of the classes, or their geometric mean with the centerness (``rank_by_both``)."""
        scores = super().scores_of(rows)
        return jnp.sqrt(scores * jax.nn.sigmoid(rows.centerness)) if self.facts.rank_by_both else scores

    @nn.nowrap
    def confidence_of(self, scores: jax.Array, rows: Any) -> jax.Array:
        """The scores, times the centerness where that is not in them."""
        return scores if self.facts.rank_by_both else scores * jax.nn.sigmoid(rows.centerness[..., 0])

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        """{"cls": focal loss, "box": IoU loss, "centerness": binary cross-entropy}.

        ``cls`` and ``centerness`` are sums divided by the number of positive locations in the global batch, at least 1,
        and so is ``box``, or (``central_boxes``) it is the mean weighted by the centerness that positive locations have
        in their objects (Tian et al., section 3.3, and the authors' code).
        """
        positive = learnt.assignment.positive
        central = centrality(boxes.distances_to(learnt.places.centres, learnt.boxes))
        box = (iou_loss if self.box_loss == "iou" else giou_loss)(self.boxes_of(rows, learnt.places), learnt.boxes)
        weight = central if self.facts.central_boxes else jnp.ones_like(central)
        count = mean_count(jnp.sum(positive), self.axis_name)
        total = mean_count(masked_sum(weight, positive), self.axis_name, least=1e-6)
        return {
            "cls": jnp.sum(focal_sums(rows.logits, learnt.labels, learnt.assignment)) / count,
            "box": masked_sum(weight * box, positive) / total,
            "centerness": masked_sum(binary_cross_entropy(rows.centerness[..., 0], central), positive) / count,
        }
