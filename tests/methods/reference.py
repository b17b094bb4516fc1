"""Method modules in NumPy: from their parameters and a batch to their terms, image by image without its padding.

Parameters are random, biases and fusion scalars too, and none comes from a module's own initialisation. What DMKD and
DFMSD compute is put together from :mod:`tests.losses.reference`; nothing here computes by kdjax.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses import Queries, uniform_statistics
from kdjax.types import Features, Method, Targets, Terms
from tests.losses import reference
from tests.losses.reference import Array, Options
from tests.methods import calls

STRIDES = {"p3": 8, "p4": 16}
STUDENT, TEACHER = 4, 8
"""Channels."""
SIZES = ((64, 40), (33, 56))
"""Height and width of the images, padded to 64 x 64: whole and broken numbers of positions."""
BOXES = np.array([[[9, 3, 30, 25], [20, 40, 38, 60]], [[16, 8, 56, 24], [0, 0, 64, 64]]], np.float32)
VALID = ((True, True), (True, False))
"""The last box is an empty slot."""
KEYS = jax.random.split(jax.random.key(5), len(SIZES))
STEP = jnp.array(0)
CLASSES = 3


def targets() -> Targets:
    return Targets(jnp.asarray(BOXES), jnp.zeros((2, 2), int), jnp.array(VALID))


def pyramid(channels: int, seed: int) -> Features:
    """Maps whose attention differs by place; the padding holds numbers too."""
    rng = np.random.default_rng(seed)
    shapes = {level: (len(SIZES), 64 // stride, 64 // stride, channels) for level, stride in STRIDES.items()}
    return {
        level: jnp.asarray(rng.normal(size=shape) * rng.uniform(0.2, 2, (*shape[:3], 1)), jnp.float32)
        for level, shape in shapes.items()
    }


STUDENTS, TEACHERS = pyramid(STUDENT, 0), pyramid(TEACHER, 1)


def given(keys: jax.Array = KEYS) -> dict[str, Any]:
    """What methods may need."""
    statistics = uniform_statistics(CLASSES)
    return {"size": jnp.array(SIZES), "targets": targets(), "keys": keys, "step": STEP, "statistics": statistics}


def random_params(method: Method) -> dict[str, Any]:
    """Numbers for every parameter of a method on these pyramids."""
    shapes = jax.eval_shape(lambda: calls.init(method, STUDENTS, TEACHERS, **given()))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, jnp.float32), shapes)


def apply(
    method: Method, params: dict[str, Any], *, keys: jax.Array = KEYS, levels: Sequence[str] = tuple(STRIDES)
) -> Terms:
    """The terms of a method on these pyramids' ``levels``."""
    student, teacher = ({level: x[level] for level in levels} for x in (STUDENTS, TEACHERS))
    return calls.terms(method, params, student, teacher, **given(keys))


def crops(features: Features, level: str) -> list[Array]:
    """The maps of a level without their padding, (h, w, C) each: positions whose corner lies in the image."""
    return [
        np.asarray(x, np.float64)[: math.ceil(height / STRIDES[level]), : math.ceil(width / STRIDES[level])]
        for x, (height, width) in zip(features[level], SIZES, strict=True)
    ]


def aligned(params: dict[str, Any], level: str) -> list[Array]:
    """The student's maps of a level in the teacher's width."""
    kernel, bias = (np.asarray(params[f"align_{level}"]["align"]["conv"][part]) for part in ("kernel", "bias"))
    return [x @ kernel[0, 0] + bias for x in crops(STUDENTS, level)]


def generate(block: dict[str, Any], features: Array) -> Array:
    """MGD's block with its biases, on a map that ends where the image ends."""
    first, second = (jax.tree.map(np.asarray, block[f"conv_{k}"]["conv"]) for k in range(2))
    hidden = np.maximum(reference.convolve(features, first["kernel"]) + first["bias"], 0)
    return reference.convolve(hidden, second["kernel"]) + second["bias"]


