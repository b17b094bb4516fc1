"""ATSS: a RetinaNet with one anchor at each location, whose objects choose their positives.

Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
2020. :mod:`kdjax.models.gfl` goes on from it: GFL differs in what it predicts and by what that learns.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.losses.detection import binary_cross_entropy, giou_loss
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.anchors import centres_inside, pyramid_anchors, scale_for
from kdjax.models.assign import Assignment, assign_by_atss
from kdjax.models.dense import DenseDetector, Learnt, conv3x3, focal_sums, pair_maps, prior_bias, towers
from kdjax.models.fcos import centrality
from kdjax.models.network import Sections
from kdjax.models.norm import NORMS
from kdjax.options import choice, number, whole
from kdjax.types import Features, PairedBoxes, Targets, Terms

SPREAD = (0.1, 0.1, 0.2, 0.2)
"""What deltas are multiplied by before they move an anchor."""

BOX_WEIGHT = 2.0
"""Of the loss of boxes in the whole, in ATSS and in GFL."""


class ATSSPredictions(NamedTuple):
    """The maps of the head, level by level."""

    logits: Features
    """{"p3": (N, H, W, classes), ...}, before the sigmoid."""
    deltas: Features
    """{"p3": (N, H, W, 4), ...} float32, coded as by ``kdjax.boxes.encode`` and divided by ``SPREAD``."""
    centerness: Features
    """{"p3": (N, H, W, 1), ...}, before the sigmoid."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: the deltas of another ATSS with the same anchors."""
        del targets
        given = theirs.deltas if isinstance(theirs, ATSSPredictions) else {}
        return pair_maps(self.deltas, given, strides, image_size, kind="ATSS with equal anchors and grids")


class ATSSHead(nn.Module):
    """The two towers of convolutions, as wide as the pyramid, shared by all levels, and the outputs.

    Attributes:
        num_classes: number of classes, without a background.
        convs: convolutions in each tower before the last one.
        norm: "" or "group", see :func:`kdjax.models.dense.tower`.
        prior: probability that every classifier starts with.
        dtype: of the computation; parameters and what boxes are made of are float32.
    """

    num_classes: int
    convs: int = 4
    norm: str = "group"
    prior: float = 0.01
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> Any:
        """{"p3": (N, H, W, C), ...} to the predictions at every location."""
        return self.outputs(*towers(features, convs=self.convs, norm=self.norm, bias=not self.norm, dtype=self.dtype))

    @nn.nowrap
    def outputs(self, cls: Features, box: Features) -> Any:
        """The predictions from the maps of the two towers."""
        centerness = conv3x3(1, dtype=self.dtype, name="centerness")
        return ATSSPredictions(
            logits=self.logits(cls),
            deltas=self.scaled(box, 4, "box_deltas"),
            centerness={level: centerness(x) for level, x in box.items()},
        )

    @nn.nowrap
    def logits(self, cls: Features) -> Features:
        """The classifiers."""
        conv = conv3x3(self.num_classes, bias_init=prior_bias(self.prior), dtype=self.dtype, name="cls_logits")
        return {level: conv(x) for level, x in cls.items()}

    @nn.nowrap
    def scaled(self, box: Features, channels: int, name: str) -> Features:
        """A convolution whose output each level multiplies by a number of its own, which is learnt: float32."""
        conv = conv3x3(channels, dtype=self.dtype, name=name)
        return {
            level: conv(x).astype(jnp.float32) * self.param(f"scale_{level}", nn.initializers.ones, ())
            for level, x in box.items()
        }


