"""DMKD, dual masked knowledge distillation (Yang et al., ICASSP 2024, https://arxiv.org/abs/2309.02719).

    python -m kdjax.main --config=configs/dmkd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that generates the teacher's features from
its own with the positions and, in a second branch, the channels hidden that the teacher attends to most. Dual masks and
their learned fusion are the paper's; formulas and numbers are our reconstruction.

On COCO, ``configs/dmkd.py:<pair>`` has MGD's weights, 2e-5, and 5e-7 from two-stage teachers with a spatial_ratio of
0.45 on P2 to P5; tau is 0.8 for FCOS; gradients are clipped at 35. All of that is ours. The paper reports gains of 4.1
from a RetinaNet teacher and of 4.3 from a Cascade Mask R-CNN. On a host with 8 GPUs or 8 TPU chips, with ``coco/2017``
prepared and the two files that the pair names (``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/dmkd.py:retinanet_x101_r50 --workdir=runs/dmkd_coco
        --config.teacher.weights=retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth
        --config.student.weights=resnet50-0676ba61.pth
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import finish
from kdjax.variants import start


def get_config(variant: str = "shapes") -> ConfigDict:
    """DMKD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    student = config.student
    student.methods.dmkd = dmkd = method_config("dmkd")
    if config.task != "detection":
        # Not the paper's: all of it is ours.
        dmkd.levels = ("c5",)
        student.loss_weights.dmkd = 1.0
        student.method_share = 1.0 if pair is None else 0.0
    elif pair is None:
        # A sum over positions and channels, which grows with the teacher's features: how large it is besides the
        # student's own loss differs from data to data by a factor of a hundred, and is what counts.
        student.loss_weights.dmkd = 2e-5
        student.method_share = 3.0
        student.inherit = ("neck", "head")
    elif pair.teacher.two_stage:
        dmkd.spatial_ratio = 0.45
        student.loss_weights.dmkd = 5e-7
        dmkd.levels = ("p2", "p3", "p4", "p5")
        student.optimizer.clip_norm = 35.0
    else:
        dmkd.tau = pair.teacher.tau
        student.loss_weights.dmkd = 2e-5
        student.inherit = ("neck", "head")
        student.optimizer.clip_norm = 35.0
    return finish(config, variant)
