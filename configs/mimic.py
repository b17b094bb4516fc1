"""Feature imitation: the plain mean squared error between aligned features, the simplest baseline of every table.

    python -m kdjax.main --config=configs/mimic.py

``configs/mimic.py:<pair>`` does so on COCO, see ``kdjax/pairs.py``; its weight there is ours, not a paper's.
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import finish, start


def get_config(variant: str = "shapes") -> ConfigDict:
    """Feature imitation on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    config.student.method = method_config("mimic")
    # On small data a fifth of the task loss at the start; 1 would be forty times as much as it.
    config.student.loss_weights.mimic = 0.005 if pair is None else 1.0
    config.student.inherit = ("neck", "head")
    return finish(config, variant)
