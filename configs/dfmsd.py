"""DFMSD, dual feature masking stage-wise distillation (Zhang et al., 2024, https://arxiv.org/abs/2407.13147).

    python -m kdjax.main --config=configs/dfmsd.py

Trains two RetinaNet teachers of different architectures on the embedded data set; a small RetinaNet learns from the
smaller one first, then, with more of its features hidden and objects hidden sooner, from the larger one. In each stage
a layer of its own adapts the student to the teacher. Dual masks, adaptation by stages, object-aware masks that
strengthen with them and semantic alignment are the paper's; formulas and numbers are our reconstruction
(``experiments/2026-11-26-dfmsd.md`` has what each was worth). The student takes as many steps in both stages together
as with the other methods.

On COCO, ``configs/dfmsd.py:<pair>`` has weight 10, and 6 on P2 to P5 from two-stage teachers, which are PKD's, for
statistics of each GPU, where these are of the whole batch; the first teacher is a RetinaNet R50; tau is 0.8 from FCOS;
gradients are clipped at 35. All of that is ours.
No figure of the paper is available to us; what another method (PKD) reports for such pairs: FCOS X101 to RetinaNet R50
36.5 to 40.3. On a host with 8 GPUs or 8 TPU chips, with ``coco/2017`` prepared and the three files that the pair names
(``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/dfmsd.py:fcos_x101_retinanet_r50 --workdir=runs/dfmsd_coco
        --config.first_teacher.weights=retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth
        --config.teacher.weights=fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco-ede514a8.pth
        --config.first_student.weights=resnet50-0676ba61.pth
"""

import copy

from ml_collections import ConfigDict

from kdjax.config import learnt_levels, method_config, small_stage
from kdjax.pairs import finish, start, taken_over


def get_config(variant: str = "shapes") -> ConfigDict:
    """DFMSD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    student = config.student
    config.stages = ("first_teacher", "teacher", "first_student", "student")
    student.steps //= 2
    student.eval_every //= 2
    if pair is None:
        config.first_teacher = small_stage(student.model.name, depth=10, width=0.5)
        config.first_teacher.steps = config.teacher.steps
        student.loss_weights.dfmsd = 1.5
        student.inherit = ("neck", "head")
    else:
        config.first_teacher = taken_over(pair.weaker)
    config.first_student = first = copy.deepcopy(student)
    first.teacher = "first_teacher"
    student.update(init="first_student", weights="", source="", inherit=())
    for number, stage in enumerate((first, student), start=1):
        stage.methods.dfmsd = dfmsd = method_config("dfmsd", stage=number)
        if pair is None:
            # P7 has one position in an image of 128 pixels: nothing can be chosen to hide, and in a batch of 8 there
            # are too few numbers for the norm of a channel.
            dfmsd.levels = (*learnt_levels(student.model), "p6")
        else:
            teacher = (pair.weaker, pair.teacher)[number - 1]
            dfmsd.tau = teacher.tau
            stage.loss_weights.dfmsd = 6.0 if teacher.two_stage else 10.0
            dfmsd.levels = ("p2", "p3", "p4", "p5") if teacher.two_stage else ()
            stage.optimizer.clip_norm = 35.0
    return finish(config, variant)
