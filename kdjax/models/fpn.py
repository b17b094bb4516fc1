"""The feature pyramid network (Lin et al., 2017) with the levels that detectors add to it."""

import functools
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.norm import NORMS, group_norm
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
    norm: Annotated[str, choice(*NORMS), '"" or "group": what follows every convolution, which then has no bias.'] = ""
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

    def setup(self) -> None:
        """Makes the layers: ``lateral_c<level>``, ``output_p<level>``, ``extra_p<level>``, and their norms."""
        init = nn.initializers.xavier_uniform() if self.xavier else _by_inputs

        def conv(size: int, stride: int = 1) -> nn.Conv:
            return nn.Conv(
                self.channels,
                (size, size),
                stride,
                size // 2,
                use_bias=not self.norm,
                kernel_init=init,
                dtype=self.dtype,
            )

        lateral, above = range(self.min_level, 6), range(6, self.max_level + 1)
        extra = above if self.extra_from != "pool" else ()
        self.lateral = {f"c{level}": conv(1) for level in lateral}
        self.output = {f"p{level}": conv(3) for level in lateral}
        self.extra = {f"p{level}": conv(3, 2) for level in extra}
        norm = functools.partial(group_norm, self.channels, dtype=self.dtype)
        self.lateral_norm = {f"c{level}": norm() for level in lateral if self.norm}
        self.output_norm = {f"p{level}": norm() for level in (*lateral, *extra) if self.norm}

    def __call__(self, maps: Features) -> Features:
        """{"c2": (N, H/4, W/4, C2), ...} to {"p<min_level>": (N, H/2^min_level, W/2^min_level, channels), ...}."""
        return self.normed(self.convolved(maps))

    def convolved(self, maps: Features) -> Features:
        """The levels of the pyramid that come out of a convolution, before its norm."""
        merged: Features = {}
        for level in range(5, self.min_level - 1, -1):
            x = self.lateral[f"c{level}"](maps[f"c{level}"])
            if self.norm:
                x = self.lateral_norm[f"c{level}"](x)
            merged[f"p{level}"] = x if level == 5 else x + upsample(merged[f"p{level + 1}"], x.shape[1:3])
        pyramid = {level: conv(merged[level]) for level, conv in self.output.items()}
        x = maps["c5"] if self.extra_from == "c5" else self._norm("p5", pyramid["p5"])
        for name, conv in self.extra.items():
            if name != "p6" and self.extra_relu:
                x = nn.relu(x)
            pyramid[name] = conv(x)
            x = self._norm(name, pyramid[name])
        return pyramid

    def normed(self, pyramid: Features) -> Features:
        """What :meth:`convolved` gave to the whole pyramid."""
        pyramid = {level: self._norm(level, x) for level, x in pyramid.items()}
        if self.extra_from == "pool":
            for level in range(6, self.max_level + 1):
                pyramid[f"p{level}"] = pyramid[f"p{level - 1}"][:, ::2, ::2]
        return pyramid

    def _norm(self, level: str, x: jax.Array) -> jax.Array:
        return self.output_norm[level](x) if self.norm else x


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
