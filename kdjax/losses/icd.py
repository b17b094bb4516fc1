"""Instance-Conditional Distillation: Kang et al., NeurIPS 2021, https://arxiv.org/abs/2110.12724.

Queries that describe an instance attend to the teacher's features; where they look is where the student imitates the
teacher. An auxiliary task, telling real instances from fakes and locating them, teaches the queries where to look.

This file is the mathematics; what is learnt (the queries' encoder, the decoders, the predictor) is in
:mod:`kdjax.methods.icd`. Boxes are here relative to the image: x and width divided by its width, y and height by its
height, padding excluded.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.losses.detection import binary_cross_entropy
from kdjax.losses.features import check_aligned, check_keys, einsum, squared_error
from kdjax.losses.reduce import masked_mean
from kdjax.types import Targets

NORM_EPSILON = 1e-5
"""The epsilon of every layer norm of ICD (PyTorch's default, not Flax's)."""


class ClassStatistics(NamedTuple):
    """What the boxes of a training set look like, class by class; fakes are drawn from it.

    >>> size = jnp.array([[0.1, 0.2], [0.3, 0.3]])
    >>> ClassStatistics(frequency=jnp.array([0.75, 0.25]), mean=size, deviation=size / 4).mean.shape
    (2, 2)
    """

    frequency: jax.Array
    """(K,) float32: the share of each class, summing to one."""
    mean: jax.Array
    """(K, 2) float32: mean width and height, relative to the image."""
    deviation: jax.Array
    """(K, 2) float32: standard deviation of width and height."""


class Queries(NamedTuple):
    """Q instances asked for in each of N images: the real ones first, then the fakes, then empty slots.

    >>> boxes, yes = jnp.array([[[0.25, 0.25, 0.75, 0.75]]]), jnp.array([[True]])
    >>> queries = Queries(jnp.array([[2]]), boxes, points=jnp.full((1, 1, 2), 0.5), real=yes, valid=yes)
    >>> queries.boxes.shape, queries.points.shape, queries.valid.shape
    ((1, 1, 4), (1, 1, 2), (1, 1))
    """

    labels: jax.Array
    """(N, Q) int32 in [0, K)."""
    boxes: jax.Array
    """(N, Q, 4) float32, xyxy relative to the image."""
    points: jax.Array
    """(N, Q, 2) float32: the x and y at which the instance is said to be, somewhere near its box's centre."""
    real: jax.Array
    """(N, Q) bool: True for ground truth."""
    valid: jax.Array
    """(N, Q) bool: True for ground truth and fakes, False for empty slots."""


def uniform_statistics(num_classes: int) -> ClassStatistics:
    """What fakes are drawn from where nothing was measured: uniform classes, mean 0.2, standard deviation 0.2 [code].

    >>> uniform_statistics(5).mean.shape
    (5, 2)
    """
    size = jnp.full((num_classes, 2), 0.2)
    return ClassStatistics(jnp.full((num_classes,), 1 / num_classes), size, size)


