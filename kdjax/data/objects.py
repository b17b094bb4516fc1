"""Boxes and outlines of objects, moved as the pixels of their image are."""

import itertools
from collections.abc import Callable

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from kdjax.data.examples import Example, Segmentation
from kdjax.data.masks import rasterize
from kdjax.data.sizing import Size
from kdjax.data.transforms import Geometry

_LEAST_SHARE = 0.1


def moved(example: Example, geometry: Geometry) -> Example:
    """An example whose objects are where a geometry puts them; its pixels are left as they are.

    Args:
        example: as its source gives it.
        geometry: what its image goes through.
    """
    if geometry.cropped:
        example = _crop(example, geometry)
    if geometry.mirrored:
        example = _flip(example, geometry.window)
    return example if geometry.size == geometry.window else _resize(example, geometry.window, geometry.size)


def _crop(example: Example, geometry: Geometry) -> Example:
    """Clips boxes to a window.

    Objects of whose box less than a tenth is left are dropped: what is seen of them tells nothing about the rest. Of a
    crowd, whatever is left stays. Areas shrink as their boxes do; polygons keep their points outside of the window.
    """
    (top, left), (height, width) = geometry.corner, geometry.window
    offset = np.array([left, top], np.float32)
    boxes = np.clip(example.boxes - np.tile(offset, 2), 0, np.array([width, height] * 2, np.float32))
    before, after = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (example.boxes, boxes))
    kept = (after > 0) & (example.crowd | (after >= _LEAST_SHARE * before))
    outlines = _moved(
        example,
        geometry.image,
        lambda points: points - offset,
        lambda mask: mask[top : top + height, left : left + width],
    )
    return example._replace(
        boxes=boxes[kept],
        labels=example.labels[kept],
        crowd=example.crowd[kept],
        area=(example.area * after / np.where(before > 0, before, 1)).astype(np.float32)[kept],
        segmentation=outlines and tuple(itertools.compress(outlines, kept)),
    )


def _flip(example: Example, size: Size) -> Example:
    """Mirrors objects left to right in an image of ``size``."""
    width = size[1]
    x1, y1, x2, y2 = example.boxes.T
    return example._replace(
        boxes=np.stack([width - x2, y1, width - x1, y2], axis=1),
        segmentation=_moved(example, size, lambda points: points * [-1, 1] + [width, 0], lambda mask: mask[:, ::-1]),
    )


def _resize(example: Example, old: Size, new: Size) -> Example:
    """Scales objects; boxes by the exact ratio of each side, areas by both."""
    height, width = new
    ratio = np.array([width / old[1], height / old[0]], np.float32)

    def resize_mask(mask: np.ndarray) -> np.ndarray:
        smooth = Image.fromarray(255 * mask).resize((width, height), Image.Resampling.BILINEAR)
        return (np.asarray(smooth) > 127).astype(np.uint8)

    return example._replace(
        boxes=example.boxes * np.tile(ratio, 2),
        area=example.area * ratio.prod(),
        segmentation=_moved(example, old, lambda points: points * ratio, resize_mask),
    )


def _moved(
    example: Example,
    size: Size,
    move_points: Callable[[np.ndarray], np.ndarray],
    move_mask: Callable[[np.ndarray], np.ndarray],
) -> tuple[Segmentation, ...] | None:
    """The outlines of objects in an image of ``size``, moved: polygons point by point, run lengths as (H, W) masks."""
    if example.segmentation is None:
        return None

    def move(outline: Segmentation) -> Segmentation:
        if isinstance(outline, dict):
            mask = rasterize(outline, size).astype(np.uint8)
            return coco_mask.encode(np.asfortranarray(move_mask(mask)))
        return [move_points(np.reshape(polygon, (-1, 2))).ravel().tolist() for polygon in outline]

    return tuple(map(move, example.segmentation))
