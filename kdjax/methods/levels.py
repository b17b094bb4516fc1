"""What the methods share: which levels meet, which positions are real, how channels are aligned."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import valid_positions
from kdjax.types import Features, Targets, stride


def common_levels(student: Features, teacher: Features) -> tuple[str, ...]:
    """Levels (hence strides) that both pyramids have, finest first.

    Raises:
        ValueError: if they share none, or a shared level has another height or width.
    """
    levels = sorted(student.keys() & teacher.keys(), key=lambda level: int(level[1:]))
    if not levels:
        raise ValueError(
            f"Student and teacher share no pyramid level: the student has {', '.join(student)}, the teacher "
            f"{', '.join(teacher)}; give them a level of the same stride."
        )
    for level in levels:
        if student[level].shape[:3] != teacher[level].shape[:3]:
            raise ValueError(
                f"Level {level} is {student[level].shape} in the student and {teacher[level].shape} in the teacher: "
                "batch, height and width must agree."
            )
    return tuple(levels)


def valid(targets: Targets, features: Features, level: str) -> jax.Array:
    """Positions (N, H, W) bool of a level that lie in the image, not in its padding."""
    _, height, width, _ = features[level].shape
    return valid_positions(targets.image_size, (height, width), stride(level))


def torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """PyTorch's default initialiser of kernels: U(-b, b) with b = 1 / sqrt(fan_in); ``shape`` is (..., in, out)."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


class Conv(nn.Module):
    """A convolution with bias, initialised as PyTorch does by default: kernel and bias ~ U(-b, b), b = 1/sqrt(fan_in).

    The methods' authors left their plain convolutions at that default.
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
    """Maps a student's feature map to the teacher's width by a 1x1 convolution; identity where the widths agree."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, channels)."""
        return x if x.shape[-1] == self.channels else Conv(self.channels, dtype=self.dtype, name="align")(x)
