"""Pictures of what detectors found, beside the ground truth; Pillow alone draws them."""

import colorsys
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdjax.data.examples import ObjectSource

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

_PANEL = 448
"""Longer side of each image in the picture, in pixels: small ones are enlarged until their labels can be read."""
_GAP = 14
"""Space around images, in pixels."""
_TITLE, _TEXT = 19, 13
"""Font sizes of the captions and of everything else, in pixels."""
_INK, _FAINT, _PAPER = (25, 25, 25), (110, 110, 110), (255, 255, 255)


class Found(Protocol):
    """What a detector found in one image: ``kdjax.tasks.average_precision.ImageDetections``, for one."""

    @property
    def boxes(self) -> np.ndarray:
        """(n, 4) float32, xyxy in pixels of the original image."""

    @property
    def scores(self) -> np.ndarray:
        """(n,) float32."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int32."""


class Mark(NamedTuple):
    """A box to draw, with its label."""

    box: np.ndarray
    """(4,) xyxy in pixels of the image."""
    text: str
    colour: Colour


def save_predictions(
    path: str | os.PathLike[str],
    source: ObjectSource,
    predictions: Mapping[str, Sequence[Found]],
    *,
    score_threshold: float = 0.3,
) -> None:
    """Saves a PNG: a row for each of the first images of a source, a column for the truth and for each detector.

    Args:
        path: of the picture.
        source: the images, their objects and the names of the classes.
        predictions: caption to what a detector found in the first images of the source, in the source's order; the
            same number of images for each.
        score_threshold: detections with a lower score are not drawn.

    Raises:
        ValueError: the detectors come with different numbers of images.
    """
    counts = {name: len(found) for name, found in predictions.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every column needs the same number of images, not {counts}")

    rows = []
    for i, row in enumerate(zip(*predictions.values(), strict=True)):
        example = source[i]
        truth = truth_marks(example.boxes, example.labels, example.crowd, source.class_names)
        found = [
            [
                Mark(box, f"{source.class_names[label]} {score:.2f}", _colour(label))
                for box, score, label in zip(f.boxes, f.scores.tolist(), f.labels.tolist(), strict=True)
                if score >= score_threshold
            ]
            for f in row
        ]
        rows.append((f"image {example.image_id}", [draw_boxes(example.image, marks) for marks in [truth, *found]]))

    captions = {"ground truth": ""} | dict.fromkeys(predictions, f"score {score_threshold:g} or more")
    _sheet(captions, rows).save(path, "PNG")


def save_contact_sheet(
    path: str | os.PathLike[str], pictures: Sequence[tuple[str, np.ndarray, Sequence[Mark]]], *, columns: int = 4
) -> None:
    """Saves a PNG of images with boxes, row by row.

    Args:
        path: of the picture.
        pictures: caption, image (H, W, 3) uint8, RGB, and boxes of each.
        columns: images in a row.
    """
    drawn = [(caption, draw_boxes(image, marks)) for caption, image, marks in pictures]
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(picture.height for _, picture in row) + _TEXT + _GAP + 4 for row in rows]
    size = _GAP + min(columns, len(drawn)) * (_PANEL + _GAP), _GAP + sum(heights)
    sheet, font, y = Image.new("RGB", size, _PAPER), ImageFont.load_default(_TEXT), _GAP
    draw = ImageDraw.Draw(sheet)
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, picture) in enumerate(row):
            x = _GAP + column * (_PANEL + _GAP)
            sheet.paste(picture, (x, y))
            draw.text((x, y + picture.height + 2), caption, _FAINT, font)
        y += height
    sheet.save(path, "PNG")


def truth_marks(boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, class_names: Sequence[str]) -> list[Mark]:
    """What to draw of annotated objects: boxes (n, 4) xyxy, labels (n,) int and crowd (n,) bool."""
    return [
        Mark(box, class_names[label] + " (crowd)" * group, _colour(label))
        for box, label, group in zip(boxes, labels.tolist(), crowd.tolist(), strict=True)
    ]


def draw_boxes(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    """An image with boxes and their labels, the first marks on top.

    Args:
        image: (H, W, 3) uint8, RGB; scaled to a readable size.
        marks: what to draw.
    """
    height, width = image.shape[:2]
    scale = _PANEL / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    boxes: list[Rectangle] = [tuple((mark.box * scale).tolist()) for mark in marks]
    for (x1, y1, x2, y2), mark in reversed(list(zip(boxes, marks, strict=True))):
        # A dark line outside and inside the coloured one: visible on any background.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_INK, width=4)
        draw.rectangle((x1, y1, x2, y2), outline=mark.colour, width=2)

    font = ImageFont.load_default(_TEXT)
    taken: list[Rectangle] = []
    for box, mark in zip(boxes, marks, strict=True):
        spot = _place(box, (draw.textlength(mark.text, font) + 6, _TEXT + 4), size, taken)
        draw.rectangle(spot, fill=mark.colour)
        draw.text((spot[0] + 3, spot[1] + 1), mark.text, _readable_on(mark.colour), font)
        taken.append(spot)
    return picture


def _place(box: Rectangle, text: tuple[float, float], size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Where a label of width and height ``text`` goes: at its box, inside the picture, hiding others the least."""
    (x1, y1, x2, y2), (width, height) = box, text
    corners = [(x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x2 - width, y1)]
    spots = []
    for x, y in corners:
        left, top = max(min(x, size[0] - width), 0), max(min(y, size[1] - height), 0)
        spots.append((left, top, left + width, top + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _colour(label: int) -> Colour:
    """A bright colour for each class; the golden ratio keeps the hues of any number of classes apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * label % 1, 0.75, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def _readable_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else (255, 255, 255)


def _sheet(captions: Mapping[str, str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Puts pictures of equal size in each row under their columns' captions, which are titles and remarks."""
    title, small = ImageFont.load_default(_TITLE), ImageFont.load_default(_TEXT)
    head = _GAP + _TITLE + _TEXT + 10
    pitch = [pictures[0].height + _TEXT + _GAP + 4 for _, pictures in rows]
    sheet = Image.new("RGB", (_GAP + len(captions) * (_PANEL + _GAP), head + sum(pitch)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (caption, remark) in enumerate(captions.items()):
        x = _GAP + column * (_PANEL + _GAP)
        draw.text((x, _GAP - 4), caption, _INK, title)
        draw.text((x, _GAP + _TITLE), remark, _FAINT, small)
        y = head
        for (name, pictures), step in zip(rows, pitch, strict=True):
            sheet.paste(pictures[column], (x, y))
            if column == 0:
                draw.text((x, y + pictures[column].height + 2), name, _FAINT, small)
            y += step
    return sheet
