"""The head of FCOS (Tian et al., 2019), see :mod:`kdjax.models.fcos`, and what it predicts."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax.models.dense import conv3x3, pair_maps, prior_bias, towers
from kdjax.types import Features, PairedBoxes, Targets

_FARTHEST = 1e5
"""Pixels, beyond every image, that a distance is limited to where it is an exponential, so that nothing overflows."""


class FCOSPredictions(NamedTuple):
    """The maps of the head, level by level."""

    logits: Features
    """{"p3": (N, H, W, classes), ...}, before the sigmoid."""
    distances: Features
    """{"p3": (N, H, W, 4), ...} float32: from the location to the left, top, right and bottom side, in pixels."""
    centerness: Features
    """{"p3": (N, H, W, 1), ...}, before the sigmoid."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: the distances, in strides, of another FCOS.

        No paper's configs imitate those; in strides, maps of all levels are of one scale, as RetinaNet's are in sizes
        of anchors.
        """
        del targets

        def in_strides(maps: Features) -> Features:
            return {level: distances / strides[level] for level, distances in maps.items() if level in strides}

        given = in_strides(theirs.distances) if isinstance(theirs, FCOSPredictions) else {}
        return pair_maps(in_strides(self.distances), given, strides, image_size, kind="FCOS with equal grids")


class FCOSHead(nn.Module):
    """The two towers of convolutions, as wide as the pyramid, shared by all levels.

    Attributes:
        num_classes: number of classes, without a background.
        strides: (level, stride in pixels) of every level.
        convs: convolutions in each tower before the last one.
        norm: "" or "group", as in :func:`kdjax.models.dense.tower`.
        conv_bias: whether convolutions that a normalisation follows have a bias.
        prior: probability that every classifier starts with.
        norm_on_box: whether distances are relu(x) strides, or exp(x) pixels.
        centerness_on_box: whether the centerness comes from the tower of the boxes, or from that of the classes.
        level_scale: whether each level multiplies x by a number of its own, which is learnt.
        dtype: of the computation; parameters and distances are float32.
    """

    num_classes: int
    strides: tuple[tuple[str, int], ...]
    convs: int = 4
    norm: str = "group"
    conv_bias: bool = False
    prior: float = 0.01
    norm_on_box: bool = False
    centerness_on_box: bool = False
    level_scale: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> FCOSPredictions:
        """{"p3": (N, H, W, C), ...} to the predictions at every location."""
        bias = self.conv_bias or not self.norm
        cls, box = towers(features, convs=self.convs, norm=self.norm, bias=bias, dtype=self.dtype)
        logits = conv3x3(self.num_classes, bias_init=prior_bias(self.prior), dtype=self.dtype, name="cls_logits")
        sides = conv3x3(4, dtype=self.dtype, name="box_distances")
        centerness = conv3x3(1, dtype=self.dtype, name="centerness")

        def distances(level: str, x: jax.Array) -> jax.Array:
            x = sides(x).astype(jnp.float32)
            if self.level_scale:
                x *= self.param(f"scale_{level}", nn.initializers.ones, ())
            if self.norm_on_box:
                return nn.relu(x) * dict(self.strides)[level]
            return jnp.exp(jnp.minimum(x, math.log(_FARTHEST)))

        return FCOSPredictions(
            logits={level: logits(x) for level, x in cls.items()},
            distances={level: distances(level, x) for level, x in box.items()},
            centerness={level: centerness(x) for level, x in (box if self.centerness_on_box else cls).items()},
        )