def emphasis(image: int, level: str, eta: float) -> Array:
    """1, and eta more on positions whose cell meets a box of the image."""
    stride = STRIDES[level]
    height, width = (math.ceil(size / stride) for size in SIZES[image])
    factor = np.ones((height, width))
    for (left, top, right, bottom), valid in zip(BOXES[image], VALID[image], strict=True):
        for y in range(height):
            for x in range(width):
                meets_row = y * stride < bottom and (y + 1) * stride > top
                meets_column = x * stride < right and (x + 1) * stride > left
                if valid and meets_row and meets_column:
                    factor[y, x] = 1 + eta
    return factor


def masks(level: str, options: Options, eta: float = 0.0) -> list[tuple[Array, Array]]:
    """What is kept of each image, from the raw features of the teacher."""
    maps = crops(TEACHERS, level)
    return [reference.masks(x, options, emphasis(image, level, eta)) for image, x in enumerate(maps)]


def errors(
    params: dict[str, Any], level: str, students: list[Array], teachers: list[Array], keep: list[tuple[Array, Array]]
) -> list[Array]:
    """``(w_1 G_sp(keep_sp S) + w_2 G_ch(keep_ch S) - T)^2`` of each image."""
    first, second = np.exp(np.asarray(params[f"fusion_{level}"], np.float64))
    found = []
    for student, teacher, (spatial, channel) in zip(students, teachers, keep, strict=True):
        by_place = generate(params[f"spatial_{level}"], student * spatial[..., None])
        by_channel = generate(params[f"channel_{level}"], student * channel)
        found.append(((first * by_place + second * by_channel) / (first + second) - teacher) ** 2)
    return found


def dmkd(params: dict[str, Any], keep: dict[str, list[tuple[Array, Array]]]) -> float:
    """The term "dmkd", and with separate alignment "dfmsd": a sum over positions and levels, a mean over images.

    Of the levels that ``keep`` names.
    """
    return sum(
        float(np.sum(error)) / len(SIZES)
        for level in keep
        for error in errors(params, level, aligned(params, level), crops(TEACHERS, level), keep[level])
    )


def dfmsd(params: dict[str, Any], keep: dict[str, list[tuple[Array, Array]]]) -> float:
    """The term "dfmsd" on normalised features: half a mean over valid positions and channels, summed over levels."""
    total = 0.0
    for level in STRIDES:
        students, teachers = reference.norm(aligned(params, level)), reference.norm(crops(TEACHERS, level))
        found = errors(params, level, students, teachers, keep[level])
        total += 0.5 * float(np.mean(np.concatenate([error.ravel() for error in found])))
    return total


def dfmsd_alignment(params: dict[str, Any]) -> float:
    """The term "dfmsd_alignment": one minus the correlation, averaged over channels, summed over levels."""
    return sum(reference.pearson(aligned(params, level), crops(TEACHERS, level)) for level in STRIDES)


def mgd(params: dict[str, Any], keep: dict[str, Array]) -> float:
    """The term "mgd" where ``keep`` by level, of any shape that broadcasts to the teacher's maps, is 1."""
    total = 0.0
    for level in STRIDES:
        everywhere = np.broadcast_to(keep[level], TEACHERS[level].shape)
        for student, teacher, mask in zip(aligned(params, level), crops(TEACHERS, level), everywhere, strict=True):
            height, width, _ = student.shape
            generated = generate(params[f"generation_{level}"], student * mask[:height, :width])
            total += float(np.sum((generated - teacher) ** 2)) / len(SIZES)
    return total


def _linear(params: dict[str, Array], x: Array) -> Array:
    return x @ params["kernel"] + params["bias"]


def _mlp(params: dict[str, dict[str, Array]], x: Array) -> Array:
    for index in range(len(params)):
        x = _linear(params[f"layer_{index}"], np.maximum(x, 0) if index else x)
    return x


