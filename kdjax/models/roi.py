"""What a stage of a detector that looks twice says about RoIs, what they learn, and the boxes that they become.

Ren et al., "Faster R-CNN", 2015; He et al., "Mask R-CNN", 2017; Cai and Vasconcelos, "Cascade R-CNN", 2018.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import boxes
from kdjax.errors import UserError
from kdjax.losses.detection import binary_cross_entropy
from kdjax.losses.reduce import masked_mean, masked_sum, mean_count
from kdjax.models.masks import mask_targets
from kdjax.models.rpn import Matches, Proposals, RPNPredictions
from kdjax.types import PairedBoxes, Targets, Terms


class Stage(NamedTuple):
    """What a stage of box heads is trained for (Cascade R-CNN, section 4)."""

    iou: float
    """IoU with an object from which on an RoI is positive."""
    scale: tuple[float, float, float, float]
    """Boxes are coded as by ``kdjax.boxes.encode``, divided by this."""
    weight: float
    """Of the stage's losses."""

    @property
    def spread(self) -> jax.Array:
        """The scale as an array (1, 1, 4)."""
        return jnp.array(self.scale, jnp.float32).reshape(1, 1, 4)


STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
"""Those of MMDetection's cascades."""


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

        MasKD's configs for two-stage detectors compare those of all sampled RoIs: the teacher's RoI head is given the
        student's proposals. A cascade's first stage has a box for all classes, and so must its student.
        """
        del strides, image_size, targets
        rois = self.stages[0]
        ours = rois.deltas
        if not isinstance(theirs, RoIDeltas):
            raise UserError("The box regression of RoIs can be imitated of a teacher with proposals only; it has none.")
        given = theirs.deltas
        if ours.shape != given.shape:
            counts = [f"{x.shape[-1] // 4} box{'es' * (x.shape[-1] > 4)}" for x in (ours, given)]
            raise UserError(
                f"The student regresses {counts[0]} of an RoI and the teacher {counts[1]}: box regression can be "
                "imitated where both regress as many; head.class_agnostic decides whether one is for all classes."
            )
        return {"rois": PairedBoxes(ours, given, rois.valid[..., None])}


class RoIDeltas(NamedTuple):
    """The box regression of a teacher on RoIs of a student."""

    deltas: jax.Array
    """As in :class:`RoIPredictions`, of the first stage."""


def decode_rois(deltas: jax.Array, rois: jax.Array, stage: Stage, *, limit_shrinking: bool) -> jax.Array:
    """The boxes (N, R, 4) that a stage's deltas (N, R, 4) make of RoIs (N, R, 4).

    ``limit_shrinking`` is ``symmetric`` of :func:`kdjax.boxes.decode`.
    """
    return boxes.decode(deltas.astype(jnp.float32) * stage.spread, rois, symmetric=limit_shrinking)


def roi_loss(
    rois: RoIPredictions,
    stage: Stage,
    targets: Targets,
    *,
    box_loss: Callable[[jax.Array, jax.Array], jax.Array],
    mask_limits: jax.Array,
    aligned: bool,
    binary_masks: bool,
    axis_name: str | None = None,
) -> Terms:
    """The unweighted terms of one stage, {"cls": ..., "box": ...} and, where it has masks, "mask": float32 scalars.

    "cls" is the mean cross-entropy of the sampled RoIs' classes; "box" the box regression loss of the positive RoIs,
    for their class, summed and divided by the number of all sampled RoIs; "mask" the mean binary cross-entropy of the
    positive RoIs' masks, for their class.

    Args:
        rois: predictions of N images that were made for training.
        stage: what they are trained for.
        targets: what they learn.
        box_loss: elementwise, of deltas and their targets.
        mask_limits: (N, 2) int32, ``limits`` of :func:`kdjax.models.masks.mask_targets`.
        aligned: of :func:`kdjax.models.masks.mask_targets`.
        binary_masks: likewise, ``binary``.
        axis_name: mapped axis over which numbers are averaged.
    """
    matches = rois.matches
    assert matches is not None
    labels = jnp.take_along_axis(targets.labels, matches.matched, axis=1)
    positive, sampled = matches.positive, matches.sampled
    count = mean_count(jnp.sum(sampled), axis_name)

    log_probabilities = jax.nn.log_softmax(rois.logits.astype(jnp.float32))
    outcome = jnp.where(positive, labels, rois.logits.shape[-1] - 1)
    cross_entropy = -jnp.take_along_axis(log_probabilities, outcome[..., None], axis=-1)[..., 0]

    objects = jnp.take_along_axis(targets.boxes, matches.matched[..., None], axis=1)
    goal = boxes.encode(objects, rois.rois) / stage.spread
    # Empty slots have no box to encode from; what comes of it must not meet the gradient.
    box = box_loss(boxes_of_class(rois.deltas, labels), jnp.where(positive[..., None], goal, 0))
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
        mask_limits,
        size=size,
        aligned=aligned,
        binary=binary_masks,
    )
    mask = binary_cross_entropy(of_class(rois.masks, labels[:, :most]), goal)
    return terms | {"mask": masked_mean(mask, positive[:, :most, None, None], axis_name=axis_name)}


def boxes_of_class(deltas: jax.Array, labels: jax.Array) -> jax.Array:
    """Deltas (N, R, classes * 4 or 4) to those of each RoI's class (N, R): (N, R, 4)."""
    if deltas.shape[-1] == 4:
        return deltas
    deltas = deltas.reshape(*labels.shape, -1, 4)
    return jnp.take_along_axis(deltas, labels[..., None, None], axis=2)[:, :, 0]


def of_class(masks: jax.Array, labels: jax.Array) -> jax.Array:
    """Masks (N, R, S, S, classes) to those of each RoI's class (N, R): (N, R, S, S)."""
    return jnp.take_along_axis(masks, labels[..., None, None, None], axis=-1)[..., 0]
