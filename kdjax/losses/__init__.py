"""The losses: pure functions of arrays that need jax alone."""

from kdjax.losses.features import hide, squared_error, valid_positions
from kdjax.losses.icd import (
    ClassStatistics,
    Queries,
    attend,
    confidence_loss,
    descriptors,
    icd_loss,
    localization_loss,
    sample_queries,
    sine_position,
    split_heads,
    uniform_statistics,
)
from kdjax.losses.maskd import dice_loss, maskd_loss, masked_features, token_masks, token_weights
from kdjax.losses.mgd import keep_mask, mgd_loss
from kdjax.losses.mimic import mimic_loss
from kdjax.losses.reduce import masked_mean, masked_sum

__all__ = [
    "ClassStatistics",
    "Queries",
    "attend",
    "confidence_loss",
    "descriptors",
    "dice_loss",
    "hide",
    "icd_loss",
    "keep_mask",
    "localization_loss",
    "maskd_loss",
    "masked_features",
    "masked_mean",
    "masked_sum",
    "mgd_loss",
    "mimic_loss",
    "sample_queries",
    "sine_position",
    "split_heads",
    "squared_error",
    "token_masks",
    "token_weights",
    "uniform_statistics",
    "valid_positions",
]
