"""The feature pyramid network (Lin et al., 2017) with the levels that detectors add to it."""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.options import FLAG, Rule, check_fields, choice, whole
from kdjax.types import Features

_by_inputs = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")

EXTRA_FROM = ("c5", "p5", "pool")
"""What the levels above P5 may be made of."""


_FINEST = Rule("a whole number from 2 to 5", lambda value: type(value) is int and 2 <= value <= 5)


class FPN(nn.Module):
    """Backbone maps to a pyramid of equal channels.

    Attributes:
        dtype: of the computation; parameters are float32.
    """

    channels: Annotated[int, whole(1), "Of every level of the pyramid."] = 256
    min_level: Annotated[int, _FINEST, "Finest level, 2 to 5."] = 3
    max_level: Annotated[int, whole(5), "Coarsest level, at least 5."] = 7
    extra_from: Annotated[
        str,
        choice(*EXTRA_FROM),
        'What P6 is made of: a strided convolution of "c5" (RetinaNet\'s paper, MMDetection) or of "p5" '
        '(torchvision, FCOS), as are the levels above it of the level below; or by "pool", where each level above '
        "P5 is every second position of the level below, without parameters (Faster R-CNN).",
    ] = "p5"
    extra_relu: Annotated[
        bool,
        FLAG,
        "Whether P7 is made of relu(P6) (the paper, torchvision) or of P6 (MMDetection's RetinaNet).",
    ] = True
    xavier: Annotated[
        bool,
        FLAG,
        "Start kernels from U(-b, b) with b² = 6 / (fan_in + fan_out), as MMDetection does, instead of 3 / fan_in, as "
        "torchvision and Detectron2 do: where both widths are one, they are the same.",
    ] = False
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each level to the next, fine to coarse."""
        return {f"p{level}": 2**level for level in range(self.min_level, self.max_level + 1)}

    @nn.compact
    def __call__(self, maps: Features) -> Features:
        """{"c2": (N, H/4, W/4, C2), ...} to {"p<min_level>": (N, H/2^min_level, W/2^min_level, channels), ...}."""
        init = nn.initializers.xavier_uniform() if self.xavier else _by_inputs

        def conv(size: int, stride: int, name: str) -> nn.Conv:
            return nn.Conv(
                self.channels, (size, size), stride, size // 2, kernel_init=init, dtype=self.dtype, name=name
            )

        merged: Features = {}
        for level in range(5, self.min_level - 1, -1):
            x = conv(1, 1, f"lateral_c{level}")(maps[f"c{level}"])
            merged[f"p{level}"] = x if level == 5 else x + upsample(merged[f"p{level + 1}"], x.shape[1:3])
        pyramid = {
            f"p{level}": conv(3, 1, f"output_p{level}")(merged[f"p{level}"]) for level in range(self.min_level, 6)
        }
        x = maps["c5"] if self.extra_from == "c5" else pyramid["p5"]
        for level in range(6, self.max_level + 1):
            if self.extra_from == "pool":
                x = pyramid[f"p{level}"] = x[:, ::2, ::2]
                continue
            if level > 6 and self.extra_relu:
                x = nn.relu(x)
            x = pyramid[f"p{level}"] = conv(3, 2, f"extra_p{level}")(x)
        return pyramid


def upsample(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Nearest-neighbour upsampling by two, (N, h, w, C) to (N, H, W, C), where ``h = ceil(H / 2)`` and so is w.

    Equals PyTorch's ``interpolate(x, size=size, mode="nearest")`` for these sizes, odd ones included.
    """
    n, h, w, c = x.shape
    if (h, w) != (-(-size[0] // 2), -(-size[1] // 2)):
        raise ValueError(
            f"A map of {h}x{w} is not half of {size[0]}x{size[1]}, rounded up: it cannot be upsampled to it."
        )
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
    return x[:, : size[0], : size[1]]
