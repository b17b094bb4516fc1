"""KD, knowledge distillation by logits (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

    python -m kdjax.main --config=configs/kd.py

The plain baseline of segmentation: the classes that a teacher sees at each place, at temperature 4. On Cityscapes,
``configs/kd.py:<pair>`` does so with every pair of ``kdjax/cityscapes.py``; the weight is ours.
"""

from ml_collections import ConfigDict

from kdjax import cityscapes
from kdjax.config import method_config


def get_config(variant: str = "segmentation") -> ConfigDict:
    """KD on the embedded label maps, or on Cityscapes for a pair; ``:tiny`` takes two steps of everything."""
    variant = "segmentation:tiny" if variant == "tiny" else variant
    config, _ = cityscapes.start(variant)
    config.student.methods.kd = method_config("kd")
    config.student.loss_weights.kd = 1.0
    return cityscapes.finish(config, variant)
