"""Dual Masked Knowledge Distillation: Yang et al., ICASSP 2024, https://arxiv.org/abs/2309.02719.

Stated by the paper's abstract: attention guides two masking branches on the student's features, one spatial and one
over channels, and both reconstructions are fused with self-adjustable weights. Everything else here, that is every
formula and option below, is our reconstruction, for no code was published.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.losses.features import check_aligned, check_keep, check_keys, check_maps, check_share, squared_error
from kdjax.losses.features import hide as hide_features
from kdjax.losses.reduce import masked_mean, masked_sum

Pair = tuple[jax.Array, jax.Array]
"""Something of the spatial branch and of the channel branch."""

Generate = Callable[[jax.Array], jax.Array]
"""A generation block: features (N, H, W, C) to features (N, H, W, C)."""


def _attention(strength: jax.Array, tau: float, where: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """``count * softmax(strength / tau)`` over the places where ``where`` holds; zero elsewhere."""
    count = jnp.sum(where.astype(jnp.float32), axis=axis, keepdims=True)
    logits = jnp.where(where, strength / tau, jnp.finfo(jnp.float32).min)
    return jax.lax.stop_gradient(jnp.where(where, count * jax.nn.softmax(logits, axis=axis), 0))


def spatial_attention(features: jax.Array, *, tau: float = 0.5, where: jax.Array | None = None) -> jax.Array:
    """``A_sp = HW softmax_hw( mean_c |T| / tau )``, HW the number of valid positions [recon].

    >>> spatial_attention(jnp.ones((1, 2, 3, 8)))[0, :, :, 0]
    Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)

    Args:
        features: (N, H, W, C) of the teacher, any float dtype.
        tau: temperature: 0.5, for FCOS 0.8.
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        (N, H, W, 1) float32 with mean 1 over the valid positions of each image, zero elsewhere; no gradient.

    Raises:
        ValueError: ``features`` or ``where`` has another form.
    """
    check_maps(where, features=features)
    strength = jnp.mean(jnp.abs(features.astype(jnp.float32)), axis=-1, keepdims=True)
    mask = jnp.ones(strength.shape, bool) if where is None else where[..., None]
    return _attention(strength, tau, mask, axis=(1, 2))


def channel_attention(features: jax.Array, *, tau: float = 0.5, where: jax.Array | None = None) -> jax.Array:
    """``A_ch = C softmax_c( mean_hw |T| / tau )``, the mean over valid positions [recon].

    >>> channel_attention(jnp.ones((1, 2, 3, 4)))[0, 0, 0]
    Array([1., 1., 1., 1.], dtype=float32)

    Args:
        features: (N, H, W, C) of the teacher, any float dtype.
        tau: temperature: 0.5, for FCOS 0.8.
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        (N, 1, 1, C) float32 with mean 1 over the channels of each image; no gradient.

    Raises:
        ValueError: ``features`` or ``where`` has another form.
    """
    check_maps(where, features=features)
    mask = None if where is None else where[..., None]
    strength = masked_mean(jnp.abs(features.astype(jnp.float32)), mask, axis=(1, 2))[:, None, None]
    return _attention(strength, tau, jnp.ones(strength.shape, bool), axis=(3,))


def attention_keep(
    attention: jax.Array,
    *,
    select: str = "ratio",
    ratio: float = 0.5,
    threshold: float = 1.0,
    hide: str = "high",
    keep_probability: float = 1.0,
    keys: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """What the student keeps, by the teacher's attention [recon]::

        selected = the round(ratio * count) places with the highest A of each image     select = "ratio"
                 = A >= threshold                                                       select = "threshold"
        keep     = 1 - selected * Bernoulli(keep_probability)

    Among equals the first place is selected. With ``hide = "low"`` the lowest A, or A < threshold, are selected.

    >>> attention_keep(jnp.array([[0.5, 2.0, 1.5, 0.1]]))
    Array([[ True, False, False,  True]], dtype=bool)

    Args:
        attention: (N, ...) float32, all but the first axis are places.
        select: "ratio" or "threshold".
        ratio: the share of an image's valid places to select, in [0, 1].
        threshold: the attention from which on places are selected; 1 is the image's mean.
        hide: "high" or "low".
        keep_probability: the probability with which a selected place stays selected, hence hidden. Below 1 it breaks up
            blobs, whose interior lies outside the 5x5 receptive field of the generation block and so has no gradient.
        keys: (N,) typed PRNG keys, one per image; needed for a keep_probability below 1.
        where: bool, the shape of ``attention``: places that count; the others are kept. None for all.

    Returns:
        Bool, the shape of ``attention``: True where kept.

    Raises:
        ValueError: for another ``select`` or ``hide``, a share that is not from 0 to 1, or missing keys.
    """
    if select not in ("ratio", "threshold"):
        raise ValueError(f'select is "{select}"; it must be "ratio" or "threshold".')
    if hide not in ("high", "low"):
        raise ValueError(f'hide is "{hide}"; it must be "high" or "low".')
    check_share("ratio", ratio)
    check_share("keep_probability", keep_probability)
    valid = jnp.ones(attention.shape, bool) if where is None else where
    if select == "threshold":
        selected = attention >= threshold if hide == "high" else attention < threshold
    else:
        strength = jnp.where(valid, attention if hide == "high" else -attention, -jnp.inf).reshape(len(attention), -1)
        count = jnp.round(ratio * jnp.sum(valid.reshape(strength.shape), axis=-1)).astype(jnp.int32)
        selected = highest(strength, count, most=math.ceil(ratio * strength.shape[1])).reshape(attention.shape)
    if keep_probability < 1:
        if keys is None:
            raise ValueError(f"keep_probability is {keep_probability}; below 1 it needs keys, one per image.")
        check_keys(keys, len(attention))
        draw = jax.vmap(lambda key: jax.random.bernoulli(key, float(keep_probability), attention.shape[1:]))
        selected &= draw(keys)
    return ~(selected & valid)


def highest(values: jax.Array, count: jax.Array, *, most: int) -> jax.Array:
    """Which entries of each row are its ``count`` highest, of equals the first: what passes the lowest of those.

    >>> highest(jnp.array([[2.0, 3.0, 2.0, 1.0]]), jnp.array([2]), most=3)
    Array([[ True,  True, False, False]], dtype=bool)

    Args:
        values: (N, P) float32.
        count: (N,) int32.
        most: what no count exceeds; at most P.

    Returns:
        (N, P) bool.
    """
    if most == 0:
        return jnp.zeros(values.shape, bool)
    passed = jax.lax.top_k(values, most)
    lowest, place = (jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None], axis=1) for x in passed)
    before = jnp.arange(values.shape[1])[None] <= place
    return (count > 0)[:, None] & ((values > lowest) | ((values == lowest) & before))


def dual_keep(
    teacher: jax.Array,
    *,
    spatial_ratio: float = 0.65,
    channel_ratio: float = 0.5,
    tau: float = 0.5,
    emphasis: jax.Array | None = None,
    select: str = "ratio",
    threshold: float = 1.0,
    hide: str = "high",
    keep_probability: float = 1.0,
    keys: jax.Array | None = None,
    where: jax.Array | None = None,
) -> Pair:
    """Both masks of one level: :func:`attention_keep` of :func:`spatial_attention` and :func:`channel_attention`.

    >>> keep_spatial, keep_channel = dual_keep(jnp.ones((2, 4, 5, 8)))
    >>> keep_spatial.shape, keep_channel.shape
    ((2, 4, 5, 1), (2, 1, 1, 8))

    Args:
        teacher: (N, H, W, C), any float dtype.
        spatial_ratio: share of positions: 0.65 for one-stage detectors, 0.45 for two-stage.
        channel_ratio: share of channels.
        tau: temperature of both attentions: 0.5, for FCOS 0.8.
        emphasis: (N, H, W, 1) that multiplies the spatial attention; None for 1.
        select: as :func:`attention_keep` has it, for both masks, and so the options below.
        threshold: likewise.
        hide: likewise.
        keep_probability: likewise.
        keys: (N,) typed PRNG keys, one per image; the two masks draw from keys of their own.
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        Bool masks (N, H, W, 1) and (N, 1, 1, C), True where kept.

    Raises:
        ValueError: as :func:`attention_keep`, or an array has another form.
    """
    check_maps(where, teacher=teacher)
    if keys is not None:
        check_keys(keys, len(teacher))
    fold = jax.vmap(jax.random.fold_in, (0, None))
    spatial_keys, channel_keys = (None, None) if keys is None else (fold(keys, 0), fold(keys, 1))
    spatial = spatial_attention(teacher, tau=tau, where=where)
    spatial = spatial if emphasis is None else spatial * emphasis
    channel = channel_attention(teacher, tau=tau, where=where)
    mask = None if where is None else where[..., None]

    def keep(attention: jax.Array, ratio: float, keys: jax.Array | None, where: jax.Array | None) -> jax.Array:
        return attention_keep(
            attention,
            select=select,
            ratio=ratio,
            threshold=threshold,
            hide=hide,
            keep_probability=keep_probability,
            keys=keys,
            where=where,
        )

    return keep(spatial, spatial_ratio, spatial_keys, mask), keep(channel, channel_ratio, channel_keys, None)


def dual_reconstruction(
    student: jax.Array,
    *,
    keep: Pair,
    generate: tuple[Generate, Generate],
    fusion: jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    """Both branches, fused [recon]::

        R = w_1 G_sp(keep_sp * S) + w_2 G_ch(keep_ch * S),      (w_1, w_2) = softmax(fusion)

    >>> keep = jnp.array([[[[True], [False]]]]), jnp.array([[[[True]]]])
    >>> block = lambda features: 2 * features
    >>> dual_reconstruction(jnp.ones((1, 1, 2, 1)), keep=keep, generate=(block, block), fusion=jnp.zeros(2)).ravel()
    Array([2., 1.], dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher's channels.
        keep: bool masks (N, H, W, 1) and (N, 1, 1, C), True where kept; see :func:`dual_keep`.
        generate: G_sp and G_ch, from features to features (N, H, W, C), each MGD's block.
        fusion: (2,) learned scalars, from 0.
        where: (N, H, W) bool, the valid positions; the blocks see zeros elsewhere. None for all.

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: an array has another form.
    """
    check_maps(where, student=student)
    for mask in keep:
        check_keep(mask, student)
    spatial, channel = (
        block(hide_features(student, mask, where)).astype(jnp.float32)
        for block, mask in zip(generate, keep, strict=True)
    )
    weights = jax.nn.softmax(fusion.astype(jnp.float32))
    return weights[0] * spatial + weights[1] * channel


def dmkd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    keep: Pair,
    generate: tuple[Generate, Generate],
    fusion: jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    """The reconstruction loss of one level [recon]; alpha, 2e-5 or for two-stage 5e-7, is the weight of this term::

        loss = 1/N * sum_{n,h,w,c} (R - T)^2           R: dual_reconstruction

    >>> keep = jnp.array([[[[True], [False]]]]), jnp.array([[[[True]]]])
    >>> block = lambda features: 2 * features
    >>> teacher = jnp.zeros((1, 1, 2, 1))
    >>> dmkd_loss(jnp.ones((1, 1, 2, 1)), teacher, keep=keep, generate=(block, block), fusion=jnp.zeros(2))
    Array(5., dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher's channels.
        teacher: (N, H, W, C); it gets no gradient.
        keep: as :func:`dual_reconstruction` has it, and so what follows.
        generate: likewise.
        fusion: likewise.
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if the shapes of student and teacher differ, or a mask has another form.
    """
    check_aligned(student, teacher, where)
    reconstruction = dual_reconstruction(student, keep=keep, generate=generate, fusion=fusion, where=where)
    return masked_sum(squared_error(reconstruction, teacher, where)) / student.shape[0]
