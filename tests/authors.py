"""What the authors' own files say of the pairs that kdjax has a variant for.

``AUTHORS[method, pair][key]`` is ``(value, source)``. A source is one or more of "owner/name@commit:path:line", joined
by "; ". Keys with dots are paths of kdjax's configs, in kdjax's units (milestones are shares of the run,
``final_factor`` a share of the rate); the others are facts that kdjax has no single option for. Values are resolved:
what the file of the pair inherits is taken in, and a library's default is cited where the library states it. ``NOTES``
has remarks on keys, ``CONTRADICTIONS`` says where the authors' files disagree, ``NOT_SHIPPED`` what has no config.

Commits: MGD, MasKD and ICD are the newest of their repositories; Detectron2 is tag v0.5 and AdelaiDet 7bf9d87 (ICD's
README names both); mmcv is v1.3.17 for MGD and v1.4.0 for MasKD (their READMEs). MGD builds on MMDetection 2.19.0 and
MasKD on 2.14.0. MasKD's repository has copies of 2.14.0's configs; those that are cited for MGD are the same, byte for
byte, as in the wheel mmdet 2.19.0. A commit of open-mmlab/mmdetection or pytorch/pytorch is that of one stored version
of the file (a fork's among them), not the release's, and its line was counted by hand; for MMDetection the value on
the line was compared with the wheels of 2.14.0 and 2.19.0 and is the same there.

DMKD and DFMSD have no public code.
"""

from typing import Any

Settings = dict[str, tuple[Any, str]]

# Repositories.
_MGD = "yzd-v/MGD@2c9da0b28625"
_MASKD = "hunto/MasKD@b5af34fe343f"
_ICD = "megvii-research/ICD@acf27269648e"
_D2 = "facebookresearch/detectron2@82a57ce0b700"
_ADET = "aim-uofa/AdelaiDet@7bf9d8719098"
_MMCV13 = "open-mmlab/mmcv@add157cc73b0"
_MMCV14 = "open-mmlab/mmcv@7207397de3c2"
_MMDET = "open-mmlab/mmdetection"

# Files of MGD.
_MGD_README = f"{_MGD}:det/README.md"
_MGD_RETINA = f"{_MGD}:det/configs/distillers/mgd/retina_rx101_64x4d_distill_retina_r50_fpn_2x_coco.py"
_MGD_REPPOINTS = f"{_MGD}:det/configs/distillers/mgd/reppoints_rx101_64x4d_distill_reppoints_r50_fpn_2x_coco.py"
_MGD_CASCADE = f"{_MGD}:det/configs/distillers/mgd/cascade_mask_rcnn_rx101_32x4d_distill"
_MGD_FASTER = f"{_MGD_CASCADE}_faster_rcnn_r50_fpn_2x_coco.py"
_MGD_MASK = f"{_MGD_CASCADE}_mask_rcnn_r50_fpn_2x_coco.py"
_MGD_SOLO_FILE = f"{_MGD}:det/configs/distillers/mgd/solo_r101_ms_distill_solo_r50_coco.py"
_MGD_DISTILLER = f"{_MGD}:det/mmdet/distillation/distillers/detection_distiller.py"
_MGD_LOSS = f"{_MGD}:det/mmdet/distillation/losses/mgd.py"
_MGD_TRAIN = f"{_MGD}:det/mmdet/apis/train.py"

# Files of MMDetection that MasKD's repository has copies of.
_BASE = f"{_MASKD}:mmdetection/configs/_base_"
_SCHEDULE_1X = f"{_BASE}/schedules/schedule_1x.py"
_SCHEDULE_2X = f"{_BASE}/schedules/schedule_2x.py"
_SCHEDULE_20E = f"{_BASE}/schedules/schedule_20e.py"
_DETECTION = f"{_BASE}/datasets/coco_detection.py"
_INSTANCE = f"{_BASE}/datasets/coco_instance.py"
_MODEL_RETINA = f"{_BASE}/models/retinanet_r50_fpn.py"
_MODEL_FASTER = f"{_BASE}/models/faster_rcnn_r50_fpn.py"
_MODEL_MASK = f"{_BASE}/models/mask_rcnn_r50_fpn.py"
_RETINA_1X = f"{_MASKD}:mmdetection/configs/retinanet/retinanet_r50_fpn_1x_coco.py"
_RETINA_2X = f"{_MASKD}:mmdetection/configs/retinanet/retinanet_r50_fpn_2x_coco.py"
_FCOS_1X = f"{_MASKD}:mmdetection/configs/fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py"
_FCOS_2X = f"{_MASKD}:mmdetection/configs/fcos/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco.py"
_REPPOINTS = f"{_MASKD}:mmdetection/configs/reppoints/reppoints_moment"
_REPPOINTS_1X = f"{_REPPOINTS}_r50_fpn_1x_coco.py"
_REPPOINTS_GN = f"{_REPPOINTS}_r50_fpn_gn-neck+head_1x_coco.py"
_REPPOINTS_2X = f"{_REPPOINTS}_r50_fpn_gn-neck+head_2x_coco.py"
_REPPOINTS_X101 = f"{_REPPOINTS}_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco.py"
# And others.
_REPPOINTS_METAFILE = f"{_MMDET}@0ed37e3b9c3c:configs/reppoints/metafile.yml"
_RETINA_README = f"{_MMDET}@10e91fd224d8:configs/retinanet/README.md"
_DCN_METAFILE = f"{_MMDET}@2b813803a28a:configs/dcn/metafile.yml"
_DCN_CASCADE = f"{_MMDET}@da7301baea34:configs/dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco.py"
_CASCADE_X101 = f"{_MMDET}@2e31f39f0ef1:configs/cascade_rcnn/cascade_mask_rcnn_x101_32x4d_fpn_1x_coco.py"
_RETINA_X101 = f"{_MMDET}@082a63fe94ae:configs/retinanet/retinanet_x101_64x4d_fpn_1x_coco.py"
_SOLO_1X = f"{_MMDET}@e0590f1e4b92:configs/solo/solo_r50_fpn_1x_coco.py"
_CUSTOM = f"{_MMDET}@01a9da733d43:mmdet/datasets/custom.py"
_SMOOTH_L1 = f"{_MMDET}@030b5682a4fc:mmdet/models/losses/smooth_l1_loss.py"
_MMDET_FPN = f"{_MMDET}@0492e5c844f7:mmdet/models/necks/fpn.py"
_FCOS_HEAD = f"{_MMDET}@00d13ba3242e:mmdet/models/dense_heads/fcos_head.py"

# MMDetection's files of LD, whose authors' own have the valuable region beside the main one and other weights.
_LD_README = f"{_MMDET}@19bceba56284:configs/ld/README.md"
_LD_R18 = f"{_MMDET}@1b13f2c23435:configs/ld/ld_r18_gflv1_r101_fpn_coco_1x.py"
_LD_R50 = f"{_MMDET}@584ef842a4a9:configs/ld/ld_r50_gflv1_r101_fpn_coco_1x.py"
_LD_HEAD = f"{_MMDET}@0b4d8a4c535a:mmdet/models/dense_heads/ld_head.py:120"
_GFL_README = f"{_MMDET}@10e91fd224d8:configs/gfl/README.md"

# Files of MasKD.
_MASKD_README = f"{_MASKD}:README.md"
_TOKENS_README = f"{_MASKD}:mmdetection/README.md"
_RAZOR_README = f"{_MASKD}:mmrazor/README.md"
_KD = f"{_MASKD}:mmrazor/configs/distill/maskd"
_KD_R101 = f"{_KD}/retinanet_r101-retinanet_r50_coco.py"
_KD_X101 = f"{_KD}/retinanet_x101-retinanet_r50_coco.py"
_KD_FASTER = f"{_KD}/fpn_r101-fpn_r50_coco.py"
_KD_CASCADE = f"{_KD}/cascade_mask_rcnn_x101-fpn_x50_coco.py"
_KD_FCOS = f"{_KD}/fcos_r101-fcos_r50_coco.py"
_KD_REPPOINTS = f"{_KD}/reppoints_x101-reppoints-r50_coco.py"
_KD_SCHEDULE = f"{_MASKD}:mmrazor/configs/_base_/schedules/mmdet/schedule_2x.py"
_KD_DATA = f"{_MASKD}:mmrazor/configs/_base_/datasets/mmdet/coco_detection.py"
_KD_DISTILLER = f"{_MASKD}:mmrazor/mmrazor/models/distillers/single_teacher.py"
_KD_LOSS = f"{_MASKD}:mmrazor/mmrazor/models/losses/maskd.py"
_TOKENS = f"{_MASKD}:mmdetection/configs/maskd"
_TOKENS_R101 = f"{_TOKENS}/retinanet_r101_fpn_2x_coco.py"
_TOKENS_X101 = f"{_TOKENS}/retinanet_x101_64x4d_fpn_2x_coco.py"
_TOKENS_FASTER = f"{_TOKENS}/faster_rcnn_r101_fpn_2x_coco.py"
_TOKENS_CASCADE = f"{_TOKENS}/cascade_mask_rcnn_x101_64x4d_fpn_20e_coco.py"
_TOKENS_FCOS = f"{_TOKENS}/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco.py"
_TOKENS_REPPOINTS = f"{_TOKENS}/reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco.py"
_HOOK = f"{_MASKD}:mmdetection/maskd_hook.py"

