"""Faster R-CNN, Mask R-CNN and their cascades: detectors that look twice.

Ren et al., "Faster R-CNN", 2015; Lin et al., "Feature Pyramid Networks", 2017; He et al., "Mask R-CNN", 2017; Cai and
Vasconcelos, "Cascade R-CNN", 2018.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.errors import UserError
from kdjax.losses.detection import binary_cross_entropy, l1_loss, smooth_l1_loss
from kdjax.losses.reduce import masked_mean, masked_sum, mean_count
from kdjax.models.anchors import CONVENTIONS, centres_inside, pyramid_anchors
from kdjax.models.dense import Candidates, suppress
from kdjax.models.detector import Detector
from kdjax.models.masks import mask_targets
from kdjax.models.network import Sections
from kdjax.models.roi_align import roi_align, roi_levels
from kdjax.models.rpn import Matches, Proposals, RPNHead, RPNPredictions, match, propose, rpn_loss
from kdjax.options import RATIOS, choice, number, whole
from kdjax.types import Detections, Features, PairedBoxes, Sampling, Targets, Terms

BOX_BINS = 7
"""Side of the grid that RoIs are pooled to for classes and boxes."""
MASK_BINS = 14
"""Side of the grid that RoIs are pooled to for masks, which are twice as fine."""
POSITIVE_ROIS = 0.25
"""Share of the sampled RoIs that may be positive."""


class Stage(NamedTuple):
    """What a stage of box heads is trained for (Cascade R-CNN, section 4; the values of MMDetection)."""

    iou: float
    """IoU with an object from which on an RoI is positive."""
    scale: tuple[float, float, float, float]
    """Boxes are coded as by ``kdjax.boxes.encode``, divided by this."""
    weight: float
    """Of the stage's losses."""


STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
"""The stages of a cascade; a detector of a single stage has the first."""


class RoIPredictions(NamedTuple):
    """What one stage says about R RoIs of each of N images."""

    rois: jax.Array
    """(N, R, 4) float32, xyxy in pixels of the padded image."""
    valid: jax.Array
    """(N, R) bool: False for empty slots."""
    logits: jax.Array
    """(N, R, classes + 1), before the softmax, the background last."""
    deltas: jax.Array
    """(N, R, classes * 4), the class varying slowest, or (N, R, 4) for all classes; divided by the stage's scale."""
    matches: Matches | None = None
    """What the RoIs learn, in training."""
    masks: jax.Array | None = None
    """(N, P, 28, 28, classes) of the first P RoIs, which hold all positive ones, before the sigmoid; in training."""


class RCNNPredictions(NamedTuple):
    """What the detector says about N images."""

    rpn: RPNPredictions
    proposals: Proposals
    stages: tuple[RoIPredictions, ...]
    anchor_matches: Matches | None = None
    """What the anchors of all levels learn, in training."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: the first stage's deltas of the RoIs that it was trained by.

        MasKD's configs for two-stage detectors compare those: the teacher's RoI head is given the student's proposals.
        Where one detector has a box for each class and the other one for all (a cascade's first stage), the boxes of
        the positive RoIs' class are compared. That is our reconstruction.
        """
        del strides, image_size
        rois = self.stages[0]
        ours = rois.deltas
        if not isinstance(theirs, RoIDeltas):
            raise UserError("The box regression of RoIs can be imitated of a teacher with proposals only; it has none.")
        given = theirs.deltas
        if ours.shape == given.shape:
            return {"rois": PairedBoxes(ours, given, rois.valid[..., None])}
        if 4 not in (ours.shape[-1], given.shape[-1]):
            raise UserError(
                f"The student regresses boxes for {ours.shape[-1] // 4} classes and the teacher for "
                f"{given.shape[-1] // 4}: box regression can be imitated where both have the same classes."
            )
        if rois.matches is None:
            raise ValueError("Boxes are imitated in training, by predictions that were made with `sampling`.")
        labels = jnp.take_along_axis(targets.labels, rois.matches.matched, axis=1)
        pair = _boxes_of_class(ours, labels), _boxes_of_class(given, labels)
        return {"rois": PairedBoxes(*pair, rois.matches.positive[..., None])}


class RoIDeltas(NamedTuple):
    """The box regression of a teacher on RoIs of a student."""

    deltas: jax.Array
    """As in :class:`RoIPredictions`, of the first stage."""


