"""Configs: their schema, the presets that they start from, and the files that they stand in."""

from kdjax.config.files import config_names, find_config, leaves, load_config
from kdjax.config.presets import (
    SMALL_DETECTORS,
    base_config,
    base_stage,
    fcos,
    gfl,
    learnt_levels,
    loss_terms,
    method_config,
    reppoints,
    retinanet,
    solo,
    tiny,
)

__all__ = [
    "SMALL_DETECTORS",
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
    "solo",
    "tiny",
]