# Files of mmcv.
_CONSTRUCTOR = "mmcv/runner/optimizer/default_constructor.py"

# Files of ICD and of what it builds on.
_ICD_README = f"{_ICD}:pytorch_release/README.md"
_ICD_BUILD = f"{_ICD}:pytorch_release/utils/build.py"
_ICD_TRAIN = f"{_ICD}:pytorch_release/train_distill.py"
_ICD_MODELS = f"{_ICD}:pytorch_release/models/models.py"
_ICD_UTILS = f"{_ICD}:pytorch_release/models/utils.py"
_ICD_ATTENTION = f"{_ICD}:pytorch_release/models/layers/transformer.py"
_ICD_CONFIGS = f"{_ICD}:pytorch_release/configs"
_ICD_BASE_RETINA = f"{_ICD_CONFIGS}/Base-RetinaNet.yaml"
_ICD_BASE_RCNN = f"{_ICD_CONFIGS}/Base-RCNN-FPN.yaml"
_ICD_BASE_FCOS = f"{_ICD_CONFIGS}/Base-FCOS.yaml"
_ICD_RETINA = f"{_ICD_CONFIGS}/Distillation-ICD/retinanet_R_50_R101_icd_FPN_1x.yaml"
_ICD_FASTER = f"{_ICD_CONFIGS}/Distillation-ICD/RCNN_R_50_R101_icd_FPN_1x.yaml"
_ICD_MASK = f"{_ICD_CONFIGS}/Distillation-ICD/MaskRCNN_R_50_R101_icd_FPN_1x.yaml"
_ICD_FCOS = f"{_ICD_CONFIGS}/Distillation-ICD/FCOS_R50_R101_icd.yaml"
_ICD_FCOS_TEACHER = f"{_ICD_CONFIGS}/Teachers/FCOS_R101_2x_ms.yaml"
_DEFAULTS = f"{_D2}:detectron2/config/defaults.py"
_ZOO = f"{_D2}:detectron2/model_zoo/model_zoo.py"
_ZOO_TABLE = f"{_D2}:MODEL_ZOO.md"
_D2_FPN = f"{_D2}:detectron2/modeling/backbone/fpn.py"
_D2_SOLVER = f"{_D2}:detectron2/solver/build.py"
_D2_RETINA = f"{_D2}:detectron2/modeling/meta_arch/retinanet.py"
_ADET_DEFAULTS = f"{_ADET}:adet/config/defaults.py"
_ADET_README = f"{_ADET}:configs/FCOS-Detection/README.md"
_ADET_FCOS = f"{_ADET}:adet/modeling/fcos/fcos.py"
_ADET_OUTPUTS = f"{_ADET}:adet/modeling/fcos/fcos_outputs.py"
_ADET_FPN = f"{_ADET}:adet/modeling/backbone/fpn.py"


def _mmdet_backbone(file: str) -> Settings:
    """A ResNet-50 of torchvision whose settings stand on lines 9 to 13 of the model's file."""
    return {
        "frozen_stages": (1, f"{file}:9"),
        "batch_norm_affine": ("trained", f"{file}:10"),
        "batch_norm_statistics": ("frozen", f"{file}:11"),
        "student.model.backbone.style": ("pytorch", f"{file}:12"),
        "pretrained": ("torchvision://resnet50", f"{file}:13"),
    }


def _mmrazor_backbone(file: str) -> Settings:
    """The same, on lines 15 to 19 of MasKD's file of the pair."""
    return {
        "frozen_stages": (1, f"{file}:15"),
        "batch_norm_affine": ("trained", f"{file}:16"),
        "batch_norm_statistics": ("frozen", f"{file}:17"),
        "student.model.backbone.style": ("pytorch", f"{file}:18"),
        "pretrained": ("torchvision://resnet50", f"{file}:19"),
    }


def _mmdet_data(file: str) -> Settings:
    """Data of MMDetection's COCO files, whose lines agree."""
    return {
        "data.short_sides": ((800,), f"{file}:9"),
        "data.long_side": (1333, f"{file}:9"),
        "data.flip": (0.5, f"{file}:10"),
        "data.skip_empty": (True, f"{_CUSTOM}:65"),
        "test_short_side": (800, f"{file}:20"),
        "test_long_side": (1333, f"{file}:20"),
        "pixel_order": ("rgb", f"{file}:5"),
        "pixel_mean": ((123.675, 116.28, 103.53), f"{file}:5"),
        "pixel_std": ((58.395, 57.12, 57.375), f"{file}:5"),
    }


# One rate and one decay for all parameters: no paramwise_cfg, or one that names the teacher and the tokens alone.
def _one_rate(mmcv: str) -> Settings:
    return {
        "student.optimizer.decay_norm_and_bias": (True, f"{mmcv}:{_CONSTRUCTOR}:159"),
        "student.optimizer.decay_bias": (True, f"{mmcv}:{_CONSTRUCTOR}:158"),
        "student.optimizer.bias_rate": (1.0, f"{mmcv}:{_CONSTRUCTOR}:157"),
        "student.optimizer.clip_value": (0.0, f"{mmcv}:mmcv/runner/hooks/optimizer.py:31"),
    }


def _schedule(
    warmup: str, steps: str, runner: str, epochs: int = 24, milestones: tuple[int, ...] = (16, 22)
) -> Settings:
    """A schedule whose warm-up, milestones and length, both in epochs, stand in these files."""
    return {
        "student.optimizer.schedule": ("step", f"{warmup}:6"),
        "student.optimizer.warmup_steps": (500, f"{warmup}:8"),
        "student.optimizer.warmup_factor": (0.001, f"{warmup}:9"),
        "warmup_kind": ("linear", f"{warmup}:7"),
        "milestones_epochs": (milestones, steps),
        "student.optimizer.milestones": (tuple(x / epochs for x in milestones), steps),
        "epochs": (epochs, runner),
        "student.steps": (epochs * 7330, runner),
    }


# ---------------------------------------------------------------------------------------------------------------- MGD
_MGD_COMMON: Settings = {
    **_one_rate(_MMCV13),
    "student.model.neck.xavier": (True, f"{_MMDET_FPN}:135"),
    "student.batch_size": (16, f"{_DETECTION}:32; {_MGD_README}:20"),
    "mask": ("spatial", f"{_MGD_LOSS}:63"),
    "alignment": ("1x1 convolution only where widths differ", f"{_MGD_LOSS}:30"),
    "trained_with_student": ("the generation blocks", f"{_MGD_DISTILLER}:77; {_MGD_TRAIN}:131"),
}

_MGD_RETINANET: Settings = {
    **_mmdet_data(_DETECTION),
    **_mmdet_backbone(_MODEL_RETINA),
    **_schedule(_SCHEDULE_1X, f"{_RETINA_2X}:3", f"{_RETINA_2X}:4"),
    **_MGD_COMMON,
    "student.optimizer.name": ("sgd", f"{_RETINA_1X}:7"),
    "student.optimizer.learning_rate": (0.01, f"{_RETINA_1X}:7"),
    "student.optimizer.momentum": (0.9, f"{_RETINA_1X}:7"),
    "student.optimizer.weight_decay": (1e-4, f"{_RETINA_1X}:7"),
    "student.optimizer.clip_norm": (35.0, f"{_MGD_RETINA}:78"),
    "student.model.neck.extra_from": ("c5", f"{_MODEL_RETINA}:19"),
    "student.loss_weights.mgd": (2e-5, f"{_MGD_RETINA}:6"),
    "student.methods.mgd.mask_ratio": (0.65, f"{_MGD_RETINA}:7"),
    "student.methods.mgd.levels": (("p3", "p4", "p5", "p6", "p7"), f"{_MGD_RETINA}:12; {_MGD_RETINA}:60"),
    "student.inherit": (("neck", "head"), f"{_MGD_RETINA}:11; {_MGD_DISTILLER}:41"),
    "teacher.weights": ("retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth", f"{_MGD_RETINA}:10"),
    "teacher.published": (41.6, f"{_RETINA_README}:42"),
    "teacher.model.backbone.depth": (101, f"{_RETINA_X101}:6"),
    "teacher.model.backbone.groups": (64, f"{_RETINA_X101}:7"),
    "teacher.model.backbone.base_width": (4, f"{_RETINA_X101}:8"),
    "teacher_config": ("configs/retinanet/retinanet_x101_64x4d_fpn_1x_coco.py", f"{_MGD_RETINA}:77"),
    "baseline_ap": (37.4, f"{_MGD_README}:40"),
    "distilled_ap": (41.0, f"{_MGD_README}:40"),
}

_REPPOINTS_FILE = "reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco_20200329-f87da1ea.pth"

