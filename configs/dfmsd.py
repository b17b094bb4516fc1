"""DFMSD, dual feature masking stage-wise distillation (Zhang et al., 2024, https://arxiv.org/abs/2407.13147).

    python -m kdjax.main --config=configs/dfmsd.py

Trains two RetinaNet teachers of different architectures on the embedded data set; a small RetinaNet learns from the
weaker one first, then, with more of its features hidden, from the stronger one. Dual masks, stages, masks that
strengthen and semantic alignment are the paper's; formulas and numbers are our reconstruction, such as the weight of 10
for COCO, 6 for two-stage and transformer teachers. The student takes as many steps in both stages together as with the
other methods.
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, base_stage, method_config, retinanet, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """DFMSD on the embedded data; ``configs/dfmsd.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.stages = ("first_teacher", "teacher", "first_student", "student")
    config.first_teacher = base_stage(retinanet(depth=34, width=0.25))
    config.first_teacher.steps = config.teacher.steps
    # A quarter of the task loss at the start, which is 1.5.
    config.student.loss_weights.dfmsd = 0.15
    config.student.steps //= 2
    config.first_student = ConfigDict(config.student.to_dict())
    config.first_student.teacher = "first_teacher"
    config.first_student.method = method_config("dfmsd", stage=1)
    config.first_student.inherit = ("neck", "head")
    config.student.method = method_config("dfmsd", stage=2)
    config.student.init = "first_student"
    return with_variant(config, variant)
