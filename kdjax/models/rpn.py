"""The region proposal network (Ren et al., Faster R-CNN, 2015) on a feature pyramid (Lin et al., 2017)."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.losses.detection import binary_cross_entropy
from kdjax.losses.reduce import masked_sum, mean_count
from kdjax.models.anchors import centres_inside
from kdjax.models.assign import assign_by_iou
from kdjax.models.dense import Candidates, suppress
from kdjax.models.sample import sample
from kdjax.types import Features, Targets, Terms

OVERLAP = 0.7
"""IoU of two proposals of a level above which only the better one stays, in both originals."""


class RPNPredictions(NamedTuple):
    """The maps of the network, level by level; A anchors at each location."""

    objectness: Features
    """{"p2": (N, H, W, A), ...}, before the sigmoid."""
    deltas: Features
    """{"p2": (N, H, W, A * 4), ...}, coded as by ``kdjax.boxes.encode``, the anchor varying slowest."""


class Proposals(NamedTuple):
    """The R best regions of each of N images, best first."""

    boxes: jax.Array
    """(N, R, 4) float32, xyxy in pixels of the padded image, clipped to the image; zeros where not valid."""
    scores: jax.Array
    """(N, R) float32 in [0, 1]; zero where not valid."""
    valid: jax.Array
    """(N, R) bool."""


class Matches(NamedTuple):
    """What K sampled candidates of each of N images, anchors or RoIs, learn; slots that are neither stay empty."""

    candidate: jax.Array
    """(N, K) int32: which candidate; meaningful where positive or negative, as the rest."""
    matched: jax.Array
    """(N, K) int32: the object that it learns; meaningful where positive."""
    positive: jax.Array
    """(N, K) bool: all of them before all others."""
    negative: jax.Array
    """(N, K) bool."""

    @property
    def sampled(self) -> jax.Array:
        """(N, K) bool: the slots that are not empty."""
        return self.positive | self.negative


class RPNHead(nn.Module):
    """One convolution, as wide as the pyramid, and two of a single position after it, shared by all levels.

    Attributes:
        anchors: A, number of anchors at a location.
        dtype: of the computation; parameters are float32.
    """

    anchors: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Features) -> RPNPredictions:
        """{"p2": (N, H, W, C), ...} to the predictions at every location."""
        layer = functools.partial(nn.Conv, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)
        conv = layer(next(iter(features.values())).shape[-1], (3, 3), padding=1, name="conv")
        objectness = layer(self.anchors, (1, 1), name="objectness")
        deltas = layer(4 * self.anchors, (1, 1), name="deltas")
        hidden = {level: nn.relu(conv(x)) for level, x in features.items()}
        return RPNPredictions(
            objectness={level: objectness(x) for level, x in hidden.items()},
            deltas={level: deltas(x) for level, x in hidden.items()},
        )


def propose(
    predictions: RPNPredictions,
    anchors: dict[str, jax.Array],
    image_size: jax.Array,
    limits: jax.Array,
    *,
    candidates: int,
    proposals: int,
    limit_shrinking: bool,
    smallest: float,
) -> Proposals:
    """The regions of each image that most likely hold an object.

    The best anchors of every level are decoded and clipped to the image; non-maximum suppression runs level by level,
    and the best of what it leaves of all levels are returned.

    Args:
        predictions: of N images.
        anchors: level to (anchors of the level, 4), as ``kdjax.models.anchors`` makes them, fine to coarse.
        image_size: (N, 2) height and width.
        limits: (N, 2) height and width, within which the anchors that propose something are centred.
        candidates: anchors that each level sends to non-maximum suppression at most.
        proposals: R, regions of an image; fewer where there are fewer candidates.
        limit_shrinking: whether log-scales are limited from below, ``symmetric`` of :func:`kdjax.boxes.decode`.
        smallest: regions narrower or lower than that, in pixels, are dropped; 0 drops those that are empty.
    """
    levels = []
    for number, level in enumerate(anchors):
        logits = _joined([predictions.objectness[level]], 1)[..., 0]
        inside = jax.vmap(centres_inside, (None, 0))(anchors[level], limits)
        best, index = jax.lax.top_k(jnp.where(inside, logits, -jnp.inf), min(candidates, logits.shape[1]))
        deltas = jnp.take_along_axis(_joined([predictions.deltas[level]], 4), index[..., None], axis=1)
        decoded = boxes.clip(boxes.decode(deltas, anchors[level][index], symmetric=limit_shrinking), image_size)
        size = decoded[..., 2:] - decoded[..., :2]
        large = jnp.all(size >= smallest if smallest else size > 0, axis=-1)
        levels.append(
            Candidates(decoded, jax.nn.sigmoid(best), jnp.full_like(index, number), large & (best > -jnp.inf))
        )
    limit = min(proposals, sum(level.scores.shape[1] for level in levels))
    kept = suppress(levels, iou_threshold=OVERLAP, max_detections=limit, drop_empty=False)
    return Proposals(kept.boxes, kept.scores, kept.valid)


def match(
    candidates: jax.Array,
    inside: jax.Array,
    targets: Targets,
    keys: jax.Array,
    *,
    number: int,
    fraction: float,
    positive_iou: float,
    negative_iou: float,
    best_iou: float | None,
    claim: bool,
) -> Matches:
    """Assigns candidates to objects and draws a sample of them.

    Args:
        candidates: (N, A, 4) boxes, xyxy.
        inside: (N, A) bool: which of them take part.
        targets: of N images.
        keys: (N,) PRNG keys.
        number: K, size of the sample; 0 keeps every candidate.
        fraction: of the sample that may be positive at most; all may be where every candidate is kept.
        positive_iou: see :func:`kdjax.models.assign.assign_by_iou`, as the rest.
        negative_iou: likewise.
        best_iou: likewise.
        claim: likewise.
    """
    if not number:
        number, fraction = candidates.shape[1], 1.0

    def one(candidates: jax.Array, inside: jax.Array, targets: Targets, key: jax.Array) -> Matches:
        assignment = assign_by_iou(
            candidates,
            targets.boxes,
            targets.valid,
            inside,
            crowd=targets.crowd,
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            best_iou=best_iou,
            claim=claim,
        )
        drawn = sample(assignment.positive, assignment.negative, key, number=number, fraction=fraction)
        return Matches(drawn.candidate, assignment.matched[drawn.candidate], drawn.positive, drawn.negative)

    return jax.vmap(one)(candidates, inside, targets._replace(masks=None), keys)


def rpn_loss(
    predictions: RPNPredictions,
    anchors: dict[str, jax.Array],
    matches: Matches,
    targets: Targets,
    *,
    box_loss: Callable[[jax.Array, jax.Array], jax.Array],
    least: int,
    axis_name: str | None = None,
) -> Terms:
    """{"rpn_cls": binary cross-entropy, "rpn_box": box regression loss}, float32 scalars.

    Both are sums over the sampled anchors, and over the positive ones, divided by the number of sampled anchors in the
    global batch (Faster R-CNN, equation 1).

    Args:
        predictions: of N images.
        anchors: level to (anchors of the level, 4), fine to coarse.
        matches: the sampled anchors.
        targets: what they learn.
        box_loss: elementwise, of deltas and their targets.
        least: what an image counts as having of either kind at least: 1 in MMDetection, 0 in torchvision.
        axis_name: mapped axis over which the number of anchors is averaged.
    """
    objectness = _joined([predictions.objectness[level] for level in anchors], 1)[..., 0]
    logits = jnp.take_along_axis(objectness, matches.candidate, axis=1)
    deltas = _joined([predictions.deltas[level] for level in anchors], 4)
    deltas = jnp.take_along_axis(deltas, matches.candidate[..., None], axis=1)
    goal = boxes.encode(
        jnp.take_along_axis(targets.boxes, matches.matched[..., None], axis=1),
        jnp.concatenate(list(anchors.values()))[matches.candidate],
    )
    kinds = jnp.stack([matches.positive, matches.negative])
    count = mean_count(jnp.sum(jnp.maximum(jnp.sum(kinds, axis=2), least)), axis_name)
    return {
        "rpn_cls": masked_sum(binary_cross_entropy(logits, matches.positive), matches.sampled) / count,
        "rpn_box": masked_sum(box_loss(deltas, goal), matches.positive[..., None]) / count,
    }


def _joined(maps: Sequence[jax.Array], size: int) -> jax.Array:
    """Maps (N, H, W, A * size), one after another, to (N, entries of all maps, size) float32."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, size) for x in maps], axis=1).astype(jnp.float32)
