"""What detectors that predict all over a pyramid share: layers, and the way to the loss and to detections.

The file is long because it is that whole way, which each detector goes with a few functions of its own.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kdjax import boxes
from kdjax.errors import UserError
from kdjax.losses.detection import sigmoid_focal_loss
from kdjax.losses.features import valid_positions
from kdjax.losses.reduce import COUNT, masked_sum, mean_count
from kdjax.models.anchors import padded
from kdjax.models.assign import Assignment
from kdjax.models.detector import Detector
from kdjax.models.nms import nms
from kdjax.models.norm import group_norm
from kdjax.options import whole
from kdjax.types import Detections, Features, PairedBoxes, Sampling, Targets, Terms

conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=nn.initializers.normal(0.01))
"""A convolution of a head: takes the number of channels, ``dtype`` and ``name``."""


class Learnt(NamedTuple):
    """What the A anchors or locations of each of N images learn."""

    places: Any
    """The anchors or locations themselves, of all levels: arrays (1, A, ...)."""
    assignment: Assignment
    """(N, A): which of them learn an object, and which that there is none."""
    labels: jax.Array
    """(N, A) int32: the class of the object; meaningful where positive."""
    boxes: jax.Array
    """(N, A, 4) float32: its box; meaningful where positive."""


class DenseDetector(Detector):
    """A detector whose one head, ``head``, predicts from the pyramid alone: at every location, for all its anchors.

    This is the way from predictions to the loss and to detections. A detector writes what is its own: where it
    predicts (``places_of``, ``inside``), who learns what (``assign``, or ``assign_levels``, and ``learn``), the terms
    (``terms_of``), the boxes and scores that its predictions mean (``boxes_of``, ``scores_of``, ``confidence_of``), and
    whether boxes without an area are dropped (``drop_empty``).

    Predictions are a NamedTuple of maps by level, {"p3": (N, H, W, A * size), ...}, as many of them as the head has
    outputs. Rows are the same NamedTuple with arrays (N, rows, size) float32, a row for each anchor or location.
    """

    candidates: Annotated[int, whole(1), "Candidates that each level sends to non-maximum suppression at most."] = 1000

    @property
    def drop_empty(self) -> bool:
        """Whether boxes that are clipped to nothing are dropped."""
        return True

    @nn.nowrap
    def places_of(self, predictions: Any) -> dict[str, Any]:
        """Level to what its rows stand for, fine to coarse: anchors (rows, 4), or a tree of arrays (rows, ...)."""
        raise NotImplementedError

    @nn.nowrap
    def inside(self, places: Any, image_size: jax.Array) -> jax.Array:
        """Which places take part in an image of height and width ``image_size`` (2,): (rows,) bool."""
        raise NotImplementedError

    @nn.nowrap
    def assign(self, places: Any, targets: Targets, inside: jax.Array) -> Assignment:
        """Which places learn which objects of one image; those that are not ``inside`` (rows,) learn nothing."""
        raise NotImplementedError

    @nn.nowrap
    def assign_levels(self, places: Mapping[str, Any], targets: Targets, image_size: jax.Array) -> Assignment:
        """Which places of all levels learn which objects of one image of height and width ``image_size`` (2,).

        A detector to which it matters what level a place is of writes this instead of ``assign``.
        """
        everywhere = joined(places)
        return self.assign(everywhere, targets, self.inside(everywhere, image_size))

    @nn.nowrap
    def learn(self, predictions: Any, places: Mapping[str, Any], targets: Targets, image_size: jax.Array) -> Any:
        """What ``terms_of`` is given: a :class:`Learnt` of N images, or a tree of them where there are several."""
        del predictions
        assign = functools.partial(self.assign_levels, places)
        return learnt_by(jax.vmap(assign)(targets._replace(masks=None), image_size), joined(places), targets)

    @nn.nowrap
    def terms_of(self, rows: Any, learnt: Any) -> Terms:
        """The terms, of what ``learn`` gave; the mean over devices of what each returns is that of the whole batch."""
        raise NotImplementedError

    @nn.nowrap
    def boxes_of(self, rows: Any, places: Any) -> jax.Array:
        """The boxes (N, rows, 4) that rows mean at places (N or 1, rows, ...)."""
        raise NotImplementedError

    @nn.nowrap
    def scores_of(self, rows: Any) -> jax.Array:
        """(N, rows, classes): what pairs of a place and a class are ranked by and held against the threshold."""
        # Ranked after the sigmoid, as the originals do: in float32 its large values are equal.
        return jax.nn.sigmoid(rows.logits)

    @nn.nowrap
    def confidence_of(self, scores: jax.Array, rows: Any) -> jax.Array:
        """What the chosen pairs are suppressed by and returned with: (N, K), from their scores (N, K) and rows."""
        del rows
        return scores

    def heads(self, features: Features, image_size: jax.Array | None = None, sampling: Sampling | None = None) -> Any:
        """The neck's pyramid to predictions; the rest is for detectors with proposals."""
        del image_size, sampling
        return self.head(features)

    def heads_at(self, features: Features, predictions: Any, image_size: jax.Array | None = None) -> Any:
        """What the head says where a student predicted something: it predicts everywhere, wherever that was."""
        del predictions
        return self.heads(features, image_size)

    @nn.nowrap
    def rows_of(self, predictions: Any, places: Mapping[str, Any]) -> Any:
        """Predictions to the rows of the levels of ``places``, one level after the other."""

        def join_levels(maps: Features) -> jax.Array:
            parts = [_rows(maps[level], len(jax.tree.leaves(there)[0])) for level, there in places.items()]
            return jnp.concatenate(parts, axis=1).astype(jnp.float32)

        return type(predictions)(*map(join_levels, predictions))

    @nn.nowrap
    def count(self, positive: jax.Array) -> jax.Array:
        """How many of the places (N, A) are positive, an image without any counting as one: see ``mean_count``."""
        return mean_count(jnp.sum(jnp.maximum(jnp.sum(positive, axis=1), 1)), self.axis_name)

    @nn.nowrap
    def loss(self, predictions: Any, targets: Targets, image_size: jax.Array) -> Terms:
        """The terms named by ``terms``, float32 scalars: see ``terms_of`` of each detector.

        The mean over devices of what each returns is the global loss. Places in the padding take no part, nor do those
        that would be negative in a crowd.
        """
        places = self.places_of(predictions)
        learnt = self.learn(predictions, places, targets, image_size)

        # The backward pass computes the terms again from the maps: kept, each of the focal loss's steps would be as
        # large as the logits in float32.
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(COUNT))
        def terms(predictions: Any, learnt: Any) -> Terms:
            return self.terms_of(self.rows_of(predictions, places), learnt)

        return terms(predictions, learnt)

    @nn.nowrap
    def decode(self, predictions: Any, image_size: jax.Array) -> Detections:
        """Predictions to the detections of images of height and width ``image_size`` (N, 2).

        Of every level, the best pairs of a place and a class above the score threshold are decoded and clipped to the
        image; then non-maximum suppression runs class by class over all levels together. Places in the padding find
        something up to the next multiple of 32, as far as the originals pad a single image, and nothing beyond.
        """
        found = []
        for level, places in self.places_of(predictions).items():
            rows = self.rows_of(predictions, {level: places})
            inside = jax.vmap(self.inside, (None, 0))(places, padded(image_size))
            scores = jnp.where(inside[..., None], self.scores_of(rows), 0)
            best, index, label = best_pairs(scores, self.candidates)
            rows = jax.tree.map(functools.partial(_take, index=index), rows)
            boxes_found = self.boxes_of(rows, jax.tree.map(lambda x, index=index: x[index], places))
            found.append(
                Candidates(
                    boxes.clip(boxes_found, image_size),
                    self.confidence_of(best, rows),
                    label,
                    best > self.score_threshold,
                )
            )
        return suppress(
            found,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
            drop_empty=self.drop_empty,
        )

    @nn.nowrap
    def everywhere(self, predictions: Any, image_size: jax.Array) -> dict[str, jax.Array]:
        """What :meth:`decode` chooses from, for programs that suppress elsewhere: the boxes and scores of all A places.

        Returns:
            "boxes" (N, A, 4) clipped to the images, "scores" (N, A, classes), which the threshold is held against, zero
            in the padding, and "factors" (N, A), which make of those the scores of detections; all float32, level after
            level, fine to coarse.
        """
        by_level = self.places_of(predictions)
        rows = self.rows_of(predictions, by_level)
        places = joined(by_level)
        inside = jax.vmap(self.inside, (None, 0))(places, padded(image_size))
        return {
            "boxes": boxes.clip(self.boxes_of(rows, jax.tree.map(lambda x: x[None], places)), image_size),
            "scores": jnp.where(inside[..., None], self.scores_of(rows), 0),
            "factors": self.confidence_of(jnp.ones(inside.shape), rows),
        }


