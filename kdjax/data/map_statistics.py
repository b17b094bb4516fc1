"""What a person should know of a data set of index maps, and what it suggests."""

from typing import Any

import numpy as np

from kdjax.data.examples import MapSource

_SIDES = range(64, 545, 32)
_MOST_AREA = 512 * 512
"""Pixels of a padded image that is chosen."""
_CROP = 128
"""Pixels on a side of what is cut out of it in training."""


def described(source: MapSource) -> list[str]:
    """Sizes of the images, and of each class its share of the pixels and in how many images it is."""
    sizes = np.array([source.size(index) for index in range(len(source))])
    ignored = sizes.prod(axis=1) - source.pixels.sum(axis=1)
    count = np.column_stack([source.pixels, ignored])
    pixels, images = count.sum(axis=0), np.count_nonzero(count, axis=0)
    names = (*source.class_names, "not counted")
    width = max(map(len, names))
    return [
        f"images: {len(source)}, {sizes.min(axis=0)} to {sizes.max(axis=0)} pixels high and wide",
        f"{'class':{width}}  % of pixels  images",
        *(
            f"{name:{width}} {100 * pixels[k] / max(pixels.sum(), 1):12.2f} {images[k]:7}"
            for k, name in enumerate(names)
        ),
    ]


def suggested(source: MapSource) -> dict[str, Any]:
    """Keys of a config's data that suit the images: about their own size, and crops to train on in minutes."""
    sizes = np.array([source.size(index) for index in range(len(source))])
    height, width = np.median(sizes, axis=0)
    scale = min(1.0, np.sqrt(_MOST_AREA / (height * width)))
    sides = tuple(min(_SIDES, key=lambda side: abs(side - scale * length)) for length in (height, width))
    crop = tuple(min(side, _CROP) for side in sides)
    return {"image_size": sides, "jitter": (0.75, 1.34), "color": 0.3, **({"crop": crop} if crop != sides else {})}
