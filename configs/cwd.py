"""CWD, channel-wise distillation of logits (Shu et al., ICCV 2021, https://arxiv.org/abs/2011.13256).

    python -m kdjax.main --config=configs/cwd.py

The plain baseline of segmentation: a softmax over the places of each class, at temperature 4, weight 3. On Cityscapes,
``configs/cwd.py:<pair>`` does so with every pair of ``kdjax/cityscapes.py``; the authors' own pairs are others.
"""

from ml_collections import ConfigDict

from kdjax.config import method_config
from kdjax.pairs import finish
from kdjax.variants import start


def get_config(variant: str = "segmentation") -> ConfigDict:
    """CWD on the embedded label maps, or on Cityscapes for a pair; ``:tiny`` takes two steps of everything."""
    variant = "segmentation:tiny" if variant == "tiny" else variant
    config, _ = start(variant, tasks=("segmentation",))
    config.student.methods.cwd = method_config("cwd")
    config.student.loss_weights.cwd = 3.0
    return finish(config, variant)
