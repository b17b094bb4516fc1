"""Dual Feature Masking Stage-wise Distillation: Zhang et al., 2024, https://arxiv.org/abs/2407.13147.

Stated by the paper's abstract, for pairs of different architecture: dual masking as in DMKD; the student is adapted
progressively to the teachers, stage by stage; object-aware masking regions are adaptively strengthened along with the
stages; teacher and student are aligned semantically at every level, for consistent feature distributions. Everything
else here, that is every formula and option below, is our reconstruction, for no code was published.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.losses.dmkd import Generate, Pair, dual_keep, dual_reconstruction
from kdjax.losses.features import check_aligned, check_known, check_maps, hide, squared_error
from kdjax.losses.reduce import masked_mean
from kdjax.types import Targets

_CONSTANT = 1e-5
"""A channel whose deviation is below this share of its mean is constant: the rest is what float32 rounds."""


def channel_norm(features: jax.Array, *, where: jax.Array | None = None, axis_name: str | None = None) -> jax.Array:
    """``norm(F) = (F - mean_c) / (std_c + 1e-6)``: every channel of the whole batch to mean 0, deviation 1 [recon].

    Statistics are of each channel over the valid positions of all images of the global batch.

    >>> channel_norm(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)).ravel().round(3)
    Array([-1.,  1.], dtype=float32)

    Args:
        features: (N, H, W, C), any float dtype.
        where: (N, H, W) bool, the valid positions; None for all.
        axis_name: mapped axis over which statistics are taken too.

    Returns:
        (N, H, W, C) float32; zero, without a gradient, in the padding and where a channel is constant.

    Raises:
        ValueError: ``features`` or ``where`` has another form.
    """
    check_maps(where, features=features)
    mask = jnp.ones((*features.shape[:3], 1), bool) if where is None else where[..., None]

    def mean(values: jax.Array) -> jax.Array:
        """Over everything but channels, on all devices: (1, 1, 1, C)."""
        share = masked_mean(values, mask, axis=(0, 1, 2), axis_name=axis_name)
        return (share if axis_name is None else jax.lax.pmean(share, axis_name))[None, None, None]

    features = features.astype(jnp.float32)
    middle = mean(features)
    centred = hide(features - middle, where=where)
    # What is left of the mean is rounding, which a plain sum of many positions makes more than _CONSTANT.
    centred = hide(centred - mean(centred), where=where)
    variance = mean(jnp.square(centred))
    varies = variance > jnp.square(_CONSTANT * middle)
    # The square root has no gradient at zero, and rounding must not be blown up to deviation 1.
    deviation = jnp.sqrt(jnp.where(varies, variance, 1))
    return jnp.where(varies, centred, 0) / (deviation + 1e-6)


def stage_ratio(stage: int, *, first: float = 0.45, growth: float = 0.1) -> float:
    """The share of positions hidden in a stage, ``first + growth (stage - 1)``, at most 1 [recon].

    >>> stage_ratio(2)
    0.55

    Args:
        stage: 1 for the weakest teacher, 2 for the next, and so on.
        first: share in stage 1.
        growth: what each stage adds.

    Raises:
        ValueError: if ``stage`` is below 1, or no plain number.
    """
    check_known("stage", stage)
    if stage < 1:
        raise ValueError(f"stage is {stage}; stages count from 1.")
    return min(first + growth * (stage - 1), 1.0)


def object_positions(targets: Targets, shape: tuple[int, int], stride: int) -> jax.Array:
    """The positions of a level whose cell, stride x stride pixels, meets a ground-truth box [recon].

    >>> boxes, labels, valid = jnp.array([[[8.0, 0, 24, 8]]]), jnp.array([[0]]), jnp.array([[True]])
    >>> object_positions(Targets(boxes, labels, valid), (2, 4), stride=8)[0, :, :, 0].astype(int)
    Array([[0, 1, 1, 0],
           [0, 0, 0, 0]], dtype=int32)

    Args:
        targets: the ground truth of N images with room for M objects each.
        shape: height H and width W of the level.
        stride: pixels per position of the level.

    Returns:
        (N, H, W, 1) bool.
    """
    rows, columns = (jnp.arange(length, dtype=jnp.float32)[None, None] * stride for length in shape)
    left, top, right, bottom = (targets.boxes[..., side, None] for side in range(4))
    meets_row = (rows < bottom) & (rows + stride > top) & targets.valid[..., None]
    meets_column = (columns < right) & (columns + stride > left)
    return jnp.any(meets_row[:, :, :, None] & meets_column[:, :, None, :], axis=1)[..., None]


def stage_keep(
    teacher: jax.Array,
    *,
    stage: int,
    spatial_ratio: float = 0.45,
    objects: jax.Array | None = None,
    eta: float = 1.0,
    where: jax.Array | None = None,
    **options: Any,
) -> Pair:
    """Masks of one level, the spatial one strengthened with the stage s, and where objects are the more so [recon]::

        spatial_ratio_s = spatial_ratio + 0.1 (s - 1)
        A_sp            = A_sp * (1 + eta s)               on positions of objects

    The share alone would grow on the background once the objects are hidden, and the factor alone not at all then.

    >>> keep_spatial, keep_channel = stage_keep(jnp.ones((2, 4, 5, 8)), stage=2)
    >>> int(keep_spatial[0].sum()), int(keep_channel[0].sum())
    (9, 4)
    >>> objects = jnp.array([False, False, True, True]).reshape(1, 1, 4, 1)
    >>> stage_keep(jnp.ones((1, 1, 4, 8)), stage=1, objects=objects)[0].ravel()
    Array([ True,  True, False, False], dtype=bool)

    Args:
        teacher: (N, H, W, C), the raw features of this stage's teacher: after the norm channels would be alike.
        stage: 1 for the weakest teacher, 2 for the next, and so on.
        spatial_ratio: share of positions hidden in the first stage.
        objects: (N, H, W, 1) bool, True where objects are, see :func:`object_positions`; None strengthens none.
        eta: what a stage adds to the factor of an object's attention, at least 0.
        where: (N, H, W) bool, the valid positions; None for all.
        **options: all other options of :func:`kdjax.losses.dual_keep`.

    Returns:
        Bool masks (N, H, W, 1) and (N, 1, 1, C), True where kept.

    Raises:
        ValueError: if ``stage`` is below 1 or no plain number, or an array has another form.
    """
    spatial_ratio = stage_ratio(stage, first=spatial_ratio)
    emphasis = None
    if objects is not None:
        if objects.shape != (*teacher.shape[:3], 1):
            raise ValueError(f"objects has shape {objects.shape}; of {teacher.shape} it must be (N, H, W, 1).")
        emphasis = 1 + eta * stage * objects.astype(jnp.float32)
    return dual_keep(teacher, spatial_ratio=spatial_ratio, emphasis=emphasis, where=where, **options)


def dfmsd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    keep: Pair,
    generate: tuple[Generate, Generate],
    fusion: jax.Array,
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """The reconstruction loss of one level [recon]; 10, for two-stage teachers 6, is the weight of this term::

        R    = w_1 G_sp(keep_sp * norm S) + w_2 G_ch(keep_ch * norm S)
        loss = 1/2 mean_{n,h,w,c} (R - norm T)^2

    >>> keep = jnp.full((2, 1, 1, 1), True), jnp.full((2, 1, 1, 1), True)
    >>> student, blocks = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), (jnp.negative, jnp.negative)
    >>> dfmsd_loss(student, 5 * student, keep=keep, generate=blocks, fusion=jnp.zeros(2)).round(3)
    Array(2., dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher's channels, raw: the norm is taken here.
        teacher: (N, H, W, C), raw; it gets no gradient.
        keep: bool masks (N, H, W, 1) and (N, 1, 1, C), True where kept; see :func:`stage_keep`.
        generate: G_sp and G_ch, from features to features (N, H, W, C), each MGD's block.
        fusion: (2,) learned scalars, from 0.
        where: (N, H, W) bool, the valid positions; None for all.
        axis_name: mapped axis over which statistics and counts are taken too, so that the mean over devices is the
            global value.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if the shapes of student and teacher differ, or a mask has another form.
    """
    check_aligned(student, teacher, where)
    student = channel_norm(student, where=where, axis_name=axis_name)
    teacher = channel_norm(jax.lax.stop_gradient(teacher), where=where, axis_name=axis_name)
    reconstruction = dual_reconstruction(student, keep=keep, generate=generate, fusion=fusion, where=where)
    mask = None if where is None else where[..., None]
    return 0.5 * masked_mean(squared_error(reconstruction, teacher, where), mask, axis_name=axis_name)


def pearson_loss(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Semantic alignment on its own, ``alignment = "separate"``, beside :func:`kdjax.losses.dmkd_loss` [recon]::

        loss = mean_c (1 - r_c),      r_c = mean_{n,h,w} norm S * norm T,  Pearson's correlation of a channel

    But for the norm's epsilon it equals half the squared error of normalised features (PKD, Cao et al., 2022).

    >>> student = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    >>> pearson_loss(student, -5 * student).round(3)
    Array(2., dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher's channels.
        teacher: (N, H, W, C); it gets no gradient.
        where: (N, H, W) bool, the valid positions; None for all.
        axis_name: mapped axis over which statistics and counts are taken too, so that the mean over devices is the
            global value.

    Returns:
        A float32 scalar in [0, 2].

    Raises:
        ValueError: if the shapes differ, or ``where`` has another form.
    """
    check_aligned(student, teacher, where)
    student = channel_norm(student, where=where, axis_name=axis_name)
    teacher = channel_norm(jax.lax.stop_gradient(teacher), where=where, axis_name=axis_name)
    mask = None if where is None else where[..., None]
    return masked_mean(1 - student * teacher, mask, axis_name=axis_name)