_MGD_REPPOINTS_X101: Settings = {
    **_mmdet_data(_DETECTION),
    **_schedule(_SCHEDULE_1X, f"{_REPPOINTS_2X}:2", f"{_REPPOINTS_2X}:3"),
    **_MGD_COMMON,
    "frozen_stages": (1, f"{_REPPOINTS_1X}:12"),
    "batch_norm_affine": ("trained", f"{_REPPOINTS_1X}:13"),
    "batch_norm_statistics": ("frozen", f"{_REPPOINTS_1X}:14"),
    "student.model.backbone.style": ("pytorch", f"{_REPPOINTS_1X}:15"),
    "pretrained": ("torchvision://resnet50", f"{_REPPOINTS_1X}:16"),
    "student.optimizer.name": ("sgd", f"{_SCHEDULE_1X}:2"),
    "student.optimizer.learning_rate": (0.01, f"{_REPPOINTS_GN}:4"),
    "student.optimizer.momentum": (0.9, f"{_SCHEDULE_1X}:2"),
    "student.optimizer.weight_decay": (1e-4, f"{_SCHEDULE_1X}:2"),
    "student.optimizer.clip_norm": (35.0, f"{_MGD_REPPOINTS}:79"),
    "student.model.neck.extra_from": ("c5", f"{_REPPOINTS_1X}:22"),
    "student.model.neck.extra_relu": (False, f"{_REPPOINTS_1X}:22"),
    "student.model.neck.norm": ("group", f"{_REPPOINTS_GN}:3"),
    "student.model.head.norm": ("group", f"{_REPPOINTS_GN}:3"),
    "student.model.head.convs": (3, f"{_REPPOINTS_1X}:30"),
    "student.model.head.point_scale": (4.0, f"{_REPPOINTS_1X}:34; {_REPPOINTS_1X}:47"),
    "student.model.head.before_norm": (True, f"{_MGD_REPPOINTS}:13"),
    "teacher.model.head.before_norm": (True, f"{_MGD_REPPOINTS}:14"),
    "student.loss_weights.mgd": (2e-5, f"{_MGD_REPPOINTS}:6"),
    "student.methods.mgd.mask_ratio": (0.65, f"{_MGD_REPPOINTS}:7"),
    "student.methods.mgd.levels": (("p3", "p4", "p5", "p6", "p7"), f"{_MGD_REPPOINTS}:13; {_MGD_REPPOINTS}:61"),
    "student.inherit": (("neck", "head"), f"{_MGD_REPPOINTS}:11; {_MGD_DISTILLER}:41"),
    "teacher.weights": (_REPPOINTS_FILE, f"{_MGD_REPPOINTS}:10"),
    "teacher.published": (44.2, f"{_REPPOINTS_METAFILE}:180"),
    "teacher.model.backbone.depth": (101, f"{_REPPOINTS_X101}:5"),
    "teacher.model.backbone.groups": (32, f"{_REPPOINTS_X101}:6"),
    "teacher.model.backbone.base_width": (4, f"{_REPPOINTS_X101}:7"),
    "teacher.model.backbone.deformable": (True, f"{_REPPOINTS_X101}:13; {_REPPOINTS_X101}:14"),
    "teacher_config": (
        "configs/reppoints/reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco.py",
        f"{_MGD_REPPOINTS}:78",
    ),
    "baseline_ap": (38.6, f"{_MGD_README}:42"),
    "distilled_ap": (42.3, f"{_MGD_README}:42"),
}


def _mgd_cascade(file: str, model: str, data: str) -> Settings:
    """From Cascade Mask R-CNN X101 with deformable convolutions."""
    return {
        **_mmdet_data(data),
        **_mmdet_backbone(model),
        **_schedule(_SCHEDULE_2X, f"{_SCHEDULE_2X}:10", f"{_SCHEDULE_2X}:11"),
        **_MGD_COMMON,
        "student.batch_size": (16, f"{data}:32; {_MGD_README}:20"),
        "student.optimizer.name": ("sgd", f"{_SCHEDULE_2X}:2"),
        "student.optimizer.learning_rate": (0.02, f"{_SCHEDULE_2X}:2"),
        "student.optimizer.momentum": (0.9, f"{_SCHEDULE_2X}:2"),
        "student.optimizer.weight_decay": (1e-4, f"{_SCHEDULE_2X}:2"),
        "reg_class_agnostic": (False, f"{model}:52"),
        "student.loss_weights.mgd": (5e-7, f"{file}:6"),
        "student.methods.mgd.mask_ratio": (0.45, f"{file}:7"),
        "student.methods.mgd.levels": (("p2", "p3", "p4", "p5"), f"{file}:11; {file}:47"),
        "student.inherit": ((), f"{_MGD_DISTILLER}:23"),
        "teacher.weights": ("cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth", f"{file}:10"),
        "teacher.published": (47.3, f"{_DCN_METAFILE}:325"),
        "teacher_mask_ap": (41.1, f"{_DCN_METAFILE}:329"),
        "teacher.model.backbone.depth": (101, f"{_CASCADE_X101}:5"),
        "teacher.model.backbone.groups": (32, f"{_CASCADE_X101}:6"),
        "teacher.model.backbone.base_width": (4, f"{_CASCADE_X101}:7"),
        "teacher_deformable": ("DCNv1, one group", f"{_DCN_CASCADE}:4"),
        "teacher_deformable_stages": (("c3", "c4", "c5"), f"{_DCN_CASCADE}:5"),
    }


_MGD_CASCADE_FASTER: Settings = {
    **_mgd_cascade(_MGD_FASTER, _MODEL_FASTER, _DETECTION),
    "student.optimizer.clip_norm": (35.0, f"{_MGD_FASTER}:64"),
    "teacher_config": (
        "configs/dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco.py",
        f"{_MGD_FASTER}:63",
    ),
    "baseline_ap": (38.4, f"{_MGD_README}:41"),
    "distilled_ap": (42.1, f"{_MGD_README}:41"),
}

_MGD_CASCADE_MASK: Settings = {
    **_mgd_cascade(_MGD_MASK, _MODEL_MASK, _INSTANCE),
    "student.optimizer.clip_norm": (35.0, f"{_MGD_MASK}:65"),
    "data.masks": (True, f"{_INSTANCE}:8"),
    "teacher_config": (
        "configs/dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco.py",
        f"{_MGD_MASK}:64",
    ),
    "baseline_mask_ap": (35.4, f"{_MGD_README}:47"),
    "distilled_mask_ap": (38.1, f"{_MGD_README}:47"),
}

_MGD_SOLO: Settings = {
    **_mmdet_data(_INSTANCE),
    **_schedule(_SCHEDULE_1X, f"{_SCHEDULE_1X}:10", f"{_SCHEDULE_1X}:11"),
    **_MGD_COMMON,
    "milestones_epochs": ((8, 11), f"{_SCHEDULE_1X}:10"),
    "student.optimizer.milestones": ((8 / 12, 11 / 12), f"{_SCHEDULE_1X}:10"),
    "epochs": (12, f"{_SCHEDULE_1X}:11"),
    "student.steps": (12 * 7330, f"{_SCHEDULE_1X}:11"),
    "data.masks": (True, f"{_INSTANCE}:8"),
    "frozen_stages": (1, f"{_SOLO_1X}:14"),
    "pretrained": ("torchvision://resnet50", f"{_SOLO_1X}:15"),
    "student.model.backbone.style": ("pytorch", f"{_SOLO_1X}:16"),
    "student.model.neck.min_level": (2, f"{_SOLO_1X}:21"),
    "student.model.neck.max_level": (6, f"{_SOLO_1X}:22"),
    "student.model.head.convs": (7, f"{_SOLO_1X}:27"),
    "student.model.head.range_scale": (96.0, f"{_SOLO_1X}:30"),
    "student.model.head.grids": ((40, 36, 24, 16, 12), f"{_SOLO_1X}:32"),
    "student.model.head.candidates": (500, f"{_SOLO_1X}:44"),
    "student.model.head.score_threshold": (0.1, f"{_SOLO_1X}:45"),
    "student.model.head.kept_score": (0.05, f"{_SOLO_1X}:47"),
    "student.model.head.sigma": (2.0, f"{_SOLO_1X}:49"),
    "student.model.head.max_detections": (100, f"{_SOLO_1X}:50"),
    "student.batch_size": (16, f"{_INSTANCE}:32; {_MGD_README}:20"),
    "student.optimizer.name": ("sgd", f"{_SOLO_1X}:53"),
    "student.optimizer.learning_rate": (0.01, f"{_SOLO_1X}:53"),
    "student.optimizer.momentum": (0.9, f"{_SCHEDULE_1X}:2"),
    "student.optimizer.weight_decay": (1e-4, f"{_SCHEDULE_1X}:2"),
    "student.optimizer.clip_norm": (35.0, f"{_MGD_SOLO_FILE}:67"),
    "student.loss_weights.mgd": (2e-5, f"{_MGD_SOLO_FILE}:6"),
    "student.methods.mgd.mask_ratio": (0.65, f"{_MGD_SOLO_FILE}:7"),
    "student.methods.mgd.levels": (("p2", "p3", "p4", "p5"), f"{_MGD_SOLO_FILE}:13; {_MGD_SOLO_FILE}:49"),
    "student.inherit": (("neck", "head"), f"{_MGD_SOLO_FILE}:11; {_MGD_DISTILLER}:41"),
    "teacher.weights": ("Solo_r101_3x.pth", f"{_MGD_SOLO_FILE}:10"),
    "teacher_config": ("configs/solo/solo_r101_fpn_3x_coco.py", f"{_MGD_SOLO_FILE}:66"),
    "baseline_mask_ap": (33.1, f"{_MGD_README}:46"),
    "distilled_mask_ap": (36.2, f"{_MGD_README}:46"),
}

