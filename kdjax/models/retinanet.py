"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.losses.detection import giou_loss, l1_loss, smooth_l1_loss
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.anchors import centres_inside, pyramid_anchors, scale_for
from kdjax.models.assign import Assignment, assign_by_iou
from kdjax.models.dense import (
    DenseDetector,
    Learnt,
    conv3x3,
    focal_sums,
    pair_maps,
    prior_bias,
    towers,
)
from kdjax.models.network import Sections
from kdjax.models.norm import NORMS
from kdjax.options import RATIOS, choice, number, whole
from kdjax.types import Features, PairedBoxes, Targets, Terms

BOX_LOSSES = ("l1", "smooth_l1", "giou")


class RetinaNetPredictions(NamedTuple):
    """The maps of the head, level by level; A anchors at each location, the anchor varying slowest."""

    logits: Features
    """{"p3": (N, H, W, A * classes), ...}, before the sigmoid."""
    deltas: Features
    """{"p3": (N, H, W, A * 4), ...}, coded as by ``kdjax.boxes.encode``."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: the deltas of a RetinaNet with the same anchors."""
        del targets
        given = theirs.deltas if isinstance(theirs, RetinaNetPredictions) else {}
        return pair_maps(self.deltas, given, strides, image_size, kind="RetinaNets with equal anchors and grids")


class Convention(NamedTuple):
    """In which the published RetinaNets differ."""

    exact_anchors: bool
    """Of :mod:`kdjax.models.anchors`."""
    claim: bool
    """Of :func:`kdjax.models.assign.assign_by_iou`: whether an object's best anchor learns that object."""
    per_image: bool
    """Whether losses are divided by the number of positives in each image, or in the batch."""
    limit_shrinking: bool
    """Whether the log-scales of boxes are limited from below, ``symmetric`` of :func:`kdjax.boxes.decode`."""
    drop_empty: bool
    """Whether boxes that are clipped to nothing are dropped."""


CONVENTIONS = {
    "mmdet": Convention(exact_anchors=True, claim=True, per_image=False, limit_shrinking=True, drop_empty=True),
    "torchvision": Convention(
        exact_anchors=False, claim=False, per_image=True, limit_shrinking=False, drop_empty=False
    ),
}


