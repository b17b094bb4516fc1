"""Pictures of what classifiers say: a grid of images with their classes, and matrices of what is taken for what."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from kdjax.data.examples import ClassSource
from kdjax.lettering import shortened, width, write
from kdjax.paths import as_path
from kdjax.visualize import FALSE_ALARM, HIT, MOST_BYTES, TRUTH, draw_boxes

_INK, _FAINT, _PAPER = (25, 25, 25), (110, 110, 110), (255, 255, 255)
_GAP, _LINE, _TEXT = 14, 20, 13
"""Space around what is drawn, lines, and the text in them, in pixels."""
_PANEL, _COLUMNS = 224, 4
"""Longer side of an image in the grid in pixels, and how many there are in a row."""
_CELL = 34
"""Side of a matrix's cell, in pixels."""


def save_classified(path: str | os.PathLike[str], source: ClassSource, said: Mapping[str, Sequence[Any]]) -> None:
    """Saves a PNG: the first images of a source, below each its class, and what every model said, green where right.

    Args:
        path: of the picture.
        source: the images and their classes.
        said: caption of a model to what it said of the first images, in their order: {"label": int, "probability":
            float}; of the same number of images for each.
    """
    count = len(next(iter(said.values()), ()))
    cells = []
    for position in range(count):
        example = source[position]
        if example.image_id != source.image_id(position):  # It cannot be decoded, and the models saw nothing.
            continue
        truth = source.class_names[example.label]
        lines = [(f"{shortened(source.name(position), _TEXT, _PANEL // 2)}: {truth}", TRUTH)]
        for caption, every in said.items():
            label, probability = every[position]["label"], every[position]["probability"]
            colour = HIT if label == example.label else FALSE_ALARM
            lines.append((f"{caption}: {source.class_names[label]} {probability:.2f}", colour))
        cells.append((draw_boxes(example.image, []), lines))
    step = _PANEL + _GAP + _LINE * (1 + len(said)) + _GAP
    rows = -(-len(cells) // _COLUMNS)
    sheet = Image.new("RGB", (_GAP + min(max(len(cells), 1), _COLUMNS) * (_PANEL + _GAP), _GAP + rows * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(cells):
        x, y = _GAP + number % _COLUMNS * (_PANEL + _GAP), _GAP + number // _COLUMNS * step
        picture.thumbnail((_PANEL, _PANEL))
        sheet.paste(picture, (x, y))
        for line, (text, colour) in enumerate(lines):
            top = y + _PANEL + 4 + line * _LINE
            draw.rectangle((x, top, x + 10, top + 10), fill=colour)
            write(draw, (x + 16, top - 2), shortened(text, _TEXT, _PANEL - 16), _INK, _TEXT)
    _save(path, sheet)


def save_matrices(path: str | os.PathLike[str], classes: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Saves a PNG: for each model the share in percent of each class's images that it takes for each class.

    Args:
        path: of the picture.
        classes: names of the classes.
        found: caption of a model to the metric "confusion" of :class:`kdjax.tasks.confusion.Confusion`.
    """
    names = [shortened(name, _TEXT, 160) for name in classes]
    room = round(max(width(name, _TEXT) for name in names)) + _GAP
    side = len(classes) * _CELL
    across, high = room + side + 2 * _GAP, 3 * _LINE + room + side + _GAP
    sheet = Image.new("RGB", (across * max(len(found), 1), high), _PAPER)
    for number, (caption, shares) in enumerate(found.items()):
        sheet.paste(
            _matrix(caption, names, [[shares[a].get(b, 0.0) for b in classes] for a in classes], room),
            (number * across, 0),
        )
    _save(path, sheet)


def _matrix(caption: str, names: Sequence[str], shares: Sequence[Sequence[float]], room: int) -> Image.Image:
    """One matrix, the true class from top to bottom, the names taking ``room`` pixels."""
    side = len(names) * _CELL
    left, top = _GAP + room, 2 * _LINE + room
    panel = Image.new("RGB", (left + side + _GAP, top + side + _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(panel)
    write(draw, (_GAP, 6), shortened(caption, _TEXT, left + side - _GAP), _INK, _TEXT)
    write(draw, (_GAP, 6 + _LINE), "row: true class, column: said", _FAINT, _TEXT)
    # Names of columns are read from below.
    upright = Image.new("RGB", (room, side), _PAPER)
    pen = ImageDraw.Draw(upright)
    for column, name in enumerate(names):
        write(pen, (2, column * _CELL + 8), name, _INK, _TEXT)
    panel.paste(upright.rotate(90, expand=True), (left, 2 * _LINE))
    for row, name in enumerate(names):
        y = top + row * _CELL
        write(draw, (left - 6 - width(name, _TEXT), y + 8), name, _INK, _TEXT)
        for column, share in enumerate(shares[row]):
            x = left + column * _CELL
            colour = HIT if row == column else FALSE_ALARM
            mixed = tuple(round(255 + (part - 255) * share / 100) for part in colour)
            draw.rectangle((x, y, x + _CELL, y + _CELL), fill=mixed, outline=(225, 225, 225))
            if share:
                text = f"{share:.0f}"
                write(draw, (x + (_CELL - width(text, _TEXT)) / 2, y + 8), text, _INK, _TEXT)
    return panel


def _save(path: str | os.PathLike[str], sheet: Image.Image) -> None:
    """Saves a picture, in 256 colours where it would be large for a mail."""
    file = io.BytesIO()
    sheet.save(file, "PNG")
    if file.tell() > MOST_BYTES:
        file = io.BytesIO()
        sheet.quantize(256, dither=Image.Dither.NONE).save(file, "PNG")
    as_path(path).write_bytes(file.getvalue())