# -------------------------------------------------------------------------------------------------------------- MasKD
_MASKD_COMMON: Settings = {
    **_mmdet_data(_KD_DATA),
    **_one_rate(_MMCV14),
    "student.model.neck.xavier": (True, f"{_MMDET_FPN}:135"),
    **_schedule(_KD_SCHEDULE, f"{_KD_SCHEDULE}:10", f"{_KD_SCHEDULE}:11"),
    "student.batch_size": (16, f"{_KD_DATA}:32; {_MASKD_README}:28"),
    "student.optimizer.name": ("sgd", f"{_KD_SCHEDULE}:2"),
    "student.optimizer.learning_rate": (0.02, f"{_KD_SCHEDULE}:2"),
    "student.optimizer.momentum": (0.9, f"{_KD_SCHEDULE}:2"),
    "student.optimizer.weight_decay": (1e-4, f"{_KD_SCHEDULE}:2"),
    "student.optimizer.clip_norm": (0.0, f"{_KD_SCHEDULE}:3"),
    "alignment": ("1x1 convolution at every level, also at equal widths", f"{_KD_DISTILLER}:105"),
    "masks_of_student": ("without gradient, multiplied in from the warm-up's end", f"{_KD_LOSS}:118"),
}


def _maskd(file: str, tokens: int, warmup: int, weight: int, align: int) -> Settings:
    """What MasKD's files state alike: the method's options, by the lines on which they do."""
    steps, share = {
        _KD_R101: (7000, 7.0),
        _KD_X101: (8500, 7.0),
        _KD_FASTER: (7330, 1.0),
        _KD_CASCADE: (5000, 1.0),
        _KD_FCOS: (5000, 10.0),
        _KD_REPPOINTS: (5000, 10.0),
    }[file]
    return {
        "student.methods.maskd.tokens": (6, f"{file}:{tokens}"),
        "student.methods.maskd.weighted": (True, f"{file}:{tokens + 1}"),
        "customised_masks": (True, f"{file}:{tokens + 2}"),
        "student.methods.maskd.warmup_steps": (steps, f"{file}:{warmup}"),
        "student.loss_weights.maskd": (share, f"{file}:{weight}"),
        "student.methods.maskd.levels": (
            ("p2", "p3", "p4", "p5", "p6") if file in (_KD_FASTER, _KD_CASCADE) else ("p3", "p4", "p5", "p6", "p7"),
            f"{file}:{tokens - 1}; {file}:{align}",
        ),
    }


def _tokens(file: str, number: int, checkpoint: int, runner: int) -> Settings:
    """The stage that learns the tokens; its optimiser stands two lines below its runner."""
    return {
        "tokens.steps": (2000, f"{file}:{runner}"),
        "tokens.batch_size": (16, f"{_DETECTION}:32; {_TOKENS_README}:20"),
        "tokens.optimizer.schedule": ("cosine", f"{file}:{runner + 1}; {_MMCV14}:mmcv/runner/iter_based_runner.py:262"),
        "tokens.optimizer.final_factor": (1e-4, f"{file}:{runner + 1}; {file}:{runner + 2}"),
        "tokens.optimizer.warmup_steps": (0, f"{file}:{runner + 1}"),
        "tokens.optimizer.name": ("adam", f"{file}:{runner + 2}"),
        "tokens.optimizer.learning_rate": (0.01, f"{file}:{runner + 2}"),
        "tokens.optimizer.weight_decay": (1e-3, f"{file}:{runner + 2}"),
        "tokens.optimizer.decay_norm_and_bias": (True, f"{file}:{runner + 2}; {_HOOK}:84"),
        "tokens.optimizer.momentum": (0.9, f"{_ADAM}:96"),
        "tokens.optimizer.beta2": (0.999, f"{_ADAM}:96"),
        "tokens.optimizer.clip_norm": (0.0, f"{_SCHEDULE_1X}:3"),
        "tokens.methods.maskd_tokens.tokens": (6, f"{file}:{number}"),
        "tokens.methods.maskd_tokens.weighted": (True, f"{file}:{number + 1}"),
        "tokens_short_sides": ((800,), f"{_DETECTION}:9"),
        "tokens_long_side": (1333, f"{_DETECTION}:9"),
        "tokens_trained": ("tokens and the convolutions of their weights alone", f"{_HOOK}:70; {_HOOK}:84"),
        "tokens_batch_norm_statistics": ("frozen", f"{_HOOK}:56"),
        "tokens_term_weight": (1.0, f"{_HOOK}:50"),
        "tokens_teacher_weights": (_TEACHERS[file], f"{file}:{checkpoint}"),
    }


_ADAM = "pytorch/pytorch@005941ebcd15:torch/optim/adam.py"
_ADAMW = "pytorch/pytorch@002d2f0bb40c:torch/optim/adamw.py"

_RETINA_R101_FILE = "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth"
_RETINA_X101_FILE = "retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth"
_FASTER_R101_FILE = "faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth"
_CASCADE_FILE = "cascade_mask_rcnn_x101_64x4d_fpn_20e_coco_20200512_161033-bdb5126a.pth"
_FCOS_R101_FILE = "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth"
_TEACHERS = {
    _TOKENS_R101: _RETINA_R101_FILE,
    _TOKENS_X101: "retinanet_x101_64x4d_fpn_2x_coco_20200131-bca068ab.pth",
    _TOKENS_FASTER: _FASTER_R101_FILE,
    _TOKENS_CASCADE: _CASCADE_FILE,
    _TOKENS_FCOS: _FCOS_R101_FILE,
    _TOKENS_REPPOINTS: _REPPOINTS_FILE,
}
"""The detector that the tokens are learnt from, by the file of the stage."""

_MASKD_RETINANET_R101: Settings = {
    **_MASKD_COMMON,
    **_mmrazor_backbone(_KD_R101),
    **_maskd(_KD_R101, tokens=151, warmup=154, weight=156, align=161),
    **_tokens(_TOKENS_R101, number=11, checkpoint=19, runner=23),
    "student.optimizer.learning_rate": (0.02, f"{_KD_R101}:190"),
    "student.optimizer.momentum": (0.9, f"{_KD_R101}:190"),
    "student.optimizer.weight_decay": (1e-4, f"{_KD_R101}:190"),
    "student.optimizer.clip_norm": (35.0, f"{_KD_R101}:191"),
    "student.optimizer.warmup_steps": (1000, f"{_KD_R101}:192"),
    "student.model.neck.extra_from": ("c5", f"{_KD_R101}:25"),
    "student.inherit": (("neck", "head"), f"{_KD_R101}:27; {_KD_R101}:51"),
    "box_imitation_kind": ("l1", f"{_KD_R101}:171"),
    "box_imitation_weight": (1.0, f"{_KD_R101}:173"),
    "box_imitation_reduction": ("mean of each level, summed over levels", f"{_SMOOTH_L1}:110; {_KD_DISTILLER}:294"),
    "box_imitation_map": ("bbox_head.retina_reg", f"{_KD_R101}:167"),
    "teacher.weights": (_RETINA_R101_FILE, f"{_KD_R101}:73"),
    "teacher.published": (38.9, f"{_MASKD_README}:43"),
    "teacher.model.backbone.depth": (101, f"{_KD_R101}:76"),
    "tokens_file": ("maskd_retinanet_r101_fpn_2x_coco_20200131-5560aee8.ckpt", f"{_KD_R101}:155"),
    "baseline_ap": (37.4, f"{_MASKD_README}:43"),
    "distilled_ap": (39.9, f"{_MASKD_README}:43"),
}

_MASKD_RETINANET_X101: Settings = {
    **_MASKD_COMMON,
    **_mmrazor_backbone(_KD_X101),
    **_maskd(_KD_X101, tokens=152, warmup=156, weight=158, align=163),
    **_tokens(_TOKENS_X101, number=11, checkpoint=19, runner=23),
    "student.optimizer.learning_rate": (0.02, f"{_KD_X101}:192"),
    "student.optimizer.momentum": (0.9, f"{_KD_X101}:192"),
    "student.optimizer.weight_decay": (1e-4, f"{_KD_X101}:192"),
    "student.optimizer.clip_norm": (35.0, f"{_KD_X101}:193"),
    "student.optimizer.warmup_steps": (1000, f"{_KD_X101}:195"),
    "student.model.neck.extra_from": ("c5", f"{_KD_X101}:25"),
    "student.inherit": (("neck", "head"), f"{_KD_X101}:27; {_KD_X101}:51"),
    "box_imitation_kind": ("smooth_l1", f"{_KD_X101}:173"),
    "box_imitation_beta": (1.0, f"{_SMOOTH_L1}:60"),
    "box_imitation_weight": (1.0, f"{_KD_X101}:175"),
    "box_imitation_reduction": ("mean of each level, summed over levels", f"{_SMOOTH_L1}:60; {_KD_DISTILLER}:294"),
    "box_imitation_map": ("bbox_head.retina_reg", f"{_KD_X101}:169"),
    "teacher.weights": (_RETINA_X101_FILE, f"{_KD_X101}:73"),
    "teacher.published": (41.6, f"{_RETINA_README}:42"),
    "teacher_ap_of_readme": (41.0, f"{_MASKD_README}:51"),
    "teacher.model.backbone.depth": (101, f"{_KD_X101}:76"),
    "teacher.model.backbone.groups": (64, f"{_KD_X101}:77"),
    "teacher.model.backbone.base_width": (4, f"{_KD_X101}:78"),
    "tokens_file": (
        "maskd_retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.ckpt",
        f"{_KD_X101}:157",
    ),
    "baseline_ap": (37.4, f"{_MASKD_README}:51"),
    "distilled_ap": (41.0, f"{_MASKD_README}:51"),
}

