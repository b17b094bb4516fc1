"""Pictures of images and of what was found in them, beside the ground truth; Pillow alone draws them.

The file is long because where labels go, and how a picture stays small, are decided here for all tasks.
"""

import colorsys
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageDraw

from kdjax.data.examples import Example, ObjectSource
from kdjax.data.masks import RunLengths
from kdjax.lettering import shortened, width, write
from kdjax.paths import as_path
from kdjax.types import Batch

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

_PANEL = 448
"""Longer side of each image in the picture, in pixels: small ones are enlarged until their labels can be read."""
_LARGEST = 1280
"""And of one that is drawn alone, at most."""
_GAP = 14
"""Space around images, in pixels."""
_TITLE, _TEXT = 19, 13
"""Font sizes of the captions and of everything else, in pixels."""
_INK, _FAINT, _PAPER = (25, 25, 25), (110, 110, 110), (255, 255, 255)
TRUTH, HIT, MISS, FALSE_ALARM, IGNORED = (90, 165, 255), (60, 205, 95), (255, 160, 0), (205, 20, 50), (128, 128, 128)
"""Colours of boxes; those of hits and of false alarms differ in brightness too."""

MOST_BYTES = 500_000
"""Of a picture of predictions: small enough for a mail or a ticket."""
DRAWN_SCORE = 0.3
"""From which on detections are drawn."""
HIT_IOU = 0.5
"""With an object of its class from which on a detection has found it."""
_SAME_IOU = 0.6
"""Of two detections that overlap more, of whatever classes, only the better one is drawn."""


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

    @property
    def masks(self) -> Sequence[RunLengths] | None:
        """The pixels of each, in the original image; None of detectors that find boxes alone."""


class Mark(NamedTuple):
    """A box to draw, with its label, over what it holds."""

    box: np.ndarray
    """(4,) xyxy in pixels of the image."""
    text: str
    colour: Colour
    dashed: bool = False
    mask: RunLengths | None = None
    """The pixels of the image that are tinted, if any are known."""


class Drawing(NamedTuple):
    """An image to draw, and what is drawn on it."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    marks: Sequence[Mark] = ()
    text: str = ""
    """What it shows, for its caption."""
    legend: Sequence[Mark] = ()
    """What colours mean, below it; the boxes are of no meaning."""


def save_predictions(
    path: str | os.PathLike[str],
    source: ObjectSource,
    predictions: Mapping[str, Sequence[Found]],
    *,
    score_threshold: float = DRAWN_SCORE,
) -> None:
    """Saves a PNG: a row for each of the first images of a source, a column for the truth and for each detector.

    Hits, misses and false alarms have a colour each, which a legend explains, and found masks that of their boxes.
    Photographs lose detail, but boxes and text none, until the file has at most ``MOST_BYTES``.

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

    # Where there is one class, its name on every box says nothing.
    class_names = source.class_names if len(source.class_names) > 1 else ("",)
    rows, seen = [], {caption: np.zeros(3, int) for caption in predictions}
    for i, found in enumerate(zip(*predictions.values(), strict=True)):
        example = source[i]
        if example.image_id != source.image_id(i):  # It cannot be decoded, and the detectors saw nothing.
            continue
        cells = [Drawing(example.image, object_marks(example, class_names))]
        for caption, detections in zip(predictions, found, strict=True):
            marks = judged_marks(example, detections, class_names, score_threshold)
            seen[caption] += [sum(mark.colour == colour for mark in marks) for colour in (HIT, MISS, FALSE_ALARM)]
            cells.append(Drawing(example.image, marks))
        rows.append((source.name(i), cells))

    captions = {"ground truth": ""}
    captions |= {name: "{} found, {} missed, {} false alarms".format(*seen[name]) for name in predictions}
    save_sheet(path, captions, rows, legend(score_threshold))


def legend(score_threshold: float = DRAWN_SCORE) -> list[Mark]:
    """What the colours mean; the boxes are drawn beside the words."""
    box = np.zeros(4)
    return [
        Mark(box, "object", TRUTH),
        Mark(box, f"found: right class, IoU {HIT_IOU:g} or more", HIT),
        Mark(box, "missed", MISS, dashed=True),
        Mark(box, f"false alarm of score {score_threshold:g} or more", FALSE_ALARM),
        Mark(box, "crowd, not counted", IGNORED),
    ]


def object_marks(example: Example, class_names: Sequence[str]) -> list[Mark]:
    """The truth, of one colour: those of the other columns say what was found."""
    marks = truth_marks(example.boxes, example.labels, example.crowd, class_names)
    return [mark._replace(colour=IGNORED if crowd else TRUTH) for mark, crowd in zip(marks, example.crowd, strict=True)]


