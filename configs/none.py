"""The identical student without a teacher's features: what every gain is quoted against.

    python -m kdjax.main --config=configs/none.py

It starts from the teacher's neck and head as the distilled students do; ``--config.student.inherit="()"`` leaves that
out. ``configs/none.py:<pair>`` is the pair's student alone on COCO, as MMDetection trains it on schedule 2x, without a
teacher and what is inherited from one. The student that is identical to a method's, with its schedule, its clipping
and what it inherits, comes from that method's config and ``--config.compare=True``.
"""

from ml_collections import ConfigDict

from kdjax import cityscapes, imagenet
from kdjax.pairs import finish, start


def get_config(variant: str = "shapes") -> ConfigDict:
    """The student alone on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    if cityscapes.knows(variant):
        return segmentation(variant)
    if imagenet.knows(variant):
        return classification(variant)
    config, pair = start(variant)
    if pair is None:
        config.student.inherit = ("neck", "head")
    else:
        config.stages = ("student",)
        config.student.teacher = ""
    return finish(config, variant)


def segmentation(variant: str) -> ConfigDict:
    """The student alone on label maps."""
    config, pair = cityscapes.start(variant)
    if pair is not None:
        config.stages = ("student",)
        config.student.teacher = ""
    return cityscapes.finish(config, variant)


def classification(variant: str) -> ConfigDict:
    """The student alone on classes of images."""
    config, pair = imagenet.start(variant)
    if pair is not None:
        config.stages = ("student",)
        config.student.teacher = ""
    return imagenet.finish(config, variant)
