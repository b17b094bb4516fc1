"""MasKD, masked distillation with receptive tokens (Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589).

    python -m kdjax.main --config=configs/maskd.py

Trains a RetinaNet teacher on the embedded data set; learns tokens that attend to the regions it detects from, the
teacher frozen; then a small RetinaNet imitates the teacher region by region. The authors' settings for RetinaNet on
COCO: 2000 steps for the tokens, weight 7, warmup_steps 7000 of 180000, and, as here, imitated box regression and an
inherited neck and head.
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, method_config, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """MasKD on the embedded data; ``configs/maskd.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.stages = ("teacher", "tokens", "student")
    config.tokens = ConfigDict(config.teacher.to_dict())
    config.tokens.init = "teacher"
    config.tokens.model.frozen_norm = True
    config.tokens.freeze = ("student",)
    config.tokens.method = method_config("maskd_tokens")
    # The teacher's own loss, on features without masks, moves nothing.
    config.tokens.loss_weights.cls = config.tokens.loss_weights.box = 0.0
    # Few images and short tokens: the dice loss has fallen from 5 to 1 by then, and the teacher still detects.
    config.tokens.steps = 200
    config.tokens.optimizer.update(
        beta2=0.999,
        name="adam",
        learning_rate=0.01,
        schedule="cosine",
        final_factor=1e-4,
        warmup_steps=0,
        weight_decay=1e-3,
        decay_norm_and_bias=True,
        clip_norm=0.0,
    )
    config.student.method = method_config("maskd", warmup_steps=30)
    config.student.method_init = "tokens"
    config.student.imitate_boxes = True
    # A quarter of the task loss at the start, which is 1.5; features are stronger here than on COCO.
    config.student.loss_weights.maskd = 0.008
    config.student.inherit = ("neck", "head")
    return with_variant(config, variant)