def _layer_norm(x: Array, scale: Array | float = 1.0, bias: Array | float = 0.0) -> Array:
    return scale * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) + bias


def _softmax(x: Array) -> Array:
    odds = np.exp(x - x.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def _sine_position(height: int, width: int) -> Array:
    """DETR's code of a map (h, w, TEACHER) without padding, y in the first half."""

    def code(length: int) -> Array:
        angles = [
            [2 * np.pi * (place + 1) / length / 10000 ** (4 * i / TEACHER) for i in range(TEACHER // 4)]
            for place in range(length)
        ]
        return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)

    y, x = code(height), code(width)
    return np.stack([np.stack([np.concatenate([row, column]) for column in x]) for row in y])


def icd(
    params: dict[str, Any], queries: Queries, descriptors: jax.Array, *, layers: int, heads: int, temperature: float
) -> dict[str, float]:
    """All terms of ICD: one image, one head at a time, on the queries that are not empty.

    Which queries are drawn, and how they are described, is given: (N, Q, ...).
    """
    params, queries, descriptors = jax.tree.map(np.asarray, (params, queries, descriptors))
    width = TEACHER // heads
    distilled: list[float] = []
    entropies: list[list[float]] = [[] for _ in range(layers)]
    distances: list[list[float]] = [[] for _ in range(layers)]
    for n in range(len(SIZES)):
        maps = [crops(TEACHERS, level)[n] for level in STRIDES]
        taught = np.concatenate([x.reshape(-1, TEACHER) for x in maps])
        position = np.concatenate([_sine_position(*x.shape[:2]).reshape(-1, TEACHER) for x in maps])
        learning = np.concatenate([aligned(params, level)[n].reshape(-1, TEACHER) for level in STRIDES])
        asked = queries.valid[n]
        real, boxes, points = (x[n][asked] for x in (queries.real, queries.boxes, queries.points))
        decoded = _mlp(params["encoder"], descriptors[n][asked])
        for k in range(layers):
            layer = params[f"teacher_layer_{k}"]
            query, values = _linear(layer["query"], decoded), _linear(layer["value"], taught)
            key = _linear(layer["key"], taught + _linear(layer["position"], position))
            own = _linear(params[f"student_layer_{k}"]["value"], learning)
            attended = []
            for part in (slice(head * width, (head + 1) * width) for head in range(heads)):
                logits = query[:, part] @ key[:, part].T / np.sqrt(width)
                attended.append(_softmax(logits) @ values[:, part])
                looked = np.sum(_softmax(logits / temperature)[real], axis=0)
                error = np.mean((_layer_norm(own[:, part]) - _layer_norm(values[:, part])) ** 2, axis=-1)
                distilled.append(float(looked @ error / max(looked.sum(), 1e-6)))
            decoded = _layer_norm(decoded + _linear(layer["out"], np.concatenate(attended, -1)), **layer["norm_0"])
            hidden = np.maximum(_linear(layer["mlp_0"], decoded), 0)
            decoded = _layer_norm(decoded + _linear(layer["mlp_1"], hidden), **layer["norm_1"])
            probability = 1 / (1 + np.exp(-_mlp(params["predictor"], decoded).astype(np.float64)))
            entropies[k] += list(-np.log(np.where(real, probability[:, 0], 1 - probability[:, 0])))
            offsets = np.concatenate([points - boxes[:, :2], boxes[:, 2:] - points], axis=-1)
            sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
            distances[k] += list((np.abs(probability[:, 1:] - offsets) / sides).sum(-1)[real])
    return {
        # Of each layer the mean over images and heads; layers are averaged.
        "icd": float(np.mean(distilled)),
        # Of each layer the mean over the queries of all images; layers are summed.
        "icd_confidence": float(sum(map(np.mean, entropies))),
        "icd_localization": float(sum(map(np.mean, distances))),
    }
