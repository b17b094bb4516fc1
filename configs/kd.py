"""KD, knowledge distillation by logits (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

    python -m kdjax.main --config=configs/kd.py

The plain baseline of segmentation and classification: the classes that a teacher sees at each place, or in each image,
at temperature 4. ``configs/kd.py:<pair>`` does so with every pair of ``kdjax/cityscapes.py`` and ``kdjax/imagenet.py``;
the weight is ours. ``configs/kd.py:classification`` is on the embedded data, whose images show one object each.
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import finish
from kdjax.variants import start


def get_config(variant: str = "segmentation") -> ConfigDict:
    """KD on the embedded label maps or classes, or on the data of a pair; ``:tiny`` takes two steps of everything."""
    variant = "segmentation:tiny" if variant == "tiny" else variant
    config, _ = start(variant, tasks=("segmentation", "classification"))
    config.student.methods.kd = method_config("kd")
    config.student.loss_weights.kd = 1.0
    return finish(config, variant)
