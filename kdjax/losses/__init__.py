"""The losses: pure functions of arrays that need jax alone."""

from kdjax.losses.features import hide, squared_error, valid_positions
from kdjax.losses.mgd import keep_mask, mgd_loss
from kdjax.losses.mimic import mimic_loss
from kdjax.losses.reduce import masked_mean, masked_sum

__all__ = [
    "hide",
    "keep_mask",
    "masked_mean",
    "masked_sum",
    "mgd_loss",
    "mimic_loss",
    "squared_error",
    "valid_positions",
]
