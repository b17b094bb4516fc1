"""Configs: their schema, the presets that they start from, and the files that they stand in."""

from kdjax.config.files import config_names, find_config, leaves, load_config
from kdjax.config.presets import (
    base_config,
    base_stage,
    fcos,
    gfl,
    learnt_levels,
    loss_terms,
    method_config,
    reppoints,
    retinanet,
    small_stage,
    solo,
    tiny,
)

__all__ = [
    "base_config",
    "base_stage",
    "config_names",
    "fcos",
    "find_config",
    "gfl",
    "learnt_levels",
    "leaves",
    "load_config",
    "loss_terms",
    "method_config",
    "reppoints",
    "retinanet",
    "small_stage",
    "solo",
    "tiny",
]