def joined(places: Mapping[str, Any]) -> Any:
    """The places of all levels, one level after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *places.values())


def learnt_by(assignment: Assignment, places: Any, targets: Targets) -> Learnt:
    """What the places of all levels learn by the assignments of N images."""
    return Learnt(
        places=jax.tree.map(lambda x: x[None], places),
        assignment=assignment,
        labels=jnp.take_along_axis(targets.labels, assignment.matched, axis=1),
        boxes=jnp.take_along_axis(targets.boxes, assignment.matched[..., None], axis=1),
    )


def undecided(model: DenseDetector, variables: Any, images: jax.Array, image_size: jax.Array) -> dict[str, jax.Array]:
    """Inference up to what is chosen from, from uint8 images (N, H, W, 3): see :meth:`DenseDetector.everywhere`."""

    def run(module: DenseDetector) -> dict[str, jax.Array]:
        _, predictions = module(module.preprocess(images, image_size), image_size)
        return module.everywhere(predictions, image_size)

    found: Any = model.apply(variables, method=run)
    return found


def _rows(x: jax.Array, count: int) -> jax.Array:
    """A map (N, H, W, A * size) to (N, count, size), of ``count`` = H * W * A places."""
    return x.reshape(x.shape[0], count, -1)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of rows (N, rows, size) those at ``index`` (N, K): (N, K, size)."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def tower(
    features: Features, kind: str, *, convs: int, norm: str, bias: bool, dtype: Dtype, channels: int = 0
) -> Features:
    """Convolutions of one width, each followed by a ReLU, shared by all levels.

    To be called in the compact method of a head, which the layers ``<kind>_conv_<i>`` and ``<kind>_norm_<i>`` become
    a part of.

    Args:
        features: {"p3": (N, H, W, C), ...}.
        kind: what the names of the layers begin with.
        convs: number of convolutions.
        norm: one of ``kdjax.models.norm.NORMS``: "" or "group", :func:`kdjax.models.norm.group_norm` after each.
        bias: whether they have one.
        dtype: of the computation.
        channels: their width; 0 for that of the features.

    Returns:
        features of the same heights and widths.
    """
    channels = channels or next(iter(features.values())).shape[-1]
    for index in range(convs):
        conv = conv3x3(channels, use_bias=bias, dtype=dtype, name=f"{kind}_conv_{index}")
        features = {level: conv(x) for level, x in features.items()}
        if norm:
            normalise = group_norm(channels, dtype=dtype, name=f"{kind}_norm_{index}")
            features = {level: normalise(x) for level, x in features.items()}
        features = {level: nn.relu(x) for level, x in features.items()}
    return features


def towers(features: Features, *, convs: int, norm: str, bias: bool, dtype: Dtype) -> tuple[Features, Features]:
    """The two towers of most heads, "cls" for the classes and "box" for the boxes, see :func:`tower`."""
    cls, box = (tower(features, kind, convs=convs, norm=norm, bias=bias, dtype=dtype) for kind in ("cls", "box"))
    return cls, box


def prior_bias(prior: float) -> nn.initializers.Initializer:
    """The bias of a classifier that starts with the probability ``prior`` (Lin et al., RetinaNet, section 4.1)."""
    return nn.initializers.constant(-math.log((1 - prior) / prior))


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
