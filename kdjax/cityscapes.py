"""Pairs of teacher and student on Cityscapes, and the embedded label maps: ``--config=configs/<method>.py:<pair>``.

MGD's pairs are MMSegmentation's networks, MasKD's are those of its own code, which comes from CIRKD. As of the pairs on
COCO, nothing is downloaded: each names the files that it expects, and the data are ``cityscapes:<folder>``.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kdjax.config import base_stage

Model = dict[str, Any]

STEPS = 40_000
"""Of every schedule here, with 16 images each."""

_MMSEG = {"average_over": "all", "drop": "channels"}
_CIRKD = {"average_over": "labelled", "drop": "elements", "align_corners": True}


def _mmseg(name: str, depth: int, channels: int, auxiliary: int) -> Model:
    backbone = {"depth": depth, "stem": "v1c", "output_stride": 8}
    return {
        "name": name,
        "backbone": backbone,
        "head": {"channels": channels, "auxiliary_channels": auxiliary, **_MMSEG},
    }


def _cirkd(name: str, depth: int, channels: int, auxiliary: int) -> Model:
    backbone = {"depth": depth, "stem": "v1s", "output_stride": 8}
    if depth == 18:
        backbone["dilate_second"] = True
    own = {"projection": True} if name == "deeplabv3" else {}
    head = {"channels": channels, "auxiliary_channels": auxiliary, **own, **_CIRKD}
    # It subtracts the mean of ImageNet's blue, green and red, and divides by nothing.
    pixels = {"pixel_mean": (122.67891434, 116.66876762, 104.00698793), "pixel_std": (1.0, 1.0, 1.0)}
    return {"name": name, "backbone": backbone, "head": head, **pixels}


class Pair(NamedTuple):
    """A teacher and a student of one family."""

    source: str
    """Of their files, a key of ``kdjax.weights.SOURCES``: "mmseg" or "cirkd"."""
    teacher: Model
    teacher_file: str
    miou: float
    """Of the teacher on the validation set, as its publisher states it."""
    student: Model
    student_file: str
    """Of its backbone, trained on ImageNet."""
    weight_decay: float = 5e-4


_PSPNET_R101 = _mmseg("pspnet", 101, 512, 256)
_PSPNET_FILE = "pspnet_r101-d8_512x1024_40k_cityscapes_20200604_232751-467e7cf4.pth"
_DEEPLAB_R101 = _cirkd("deeplabv3", 101, 256, 256)
_DEEPLAB_FILE = "deeplabv3_resnet101_citys_best_model.pth"
_MOBILENET = {
    "name": "deeplabv3_mobilenet_v2",
    "head": {"channels": 128, "auxiliary_channels": 0, "projection": True, **_CIRKD},
    "pixel_mean": _DEEPLAB_R101["pixel_mean"],
    "pixel_std": _DEEPLAB_R101["pixel_std"],
}

PAIRS: dict[str, Pair] = {
    "pspnet_r101_r18": Pair(
        "mmseg", _PSPNET_R101, _PSPNET_FILE, 78.34, _mmseg("pspnet", 18, 128, 64), "resnet18_v1c-b5776b93.pth"
    ),
    "pspnet_r101_deeplabv3_r18": Pair(
        "mmseg", _PSPNET_R101, _PSPNET_FILE, 78.34, _mmseg("deeplabv3", 18, 128, 64), "resnet18_v1c-b5776b93.pth"
    ),
    "deeplabv3_r101_r18": Pair(
        "cirkd", _DEEPLAB_R101, _DEEPLAB_FILE, 78.07, _cirkd("deeplabv3", 18, 128, 64), "resnet18-imagenet.pth"
    ),
    "deeplabv3_r101_pspnet_r18": Pair(
        "cirkd", _DEEPLAB_R101, _DEEPLAB_FILE, 78.07, _cirkd("pspnet", 18, 128, 64), "resnet18-imagenet.pth"
    ),
    "deeplabv3_r101_mobilenetv2": Pair(
        "cirkd", _DEEPLAB_R101, _DEEPLAB_FILE, 78.07, _MOBILENET, "mobilenetv2-imagenet.pth", weight_decay=2e-4
    ),
}
"""Every pair by the name of its variant."""

VARIANTS = ("segmentation", *PAIRS)
"""Those of every config that knows label maps, "segmentation" on the embedded ones; with ":tiny" behind it, too."""


def set_pair(config: ConfigDict, pair: Pair) -> None:
    """Gives the base config the data and the stages of a pair."""
    config.data.update(
        name="cityscapes:cityscapes",
        image_size=(1024, 2048),
        crop=(512, 512) if pair.source == "mmseg" else (512, 1024),
        jitter=(0.5, 2.0),
        resize="mmdet",
        threads=16,
    )
    if pair.source == "mmseg":
        config.data.update(cat_max_ratio=0.75, photometric=True)
    else:
        config.data.jitter_steps = 16
    config.eval_batch_size = 8
    config.teacher = _stage(pair, pair.teacher)
    config.teacher.update(weights=pair.teacher_file, source=pair.source, published=pair.miou, steps=0)
    config.student = _stage(pair, pair.student)
    config.student.update(weights=pair.student_file, source=pair.source, teacher="teacher", steps=STEPS)
    config.student.optimizer.weight_decay = pair.weight_decay


def set_embedded(config: ConfigDict) -> None:
    """A PSPNet and a small one on the scenes of the embedded data."""
    config.data.name = "shapes/maps"
    for name, width, channels in (("teacher", 0.25, 64), ("student", 0.125, 16)):
        model = {
            "name": "pspnet",
            "backbone": {"depth": 18, "width": width, "output_stride": 8},
            "head": {"channels": channels, "auxiliary_channels": 0},
        }
        stage = base_stage(ConfigDict(model))
        stage.loss_weights = ConfigDict()
        stage.update(steps=1000 if name == "teacher" else 500, eval_every=250)
        # From nothing, by Adam it learns to say "background" for half of the steps that there are.
        stage.optimizer.update(
            name="sgd", learning_rate=0.1, schedule="poly", final_factor=0.01, warmup_steps=50, weight_decay=5e-4
        )
        config[name] = stage
    config.student.teacher = "teacher"


def _stage(pair: Pair, model: Model) -> ConfigDict:
    """A stage with the optimiser of the pair's family."""
    stage = base_stage(ConfigDict(model))
    stage.loss_weights = ConfigDict({"auxiliary": 0.4} if model["head"]["auxiliary_channels"] else {})
    stage.update(batch_size=16, base_batch=16, checkpoint_every=1000, log_every=50, eval_every=4000)
    rate = 0.01 if pair.source == "mmseg" else 0.02
    stage.optimizer.update(
        name="sgd",
        learning_rate=rate,
        schedule="poly",
        final_factor=1e-4 / rate,
        power=0.9,
        warmup_steps=0,
        momentum=0.9,
        weight_decay=5e-4,
        decay_norm_and_bias=True,
        clip_norm=0.0,
    )
    return stage
