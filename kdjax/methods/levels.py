"""What the methods share: which levels meet, on which grid, which positions are real, how channels are aligned.

What to do with pyramids of other strides, or of other heights and widths, is our own choice [recon].
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.losses import hide, valid_positions
from kdjax.types import Features, Targets, stride


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


def partners(student: Features, teacher: Features) -> dict[str, str]:
    """Which level of the student imitates which level of the teacher: {teacher's: student's}, finest first.

    Levels of the same stride, which is in their name, meet, and the others have no partner. Pyramids without any common
    stride meet at neighbouring levels, a factor of two apart: a level of the teacher takes the student's next finer one
    or, where there is none, the next coarser one [recon].

    >>> x = jnp.ones((1, 4, 4, 8))
    >>> partners({"p3": x, "p4": x}, {"p4": x, "p5": x})
    {'p4': 'p4'}
    >>> partners({"p3": x, "p4": x}, {"p5": x})
    {'p5': 'p4'}

    Raises:
        UserError: if not even neighbours meet.
    """
    levels = sorted(teacher, key=stride)
    if shared := [level for level in levels if level in student]:
        return {level: level for level in shared}
    number = {level: int(level[1:]) for level in levels}
    neighbours = {level: (f"p{number[level] - 1}", f"p{number[level] + 1}") for level in levels}
    found = {level: next((x for x in neighbours[level] if x in student), None) for level in levels}
    if matched := {level: partner for level, partner in found.items() if partner}:
        return matched
    raise UserError(
        f"Student and teacher have no pyramid levels that meet: the student has {_names(student)}, the teacher "
        f"{_names(teacher)}; give them levels of the same or of neighbouring strides."
    )


def pair_levels(student: Features, teacher: Features, targets: Targets) -> list[Pair]:
    """The levels that are distilled, finest first, with the student's maps on the teacher's grids.

    A student's map of another height or width is resized bilinearly, its padding zeroed first (half-pixel centres, no
    antialiasing, as PyTorch's ``interpolate``) [recon].

    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool), jnp.array([[64, 64]]))
    >>> student, teacher = {"p3": jnp.ones((1, 8, 8, 4))}, {"p4": jnp.ones((1, 4, 4, 16))}
    >>> jax.tree.map(jnp.shape, jax.eval_shape(lambda: [pair[1:] for pair in pair_levels(student, teacher, targets)]))
    [((1, 4, 4, 4), (1, 4, 4, 16), (1, 4, 4))]

    Args:
        student: (N, h, w, any channels) by level.
        teacher: (N, H, W, any channels) by level.
        targets: what the images show; their sizes tell images from padding.

    Raises:
        UserError: if no levels meet, see :func:`partners`.
        ValueError: the two pyramids hold different numbers of images.
    """
    pairs = []
    for level, partner in partners(student, teacher).items():
        ours, theirs = student[partner], teacher[level]
        if len(ours) != len(theirs):
            raise ValueError(
                f"The student's {partner} holds {len(ours)} images and the teacher's {level} {len(theirs)}: both must "
                "be features of the same batch."
            )
        if ours.shape[1:3] != theirs.shape[1:3]:
            ours = hide(ours, where=valid(targets, ours, partner))
            shape = (*theirs.shape[:3], ours.shape[-1])
            ours = jax.image.resize(ours, shape, method="bilinear", antialias=False)
        pairs.append(Pair(level, ours, theirs, valid(targets, theirs, level)))
    return pairs


def describe_pairs(student: Features, teacher: Features) -> str:
    """What :func:`pair_levels` makes of two pyramids, in words for the person who starts a run.

    >>> maps = {f"p{level}": jnp.zeros((1, 256 >> level, 256 >> level, 8)) for level in range(3, 8)}
    >>> describe_pairs({"p3": maps["p3"], "p4": maps["p4"]}, maps)
    "distils p3, p4; the teacher's p5, p6, p7 have no partner."
    """
    found = partners(student, teacher)

    def name(level: str, partner: str) -> str:
        ours, theirs = (f"{x.shape[1]}x{x.shape[2]}" for x in (student[partner], teacher[level]))
        if ours == theirs and level == partner:
            return level
        return f"{level} from the student's {partner} ({ours} resized to {theirs})"

    parts = ["distils " + ", ".join(name(level, partner) for level, partner in found.items())]
    for owner, features, used in (("teacher", teacher, found.keys()), ("student", student, set(found.values()))):
        alone = {level: x for level, x in features.items() if level not in used}
        if alone:
            parts.append(f"the {owner}'s {_names(alone)} {'has' if len(alone) == 1 else 'have'} no partner")
    return "; ".join(parts) + "."


def _names(features: Features) -> str:
    return ", ".join(sorted(features, key=stride)) or "none"


def valid(targets: Targets, features: jax.Array, level: str) -> jax.Array:
    """Positions (N, H, W) bool of a level's features (N, H, W, C) that lie in the image, not in its padding.

    >>> targets = Targets(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool), jnp.array([[32, 64]]))
    >>> valid(targets, jnp.ones((1, 2, 2, 8)), "p5").astype(int)
    Array([[[1, 1],
            [0, 0]]], dtype=int32)
    """
    height, width = features.shape[1:3]
    return valid_positions(targets.image_size, (height, width), stride(level))


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
