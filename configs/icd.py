"""ICD, instance-conditional distillation (Kang et al., NeurIPS 2021, https://arxiv.org/abs/2110.12724).

    python -m kdjax.main --config=configs/icd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that imitates the teacher where queries for
instances look, while an auxiliary task teaches the queries where to look.

On COCO, ``configs/icd.py:<pair>`` has the authors' settings: weight 8 and 300 queries, from two-stage teachers 3 and
100, 1000 steps before the student's features feel it, neck and head inherited, AdamW at 1e-4 for what the method
learns. The pairs with an R101 are theirs: Detectron2's teachers of schedule 3x and its backbone, FCOS as AdelaiDet has
it, short sides of 640 to 800, 90000 steps, entries of gradients clipped at 1. The other pairs are our extrapolation,
with MMDetection's files and schedule 1x. ``docs/papers.md`` has what they report. On a host with 8 GPUs or 8 TPU chips,
with ``coco/2017`` prepared and the two files that the pair names (``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/icd.py:retinanet_r101_r50 --workdir=runs/icd_coco
        --config.teacher.weights=model_final_971ab9.pkl --config.student.weights=R-50.pkl
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import DETECTRON2, PAIRS, as_detectron2, finish, set_schedule, start


def get_config(variant: str = "shapes") -> ConfigDict:
    """ICD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant, PAIRS | DETECTRON2)
    student = config.student
    if variant.removesuffix(":tiny") in DETECTRON2:
        as_detectron2(student)
    elif pair:
        set_schedule(student, epochs=12)
    if pair is None:
        icd = method_config("icd", warmup_steps=20, queries=60)
        student.loss_weights.icd = 1.5
    else:
        icd = method_config("icd", warmup_steps=1000, queries=100 if pair.teacher.two_stage else 300)
        student.loss_weights.icd = 3.0 if pair.teacher.two_stage else 8.0
    student.inherit = ("neck", "head")
    icd.optimizer = ConfigDict(student.optimizer.to_dict())
    icd.optimizer.update(
        beta2=0.999,
        name="adamw",
        learning_rate=1e-4,
        schedule="cosine",
        warmup_steps=10,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        clip_norm=0.01,
        clip_value=0.0,
    )
    if pair:
        icd.optimizer.warmup_factor = 1.0
    student.methods.icd = icd
    return finish(config, variant)