_MASKD_FASTER: Settings = {
    **_MASKD_COMMON,
    **_mmrazor_backbone(_KD_FASTER),
    **_maskd(_KD_FASTER, tokens=240, warmup=243, weight=245, align=250),
    **_tokens(_TOKENS_FASTER, number=11, checkpoint=19, runner=23),
    "reg_class_agnostic": (False, f"{_KD_FASTER}:58"),
    "student.inherit": ((), f"{_KD_FASTER}:20"),
    "box_imitation_kind": ("smooth_l1", f"{_KD_FASTER}:266"),
    "box_imitation_beta": (1.0, f"{_SMOOTH_L1}:60"),
    "box_imitation_weight": (1.0, f"{_KD_FASTER}:268"),
    "box_imitation_reduction": ("mean over RoIs and all 320 outputs", f"{_SMOOTH_L1}:60; {_KD_FASTER}:58"),
    "box_imitation_map": ("roi_head.bbox_head.fc_reg", f"{_KD_FASTER}:256"),
    "box_imitation_rois": (
        "all that the student sampled, on the teacher's own features",
        f"{_KD_FASTER}:258; {_KD_FASTER}:262; {_KD_DISTILLER}:165",
    ),
    "rois_per_image": (512, f"{_KD_FASTER}:96"),
    "teacher.weights": (_FASTER_R101_FILE, f"{_KD_FASTER}:116"),
    "teacher.published": (39.8, f"{_MASKD_README}:42"),
    "teacher.model.backbone.depth": (101, f"{_KD_FASTER}:119"),
    "tokens_file": (
        "maskd_faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",
        f"{_KD_FASTER}:244",
    ),
    "tokens.optimizer.name": ("sgd", f"{_TOKENS_FASTER}:25; {_SCHEDULE_2X}:2"),
    "tokens.optimizer.learning_rate": (0.1, f"{_TOKENS_FASTER}:25"),
    "tokens.optimizer.momentum": (0.9, f"{_SCHEDULE_2X}:2"),
    "tokens.optimizer.weight_decay": (1e-4, f"{_SCHEDULE_2X}:2"),
    "tokens.optimizer.final_factor": (1e-5, f"{_TOKENS_FASTER}:24; {_TOKENS_FASTER}:25"),
    "tokens.optimizer.clip_norm": (0.0, f"{_SCHEDULE_2X}:3"),
    "tokens_model_depth": (50, f"{_TOKENS_FASTER}:1; {_MODEL_FASTER}:6"),
    "baseline_ap": (38.4, f"{_MASKD_README}:42"),
    "distilled_ap": (41.0, f"{_MASKD_README}:42"),
}
del _MASKD_FASTER["tokens.optimizer.beta2"]

_MASKD_CASCADE: Settings = {
    **_MASKD_COMMON,
    **_mmrazor_backbone(_KD_CASCADE),
    **_maskd(_KD_CASCADE, tokens=334, warmup=337, weight=339, align=344),
    **_tokens(_TOKENS_CASCADE, number=10, checkpoint=20, runner=24),
    "reg_class_agnostic": (True, f"{_KD_CASCADE}:58"),
    "student.inherit": ((), f"{_KD_CASCADE}:20"),
    "box_imitation_kind": ("smooth_l1", f"{_KD_CASCADE}:360"),
    "box_imitation_beta": (1.0, f"{_SMOOTH_L1}:60"),
    "box_imitation_weight": (1.0, f"{_KD_CASCADE}:362"),
    "box_imitation_reduction": ("mean over RoIs and the 4 outputs", f"{_SMOOTH_L1}:60; {_KD_CASCADE}:58"),
    "box_imitation_map": (
        "roi_head.bbox_head.fc_reg with the teacher's first stage alone",
        f"{_KD_CASCADE}:350; {_KD_CASCADE}:351; {_KD_CASCADE}:153",
    ),
    "box_imitation_rois": (
        "all that the student sampled, on the teacher's own features",
        f"{_KD_CASCADE}:352; {_KD_CASCADE}:356; {_KD_DISTILLER}:165",
    ),
    "rois_per_image": (512, f"{_KD_CASCADE}:96"),
    "teacher.weights": (_CASCADE_FILE, f"{_KD_CASCADE}:119"),
    "teacher.published": (45.6, f"{_MASKD_README}:50"),
    "teacher.model.backbone.depth": (101, f"{_KD_CASCADE}:122"),
    "teacher.model.backbone.groups": (64, f"{_KD_CASCADE}:123"),
    "teacher.model.backbone.base_width": (4, f"{_KD_CASCADE}:124"),
    "tokens_file": ("maskd_cascade_mask_rcnn_x101_64x4d_fpn_20e_coco_20220530.pth", f"{_KD_CASCADE}:338"),
    "tokens.batch_size": (16, f"{_INSTANCE}:32; {_TOKENS_README}:20"),
    "tokens.optimizer.weight_decay": (0.1, f"{_TOKENS_CASCADE}:26"),
    "tokens.optimizer.clip_norm": (0.0, f"{_SCHEDULE_20E}:3"),
    "tokens_learn_from_masks": (True, f"{_INSTANCE}:8"),
    "tokens_short_sides": ((800,), f"{_INSTANCE}:9"),
    "tokens_long_side": (1333, f"{_INSTANCE}:9"),
    "baseline_ap": (38.4, f"{_MASKD_README}:50"),
    "distilled_ap": (42.7, f"{_MASKD_README}:50"),
}

_MASKD_FCOS: Settings = {
    **_MASKD_COMMON,
    **_maskd(_KD_FCOS, tokens=148, warmup=151, weight=153, align=158),
    **_tokens(_TOKENS_FCOS, number=11, checkpoint=19, runner=23),
    "frozen_stages": (1, f"{_KD_FCOS}:15"),
    "batch_norm_affine": ("frozen", f"{_KD_FCOS}:16"),
    "batch_norm_statistics": ("frozen", f"{_KD_FCOS}:17"),
    "student.model.backbone.style": ("caffe", f"{_KD_FCOS}:18"),
    "pretrained": ("open-mmlab://detectron/resnet50_caffe", f"{_KD_FCOS}:21"),
    "student.weights": ("resnet50_caffe-788b5fa3.pth", f"{_MMCV14}:mmcv/model_zoo/open_mmlab.json:3"),
    "data.short_sides": ((640, 800), f"{_KD_FCOS}:175"),
    "data.long_side": (1333, f"{_KD_FCOS}:175"),
    "short_sides_kind": ("one of the values", f"{_KD_FCOS}:176"),
    "data.flip": (0.5, f"{_KD_FCOS}:178"),
    "test_short_side": (800, f"{_KD_FCOS}:188"),
    "test_long_side": (1333, f"{_KD_FCOS}:188"),
    "pixel_order": ("bgr", f"{_KD_FCOS}:169"),
    "pixel_mean": ((102.9801, 115.9465, 122.7717), f"{_KD_FCOS}:169"),
    "pixel_std": ((1.0, 1.0, 1.0), f"{_KD_FCOS}:169"),
    "student.batch_size": (16, f"{_KD_FCOS}:201; {_MASKD_README}:28"),
    "student.optimizer.learning_rate": (0.01, f"{_KD_FCOS}:216"),
    "student.optimizer.bias_rate": (2.0, f"{_KD_FCOS}:209; {_MMCV14}:{_CONSTRUCTOR}:195"),
    "student.optimizer.decay_bias": (False, f"{_KD_FCOS}:210; {_MMCV14}:{_CONSTRUCTOR}:214"),
    "student.optimizer.clip_norm": (35.0, f"{_KD_FCOS}:217"),
    "warmup_kind": ("linear", f"{_KD_FCOS}:222"),
    "student.optimizer.warmup_steps": (500, f"{_KD_FCOS}:223"),
    "student.optimizer.warmup_factor": (1 / 3, f"{_KD_FCOS}:224"),
    "milestones_epochs": ((16, 22), f"{_KD_FCOS}:225"),
    "student.optimizer.milestones": ((16 / 24, 22 / 24), f"{_KD_FCOS}:225"),
    "student.model.neck.extra_from": ("p5", f"{_KD_FCOS}:27"),
    "student.model.neck.extra_relu": (True, f"{_KD_FCOS}:29"),
    "student.model.head.norm_on_box": (True, f"{_KD_FCOS}:38"),
    "student.model.head.centerness_on_box": (False, f"{_KD_FCOS}:39"),
    "center_sampling": (True, f"{_KD_FCOS}:41"),
    "student.model.head.centre_radius": (1.5, f"{_FCOS_HEAD}:72"),
    "student.model.head.conv_bias": (True, f"{_KD_FCOS}:42"),
    "student.model.head.box_loss": ("giou", f"{_KD_FCOS}:43"),
    "student.model.head.iou_threshold": (0.6, f"{_KD_FCOS}:71"),
    "student.inherit": ((), f"{_KD_FCOS}:22; {_KD_FCOS}:30"),
    "box_imitation_kind": (None, f"{_KD_FCOS}:139"),
    "teacher.weights": (_FCOS_R101_FILE, f"{_KD_FCOS}:76"),
    "teacher.published": (40.8, f"{_MASKD_README}:44"),
    "teacher.model.backbone.depth": (101, f"{_KD_FCOS}:79"),
    "teacher.model.backbone.style": ("caffe", f"{_KD_FCOS}:85"),
    "tokens_file": (
        "maskd_fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco_20220530.pth",
        f"{_KD_FCOS}:152",
    ),
    "tokens.batch_size": (16, f"{_FCOS_2X}:40; {_TOKENS_README}:20"),
    "tokens.optimizer.clip_norm": (35.0, f"{_FCOS_1X}:98"),
    "tokens_short_sides": ((640, 800), f"{_FCOS_2X}:15"),
    "tokens_long_side": (1333, f"{_FCOS_2X}:15"),
    "baseline_ap": (38.5, f"{_MASKD_README}:44"),
    "distilled_ap": (42.9, f"{_MASKD_README}:44"),
}

