"""What configs start from: small detectors, a stage, the whole laptop protocol, and how any config is made tiny."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kdjax.config.schema import Data, MethodSection, Optimizer, Run, Stage, placeholder
from kdjax.methods import method_options
from kdjax.models import build_model, model_class
from kdjax.options import defaults

EVAL_EVERY = 250
"""Steps between evaluations on the embedded data: twice or thrice on the way a person sees what is learnt, for about
half a minute of ten."""

TINY_DATA = {"detection": "shapes/tiny", "segmentation": "shapes/maps/tiny", "classification": "shapes/crops/tiny"}
"""By task, what a config is tried on."""

IMAGE_SIZES = {"classification": (64, 64)}
"""By task, height and width of images of the embedded data, where they are not those of the data's defaults."""

TEACHER_STEPS = 800
"""Of a teacher on the embedded data."""


def _small(name: str, depth: int, width: float, channels: int, head: dict[str, Any], **neck: Any) -> ConfigDict:
    """Config of a detector for images of about 128 pixels, whose towers are of two convolutions.

    Args:
        name: of the detector.
        depth: of the ResNet, 18, 34, 50 or 101; 10 has half the blocks of 18.
        width: factor on the ResNet's channels.
        channels: of the feature pyramid and the heads.
        head: its options.
        **neck: the feature pyramid's.
    """
    return ConfigDict(
        dict(
            name=name,
            backbone=dict(depth=depth, width=width),
            neck=dict(channels=channels) | neck,
            head=dict(convs=2) | head,
            frozen_norm=False,
            pixel_mean=(123.675, 116.28, 103.53),
            pixel_std=(58.395, 57.12, 57.375),
        )
    )


_P3_TO_P7 = dict(min_level=3, max_level=7)
_FROM_P5 = _P3_TO_P7 | dict(extra_from="p5")


