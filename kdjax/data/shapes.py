"""The embedded data set ``shapes``: generated scenes whose objects differ by their outline alone.

Every image is a pure function of (split, index), so that nothing is downloaded and every machine trains on the same
pictures. Textures, colours, rotation and scale are drawn from the same distributions for every class, for the
background and for the clutter: a detector has to learn outlines. The features are those of TFDS's COCO and the
pixels of every object. The file is long because every class, texture and clutter has its few lines.
"""

import dataclasses
import io
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageDraw, ImageFilter

CLASS_NAMES = ("circle", "cross", "ring", "square", "star", "triangle")
"""The classes in the order of their labels."""

SPLITS = ("train", "validation")

MAX_OBJECTS = 6
MIN_VISIBLE = 40
"""Every object shows at least this many pixels."""
MIN_VISIBLE_FRACTION = 0.7
"""Every object shows at least this share of its outline."""

_SUPERSAMPLING = 4


class Scene(NamedTuple):
    """A drawn image and who owns each of its pixels."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    owner: np.ndarray
    """(H, W) int8: k where object k is visible, -1 elsewhere."""
    labels: np.ndarray
    """(n,) int64 in [0, len(CLASS_NAMES)), for n >= 1 objects."""


class Outline(NamedTuple):
    """A filled region of the plane around the origin, 1 long or high."""

    boundary: np.ndarray
    """(points, 2) float64, x right and y down."""
    hole: np.ndarray
    """(points, 2) float64; no points where the region has no hole."""

    def moved(self, matrix: np.ndarray, shift: np.ndarray) -> "Outline":
        """The outline with every point p moved to ``matrix @ p + shift``."""
        return Outline(self.boundary @ matrix.T + shift, self.hole @ matrix.T + shift)

    def area(self) -> float:
        """Area of the region, by the shoelace formula."""

        def enclosed(points: np.ndarray) -> float:
            x, y = points.T
            return 0.5 * abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))))

        return enclosed(self.boundary) - enclosed(self.hole)


def _outlines() -> dict[str, Outline]:
    """The outline of every class, by name."""
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)

    def polygon(*points: tuple[float, float]) -> np.ndarray:
        return np.array(points, np.float64)

    def corners(count: int) -> np.ndarray:
        angle = 2 * math.pi * np.arange(count) / count - math.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    star = corners(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    arm = 0.3
    cross = polygon(
        *[(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)],
        *[(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)],
    )
    boundaries = {
        "circle": circle,
        "cross": cross,
        "ring": circle,
        "square": polygon((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "star": star,
        "triangle": corners(3),
    }
    holes = {"ring": 0.58 * circle}
    outlines = {}
    for name, boundary in boundaries.items():
        low, high = boundary.min(axis=0), boundary.max(axis=0)
        scale = 1 / (high - low).max()
        shift = -0.5 * (low + high) * scale
        outline = Outline(boundary, holes.get(name, np.zeros((0, 2))))
        outlines[name] = outline.moved(np.eye(2) * scale, shift)
    return outlines


_OUTLINES = _outlines()
_AREAS = {name: outline.area() for name, outline in _OUTLINES.items()}


def _distractor(rng: np.random.Generator) -> Outline:
    """An outline that belongs to no class: a long wavy blob, or a thin stroke."""
    if rng.random() < 0.5:
        turn = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        phase = rng.uniform(0, 2 * math.pi, 2)
        radius = 0.5 * (1 + 0.25 * np.sin(2 * turn + phase[0]) + 0.15 * np.sin(3 * turn + phase[1]))
        points = np.stack([np.cos(turn), rng.uniform(0.2, 0.33) * np.sin(turn)], axis=1) * radius[:, None]
    else:
        x = np.linspace(-0.5, 0.5, 12)
        y = rng.uniform(-0.15, 0.15) * np.sin(rng.uniform(2, 9) * x)
        half = rng.uniform(0.01, 0.05)
        points = np.concatenate([np.stack([x, y - half], axis=1), np.stack([x, y + half], axis=1)[::-1]])
    return Outline(points, np.zeros((0, 2)))


def _placed(rng: np.random.Generator, outline: Outline, diameter: float, height: int, width: int) -> Outline:
    """The outline at a random place of an image, turned, ``diameter`` pixels long, a little stretched at equal area."""
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.12, 0.12))
    along, across = diameter * stretch, diameter / stretch
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[along * cos, -across * sin], [along * sin, across * cos]])
    return outline.moved(matrix, rng.random(2) * [width, height])


def _coverage(outline: Outline, height: int, width: int) -> tuple[slice, slice, np.ndarray]:
    """Where an outline meets the image, and the share of every pixel there that it covers.

    Returns:
        rows and columns of the smallest window that holds the outline, and the coverage of its pixels, (h, w) float32
        in [0, 1]; h or w is 0 when the outline lies outside.
    """
    low, high = outline.boundary.min(axis=0), outline.boundary.max(axis=0)
    left, right = (min(max(x, 0), width) for x in (math.floor(low[0]), math.ceil(high[0])))
    top, bottom = (min(max(y, 0), height) for y in (math.floor(low[1]), math.ceil(high[1])))
    size = (right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING
    coverage = np.zeros((bottom - top, right - left), np.float32)
    if coverage.size:
        canvas = Image.new("L", size)
        draw = ImageDraw.Draw(canvas)
        for points, fill in zip(outline, (255, 0), strict=True):
            if len(points):  # Pillow's coordinates are those of pixel centres.
                draw.polygon(((points - [left, top]) * _SUPERSAMPLING - 0.5).ravel().tolist(), fill=fill)
        coverage[...] = np.asarray(canvas.reduce(_SUPERSAMPLING)) / np.float32(255)
    return slice(top, bottom), slice(left, right), coverage


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random pattern, (height, width) float32 in [0, 1]: plain, gradient, stripes, checks, dots or noise."""
    kind = rng.integers(6)
    angle, period = rng.uniform(0, math.pi), rng.uniform(3.5, 14)
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 1:
        cells = rng.random((2 + math.ceil(height / period), 2 + math.ceil(width / period)), np.float32)
        return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR))
    across, down = math.cos(angle) / period, math.sin(angle) / period
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    u = (across * x + np.float32(rng.random())) + down * y
    if kind == 2:
        return (u - u.min()) / max(float(np.ptp(u)), 1e-6)
    u -= np.floor(u)
    if kind == 3:
        return np.clip(rng.uniform(1, 4) * (np.abs(2 * u - 1) - 0.5) + 0.5, 0, 1)
    v = (np.float32(rng.random()) - down * x) + across * y
    v -= np.floor(v)
    if kind == 4:
        return ((u < 0.5) ^ (v < 0.5)).astype(np.float32)
    return ((u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.09).astype(np.float32)


def _paint(rng: np.random.Generator, canvas: np.ndarray, coverage: np.ndarray) -> None:
    """Covers a window of the canvas, (3, h, w) float32 in [0, 255], with a random texture, in place.

    The first of the two colours stands out from what it covers, so that a person can see the outline.
    """
    beneath = np.tensordot(canvas, coverage, 2) / coverage.sum()
    candidates = rng.uniform(0, 255, (8, 3))
    far = np.abs(candidates - beneath).max(axis=1) >= 80
    colour = candidates[np.argmax(far)]
    contrast = rng.uniform(-45, 45, 3)
    texture = _texture(rng, *coverage.shape)
    for channel, start, change in zip(canvas, colour.tolist(), contrast.tolist(), strict=True):
        channel += (start + change * texture - channel) * coverage


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two mixed textures between random colours, (3, height, width) float32 in [0, 255]."""
    patterns = np.stack([np.ones((height, width), np.float32), *(_texture(rng, height, width) for _ in range(2))])
    colours = np.stack([rng.uniform(30, 225, 3), rng.uniform(-60, 60, 3), rng.uniform(-60, 60, 3)], axis=1)
    return np.clip(np.tensordot(colours.astype(np.float32), patterns, 1), 0, 255)


def _photographed(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """The canvas (3, H, W) with a random contrast and brightness, noise, and sometimes blur: (H, W, 3) uint8."""
    canvas = rng.uniform(0.7, 1.1) * (canvas - 128) + (128 + rng.uniform(-20, 20))
    canvas += rng.uniform(6, 32) * (rng.random(canvas.shape, np.float32) - 0.5)
    pixels = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8).transpose(1, 2, 0)
    if rng.random() < 0.5:
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9))))
    return np.ascontiguousarray(pixels)


def draw(rng: np.random.Generator) -> Scene:
    """Draws one scene: 1 to 6 objects and 1 to 5 distractors, in random order from back to front.

    The longer side is 128 pixels, the shorter 96, 112 or 128; objects are 20 to 110 pixels long (log-uniform). What
    would hide an earlier object below ``MIN_VISIBLE`` pixels or ``MIN_VISIBLE_FRACTION`` of its outline, or would
    itself show less, is tried at three places and then left out: what is annotated can be named.
    """
    sides = [128, int(rng.choice([96, 112, 128]))]
    height, width = sides if rng.random() < 0.5 else sides[::-1]
    canvas = _background(rng, height, width)
    owner = np.full((height, width), -1, np.int8)
    labels: list[int] = []
    spare = np.zeros(0)  # Visible pixels that each object can lose.

    def place(label: int | None) -> bool:
        nonlocal spare
        diameter = math.exp(rng.uniform(math.log(20), math.log(110)))
        outline = _distractor(rng) if label is None else _OUTLINES[CLASS_NAMES[label]]
        rows, columns, coverage = _coverage(_placed(rng, outline, diameter, height, width), height, width)
        covered = coverage >= 0.5
        visible, beneath = np.count_nonzero(covered), owner[rows, columns]
        left = spare - np.bincount(beneath[covered] + 1, minlength=len(labels) + 1)[1:]
        if label is not None:
            area = _AREAS[CLASS_NAMES[label]] * diameter**2
            left = np.append(left, visible - max(MIN_VISIBLE, MIN_VISIBLE_FRACTION * area))
        if not visible or np.any(left < 0):
            return False
        _paint(rng, canvas[:, rows, columns], coverage)
        beneath[covered] = -1 if label is None else len(labels)
        spare = left
        if label is not None:
            labels.append(label)
        return True

    objects, distractors = rng.integers(1, MAX_OBJECTS + 1), rng.integers(1, 6)
    for is_object in rng.permutation(np.arange(objects + distractors) < objects):
        label = int(rng.integers(len(CLASS_NAMES))) if is_object else None
        any(place(label) for _ in range(3))
    while not labels:
        place(int(rng.integers(len(CLASS_NAMES))))
    return Scene(_photographed(rng, canvas), owner, np.array(labels, np.int64))


def scene(split: str, index: int) -> Scene:
    """The scene number ``index`` of a split, a pure function of both."""
    return draw(np.random.default_rng([SPLITS.index(split), index]))


def boxes(owner: np.ndarray, count: int) -> np.ndarray:
    """Tight xyxy pixel boxes (count, 4) int64 around the visible pixels of objects 0 to count - 1."""
    found = np.zeros((count, 4), np.int64)
    for k in range(count):
        rows, columns = np.nonzero(owner == k)
        found[k] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return found


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """How many images each split has; smaller configurations are the beginnings of larger ones."""

    train: int = 0
    validation: int = 0


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Writes ``shapes`` with the features of TFDS's COCO and the objects' masks; as ArrayRecord without TensorFlow.

    ``objects/run_lengths`` holds where an object is visible, as the counts of COCO's compressed run lengths.
    """

    # A change of any pixel or box is a new major version, another feature a new minor one.
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {  # noqa: RUF012 (the name and the type are TFDS's)
        "1.0.0": "The first version.",
        "1.1.0": "Adds objects/run_lengths, the pixels of every object; images, boxes, labels and areas are the same.",
    }
    # TFDS would look beside this file for checksums of downloads, with importlib_resources, which it does not declare.
    code_path = None
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the type are TFDS's)
        ShapesConfig(name="full", description="The data set of the default run.", train=2400, validation=400),
        ShapesConfig(name="tiny", description="For tests and quick tries.", train=32, validation=12),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
            "run_lengths": tfds.features.Text(),
        }
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Generated scenes of textured, overlapping objects that differ by their outline alone.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # Example i is scene i.
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        return {split: self._generate_examples(split, getattr(self.builder_config, split)) for split in SPLITS}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, Any]]:
        for index in range(count):
            yield index, _example(split, index)


def _example(split: str, index: int) -> dict[str, Any]:
    """One example as TFDS writes it."""
    image, owner, labels = scene(split, index)
    height, width = owner.shape
    file = io.BytesIO()
    # Noise has no repetitions to look for.
    Image.fromarray(image).save(file, "PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)
    masks = np.asfortranarray(owner[..., None] == np.arange(len(labels)), np.uint8)
    objects = [
        {
            "area": np.count_nonzero(owner == k),
            "bbox": tfds.features.BBox(ymin=y1 / height, xmin=x1 / width, ymax=y2 / height, xmax=x2 / width),
            "id": index * MAX_OBJECTS + k + 1,  # COCO's evaluators take annotation 0 for "unmatched".
            "is_crowd": False,
            "label": int(labels[k]),
            "run_lengths": runs["counts"],
        }
        for k, ((x1, y1, x2, y2), runs) in enumerate(
            zip(boxes(owner, len(labels)).tolist(), coco_mask.encode(masks), strict=True)
        )
    ]
    return {
        "image": file.getvalue(),
        "image/filename": f"{split}/{index:06d}.png",
        "image/id": index,
        "objects": objects,
    }
