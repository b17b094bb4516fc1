"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.losses.detection import giou_loss, l1_loss, smooth_l1_loss
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.anchors import centres_inside, pyramid_anchors
from kdjax.models.assign import Assignment, assign_by_iou
from kdjax.models.dense import (
    NORMS,
    Candidates,
    DenseDetector,
    best_pairs,
    conv3x3,
    focal_sums,
    join,
    pair_maps,
    prior_bias,
    suppress,
    tower,
)
from kdjax.models.network import Sections
from kdjax.options import RATIOS, choice, number, whole
from kdjax.types import Detections, Features, PairedBoxes, Targets, Terms

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
        cls, box = (
            tower(features, kind, convs=self.convs, norm=self.norm, bias=not self.norm, dtype=self.dtype)
            for kind in ("cls", "box")
        )
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
    score_threshold: Annotated[float, number(0, 1), "Candidates scored above it go to non-maximum suppression."] = 0.05
    candidates: Annotated[int, whole(1), "How many of them each level sends at most."] = 1000
    iou_threshold: Annotated[
        float,
        number(0, 1),
        "Overlap at which non-maximum suppression drops the lower-scored box.",
    ] = 0.5
    max_detections: Annotated[int, whole(1), "D, how many boxes an image returns at most."] = 100

    terms: ClassVar[tuple[str, ...]] = ("cls", "box")
    """Names of the loss terms."""
    tiny: ClassVar[Sections] = {**DenseDetector.tiny, "head": {"convs": 1}}

    @property
    def facts(self) -> Convention:
        """What the convention decides."""
        return CONVENTIONS[self.convention]

    def setup(self) -> None:
        """Makes the head; the backbone and the neck come from outside."""
        self.head = RetinaNetHead(
            self.num_classes,
            anchors=self.anchor_octaves * len(self.anchor_ratios),
            convs=self.convs,
            norm=self.norm,
            prior=self.prior,
            dtype=self.dtype,
        )

    @nn.nowrap
    def loss(self, predictions: RetinaNetPredictions, targets: Targets, image_size: jax.Array) -> Terms:
        """{"cls": focal loss, "box": box regression loss}, float32 scalars.

        Both are sums divided by the number of positive anchors. That is the number in the global batch, an image
        without any counting as one; the mean over devices of what each returns is the global loss. Where the
        convention is ``per_image``, each image is divided by its own number, and images are averaged. Anchors centred
        in the padding take no part, nor do those that would be negative in a crowd.
        """
        logits = self.join(predictions.logits, self.num_classes)
        deltas = self.join(predictions.deltas, 4)
        anchors = jnp.concatenate(list(self._anchors(predictions).values()))

        def assign(targets: Targets, image_size: jax.Array) -> Assignment:
            return assign_by_iou(
                anchors,
                targets.boxes,
                targets.valid,
                centres_inside(anchors, image_size),
                crowd=targets.crowd,
                claim=self.facts.claim,
            )

        assignment = jax.vmap(assign)(targets._replace(masks=None), image_size)
        matched, positive = assignment.matched, assignment.positive
        labels = jnp.take_along_axis(targets.labels, matched, axis=1)
        matched_boxes = jnp.take_along_axis(targets.boxes, matched[..., None], axis=1)
        cls_sum = focal_sums(logits, labels, assignment)

        anchors = anchors[None]
        if self.box_loss == "giou":
            box = giou_loss(self._boxes(deltas, anchors), matched_boxes)[..., None]
        else:
            elementwise = l1_loss if self.box_loss == "l1" else smooth_l1_loss
            box = elementwise(deltas, boxes.encode(matched_boxes, anchors))
        box_sum = masked_sum(box, positive[..., None], axis=(1, 2))

        count = jnp.maximum(jnp.sum(positive, axis=1).astype(jnp.float32), 1.0)
        if self.facts.per_image:
            return {"cls": jnp.mean(cls_sum / count), "box": jnp.mean(box_sum / count)}
        total = mean_count(jnp.sum(count), self.axis_name)
        return {"cls": jnp.sum(cls_sum) / total, "box": jnp.sum(box_sum) / total}

    @nn.nowrap
    def decode(self, predictions: RetinaNetPredictions, image_size: jax.Array) -> Detections:
        """Predictions to the detections of images of height and width ``image_size`` (N, 2).

        Of every level, the best (anchor, class) pairs above the score threshold are decoded and clipped to the image;
        then non-maximum suppression runs class by class over all levels together. Anchors centred in the padding find
        nothing, and in the convention of MMDetection boxes that are clipped to nothing are dropped.
        """
        found = []
        for level, anchors in self._anchors(predictions).items():
            # Ranked after the sigmoid, as the originals do: in float32 its large values are equal.
            scores = jax.nn.sigmoid(join([predictions.logits[level]], self.num_classes))
            deltas = join([predictions.deltas[level]], 4)
            inside = jax.vmap(centres_inside, (None, 0))(anchors, image_size)
            scores, anchor, label = best_pairs(jnp.where(inside[..., None], scores, 0), self.candidates)
            decoded = self._boxes(jnp.take_along_axis(deltas, anchor[..., None], axis=1), anchors[anchor])
            found.append(Candidates(boxes.clip(decoded, image_size), scores, label, scores > self.score_threshold))
        return suppress(
            found,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
            drop_empty=self.facts.drop_empty,
        )

    @nn.nowrap
    def _boxes(self, deltas: jax.Array, anchors: jax.Array) -> jax.Array:
        return boxes.decode(deltas, anchors, symmetric=self.facts.limit_shrinking)

    @nn.nowrap
    def _anchors(self, predictions: RetinaNetPredictions) -> dict[str, jax.Array]:
        maps = predictions.logits
        return pyramid_anchors(
            {level: (maps[level].shape[1], maps[level].shape[2]) for level in self.ordered(maps)},
            self.strides,
            scale=self.anchor_scale,
            octaves=self.anchor_octaves,
            ratios=self.anchor_ratios,
            exact=self.facts.exact_anchors,
        )
