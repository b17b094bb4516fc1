"""Faster R-CNN, Mask R-CNN and their cascades: detectors that look twice.

Ren et al., "Faster R-CNN", 2015; Lin et al., "Feature Pyramid Networks", 2017; He et al., "Mask R-CNN", 2017; Cai and
Vasconcelos, "Cascade R-CNN", 2018.

The file is long because its one class is: a third of it is the options, which have their words beside them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax import boxes
from kdjax.errors import UserError
from kdjax.losses.detection import l1_loss, smooth_l1_loss
from kdjax.models.anchors import centres_inside, padded, pyramid_anchors, scale_for
from kdjax.models.dense import Candidates, suppress
from kdjax.models.detector import Detector
from kdjax.models.network import Sections
from kdjax.models.rcnn_convention import CONVENTIONS, Convention
from kdjax.models.rcnn_head import BOX_BINS, MASK_BINS, RCNNHead
from kdjax.models.roi import STAGES, RCNNPredictions, RoIDeltas, RoIPredictions, decode_rois, of_class, roi_loss
from kdjax.models.roi_align import roi_align, roi_levels
from kdjax.models.rpn import Matches, Proposals, RPNPredictions, match, propose, rpn_loss
from kdjax.options import FLAG, RATIOS, choice, number, whole
from kdjax.types import Detections, Features, Sampling, Targets, Terms

POSITIVE_ROIS = 0.25
"""Share of the sampled RoIs that may be positive."""


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
    class_agnostic: Annotated[
        bool, FLAG, "Regress one box for all classes, as the stages of a cascade do, not one for each."
    ] = False
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
        '"mmdet", "torchvision" or, of cascades, "detectron2". Decides the geometry of the anchors '
        "(kdjax.models.anchors); how RoIs are pooled (aligned and one sample a cell, or not and 2 samples a bin; "
        "kdjax.models.roi_align); which elementwise loss boxes have (loss); what serves as an object's best anchor and "
        "learns it (best_iou and claim of assign.assign_by_iou); whether mask targets are fractions "
        "(kdjax.models.masks); whether the log-scales of boxes are limited from below (symmetric of "
        "kdjax.boxes.decode); which small boxes are dropped; and, of cascades, what the stages learn, how many find "
        "masks, and what the scores are the mean of.",
    ] = "mmdet"

    part_defaults: ClassVar[Sections] = {"neck": {"min_level": 2, "max_level": 6, "extra_from": "pool"}}
    decisive: ClassVar[tuple[str, ...]] = ("anchor_scale", "anchor_ratios", "convention")
    class_axis: ClassVar[Mapping[str, str]] = {"classes": "fastest", "deltas": "slowest", "logits": "fastest"}
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
    def facts(self) -> Convention:
        """What the convention decides."""
        return CONVENTIONS[self.convention]

    @property
    def learns_masks(self) -> bool:
        """Whether its targets must have masks."""
        return self.masks

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms; those of a cascade's stages begin with "s0_", "s1_" and "s2_"."""
        names = [
            self._prefix(stage) + name
            for stage in range(self.stages)
            for name in ("cls", "box", *["mask"] * (stage < self.mask_heads))
        ]
        return "rpn_cls", "rpn_box", *names

    @property
    def mask_heads(self) -> int:
        """How many of the first stages find masks."""
        return self.masks and (1 if self.facts.one_mask_head else self.stages)

    @classmethod
    def suited(cls, sizes: Sequence[float]) -> dict[str, Any]:
        """The smallest anchor, that of P2, is as large as all but a tenth of the objects are at least."""
        return {"anchor_scale": scale_for(sizes, quantile=0.1, stride=4, least=2.0, most=8.0)} if sizes else {}

    def setup(self) -> None:
        """Makes the heads; the backbone and the neck come from outside."""
        self.head = RCNNHead(
            self.num_classes,
            anchors=len(self.anchor_ratios),
            stages=self.stages,
            masks=self.mask_heads,
            class_agnostic=self.class_agnostic or self.stages > 1,
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
        if image_size is None:
            image_size = self._padded_size(rpn)
        proposals = self.propose(jax.lax.stop_gradient(rpn), image_size, train=sampling is not None)
        anchor_matches = None
        if sampling is not None:
            anchor_matches = self.match_anchors(rpn, image_size, sampling)

        predictions: list[RoIPredictions] = []
        rois, valid = proposals.boxes, proposals.valid
        for stage in range(self.stages):
            matches = None
            if sampling is not None:
                count = rois.shape[1]
                rois, matches = self.match_rois(stage, rois, valid, sampling)
                valid = matches.sampled
            logits, deltas = self.look(stage, features, rois)
            masks = None
            if stage < self.mask_heads and sampling is not None:
                most = int(self.roi_samples * POSITIVE_ROIS) or rois.shape[1]
                masks = self.head.mask[stage](self.pool(features, rois[:, :most], MASK_BINS))
            predictions.append(RoIPredictions(rois, valid, logits, deltas, matches, masks))
            if stage + 1 < self.stages:
                rois = boxes.clip(self._boxes(stage, jax.lax.stop_gradient(deltas), rois), image_size)
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
        pooled = self.pool(features, rois, BOX_BINS)
        if self.facts.shared_gradient:
            pooled += (1 / self.stages - 1) * (pooled - jax.lax.stop_gradient(pooled))
        return self.head.box[stage](pooled)

    def find_masks(self, features: Features, found: Detections) -> jax.Array:
        """The masks of detections of N images: (N, D, 28, 28) float32 probabilities."""
        pooled = self.pool(features, found.boxes, MASK_BINS)
        probabilities = [
            jax.nn.sigmoid(of_class(head(pooled).astype(jnp.float32), found.labels)) for head in self.head.mask
        ]
        return jnp.mean(jnp.stack(probabilities), axis=0)

    @nn.nowrap
    def loss(self, predictions: RCNNPredictions, targets: Targets, image_size: jax.Array) -> Terms:
        """The terms named by ``terms``, float32 scalars.

        "rpn_cls" and "rpn_box": see :func:`kdjax.models.rpn.rpn_loss`. Those of each stage: see
        :func:`kdjax.models.roi.roi_loss`; a cascade's are weighted by 1, 1/2 and 1/4, in Detectron2's convention by 1.
        Numbers are those of the global batch: the mean over devices of what each returns is the global loss.

        The loss of boxes is L1 in the conventions of MMDetection and Detectron2, smooth L1 with beta 1/9 in
        torchvision's; in MMDetection's cascades smooth L1 with beta 1/9 for proposals and with beta 1 for RoIs.

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
            least=self.facts.least_anchors,
            axis_name=self.axis_name,
        )
        for index, (stage, rois) in enumerate(zip(self.facts.stages, predictions.stages, strict=False)):
            part = roi_loss(
                rois,
                stage,
                targets,
                box_loss=box_loss,
                mask_limits=self._padded_size(predictions.rpn) if self.facts.padded_masks else image_size,
                aligned=self.facts.aligned,
                binary_masks=self.facts.binary_masks,
                axis_name=self.axis_name,
            )
            terms |= {self._prefix(index) + name: stage.weight * value for name, value in part.items()}
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

        Scores are the softmax of the logits, of a cascade of the mean of its stages' logits, or in Detectron2's
        convention the mean of their softmax; boxes are those of the last stage. Candidates above the score threshold
        are clipped to the image, and non-maximum suppression runs class by class.
        """
        last = predictions.stages[-1]
        logits = [stage.logits.astype(jnp.float32) for stage in predictions.stages]
        if self.facts.mean_of_scores:
            probabilities = jnp.mean(jax.nn.softmax(jnp.stack(logits)), axis=0)
        else:
            probabilities = jax.nn.softmax(sum(logits) / self.stages)
        # Of scores that sum to 1, at most 1 / threshold are above the threshold.
        most = self.num_classes
        if self.score_threshold > 0:
            most = min(most, int(1 / self.score_threshold))
        scores, labels = jax.lax.top_k(probabilities[..., :-1], most)

        n, r, _ = scores.shape
        deltas = last.deltas.reshape(n, r, -1, 4)
        if deltas.shape[2] > 1:
            deltas = jnp.take_along_axis(deltas, labels[..., None], axis=2)
        rois, deltas = (jnp.broadcast_to(x, (n, r, most, 4)).reshape(n, -1, 4) for x in (last.rois[:, :, None], deltas))
        found = boxes.clip(self._boxes(self.stages - 1, deltas, rois), image_size)
        valid = last.valid[..., None] & (scores > self.score_threshold)
        scores, labels, valid = (x.reshape(n, -1) for x in (scores, labels, valid))
        if self.facts.smallest_box:
            valid &= jnp.all(found[..., 2:] - found[..., :2] >= self.facts.smallest_box, axis=-1)
        return suppress(
            [Candidates(found, scores, labels, valid)],
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
            drop_empty=False,
        )

    @nn.nowrap
    def _prefix(self, stage: int) -> str:
        """What a stage's terms begin with."""
        return f"s{stage}_" if self.stages > 1 else ""

    @nn.nowrap
    def _box_losses(self) -> tuple[Any, Any]:
        """The elementwise losses of the anchors' and of the RoIs' deltas."""
        if self.facts.smooth_boxes:
            return smooth_l1_loss, smooth_l1_loss
        if self.stages == 1 or not self.facts.smooth_cascade:
            return l1_loss, l1_loss
        return smooth_l1_loss, functools.partial(smooth_l1_loss, beta=1.0)

    @nn.nowrap
    def _boxes(self, stage: int, deltas: jax.Array, rois: jax.Array) -> jax.Array:
        """The boxes (N, R, 4) that a stage's deltas (N, R, 4) make of RoIs (N, R, 4)."""
        return decode_rois(deltas, rois, self.facts.stages[stage], limit_shrinking=self.facts.limit_shrinking)

    @nn.nowrap
    def propose(self, predictions: RPNPredictions, image_size: jax.Array, *, train: bool = False) -> Proposals:
        """The regions that most likely hold an object, of inference or of training, which looks at more of them.

        Those of anchors centred in the image, in inference also in the padding up to the next multiple of 32, as far as
        the originals pad a single image.
        """
        return propose(
            predictions,
            self.anchors(predictions),
            image_size,
            image_size if train else padded(image_size),
            candidates=self.train_candidates if train else self.candidates,
            proposals=self.train_proposals if train else self.proposals,
            limit_shrinking=self.facts.limit_shrinking,
            smallest=self.facts.smallest_proposal,
        )

    @nn.nowrap
    def match_anchors(self, predictions: RPNPredictions, image_size: jax.Array, sampling: Sampling) -> Matches:
        """What the anchors of all levels learn.

        Those centred in the padding take no part, nor in MMDetection's cascades those that cross the image's border.
        """
        targets, keys = sampling
        anchors = jnp.concatenate(list(self.anchors(predictions).values()))
        inside = jax.vmap(centres_inside, (None, 0))(anchors, image_size)
        if self.facts.drop_crossing and self.stages > 1:
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
            best_iou=self.facts.best_anchor_iou,
            claim=self.facts.claim_anchors,
        )

    @nn.nowrap
    def match_rois(
        self, stage: int, rois: jax.Array, valid: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, Matches]:
        """The sampled of these RoIs and of the objects themselves, which come after them, and what they learn.

        That an object's best RoI learns the object, if their IoU is at least 0.5, is a detail of MMDetection's Mask
        R-CNN alone.
        """
        targets, keys = sampling
        candidates = jnp.concatenate([rois, targets.boxes], axis=1)
        iou = self.facts.stages[stage].iou
        claim = self.facts.claim_rois and self.masks and self.stages == 1
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
        finest, size = next(iter(self.sizes(predictions.objectness).items()))
        n = len(predictions.objectness[finest])
        return jnp.broadcast_to(jnp.array(size, jnp.int32) * self.strides[finest], (n, 2))

    @nn.nowrap
    def pool(self, features: Features, rois: jax.Array, size: int) -> jax.Array:
        """The features (N, R, size, size, C) of RoIs (N, R, 4), each of its level, of stride 32 at most."""
        maps = {self.strides[level]: x for level, x in features.items() if self.strides[level] <= 32}
        numbers = [stride.bit_length() - 1 for stride in maps]
        return roi_align(
            maps,
            rois,
            roi_levels(rois, min(numbers), max(numbers), nudge_side=self.facts.nudge_side),
            output_size=size,
            sampling_ratio=self.facts.sampling_ratio,
            aligned=self.facts.aligned,
        )

    @nn.nowrap
    def anchors(self, predictions: RPNPredictions) -> dict[str, jax.Array]:
        """Level to its anchors, as ``kdjax.models.anchors`` makes them."""
        return pyramid_anchors(
            self.sizes(predictions.objectness),
            self.strides,
            scale=self.anchor_scale,
            octaves=1,
            ratios=self.anchor_ratios,
            exact=self.facts.exact_anchors,
        )


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
