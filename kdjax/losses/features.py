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


def check_maps(where: jax.Array | None = None, /, **maps: jax.Array) -> None:
    """Raises ValueError, naming it, unless each map is (N, H, W, C) of floats and ``where`` (N, H, W) fits it.

    >>> check_maps(jnp.ones((1, 4, 4), bool), teacher=jnp.ones((1, 8, 4, 4)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: where has shape (1, 4, 4) and teacher (1, 8, 4, 4), which looks like (N, C, H, W); features must be ...
    """
    for name, x in maps.items():
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; features must be (N, H, W, C), of floats.")
        if where is not None and where.shape != x.shape[:3]:
            if where.shape == (x.shape[0], *x.shape[2:]):
                _refuse_channels_first(f"where has shape {where.shape} and {name} {x.shape}, which looks like")
            raise ValueError(
                f"where has shape {where.shape} and {name} {x.shape}; it must be (N, H, W) of features (N, H, W, C)."
            )


def _refuse_channels_first(what: str) -> None:
    raise ValueError(
        f"{what} (N, C, H, W); features must be (N, H, W, C): jnp.moveaxis(features, 1, -1) makes them so."
    )


def check_aligned(student: jax.Array, teacher: jax.Array, where: jax.Array | None = None) -> None:
    """Raises ValueError, naming both shapes, unless student and teacher are maps of one shape.

    >>> check_aligned(jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2, 8)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: Student features (1, 2, 2, 3) and teacher features (1, 2, 2, 8) differ in shape; ...
    """
    check_maps(where, student=student, teacher=teacher)
    if student.shape != teacher.shape:
        what = f"Student features {student.shape} and teacher features {teacher.shape} differ in shape"
        if student.shape[0] == teacher.shape[0] and student.shape[2:] == teacher.shape[2:]:
            _refuse_channels_first(f"{what} as maps of other widths do that are")
        raise ValueError(f"{what}; align the student to the teacher first.")


def check_keep(keep: jax.Array, features: jax.Array) -> None:
    """Raises ValueError unless a mask is (N, H, W, 1) or (N, 1, 1, C) of features (N, H, W, C), or 1 where N is.

    >>> check_keep(jnp.ones((2, 5, 7), bool), jnp.ones((2, 5, 7, 4)))
    Traceback (most recent call last):
    ValueError: keep has shape (2, 5, 7); of features (2, 5, 7, 4) it must be (2, 5, 7, 1) or (2, 1, 1, 4).
    """
    images, height, width, channels = features.shape
    forms = (images, height, width, 1), (images, 1, 1, channels)
    if keep.ndim != 4 or not any(keep.shape in (form, (1, *form[1:])) for form in forms):
        raise ValueError(
            f"keep has shape {keep.shape}; of features {features.shape} it must be {forms[0]} or {forms[1]}."
        )


def check_keys(keys: jax.Array, images: int) -> None:
    """Raises ValueError unless there is one typed PRNG key for each image.

    >>> check_keys(jax.random.key(0), 2)
    Traceback (most recent call last):
    ValueError: keys is key<fry>[]; it must hold a typed key for each image: jax.random.split(jax.random.key(0), 2).
    """
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (images,):
        raise ValueError(
            f"keys is {keys.dtype}{list(keys.shape)}; it must hold a typed key for each image: "
            f"jax.random.split(jax.random.key(0), {images})."
        )


def check_known(name: str, value: float) -> None:
    """Raises ValueError, naming it, where a number is not known before a function runs.

    >>> jax.jit(lambda ratio: check_known("ratio", ratio))(0.5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ratio is traced; it must be a plain number: close over it, or name it in jax.jit's static_argnames...
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced; it must be a plain number: close over it, or name it in jax.jit's static_argnames."
        )


def check_share(name: str, value: float) -> None:
    """Raises ValueError, naming it, unless a share or a probability is a plain number from 0 to 1.

    >>> check_share("mask_ratio", 65)
    Traceback (most recent call last):
    ValueError: mask_ratio is 65; it must be from 0 to 1.
    """
    check_known(name, value)
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
        ValueError: if the shapes differ, or are not (N, H, W, C).
    """
    check_aligned(student, teacher, where)
    difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.square(hide(difference, where=where))
