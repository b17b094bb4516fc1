"""The loss of classifiers, in float32; averaging over images is left to the classifier."""

import jax
import jax.numpy as jnp

from kdjax.losses.features import check_share


def cross_entropy(logits: jax.Array, classes: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of a softmax with smoothed labels (Szegedy et al., 2016, section 7), image by image.

    ``-sum_k q_k log softmax(z)_k`` with ``q = (1 - e) one_hot(y) + e / K``, as PyTorch and MMPretrain's "original" mode
    have it, where ``e`` is the smoothing and K the number of classes::

        loss = logsumexp(z) - (1 - e) z_y - e mean_k z_k

    >>> cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # log 2
    Array([0.6931472], dtype=float32)
    >>> logits = jnp.array([[2.0, 0.0]])
    >>> cross_entropy(logits, jnp.array([0]), smoothing=1.0) == cross_entropy(logits, jnp.array([1]), smoothing=1.0)
    Array([ True], dtype=bool)

    Args:
        logits: (N, K), any float dtype.
        classes: (N,) int in [0, K).
        smoothing: e, the share of the target that all classes have alike, in [0, 1].

    Returns:
        (N,) float32. Finite, and so is its gradient, for all finite logits.

    Raises:
        ValueError: if ``smoothing`` is no plain number from 0 to 1, or the shapes are of another form.
    """
    check_share("smoothing", smoothing)
    if logits.ndim != 2 or classes.shape != logits.shape[:1]:
        raise ValueError(f"logits are {logits.shape} and classes {classes.shape}; they must be (N, K) and (N,).")
    logits = logits.astype(jnp.float32)
    right = jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
    target = right if smoothing == 0 else (1.0 - smoothing) * right + smoothing * jnp.mean(logits, axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target
