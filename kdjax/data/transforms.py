"""Transforms of one example, in NumPy and Pillow: boxes and outlines move with the pixels.

Coordinates are continuous: a box [0, 0, W, H] covers a whole image, and pixel (row, column) covers
[column, column + 1] x [row, row + 1]. :func:`augment` composes the others; the numbers that it draws from are an
argument, so that it is as much a function of its arguments as they are.
"""

import itertools
from collections.abc import Callable

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageStat

from kdjax.data.examples import Example, Segmentation
from kdjax.data.masks import rasterize
from kdjax.data.sizing import Augmentation, Size, Sizing

NUMBERS = 8
"""How many random numbers :func:`augment` takes, whatever its options: one option more or less changes no other."""

_LEAST_SHARE = 0.1
# ITU-R BT.601, as Pillow's conversion to grey; and its NTSC companion, which turns colours into brightness, I and Q.
_GREY = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_GREY, [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]])


def scaled(size: Size, factor: float, limit: Size) -> Size:
    """A size times a factor, in whole pixels: at least 1, at most ``limit``."""
    height, width = (min(max(round(side * factor), 1), most) for side, most in zip(size, limit, strict=True))
    return height, width


def fit(example: Example, shape: Size, sizing: Sizing) -> Example:
    """Scales an example as evaluation sees it in an array of ``shape``, one of the sizing's."""
    size = example.image.shape[:2]
    return resize(example, *scaled(size, float(sizing.scale(np.array(size), np.array(shape))), shape))


def augment(example: Example, numbers: np.ndarray, shape: Size, sizing: Sizing, augmentation: Augmentation) -> Example:
    """Changes an example at random, to at most ``shape``, one of the sizing's.

    What reads most pixels comes last: a crop, colours and the mirror image are made at the original scale.

    Args:
        example: as its source gives it.
        numbers: (NUMBERS,) drawn uniformly from [0, 1).
        shape: height and width that the image is going to be padded to.
        sizing: how it is scaled, unless jittered.
        augmentation: what is drawn, and from which range.
    """
    size, mirrored, drawn_scale, top, left, *colors = example.image.shape[:2], *numbers
    if augmentation.jitter:
        low, high = augmentation.jitter
        factor = float((low + (high - low) * drawn_scale) * np.min(np.array(shape) / size))
        window = scaled(shape, 1 / factor, size)
        room = np.array(size) - window + 1
        example = crop(example, int(top * room[0]), int(left * room[1]), *window)
    else:
        sides = sizing.short_sides
        short_side = sides[int(drawn_scale * len(sides))] if sides else None
        factor, window = float(sizing.scale(np.array(size), np.array(shape), short_side)), size
    if augmentation.color:
        brightness, contrast, saturation, hue = augmentation.color * (2 * np.array(colors) - 1)
        example = recolor(example, 1 + brightness, 1 + contrast, 1 + saturation, hue / 10)
    if mirrored < augmentation.flip:
        example = flip(example)
    return resize(example, *scaled(window, factor, shape))


def resize(example: Example, height: int, width: int) -> Example:
    """Scales an example to ``height`` x ``width`` pixels.

    Boxes scale by the exact ratio of each side, areas by both. Pixels are interpolated bilinearly, with antialiasing
    when they shrink. An example that already has that size is returned as it is.
    """
    old_height, old_width = example.image.shape[:2]
    if (height, width) == (old_height, old_width):
        return example
    image = Image.fromarray(example.image).resize((width, height), Image.Resampling.BILINEAR)
    ratio = np.array([width / old_width, height / old_height], np.float32)

    def resize_mask(mask: np.ndarray) -> np.ndarray:
        smooth = Image.fromarray(255 * mask).resize((width, height), Image.Resampling.BILINEAR)
        return (np.asarray(smooth) > 127).astype(np.uint8)

    return example._replace(
        image=np.asarray(image),
        boxes=example.boxes * np.tile(ratio, 2),
        area=example.area * ratio.prod(),
        segmentation=_moved(example, lambda points: points * ratio, resize_mask),
    )


