"""DMKD and DFMSD in NumPy, written from the formulas alone: one image, one position, one channel at a time, float64.

It shares neither code nor structure with kdjax: images are cropped to what is valid instead of masked, places are
sorted instead of ranked, and convolutions are loops.
"""

import math
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Block(NamedTuple):
    """MGD's generation block: two 3x3 convolutions (3, 3, C, C), without bias so that padding stays zero."""

    first: Array
    second: Array


def convolve(features: Array, kernel: Array) -> Array:
    height, width, _ = features.shape
    result = np.zeros((height, width, kernel.shape[-1]))
    for y in range(height):
        for x in range(width):
            for i in range(3):
                for j in range(3):
                    if 0 <= y + i - 1 < height and 0 <= x + j - 1 < width:
                        result[y, x] += features[y + i - 1, x + j - 1] @ kernel[i, j]
    return result


def generate(block: Block, features: Array, valid: tuple[int, int]) -> Array:
    """The block on the whole padded map, of which only the valid corner is not zero."""
    return convolve(np.maximum(convolve(features, block.first), 0), block.second)[: valid[0], : valid[1]]


def attention(strengths: list[float], tau: float) -> list[float]:
    total = math.fsum(math.exp(strength / tau) for strength in strengths)
    return [len(strengths) * math.exp(strength / tau) / total for strength in strengths]


def hidden_places(
    scores: list[float], select: str, ratio: float, threshold: float, hide: str, thinning: list[bool] | None = None
) -> set[int]:
    if select == "threshold":
        places = {place for place, score in enumerate(scores) if (score >= threshold) == (hide == "high")}
    else:
        best_first = sorted(range(len(scores)), key=lambda place: scores[place], reverse=hide == "high")
        places = set(best_first[: round(ratio * len(scores))])
    return places if thinning is None else {place for place in places if thinning[place]}


class Options(NamedTuple):
    """What :func:`masks` needs to know; the defaults of methods.md."""

    spatial_ratio: float = 0.65
    channel_ratio: float = 0.5
    tau: float = 0.5
    select: str = "ratio"
    threshold: float = 1.0
    hide: str = "high"


def masks(teacher: Array, options: Options, emphasis: Array | None = None) -> tuple[Array, Array]:
    """What is kept, (h, w) and (C,), of one cropped image (h, w, C)."""
    height, width, channels = teacher.shape
    spatial = attention([float(np.abs(teacher[y, x]).mean()) for y in range(height) for x in range(width)], options.tau)
    if emphasis is not None:
        spatial = [a * float(e) for a, e in zip(spatial, emphasis.ravel(), strict=True)]
    channel = attention([float(np.abs(teacher[..., c]).mean()) for c in range(channels)], options.tau)
    keep_spatial, keep_channel = np.ones(height * width), np.ones(channels)
    rest = (options.threshold, options.hide)
    keep_spatial[list(hidden_places(spatial, options.select, options.spatial_ratio, *rest))] = 0
    keep_channel[list(hidden_places(channel, options.select, options.channel_ratio, *rest))] = 0
    return keep_spatial.reshape(height, width), keep_channel


def reconstruct(
    student: Array, keep: tuple[Array, Array], blocks: tuple[Block, Block], fusion: Array, padded: tuple[int, int]
) -> Array:
    """R of one cropped image (h, w, C), whose blocks run on the padded map."""
    height, width, channels = student.shape
    share = math.exp(fusion[0]) / (math.exp(fusion[0]) + math.exp(fusion[1]))
    result = np.zeros(student.shape)
    for weight, block, mask in zip((share, 1 - share), blocks, (keep[0][..., None], keep[1]), strict=True):
        canvas = np.zeros((*padded, channels))
        canvas[:height, :width] = student * mask
        result += weight * generate(block, canvas, (height, width))
    return result


def norm(images: list[Array]) -> list[Array]:
    """Each channel over all positions of all cropped images."""
    positions = np.concatenate([image.reshape(-1, image.shape[-1]) for image in images]).astype(np.float64)
    mean, deviation = positions.mean(axis=0), positions.std(axis=0)
    return [(image - mean) / (deviation + 1e-6) for image in images]


def pearson(students: list[Array], teachers: list[Array]) -> float:
    """1 - r, averaged over channels."""
    first, second = (np.concatenate([x.reshape(-1, x.shape[-1]) for x in images]) for images in (students, teachers))
    return float(np.mean([1 - np.corrcoef(first[:, c], second[:, c])[0, 1] for c in range(first.shape[1])]))