def judged_marks(example: Example, found: Found, class_names: Sequence[str], score_threshold: float) -> list[Mark]:
    """The hits, false alarms and misses of a detector in one image, as boxes to draw, with the masks that it found.

    Every detection, the best first, takes the object of its class that it fits best and that is not taken.
    """
    order = [k for k in np.argsort(-found.scores, kind="stable").tolist() if found.scores[k] >= score_threshold]
    drawn: list[int] = []
    for k in order:
        if not drawn or overlaps(found.boxes[[k]], found.boxes[drawn]).max() <= _SAME_IOU:
            drawn.append(k)
    boxes, labels = found.boxes[drawn], found.labels[drawn]
    overlap = overlaps(boxes, example.boxes) * (labels[:, None] == example.labels)
    inside = overlaps(boxes, example.boxes, of_first=True) * (labels[:, None] == example.labels)
    free, marks = ~example.crowd, []
    for row, k in enumerate(drawn):
        fits = overlap[row] * free
        if fits.size and fits.max() >= HIT_IOU:
            free[fits.argmax()] = False
            colour = HIT
        else:
            crowded = (inside[row] * example.crowd).max(initial=0) >= HIT_IOU
            colour = IGNORED if crowded else FALSE_ALARM
        text = f"{class_names[found.labels[k]]} {found.scores[k]:.2f}".lstrip()
        marks.append(Mark(found.boxes[k], text, colour, mask=found.masks[k] if found.masks else None))
    missed = [Mark(example.boxes[k], class_names[example.labels[k]], MISS, True) for k in np.flatnonzero(free)]
    return sorted(marks, key=lambda mark: mark.colour == IGNORED) + missed