_MASKD_REPPOINTS: Settings = {
    **_MASKD_COMMON,
    **_mmrazor_backbone(_KD_REPPOINTS),
    **_maskd(_KD_REPPOINTS, tokens=161, warmup=164, weight=166, align=171),
    **_tokens(_TOKENS_REPPOINTS, number=10, checkpoint=19, runner=23),
    "student.optimizer.learning_rate": (0.01, f"{_KD_REPPOINTS}:212"),
    "student.optimizer.momentum": (0.9, f"{_KD_REPPOINTS}:212"),
    "student.optimizer.weight_decay": (1e-4, f"{_KD_REPPOINTS}:212"),
    "student.model.neck.extra_from": ("c5", f"{_KD_REPPOINTS}:25"),
    "student.model.neck.extra_relu": (False, f"{_KD_REPPOINTS}:25"),
    "student.model.neck.norm": ("group", f"{_KD_REPPOINTS}:27"),
    "student.model.head.norm": ("group", f"{_KD_REPPOINTS}:48"),
    "student.model.head.convs": (3, f"{_KD_REPPOINTS}:34"),
    "student.model.head.point_scale": (4.0, f"{_KD_REPPOINTS}:38; {_KD_REPPOINTS}:52"),
    "student.model.head.before_norm": (False, f"{_KD_REPPOINTS}:154"),
    "student.inherit": ((), f"{_KD_REPPOINTS}:8"),
    "student.methods.box_imitation.loss": ("smooth_l1", f"{_KD_REPPOINTS}:181; {_KD_REPPOINTS}:193"),
    "student.methods.box_imitation.beta": (0.11, f"{_KD_REPPOINTS}:182; {_KD_REPPOINTS}:194"),
    "student.loss_weights.box_imitation": (0.2, f"{_KD_REPPOINTS}:184"),
    "box_imitation_kind": ("smooth_l1", f"{_KD_REPPOINTS}:181"),
    "box_imitation_weight_initial": (0.1, f"{_KD_REPPOINTS}:196"),
    "box_imitation_reduction": ("mean of each level, summed over levels", f"{_SMOOTH_L1}:60; {_KD_DISTILLER}:294"),
    "box_imitation_map": (
        "bbox_head.reppoints_pts_refine_out and bbox_head.reppoints_pts_init_out",
        f"{_KD_REPPOINTS}:177; {_KD_REPPOINTS}:189",
    ),
    "teacher.weights": (_REPPOINTS_FILE, f"{_KD_REPPOINTS}:75"),
    "teacher.published": (44.2, f"{_MASKD_README}:52"),
    "teacher.model.backbone.depth": (101, f"{_KD_REPPOINTS}:78"),
    "teacher.model.backbone.groups": (32, f"{_KD_REPPOINTS}:79"),
    "teacher.model.backbone.base_width": (4, f"{_KD_REPPOINTS}:80"),
    "teacher.model.backbone.deformable": (True, f"{_KD_REPPOINTS}:86; {_KD_REPPOINTS}:87"),
    "tokens_file": (
        "maskd_reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck.2Bhead_2x_coco_20220530.pth",
        f"{_KD_REPPOINTS}:165",
    ),
    "baseline_ap": (38.6, f"{_MASKD_README}:52"),
    "distilled_ap": (42.5, f"{_MASKD_README}:52"),
}


# ---------------------------------------------------------------------------------------------------------------- ICD
def _icd(file: str, base: str, rate: int, sides: int, two_stage: bool) -> Settings:
    """What ICD's files of Detectron2 have in common; steps end the file, and the rate stands in its base."""
    ends = {_ICD_RETINA: 14, _ICD_FCOS: 15, _ICD_FASTER: 18, _ICD_MASK: 19}[file]
    levels = ("p2", "p3", "p4", "p5", "p6") if two_stage else ("p3", "p4", "p5", "p6", "p7")
    inputs, queries = (f"{file}:{ends - 7}", f"{file}:{ends - 6}") if two_stage else (f"{_ICD_BUILD}:201",) * 2
    return {
        "student.model.neck.xavier": (False, f"{_D2_FPN}:81"),
        "data.short_sides": ((640, 672, 704, 736, 768, 800), f"{base}:{sides}"),
        "short_sides_kind": ("one of the values", f"{_DEFAULTS}:53"),
        "data.long_side": (1333, f"{_DEFAULTS}:55"),
        "test_short_side": (800, f"{_DEFAULTS}:57"),
        "test_long_side": (1333, f"{_DEFAULTS}:59"),
        "data.flip": (0.5, f"{_DEFAULTS}:62; {_D2}:detectron2/data/transforms/augmentation_impl.py:81"),
        "data.skip_empty": (True, f"{_DEFAULTS}:120"),
        "pixel_order": ("bgr", f"{_DEFAULTS}:78"),
        "pixel_mean": ((103.53, 116.28, 123.675), f"{_DEFAULTS}:38"),
        "pixel_std": ((1.0, 1.0, 1.0), f"{_DEFAULTS}:42"),
        "frozen_stages": (1, f"{_DEFAULTS}:131"),
        "batch_norm_affine": ("frozen", f"{_DEFAULTS}:474"),
        "batch_norm_statistics": ("frozen", f"{_DEFAULTS}:474"),
        "student.model.backbone.style": ("caffe", f"{_DEFAULTS}:482"),
        "student.model.backbone.depth": (50, f"{file}:{6 if file == _ICD_MASK else 5}"),
        "pretrained": ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", f"{file}:3"),
        "student.batch_size": (16, f"{base}:{rate - 1}"),
        "student.steps": (90000, f"{file}:{ends + 1}"),
        "milestones_steps": ((60000, 80000), f"{file}:{ends}"),
        "student.optimizer.milestones": ((60000 / 90000, 80000 / 90000), f"{file}:{ends}; {file}:{ends + 1}"),
        "student.optimizer.schedule": ("step", f"{_DEFAULTS}:508"),
        "student.optimizer.name": ("sgd", f"{_ICD_BUILD}:147"),
        "student.optimizer.learning_rate": (0.02 if two_stage else 0.01, f"{base}:{rate}"),
        "student.optimizer.momentum": (0.9, f"{_DEFAULTS}:514"),
        "student.optimizer.weight_decay": (1e-4, f"{_DEFAULTS}:518"),
        "student.optimizer.decay_norm_and_bias": (True, f"{_ICD_BUILD}:40; {_ICD_BUILD}:44"),
        "student.optimizer.decay_bias": (True, f"{_ICD_BUILD}:40; {_ICD_BUILD}:44"),
        "student.optimizer.bias_rate": (1.0, f"{_ICD_BUILD}:38; {_ICD_BUILD}:43"),
        "student.optimizer.warmup_steps": (1000, f"{_DEFAULTS}:528"),
        "student.optimizer.warmup_factor": (0.001, f"{_DEFAULTS}:527"),
        "warmup_kind": ("linear", f"{_DEFAULTS}:529"),
        "student.optimizer.clip_value": (1.0, f"{file}:{ends + 2}; {_DEFAULTS}:561; {_DEFAULTS}:563"),
        "student.optimizer.clip_norm": (0.0, f"{_ICD_TRAIN}:350; {_DEFAULTS}:561"),
        "student.inherit": (("neck", "head"), f"{_ICD_BUILD}:171; {_ICD_BUILD}:172"),
        "student.loss_weights.icd": (3.0 if two_stage else 8.0, f"{file}:{ends - 3}"),
        "student.methods.icd.levels": (levels, inputs),
        "student.methods.icd.queries": (
            100 if two_stage else 300,
            queries if two_stage else f"{_ICD_BUILD}:214",
        ),
        "student.methods.icd.heads": (8, f"{_ICD_BUILD}:222"),
        "student.methods.icd.layers": (1, f"{_ICD_BUILD}:204"),
        "student.methods.icd.temperature": (1.0, f"{_ICD_BUILD}:240; {_ICD}:pytorch_release/models/distiller.py:184"),
        "student.methods.icd.warmup_steps": (1000, f"{_ICD_BUILD}:152; {_ICD_MODELS}:51"),
        "query_width": (256, f"{_ICD_BUILD}:223"),
        "fake_queries_per_object": (5.0, f"{_ICD_BUILD}:212; {_ICD_UTILS}:323"),
        "query_point_range": (0.3, f"{_ICD_BUILD}:247"),
        "dropout": (0.0, f"{_ICD_BUILD}:216"),
        "distills_fake_queries": (False, f"{_ICD_BUILD}:244"),
        "loss_form": ("mse", f"{_ICD_BUILD}:246"),
        "value_norm": ("layer norm", f"{_ICD_BUILD}:195"),
        "attention_init": ("xavier uniform over the packed projection, biases 0", f"{_ICD_ATTENTION}:369"),
        "student.methods.icd.optimizer.name": ("adamw", f"{_ICD_BUILD}:259"),
        "student.methods.icd.optimizer.learning_rate": (1e-4, f"{_ICD_BUILD}:264"),
        "student.methods.icd.optimizer.weight_decay": (1e-4, f"{_ICD_BUILD}:268"),
        "student.methods.icd.optimizer.decay_norm_and_bias": (True, f"{_ICD_BUILD}:40; {_ICD_BUILD}:44"),
        "student.methods.icd.optimizer.momentum": (0.9, f"{_ADAMW}:18"),
        "student.methods.icd.optimizer.beta2": (0.999, f"{_ADAMW}:18"),
        "student.methods.icd.optimizer.schedule": ("cosine", f"{_ICD_BUILD}:261"),
        "student.methods.icd.optimizer.final_factor": (0.0, f"{_D2_SOLVER}:242"),
        "student.methods.icd.optimizer.warmup_steps": (10, f"{_ICD_BUILD}:279"),
        "student.methods.icd.optimizer.warmup_factor": (1.0, f"{_ICD_BUILD}:278"),
        "student.methods.icd.optimizer.clip_norm": (0.01, f"{_ICD_BUILD}:295; {_ICD_BUILD}:297; {_ICD_TRAIN}:355"),
        "auxiliary_steps": (90000, f"{_ICD_TRAIN}:408; {_ICD_BUILD}:156"),
        "teacher.model.backbone.depth": (101, _ICD_DEPTH[file]),
        "teacher.model.backbone.style": ("caffe", f"{_DEFAULTS}:482"),
    }


