"""MobileNets as feature extractors, with the arithmetic of PyTorch's."""

import functools
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.backbones import Width, map_strides, widened
from kdjax.models.norm import ConvNorm
from kdjax.options import FLAG, Rule, check_fields
from kdjax.types import Features

_V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Table 1 of MobileNet: the channels and the stride of each block."""

_V1_MAPS = {3: "c2", 5: "c3", 11: "c4", 13: "c5"}
"""Number of the last block of each stride to the name of its map."""

_V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Table 2 of MobileNetV2: the expansion factor, the channels, the number of blocks and the stride of the first."""

_V2_BLOCKS = [
    (expansion, channels, stride if block == 0 else 1)
    for expansion, channels, blocks, stride in _V2_STAGES
    for block in range(blocks)
]

_V2_MAPS = {3: "c2", 6: "c3", 13: "c4", 17: "c5"}
"""Number of the last block of each stride to the name of its map."""

_OUTPUT_STRIDE = Rule("32 or 8", lambda value: type(value) is int and value in (32, 8))


class Separable(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution: (N, H, W, C) to (N, H/stride, W/stride, channels)."""

    channels: int
    stride: int = 1
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The block's output; ``train`` as in :class:`MobileNetV1`."""
        layer = functools.partial(ConvNorm, axis_name=self.axis_name, dtype=self.dtype)
        x = nn.relu(layer(x.shape[-1], 3, self.stride, groups=x.shape[-1], name="depthwise")(x, train))
        return nn.relu(layer(self.channels, 1, name="pointwise")(x, train))


class MobileNetV1(nn.Module):
    """Images to maps of strides 4, 8, 16 and 32 (Howard et al., MobileNet, 2017), as MGD's authors build it [code].

    Attributes:
        axis_name: mapped axis over which batch norm averages its statistics in training; None outside of one.
        dtype: of the computation; parameters and statistics are float32.
    """

    width: Width = 1.0
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each map to the next, fine to coarse."""
        return map_strides()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to {"c2": (N, H/4, W/4, 128), "c3": 256, "c4": 512, "c5": 1024 channels}.

        Sizes are rounded up. ``train`` normalises with the batch's statistics and updates the running ones; otherwise
        the running statistics are used and left alone.
        """
        shared: dict[str, Any] = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = nn.relu(ConvNorm(widened(32, self.width), 3, 2, **shared, name="stem")(images, train))
        maps = {}
        for block, (channels, stride) in enumerate(_V1_BLOCKS, start=1):
            x = Separable(widened(channels, self.width), stride, **shared, name=f"block_{block}")(x, train)
            if block in _V1_MAPS:
                maps[_V1_MAPS[block]] = x
        return maps


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection: (N, H, W, C) to (N, H/stride, W/stride, channels).

    With a shortcut where the shapes of both ends agree; no expansion where its factor is 1.
    """

    channels: int
    expansion: int
    stride: int = 1
    dilation: int = 1
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The block's output; ``train`` as in :class:`MobileNetV2`."""
        layer = functools.partial(ConvNorm, axis_name=self.axis_name, dtype=self.dtype)
        inner = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = jax.nn.relu6(layer(inner, 1, name="expand")(y, train))
        y = layer(inner, 3, self.stride, self.dilation, groups=inner, name="depthwise")(y, train)
        y = layer(self.channels, 1, name="project")(jax.nn.relu6(y), train)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Images to maps of strides 4, 8, 16 and 32 (Sandler et al., MobileNetV2, 2018), as torchvision builds it.

    Attributes:
        axis_name: mapped axis over which batch norm averages its statistics in training; None outside of one.
        dtype: of the computation; parameters and statistics are float32.
    """

    width: Width = 1.0
    output_stride: Annotated[
        int,
        _OUTPUT_STRIDE,
        "Pixels of the image from one position of C5 to the next. Of 8, the depthwise convolutions of C4 and C5 are "
        "dilated instead of strided (MasKD's segmentation): by 2 and 4, and by half of it in the first block of each.",
    ] = 32
    last: Annotated[
        bool,
        FLAG,
        "Whether C5 is what the last 1x1 convolution of 1280 channels makes of it, as a classifier takes it.",
    ] = False
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each map to the next, fine to coarse."""
        return map_strides(self.output_stride)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to {"c2": (N, H/4, W/4, 24), "c3": 32, "c4": 96, "c5": 320 or 1280 channels}.

        Sizes are divided by ``strides`` and rounded up. ``train`` normalises with the batch's statistics and updates
        the running ones; otherwise the running statistics are used and left alone.
        """
        shared: dict[str, Any] = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = jax.nn.relu6(ConvNorm(widened(32, self.width), 3, 2, **shared, name="stem")(images, train))
        maps, reached, dilation = {}, 2, 1
        for block, (expansion, channels, stride) in enumerate(_V2_BLOCKS, start=1):
            dilated = stride == 2 and reached == self.output_stride
            stride = 1 if dilated else stride
            x = InvertedResidual(
                widened(channels, self.width), expansion, stride, dilation, **shared, name=f"block_{block}"
            )(x, train)
            reached *= stride
            dilation *= 2 if dilated else 1  # The block that would have strided keeps the dilation before it.
            if block in _V2_MAPS:
                maps[_V2_MAPS[block]] = x
        if self.last:
            channels = max(1280, widened(1280, self.width))
            maps["c5"] = jax.nn.relu6(ConvNorm(channels, 1, **shared, name="last")(x, train))
        return maps