def flip(example: Example) -> Example:
    """Mirrors an example left to right."""
    width = example.image.shape[1]
    x1, y1, x2, y2 = example.boxes.T
    return example._replace(
        # Channel by channel, six times as fast as pixel by pixel.
        image=np.stack([example.image[:, ::-1, channel] for channel in range(3)], axis=-1),
        boxes=np.stack([width - x2, y1, width - x1, y2], axis=1),
        segmentation=_moved(example, lambda points: points * [-1, 1] + [width, 0], lambda mask: mask[:, ::-1]),
    )


def crop(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """Cuts a window out of an example.

    Boxes are clipped to it. Objects of whose box less than a tenth is left are dropped: what is seen of them tells
    nothing about the rest. Of a crowd, whatever is left stays. Areas shrink as their boxes do; polygons keep their
    points outside of the window.
    """
    offset = np.array([left, top], np.float32)
    boxes = np.clip(example.boxes - np.tile(offset, 2), 0, np.array([width, height] * 2, np.float32))
    before, after = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (example.boxes, boxes))
    kept = (after > 0) & (example.crowd | (after >= _LEAST_SHARE * before))
    moved = _moved(example, lambda points: points - offset, lambda mask: mask[top : top + height, left : left + width])
    return example._replace(
        image=example.image[top : top + height, left : left + width],
        boxes=boxes[kept],
        labels=example.labels[kept],
        crowd=example.crowd[kept],
        area=(example.area * after / np.where(before > 0, before, 1)).astype(np.float32)[kept],
        segmentation=moved and tuple(itertools.compress(moved, kept)),
    )


def recolor(example: Example, brightness: float, contrast: float, saturation: float, hue: float) -> Example:
    """Changes the colours of an example: all four changes in one affine map of each pixel.

    With the grey value ``g(p) = 0.299 r + 0.587 g + 0.114 b`` of a pixel p and m the mean of g over the image:
    ``p <- brightness p``, then ``p <- contrast (p - m) + m``, then ``p <- saturation (p - g(p)) + g(p)``, as Pillow's
    ``ImageEnhance`` has them, and at last a turn of the chroma (I, Q of YIQ). What leaves [0, 255] is cut off once, at
    the end.

    Args:
        example: any.
        brightness: factor, 1 for no change.
        contrast: likewise.
        saturation: likewise.
        hue: turn of the colours; 1 is a whole turn.
    """
    image = Image.fromarray(example.image)
    angle = 2 * np.pi * hue
    turn = np.eye(3)
    turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    saturate = saturation * np.eye(3) + (1 - saturation) * _GREY
    # Both keep greys as they are, so that what contrast adds passes through them.
    matrix = contrast * brightness * np.linalg.inv(_YIQ) @ turn @ _YIQ @ saturate
    offset = (1 - contrast) * brightness * ImageStat.Stat(image.convert("L")).mean[0]
    image = image.convert("RGB", tuple(np.column_stack([matrix, np.full(3, offset)]).ravel().tolist()))
    return example._replace(image=np.asarray(image))


def _moved(
    example: Example, move_points: Callable[[np.ndarray], np.ndarray], move_mask: Callable[[np.ndarray], np.ndarray]
) -> tuple[Segmentation, ...] | None:
    """The outlines of an example's objects, moved: polygons point by point, run lengths as (H, W) uint8 masks."""
    if example.segmentation is None:
        return None
    height, width = example.image.shape[:2]

    def move(outline: Segmentation) -> Segmentation:
        if isinstance(outline, dict):
            mask = rasterize(outline, (height, width)).astype(np.uint8)
            return coco_mask.encode(np.asfortranarray(move_mask(mask)))
        return [move_points(np.reshape(polygon, (-1, 2))).ravel().tolist() for polygon in outline]

    return tuple(map(move, example.segmentation))
