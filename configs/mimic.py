"""Feature imitation: the plain mean squared error between aligned features, the simplest baseline of every table.

    python -m kdjax.main --config=configs/mimic.py

``configs/mimic.py:<pair>`` does so on COCO, see ``kdjax/pairs.py``; its weight there is ours, not a paper's.
"""

from ml_collections import ConfigDict

from kdjax.config import learnt_levels, method_config
from kdjax.pairs import finish
from kdjax.variants import start


def get_config(variant: str = "shapes") -> ConfigDict:
    """Feature imitation on the embedded data, or on COCO for a pair; ``:tiny`` takes two steps of everything."""
    config, pair = start(variant)
    config.student.methods.mimic = mimic = method_config("mimic")
    if config.task != "detection":
        mimic.levels = ("c5",)
        config.student.loss_weights.mimic = 1.0
        config.student.method_share = 1.0 if pair is None else 0.0
        return finish(config, variant)
    config.student.inherit = ("neck", "head")
    if pair is None:
        config.student.loss_weights.mimic = 0.05
        # Every level weighs the same, and P6 and P7 have by far the largest features here; see configs/maskd.py.
        mimic.levels = learnt_levels(config.student.model)
    else:
        config.student.loss_weights.mimic = 1.0
    return finish(config, variant)