_ICD_DEPTH = {
    _ICD_RETINA: f"{_D2}:configs/COCO-Detection/retinanet_R_101_FPN_3x.yaml:5",
    _ICD_FASTER: f"{_D2}:configs/COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml:6",
    _ICD_MASK: f"{_D2}:configs/COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml:6",
    _ICD_FCOS: f"{_ICD_FCOS_TEACHER}:5",
}
"""Where the depth of the teacher stands."""

_ICD_RETINANET: Settings = {
    **_icd(_ICD_RETINA, _ICD_BASE_RETINA, rate=20, sides=25, two_stage=False),
    "student.model.neck.extra_from": ("c5", f"{_D2_FPN}:196; {_D2_FPN}:252"),
    "student.model.neck.extra_relu": (True, f"{_D2_FPN}:207"),
    "box_loss": ("l1", f"{_ICD_BASE_RETINA}:14"),
    "loss_normaliser": (
        "moving average of the number of positives, 0.9, from 100",
        f"{_D2_RETINA}:154; {_D2_RETINA}:155",
    ),
    "teacher_config": ("COCO-Detection/retinanet_R_101_FPN_3x.yaml", f"{_ICD_RETINA}:8"),
    "teacher.weights": ("190397697/model_final_971ab9.pkl", f"{_ZOO}:35"),
    "teacher.published": (40.4, f"{_ZOO_TABLE}:246"),
    "baseline_ap": (37.4, f"{_ICD_README}:162"),
    "distilled_ap": (40.7, f"{_ICD_README}:162"),
}

_ICD_FASTER_RCNN: Settings = {
    **_icd(_ICD_FASTER, _ICD_BASE_RCNN, rate=37, sides=44, two_stage=True),
    "reg_class_agnostic": (False, f"{_DEFAULTS}:312"),
    "box_loss": ("l1", f"{_DEFAULTS}:296"),
    "rois_per_image": (512, f"{_DEFAULTS}:261"),
    "proposals_training": (1000, f"{_ICD_BASE_RCNN}:19"),
    "teacher_config": ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", f"{_ICD_FASTER}:8"),
    "teacher.weights": ("137851257/model_final_f6e8b1.pkl", f"{_ZOO}:30"),
    "teacher.published": (42.0, f"{_ZOO_TABLE}:187"),
    "baseline_ap": (37.9, f"{_ICD_README}:161"),
    "distilled_ap": (40.9, f"{_ICD_README}:161"),
}

_ICD_MASK_RCNN: Settings = {
    **_icd(_ICD_MASK, _ICD_BASE_RCNN, rate=37, sides=44, two_stage=True),
    "data.masks": (True, f"{_ICD_MASK}:4"),
    "reg_class_agnostic": (False, f"{_DEFAULTS}:312"),
    "box_loss": ("l1", f"{_DEFAULTS}:296"),
    "rois_per_image": (512, f"{_DEFAULTS}:261"),
    "proposals_training": (1000, f"{_ICD_BASE_RCNN}:19"),
    "teacher_config": ("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml", f"{_ICD_MASK}:9"),
    "teacher.weights": ("138205316/model_final_a3ec72.pkl", f"{_ZOO}:49"),
    "teacher.published": (42.9, f"{_ZOO_TABLE}:420"),
    "teacher_mask_ap": (38.6, f"{_ZOO_TABLE}:421"),
    "baseline_ap": (38.6, f"{_ICD_README}:168"),
    "distilled_ap": (41.2, f"{_ICD_README}:168"),
    "baseline_mask_ap": (35.2, f"{_ICD_README}:168"),
    "distilled_mask_ap": (37.4, f"{_ICD_README}:168"),
}

_ICD_FCOS_R101: Settings = {
    **_icd(_ICD_FCOS, _ICD_BASE_FCOS, rate=17, sides=21, two_stage=False),
    "student.model.neck.extra_from": ("p5", f"{_ADET_DEFAULTS}:31; {_ADET_FPN}:75"),
    "student.model.neck.extra_relu": (True, f"{_ADET_FPN}:31"),
    "student.model.head.norm_on_box": (True, f"{_ADET_OUTPUTS}:148; {_ADET_FCOS}:232"),
    "student.model.head.centerness_on_box": (True, f"{_ADET_FCOS}:227"),
    "center_sampling": (True, f"{_ADET_DEFAULTS}:64"),
    "student.model.head.centre_radius": (1.5, f"{_ADET_DEFAULTS}:65"),
    "student.model.head.conv_bias": (True, f"{_ADET_FCOS}:161"),
    "student.model.head.box_loss": ("giou", f"{_ADET_DEFAULTS}:66"),
    "student.model.head.iou_threshold": (0.6, f"{_ADET_DEFAULTS}:26"),
    "box_quality": ("centerness", f"{_ADET_DEFAULTS}:39"),
    "teacher_config": ("Teachers/FCOS_R101_2x_ms.yaml", f"{_ICD_FCOS}:8"),
    "teacher.weights": ("https://cloudstor.aarnet.edu.au/plus/s/M3UOT6JcyHy2QW1/download", f"{_ICD_FCOS_TEACHER}:3"),
    "teacher.published": (43.1, f"{_ADET_README}:26"),
    "baseline_ap": (39.4, f"{_ICD_README}:163"),
    "distilled_ap": (42.9, f"{_ICD_README}:163"),
}

