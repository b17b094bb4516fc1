"""The identical student without a teacher's features: what every gain is quoted against.

    python -m kdjax.main --config=configs/none.py

It starts from the teacher's neck and head as the distilled students do; ``--config.student.inherit="()"`` leaves that
out. ``configs/none.py:<pair>`` is the pair's student alone on COCO, as MMDetection trains it on schedule 2x, without a
teacher and what is inherited from one. The student that is identical to a method's, with its schedule, its clipping
and what it inherits, comes from that method's config and ``--config.compare=True``.
"""

from ml_collections import ConfigDict

from kdjax.pairs import finish
from kdjax.variants import start


def get_config(variant: str = "shapes") -> ConfigDict:
    """The student alone on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    if pair is not None:
        config.stages = ("student",)
        config.student.teacher = ""
    elif config.task == "detection":
        config.student.inherit = ("neck", "head")
    return finish(config, variant)
