"""MGD, masked generative distillation (Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529).

    python -m kdjax.main --config=configs/mgd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that inherits its neck and head and learns
to generate the teacher's features from its own with positions hidden.

On COCO, ``configs/mgd.py:<pair>`` has the authors' settings of the method: alpha 2e-5, 65 % hidden, neck and head
inherited, of RepPoints the maps before the neck's group norm; from two-stage teachers 5e-7, 45 %, P2 to P5, nothing
inherited; of SOLO, which has no boxes, P2 to P5 too; gradients clipped at 35, schedule 2x, SOLO's 1x.
``docs/papers.md`` has what they report of which pair; the other pairs are our extrapolation. On a host with 8 GPUs or 8
TPU chips, with ``coco/2017`` prepared and the two files that the pair names (see ``kdjax/pairs.py``):

    python -m kdjax.main --config=configs/mgd.py:retinanet_x101_r50 --workdir=runs/mgd_coco
        --config.teacher.weights=retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth
        --config.student.weights=resnet50-0676ba61.pth

On Cityscapes, ``configs/mgd.py:pspnet_r101_r18`` and ``:pspnet_r101_deeplabv3_r18`` have the authors' settings of
segmentation (``kdjax/cityscapes.py``): the map of stride 8, 75 % hidden, and channel-wise distillation of the logits
beside it with weight 3. ``configs/mgd.py:segmentation`` is that on the embedded data.

On ImageNet, ``configs/mgd.py:resnet34_resnet18`` and ``:resnet50_mobilenetv1`` have the authors' settings of
classification (``kdjax/imagenet.py``): the last map, 15 % of its channels hidden in each image, alpha 7e-5.
``configs/mgd.py:classification`` is that on the embedded data, whose images show one object each.
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import finish
from kdjax.variants import start


def get_config(variant: str = "shapes") -> ConfigDict:
    """MGD on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    student = config.student
    student.methods.mgd = mgd = method_config("mgd")
    if config.task == "segmentation":
        mgd.update(mask_ratio=0.75, levels=("c5",))
        student.methods.cwd = method_config("cwd")
        student.loss_weights.update(mgd=2e-5, cwd=3.0)
        student.method_share = 1.0 if pair is None else 0.0
    elif config.task == "classification":
        mgd.update(mask="channel", mask_ratio=0.15, levels=("c5",))
        student.loss_weights.mgd = 7e-5
        student.method_share = 1.0 if pair is None else 0.0
    elif pair is None:
        # A sum over positions and channels, which grows with the teacher's features: how large it is besides the
        # student's own loss differs from data to data by a factor of a hundred, and is what counts.
        student.loss_weights.mgd = 2e-5
        student.method_share = 3.0
        student.inherit = ("neck", "head")
    elif pair.teacher.two_stage:
        mgd.mask_ratio = 0.45
        student.loss_weights.mgd = 5e-7
        student.optimizer.clip_norm = 35.0
    else:
        student.loss_weights.mgd = 2e-5
        student.inherit = ("neck", "head")
        student.optimizer.clip_norm = 35.0
        if student.model.name == "reppoints":
            # Its neck has group norms, and the authors' hooks are before them.
            config.teacher.model.head.before_norm = student.model.head.before_norm = True
    if student.model.get("neck", {}).get("extra_from") == "pool":
        # P6 is every second position of P5.
        mgd.levels = ("p2", "p3", "p4", "p5")
    return finish(config, variant)
