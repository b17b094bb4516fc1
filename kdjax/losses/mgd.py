"""Masked Generative Distillation: Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529.

The student's features, with random positions or channels hidden, must suffice to generate the teacher's full features.
"""

from collections.abc import Callable, Sequence

import jax

from kdjax.losses.features import check_aligned, check_keep, check_keys, check_share, hide, squared_error
from kdjax.losses.reduce import masked_sum


def keep_mask(shape: Sequence[int], *, keys: jax.Array, mask_ratio: float, mask: str = "spatial") -> jax.Array:
    """Draws what the student keeps: ``keep = 1 - Bernoulli(mask_ratio)`` (equation 2) [code].

    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> keep_mask((2, 5, 7, 16), keys=keys, mask_ratio=0.65).shape
    (2, 5, 7, 1)
    >>> keep_mask((2, 5, 7, 16), keys=keys, mask_ratio=0.15, mask="channel").shape
    (2, 1, 1, 16)

    Args:
        shape: (N, H, W, C) of the features to mask.
        keys: (N,) typed PRNG keys, one per image, so that the draw does not depend on how images fall on devices.
        mask_ratio: probability of hiding, in [0, 1].
        mask: "spatial", one draw per position, for detection and segmentation; "channel", one draw per channel, for
            classification.

    Returns:
        Bool, True where kept: (N, H, W, 1) for "spatial", (N, 1, 1, C) for "channel".

    Raises:
        ValueError: if ``mask`` is neither, ``mask_ratio`` is no plain number from 0 to 1, or ``shape`` or ``keys`` are
            of another form.
    """
    check_share("mask_ratio", mask_ratio)
    if mask not in ("spatial", "channel"):
        raise ValueError(f'mask is "{mask}"; it must be "spatial" or "channel".')
    if len(shape) != 4:
        raise ValueError(f"shape is {tuple(shape)}; it must be (N, H, W, C).")
    images, height, width, channels = shape
    check_keys(keys, images)
    draw = (height, width, 1) if mask == "spatial" else (1, 1, channels)
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - mask_ratio, draw))(keys)


def mgd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    keep: jax.Array,
    generate: Callable[[jax.Array], jax.Array],
    where: jax.Array | None = None,
) -> jax.Array:
    """The generation loss of one level (equation 5) [code].

    The paper's alpha is the weight of this term::

        loss = 1/N * sum_{n,h,w,c} (G(keep * S) - T)^2

    A sum over positions and channels, hidden or not: it grows with the area of the image.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))
    >>> keep = jnp.array([[[[True], [False]], [[True], [True]]]])
    >>> mgd_loss(student, teacher, keep=keep, generate=lambda features: 2 * features)
    Array(36., dtype=float32)

    Args:
        student: (N, H, W, C), aligned to the teacher's channels.
        teacher: (N, H, W, C); it gets no gradient.
        keep: bool, (N, H, W, 1) or (N, 1, 1, C), True where the student's features are kept; see :func:`keep_mask`.
        generate: G, from features to features (N, H, W, C): a 3x3 convolution, ReLU and a 3x3 convolution.
        where: (N, H, W) bool, the valid positions; G sees zeros elsewhere. None for all.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if the shapes of student and teacher differ, or a mask has another form.
    """
    check_aligned(student, teacher, where)
    check_keep(keep, student)
    generated = generate(hide(student, keep, where))
    return masked_sum(squared_error(generated, teacher, where)) / student.shape[0]