class ATSS(DenseDetector):
    """The detector: its head, what it learns from targets, and what it finds."""

    convs: Annotated[int, whole(0), "Convolutions in each tower before the last one."] = 4
    norm: Annotated[str, choice(*NORMS), '"" or "group": what follows the convolutions of the towers.'] = "group"
    prior: Annotated[float, number(0, 1, above=True, below=True), "Probability that every classifier starts with."] = (
        0.01
    )
    anchor_scale: Annotated[
        float,
        number(0, above=True),
        "Size of a level's anchor in strides: 8 in the paper; small images need less.",
    ] = 8.0
    iou_threshold: Annotated[
        float,
        number(0, 1),
        "Overlap at which non-maximum suppression drops the lower-scored box.",
    ] = 0.6

    terms: ClassVar[tuple[str, ...]] = ("cls", "box", "centerness")
    """Names of the loss terms."""
    part_defaults: ClassVar[Sections] = {"neck": {"extra_relu": False}}
    decisive: ClassVar[tuple[str, ...]] = ("anchor_scale",)
    class_axis: ClassVar[Mapping[str, str]] = {"cls_logits": "fastest"}
    tiny: ClassVar[Sections] = {**DenseDetector.tiny, "head": {"convs": 1}}
    head_type: ClassVar[type[ATSSHead]] = ATSSHead
    """What its head is made by."""

    @classmethod
    def suited(cls, sizes: Sequence[float]) -> dict[str, Any]:
        """The anchor of P3 is as large as the median object."""
        return {"anchor_scale": scale_for(sizes, quantile=0.5, stride=8, least=2.0, most=8.0)} if sizes else {}

    def setup(self) -> None:
        """Makes the head; the backbone and the neck come from outside."""
        self.head = self.head_type(
            self.num_classes, convs=self.convs, norm=self.norm, prior=self.prior, dtype=self.dtype
        )

    @nn.nowrap
    def places_of(self, predictions: Any) -> dict[str, jax.Array]:
        """Level to its anchors (rows, 4), one at each location."""
        return pyramid_anchors(
            self.sizes(predictions.logits), self.strides, scale=self.anchor_scale, octaves=1, ratios=(1.0,)
        )

    @nn.nowrap
    def inside(self, places: jax.Array, image_size: jax.Array) -> jax.Array:
        """Those centred inside the image take part."""
        return centres_inside(places, image_size)

    @nn.nowrap
    def assign_levels(self, places: Mapping[str, Any], targets: Targets, image_size: jax.Array) -> Assignment:
        """By what each object's nearest anchors overlap, see :func:`kdjax.models.assign.assign_by_atss`."""
        anchors = list(places.values())
        inside = [self.inside(x, image_size) for x in anchors]
        return assign_by_atss(anchors, targets.boxes, targets.valid, inside, crowd=targets.crowd)

    @nn.nowrap
    def boxes_of(self, rows: Any, places: jax.Array) -> jax.Array:
        """The boxes that the deltas make of the anchors."""
        return boxes.decode(rows.deltas * jnp.array(SPREAD)[None, None], places, symmetric=True)

    @nn.nowrap
    def confidence_of(self, scores: jax.Array, rows: Any) -> jax.Array:
        """The scores times the centerness."""
        return scores * jax.nn.sigmoid(rows.centerness[..., 0])

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        """{"cls": focal loss, "box": 2 GIoU losses, "centerness": binary cross-entropy}.

        ``cls`` and ``centerness`` are sums divided by the number of positive anchors in the global batch, an image
        without any counting as one; ``box`` is twice the mean weighted by the centerness that positive anchors have in
        their objects (the authors' loss, as MMDetection has it). Their sum is the loss.
        """
        positive = learnt.assignment.positive
        central = centrality(boxes.distances_to(boxes.centres_of(learnt.places), learnt.boxes))
        box = giou_loss(self.boxes_of(rows, learnt.places), learnt.boxes)
        count = self.count(positive)
        total = mean_count(masked_sum(central, positive), self.axis_name)
        return {
            "cls": jnp.sum(focal_sums(rows.logits, learnt.labels, learnt.assignment)) / count,
            "box": BOX_WEIGHT * masked_sum(central * box, positive) / total,
            "centerness": masked_sum(binary_cross_entropy(rows.centerness[..., 0], central), positive) / count,
        }
