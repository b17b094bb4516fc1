"""ICD, instance-conditional distillation (Kang et al., NeurIPS 2021, https://arxiv.org/abs/2110.12724).

    python -m kdjax.main --config=configs/icd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that imitates the teacher where queries for
instances look, while an auxiliary task teaches the queries where to look. The authors' settings for one-stage detectors
on COCO: weight 8, warmup_steps 1000 of 90000, 300 queries, and for the method's own optimiser a learning rate of 1e-4.
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, method_config, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """ICD on the embedded data; ``configs/icd.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.student.method = method_config("icd", warmup_steps=20, queries=60)
    config.student.method_optimizer = ConfigDict(config.student.optimizer.to_dict())
    config.student.method_optimizer.update(
        beta2=0.999,
        name="adamw",
        learning_rate=1e-4,
        schedule="cosine",
        warmup_steps=10,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        clip_norm=0.01,
    )
    # A quarter of the task loss at the start, which is 1.5.
    config.student.loss_weights.icd = 0.2
    config.student.inherit = ("neck", "head")
    return with_variant(config, variant)
