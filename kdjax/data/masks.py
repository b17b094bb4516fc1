"""From the outlines of objects to pixels, and from pixels to the small grids that mask heads learn from."""

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from kdjax.data.sources import Segmentation


def rasterize(segmentation: Segmentation, size: tuple[int, int]) -> np.ndarray:
    """The pixels of an object as COCO's own code fills them: (H, W) bool.

    Args:
        segmentation: polygons, or run lengths of an image of that size.
        size: H and W of the image.

    Raises:
        ValueError: run lengths of an image of another size.
    """
    height, width = size
    if isinstance(segmentation, dict) and tuple(segmentation["size"]) != (height, width):
        raise ValueError(
            f"a segmentation has run lengths for an image of height and width {tuple(segmentation['size'])}, but the "
            f"image has {(height, width)}"
        )
    if not segmentation:
        return np.zeros(size, bool)
    return coco_mask.decode(coco_mask.segmToRle(segmentation, width, height)).astype(bool)


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