def overlaps(boxes: np.ndarray, others: np.ndarray, of_first: bool = False) -> np.ndarray:
    """IoU (n, m) of boxes (n, 4) and (m, 4); ``of_first`` is the share of each of the first that is covered."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    mine, theirs = ((x[:, 2:] - x[:, :2]).prod(axis=-1) for x in (boxes, others))
    whole = mine[:, None] + (0 if of_first else theirs - shared)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def save_contact_sheet(path: str | os.PathLike[str], drawings: Sequence[Drawing], *, columns: int = 4) -> None:
    """Saves a PNG of images with boxes and captions, row by row.

    Args:
        path: of the picture.
        drawings: of which each has its text as caption.
        columns: images in a row.
    """
    drawn = [(drawing.text, draw_boxes(drawing.image, drawing.marks)) for drawing in drawings]
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(picture.height for _, picture in row) + _TEXT + _GAP + 4 for row in rows]
    size = _GAP + min(columns, len(drawn)) * (_PANEL + _GAP), _GAP + sum(heights)
    sheet, y = Image.new("RGB", size, _PAPER), _GAP
    draw = ImageDraw.Draw(sheet)
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, picture) in enumerate(row):
            x = _GAP + column * (_PANEL + _GAP)
            sheet.paste(picture, (x, y))
            write(draw, (x, y + picture.height + 2), caption, _FAINT, _TEXT)
        y += height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    as_path(path).write_bytes(file.getvalue())


def save_drawing(path: str | os.PathLike[str], drawing: Drawing) -> None:
    """Saves a JPEG of one image with what is drawn on it, and its legend below, as large as the image within limits."""
    longest = min(max(*drawing.image.shape[:2], _PANEL), _LARGEST)
    picture = draw_boxes(drawing.image, drawing.marks, longest=longest)
    texts = [shortened(mark.text, _TEXT, picture.width - 2 * _GAP - 28) for mark in drawing.legend]
    places = _lines([width(text, _TEXT) + 2 * _GAP + 28 for text in texts], picture.width)
    below = _GAP + (places[-1][1] + 1) * (_TEXT + 8) if places else 0
    sheet = Image.new("RGB", (picture.width, picture.height + below), _PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (x, line), text, mark in zip(places, texts, drawing.legend, strict=True):
        y = picture.height + _GAP // 2 + line * (_TEXT + 8)
        draw.rectangle((_GAP + x, y, _GAP + x + 20, y + _TEXT), fill=mark.colour)
        write(draw, (_GAP + x + 28, y - 1), text, _INK, _TEXT)
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=90, subsampling=0)
    as_path(path).write_bytes(file.getvalue())


def jpeg(drawing: Drawing, longest: int, quality: int = 80) -> bytes:
    """A JPEG of one image with what is drawn on it, without its legend.

    Args:
        drawing: of any size.
        longest: its longer side then, in pixels.
        quality: of the JPEG, 1 to 95.
    """
    file = io.BytesIO()
    draw_boxes(drawing.image, drawing.marks, longest=longest).save(file, "JPEG", quality=quality)
    return file.getvalue()


def tinted(image: np.ndarray, where: np.ndarray, colour: Colour) -> np.ndarray:
    """An image (H, W, 3) uint8 with half of a colour in the pixels (H, W) bool.

    >>> tinted(np.zeros((1, 2, 3), np.uint8), np.array([[True, False]]), (100, 0, 50)).tolist()
    [[[50, 0, 25], [0, 0, 0]]]
    """
    return np.where(where[..., None], (image + np.array(colour)) // 2, image).astype(np.uint8)


def image_of(batch: Batch, row: int) -> np.ndarray:
    """An image (h, w, 3) uint8 of a batch, without its padding."""
    height, width = np.asarray(batch.size[row]).tolist()
    return np.asarray(batch.images[row])[:height, :width]


def truth_marks(boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, class_names: Sequence[str]) -> list[Mark]:
    """What to draw of annotated objects: boxes (n, 4) xyxy, labels (n,) int and crowd (n,) bool."""
    return [
        Mark(box, class_names[label] + " (crowd)" * group, class_colour(label))
        for box, label, group in zip(boxes, labels.tolist(), crowd.tolist(), strict=True)
    ]


def draw_boxes(image: np.ndarray, marks: Sequence[Mark], blocks: int = 1, longest: int = _PANEL) -> Image.Image:
    """An image with boxes over tinted masks and, where there is room, their labels, the first marks on top.

    Args:
        image: (H, W, 3) uint8, RGB; scaled to a readable size.
        marks: what to draw.
        blocks: side in pixels of the squares of one colour that the image is made of.
        longest: its longer side then, in pixels.
    """
    scale = longest / max(image.shape[:2])
    width_, height = (max(round(side * scale), 1) for side in (image.shape[1], image.shape[0]))
    for mark in reversed(marks):
        if mark.mask:
            image = tinted(image, coco_mask.decode(mark.mask).astype(bool), mark.colour)
    picture = Image.fromarray(image).resize((-(-width_ // blocks), -(-height // blocks)), Image.Resampling.BICUBIC)
    if blocks > 1:
        whole = picture.resize((picture.width * blocks, picture.height * blocks), Image.Resampling.NEAREST)
        picture = whole.crop((0, 0, width_, height))
    draw = ImageDraw.Draw(picture)
    boxes: list[Rectangle] = [tuple((mark.box * scale).tolist()) for mark in marks]
    for box, mark in reversed(list(zip(boxes, marks, strict=True))):
        _outline(draw, box, mark)

    taken: list[Rectangle] = []
    for box, mark in zip(boxes, marks, strict=True):
        if not mark.text:
            continue
        text = shortened(mark.text, _TEXT, width_ - 6)
        spot = _place(box, (width(text, _TEXT) + 6, _TEXT + 4), (width_, height), taken)
        if _hides(spot, taken, [other for other in boxes if other is not box]):
            continue
        draw.rectangle(spot, fill=mark.colour)
        write(draw, (spot[0] + 3, spot[1] + 1), text, _readable_on(mark.colour), _TEXT)
        taken.append(spot)
    return picture


def _outline(draw: ImageDraw.ImageDraw, box: Rectangle, mark: Mark) -> None:
    """A box, with a dark line outside and inside the coloured one: visible on any background."""
    x1, y1, x2, y2 = box
    if not mark.dashed:
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_INK, width=4)
        draw.rectangle(box, outline=mark.colour, width=2)
        return
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for start, end in itertools.pairwise(corners):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        dashes = max(round(length / 14), 2)
        ends = np.linspace(start, end, 2 * dashes)
        for a, b in zip(ends[::2], ends[1::2], strict=True):
            draw.line([*a, *b], _INK, 4)
            draw.line([*a, *b], mark.colour, 2)


def _place(box: Rectangle, text: tuple[float, float], size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Where a label of width and height ``text`` goes: at its box, inside the picture, hiding others the least."""
    (x1, y1, x2, y2), (width, height) = box, text
    corners = [(x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x2 - width, y1)]
    spots = []
    for x, y in corners:
        left, top = max(min(x, size[0] - width), 0), max(min(y, size[1] - height), 0)
        spots.append((left, top, left + width, top + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def _hides(spot: Rectangle, labels: Sequence[Rectangle], boxes: Sequence[Rectangle]) -> bool:
    """Whether a label would make others unreadable, or take most of a box away: many small objects have no room."""
    return any(_overlap(spot, other) > 0.25 * _overlap(other, other) for other in labels) or any(
        _overlap(spot, other) > 0.5 * _overlap(other, other) for other in boxes
    )


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def class_colour(label: int) -> Colour:
    """A bright colour for each class; the golden ratio keeps the hues of any number of classes apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * label % 1, 0.75, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def _readable_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else (255, 255, 255)


Rows = Sequence[tuple[str, Sequence[Drawing]]]
"""A name and, column by column, pictures."""

_RENDERINGS = (
    *((1, 0), (1, 256), (2, 0), (2, 256), (3, 256), (4, 256), (4, 96), (6, 96)),
    *((8, 64), (12, 48), (16, 32), (32, 32), (64, 32), (448, 32)),
)
"""Blocks of the photographs and colours of the picture, 0 for all, from the best to the smallest."""


def save_sheet(path: str | os.PathLike[str], captions: Mapping[str, str], rows: Rows, legend: Sequence[Mark]) -> None:
    """Saves a PNG of rows of pictures, in the best rendering of at most ``MOST_BYTES``, or else the smallest.

    Args:
        path: of the picture.
        captions: title and remark of each column.
        rows: name and pictures of each row.
        legend: what colours mean; its boxes are drawn beside the words.
    """
    largest = 0
    for blocks, colours in _RENDERINGS:
        # What is hopeless is not tried: a byte stands for a pixel of few colours, three for any other.
        if largest / (blocks**2 * (4 if colours else 1)) > 2 * MOST_BYTES:
            continue
        sheet = _sheet(captions, rows, legend, blocks)
        file = io.BytesIO()
        (_with_colours(sheet, colours) if colours else sheet).save(file, "PNG")
        if file.tell() <= MOST_BYTES:
            break
        largest = largest or file.tell()
    as_path(path).write_bytes(file.getvalue())


def _with_colours(sheet: Image.Image, count: int) -> Image.Image:
    """The sheet in so many colours: those of boxes and text as they are, and what describes the photographs best.

    The same pixel is of the same colour in every column, which is what makes columns beside each other cheap.
    """
    fixed = [TRUTH, HIT, MISS, FALSE_ALARM, IGNORED, _INK, _FAINT, _PAPER, (0, 0, 0), (180, 180, 180)]
    found = sheet.quantize(count - len(fixed), Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in fixed for part in colour] + found[: 3 * (count - len(fixed))])
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)


def _sheet(captions: Mapping[str, str], rows: Rows, legend: Sequence[Mark], blocks: int) -> Image.Image:
    """Puts rows of pictures under their columns' captions, which are titles and remarks, and these under a legend."""
    across = _GAP + len(captions) * (_PANEL + _GAP)
    lines = _lines([width(mark.text, _TEXT) + 2 * _GAP + 28 for mark in legend], across - _GAP)
    top = _GAP + (lines[-1][1] + 1) * (_TEXT + 8) + 6
    head = top + _TITLE + _TEXT + 12
    drawn = [(name, [draw_boxes(cell.image, cell.marks, blocks) for cell in cells]) for name, cells in rows]
    pitch = [pictures[0].height + _TEXT + _GAP + 6 for _, pictures in drawn]
    sheet = Image.new("RGB", (across, head + sum(pitch)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for (x, line), mark in zip(lines, legend, strict=True):
        y = _GAP + line * (_TEXT + 8)
        _outline(draw, (_GAP + x, y, _GAP + x + 20, y + _TEXT), mark)
        write(draw, (_GAP + x + 28, y - 1), mark.text, _INK, _TEXT)
    for column, (caption, remark) in enumerate(captions.items()):
        x, y = _GAP + column * (_PANEL + _GAP), head
        write(draw, (x, top), shortened(caption, _TITLE, _PANEL), _INK, _TITLE)
        write(draw, (x, top + _TITLE + 4), remark, _FAINT, _TEXT)
        for (name, pictures), step in zip(drawn, pitch, strict=True):
            sheet.paste(pictures[column], (x, y))
            if column == 0:
                write(draw, (x, y + pictures[0].height + 2), shortened(name, _TEXT, _PANEL), _FAINT, _TEXT)
            y += step
    return sheet


def _lines(widths: Sequence[float], room: float) -> list[tuple[int, int]]:
    """Where things of these widths go, one behind the other: how far to the right, and in which line."""
    places, x, line = [], 0.0, 0
    for wide in widths:
        if x and x + wide > room:
            x, line = 0.0, line + 1
        places.append((round(x), line))
        x += wide
    return places