def retinanet(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of a RetinaNet for images of about 128 pixels, with smaller anchors; arguments as all presets have them.

    Args:
        depth: of the ResNet, 10, 18, 34, 50 or 101.
        width: factor on the ResNet's channels.
        channels: of the feature pyramid and the heads.
    """
    return _small("retinanet", depth, width, channels, dict(norm="group", anchor_scale=2.5), **_FROM_P5)


def fcos(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of an improved FCOS, whose levels learn smaller objects; arguments as of :func:`retinanet`."""
    head = dict(
        norm_on_box=True,
        centerness_on_box=True,
        range_scale=3.0,
        centre_radius=1.5,
        box_loss="giou",
        iou_threshold=0.6,
    )
    return _small("fcos", depth, width, channels, head, **_FROM_P5)


def gfl(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of a GFL with smaller anchors; arguments as of :func:`retinanet`."""
    return _small("gfl", depth, width, channels, dict(anchor_scale=4.0), **_FROM_P5)


def reppoints(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of a RepPoints whose levels learn smaller objects; arguments as of :func:`retinanet`."""
    return _small("reppoints", depth, width, channels, dict(point_scale=3.0), **_P3_TO_P7)


def solo(depth: int, width: float, channels: int = 64) -> ConfigDict:
    """Config of a SOLO with fewer cells, whose levels learn smaller objects; arguments as of :func:`retinanet`."""
    head = dict(grids=(16, 12, 8, 6, 4), range_scale=32.0)
    return _small("solo", depth, width, channels, head, min_level=2, max_level=6, extra_from="pool")


class Small(NamedTuple):
    """A detector on the embedded data."""

    preset: Callable[..., ConfigDict]
    """From the arguments of :func:`retinanet` to its model."""
    teacher_steps: int = TEACHER_STEPS
    loss_weights: Mapping[str, float] = {}
    """Of terms that do not weigh 1."""


SMALL_DETECTORS: Mapping[str, Small] = {
    "retinanet": Small(retinanet),
    "fcos": Small(fcos),
    "gfl": Small(gfl),
    # These have learnt little after as many steps as the others.
    "reppoints": Small(reppoints, teacher_steps=1600),
    # Its masks weigh three times as much as its classes, and would leave these unlearnt in a short training.
    "solo": Small(solo, teacher_steps=1600, loss_weights={"mask": 0.1}),
}
"""By name."""


def classifier(depth: int, width: float) -> ConfigDict:
    """Config of a ResNet that classifies.

    Args:
        depth: of the ResNet, 18, 34, 50 or 101.
        width: factor on the ResNet's channels.
    """
    return ConfigDict(dict(name="resnet_classifier", backbone=dict(depth=depth, width=width)))


def base_stage(model: ConfigDict) -> ConfigDict:
    """One run of the train loop for a detector, every key of :class:`kdjax.config.schema.Stage` at its default."""
    options = {key: placeholder(default) for key, default in defaults(Stage).items()}
    weights = dict.fromkeys(loss_terms(model), 1.0)
    sections = dict(methods=dict(), loss_weights=weights, optimizer=defaults(Optimizer))
    return ConfigDict(dict(model=model, **sections, **options))


def small_stage(detector: str, depth: int, width: float) -> ConfigDict:
    """The stage of a small detector.

    Args:
        detector: a key of ``SMALL_DETECTORS``.
        depth: of the ResNet.
        width: factor on the ResNet's channels.
    """
    small = SMALL_DETECTORS[detector]
    stage = base_stage(small.preset(depth, width))
    stage.loss_weights.update(small.loss_weights)
    return stage


def method_config(name: str, **options: Any) -> ConfigDict:
    """An entry of a stage's ``methods``: every option that the method has, at its default unless given.

    Args:
        name: a key of ``kdjax.methods.METHODS``, or package.module:Class of somebody else's.
        **options: of the method, and ``levels``, ``init`` and ``optimizer`` of
            :class:`kdjax.config.schema.MethodSection`.
    """
    return ConfigDict(dict(name=name) | method_options(name) | defaults(MethodSection) | options)


def learnt_levels(model: ConfigDict) -> tuple[str, ...]:
    """Levels of a small detector's pyramid up to P5: P6 and P7 detect next to nothing in images of 128 pixels."""
    return tuple(f"p{level}" for level in range(model.neck.min_level, 6))


def loss_terms(model: ConfigDict) -> tuple[str, ...]:
    """Names of the loss terms of a detector, from its section of a config."""
    return build_model(model.to_dict(), num_classes=1).terms


def learns_masks(model: ConfigDict) -> bool:
    """Whether a detector, of which this is the section of a config, learns from data with masks."""
    return build_model(model.to_dict(), num_classes=1).learns_masks


def base_config(detector: str = "retinanet") -> ConfigDict:
    """Teacher, then student, on the embedded data: what every config starts from.

    Args:
        detector: of both, a key of ``SMALL_DETECTORS``.
    """
    stages = dict(teacher=small_stage(detector, 18, 0.5), student=small_stage(detector, 18, 0.125))
    config = ConfigDict(dict(**defaults(Run), data=defaults(Data), **stages))
    config.data.masks = learns_masks(config.student.model)
    config.teacher.steps = SMALL_DETECTORS[detector].teacher_steps
    config.teacher.eval_every = config.student.eval_every = EVAL_EVERY
    config.student.teacher = "teacher"
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """A config with small detectors that take two steps on tiny data, to check an installation or a config."""
    config.data.update(
        name=TINY_DATA[config.task],
        image_size=(64, 64),
        short_sides=(),
        long_side=0,
        resize="kdjax",
        eval_padding=0,
        centre_crop=False,
        crop=(),
        threads=2,
    )
    config.eval_batch_size = 8
    for stage in (config[name] for name in config.stages):
        for section, fields in model_class(stage.model.name).tiny.items():
            # What a large backbone is made of, such as its groups, suits no tiny one.
            kept = stage.model[section].to_dict() if section in stage.model and section != "backbone" else {}
            stage.model[section] = ConfigDict({**kept, **fields})
        # Nothing is known to the backbones, and they have fewer blocks.
        stage.freeze = tuple(path for path in stage.freeze if not path.startswith("student/backbone/"))
        stage.update(weights="", source="", batch_size=8, base_batch=8, steps=2)
    return config
