"""What the heads that predict at every location of a pyramid share: layers, losses and the way to detections."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.errors import UserError
from kdjax.losses.detection import sigmoid_focal_loss
from kdjax.losses.features import valid_positions
from kdjax.losses.reduce import masked_sum
from kdjax.models.assign import Assignment
from kdjax.models.detector import Detector
from kdjax.models.nms import nms
from kdjax.types import Detections, Features, PairedBoxes, Sampling

NORMS = ("", "group")

conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=nn.initializers.normal(0.01))
"""A convolution of a head: takes the number of channels, ``dtype`` and ``name``."""


class DenseDetector(Detector):
    """A detector whose one head, ``head``, predicts from the pyramid alone."""

    def heads(self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None) -> Any:
        """The neck's pyramid to predictions; the rest is for detectors with proposals."""
        del image_size, sampling
        return self.head(features)

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> Any:
        """What the head says where a student predicted something: it predicts everywhere, wherever that was."""
        del predictions
        return self.heads(features, image_size)

    @nn.nowrap
    def join(self, maps: Features, size: int) -> jax.Array:
        """{"p3": (N, H, W, A * size), ...} to (N, entries of all levels, size), fine to coarse, float32."""
        return join([maps[level] for level in self.ordered(maps)], size)


def tower(features: Features, kind: str, *, convs: int, norm: str, bias: bool, dtype: Dtype) -> Features:
    """Convolutions as wide as the pyramid, each followed by a ReLU, shared by all levels.

    To be called in the compact method of a head, which the layers ``<kind>_conv_<i>`` and ``<kind>_norm_<i>`` become
    a part of.

    Args:
        features: {"p3": (N, H, W, C), ...}.
        kind: what the names of the layers begin with.
        convs: number of convolutions.
        norm: "" or "group", group normalisation after each of them, of at most 32 groups of at least 8 channels.
        bias: whether they have one.
        dtype: of the computation.

    Returns:
        features of the same shapes.
    """
    channels = next(iter(features.values())).shape[-1]
    for index in range(convs):
        conv = conv3x3(channels, use_bias=bias, dtype=dtype, name=f"{kind}_conv_{index}")
        features = {level: conv(x) for level, x in features.items()}
        if norm:
            groups = math.gcd(32, max(1, channels // 8))
            normalise = nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, name=f"{kind}_norm_{index}")
            features = {level: normalise(x) for level, x in features.items()}
        features = {level: nn.relu(x) for level, x in features.items()}
    return features


def prior_bias(prior: float) -> nn.initializers.Initializer:
    """The bias of a classifier that starts with the probability ``prior`` (Lin et al., RetinaNet, section 4.1)."""
    return nn.initializers.constant(-math.log((1 - prior) / prior))


def join(maps: Sequence[jax.Array], size: int) -> jax.Array:
    """Maps (N, H, W, A * size), one after another, to (N, entries of all maps, size) float32."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, size) for x in maps], axis=1).astype(jnp.float32)


def focal_sums(logits: jax.Array, labels: jax.Array, assignment: Assignment) -> jax.Array:
    """The focal loss of each image's classifiers, summed over everything that is positive or negative.

    Args:
        logits: (N, A, classes).
        labels: (N, A) int, the class of the object that each anchor or location learns; meaningful where positive.
        assignment: of N images.

    Returns:
        (N,) float32.
    """
    positive, negative = assignment.positive, assignment.negative
    is_class = positive[..., None] & (labels[..., None] == jnp.arange(logits.shape[-1])[None, None])
    return masked_sum(sigmoid_focal_loss(logits, is_class), (positive | negative)[..., None], axis=(1, 2))


def best_pairs(scores: jax.Array, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``limit`` highest entries of each image's scores (N, A, classes): their values, anchors and classes (N, L).

    In descending order, of equals the first, L = min(limit, A * classes). The best pairs belong to the anchors with
    the best classes, so only those anchors' classes are ranked against each other: the result of sorting all pairs for
    a fraction of the work.
    """
    _, size, classes = scores.shape
    _, anchor = jax.lax.top_k(jnp.max(scores, axis=-1), min(limit, size))
    anchor = jnp.sort(anchor, axis=-1)  # Back in the order of the map, so that ties are broken as among all pairs.
    rows = jnp.take_along_axis(scores, anchor[..., None], axis=1)
    best, pair = jax.lax.top_k(rows.reshape(rows.shape[0], -1), min(limit, size * classes))
    return best, jnp.take_along_axis(anchor, pair // classes, axis=1), pair % classes


class Candidates(NamedTuple):
    """Boxes of N images that non-maximum suppression chooses from, K of them in each."""

    boxes: jax.Array
    """(N, K, 4) float32, xyxy, clipped to the image."""
    scores: jax.Array
    """(N, K) float32."""
    labels: jax.Array
    """(N, K) int32."""
    valid: jax.Array
    """(N, K) bool: which of them take part."""


def suppress(
    levels: Sequence[Candidates], *, iou_threshold: float, max_detections: int, drop_empty: bool
) -> Detections:
    """Non-maximum suppression, class by class, over the candidates of all levels together.

    Args:
        levels: the candidates of each level.
        iou_threshold: overlap at which the lower-scored box is dropped.
        max_detections: D, how many boxes an image returns at most.
        drop_empty: whether boxes without an area take no part.
    """
    found = Candidates(*(jnp.concatenate(parts, axis=1) for parts in zip(*levels, strict=True)))
    valid = found.valid & (boxes.area(found.boxes) > 0) if drop_empty else found.valid
    index, kept = nms(
        found.boxes, found.scores, found.labels, valid, iou_threshold=iou_threshold, max_outputs=max_detections
    )
    return Detections(
        boxes=jnp.where(kept[..., None], jnp.take_along_axis(found.boxes, index[..., None], axis=1), 0),
        scores=jnp.where(kept, jnp.take_along_axis(found.scores, index, axis=1), 0),
        labels=jnp.where(kept, jnp.take_along_axis(found.labels, index, axis=1), 0),
        valid=kept,
    )


def pair_maps(
    ours: Features, theirs: Features, strides: Mapping[str, int], image_size: jax.Array, *, kind: str
) -> dict[str, PairedBoxes]:
    """The box-regression maps of a student and of a teacher on their common levels, fine to coarse.

    Args:
        ours: the student's, {"p3": (N, H, W, C), ...}.
        theirs: the teacher's; empty if it has none that could be compared.
        strides: of the student's levels, in pixels.
        image_size: (N, 2), tells images from padding.
        kind: what both detectors must be, in words for the message.

    Raises:
        UserError: if the two have no maps that can be compared.
    """
    levels = [level for level in sorted(ours, key=strides.__getitem__) if level in theirs]
    if not levels or any(ours[level].shape != theirs[level].shape for level in levels):
        shapes = (", ".join(f"{level} {maps[level].shape[1:]}" for level in maps) or "none" for maps in (ours, theirs))
        raise UserError(
            "Box regression can be imitated where both detectors are {}, but the student's maps are {} and the "
            "teacher's {}.".format(kind, *shapes)
        )
    pairs = {}
    for level in levels:
        where = valid_positions(image_size, (ours[level].shape[1], ours[level].shape[2]), strides[level])
        pairs[level] = PairedBoxes(ours[level], theirs[level], where[..., None])
    return pairs
