"""How images are moved and recoloured, in NumPy and Pillow.

What is drawn is a :class:`Geometry`, which the pixels follow here and a task's truth wherever that is kept. The numbers
that :func:`augment` draws by are an argument, so that it is as much a function of its arguments as the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageStat

from kdjax.data.distortion import DRAWN, distort, drawn_steps
from kdjax.data.sizing import RESIZES, Augmentation, Size, Sizing
from kdjax.types import IGNORED

NUMBERS = 64
"""How many random numbers belong to an example, whatever the options: one option more or less changes no other."""
_COLOUR, _TRIES, _DISTORTION = slice(4, 8), slice(8, 48), slice(48, 48 + DRAWN)
"""Where among them those of some options are; the first four are of the mirror image, the scale and the place."""
MIXUP = slice(48 + DRAWN, 51 + DRAWN)
"""And those of which image another one is mixed with, how that one is changed, and how much of it there is."""
_MOST_TRIES = 10

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
    factor, antialias = float(sizing.scale(np.array(image), np.array(shape))), RESIZES[sizing.resize].antialias
    if not sizing.centre_crop:
        return whole(image, sizing.scaled(image, factor, shape))._replace(antialias=antialias)
    window, size = _cut_to(image, shape, factor, sizing)
    corner = (image[0] - window[0]) // 2, (image[1] - window[1]) // 2
    return Geometry(image, corner, window, False, size, antialias)


def _cut_to(image: Size, target: Size, factor: float, sizing: Sizing) -> tuple[Size, Size]:
    """The window of an image that a factor scales to ``target``, and its size then: less where the image ends."""
    window = sizing.scaled(target, 1 / factor, image)
    scaled = sizing.scaled(window, factor, target)
    height, width = (
        most if part < all_ else side for most, part, all_, side in zip(target, window, image, scaled, strict=True)
    )
    return window, (height, width)


Accepts = Callable[[Geometry], bool]
"""Whether a window is good enough; a worse one is drawn anew."""


def draw(
    image: Size,
    numbers: np.ndarray,
    shape: Size,
    sizing: Sizing,
    augmentation: Augmentation,
    accepts: Accepts = lambda _: True,
) -> Geometry:
    """How an image is moved at random; arguments as those of :func:`augment`."""
    mirrored, drawn_scale, top, left, *_ = numbers
    target, antialias = augmentation.crop or shape, RESIZES[sizing.resize].antialias
    flipped = bool(mirrored < augmentation.flip)
    if augmentation.area:
        corner, window = _of_area(image, numbers[_TRIES].reshape(_MOST_TRIES, 4), augmentation.area, augmentation.ratio)
        return Geometry(image, corner, window, flipped, target, antialias)
    if augmentation.jitter:
        low, high = augmentation.jitter
        if steps := augmentation.jitter_steps:
            drawn_scale = int(drawn_scale * steps) / (steps - 1)
        fitting = (
            sizing.scale(np.array(image), np.array(shape)) if augmentation.crop else np.min(np.array(shape) / image)
        )
        factor = float((low + (high - low) * drawn_scale) * fitting)
    else:
        sides = sizing.short_sides
        short_side = sides[int(drawn_scale * len(sides))] if sides else None
        factor = float(sizing.scale(np.array(image), np.array(shape), short_side))
    if augmentation.crop:
        window, size = _cut_to(image, target, factor, sizing)
    else:
        window = sizing.scaled(target, 1 / factor, image) if augmentation.jitter else image
        size = sizing.scaled(window, factor, target)
    room = np.array(image) - window + 1
    for place in ((top, left), *numbers[_TRIES].reshape(-1, 2)[:_MOST_TRIES]):
        corner = int(place[0] * room[0]), int(place[1] * room[1])
        geometry = Geometry(image, corner, window, flipped, size, antialias)
        if accepts(geometry):
            break
    return geometry


def _of_area(
    image: Size, numbers: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[tuple[int, int], Size]:
    """Corner and size of the window of a random resized crop, as torchvision draws it.

    Args:
        image: height and width.
        numbers: (tries, 4) in [0, 1).
        area: range of the window's share of the image.
        ratio: range of its width over its height; the logarithm is drawn uniformly.

    Returns:
        those of the first try that is inside the image; or the largest window in the middle whose ratio is in the
        range, and nearest to the image's.
    """
    height, width = image
    least, most = ratio
    for share, drawn_ratio, top, left in numbers.tolist():
        pixels = height * width * (area[0] + (area[1] - area[0]) * share)
        wide = float(np.exp(np.log(least) + (np.log(most) - np.log(least)) * drawn_ratio))
        rows, columns = round((pixels / wide) ** 0.5), round((pixels * wide) ** 0.5)
        if 0 < rows <= height and 0 < columns <= width:
            return (int(top * (height - rows + 1)), int(left * (width - columns + 1))), (rows, columns)
    wide = min(max(width / height, least), most)
    rows, columns = min(height, max(1, round(width / wide))), min(width, max(1, round(height * wide)))
    return ((height - rows) // 2, (width - columns) // 2), (rows, columns)


def augment(
    image: np.ndarray,
    numbers: np.ndarray,
    shape: Size,
    sizing: Sizing,
    augmentation: Augmentation,
    accepts: Accepts = lambda _: True,
) -> tuple[np.ndarray, Geometry]:
    """Changes an image at random, to at most ``augmentation.crop``, or else ``shape``.

    What reads most pixels comes last: a crop, colours and the mirror image are made at the original scale; but for the
    photometric distortion, which its authors make at the end.

    Args:
        image: (H, W, 3) uint8, RGB.
        numbers: (NUMBERS,) drawn uniformly from [0, 1).
        shape: height and width that evaluation pads the image to, one of the sizing's.
        sizing: how it is scaled, unless jittered.
        augmentation: what is drawn, and from which range.
        accepts: of windows that are cut at a random place, which to take; of up to eleven the last if none is accepted.

    Returns:
        the pixels, and the geometry that they followed.
    """
    height, width = image.shape[:2]
    geometry = draw((height, width), numbers, shape, sizing, augmentation, accepts)
    image = cut(image, geometry)
    if augmentation.color:
        brightness, contrast, saturation, hue = augmentation.color * (2 * numbers[_COLOUR] - 1)
        image = recolor(image, 1 + brightness, 1 + contrast, 1 + saturation, hue / 10)
    image = turn(image, geometry)
    if augmentation.photometric:
        image = distort(image, drawn_steps(numbers[_DISTORTION]))
    return image, geometry


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


def largest_share(classes: np.ndarray, geometry: Geometry) -> float:
    """The share of the labelled pixels of a window that the most frequent class has; 1 where none is labelled.

    >>> largest_share(np.array([[0, 1, 1, 255]], np.uint8), whole((1, 4)))
    0.6666666666666666
    """
    (top, left), (height, width) = geometry.corner, geometry.window
    window = np.ascontiguousarray(classes[top : top + height, left : left + width])
    counts = Image.fromarray(window).histogram()
    counts[IGNORED] = 0
    return max(counts) / sum(counts) if any(counts) else 1.0


def mixed(image: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Two images (H, W, 3) uint8 over each other, ``share`` being the second one's; where one ends, it is black.

    >>> mixed(np.full((1, 2, 3), 100, np.uint8), np.full((2, 1, 3), 40, np.uint8), 0.25)[..., 0].tolist()
    [[85, 75], [10, 0]]
    """
    height, width = np.maximum(image.shape[:2], other.shape[:2]).tolist()
    whole_image = np.zeros((height, width, 3), np.float32)
    for part, factor in ((image, 1 - share), (other, share)):
        whole_image[: part.shape[0], : part.shape[1]] += part * np.float32(factor)
    return np.rint(whole_image).astype(np.uint8)
