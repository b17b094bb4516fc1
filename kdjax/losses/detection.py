"""The losses of detection heads, elementwise and in float32; masking and normalising are left to the detector."""

import jax
import jax.numpy as jnp

from kdjax.boxes import area

_EMPTY = 1e-7
"""Added to the areas that :func:`paired_iou` and :func:`giou_loss` divide by, as torchvision does."""

_DICE = 2e-3
"""Added to what :func:`dice_loss` divides by, as MMDetection does."""


def sigmoid_focal_loss(logits: jax.Array, targets: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss of independent binary classifiers (Lin et al., RetinaNet, equation 5).

    ``-alpha_t (1 - p_t)^gamma log(p_t)``, where ``p_t = sigmoid(logit)`` and ``alpha_t = alpha`` for a target of 1, and
    ``1 - sigmoid(logit)`` and ``1 - alpha`` for a target of 0.

    >>> loss = sigmoid_focal_loss(jnp.zeros((1, 2)), jnp.array([[True, False]]))
    >>> (loss / jnp.log(2)).round(4)  # alpha_t / 4
    Array([[0.0625, 0.1875]], dtype=float32)

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
    """``|prediction - target|``: (...) and (...) to (...) float32.

    >>> l1_loss(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0]))
    Array([2., 0.], dtype=float32)
    """
    return jnp.abs(predictions.astype(jnp.float32) - targets.astype(jnp.float32))


def smooth_l1_loss(predictions: jax.Array, targets: jax.Array, *, beta: float = 1 / 9) -> jax.Array:
    """L1 loss that is quadratic below ``beta``: (...) and (...) to (...) float32 (Girshick, Fast R-CNN, equation 3).

    ``0.5 d^2 / beta`` where ``d = |prediction - target| < beta``, else ``d - 0.5 beta``.

    >>> smooth_l1_loss(jnp.array([0.5, 2.0]), jnp.zeros(2), beta=1.0)
    Array([0.125, 1.5  ], dtype=float32)

    Args:
        predictions: (...), any float dtype.
        targets: (...), any float dtype.
        beta: where the parabola meets the line, above 0; 1/9 is the value that Detectron uses with RetinaNet.
    """
    difference = l1_loss(predictions, targets)
    return jnp.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``-t log(p) - (1 - t) log(1 - p)`` with ``p = sigmoid(logit)``: (...) and (...) in [0, 1] to (...) float32.

    >>> binary_cross_entropy(jnp.array([0.0, 100.0]), jnp.array([1.0, 0.0]))  # log 2, and a confident mistake
    Array([  0.6931472, 100.       ], dtype=float32)
    """
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * targets


def quality_focal_loss(logits: jax.Array, targets: jax.Array, *, beta: float = 2.0) -> jax.Array:
    """Focal loss of classifiers whose targets are qualities (Li et al., Generalized Focal Loss).

    ``|target - p|^beta * (-target log(p) - (1 - target) log(1 - p))`` with ``p = sigmoid(logit)``.

    >>> loss = quality_focal_loss(jnp.zeros(3), jnp.array([0.0, 0.5, 1.0]))
    >>> (loss / jnp.log(2)).round(4)  # |target - 1/2|^2
    Array([0.25, 0.  , 0.25], dtype=float32)

    Args:
        logits: (...), any float dtype.
        targets: (...) in [0, 1]: for the class of an object the IoU of the predicted box with it, else 0.
        beta: how much what is nearly right is faded out.

    Returns:
        (...) float32.
    """
    away = jnp.abs(targets - jax.nn.sigmoid(logits.astype(jnp.float32)))
    return away**beta * binary_cross_entropy(logits, targets)


def distribution_focal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of a distribution over 0..K-1 at the whole numbers beside a target (Generalized Focal Loss).

    ``-(i + 1 - t) log(p_i) - (t - i) log(p_(i+1))`` with ``p = softmax(logits)`` and ``i = floor(t)``: least where the
    mean of the distribution is the target.

    >>> distribution_focal_loss(jnp.array([[9.0, 9.0, -9.0]]), jnp.array([0.5]))  # log 2
    Array([0.6931472], dtype=float32)

    Args:
        logits: (..., K), any float dtype.
        targets: (...) in [0, K - 1].

    Returns:
        (...) float32.
    """
    places = jnp.arange(logits.shape[-1], dtype=jnp.float32).reshape((1,) * targets.ndim + (-1,))
    share = jnp.maximum(1 - jnp.abs(targets[..., None] - places), 0)
    return -jnp.sum(share * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def dice_loss(probabilities: jax.Array, targets: jax.Array, where: jax.Array) -> jax.Array:
    """``1 - 2 sum(p t) / (sum(p^2) + sum(t^2) + 0.002)`` of each mask (Milletari et al., V-Net; SOLO, equation 5).

    >>> loss = dice_loss(jnp.array([[[1.0, 0, 1]]]), jnp.array([[[1.0, 1, 0]]]), jnp.array([[[True, True, False]]]))
    >>> round(float(loss[0]), 2)
    0.33

    Args:
        probabilities: (K, H, W), any float dtype.
        targets: (K, H, W), likewise, or bool.
        where: (1 or K, H, W) bool: the positions that count.

    Returns:
        (K,) float32 in [0, 1].
    """
    p, t = (jnp.where(where, x.astype(jnp.float32), 0) for x in (probabilities, targets))
    shared, own, theirs = (jnp.sum(x, axis=(1, 2)) for x in (p * t, p * p, t * t))
    return 1.0 - 2.0 * shared / (own + theirs + _DICE)


def iou_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """``-log(IoU)`` of xyxy boxes: (..., 4) and (..., 4) to (...) float32 (Yu et al., UnitBox, equation 1).

    IoUs below 1e-6 count as 1e-6, as in MMDetection: the loss and its gradient are finite.

    >>> iou_loss(jnp.array([[0.0, 0, 2, 4]]), jnp.array([[0.0, 0, 4, 4]]))  # IoU 1/2
    Array([0.6931472], dtype=float32)
    """
    return -jnp.log(jnp.maximum(paired_iou(predictions, targets), 1e-6))


def giou_loss(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """``1 - GIoU`` of xyxy boxes: (..., 4) and (..., 4) to (...) float32 in [0, 2] (Rezatofighi et al., algorithm 1).

    ``GIoU = I / U - (C - U) / C``: intersection, union and the smallest enclosing box.

    >>> giou_loss(jnp.array([[0.0, 0, 2, 4], [0, 0, 1, 1]]), jnp.array([[0.0, 0, 4, 4], [3, 0, 4, 1]]))
    Array([0.5, 1.5], dtype=float32)
    """
    intersection, union, hull = _overlap(predictions, targets)
    return 1.0 - intersection / (union + _EMPTY) + (hull - union) / (hull + _EMPTY)


def paired_iou(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """The IoU of each xyxy box with its partner: (..., 4) and (..., 4) to (...) float32; 0 of empty ones.

    >>> paired_iou(jnp.array([[0.0, 0, 2, 4]]), jnp.array([[0.0, 0, 4, 4]]))
    Array([0.5], dtype=float32)
    """
    intersection, union, _ = _overlap(boxes, others)
    return intersection / (union + _EMPTY)


def _overlap(boxes: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The areas, in float32, of the intersection, the union and the smallest enclosing box of (..., 4) and (..., 4)."""
    boxes, others = boxes.astype(jnp.float32), others.astype(jnp.float32)
    inner = jnp.maximum(boxes[..., :2], others[..., :2]), jnp.minimum(boxes[..., 2:], others[..., 2:])
    outer = jnp.minimum(boxes[..., :2], others[..., :2]), jnp.maximum(boxes[..., 2:], others[..., 2:])
    intersection, hull = (area(jnp.concatenate(corners, axis=-1)) for corners in (inner, outer))
    return intersection, area(boxes) + area(others) - intersection, hull
