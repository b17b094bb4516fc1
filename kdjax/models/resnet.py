"""ResNet (He et al., 2016) and ResNeXt (Xie et al., 2017) as feature extractors, with the arithmetic of PyTorch's.

Convolutions and pooling pad symmetrically, as PyTorch does and XLA's "SAME" does not for stride 2, so that imported
weights give identical features.
"""

import functools
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.errors import UserError
from kdjax.models.backbones import Width, map_strides, widened
from kdjax.models.deformable import DeformableConv
from kdjax.models.grouped import grouped_conv
from kdjax.models.norm import BatchNorm
from kdjax.options import FLAG, Rule, check_fields, choice, number, whole
from kdjax.types import Features

_he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (N, H, W, C) to (N, H/stride, W/stride, channels).

    Attributes:
        dilations: of the two convolutions.
    """

    channels: int
    stride: int
    dilations: tuple[int, int] = (1, 1)
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The block's output; ``train`` as in :class:`ResNet`."""
        conv, norm = _parts(self.epsilon, self.axis_name, self.dtype, train)
        first, second = self.dilations
        y = conv(self.channels, (3, 3), self.stride, padding=first, kernel_dilation=first, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.channels, (3, 3), padding=second, kernel_dilation=second, name="conv2")(y)
        y = norm(name="bn2")(y)
        if x.shape != y.shape:
            x = conv(self.channels, (1, 1), self.stride, padding=0, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (N, H, W, C) to (N, H/stride, W/stride, 4 * channels).

    Attributes:
        dilation: of the 3x3 convolution.
    """

    channels: int
    stride: int
    dilation: int = 1
    style: str = "pytorch"
    groups: int = 1
    base_width: int = 64
    merge_groups: bool = True
    deformable: bool = False
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The block's output; ``train`` as in :class:`ResNet`."""
        conv, norm = _parts(self.epsilon, self.axis_name, self.dtype, train)
        inner = self.channels * self.base_width // 64 * self.groups
        strides = (1, self.stride) if self.style == "pytorch" else (self.stride, 1)
        y = conv(inner, (1, 1), strides[0], padding=0, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        if self.deformable:
            y = DeformableConv(inner, strides[1], self.groups, kernel_init=_he, dtype=self.dtype, name="conv2")(y)
        else:
            y = conv(
                inner,
                (3, 3),
                strides[1],
                padding=self.dilation,
                kernel_dilation=self.dilation,
                feature_group_count=self.groups,
                conv_general_dilated=grouped_conv if self.merge_groups else None,
                name="conv2",
            )(y)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(4 * self.channels, (1, 1), padding=0, name="conv3")(y)
        y = norm(name="bn3")(y)
        if x.shape != y.shape:
            x = conv(4 * self.channels, (1, 1), self.stride, padding=0, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y)


LAYERS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth to the kind of block and the number of blocks in each of the four layers."""

STYLES = ("pytorch", "caffe")
"""Where a bottleneck strides."""

STEMS: dict[str, tuple[int, ...]] = {"plain": (64,), "v1c": (32, 32, 64), "v1s": (64, 64, 128)}
"""Channels of the convolutions before the pooling: one of 7x7, or three of 3x3; the first strides."""

OUTPUT_STRIDES: dict[int, tuple[tuple[int, int], ...]] = {
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
}
"""Pixels of the image from one position of C5 to the next, to the stride and the dilation of each layer."""


_OUTPUT_STRIDE = Rule(
    f"one of {', '.join(map(str, OUTPUT_STRIDES))}", lambda value: type(value) is int and value in OUTPUT_STRIDES
)
_DEPTH = Rule(f"one of {', '.join(map(str, LAYERS))}", lambda value: type(value) is int and value in LAYERS)


class ResNet(nn.Module):
    """Images to the maps of the four layers.

    Attributes:
        axis_name: mapped axis over which batch norm averages its statistics in training; None outside of one.
        dtype: of the computation; parameters and statistics are float32.
    """

    depth: Annotated[int, _DEPTH, "10, 18, 34, 50 or 101."] = 50
    width: Width = 1.0
    style: Annotated[
        str,
        choice(*STYLES),
        'Where bottlenecks stride: "pytorch" in the 3x3 convolution ("ResNet v1.5": torchvision, timm, most of '
        'MMDetection), "caffe" in the first 1x1 (the paper; Detectron2 and MMDetection\'s caffe configs).',
    ] = "pytorch"
    groups: Annotated[
        int,
        whole(1),
        "Of the 3x3 convolutions of bottlenecks; ResNeXt-101 64x4d is depth 101, groups 64, base_width 4.",
    ] = 1
    base_width: Annotated[
        int,
        whole(1),
        "Channels of a group in the first layer where groups is above 1; the 3x3 convolution of a block of C "
        "channels has int(C * base_width / 64) * groups.",
    ] = 64
    merge_groups: Annotated[
        bool,
        FLAG,
        "Whether TPUs compute these convolutions in groups of up to 128 channels, with zeros in the kernels between "
        "those that do not meet: the same features for more FLOPs and far less memory. Other devices never do.",
    ] = True
    deformable: Annotated[
        bool,
        FLAG,
        "Whether the 3x3 convolutions of the bottlenecks of C3, C4 and C5 are deformable (Dai et al., 2017): "
        "MMDetection's backbones called dconv_c3-c5, but not its mdconv.",
    ] = False
    stem: Annotated[
        str,
        choice(*STEMS),
        'What stands before the pooling: "plain", one 7x7 convolution of 64 channels; "v1c", three of 3x3 and 32, 32 '
        "and 64 channels (MMSegmentation's ResNet-V1c); \"v1s\", likewise of 64, 64 and 128 (CIRKD's, and MasKD's for "
        "segmentation).",
    ] = "plain"
    output_stride: Annotated[
        int,
        _OUTPUT_STRIDE,
        "Pixels of the image from one position of C5 to the next. Below 32 the last layers keep the size of their "
        "input, and their 3x3 convolutions are dilated instead: of 8, by 2 in C4 and 4 in C5, and by half of it in the "
        "first block of each.",
    ] = 32
    dilate_second: Annotated[
        bool,
        FLAG,
        "Whether the second 3x3 convolution of depth 10, 18 and 34 is dilated too, by the layer's whole dilation "
        "(CIRKD's networks), and not only the first (MMSegmentation's). Blocks of other depths have only one.",
    ] = False
    epsilon: Annotated[
        float,
        number(0),
        "Added to variances by batch norm. torchvision's published COCO_V1 detectors need 0.",
    ] = 1e-5
    remat: Annotated[
        bool,
        FLAG,
        "Whether the backward pass computes the inside of each block anew instead of keeping it: less memory for more "
        "FLOPs, and the same gradients.",
    ] = False
    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check_fields(self)
        of_bottlenecks = (self.style, self.groups, self.base_width, self.deformable)
        if LAYERS[self.depth][0] is BasicBlock and of_bottlenecks != ("pytorch", 1, 64, False):
            raise UserError(
                f"A ResNet of depth {self.depth} has no bottlenecks, which style, groups, base_width and deformable "
                "are about; leave them out, or choose depth 50 or 101."
            )
        if self.deformable and self.output_stride < 32:
            raise UserError(
                f"Deformable convolutions are not dilated, as output_stride={self.output_stride} asks for; leave out "
                "one of the two."
            )
        if widened(64, self.width) * self.base_width < 64:
            raise UserError(
                f"groups={self.groups}, base_width={self.base_width} and width={self.width} leave the 3x3 convolutions "
                "of a ResNet's first layer no channels; each group needs at least one."
            )
        super().__post_init__()

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image from one position of each map to the next, fine to coarse."""
        return map_strides(self.output_stride)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Features:
        """Normalised images (N, H, W, 3) to {"c2": (N, H/4, W/4, C), ... "c5": (N, H/32, W/32, 8 C)}, sizes rounded up.

        A smaller output stride divides the sizes of the last maps instead of 16 and 32.

        ``train`` normalises with the batch's statistics and updates the running ones; otherwise the running
        statistics are used and left alone.
        """
        kind, repeats = LAYERS[self.depth]
        block: Any = nn.remat(kind, static_argnums=(2,)) if self.remat else kind
        shared: dict[str, Any] = {"epsilon": self.epsilon, "axis_name": self.axis_name, "dtype": self.dtype}
        if kind is Bottleneck:
            shared |= {"style": self.style, "groups": self.groups, "base_width": self.base_width}
            shared |= {"merge_groups": self.merge_groups}
        conv, norm = _parts(self.epsilon, self.axis_name, self.dtype, train)
        x, size = images, 7 if self.stem == "plain" else 3
        for index, channels in enumerate(STEMS[self.stem], start=1):
            stride = 2 if index == 1 else 1
            x = conv(widened(channels, self.width), (size, size), stride, padding=size // 2, name=f"conv{index}")(x)
            x = nn.relu(norm(name=f"bn{index}")(x))
        x = max_pool(x)
        maps = {}
        for layer, (count, (stride, dilation)) in enumerate(
            zip(repeats, OUTPUT_STRIDES[self.output_stride], strict=True), start=1
        ):
            own: dict[str, Any] = {"deformable": True} if self.deformable and layer > 1 else {}
            for index in range(count):
                # The block that would have strided has half of the dilation (Yu et al., Dilated Residual Networks).
                first = max(1, dilation // 2) if index == 0 else dilation
                if kind is Bottleneck:
                    own["dilation"] = first
                else:
                    own["dilations"] = first, dilation if self.dilate_second else 1
                x = block(
                    channels=widened(32 * 2**layer, self.width),
                    stride=stride if index == 0 else 1,
                    **shared,
                    **own,
                    name=f"layer{layer}_{index}",
                )(x, train)
            maps[f"c{layer + 1}"] = x
        return maps


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows with stride 2 and padding 1: (N, H, W, C) to (N, ceil(H / 2), ceil(W / 2), C).

    Written as maxima of strided slices, first of rows, then of columns: the gradient of XLA's own pooling takes seven
    times as long on CPU.
    """
    for axis in (1, 2):
        size = -(-x.shape[axis] // 2)
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (1, 1, 0)
        padded = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), edges)
        x = functools.reduce(
            jnp.maximum, (jax.lax.slice_in_dim(padded, i, i + 2 * size - 1, stride=2, axis=axis) for i in range(3))
        )
    return x


def _parts(
    epsilon: float, axis_name: str | None, dtype: Dtype, train: bool
) -> tuple[functools.partial, functools.partial]:
    """The convolution and the batch norm that every layer of a ResNet is made of."""
    conv = functools.partial(nn.Conv, use_bias=False, kernel_init=_he, dtype=dtype)
    norm = functools.partial(BatchNorm, train=train, epsilon=epsilon, axis_name=axis_name, dtype=dtype)
    return conv, norm
