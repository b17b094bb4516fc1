"""DMKD, dual masked knowledge distillation (Yang et al., ICASSP 2024, https://arxiv.org/abs/2309.02719).

    python -m kdjax.main --config=configs/dmkd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that generates the teacher's features from
its own with the positions and, in a second branch, the channels hidden that the teacher attends to most. Dual masks and
their learned fusion are the paper's; formulas and numbers are our reconstruction. For COCO the weight is MGD's there,
2e-5, and 5e-7 for two-stage detectors with a spatial_ratio of 0.45: the term is a sum over positions.
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, method_config, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """DMKD on the embedded data; ``configs/dmkd.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.student.method = method_config("dmkd")
    # What was best for MGD, whose term has the same size.
    config.student.loss_weights.dmkd = 5e-4
    config.student.inherit = ("neck", "head")
    return with_variant(config, variant)