def sample_queries(
    targets: Targets, *, image_size: jax.Array, keys: jax.Array, statistics: ClassStatistics, limit: int = 300
) -> Queries:
    """The real boxes of each image among fakes [code]::

        n_q    = min( max(1, 6 n), max(limit, n) )           queries for n boxes, the first n of them real
        fake   = class ~ frequency,  size ~ N(mean, deviation) within 2 deviations and [0.002, 0.7],
                 centre ~ U(0.03, 0.97),  clipped to the image
        point  = centre + U(-0.3, 0.3) * size                for real boxes and fakes

    >>> boxes, labels, valid = jnp.array([[[8.0, 8, 24, 40]]]), jnp.array([[3]]), jnp.array([[True]])
    >>> given = {"keys": jax.random.split(jax.random.key(0), 1), "statistics": uniform_statistics(5)}
    >>> queries = sample_queries(Targets(boxes, labels, valid), image_size=jnp.array([[64, 64]]), **given)
    >>> queries.real.astype(int)
    Array([[1, 0, 0, 0, 0, 0]], dtype=int32)
    >>> queries.boxes[0, 0]
    Array([0.125, 0.125, 0.375, 0.625], dtype=float32)

    Args:
        targets: the ground truth of N images with room for M objects each.
        image_size: (N, 2) height and width of each image, in pixels.
        keys: (N,) typed PRNG keys, one per image.
        statistics: what the fakes are drawn from.
        limit: queries per image, unless it has more boxes: 300 for one-stage detectors, 100 for two-stage.

    Returns:
        Queries with ``min(max(limit, M), max(1, 6 M))`` slots, as many as any number of boxes can need.

    Raises:
        ValueError: there is not one typed key for each image.
    """
    check_keys(keys, len(targets.boxes))
    room = targets.boxes.shape[1]
    slots = min(max(limit, room), max(1, 6 * room))
    height, width = jnp.maximum(image_size, 1).astype(jnp.float32).T[:, :, None, None]
    relative = targets.boxes / jnp.concatenate([width, height, width, height], axis=-1)

    def one_image(key: jax.Array, boxes: jax.Array, labels: jax.Array, valid: jax.Array) -> Queries:
        class_key, size_key, centre_key, point_key = jax.random.split(key, 4)
        fake_labels = jax.random.categorical(class_key, jnp.log(statistics.frequency), shape=(slots,))
        spread = jnp.clip(jax.random.normal(size_key, (slots, 2)), -2, 2)
        size = jnp.clip(statistics.mean[fake_labels] + spread * statistics.deviation[fake_labels], 0.002, 0.7)
        centre = jax.random.uniform(centre_key, (slots, 2), minval=0.03, maxval=0.97)
        fakes = jnp.clip(jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1), 0, 1)

        first = jnp.argsort(~valid)  # real boxes need not stand first among the targets
        count = jnp.sum(valid)
        slot = jnp.arange(slots)
        real = slot < count
        boxes = jnp.where(real[:, None], jnp.pad(boxes[first], ((0, slots - room), (0, 0))), fakes)
        labels = jnp.where(real, jnp.pad(labels[first], (0, slots - room)), fake_labels)
        move = jax.random.uniform(point_key, (slots, 2), minval=-0.3, maxval=0.3)
        points = (boxes[:, :2] + boxes[:, 2:]) / 2 + move * (boxes[:, 2:] - boxes[:, :2])
        number = jnp.minimum(jnp.maximum(1, 6 * count), jnp.maximum(limit, count))
        return Queries(labels, boxes, points, real, slot < number)

    return jax.vmap(one_image)(keys, relative, targets.labels, targets.valid)


def instance_descriptors(queries: Queries, *, image_size: jax.Array, num_classes: int) -> jax.Array:
    """Instances in numbers [code]::

        descriptor   = [ one_hot(class), sine(x), sine(y), one_hot_5(w), one_hot_5(h) ]
        sine(v)      = [ sin(2 pi v / d_0), ..., sin(2 pi v / d_63), cos(2 pi v / d_0), ..., cos(2 pi v / d_63) ]
        d_i          = 10000^(i / 64)
        one_hot_5(w) = one_hot( trunc( clip(1.44 ln(w in pixels) - 5, 0, 4) ) )

    The official code takes the width in pixels from the size of the batch's last image; here it is each image's own.

    >>> point, box, yes = jnp.full((1, 1, 2), 0.5), jnp.array([[[0.25, 0.25, 0.75, 0.75]]]), jnp.array([[True]])
    >>> queries = Queries(jnp.array([[2]]), box, point, yes, yes)
    >>> instance_descriptors(queries, image_size=jnp.array([[800, 800]]), num_classes=80).shape
    (1, 1, 346)

    Args:
        queries: Q instances in each of N images.
        image_size: (N, 2) height and width of each image, in pixels.
        num_classes: K.

    Returns:
        (N, Q, K + 266) float32.
    """
    angles = 2 * jnp.pi * queries.points[..., None] / (10000 ** (jnp.arange(64) / 64))[None, None, None]
    position = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    pixels = (queries.boxes[..., 2:] - queries.boxes[..., :2]) * image_size[:, None, ::-1].astype(jnp.float32)
    scale = jnp.trunc(jnp.clip(1.44 * jnp.log(jnp.maximum(pixels, 1e-6)) - 5, 0, 4)).astype(jnp.int32)
    slots = queries.labels.shape
    return jnp.concatenate(
        [
            jax.nn.one_hot(queries.labels, num_classes),
            position.reshape(*slots, 256),
            jax.nn.one_hot(scale, 5).reshape(*slots, 10),
        ],
        axis=-1,
    )


