"""ICD, instance-conditional distillation (Kang et al., NeurIPS 2021, https://arxiv.org/abs/2110.12724).

    python -m kdjax.main --config=configs/icd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that imitates the teacher where queries for
instances look, while an auxiliary task teaches the queries where to look.

On COCO, ``configs/icd.py:<pair>`` has the method's settings from the authors' code: weight 8 and 300 queries, from
two-stage teachers 3 and 100, 1000 steps before the student's features feel it, neck and head inherited, schedule 1x;
and for what the method learns AdamW at 1e-4. The pairs are not theirs: teachers and preprocessing are MMDetection's and
the student's backbone is torchvision's, where the authors have Detectron2's 3x teachers, its MSRA backbones, short
sides of 640 to 800, a warm-up of 1000 steps and gradients clipped by value. What they report:

| student | alone | distilled |
|---|---|---|
| RetinaNet | 37.4 | 40.7 |
| Faster R-CNN | 37.9 | 40.9 |
| FCOS | 39.4 | 42.9 |
| Mask R-CNN, boxes / masks | 38.6 / 35.2 | 41.2 / 37.4 |

On a host with 8 GPUs or 8 TPU chips, with ``coco/2017`` prepared and the two files that the pair names
(``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/icd.py:retinanet_r101_r50 --workdir=runs/icd_coco
        --config.teacher.weights=retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth
        --config.student.weights=resnet50-0676ba61.pth
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import finish, set_schedule, start


def get_config(variant: str = "shapes") -> ConfigDict:
    """ICD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    student = config.student
    if pair is None:
        icd = method_config("icd", warmup_steps=20, queries=60)
        student.loss_weights.icd = 1.5
    else:
        icd = method_config("icd", warmup_steps=1000, queries=100 if pair.teacher.two_stage else 300)
        student.loss_weights.icd = 3.0 if pair.teacher.two_stage else 8.0
        set_schedule(student, epochs=12)
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
    )
    student.methods.icd = icd
    return finish(config, variant)
