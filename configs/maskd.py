"""MasKD, masked distillation with receptive tokens (Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589).

    python -m kdjax.main --config=configs/maskd.py

Trains a RetinaNet teacher on the embedded data set; learns tokens that attend to the regions it detects from, the
teacher frozen; then a small RetinaNet imitates the teacher region by region.

On COCO, ``configs/maskd.py:<pair>`` has settings from the authors' configs: 2000 steps for the tokens; for the student
schedule 2x and

| student | weight | warm-up | besides |
|---|---|---|---|
| RetinaNet, from R101 / X101 | 7 | 7000 / 8500 | boxes imitated by L1 / smooth L1, inherits, rate 0.02, clip 35 |
| FCOS, from R101 | 10 | 5000 | clip 35, short sides of 640 or 800, batch norm frozen, biases at twice the rate |
| RepPoints, from X101 | 10 | 5000 | points imitated by smooth L1 (beta 0.11), initial ones x 0.1, refined ones x 0.2 |
| Faster R-CNN, from R101 | 1 | 7330 | boxes imitated; its tokens learn by SGD, the others' by Adam |
| Faster R-CNN, from Cascade Mask R-CNN X101 | 1 | 5000 | boxes imitated, one for all classes |

``docs/papers.md`` has what they report, and where their files contradict each other. Maps are averaged over their valid
positions here, over the padding too there. Pairs that are not in the table are our extrapolation: those with a GFL have
the weight, the warm-up and the clipping of FCOS, and no boxes imitated.

The tokens of a detector with masks learn from masks, which ``--config.data.name=coco_json:<folder>`` has and the
prepared ``coco/2017`` has not. On a host with 8 GPUs or 8 TPU chips, with ``coco/2017`` prepared and the two files that
the pair names (``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/maskd.py:retinanet_x101_r50 --workdir=runs/maskd_coco
        --config.teacher.weights=retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth
        --config.student.weights=resnet50-0676ba61.pth

On Cityscapes, ``configs/maskd.py:deeplabv3_r101_r18``, ``:deeplabv3_r101_mobilenetv2`` and the like
have the authors' settings of segmentation (``kdjax/cityscapes.py``): 8 tokens in the teacher's logits, learnt by SGD in
10000 steps, with weight 1, and 0.4 for the auxiliary head. ``configs/maskd.py:segmentation`` is that on the embedded
data.
"""

import copy
from typing import Any

from ml_collections import ConfigDict

from kdjax.config import learnt_levels, loss_terms, method_config
from kdjax.pairs import CASCADE_X101, finish, taken_over
from kdjax.variants import start


def get_config(variant: str = "shapes") -> ConfigDict:
    """MasKD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant, tasks=("detection", "segmentation"))
    if config.task == "segmentation":
        set_segmentation(config, pair is None)
        return finish(config, variant)
    student = config.student
    maskd = method_config("maskd", init="tokens")
    imitates = "" if {"fcos", "gfl", "solo"} & {config.teacher.model.name, student.model.name} else "smooth_l1"
    if pair is None:
        maskd.warmup_steps = 30
        student.loss_weights.maskd = 0.08
        # Every level weighs the same, and P6 and P7, which detect next to nothing in images of 128 pixels, have by far
        # the largest features here: with them the term is nearly theirs alone, and the student gets worse.
        maskd.levels = learnt_levels(student.model)
        student.inherit = ("neck", "head")
    elif pair.teacher.two_stage:
        maskd.warmup_steps = 7330
        student.loss_weights.maskd = 1.0
        if pair.teacher.model["name"] == "cascade_mask_rcnn":
            maskd.warmup_steps = 5000
            config.teacher = taken_over(CASCADE_X101)
            # Each stage of a cascade regresses one box for all classes, and the first one's are imitated.
            student.model.head.class_agnostic = True
    elif not imitates:
        maskd.warmup_steps = 5000
        student.loss_weights.maskd = 10.0
        student.optimizer.clip_norm = 35.0
    elif student.model.name == "reppoints":
        maskd.warmup_steps = 5000
        # Of the refined points; the initial ones count half of that.
        student.loss_weights.update(maskd=10.0, box_imitation=0.2)
    else:
        groups = config.teacher.model.backbone.get("groups", 1)
        maskd.warmup_steps, imitates = (7000, "l1") if groups == 1 else (8500, "smooth_l1")
        student.loss_weights.maskd = 7.0
        student.inherit = ("neck", "head")
        student.optimizer.update(learning_rate=0.02, warmup_steps=1000, clip_norm=35.0)
    student.methods.maskd = maskd
    if imitates:
        beta = {"beta": 0.11} if student.model.name == "reppoints" else {}
        student.methods.box_imitation = method_config("box_imitation", loss=imitates, **beta)

    # The tokens of a detector with masks learn from its masks too.
    config.data.masks |= config.teacher.model.name == "cascade_mask_rcnn"
    tokens = add_tokens(config, "maskd_tokens", levels=maskd.levels)
    # Few images and short tokens: the dice loss has fallen from 5 to 1 by 200, and the teacher still detects.
    tokens.steps = 200 if pair is None else 2000
    tokens.optimizer.update(
        beta2=0.999,
        name="adam",
        learning_rate=0.01,
        schedule="cosine",
        final_factor=1e-4,
        warmup_steps=0,
        weight_decay=0.1 if pair and "cascade" in config.teacher.model.name else 1e-3,
        decay_norm_and_bias=True,
        clip_norm=35.0 if pair and config.teacher.model.name == "fcos" else 0.0,
    )
    if config.teacher.model.name == "faster_rcnn":
        # The only tokens of the authors' that do not learn by Adam, perhaps by mistake.
        tokens.optimizer.update(name="sgd", learning_rate=0.1, final_factor=1e-5, weight_decay=1e-4)
    return finish(config, variant)


def set_segmentation(config: ConfigDict, embedded: bool) -> None:
    """MasKD on label maps, in logits."""
    student = config.student
    student.methods.maskd_logits = method_config("maskd_logits", init="tokens")
    student.loss_weights.update(maskd_logits=1.0, maskd_auxiliary=0.4)
    # The authors' teacher is in training mode here. Its dropout is so too, but its batch norm is not.
    tokens = add_tokens(config, "maskd_logit_tokens")
    tokens.loss_weights.masked_seg = 1.0
    if tokens.model.head.auxiliary_channels:
        tokens.loss_weights.masked_auxiliary = 0.4
    tokens.steps = 200 if embedded else 10_000
    tokens.optimizer.update(
        name="sgd",
        learning_rate=0.1,
        schedule="poly",
        final_factor=0.0,
        warmup_steps=0,
        momentum=0.9,
        weight_decay=1e-3,
        decay_norm_and_bias=True,
        clip_norm=0.0,
    )


def add_tokens(config: ConfigDict, method: str, **options: Any) -> ConfigDict:
    """Adds the stage in which a method learns tokens from the teacher as it is; the stage."""
    config.stages = ("teacher", "tokens", "student")
    config.tokens = tokens = copy.deepcopy(config.teacher)
    tokens.update(init="teacher", weights="", source="", freeze=("student",), dtype=config.student.dtype)
    tokens.model.frozen_norm = True
    tokens.methods[method] = method_config(method, **options)
    # The teacher's own loss, on what is not masked, moves nothing.
    tokens.loss_weights = ConfigDict(dict.fromkeys(loss_terms(tokens.model), 0.0))
    return tokens
