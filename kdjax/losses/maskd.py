"""Masked Distillation with Receptive Tokens: Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589.

Tokens learnt in the teacher's feature space attend to regions of its features (stage "tokens"); the student then
imitates the teacher region by region (stage "student").

The formulas are those of the authors' code [code], but for V, which is 1 where a padded image is valid and 0 in its
padding [recon]; without padding it changes nothing.
"""

import jax
import jax.numpy as jnp

from kdjax.losses.features import check_aligned, check_maps, einsum, hide, squared_error


def token_masks(features: jax.Array, tokens: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The region of each token: ``M(F) = V sigmoid(F E^T)`` [code]; V is ours [recon].

    >>> token_masks(jnp.zeros((2, 4, 5, 16)), jnp.ones((6, 16))).shape
    (2, 4, 5, 6)

    Args:
        features: (N, H, W, C), any float dtype.
        tokens: (K, C) receptive tokens E; they start from N(0, 0.01^2).
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        (N, H, W, K) float32 in [0, 1]; zero in the padding.

    Raises:
        ValueError: an array has another form.
    """
    check_maps(where, features=features)
    if tokens.ndim != 2 or tokens.shape[1] != features.shape[3]:
        raise ValueError(f"tokens has shape {tokens.shape}; of features {features.shape} it must be (K, C).")
    logits = einsum("nhwc,kc->nhwk", features.astype(jnp.float32), tokens.astype(jnp.float32))
    return hide(jax.nn.sigmoid(logits), where=where)


def token_weights(
    features: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """How much each token matters in each image [code]; the paper calls it the mask weighting module::

        P(F) = softmax_K( Conv1x1( GAP( Conv3x3(V F) ) ) )          V, and GAP over it, are ours [recon]

    No convolution is run. The mean over positions of a zero-padded 3x3 convolution is its kernel applied to nine sums
    of F, one for each tap: the sum over the positions that the tap meets while the kernel's centre visits every valid
    position.

    >>> kernels = jnp.zeros((3, 3, 16, 16)), jnp.zeros((1, 1, 16, 4))
    >>> token_weights(jnp.ones((1, 5, 7, 16)), kernels, (jnp.zeros(16), jnp.zeros(4)))
    Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)

    Args:
        features: (N, H, W, C), any float dtype.
        kernels: (3, 3, C, D) and (1, 1, D, K); they start from N(0, 2 / (k * k * out)).
        biases: (D,) and (K,); they start from zero.
        where: (N, H, W) bool, the valid positions: GAP is their mean, the rest is padding. None for all.

    Returns:
        (N, K) float32 that sum to one in each image.

    Raises:
        ValueError: ``features`` or ``where`` has another form.
    """
    check_maps(where, features=features)
    images, height, width, channels = features.shape
    centre = jnp.ones((images, height, width)) if where is None else where.astype(jnp.float32)
    margin = jnp.pad(centre, ((0, 0), (1, 1), (1, 1)))
    # Tap (i, j) of a kernel centred on q meets p = q + (i - 1, j - 1): whether q, so reached from p, is visited.
    visits = jnp.stack([margin[:, 2 - i :, 2 - j :][:, :height, :width] for i in range(3) for j in range(3)], axis=-1)
    # The padding counts as zero. It is masked here, nine numbers a position, because masking F would copy F.
    sums = einsum("nhwt,nhwc->ntc", visits * centre[..., None], features.astype(jnp.float32))
    kernel = kernels[0].astype(jnp.float32).reshape(9, channels, -1)
    count = jnp.maximum(jnp.sum(centre, axis=(1, 2)), 1.0)
    pooled = einsum("ntc,tcd->nd", sums, kernel) / count[:, None] + biases[0][None]
    return jax.nn.softmax(einsum("nd,dk->nk", pooled, kernels[1][0, 0].astype(jnp.float32)) + biases[1][None], axis=-1)


def masked_features(features: jax.Array, masks: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """What the teacher's head sees while the tokens are learnt: ``F' = F * sum_k M_k P_k`` [code].

    >>> masked_features(jnp.ones((1, 1, 2, 3)), jnp.full((1, 1, 2, 4), 0.5), jnp.full((1, 4), 0.25))[..., 0]
    Array([[[0.5, 0.5]]], dtype=float32)

    Args:
        features: (N, H, W, C), any float dtype, which the result keeps.
        masks: (N, H, W, K), see :func:`token_masks`.
        weights: (N, K), see :func:`token_weights`; None for the plain sum over the tokens.
    """
    gate = jnp.sum(masks, axis=-1) if weights is None else einsum("nhwk,nk->nhw", masks, weights)
    return features * gate[..., None].astype(features.dtype)


def token_dice_loss(masks: jax.Array) -> jax.Array:
    """How much the tokens' regions overlap [code]; without it all tokens learn the same one::

        loss = mean_{n, a != b} 2 <M_a, M_b> / (|M_a|^2 + |M_b|^2 + 2e-12)

    >>> token_dice_loss(jnp.ones((1, 4, 4, 2)))
    Array(1., dtype=float32)

    Args:
        masks: (N, H, W, K), zero in the padding; see :func:`token_masks`.

    Returns:
        A float32 scalar in [0, 1].

    Raises:
        ValueError: if there is one token only.
    """
    images, *_, tokens = masks.shape
    if tokens < 2:
        raise ValueError(f"The dice loss compares pairs of masks; it needs 2 tokens or more and got {tokens}.")
    masks = masks.astype(jnp.float32)
    products = einsum("nhwa,nhwb->nab", masks, masks)
    squares = einsum("naa->na", products)
    dice = 2 * products / (squares[:, :, None] + squares[:, None, :] + 2e-12)
    return jnp.sum(jnp.where(jnp.eye(tokens, dtype=bool)[None], 0, dice)) / (images * tokens * (tokens - 1))


def maskd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    tokens: jax.Array,
    weights: jax.Array | None = None,
    step: jax.Array | int,
    warmup: int,
    where: jax.Array | None = None,
) -> jax.Array:
    """The masked imitation loss of one level [code]; the paper's loss_weight is the weight of this term::

        M    = M(T)                  while step < warmup
             = M(T) * sg(M(S))       from then on, the customised masks
        loss = mean_n sum_k P_k * [ sum_hw M_k^2 mean_c (S - T)^2 ] / [ sum_hw M_k ]

    The mean over channels is taken before the tokens multiply it, so nothing of size N H W K C exists.

    >>> student, teacher = jnp.full((1, 4, 4, 8), 2.0), jnp.zeros((1, 4, 4, 8))
    >>> maskd_loss(student, teacher, tokens=jnp.zeros((6, 8)), step=0, warmup=5000)
    Array(2., dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher by a learnt 1x1 convolution, even at equal widths: the tokens
            live in the teacher's space.
        teacher: (N, H, W, C); it gets no gradient.
        tokens: (K, C), frozen; see :func:`token_masks`.
        weights: (N, K), frozen, of the teacher's features; see :func:`token_weights`. None for the plain mean over k.
        step: the training step, an int or int32 scalar.
        warmup: steps before the student's own masks take part.
        where: (N, H, W) bool, the valid positions; None for all.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if the shapes of student and teacher differ, or another array has another form.
    """
    check_aligned(student, teacher, where)
    teacher_masks = token_masks(teacher, tokens, where=where)
    student_masks = token_masks(student, tokens, where=where)
    masks = jnp.where(jnp.asarray(step) < warmup, teacher_masks, teacher_masks * student_masks)
    masks = jax.lax.stop_gradient(masks)
    error = jnp.mean(squared_error(student, teacher, where), axis=-1)
    distance = einsum("nhw,nhwk->nk", error, jnp.square(masks))
    area = jnp.sum(masks, axis=(1, 2))
    distance = jnp.where(area > 0, distance / jnp.where(area > 0, area, 1), 0)
    if weights is None:
        return jnp.mean(distance)
    return jnp.mean(jnp.sum(jax.lax.stop_gradient(weights) * distance, axis=-1))
