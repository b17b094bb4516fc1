"""The losses of detection heads, elementwise and in float32; masking and normalising are left to the detector."""

import jax
import jax.numpy as jnp

from kdjax.boxes import area

_EMPTY = 1e-7
"""Added to the areas that :func:`giou_loss` divides by, as torchvision does."""


def sigmoid_focal_loss(logits: jax.Array, targets: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss of independent binary classifiers (Lin et al., RetinaNet, equation 5).

    ``-alpha_t (1 - p_t)^gamma log(p_t)``, where ``p_t = sigmoid(logit)`` and ``alpha_t = alpha`` for a target of 1, and
    ``1 - sigmoid(logit)`` and ``1 - alpha`` for a target of 0.

    Args:
        logits: (...), any float dtype.
        targets: (...) bool: which classifiers should say yes.
        alpha: weight of the positives, in [0, 1].
        gamma: how much easy examples are faded out; 0 leaves the weighted cross-entropy.

    Returns:
        (...) float32. Finite, and so is its gradient, for every finite logit.
    """
    logits = logits.astype(jnp.float32)
    z = jnp.where(targets, logits, -logits)
    # p_t = sigmoid(z), so -log(p_t) = softplus(-z) and -log(1 - p_t) = softplus(z): powers become products in the
    # exponent, and nothing overflows.
    tail = jnp.log1p(jnp.exp(-jnp.abs(z)))
    cross_entropy = jnp.maximum(-z, 0.0) + tail
    modulation = jnp.exp(-gamma * (jnp.maximum(z, 0.0) + tail))
    return jnp.where(targets, alpha, 1.0 - alpha) * modulation * cross_entropy


def l1_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """``|prediction - target|``: (...) and (...) to (...) float32."""
    return jnp.abs(predictions.astype(jnp.float32) - targets.astype(jnp.float32))


def smooth_l1_loss(predictions: jax.Array, targets: jax.Array, *, beta: float = 1 / 9) -> jax.Array:
    """L1 loss that is quadratic below ``beta``: (...) and (...) to (...) float32 (Girshick, Fast R-CNN, equation 3).

    ``0.5 d^2 / beta`` where ``d = |prediction - target| < beta``, else ``d - 0.5 beta``.

    Args:
        predictions: (...), any float dtype.
        targets: (...), any float dtype.
        beta: where the parabola meets the line, above 0; 1/9 is the value that Detectron uses with RetinaNet.
    """
    difference = l1_loss(predictions, targets)
    return jnp.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)


def giou_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """``1 - GIoU`` of xyxy boxes: (..., 4) and (..., 4) to (...) float32 in [0, 2] (Rezatofighi et al., algorithm 1).

    ``GIoU = I / U - (C - U) / C``: intersection, union and the smallest enclosing box.
    """
    predictions, targets = predictions.astype(jnp.float32), targets.astype(jnp.float32)
    corner = jnp.maximum(predictions[..., :2], targets[..., :2])
    opposite = jnp.minimum(predictions[..., 2:], targets[..., 2:])
    intersection = area(jnp.concatenate([corner, opposite], axis=-1))
    union = area(predictions) + area(targets) - intersection
    corner = jnp.minimum(predictions[..., :2], targets[..., :2])
    opposite = jnp.maximum(predictions[..., 2:], targets[..., 2:])
    hull = area(jnp.concatenate([corner, opposite], axis=-1))
    return 1.0 - intersection / (union + _EMPTY) + (hull - union) / (hull + _EMPTY)
