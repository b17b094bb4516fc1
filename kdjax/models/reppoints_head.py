"""The head of RepPoints (Yang et al., 2019), see :mod:`kdjax.models.reppoints`, and what it predicts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kdjax.models.deformable import DeformableConv
from kdjax.models.dense import conv3x3, pair_maps, prior_bias, towers
from kdjax.types import Features, PairedBoxes, Targets

POINTS = 9
"""Of each location: as many as a 3x3 convolution has taps."""
INITIAL_WEIGHT = 0.5
"""What the boxes of the initial points count in the loss besides those of the refined ones."""
_TO_OFFSETS = 0.1
"""Share of the gradient by the offsets of the deformable convolutions that the initial points get."""
_TO_MOMENTS = 0.01
"""Share of its gradient that the multiplier of the moments gets."""

_GRID = np.moveaxis(np.indices((3, 3), np.float32), 0, -1).reshape(-1) - 1
"""Where the taps of a 3x3 convolution are, (18,): of each, row by row, along y and then along x."""


class RepPointsPredictions(NamedTuple):
    """The maps of the head, level by level. Lengths are in cells of the level, counted from the location.

    Of points there are 9, and of each its place along y and then along x.
    """

    logits: Features
    """{"p3": (N, H, W, classes), ...}, before the sigmoid."""
    points: Features
    """{"p3": (N, H, W, 18), ...} float32: the initial points."""
    moves: Features
    """{"p3": (N, H, W, 18), ...} float32: from there to the refined points."""
    initial: Features
    """{"p3": (N, H, W, 4), ...} float32: the boxes, xyxy, that the initial points stand for."""
    boxes: Features
    """{"p3": (N, H, W, 4), ...} float32: those of the refined points."""

    def paired_boxes(
        self, theirs: Any, *, strides: Mapping[str, int], image_size: jax.Array, targets: Targets
    ) -> dict[str, PairedBoxes]:
        """See :class:`kdjax.types.BoxPredictions`: the points and the moves of another RepPoints, as MasKD's configs.

        What the initial points count is what their boxes do in the loss.
        """
        del targets
        given = theirs if isinstance(theirs, RepPointsPredictions) else RepPointsPredictions({}, {}, {}, {}, {})
        kind = "RepPoints with equal grids"
        initial, refined = (
            pair_maps(ours, maps, strides, image_size, kind=kind)
            for ours, maps in ((self.points, given.points), (self.moves, given.moves))
        )
        return {
            **{f"{level}_initial": pair._replace(weight=INITIAL_WEIGHT) for level, pair in initial.items()},
            **{f"{level}_refined": pair for level, pair in refined.items()},
        }


def box_by_moments(points: jax.Array, multiplier: jax.Array) -> jax.Array:
    """The box that points stand for (Yang et al., section 3.2, the moment-based conversion).

    Its centre is their mean and its half sides are their standard deviations, with n - 1 in the denominator as in the
    authors' code, times e to the multiplier. Points that all are one make a box without an area and get no gradient
    from its sides.

    >>> box = box_by_moments(jnp.array([1.0, 0, 3, 4]), jnp.zeros(2))  # (x, y) = (0, 1), (4, 3)
    >>> [round(float(x), 3) for x in box]
    [-0.828, 0.586, 4.828, 3.414]

    Args:
        points: (..., 2 P) float32, of each y and then x.
        multiplier: (2,) of the width and of the height.

    Returns:
        (..., 4), xyxy.
    """
    points = points.reshape(*points.shape[:-1], -1, 2)[..., ::-1]
    centre = jnp.mean(points, axis=-2, keepdims=True)
    variance = jnp.sum(jnp.square(points - centre), axis=-2) / (points.shape[-2] - 1)
    spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    half = spread * jnp.exp(multiplier).reshape(*[1] * (spread.ndim - 1), 2)
    return jnp.concatenate([centre[..., 0, :] - half, centre[..., 0, :] + half], axis=-1)


def slowed(x: jax.Array, share: float) -> jax.Array:
    """``x``, which gets only a share of its gradient."""
    return share * x + (1 - share) * jax.lax.stop_gradient(x)


class RepPointsHead(nn.Module):
    """The two towers of convolutions, as wide as the pyramid, shared by all levels, and what comes of them.

    The initial points say where two deformable convolutions look, one of which classifies and one of which moves the
    points (Yang et al., section 4 and figure 2).

    Attributes:
        num_classes: number of classes, without a background.
        convs: convolutions in each tower.
        norm: one of ``kdjax.models.norm.NORMS``, after each of them.
        prior: probability that every classifier starts with.
        dtype: of the computation; parameters, points and boxes are float32.
    """

    num_classes: int
    convs: int = 3
    norm: str = "group"
    prior: float = 0.01
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> RepPointsPredictions:
        """{"p3": (N, H, W, C), ...} to the predictions at every location."""
        channels = next(iter(features.values())).shape[-1]
        cls, box = towers(features, convs=self.convs, norm=self.norm, bias=not self.norm, dtype=self.dtype)
        small, points_conv = nn.initializers.normal(0.01), conv3x3(channels, dtype=self.dtype, name="points_conv")

        def deformable(name: str) -> DeformableConv:
            return DeformableConv(channels, kernel_init=nn.initializers.he_uniform(), dtype=self.dtype, name=name)

        def output(size: int, name: str, bias: nn.initializers.Initializer = nn.initializers.zeros) -> nn.Conv:
            return nn.Conv(size, (1, 1), kernel_init=small, bias_init=bias, dtype=self.dtype, name=name)

        points_out, moves_conv, moves_out = (
            output(2 * POINTS, "points"),
            deformable("moves_conv"),
            output(2 * POINTS, "moves"),
        )
        cls_conv, logits = deformable("logits_conv"), output(self.num_classes, "cls_logits", prior_bias(self.prior))
        multiplier = slowed(self.param("moment_multiplier", nn.initializers.zeros, (2,)), _TO_MOMENTS)

        found = RepPointsPredictions({}, {}, {}, {}, {})
        for level in features:
            points = points_out(nn.relu(points_conv(box[level]))).astype(jnp.float32)
            offsets = slowed(points, _TO_OFFSETS) - _GRID.reshape(1, 1, 1, -1)
            moves = moves_out(nn.relu(moves_conv(box[level], offsets))).astype(jnp.float32)
            found.logits[level] = logits(nn.relu(cls_conv(cls[level], offsets)))
            found.points[level], found.moves[level] = points, moves
            found.initial[level] = box_by_moments(points, multiplier)
            found.boxes[level] = box_by_moments(jax.lax.stop_gradient(points) + moves, multiplier)
        return found