class RetinaNetHead(nn.Module):
    """The two towers of convolutions, as wide as the pyramid, shared by all levels.

    Attributes:
        num_classes: number of classes, without a background.
        anchors: number of anchors at a location.
        convs: convolutions in each tower before the last one.
        norm: "" or "group", see :func:`kdjax.models.dense.tower`.
        prior: probability that every classifier starts with.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    anchors: int = 9
    convs: int = 4
    norm: str = ""
    prior: float = 0.01
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> RetinaNetPredictions:
        """{"p3": (N, H, W, C), ...} to the predictions at every location."""
        return self.outputs(*towers(features, convs=self.convs, norm=self.norm, bias=not self.norm, dtype=self.dtype))

    @nn.nowrap
    def outputs(self, cls: Features, box: Features) -> RetinaNetPredictions:
        """The predictions from the maps of the two towers; a head with more outputs makes them here."""
        logits = conv3x3(
            self.anchors * self.num_classes, bias_init=prior_bias(self.prior), dtype=self.dtype, name="cls_logits"
        )
        deltas = conv3x3(self.anchors * 4, dtype=self.dtype, name="box_deltas")
        return RetinaNetPredictions(
            logits={level: logits(x) for level, x in cls.items()},
            deltas={level: deltas(x) for level, x in box.items()},
        )


class RetinaNet(DenseDetector):
    """The detector: its head, what it learns from targets, and what it finds."""

    convs: Annotated[int, whole(0), "Convolutions in each tower before the last one."] = 4
    norm: Annotated[str, choice(*NORMS), '"" or "group": what follows the convolutions of the towers.'] = ""
    prior: Annotated[float, number(0, 1, above=True, below=True), "Probability that every classifier starts with."] = (
        0.01
    )
    anchor_scale: Annotated[
        float,
        number(0, above=True),
        "Size of the smallest anchor of a level in strides: 4 in the paper; small images need less.",
    ] = 4.0
    anchor_octaves: Annotated[int, whole(1), "Anchor sizes at a location, spread over one octave."] = 3
    anchor_ratios: Annotated[tuple[float, ...], RATIOS, "Height / width of the anchors."] = (0.5, 1.0, 2.0)
    box_loss: Annotated[
        str,
        choice(*BOX_LOSSES),
        '"l1" (MMDetection, torchvision), "smooth_l1" (the paper; beta 1/9), or "giou" (torchvision\'s v2).',
    ] = "l1"
    convention: Annotated[
        str,
        choice(*CONVENTIONS),
        '"mmdet" or "torchvision". Decides the geometry of the anchors (kdjax.models.anchors); what an anchor '
        "learns that is another object's best (claim of assign.assign_by_iou); whether losses are divided by the "
        "number of positives in the batch or in each image (loss); whether the log-scales of boxes are limited "
        "from below (symmetric of kdjax.boxes.decode); and whether empty boxes are dropped (decode).",
    ] = "mmdet"

    terms: ClassVar[tuple[str, ...]] = ("cls", "box")
    """Names of the loss terms."""
    decisive: ClassVar[tuple[str, ...]] = ("anchor_scale", "anchor_octaves", "anchor_ratios", "convention")
    class_axis: ClassVar[Mapping[str, str]] = {"cls_logits": "fastest"}
    tiny: ClassVar[Sections] = {**DenseDetector.tiny, "head": {"convs": 1}}
    head_type: ClassVar[type[RetinaNetHead]] = RetinaNetHead
    """What its head is made by."""

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
        """The smallest anchor, one of P3, is as large as all but a tenth of the objects are at least."""
        return {"anchor_scale": scale_for(sizes, quantile=0.1, stride=8, least=1.0, most=4.0)} if sizes else {}

    def setup(self) -> None:
        """Makes the head; the backbone and the neck come from outside."""
        self.head = self.head_type(
            self.num_classes,
            anchors=self.anchor_octaves * len(self.anchor_ratios),
            convs=self.convs,
            norm=self.norm,
            prior=self.prior,
            dtype=self.dtype,
        )

    @nn.nowrap
    def places_of(self, predictions: Any) -> dict[str, jax.Array]:
        """Level to its anchors (rows, 4)."""
        return pyramid_anchors(
            self.sizes(predictions.logits),
            self.strides,
            scale=self.anchor_scale,
            octaves=self.anchor_octaves,
            ratios=self.anchor_ratios,
            exact=self.facts.exact_anchors,
        )

    @nn.nowrap
    def inside(self, places: jax.Array, image_size: jax.Array) -> jax.Array:
        """Those centred inside the image take part."""
        return centres_inside(places, image_size)

    @nn.nowrap
    def assign(self, places: jax.Array, targets: Targets, inside: jax.Array) -> Assignment:
        """By IoU, see :func:`kdjax.models.assign.assign_by_iou`."""
        return assign_by_iou(places, targets.boxes, targets.valid, inside, crowd=targets.crowd, claim=self.facts.claim)

    @nn.nowrap
    def boxes_of(self, rows: Any, places: jax.Array) -> jax.Array:
        """The boxes that the deltas make of the anchors."""
        return boxes.decode(rows.deltas, places, symmetric=self.facts.limit_shrinking)

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Learnt) -> Terms:
        """{"cls": focal loss, "box": box regression loss}: the sums of ``sums_of`` by the number of positive anchors.

        That is the number in the global batch, an image without any counting as one, or (``per_image``) each image is
        divided by its own number, and images are averaged.
        """
        sums = self.sums_of(rows, learnt)
        count = jnp.maximum(jnp.sum(learnt.assignment.positive, axis=1).astype(jnp.float32), 1.0)
        if self.facts.per_image:
            return {term: jnp.mean(value / count) for term, value in sums.items()}
        total = mean_count(jnp.sum(count), self.axis_name)
        return {term: jnp.sum(value) / total for term, value in sums.items()}

    @nn.nowrap
    def sums_of(self, rows: Any, learnt: Learnt) -> Terms:
        """Of each term and image the sum over its anchors, (N,) float32."""
        if self.box_loss == "giou":
            box = giou_loss(self.boxes_of(rows, learnt.places), learnt.boxes)[..., None]
        else:
            elementwise = l1_loss if self.box_loss == "l1" else smooth_l1_loss
            box = elementwise(rows.deltas, boxes.encode(learnt.boxes, learnt.places))
        return {
            "cls": focal_sums(rows.logits, learnt.labels, learnt.assignment),
            "box": masked_sum(box, learnt.assignment.positive[..., None], axis=(1, 2)),
        }
