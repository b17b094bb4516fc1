"""The losses: pure functions of arrays that need jax alone."""

from kdjax.losses.features import hide, squared_error, valid_positions
from kdjax.losses.maskd import dice_loss, maskd_loss, masked_features, token_masks, token_weights
from kdjax.losses.mgd import keep_mask, mgd_loss
from kdjax.losses.mimic import mimic_loss
from kdjax.losses.reduce import masked_mean, masked_sum

__all__ = [
    "dice_loss",
    "hide",
    "keep_mask",
    "maskd_loss",
    "masked_features",
    "masked_mean",
    "masked_sum",
    "mgd_loss",
    "mimic_loss",
    "squared_error",
    "token_masks",
    "token_weights",
    "valid_positions",
]
