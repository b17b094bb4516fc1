"""Stand-in weights: what the detector goldens were computed with, rebuilt from names and shapes instead of kept.

Every tensor is drawn from a generator seeded by the case's seed and the CRC-32 of the tensor's name, from a
distribution that the last part of the name decides.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def synthetic_state_dict(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Name to array, in PyTorch's layout, from name to shape."""
    return {name: synthetic_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def synthetic_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.split(".")[-1]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "weight" and len(shape) > 1:
        drawn = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    elif kind in ("weight", "running_var", "scale"):
        low, high = (0.4, 0.8) if kind == "weight" else (0.8, 1.2)
        drawn = rng.uniform(low, high, shape)
    else:
        drawn = rng.normal(0, 0.05, shape)
    return np.asarray(drawn, np.float32).reshape(shape)


def photograph(height: int, width: int, step: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8: blocks of colour, and noise, which resizing treats differently; multiples of a step."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(30, 226, (-(-height // 11), -(-width // 11), 3)).repeat(11, 0).repeat(11, 1)[:height, :width]
    return ((blocks + rng.integers(-30, 31, (height, width, 3))) // step * step).astype(np.uint8)