# ----------------------------------------------------------------------------------------------------------------- LD
_LD_COMMON: Settings = {
    **_mmdet_data(_DETECTION),
    **_one_rate(_MMCV13),
    **_schedule(_SCHEDULE_1X, f"{_SCHEDULE_1X}:10", f"{_SCHEDULE_1X}:11", epochs=12, milestones=(8, 11)),
    "student.batch_size": (16, f"{_DETECTION}:32; {_LD_R18}:62"),
    "student.optimizer.name": ("sgd", f"{_LD_R18}:62"),
    "student.optimizer.learning_rate": (0.01, f"{_LD_R18}:62"),
    "student.optimizer.momentum": (0.9, f"{_LD_R18}:62"),
    "student.optimizer.weight_decay": (1e-4, f"{_LD_R18}:62"),
    "student.optimizer.clip_norm": (0.0, f"{_SCHEDULE_1X}:3"),
    "student.model.name": ("gfl", f"{_LD_R18}:28"),
    "student.model.neck.extra_from": ("p5", f"{_LD_R18}:25"),
    "student.model.neck.extra_relu": (False, f"{_LD_R18}:20"),
    "student.model.neck.xavier": (True, f"{_MMDET_FPN}:135"),
    "student.model.head.convs": (4, f"{_LD_R18}:31"),
    "student.model.head.anchor_scale": (8.0, f"{_LD_R18}:36"),
    "student.model.head.iou_threshold": (0.6, f"{_LD_R18}:59"),
    "student.methods.ld.temperature": (10.0, f"{_LD_R18}:46"),
    # The mean over images here is half of the sum over the two images of each device there.
    "student.loss_weights.ld": (2 * 0.25, f"{_LD_R18}:46; {_LD_HEAD}; {_DETECTION}:32"),
    "region": ("main", _LD_HEAD),
    "student.inherit": ((), f"{_LD_R18}:8; {_LD_R18}:20"),
    "teacher.weights": ("gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth", f"{_LD_R18}:5"),
    "teacher.published": (44.7, f"{_GFL_README}:21"),
    "teacher.model.name": ("gfl", f"{_LD_R18}:9"),
    "teacher.model.backbone.depth": (101, f"{_LD_R18}:9"),
}
_LD_GFL_R18: Settings = {
    **_LD_COMMON,
    "frozen_stages": (1, f"{_LD_R18}:16"),
    "batch_norm_affine": ("trained", f"{_LD_R18}:17"),
    "batch_norm_statistics": ("frozen", f"{_LD_R18}:18"),
    "student.model.backbone.style": ("pytorch", f"{_LD_R18}:19"),
    "student.model.backbone.depth": (18, f"{_LD_R18}:13"),
    "pretrained": ("torchvision://resnet18", f"{_LD_R18}:8"),
    "baseline_ap": (35.8, f"{_LD_README}:21"),
    "distilled_ap": (36.5, f"{_LD_README}:22"),
}
_LD_GFL_R50: Settings = {
    **_LD_COMMON,
    "frozen_stages": (1, f"{_LD_R50}:8"),
    "batch_norm_affine": ("trained", f"{_LD_R50}:9"),
    "batch_norm_statistics": ("frozen", f"{_LD_R50}:10"),
    "student.model.backbone.style": ("pytorch", f"{_LD_R50}:11"),
    "student.model.backbone.depth": (50, f"{_LD_R50}:5"),
    "pretrained": ("torchvision://resnet50", f"{_LD_R50}:12"),
    "baseline_ap": (40.1, f"{_LD_README}:25"),
    "distilled_ap": (41.0, f"{_LD_README}:26"),
}

AUTHORS: dict[tuple[str, str], Settings] = {
    ("mgd", "retinanet_x101_r50"): _MGD_RETINANET,
    ("mgd", "reppoints_x101_r50"): _MGD_REPPOINTS_X101,
    ("mgd", "cascade_mask_rcnn_x101_faster_rcnn_r50"): _MGD_CASCADE_FASTER,
    ("mgd", "cascade_mask_rcnn_x101_mask_rcnn_r50"): _MGD_CASCADE_MASK,
    ("mgd", "solo_r101_r50"): _MGD_SOLO,
    ("maskd", "retinanet_r101_r50"): _MASKD_RETINANET_R101,
    ("maskd", "retinanet_x101_r50"): _MASKD_RETINANET_X101,
    ("maskd", "faster_rcnn_r101_r50"): _MASKD_FASTER,
    ("maskd", "cascade_mask_rcnn_x101_faster_rcnn_r50"): _MASKD_CASCADE,
    ("maskd", "fcos_r101_r50"): _MASKD_FCOS,
    ("maskd", "reppoints_x101_r50"): _MASKD_REPPOINTS,
    ("icd", "icd retinanet_r101_r50"): _ICD_RETINANET,
    ("icd", "icd faster_rcnn_r101_r50"): _ICD_FASTER_RCNN,
    ("icd", "icd mask_rcnn_r101_r50"): _ICD_MASK_RCNN,
    ("icd", "icd fcos_r101_r50"): _ICD_FCOS_R101,
    ("ld", "gfl_r101_r18"): _LD_GFL_R18,
    ("ld", "gfl_r101_r50"): _LD_GFL_R50,
}
"""Settings by kdjax's method and pair. ICD's pairs, with Detectron2's files, are none of kdjax's: "icd <pair>"."""

NOT_SHIPPED: dict[str, str] = {
    "mgd": "only RetinaNet, RepPoints, SOLO and the two students of Cascade Mask R-CNN (FCOS is not among them)",
    "maskd": "only the six above; no Mask R-CNN student, no R50 -> R18, no heterogeneous pair",
    "icd": "PyTorch: the four above, SOLOv2, CondInst; MegEngine: RetinaNet, FCOS, ATSS, with other teachers",
    "dmkd": "no public code",
    "dfmsd": "no public code",
}

NOTES: dict[str, str] = {
    "student.steps": "derived: MMDetection counts epochs, here 24 of 7330 iterations, which is what COCO's images with "
    "objects give in batches of 16. No file states 7330 as a length; MasKD's fpn_r101-fpn_r50_coco.py:243 has it as "
    "the method's warm-up. ICD's is Detectron2's number of iterations",
    "student.batch_size": "2 images on each of 8 GPUs. LD's rate is that of batches of 16; its table says mini-batches "
    "of 6, without the rate that they had",
    "student.optimizer.bias_rate": "MasKD's FCOS: biases of group norm are no biases to mmcv; they keep rate and decay",
    "student.optimizer.clip_norm": "mmcv clips by the norm of all gradients of the model. MasKD's frozen tokens have "
    "gradients, which count, and a rate of 0; MGD's generation blocks count too",
    "student.optimizer.clip_value": "ICD: every entry of a gradient to within 1, since the type's default is 'value'",
    "student.optimizer.decay_norm_and_bias": "ICD builds its optimiser itself, and Detectron2's WEIGHT_DECAY_NORM of 0 "
    "is not read: FCOS's group norm decays",
    "student.methods.icd.optimizer.warmup_steps": "of factor 1: no warm-up at all",
    "student.methods.icd.queries": "an upper limit; with n objects there are min(max(1, 6n), max(limit, n))",
    "frozen_stages": "counted as MMDetection does: the stem and the first stage. Detectron2's FREEZE_AT 2 is the same",
    "pixel_mean": "in the order of pixel_order; kdjax's is always red, green, blue",
    "pretrained": "torchvision://resnet50 is the file that the installed torchvision names",
    "tokens.optimizer.decay_norm_and_bias": "one group of parameters, which the hook fills with those of the tokens",
    "tokens.optimizer.clip_norm": "FCOS: inherited from the base file, which the stage's file does not override",
    "tokens_term_weight": "the dice terms of all levels are added to the detector's task loss as they are",
    "teacher.published": "box AP: of MGD's and of MasKD's RetinaNet X101, from MMDetection's tables; of MasKD's "
    "others, from its README; of ICD's, from Detectron2's and AdelaiDet's tables",
}

CONTRADICTIONS: tuple[tuple[str, str], ...] = (
    (
        "MasKD's README says RetinaNet-X101 (41.0), which is schedule 1x; the student's file loads mstrain_3x, 41.6",
        f"{_MASKD_README}:51; {_KD_X101}:73; {_RETINA_README}:30; {_RETINA_README}:42",
    ),
    (
        "MasKD's file for the tokens of X101 loads schedule 2x (40.8); the tokens that the student loads are, by their "
        "name, mstrain_3x's",
        f"{_TOKENS_X101}:19; {_KD_X101}:157; {_RETINA_README}:31",
    ),
    (
        "MasKD's file for the tokens of Faster R-CNN R101 inherits the R50 model and loads R101's weights into it; of "
        "the optimiser it changes the rate alone, so that it is SGD at 0.1, where the others have Adam at 0.01",
        f"{_TOKENS_FASTER}:1; {_TOKENS_FASTER}:19; {_TOKENS_FASTER}:25; {_SCHEDULE_2X}:2",
    ),
    (
        "MasKD's baseline of 38.5 is MMDetection's FCOS without the student's head changes (normalised boxes, centre "
        "sampling, GIoU, NMS at 0.6)",
        f"{_MASKD_README}:44; {_KD_FCOS}:37",
    ),
    (
        "MasKD's table calls the RepPoints teacher R101; its file is X101 with deformable convolutions",
        f"{_MASKD_README}:52; {_TOKENS_REPPOINTS}:1; {_KD_REPPOINTS}:75",
    ),
    (
        "MGD's file names the RepPoints teacher rx101_64x4d; the config and the weights that it loads are 32x4d",
        f"{_MGD_REPPOINTS}:10; {_MGD_REPPOINTS}:78; {_REPPOINTS_X101}:6",
    ),
    (
        "MasKD's files name the student x50 or X50 in 'cascade_mask_rcnn_x101-fpn_x50'; it is a ResNet-50",
        f"{_KD_CASCADE}:12",
    ),
    (
        "MGD's teacher_cfg is retinanet_x101_64x4d_fpn_1x, its weights are mstrain_3x: the architecture is the same",
        f"{_MGD_RETINA}:77; {_MGD_RETINA}:10",
    ),
    (
        "ICD's file for FCOS has a 2x teacher (43.1); the paper's figure is, it says, from another of 3x, not shipped",
        f"{_ICD_FCOS}:9; {_ADET_README}:26",
    ),
    (
        "ICD's FCOS baseline of 39.4 is, in AdelaiDet's table, that of the IoU branch at short side 800 (38.7 with "
        "centerness); ICD's file has centerness and short sides of 640 to 800",
        f"{_ICD_README}:163; {_ADET_README}:24; {_ADET_README}:35; {_ADET_DEFAULTS}:39",
    ),
    (
        "ICD's students clip, its baselines do not; until the commit before this one RetinaNet's and R-CNN's did",
        f"{_ICD_BASE_RETINA}:22; {_ICD_RETINA}:16",
    ),
)
