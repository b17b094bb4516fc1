"""What the methods share: which levels meet, on which grid, which positions are real, how channels are aligned.

What to do with pyramids of other strides, or of other heights and widths, is our own choice [recon].
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import hide, valid_positions
from kdjax.losses.features import check_keys, check_maps
from kdjax.types import View


class Pair(NamedTuple):
    """One level of the teacher and what the student has for it, on the teacher's grid."""

    level: str
    """The teacher's name of the level."""
    student: jax.Array
    """(N, H, W, C of the student)."""
    teacher: jax.Array
    """(N, H, W, C)."""
    where: jax.Array
    """(N, H, W) bool: the positions that lie in the image, not in its padding."""


def partners(student: View, teacher: View) -> dict[str, str]:
    """Which level of the student imitates which level of the teacher: {teacher's: student's}, finest first.

    Levels of the same name meet, then those of the same stride that are left; the others have no partner. Models
    without any common level meet at neighbouring ones, a factor of two apart: a level of the teacher takes the
    student's next finer one or, where there is none, the next coarser one [recon].

    >>> x, strides = jnp.ones((1, 4, 4, 8)), {"p3": 8, "p4": 16, "p5": 32}
    >>> student = View({"p3": x, "p4": x}, strides)
    >>> partners(student, View({"p4": x, "p5": x}, strides))
    {'p4': 'p4'}
    >>> partners(student, View({"p5": x}, strides))
    {'p5': 'p4'}
    >>> partners(student, View({"c4": x}, {"c4": 16}))
    {'c4': 'p4'}

    Raises:
        UserError: if not even neighbours meet.
    """
    levels, free = _levels(teacher), _levels(student)
    found = {level: level for level in levels if level in free}
    left = [level for level in free if level not in found]
    for level in levels:
        same = [x for x in left if student.stride(x) == teacher.stride(level)]
        if level not in found and same:
            found[level] = same[0]
            left.remove(same[0])
    if not found:
        for level in levels:
            near = [x for factor in (0.5, 2) for x in free if student.stride(x) == factor * teacher.stride(level)]
            found |= {level: near[0]} if near else {}
    if found:
        return {level: found[level] for level in levels if level in found}
    ours, theirs = (", ".join(_levels(view)) or "none" for view in (student, teacher))
    raise UserError(
        f"Student and teacher have no pyramid levels that meet: the student has {ours}, the teacher {theirs}; give "
        "them levels of the same or of neighbouring strides."
    )


def pair_levels(student: View, teacher: View, size: jax.Array) -> list[Pair]:
    """The levels that are distilled, finest first, with the student's maps on the teacher's grids.

    A student's map of another height or width is resized bilinearly, its padding zeroed first (half-pixel centres, no
    antialiasing, as PyTorch's ``interpolate``) [recon].

    >>> student = View({"p3": jnp.ones((1, 8, 8, 4))}, {"p3": 8})
    >>> teacher = View({"p4": jnp.ones((1, 4, 4, 16))}, {"p4": 16})
    >>> pair = lambda: [pair[1:] for pair in pair_levels(student, teacher, jnp.array([[64, 64]]))]
    >>> jax.tree.map(jnp.shape, jax.eval_shape(pair))
    [((1, 4, 4, 4), (1, 4, 4, 16), (1, 4, 4))]

    Args:
        student: features (N, h, w, any channels) by level.
        teacher: features (N, H, W, any channels) by level.
        size: (N, 2) height and width of the images, which tell them from padding.

    Raises:
        UserError: if no levels meet, see :func:`partners`.
        ValueError: the two pyramids hold different numbers of images, or see different parts of them; a level has no
            stride, or is no map (N, H, W, C).
    """
    for name, view in (("student", student), ("teacher", teacher)):
        _check_maps(name, view)
    pairs = []
    for level, partner in partners(student, teacher).items():
        ours, theirs = student.features[partner], teacher.features[level]
        _check_extent(partner, student, level, teacher)
        if len(ours) != len(theirs):
            raise ValueError(
                f"The student's {partner} holds {len(ours)} images and the teacher's {level} {len(theirs)}: both must "
                "be features of the same batch."
            )
        if ours.shape[1:3] != theirs.shape[1:3]:
            ours = hide(ours, where=valid(student, size)[partner])
            shape = (*theirs.shape[:3], ours.shape[-1])
            ours = jax.image.resize(ours, shape, method="bilinear", antialias=False)
        pairs.append(Pair(level, ours, theirs, valid(teacher, size)[level]))
    return pairs


def _check_maps(name: str, view: View) -> None:
    """Raises ValueError unless every level has a stride and is a map (N, H, W, C)."""
    if unknown := [level for level in view.features if level not in dict(view.strides)]:
        levels = ", ".join(dict(view.strides)) or "none"
        raise ValueError(
            f"The {name} has features {unknown[0]!r} and strides of {levels}: name the stride of each level."
        )
    maps = {f"{name}'s {level}": x for level, x in view.features.items()}
    check_maps(**maps)
    shapes = [x.shape for x in maps.values()]
    if (
        len({shape[1] for shape in shapes})
        == 1
        < len({shape[2] for shape in shapes})
        == len({shape[3] for shape in shapes})
    ):
        raise ValueError(
            f"The {name}'s features {', '.join(map(str, shapes))} look like (N, C, H, W); they must be (N, H, W, C): "
            "jnp.moveaxis(features, 1, -1) makes them so."
        )


