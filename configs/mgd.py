"""MGD, masked generative distillation (Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529).

    python -m kdjax.main --config=configs/mgd.py

Trains a RetinaNet teacher on the embedded data set, then a small RetinaNet that inherits its neck and head and learns
to generate the teacher's features from its own with positions hidden.

The weight of the loss is the paper's alpha, 2e-5 for one-stage detectors at 800x1344 pixels and 256 channels. The loss
is a sum over positions and channels, of which an image here has 260 times fewer: 5e-4.
"""

from ml_collections import ConfigDict

from kdjax.config import base_config, method_config, with_variant


def get_config(variant: str = "shapes") -> ConfigDict:
    """MGD on the embedded data; ``configs/mgd.py:tiny`` takes two steps of everything."""
    config = base_config()
    config.student.method = method_config("mgd")
    config.student.loss_weights.mgd = 5e-4
    config.student.inherit = ("neck", "head")
    return with_variant(config, variant)
