"""Pairs of teacher and student on ImageNet, and the embedded crops: ``--config=configs/<method>.py:<pair>``.

They are MGD's. As of the pairs on COCO, nothing is downloaded: each names the file that it expects of its teacher, and
the data are ``tfds:imagenet2012``, prepared. Students start from nothing, as the authors' do, and compute in bfloat16.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kdjax.config import base_stage
from kdjax.config.presets import IMAGE_SIZES, TEACHER_STEPS, classifier

Model = dict[str, Any]

EPOCH = 5005
"""Steps in which the training images are seen once, 256 at a time; a schedule has 100 of them."""


class Pair(NamedTuple):
    """A teacher and a student."""

    teacher: Model
    teacher_file: str
    """Of MMPretrain, MMClassification as it was called."""
    top1: float
    """Of the teacher on the validation set, as its publisher states it."""
    student: Model
    clip_norm: float = 0.0


PAIRS: dict[str, Pair] = {
    "resnet34_resnet18": Pair(
        {"name": "resnet_classifier", "backbone": {"depth": 34}},
        "resnet34_8xb32_in1k_20210831-f257d4e6.pth",
        73.62,
        {"name": "resnet_classifier", "backbone": {"depth": 18}},
    ),
    "resnet50_mobilenetv1": Pair(
        {"name": "resnet_classifier", "backbone": {"depth": 50}},
        "resnet50_8xb32_in1k_20210831-ea4938fc.pth",
        76.55,
        {"name": "mobilenet_v1"},
        clip_norm=5.0,
    ),
}
"""Every pair by the name of its variant."""

VARIANTS = ("classification", *PAIRS)
"""Those of every config that knows classes of images, "classification" on the embedded ones; each also with ":tiny"
behind it."""


def set_pair(config: ConfigDict, pair: Pair) -> None:
    """Gives the base config the data and the stages of a pair."""
    config.data.update(
        name="tfds:imagenet2012",
        image_size=(224, 224),
        short_sides=(256,),
        centre_crop=True,
        area=(0.08, 1.0),
        threads=16,
    )
    config.eval_batch_size = 256
    config.teacher = _stage(pair.teacher)
    config.teacher.update(weights=pair.teacher_file, source="mmpretrain", published=pair.top1, steps=0)
    config.student = _stage(pair.student)
    config.student.update(teacher="teacher", steps=100 * EPOCH, eval_every=EPOCH, dtype="bfloat16")
    config.student.optimizer.clip_norm = pair.clip_norm


def set_embedded(config: ConfigDict) -> None:
    """A ResNet-18 of half width and a small one on crops of the embedded scenes."""
    config.data.update(name="shapes/crops", image_size=IMAGE_SIZES["classification"])
    for name, width in (("teacher", 0.5), ("student", 0.125)):
        stage = base_stage(classifier(18, width))
        stage.loss_weights = ConfigDict()
        stage.update(steps=TEACHER_STEPS if name == "teacher" else 700, batch_size=32, base_batch=32, eval_every=350)
        stage.optimizer.learning_rate = 1e-3 if name == "teacher" else 3e-3
        config[name] = stage
    config.student.teacher = "teacher"
    config.eval_batch_size = 32


def _stage(model: Model) -> ConfigDict:
    """A stage with the optimiser that MMPretrain trains ResNets with."""
    stage = base_stage(ConfigDict(model))
    stage.loss_weights = ConfigDict()
    stage.update(batch_size=256, base_batch=256, checkpoint_every=2500, log_every=100)
    stage.optimizer.update(
        name="sgd",
        learning_rate=0.1,
        schedule="step",
        milestones=(0.3, 0.6, 0.9),
        warmup_steps=0,
        momentum=0.9,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        clip_norm=0.0,
    )
    return stage
