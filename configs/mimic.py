"""Feature imitation: the plain mean squared error between aligned features, the simplest baseline of every table.

python -m kdjax.main --config=configs/mimic.py
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """Feature imitation on the embedded data; ``configs/mimic.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.student.method = ConfigDict(dict(name="mimic"))
    config.student.loss_weights.mimic = 1.0
    config.student.inherit = ("neck", "head")
    return with_variant(config, variant)
