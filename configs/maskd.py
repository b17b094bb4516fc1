"""MasKD, masked distillation with receptive tokens (Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589).

    python -m kdjax.main --config=configs/maskd.py

Trains a RetinaNet teacher on the embedded data set; learns tokens that attend to the regions it detects from, the
teacher frozen; then a small RetinaNet imitates the teacher region by region.

On COCO, ``configs/maskd.py:<pair>`` has settings from the authors' configs: 2000 steps for the tokens; for the student
schedule 2x and

| student | weight | warm-up | besides | alone | distilled |
|---|---|---|---|---|---|
| RetinaNet, from R101 / X101 | 7 | 7000 / 8500 | imitated boxes, inherits, rate 0.02, clip 35 | 37.4 | 39.9 / 41.0 |
| FCOS, from R101 | 10 | 5000 | clip 35, short sides of 640 to 800 | 38.5 | 42.9 |
| Faster R-CNN, from R101 | 1 | 7330 | imitated boxes | 38.4 | 41.0 |
| Faster R-CNN, from Cascade Mask R-CNN X101 | 1 | 5000 | imitated boxes | 38.4 | 42.7 |

The figures are what the authors report. Not yet as theirs: boxes are imitated by smooth L1 (theirs L1 from R101); the
X101 teacher is schedule 1x; FCOS students see six short sides (two), have the centreness on the box tower (class tower)
and train scale and bias of the backbone's batch norm (frozen), with one rate for all (doubled for biases); the Cascade
teacher is X101-32x4d of 44.3 AP (X101-64x4d of 45.6), its student has a box for each class (one for all); tokens of
two-stage teachers learn by Adam (SGD). Pairs that are not in the table are our extrapolation.

The tokens of a detector with masks learn from masks, which ``--config.data.name=coco_json:<folder>`` has and the
prepared ``coco/2017`` has not. On a host with 8 GPUs or 8 TPU chips, with ``coco/2017`` prepared and the two files that
the pair names (``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/maskd.py:retinanet_x101_r50 --workdir=runs/maskd_coco
        --config.teacher.weights=retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth
        --config.student.weights=resnet50-0676ba61.pth
"""

import copy

from ml_collections import ConfigDict

from kdjax.config import loss_terms, method_config
from kdjax.pairs import finish, start


def get_config(variant: str = "shapes") -> ConfigDict:
    """MasKD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    student = config.student
    maskd, imitates = method_config("maskd", init="tokens"), True
    if pair is None:
        maskd.warmup_steps = 30
        student.loss_weights.maskd = 0.08
        # Every level weighs the same, and P6 and P7, which detect next to nothing in images of 128 pixels, have by far
        # the largest features here: with them the term is nearly theirs alone, and the student gets worse.
        maskd.levels = ("p3", "p4", "p5")
        student.inherit = ("neck", "head")
    elif pair.teacher.two_stage:
        maskd.warmup_steps = 5000 if config.teacher.model.name == "cascade_mask_rcnn" else 7330
        student.loss_weights.maskd = 1.0
    elif "fcos" in (config.teacher.model.name, student.model.name):
        maskd.warmup_steps, imitates = 5000, False
        student.loss_weights.maskd = 10.0
        student.optimizer.clip_norm = 35.0
    else:
        groups = config.teacher.model.backbone.get("groups", 1)
        maskd.warmup_steps = 7000 if groups == 1 else 8500
        student.loss_weights.maskd = 7.0
        student.inherit = ("neck", "head")
        student.optimizer.update(learning_rate=0.02, warmup_steps=1000, clip_norm=35.0)
    student.methods.maskd = maskd
    if imitates:
        student.methods.box_imitation = method_config("box_imitation")

    config.stages = ("teacher", "tokens", "student")
    config.tokens = tokens = copy.deepcopy(config.teacher)
    tokens.update(init="teacher", weights="", source="", freeze=("student",))
    tokens.methods.maskd_tokens = method_config("maskd_tokens", levels=maskd.levels)
    tokens.model.frozen_norm = True
    # The tokens of a detector with masks learn from its masks too.
    config.data.masks |= config.teacher.model.name == "cascade_mask_rcnn"
    # The teacher's own loss, on features without masks, moves nothing.
    tokens.loss_weights = ConfigDict(dict.fromkeys(loss_terms(tokens.model), 0.0))
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
        clip_norm=0.0,
    )
    return finish(config, variant)