def _check_extent(partner: str, student: View, level: str, teacher: View) -> None:
    """Raises ValueError unless two maps cover about as many pixels."""
    strides = student.stride(partner), teacher.stride(level)
    shapes = student.features[partner].shape, teacher.features[level].shape
    for axis in (1, 2):
        ours, theirs = (shape[axis] * stride for shape, stride in zip(shapes, strides, strict=True))
        if abs(ours - theirs) > 2 * max(strides):
            raise ValueError(
                f"The student's {partner} {shapes[0]} of stride {strides[0]} and the teacher's {level} {shapes[1]} of "
                f"stride {strides[1]} cover {ours} and {theirs} pixels: both must be (N, H, W, C) of the same images."
            )


def describe_pairs(student: View, teacher: View) -> str:
    """What :func:`pair_levels` makes of two pyramids, in words for the person who starts a run.

    >>> maps = {f"p{level}": jnp.zeros((1, 256 >> level, 256 >> level, 8)) for level in range(3, 8)}
    >>> strides = {f"p{level}": 1 << level for level in range(3, 8)}
    >>> describe_pairs(View({"p3": maps["p3"], "p4": maps["p4"]}, strides), View(maps, strides))
    "distils p3, p4; the teacher's p5, p6, p7 have no partner."
    """
    found = partners(student, teacher)

    def name(level: str, partner: str) -> str:
        ours, theirs = (f"{x.shape[1]}x{x.shape[2]}" for x in (student.features[partner], teacher.features[level]))
        if ours == theirs and level == partner:
            return level
        return f"{level} from the student's {partner} ({ours} resized to {theirs})"

    parts = ["distils " + ", ".join(name(level, partner) for level, partner in found.items())]
    for owner, view, used in (("teacher", teacher, found.keys()), ("student", student, set(found.values()))):
        alone = [level for level in _levels(view) if level not in used]
        if alone:
            parts.append(f"the {owner}'s {', '.join(alone)} {'has' if len(alone) == 1 else 'have'} no partner")
    return "; ".join(parts) + "."


def _levels(view: View) -> list[str]:
    """Finest first."""
    return sorted(view.features, key=view.stride)


def valid(view: View, size: jax.Array) -> dict[str, jax.Array]:
    """Of each level the positions (N, H, W) bool that lie in images of ``size`` (N, 2), not in their padding.

    >>> valid(View({"p5": jnp.ones((1, 2, 2, 8))}, {"p5": 32}), jnp.array([[32, 64]]))["p5"].astype(int)
    Array([[[1, 1],
            [0, 0]]], dtype=int32)
    """
    return {
        level: valid_positions(size, (x.shape[1], x.shape[2]), view.stride(level)) for level, x in view.features.items()
    }


SHOWN = "shown"
"""The collection of what methods show of themselves to people, by "<what>/<level>"."""


def show(method: nn.Module, level: str, **arrays: jax.Array | Callable[[], jax.Array]) -> None:
    """Shows what a method does at a level to whoever makes ``SHOWN`` mutable; nothing is computed for anybody else.

    Args:
        method: in its ``nn.compact`` method.
        level: the teacher's name of it.
        **arrays: what is shown, or what computes it, by name: (N, H, W, K) of positions or (N, C) of channels, bool
            or float.
    """
    if method.is_initializing() or not method.is_mutable_collection(SHOWN):
        return
    for name, x in arrays.items():
        shown = jax.lax.stop_gradient(x() if callable(x) else x)
        method.sow(SHOWN, f"{name}/{level}", shown, lambda _, new: new, lambda: None)


def keys_of(keys: jax.Array, images: int, number: int) -> jax.Array:
    """The keys that a level draws from, (N,), of those of the images.

    >>> keys_of(jax.random.split(jax.random.key(0), 2), 2, number=3).shape
    (2,)

    Raises:
        ValueError: there is not one typed key for each of as many images.
    """
    check_keys(keys, images)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """PyTorch's default initialiser of kernels: U(-b, b) with b = 1 / sqrt(fan_in); ``shape`` is (..., in, out).

    >>> jnp.max(torch_uniform(jax.random.key(0), (1, 1, 4, 1000))).round(2)
    Array(0.5, dtype=float32)
    """
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


class Conv(nn.Module):
    """A convolution with bias, initialised as PyTorch does by default: kernel and bias ~ U(-b, b), b = 1/sqrt(fan_in).

    The methods' authors left their plain convolutions at that default.

    >>> y, variables = jax.eval_shape(Conv(16, 3).init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    >>> y.shape, jax.tree.map(jnp.shape, variables["params"]["conv"])
    ((1, 8, 8, 16), {'bias': (16,), 'kernel': (3, 3, 4, 16)})
    """

    features: int
    kernel: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, features)."""
        bound = (self.kernel**2 * x.shape[-1]) ** -0.5

        def bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            padding=self.kernel // 2,
            kernel_init=torch_uniform,
            bias_init=bias,
            dtype=self.dtype,
            name="conv",
        )(x)


class Align(nn.Module):
    """Maps a student's feature map to the teacher's width by a 1x1 convolution; identity where the widths agree.

    >>> jax.eval_shape(Align(16).init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 4)))[0].shape
    (1, 8, 8, 16)
    >>> Align(4).init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    {}
    """

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, channels)."""
        return x if x.shape[-1] == self.channels else Conv(self.channels, dtype=self.dtype, name="align")(x)
