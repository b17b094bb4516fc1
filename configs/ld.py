"""LD, localization distillation (Zheng et al., CVPR 2022, https://arxiv.org/abs/2102.12252).

    python -m kdjax.main --config=configs/ld.py

Trains a GFL teacher on the embedded data set, then a small GFL that inherits its neck and head and learns how sure the
teacher is of where each side of a box is. Both must be GFLs, whose boxes are distributions.

On COCO, ``configs/ld.py:gfl_r101_r18`` and ``:gfl_r101_r50`` have the settings of MMDetection's LDHead: temperature 10,
weight 0.25, the main region alone, nothing inherited, schedule 1x. There the loss is the sum over the two images of
each device, here the mean over images, so that the weight is 0.5. ``docs/papers.md`` has what is reported. The authors'
own code adds the valuable localization region with a quarter of that weight, which
``--config.student.loss_weights.ld_vlr=0.125`` does. On a host with 8 GPUs or 8 TPU chips, with ``coco/2017`` prepared
and the two files that the pair names (see ``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/ld.py:gfl_r101_r18 --workdir=runs/ld_coco
        --config.teacher.weights=gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth
        --config.student.weights=resnet18-f37072fd.pth
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import PAIRS, finish, set_schedule, start

GFL_PAIRS = {name: pair for name, pair in PAIRS.items() if pair.teacher.model["name"] == pair.student["name"] == "gfl"}
"""Pairs that it fits."""


def get_config(variant: str = "shapes") -> ConfigDict:
    """LD on the embedded data, or on COCO for a pair of GFLs; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant, GFL_PAIRS, embedded={"shapes": "gfl"})
    student = config.student
    student.methods.ld = method_config("ld")
    student.loss_weights.update(ld=0.5, ld_vlr=0.0)
    if pair is None:
        student.loss_weights.ld_vlr = 0.125
        # Three times the student's own loss, where these weights make it a sixth: it is worth more than twice as much.
        student.method_share = 3.0
        student.inherit = ("neck", "head")
    else:
        set_schedule(student, epochs=12)
    return finish(config, variant)
