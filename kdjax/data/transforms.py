"""Geometric transforms of one example, in NumPy: boxes move with the pixels.

Coordinates are continuous: a box [0, 0, W, H] covers a whole image, and pixel (row, column) covers
[column, column + 1] x [row, row + 1].
"""

import numpy as np
from PIL import Image

from kdjax.data.sources import Example


def resize_to_fit(example: Example, height: int, width: int) -> Example:
    """Scales an example, keeping its ratio, to the largest size that fits into ``height`` x ``width``.

    Sides are rounded to whole pixels; boxes scale by the exact ratio of each side, and areas by both. Pixels are
    interpolated bilinearly, with antialiasing when they shrink. An example that already has that size is returned
    as it is.
    """
    old_height, old_width = example.image.shape[:2]
    scale = min(height / old_height, width / old_width)
    new_height, new_width = max(round(old_height * scale), 1), max(round(old_width * scale), 1)
    if (new_height, new_width) == (old_height, old_width):
        return example
    image = Image.fromarray(example.image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    ratio = np.array([new_width / old_width, new_height / old_height], np.float32)
    return example._replace(
        image=np.asarray(image), boxes=example.boxes * np.tile(ratio, 2), area=example.area * ratio.prod()
    )


def flip(example: Example) -> Example:
    """Mirrors an example left to right."""
    width = example.image.shape[1]
    x1, y1, x2, y2 = example.boxes.T
    return example._replace(image=example.image[:, ::-1], boxes=np.stack([width - x2, y1, width - x1, y2], axis=1))


def random_flip(example: Example, rng: np.random.Generator, probability: float) -> Example:
    """Mirrors an example left to right with a probability; always takes exactly one number from ``rng``."""
    return flip(example) if rng.random() < probability else example
