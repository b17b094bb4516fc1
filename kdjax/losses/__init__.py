"""The losses: pure functions of arrays that need jax alone."""

from kdjax.losses.classification import cross_entropy
from kdjax.losses.dfmsd import (
    channel_norm,
    dfmsd_loss,
    object_positions,
    pearson_loss,
    stage_keep,
    stage_ratio,
)
from kdjax.losses.dmkd import (
    attention_keep,
    channel_attention,
    dmkd_loss,
    dual_keep,
    dual_reconstruction,
    spatial_attention,
)
from kdjax.losses.features import hide, squared_error, valid_positions
from kdjax.losses.icd import (
    ClassStatistics,
    Queries,
    icd_loss,
    instance_attention,
    instance_confidence_loss,
    instance_descriptors,
    instance_localization_loss,
    sample_queries,
    sine_position,
    split_heads,
    uniform_statistics,
)
from kdjax.losses.ld import ld_loss
from kdjax.losses.logits import cwd_loss, kd_loss
from kdjax.losses.maskd import maskd_loss, masked_features, token_dice_loss, token_masks, token_weights
from kdjax.losses.mgd import keep_mask, mgd_loss
from kdjax.losses.mimic import mimic_loss
from kdjax.losses.reduce import masked_mean, masked_sum

__all__ = [
    "ClassStatistics",
    "Queries",
    "attention_keep",
    "channel_attention",
    "channel_norm",
    "cross_entropy",
    "cwd_loss",
    "dfmsd_loss",
    "dmkd_loss",
    "dual_keep",
    "dual_reconstruction",
    "hide",
    "icd_loss",
    "instance_attention",
    "instance_confidence_loss",
    "instance_descriptors",
    "instance_localization_loss",
    "kd_loss",
    "keep_mask",
    "ld_loss",
    "maskd_loss",
    "masked_features",
    "masked_mean",
    "masked_sum",
    "mgd_loss",
    "mimic_loss",
    "object_positions",
    "pearson_loss",
    "sample_queries",
    "sine_position",
    "spatial_attention",
    "split_heads",
    "squared_error",
    "stage_keep",
    "stage_ratio",
    "token_dice_loss",
    "token_masks",
    "token_weights",
    "uniform_statistics",
    "valid_positions",
]
