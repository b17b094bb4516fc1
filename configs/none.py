"""The identical student without a teacher's features: what every gain is quoted against.

    python -m kdjax.main --config=configs/none.py

It starts from the teacher's neck and head as the distilled students do; ``--config.student.inherit="()"`` leaves that
out.
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """The student alone on the embedded data; ``configs/none.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.student.inherit = ("neck", "head")
    return with_variant(config, variant)
