"""What the backbones share: how wide they are, and at which strides their maps are."""

from typing import Annotated

from kdjax.options import number

Width = Annotated[
    float, number(0, above=True), "Factor on every number of channels, which are rounded to a multiple of 8."
]
"""A field of every backbone, see :func:`widened`."""


def widened(channels: int, width: float) -> int:
    """A number of channels times a factor, as the nearest multiple of 8 that is not 0.

    >>> widened(64, 0.3), widened(32, 0.01)
    (16, 8)
    """
    return max(8, 8 * round(channels * width / 8))


def map_strides(output_stride: int = 32) -> dict[str, int]:
    """Pixels of the image from one position of C2 to C5 to the next, of which none exceeds ``output_stride``.

    >>> map_strides(8)
    {'c2': 4, 'c3': 8, 'c4': 8, 'c5': 8}
    """
    return {f"c{level}": min(2**level, output_stride) for level in range(2, 6)}
