"""How images are moved and recoloured, in NumPy and Pillow.

What is drawn is a :class:`Geometry`, which the pixels follow here and a task's truth wherever that is kept. The numbers
that :func:`augment` draws by are an argument, so that it is as much a function of its arguments as the others.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageStat

from kdjax.data.sizing import RESIZES, Augmentation, Size, Sizing

NUMBERS = 8
"""How many random numbers :func:`augment` takes, whatever its options: one option more or less changes no other."""

# ITU-R BT.601, as Pillow's conversion to grey; and its NTSC companion, which turns colours into brightness, I and Q.
_GREY = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_GREY, [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]])


class Geometry(NamedTuple):
    """How an image is moved: a window is cut out of it, mirrored left to right or not, and scaled.

    Coordinates are continuous: a box [0, 0, W, H] covers a whole image, and pixel (row, column) covers
    [column, column + 1] x [row, row + 1].
    """

    image: Size
    """Height and width of the image."""
    corner: tuple[int, int]
    """Row and column of the window's upper left pixel."""
    window: Size
    """Height and width of the window."""
    mirrored: bool
    size: Size
    """Height and width that the window is scaled to."""
    antialias: bool = True
    """Of :class:`kdjax.data.sizing.Resize`."""

    @property
    def cropped(self) -> bool:
        """Whether the window is less than the image."""
        return self.window != self.image


def whole(image: Size, size: Size | None = None) -> Geometry:
    """The geometry that scales a whole image, by default to its own size, which leaves it as it is."""
    return Geometry(image, (0, 0), image, False, size or image)


def fit(image: Size, shape: Size, sizing: Sizing) -> Geometry:
    """How evaluation sees an image of that size in an array of ``shape``, one of the sizing's."""
    size = sizing.scaled(image, float(sizing.scale(np.array(image), np.array(shape))), shape)
    return whole(image, size)._replace(antialias=RESIZES[sizing.resize].antialias)


def draw(image: Size, numbers: np.ndarray, shape: Size, sizing: Sizing, augmentation: Augmentation) -> Geometry:
    """How an image is moved at random, to at most ``shape``; arguments as those of :func:`augment`."""
    mirrored, drawn_scale, top, left, *_ = numbers
    corner = (0, 0)
    if augmentation.jitter:
        low, high = augmentation.jitter
        factor = float((low + (high - low) * drawn_scale) * np.min(np.array(shape) / image))
        window = sizing.scaled(shape, 1 / factor, image)
        room = np.array(image) - window + 1
        corner = int(top * room[0]), int(left * room[1])
    else:
        sides = sizing.short_sides
        short_side = sides[int(drawn_scale * len(sides))] if sides else None
        factor, window = float(sizing.scale(np.array(image), np.array(shape), short_side)), image
    size, antialias = sizing.scaled(window, factor, shape), RESIZES[sizing.resize].antialias
    return Geometry(image, corner, window, bool(mirrored < augmentation.flip), size, antialias)


def augment(
    image: np.ndarray, numbers: np.ndarray, shape: Size, sizing: Sizing, augmentation: Augmentation
) -> tuple[np.ndarray, Geometry]:
    """Changes an image at random, to at most ``shape``, one of the sizing's.

    What reads most pixels comes last: a crop, colours and the mirror image are made at the original scale.

    Args:
        image: (H, W, 3) uint8, RGB.
        numbers: (NUMBERS,) drawn uniformly from [0, 1).
        shape: height and width that the image is going to be padded to.
        sizing: how it is scaled, unless jittered.
        augmentation: what is drawn, and from which range.

    Returns:
        the pixels, and the geometry that they followed.
    """
    height, width = image.shape[:2]
    geometry = draw((height, width), numbers, shape, sizing, augmentation)
    image = cut(image, geometry)
    if augmentation.color:
        brightness, contrast, saturation, hue = augmentation.color * (2 * numbers[4:] - 1)
        image = recolor(image, 1 + brightness, 1 + contrast, 1 + saturation, hue / 10)
    return turn(image, geometry), geometry


def move(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of an image in a geometry."""
    return turn(cut(image, geometry), geometry)


def cut(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The window of an image, as a view of its pixels."""
    (top, left), (height, width) = geometry.corner, geometry.window
    return image[top : top + height, left : left + width] if geometry.cropped else image


def turn(window: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The pixels of a window mirrored and scaled, bilinear."""
    if geometry.mirrored:
        # Channel by channel, six times as fast as pixel by pixel.
        window = np.stack([window[:, ::-1, channel] for channel in range(3)], axis=-1)
    if geometry.size == geometry.window:
        return window
    if not geometry.antialias:
        return interpolate(window, geometry.size)
    height, width = geometry.size
    return np.asarray(Image.fromarray(window).resize((width, height), Image.Resampling.BILINEAR))


def interpolate(image: np.ndarray, size: Size) -> np.ndarray:
    """An image (H, W, 3) uint8 of another size, each pixel between its four nearest ones, as OpenCV and PyTorch do."""
    # The axis that shrinks most comes first, so that the other one has less to do.
    for axis in sorted((0, 1), key=lambda axis: size[axis] / image.shape[axis]):
        old, new = image.shape[axis], size[axis]
        place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
        low = place.astype(int)
        share = (place - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        near = np.take(image, low, axis).astype(np.float32, copy=False)
        far = np.take(image, np.minimum(low + 1, old - 1), axis)
        image = near + share * (far - near)
    return np.rint(image).astype(np.uint8)


def recolor(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """Changes the colours of an image: all four changes in one affine map of each pixel.

    With the grey value ``g(p) = 0.299 r + 0.587 g + 0.114 b`` of a pixel p and m the mean of g over the image:
    ``p <- brightness p``, then ``p <- contrast (p - m) + m``, then ``p <- saturation (p - g(p)) + g(p)``, as Pillow's
    ``ImageEnhance`` has them, and at last a turn of the chroma (I, Q of YIQ). What leaves [0, 255] is cut off once, at
    the end.

    Args:
        image: (H, W, 3) uint8, RGB.
        brightness: factor, 1 for no change.
        contrast: likewise.
        saturation: likewise.
        hue: turn of the colours; 1 is a whole turn.
    """
    picture = Image.fromarray(image)
    angle = 2 * np.pi * hue
    turn = np.eye(3)
    turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    saturate = saturation * np.eye(3) + (1 - saturation) * _GREY
    # Both keep greys as they are, so that what contrast adds passes through them.
    matrix = contrast * brightness * np.linalg.inv(_YIQ) @ turn @ _YIQ @ saturate
    offset = (1 - contrast) * brightness * ImageStat.Stat(picture.convert("L")).mean[0]
    picture = picture.convert("RGB", tuple(np.column_stack([matrix, np.full(3, offset)]).ravel().tolist()))
    return np.asarray(picture)


def move_classes(classes: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The map (H, W) uint8 of an image in a geometry, by the nearest pixel.

    >>> move_classes(np.array([[0, 1]], np.uint8), whole((1, 2), (1, 4))).tolist()
    [[0, 0, 1, 1]]
    """
    (top, left), (height, width) = geometry.corner, geometry.window
    window = classes[top : top + height, left : left + width]
    window = window[:, ::-1] if geometry.mirrored else window
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(geometry.window, geometry.size, strict=True)
    )
    return window[rows[:, None], columns[None]]
