"""The heads of detectors that look twice (Ren et al., Faster R-CNN, 2015; He et al., Mask R-CNN, 2017)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.rpn import RPNHead

BOX_BINS = 7
"""Side of the grid that RoIs are pooled to for classes and boxes."""
MASK_BINS = 14
"""Side of the grid that RoIs are pooled to for masks, which are twice as fine."""


class BoxHead(nn.Module):
    """Two fully connected layers, then the classes and the boxes.

    Attributes:
        num_classes: number of classes, without a background.
        regressors: how many boxes an RoI gets: one for each class, or 1 for all.
        channels: width of the two layers.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    regressors: int
    channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(N, R, 7, 7, C) to logits (N, R, classes + 1) and deltas (N, R, regressors * 4)."""
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = pooled.reshape(*pooled.shape[:2], -1)
        for name in ("fc1", "fc2"):
            x = nn.relu(dense(self.channels, kernel_init=nn.initializers.xavier_uniform(), name=name)(x))
        logits = dense(self.num_classes + 1, kernel_init=nn.initializers.normal(0.01), name="classes")(x)
        deltas = dense(4 * self.regressors, kernel_init=nn.initializers.normal(0.001), name="deltas")(x)
        return logits, deltas


class MaskHead(nn.Module):
    """Four convolutions, as wide as the pyramid, an upsampling by two, and a mask for every class.

    Attributes:
        num_classes: number of classes.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """(N, R, 14, 14, C) to logits (N, R, 28, 28, classes)."""
        n, r, *_, channels = pooled.shape
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = pooled.reshape(n * r, *pooled.shape[2:])
        for index in range(4):
            x = nn.relu(nn.Conv(channels, (3, 3), kernel_init=init, dtype=self.dtype, name=f"conv_{index}")(x))
        x = nn.ConvTranspose(channels, (2, 2), (2, 2), kernel_init=init, dtype=self.dtype, name="upsample")(x)
        x = nn.Conv(self.num_classes, (1, 1), kernel_init=init, dtype=self.dtype, name="logits")(nn.relu(x))
        return x.reshape(n, r, *x.shape[1:])


class RCNNHead(nn.Module):
    """The region proposal network, a box head for every stage, and mask heads.

    Attributes:
        num_classes: number of classes, without a background.
        anchors: number of anchors at a location.
        stages: number of stages.
        masks: number of mask heads, of the first stages.
        class_agnostic: whether an RoI gets one box for all classes, not one for each.
        channels: width of the box heads.
        dtype: of the computation; parameters are float32.
    """

    num_classes: int
    anchors: int
    stages: int
    masks: int
    class_agnostic: bool
    channels: int
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Names the heads ``rpn``, ``box_<stage>`` and ``mask_<stage>``."""
        self.rpn = RPNHead(self.anchors, dtype=self.dtype)
        regressors = 1 if self.class_agnostic else self.num_classes
        self.box = [BoxHead(self.num_classes, regressors, self.channels, dtype=self.dtype) for _ in range(self.stages)]
        self.mask = [MaskHead(self.num_classes, dtype=self.dtype) for _ in range(self.masks)]
