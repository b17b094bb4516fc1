"""From outlines to pixels, from pixels to the grids that mask heads learn, and from what they find to run lengths."""

import functools
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from kdjax.data.examples import Segmentation
from kdjax.losses.segmentation import bilinear

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
    return _run_lengths(columns.weights @ mask.T @ rows.weights.T >= 0.5, rows.first, columns.first, size)


def paste_whole(masks: np.ndarray, scaled: tuple[int, int], size: tuple[int, int]) -> list[RunLengths]:
    """The pixels of an image in which masks over all of it are, as MMDetection's SOLO enlarges them.

    A mask is enlarged by four, cut to the scaled image, and resized to the image, both bilinearly, where a pixel
    belongs to the object if the probability is above one half. Far from all that is, nothing is computed.

    Args:
        masks: (n, h, w) uint8, 255 times the probability at every fourth pixel of the padded image.
        scaled: height and width of the scaled image inside of the padded one.
        size: height and width of the image.
    """
    rows, columns = (_enlarged(masks.shape[1 + axis], scaled[axis], size[axis]) for axis in (0, 1))
    pasted = []
    for mask in masks:
        sure = mask > 127
        high, wide = _around(sure.any(axis=1)), _around(sure.any(axis=0))
        down, across = (_touched(matrix[:, part]) for matrix, part in ((rows, high), (columns, wide)))
        pixels = columns[across, wide] @ mask[high, wide].T.astype(np.float32) @ rows[down, high].T > 127.5
        pasted.append(_run_lengths(pixels, down.start, across.start, size))
    return pasted


@functools.lru_cache(maxsize=64)
def _enlarged(cells: int, scaled: int, length: int) -> np.ndarray:
    """(length, cells) float32: what cells, four pixels of a scaled image each, give to the pixels of the image."""
    return bilinear(scaled, length, False) @ bilinear(cells, 4 * cells, False)[:scaled]


def _around(line: np.ndarray) -> slice:
    """The part of a line that is True, and two more on each side; nothing where nothing is."""
    where = np.flatnonzero(line)
    return slice(max(where[0] - 2, 0), where[-1] + 3) if where.size else slice(0, 0)


def _touched(weights: np.ndarray) -> slice:
    """The pixels, rows of weights (pixels, cells), that any of the cells give something to."""
    where = np.flatnonzero(weights.any(axis=1))
    return slice(where[0], where[-1] + 1) if where.size else slice(0, 0)


def _run_lengths(pixels: np.ndarray, top: int, left: int, size: tuple[int, int]) -> RunLengths:
    """The run lengths of an image that is False outside of a window.

    Args:
        pixels: (columns, rows) bool, the window, column after column as run lengths go.
        top: its first row.
        left: its first column.
        size: height and width of the image.
    """
    height, width = size
    # Of full height.
    filled = np.zeros((len(pixels), height), bool)
    filled[:, top : top + pixels.shape[1]] = pixels
    changes = np.flatnonzero(np.diff(filled.ravel(), prepend=False, append=False)) + left * height
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