def sine_position(where: jax.Array, channels: int) -> jax.Array:
    """The 2-D sine code of DETR (Carion et al., 2020), over the valid area, for the keys of one level [code]::

        y           = 2 pi * (number of valid positions up to this one in its column) / (number in the column)
        PE          = [ sin(y / d_0), cos(y / d_0), sin(y / d_1), ...,  the same of x ]
        d_i         = 10000^(4 i / C),   i < C / 4

    >>> sine_position(jnp.ones((2, 4, 5), bool), 256).shape
    (2, 4, 5, 256)

    Args:
        where: (N, H, W) bool, the valid positions.
        channels: C, a multiple of 4.

    Returns:
        (N, H, W, C) float32.
    """

    def code(axis: int) -> jax.Array:
        count = jnp.cumsum(where, axis=axis, dtype=jnp.float32)
        portion = count / (jax.lax.slice_in_dim(count, -1, None, axis=axis) + 1e-6)
        divisors = 10000 ** (jnp.arange(0, channels, 4) / channels)
        angles = 2 * jnp.pi * portion[..., None] / divisors[None, None, None]
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*where.shape, channels // 2)

    return jnp.concatenate([code(1), code(2)], axis=-1)


def split_heads(features: jax.Array, heads: int) -> jax.Array:
    """(N, L, C) to (N, heads, L, C / heads).

    >>> split_heads(jnp.ones((2, 10, 32)), 8).shape
    (2, 8, 10, 4)
    """
    images, length, channels = features.shape
    return features.reshape(images, length, heads, channels // heads).swapaxes(1, 2)


def attention_logits(query: jax.Array, key: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """``q . k / sqrt(D)``; the lowest number there is on padding, which is finite where -inf would make NaN.

    >>> attention_logits(jnp.ones((1, 1, 4)), jnp.ones((1, 2, 4)))
    Array([[[2., 2.]]], dtype=float32)

    Args:
        query: (N, Q, D) of one head, any float dtype.
        key: (N, S, D) of one head, any float dtype.
        where: (N, S) bool, the valid positions; None for all.

    Returns:
        (N, Q, S) float32.
    """
    logits = einsum("nqd,nsd->nqs", query.astype(jnp.float32), key.astype(jnp.float32)) / math.sqrt(key.shape[-1])
    return logits if where is None else jnp.where(where[:, None], logits, jnp.finfo(jnp.float32).min)


def instance_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    real: jax.Array,
    where: jax.Array | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Multi-head attention, and where the real queries look [code]::

        attended = softmax_s(logits) v                                      logits = q . k / sqrt(D)
        m        = sum over real queries of softmax_s( sg(logits) / temperature )

    Heads are taken one after another and each is computed again in the backward pass, so that an attention tensor of
    N heads Q S numbers never exists, not even one: for 300 queries of an 800 x 1344 image it would be 215 MB.

    >>> query, features = jnp.zeros((1, 8, 3, 4)), jnp.ones((1, 8, 5, 4))
    >>> attended, mask = instance_attention(query, features, features, real=jnp.array([[True, True, False]]))
    >>> attended.shape, mask[0, 0]
    ((1, 8, 3, 4), Array([0.4, 0.4, 0.4, 0.4, 0.4], dtype=float32))

    Args:
        query: (N, heads, Q, D), any float dtype.
        key: (N, heads, S, D), any float dtype.
        value: (N, heads, S, D), any float dtype.
        real: (N, Q) bool, the queries that are ground truth.
        where: (N, S) bool, the valid positions; None for all.
        temperature: divides the logits of the instance mask alone.

    Returns:
        Attended values (N, heads, Q, D) and the instance mask m (N, heads, S), both float32, m without gradient.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    images, _, positions, _ = key.shape if key.ndim == 4 else (0, 0, 0, 0)
    for name, found, expected in (
        ("key", key.shape, (*query.shape[:2], positions, query.shape[-1])),
        ("value", value.shape[:3], key.shape[:3]),
        ("real", real.shape, (images, *query.shape[2:3])),
        ("where", (images, positions) if where is None else where.shape, (images, positions)),
    ):
        if query.ndim != 4 or found != expected:
            raise ValueError(
                f"{name} has shape {found} and query {query.shape}; query must be (N, heads, Q, D), key and value "
                "(N, heads, S, D), real (N, Q) and where (N, S)."
            )
    keep = jnp.ones((key.shape[0], 1, key.shape[2])) if where is None else where[:, None].astype(jnp.float32)

    @jax.checkpoint
    def one_head(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = attention_logits(query, key, where)
        attended = einsum("nqs,nsd->nqd", jax.nn.softmax(logits) * keep, value.astype(jnp.float32))
        attention = jax.nn.softmax(jax.lax.stop_gradient(logits) / temperature) * keep
        return attended, einsum("nqs,nq->ns", attention, real.astype(jnp.float32))

    by_head = tuple(jnp.moveaxis(array, 1, 0) for array in (query, key, value))
    attended, mask = jax.lax.map(lambda head: one_head(*head), by_head)
    return jnp.moveaxis(attended, 0, 1), jax.lax.stop_gradient(jnp.moveaxis(mask, 0, 1))


def instance_confidence_loss(logits: jax.Array, queries: Queries, *, axis_name: str | None = None) -> jax.Array:
    """Real or fake: binary cross-entropy averaged over the queries that are not empty [code].

    >>> yes = jnp.array([[True]])
    >>> queries = Queries(jnp.array([[0]]), jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 2)), yes, yes)
    >>> instance_confidence_loss(jnp.array([[0.0]]), queries)
    Array(0.6931472, dtype=float32)

    Args:
        logits: (N, Q), output 0 of the predictor.
        queries: what was asked.
        axis_name: mapped axis over which queries are counted, so that the mean over devices is the global mean.

    Returns:
        A float32 scalar.
    """
    return masked_mean(binary_cross_entropy(logits, queries.real), queries.valid, axis_name=axis_name)


def instance_localization_loss(outputs: jax.Array, queries: Queries, *, axis_name: str | None = None) -> jax.Array:
    """Where the real instances are [code]::

        sigmoid(outputs) = (x - x1, y - y1, x2 - x, y2 - y)                 of the query's point (x, y)
        loss             = mean over real queries of  sum |difference| / (w, h, w, h),   sides of 1e-7 at least

    >>> point, yes = jnp.full((1, 1, 2), 0.5), jnp.array([[True]])
    >>> queries = Queries(jnp.array([[0]]), jnp.array([[[0.25, 0.0, 0.75, 1.0]]]), point, yes, yes)
    >>> instance_localization_loss(jnp.zeros((1, 1, 4)), queries)
    Array(1., dtype=float32)

    Args:
        outputs: (N, Q, 4), outputs 1 to 4 of the predictor, before the sigmoid.
        queries: what was asked.
        axis_name: mapped axis over which queries are counted, so that the mean over devices is the global mean.

    Returns:
        A float32 scalar; 0 where no query is real.
    """
    corner, opposite = queries.boxes[..., :2], queries.boxes[..., 2:]
    distances = jnp.concatenate([queries.points - corner, opposite - queries.points], axis=-1)
    sides = jnp.maximum(jnp.tile(opposite - corner, 2), 1e-7)
    error = jnp.abs(jax.nn.sigmoid(outputs.astype(jnp.float32)) - distances) / sides
    return masked_mean(jnp.sum(error, axis=-1), queries.real, axis_name=axis_name)


def normalise(values: jax.Array) -> jax.Array:
    """Zero mean and unit variance over the last axis, in float32: a layer norm without scale and bias.

    >>> normalise(jnp.array([1.0, 3.0])).round(3)
    Array([-1.,  1.], dtype=float32)
    """
    values = values.astype(jnp.float32)
    centred = values - jnp.mean(values, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + NORM_EPSILON)


def icd_loss(student: jax.Array, teacher: jax.Array, *, instance_mask: jax.Array) -> jax.Array:
    """The distillation loss of one decoder layer [code]; the paper's 8 (two-stage: 3) is the weight of this term::

        loss = mean_{n,head,d}  sum_s m (LN(v_S) - LN(v_T))^2 / max(sum_s m, 1e-6)

    An image without boxes has no real query, so m = 0 and it contributes 0.

    >>> student, teacher = jnp.array([[[[1.0, 3.0]]]]), jnp.array([[[[3.0, 1.0]]]])
    >>> icd_loss(student, teacher, instance_mask=jnp.ones((1, 1, 1))).round(3)
    Array(4., dtype=float32)

    Args:
        student: (N, heads, S, D) values of the student's features under the student decoder's value projection.
        teacher: (N, heads, S, D) values of the teacher's features under the teacher decoder's; it gets no gradient.
        instance_mask: m, (N, heads, S), zero in the padding; see :func:`instance_attention`. It gets no gradient.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: if the shapes of student and teacher differ, or the mask's is not theirs without D.
    """
    check_aligned(student, teacher)
    if instance_mask.shape != student.shape[:3]:
        raise ValueError(f"instance_mask has shape {instance_mask.shape}; of {student.shape} it must be (N, heads, S).")
    mask = jax.lax.stop_gradient(instance_mask.astype(jnp.float32))
    error = jnp.mean(squared_error(normalise(student), normalise(teacher)), axis=-1)
    return jnp.mean(jnp.sum(mask * error, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1e-6))
