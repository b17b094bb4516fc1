"""In which details the published two-stage detectors differ."""

from typing import NamedTuple

from kdjax.models.roi import STAGES, Stage


class Convention(NamedTuple):
    """In which the published two-stage detectors differ."""

    exact_anchors: bool
    """Of :mod:`kdjax.models.anchors`."""
    aligned: bool
    """Whether a cell of a map or a mask stands for its centre, see :func:`kdjax.models.roi_align.roi_align`."""
    sampling_ratio: int
    """Of :func:`kdjax.models.roi_align.roi_align`."""
    nudge_side: bool
    """Of :func:`kdjax.models.roi_align.roi_levels`."""
    limit_shrinking: bool
    """Whether the log-scales of boxes are limited from below, ``symmetric`` of :func:`kdjax.boxes.decode`."""
    smallest_proposal: float
    """Of :func:`kdjax.models.rpn.propose`."""
    smallest_box: float
    """Detections narrower or lower than that, in pixels, are dropped; 0 drops none."""
    best_anchor_iou: float
    """From which IoU on an object's best anchors learn it, see :func:`kdjax.models.assign.assign_by_iou`."""
    claim_anchors: bool
    """Whether they learn that object, or the one that they overlap most, likewise."""
    claim_rois: bool
    """Whether an object's best RoI learns the object, if their IoU is that of the stage: in Mask R-CNN alone."""
    drop_crossing: bool
    """Whether anchors that cross the image's border learn nothing: in cascades alone."""
    least_anchors: int
    """Of :func:`kdjax.models.rpn.rpn_loss`."""
    smooth_boxes: bool
    """Whether boxes have a smooth L1 loss throughout."""
    binary_masks: bool
    """Whether mask targets are 0 or 1, or fractions, see :func:`kdjax.models.masks.mask_targets`."""
    padded_masks: bool
    """Whether masks are cut of the padded images, ``limits`` of :func:`kdjax.models.masks.mask_targets`."""
    stages: tuple[Stage, ...] = STAGES
    """Those of cascades; a detector of a single stage has the first."""
    smooth_cascade: bool = True
    """Whether the boxes of cascades have a smooth L1 loss."""
    mean_of_scores: bool = False
    """Whether a cascade's scores are the mean of its stages' probabilities, not those of the mean of their logits."""
    one_mask_head: bool = False
    """Whether a cascade has a single mask head, which learns from the RoIs of the first stage, not one a stage."""
    shared_gradient: bool = False
    """Whether the gradient that a cascade's stages give to features is their mean, not their sum."""


_MMDET = Convention(
    exact_anchors=True,
    aligned=True,
    sampling_ratio=0,
    nudge_side=True,
    limit_shrinking=True,
    smallest_proposal=0.0,
    smallest_box=0.0,
    best_anchor_iou=0.3,
    claim_anchors=True,
    claim_rois=True,
    drop_crossing=True,
    least_anchors=1,
    smooth_boxes=False,
    binary_masks=True,
    padded_masks=True,
)

CONVENTIONS = {
    "mmdet": _MMDET,
    # Of cascades; in the others it differs from MMDetection in rare boxes alone.
    "detectron2": _MMDET._replace(
        limit_shrinking=False,
        best_anchor_iou=0.0,
        claim_anchors=False,
        claim_rois=False,
        drop_crossing=False,
        stages=(
            Stage(0.5, (1 / 10, 1 / 10, 1 / 5, 1 / 5), 1.0),
            Stage(0.6, (1 / 20, 1 / 20, 1 / 10, 1 / 10), 1.0),
            Stage(0.7, (1 / 30, 1 / 30, 1 / 15, 1 / 15), 1.0),
        ),
        smooth_cascade=False,
        mean_of_scores=True,
        one_mask_head=True,
        shared_gradient=True,
    ),
    "torchvision": Convention(
        exact_anchors=False,
        aligned=False,
        sampling_ratio=2,
        nudge_side=False,
        limit_shrinking=False,
        smallest_proposal=1e-3,
        smallest_box=1e-2,
        best_anchor_iou=0.0,
        claim_anchors=False,
        claim_rois=False,
        drop_crossing=False,
        least_anchors=0,
        smooth_boxes=True,
        binary_masks=False,
        padded_masks=False,
    ),
}
