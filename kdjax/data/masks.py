"""From outlines to pixels, from pixels to the grids that mask heads learn, and from what they find to run lengths."""

from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from kdjax.data.examples import Segmentation

RunLengths = dict[str, Any]
"""COCO's compressed run lengths of a mask: ``{"size": [height, width], "counts": "..."}``."""


def run_lengths(segmentation: Segmentation, size: tuple[int, int]) -> RunLengths:
    """The run lengths of an object as COCO's own code fills its outline.

    Args:
        segmentation: polygons, or run lengths of an image of that size.
        size: height and width of the image.

    Raises:
        ValueError: run lengths of an image of another size.
    """
    height, width = size
    if isinstance(segmentation, dict) and tuple(segmentation["size"]) != (height, width):
        raise ValueError(
            f"a segmentation has run lengths for an image of height and width {tuple(segmentation['size'])}, but the "
            f"image has {(height, width)}"
        )
    encoded = coco_mask.segmToRle(segmentation or {"size": [height, width], "counts": [height * width]}, width, height)
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def rasterize(segmentation: Segmentation, size: tuple[int, int]) -> np.ndarray:
    """The pixels of an object as COCO's own code fills its outline: (H, W) bool.

    Args:
        segmentation: polygons, or run lengths of an image of that size.
        size: H and W of the image.

    Raises:
        ValueError: run lengths of an image of another size.
    """
    return coco_mask.decode(run_lengths(segmentation, size)).astype(bool)


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> RunLengths:
    """The pixels of an image in which a mask head sees an object, as MMDetection and Detectron2 paste masks.

    A pixel belongs to the object if the probability at its centre is at least one half. Cells of the mask hold the
    probability at their centres; between these it is interpolated bilinearly, and outside of the mask it is zero.

    Args:
        mask: (s, s) float32, probabilities in s x s equal cells of the box.
        box: (4,) xyxy in pixels.
        size: height and width of the image.
    """
    height, width = size
    columns, rows = (
        _interpolation(low, high, len(mask), length)
        for low, high, length in ((box[0], box[2], width), (box[1], box[3], height))
    )
    # Column after column, as run lengths go, of full height.
    pixels = np.zeros((len(columns.weights), height), bool)
    pixels[:, rows.first : rows.first + len(rows.weights)] = columns.weights @ mask.T @ rows.weights.T >= 0.5
    changes = np.flatnonzero(np.diff(pixels.ravel(), prepend=False, append=False)) + columns.first * height
    ends = np.append(changes, [] if changes.size and changes[-1] == height * width else height * width)
    return run_lengths({"size": [height, width], "counts": np.diff(ends, prepend=0).astype(int).tolist()}, size)


class _Interpolation(NamedTuple):
    """Along one axis."""

    first: int
    """The first pixel whose centre is in the box."""
    weights: np.ndarray
    """(pixels, cells) float32: how much each cell counts in each of the pixels from there on."""


def _interpolation(low: float, high: float, cells: int, length: int) -> _Interpolation:
    first, last = (int(min(max(edge, 0), length)) for edge in (np.ceil(low - 0.5), np.floor(high - 0.5) + 1))
    centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    position = (centres - low) / max(high - low, 1e-6) * cells - 0.5
    distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
    return _Interpolation(first, np.maximum(1 - distance, 0).astype(np.float32))


def mask_grid(mask: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """An object on a grid of its own, as :class:`kdjax.types.Masks` has them.

    Along an axis on which the object fits into ``cells`` pixels, a cell is a pixel. Otherwise the object's extent is
    cut into ``cells`` equal parts. A cell belongs to the object if at least half of its area does.

    Args:
        mask: (H, W) bool.
        cells: S, the side of the grid.

    Returns:
        (S, S) bool, and the frame of the grid, (4,) float32 xyxy in pixels. An empty mask has an empty grid.
    """
    grid = np.zeros((cells, cells), bool)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return grid, np.array([0, 0, cells, cells], np.float32)
    (top, bottom), (left, right) = ((found[0], found[-1] + 1) for found in (rows, columns))
    shares = mask[top:bottom, left:right]
    if bottom - top > cells:
        shares = _averages(bottom - top, cells) @ shares
    if right - left > cells:
        shares = shares @ _averages(right - left, cells).T
    height, width = shares.shape
    grid[:height, :width] = shares >= 0.5
    frame = left, top, left + max(right - left, cells), top + max(bottom - top, cells)
    return grid, np.array(frame, np.float32)


def _averages(pixels: int, cells: int) -> np.ndarray:
    """(cells, pixels) float32: the share of each pixel in the mean of each of as many equal parts of their row."""
    edges = np.linspace(0, pixels, cells + 1)
    pixel = np.arange(pixels)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.maximum(covered, 0) * cells / pixels).astype(np.float32)
