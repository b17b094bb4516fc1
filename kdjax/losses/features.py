"""What every loss between feature maps shares: valid positions, hiding, and the squared error."""

import functools

import jax
import jax.numpy as jnp

einsum = functools.partial(jnp.einsum, precision="highest")
"""Products in float32: by default a TPU rounds what it multiplies to bfloat16, and a GPU to TF32."""


def valid_positions(image_size: jax.Array, shape: tuple[int, int], stride: int) -> jax.Array:
    """The positions of a pyramid level that see any of the image, as opposed to its padding.

    ``V[n, i, j] = i * stride < height[n] and j * stride < width[n]``: every loss takes it as ``where``.

    >>> valid_positions(jnp.array([[16, 9]]), (3, 2), stride=8).astype(int)
    Array([[[1, 1],
            [1, 1],
            [0, 0]]], dtype=int32)

    Args:
        image_size: (N, 2) height and width of each unpadded image, in pixels.
        shape: height H and width W of the level.
        stride: pixels per position of the level.

    Returns:
        (N, H, W) bool.
    """
    rows = jnp.arange(shape[0])[None] * stride < image_size[:, :1]
    columns = jnp.arange(shape[1])[None] * stride < image_size[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def hide(features: jax.Array, keep: jax.Array | None = None, where: jax.Array | None = None) -> jax.Array:
    """Zeroes what is not kept, and the padding: ``keep * V * F``.

    >>> hide(jnp.ones((1, 1, 3, 1)), keep=jnp.array([[[[True], [False], [True]]]])).ravel()
    Array([1., 0., 1.], dtype=float32)

    Args:
        features: (N, H, W, C), any float dtype, which the result keeps.
        keep: bool, (N, H, W, 1) or (N, 1, 1, C); None keeps everything.
        where: (N, H, W) bool, the valid positions; None for all.
    """
    if keep is not None:
        features = jnp.where(keep, features, 0)
    if where is not None:
        features = jnp.where(where[..., None], features, 0)
    return features


def check_aligned(student: jax.Array, teacher: jax.Array) -> None:
    """Raises ValueError, naming both shapes, unless student and teacher have one shape.

    >>> check_aligned(jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 8)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: Student features (1, 2, 2, 3) and teacher features (1, 2, 2, 8) differ in shape; ...
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student features {student.shape} and teacher features {teacher.shape} differ in shape; "
            "align the student to the teacher first."
        )


def check_share(name: str, value: float) -> None:
    """Raises ValueError, naming it, unless a share or a probability is from 0 to 1.

    >>> check_share("mask_ratio", 65)
    Traceback (most recent call last):
    ValueError: mask_ratio is 65; it must be from 0 to 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be from 0 to 1.")


def squared_error(student: jax.Array, teacher: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """``V (S - sg(T))^2``, entry by entry, in float32.

    The difference is masked before it is squared, so that whatever stands in the padding, even NaN, has no gradient.
    It is taken in float32: features of bfloat16 differ by less than their rounding.

    >>> squared_error(jnp.full((1, 1, 1, 2), 3.0), jnp.ones((1, 1, 1, 2))).ravel()
    Array([4., 4.], dtype=float32)

    Args:
        student: (N, H, W, C), any float dtype.
        teacher: (N, H, W, C), any float dtype; it gets no gradient.
        where: (N, H, W) bool, the valid positions; None for all.

    Raises:
        ValueError: if the shapes differ.
    """
    check_aligned(student, teacher)
    difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.square(hide(difference, where=where))