class BoxHead(nn.Module):
    """Two fully connected layers, then the classes and the boxes.

    Attributes:
        num_classes: number of classes, without a background.
        regressors: how many boxes an RoI gets: one for each class, or 1 for all.
        channels: width of the two layers.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    regressors: int
    channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(N, R, 7, 7, C) to logits (N, R, classes + 1) and deltas (N, R, regressors * 4)."""
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = pooled.reshape(*pooled.shape[:2], -1)
        for name in ("fc1", "fc2"):
            x = nn.relu(dense(self.channels, kernel_init=nn.initializers.xavier_uniform(), name=name)(x))
        logits = dense(self.num_classes + 1, kernel_init=nn.initializers.normal(0.01), name="classes")(x)
        deltas = dense(4 * self.regressors, kernel_init=nn.initializers.normal(0.001), name="deltas")(x)
        return logits, deltas


class MaskHead(nn.Module):
    """Four convolutions, as wide as the pyramid, an upsampling by two, and a mask for every class.

    Attributes:
        num_classes: number of classes.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """(N, R, 14, 14, C) to logits (N, R, 28, 28, classes)."""
        n, r, *_, channels = pooled.shape
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = pooled.reshape(n * r, *pooled.shape[2:])
        for index in range(4):
            x = nn.relu(nn.Conv(channels, (3, 3), kernel_init=init, dtype=self.dtype, name=f"conv_{index}")(x))
        x = nn.ConvTranspose(channels, (2, 2), (2, 2), kernel_init=init, dtype=self.dtype, name="upsample")(x)
        x = nn.Conv(self.num_classes, (1, 1), kernel_init=init, dtype=self.dtype, name="logits")(nn.relu(x))
        return x.reshape(n, r, *x.shape[1:])


class RCNNHead(nn.Module):
    """The region proposal network, and a box head and a mask head for every stage.

    Attributes:
        num_classes: number of classes, without a background.
        anchors: number of anchors at a location.
        stages: number of stages.
        masks: whether there are mask heads.
        channels: width of the box heads.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    anchors: int
    stages: int
    masks: bool
    channels: int
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Names the heads ``rpn``, ``box_<stage>`` and ``mask_<stage>``."""
        self.rpn = RPNHead(self.anchors, dtype=self.dtype)
        regressors = self.num_classes if self.stages == 1 else 1
        self.box = [BoxHead(self.num_classes, regressors, self.channels, dtype=self.dtype) for _ in range(self.stages)]
        self.mask = [MaskHead(self.num_classes, dtype=self.dtype) for _ in range(self.stages if self.masks else 0)]


class RCNN(Detector):
    """The detector: its heads, what they learn from targets, and what they find.

    A region proposal network finds regions, and one or more stages of heads classify them, correct them and, where
    asked for, find masks in them. The stages of a cascade look at what the stage before corrected, for stricter IoUs.

    Besides the attributes of :class:`kdjax.models.detector.Detector` it has:

    Attributes:
        neck: by default P2 to P6, P6 for the proposals alone, as in the paper (``extra_from="pool"`` of
            :class:`kdjax.models.fpn.FPN`).
        stages: 1 (Faster R-CNN; a box for each class) or up to 3 (Cascade R-CNN; one box for all classes).
        masks: whether it finds masks too (Mask R-CNN, Cascade Mask R-CNN).
    """

    stages: int = 1
    masks: bool = False
    head_channels: Annotated[int, whole(1), "Width of the box heads."] = 1024
    anchor_scale: Annotated[
        float,
        number(0, above=True),
        "Size of a level's anchors in strides: 8 in the paper; small images need less.",
    ] = 8.0
    anchor_ratios: Annotated[tuple[float, ...], RATIOS, "Height / width of the anchors."] = (0.5, 1.0, 2.0)
    train_candidates: Annotated[
        int,
        whole(1),
        "Anchors that each level sends to non-maximum suppression at most, in training.",
    ] = 2000
    train_proposals: Annotated[
        int,
        whole(1),
        "Regions that an image proposes at most, in training: 1000 in MMDetection, of cascades 2000, as in "
        "torchvision.",
    ] = 1000
    candidates: Annotated[
        int,
        whole(1),
        "Anchors that each level sends to non-maximum suppression at most, in inference.",
    ] = 1000
    proposals: Annotated[int, whole(1), "Regions that an image proposes at most, in inference."] = 1000
    anchor_samples: Annotated[
        int,
        whole(0),
        "Anchors of an image that the proposals are trained by; 0 takes all of them.",
    ] = 256
    roi_samples: Annotated[
        int,
        whole(0),
        "Regions of an image that every stage is trained by; 0 takes all of them.",
    ] = 512
    convention: Annotated[
        str,
        choice(*CONVENTIONS),
        '"mmdet" or "torchvision". Decides the geometry of the anchors (kdjax.models.anchors); how RoIs are '
        "pooled (aligned and one sample a cell, or not and 2 samples a bin; kdjax.models.roi_align); which "
        "elementwise loss boxes have (loss); what serves as an object's best anchor and learns it (best_iou and "
        "claim of assign.assign_by_iou); whether mask targets are fractions (kdjax.models.masks); whether the "
        "log-scales of boxes are limited from below (symmetric of kdjax.boxes.decode); and which small boxes are "
        "dropped.",
    ] = "mmdet"
    score_threshold: Annotated[float, number(0, 1), "Candidates scored above it go to non-maximum suppression."] = 0.05
    iou_threshold: Annotated[
        float,
        number(0, 1),
        "Overlap at which non-maximum suppression drops the lower-scored box.",
    ] = 0.5
    max_detections: Annotated[int, whole(1), "D, how many boxes an image returns at most."] = 100

    part_defaults: ClassVar[Sections] = {"neck": {"min_level": 2, "max_level": 6, "extra_from": "pool"}}
    tiny: ClassVar[Sections] = {
        **Detector.tiny,
        "head": {
            "head_channels": 32,
            "anchor_scale": 2.0,
            "train_candidates": 32,
            "train_proposals": 32,
            "candidates": 32,
            "proposals": 32,
            "anchor_samples": 32,
            "roi_samples": 16,
        },
    }
    has_proposals: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= len(STAGES):
            raise UserError(f"RCNN has 1 to {len(STAGES)} stages, not {self.stages}.")
        super().__post_init__()

    @property
    def learns_masks(self) -> bool:
        """Whether its targets must have masks."""
        return self.masks

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms; those of a cascade's stages begin with "s0_", "s1_" and "s2_"."""
        names = ("cls", "box", "mask") if self.masks else ("cls", "box")
        return "rpn_cls", "rpn_box", *(self._prefix(stage) + name for stage in range(self.stages) for name in names)

    def setup(self) -> None:
        """Makes the heads; the backbone and the neck come from outside."""
        self.head = RCNNHead(
            self.num_classes,
            anchors=len(self.anchor_ratios),
            stages=self.stages,
            masks=self.masks,
            channels=self.head_channels,
            dtype=self.dtype,
        )

    def heads(
        self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None
    ) -> RCNNPredictions:
        """The neck's pyramid to predictions.

        Without ``sampling`` every stage looks at all proposals, for inference. With it, at a sample of them and of the
        objects themselves, for training: a random one of ``roi_samples``, a quarter of them positive at most, at a new
        one in every stage.

        Args:
            features: {"p2": (N, H, W, C), ...}.
            image_size: (N, 2) height and width, None for the whole padded image.
            sampling: targets and keys of the images, in training.
        """
        rpn = self.head.rpn(features)
        fixed = jax.lax.stop_gradient(rpn)
        anchors = self.anchors(rpn)
        if image_size is None:
            image_size = self._padded_size(rpn)
        proposals = propose(
            fixed,
            anchors,
            image_size,
            candidates=self.candidates if sampling is None else self.train_candidates,
            proposals=self.proposals if sampling is None else self.train_proposals,
            convention=self.convention,
        )
        anchor_matches = None
        if sampling is not None:
            anchor_matches = self._match_anchors(jnp.concatenate(list(anchors.values())), image_size, sampling)

        predictions: list[RoIPredictions] = []
        rois, valid = proposals.boxes, proposals.valid
        for stage in range(self.stages):
            matches = None
            if sampling is not None:
                count = rois.shape[1]
                rois, matches = self._match_rois(stage, rois, valid, sampling)
                valid = matches.sampled
            logits, deltas = self.look(stage, features, rois)
            masks = None
            if self.masks and sampling is not None:
                most = int(self.roi_samples * POSITIVE_ROIS) or rois.shape[1]
                masks = self.head.mask[stage](self.pool(features, rois[:, :most], MASK_BINS))
            predictions.append(RoIPredictions(rois, valid, logits, deltas, matches, masks))
            if stage + 1 < self.stages:
                rois = boxes.clip(self._decode(stage, jax.lax.stop_gradient(deltas), rois), image_size)
                if matches is not None:
                    valid &= matches.candidate < count  # The next stage gets the objects as they are once more.
        return RCNNPredictions(rpn, proposals, tuple(predictions), anchor_matches)

    def __call__(
        self,
        images: jax.Array,
        image_size: jax.Array | None = None,
        train: bool = False,
        sampling: Sampling | None = None,
    ) -> tuple[Features, RCNNPredictions]:
        """Normalised images (N, H, W, 3) to the pyramid and the predictions."""
        features, predictions = super().__call__(images, image_size, train, sampling)
        if self.is_initializing():  # Without `sampling` masks are left to `find_masks`, but they need parameters.
            for head in self.head.mask:
                head(self.pool(features, predictions.proposals.boxes[:, :1], MASK_BINS))
        return features, predictions

    def predict(self, images: jax.Array, image_size: jax.Array) -> Detections:
        """uint8 images (N, H, W, 3) of size ``image_size`` (N, 2) to detections: everything that inference is.

        Masks are found in the boxes of the detections. Those of a cascade are the mean over its stages.
        """
        features, predictions = self(self.preprocess(images, image_size), image_size)
        found = self.decode(predictions, image_size)
        return found._replace(masks=self.find_masks(features, found)) if self.masks else found

    def look(self, stage: int, features: Features, rois: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a stage sees in RoIs (N, R, 4): the logits and the deltas of :class:`RoIPredictions`."""
        return self.head.box[stage](self.pool(features, rois, BOX_BINS))

    def find_masks(self, features: Features, found: Detections) -> jax.Array:
        """The masks of detections of N images: (N, D, 28, 28) float32 probabilities."""
        pooled = self.pool(features, found.boxes, MASK_BINS)
        probabilities = [
            jax.nn.sigmoid(_of_class(head(pooled).astype(jnp.float32), found.labels)) for head in self.head.mask
        ]
        return jnp.mean(jnp.stack(probabilities), axis=0)

    @nn.nowrap
    def loss(self, predictions: RCNNPredictions, targets: Targets, image_size: jax.Array) -> Terms:
        """The terms named by ``terms``, float32 scalars.

        "rpn_cls" and "rpn_box": see :func:`kdjax.models.rpn.rpn_loss`. Of each stage: "cls", the mean cross-entropy of
        the sampled RoIs' classes; "box", the box regression loss of the positive RoIs, for their class, summed and
        divided by the number of all sampled RoIs; "mask", the mean binary cross-entropy of the positive RoIs' masks,
        for their class. Those of a cascade's stages are weighted by 1, 1/2 and 1/4. Numbers are those of the global
        batch: the mean over devices of what each returns is the global loss.

        The loss of boxes is L1 in the convention of MMDetection, smooth L1 with beta 1/9 in torchvision's; in
        MMDetection's cascades smooth L1 with beta 1/9 for proposals and with beta 1 for RoIs.

        Raises:
            ValueError: predictions that were not made for training, or masks that are to be learnt and not given.
        """
        if predictions.anchor_matches is None:
            raise ValueError("RCNN learns from predictions that were made with `sampling`; these were made without it.")
        if self.masks and targets.masks is None:
            raise ValueError("This detector learns masks, but its targets have none; train it on data with masks.")
        rpn_box_loss, box_loss = self._box_losses()
        terms = rpn_loss(
            predictions.rpn,
            self.anchors(predictions.rpn),
            predictions.anchor_matches,
            targets,
            box_loss=rpn_box_loss,
            convention=self.convention,
            axis_name=self.axis_name,
        )
        for stage, (_, _, weight) in enumerate(STAGES[: self.stages]):
            part = self._roi_loss(stage, predictions, targets, image_size, box_loss)
            terms |= {self._prefix(stage) + name: weight * value for name, value in part.items()}
        return terms

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> RoIDeltas:
        """What the heads say where a student predicted something: their box regression on the student's RoIs.

        Of cascades the first stages meet: this detector's on the RoIs of the student's.

        Raises:
            UserError: if the student has no RoIs.
        """
        del image_size
        if not isinstance(predictions, RCNNPredictions):
            raise UserError(
                "A detector with proposals can be imitated by another one only, for its box regression is that of the "
                "student's RoIs; this student has none."
            )
        _, deltas = self.look(0, features, predictions.stages[0].rois)
        return RoIDeltas(deltas)

    @nn.nowrap
    def decode(self, predictions: RCNNPredictions, image_size: jax.Array) -> Detections:
        """Predictions to the detections of images of height and width ``image_size`` (N, 2), without masks.

        Scores are the softmax of the logits, of a cascade of the mean of its stages' logits; boxes are those of the
        last stage. Candidates above the score threshold are clipped to the image, and non-maximum suppression runs
        class by class.
        """
        last = predictions.stages[-1]
        logits = sum(stage.logits.astype(jnp.float32) for stage in predictions.stages) / self.stages
        # Of scores that sum to 1, at most 1 / threshold are above the threshold.
        most = self.num_classes
        if self.score_threshold > 0:
            most = min(most, int(1 / self.score_threshold))
        scores, labels = jax.lax.top_k(jax.nn.softmax(logits)[..., :-1], most)

        n, r, _ = scores.shape
        deltas = last.deltas.reshape(n, r, -1, 4)
        if self.stages == 1:
            deltas = jnp.take_along_axis(deltas, labels[..., None], axis=2)
        rois, deltas = (jnp.broadcast_to(x, (n, r, most, 4)).reshape(n, -1, 4) for x in (last.rois[:, :, None], deltas))
        found = boxes.clip(self._decode(self.stages - 1, deltas, rois), image_size)
        valid = last.valid[..., None] & (scores > self.score_threshold)
        scores, labels, valid = (x.reshape(n, -1) for x in (scores, labels, valid))
        if self.convention == "torchvision":
            valid &= jnp.all(found[..., 2:] - found[..., :2] >= 1e-2, axis=-1)
        return suppress(
            [Candidates(found, scores, labels, valid)],
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
            drop_empty=False,
        )

    @nn.nowrap
    def _roi_loss(
        self, stage: int, predictions: RCNNPredictions, targets: Targets, image_size: jax.Array, box_loss: Any
    ) -> Terms:
        """The unweighted terms of one stage."""
        rois = predictions.stages[stage]
        matches = rois.matches
        assert matches is not None
        labels = jnp.take_along_axis(targets.labels, matches.matched, axis=1)
        positive, sampled = matches.positive, matches.sampled
        count = mean_count(jnp.sum(sampled), self.axis_name)

        log_probabilities = jax.nn.log_softmax(rois.logits.astype(jnp.float32))
        outcome = jnp.where(positive, labels, self.num_classes)
        cross_entropy = -jnp.take_along_axis(log_probabilities, outcome[..., None], axis=-1)[..., 0]

        objects = jnp.take_along_axis(targets.boxes, matches.matched[..., None], axis=1)
        goal = boxes.encode(objects, rois.rois) / _scale(stage)
        # Empty slots have no box to encode from; what comes of it must not meet the gradient.
        box = box_loss(_boxes_of_class(rois.deltas, labels), jnp.where(positive[..., None], goal, 0))
        terms = {
            "cls": masked_sum(cross_entropy, sampled) / count,
            "box": masked_sum(box, positive[..., None]) / count,
        }
        if rois.masks is None:
            return terms

        most, size = rois.masks.shape[1:3]
        assert targets.masks is not None
        goal = mask_targets(
            targets.masks,
            rois.rois[:, :most],
            matches.matched[:, :most],
            self._padded_size(predictions.rpn) if self.convention == "mmdet" else image_size,
            size=size,
            convention=self.convention,
        )
        mask = binary_cross_entropy(_of_class(rois.masks, labels[:, :most]), goal)
        return terms | {"mask": masked_mean(mask, positive[:, :most, None, None], axis_name=self.axis_name)}

    @nn.nowrap
    def _prefix(self, stage: int) -> str:
        """What a stage's terms begin with."""
        return f"s{stage}_" if self.stages > 1 else ""

    @nn.nowrap
    def _box_losses(self) -> tuple[Any, Any]:
        """The elementwise losses of the anchors' and of the RoIs' deltas."""
        if self.convention == "torchvision":
            return smooth_l1_loss, smooth_l1_loss
        if self.stages == 1:
            return l1_loss, l1_loss
        return smooth_l1_loss, functools.partial(smooth_l1_loss, beta=1.0)

    @nn.nowrap
    def _decode(self, stage: int, deltas: jax.Array, rois: jax.Array) -> jax.Array:
        """The boxes (N, R, 4) that a stage's deltas (N, R, 4) make of RoIs (N, R, 4)."""
        deltas = deltas.astype(jnp.float32) * _scale(stage)
        return boxes.decode(deltas, rois, symmetric=self.convention == "mmdet")

    @nn.nowrap
    def _match_anchors(self, anchors: jax.Array, image_size: jax.Array, sampling: Sampling) -> Matches:
        """What the anchors (A, 4) of all levels learn.

        Those centred in the padding take no part, nor in MMDetection's cascades those that cross the image's border.
        """
        targets, keys = sampling
        mmdet = self.convention == "mmdet"
        inside = jax.vmap(centres_inside, (None, 0))(anchors, image_size)
        if mmdet and self.stages > 1:
            far = image_size[:, None, ::-1]
            inside &= jnp.all(anchors[:, :2] >= 0, axis=-1)[None] & jnp.all(anchors[None, :, 2:] < far, axis=-1)
        return match(
            jnp.broadcast_to(anchors, (len(inside), *anchors.shape)),
            inside,
            targets,
            _fold(keys, 0),
            number=self.anchor_samples,
            fraction=0.5,
            positive_iou=0.7,
            negative_iou=0.3,
            best_iou=0.3 if mmdet else 0.0,
            claim=mmdet,
        )

    @nn.nowrap
    def _match_rois(
        self, stage: int, rois: jax.Array, valid: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, Matches]:
        """The sampled of these RoIs and of the objects themselves, which come after them, and what they learn.

        That an object's best RoI learns the object, if their IoU is at least 0.5, is a detail of MMDetection's Mask
        R-CNN alone.
        """
        targets, keys = sampling
        candidates = jnp.concatenate([rois, targets.boxes], axis=1)
        iou = STAGES[stage].iou
        claim = self.convention == "mmdet" and self.masks and self.stages == 1
        matches = match(
            candidates,
            jnp.concatenate([valid, targets.valid], axis=1),
            targets,
            _fold(keys, 1 + stage),
            number=self.roi_samples,
            fraction=POSITIVE_ROIS,
            positive_iou=iou,
            negative_iou=iou,
            best_iou=iou if claim else None,
            claim=claim,
        )
        return jnp.take_along_axis(candidates, matches.candidate[..., None], axis=1), matches

    @nn.nowrap
    def _padded_size(self, predictions: RPNPredictions) -> jax.Array:
        """(N, 2) int32: height and width of the padded images, in whole strides of the finest map."""
        finest = self.ordered(predictions.objectness)[0]
        n, height, width, _ = predictions.objectness[finest].shape
        return jnp.broadcast_to(jnp.array([height, width], jnp.int32) * self.strides[finest], (n, 2))

    @nn.nowrap
    def pool(self, features: Features, rois: jax.Array, size: int) -> jax.Array:
        """The features (N, R, size, size, C) of RoIs (N, R, 4), each of its level, of stride 32 at most."""
        maps = {self.strides[level]: x for level, x in features.items() if self.strides[level] <= 32}
        numbers = [stride.bit_length() - 1 for stride in maps]
        mmdet = self.convention == "mmdet"
        return roi_align(
            maps,
            rois,
            roi_levels(rois, min(numbers), max(numbers), convention=self.convention),
            output_size=size,
            sampling_ratio=0 if mmdet else 2,
            aligned=mmdet,
        )

    @nn.nowrap
    def anchors(self, predictions: RPNPredictions) -> dict[str, jax.Array]:
        """Level to its anchors, as ``kdjax.models.anchors`` makes them."""
        maps = predictions.objectness
        return pyramid_anchors(
            {level: (maps[level].shape[1], maps[level].shape[2]) for level in self.ordered(maps)},
            self.strides,
            scale=self.anchor_scale,
            octaves=1,
            ratios=self.anchor_ratios,
            convention=self.convention,
        )


def _scale(stage: int) -> jax.Array:
    return jnp.array(STAGES[stage].scale, jnp.float32).reshape(1, 1, 4)


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _boxes_of_class(deltas: jax.Array, labels: jax.Array) -> jax.Array:
    """Deltas (N, R, classes * 4 or 4) to those of each RoI's class (N, R): (N, R, 4)."""
    if deltas.shape[-1] == 4:
        return deltas
    deltas = deltas.reshape(*labels.shape, -1, 4)
    return jnp.take_along_axis(deltas, labels[..., None, None], axis=2)[:, :, 0]


def _of_class(masks: jax.Array, labels: jax.Array) -> jax.Array:
    """Masks (N, R, S, S, classes) to those of each RoI's class (N, R): (N, R, S, S)."""
    return jnp.take_along_axis(masks, labels[..., None, None, None], axis=-1)[..., 0]
