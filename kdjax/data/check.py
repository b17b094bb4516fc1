"""What may be wrong with annotated images, and what becomes of it: refused, left out or repaired, always counted.

Everything here happens when a source is opened, never in the middle of a run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from kdjax.data.images import Header, ImageError, UndecodableError
from kdjax.errors import UserError


class Checks(NamedTuple):
    """How flaws are met."""

    strict: bool = False
    """Refuse the data where something would be left out or repaired."""
    lenient: bool = False
    """Leave out images whose file is unusable and annotations of unknown images or classes, which are refused."""
    skip_empty: bool = False
    """Leave out images without objects; they are kept otherwise, as scenes with nothing to find."""
    max_objects: int | None = None
    """Room for objects in a batch, for counting those beyond it; None where there are no batches."""


DEFAULT = Checks()


class Flaw(NamedTuple):
    """One thing that can be wrong."""

    what: str
    """Of several: "boxes without area"."""
    of: Literal["image", "annotation", "category"]
    outcome: Literal["refused", "refused unless lenient", "left out", "repaired", "truncated"]
    hint: str = ""
    """What would be right, where that is not plain."""


_LENIENT = "config.data.lenient=True leaves them out"

UNSAFE_NAME = Flaw("file names that could leave the folder of the images", "image", "refused")
UNUSABLE_FILE = Flaw("images that cannot be used", "image", "refused unless lenient", _LENIENT)
CUT_OFF = Flaw("images that cannot be decoded", "image", "left out")
OTHER_SIZE = Flaw("images of another size than annotated", "image", "refused unless lenient", _LENIENT)
ANIMATED = Flaw("animated images, of which the first picture is taken", "image", "repaired")
CROWDED = Flaw("images with more objects than config.data.max_objects", "image", "truncated")
UNKNOWN_IMAGE = Flaw("annotations of images that are not listed", "annotation", "refused unless lenient", _LENIENT)
UNKNOWN_CATEGORY = Flaw(
    "annotations of categories that are not listed", "annotation", "refused unless lenient", _LENIENT
)
MALFORMED_BOX = Flaw("boxes that are not four finite numbers", "annotation", "refused")
NEGATIVE_SIZE = Flaw("boxes with a negative width or height, taken from the other corner", "annotation", "repaired")
OUTSIDE = Flaw("boxes wholly outside their image", "annotation", "left out")
CLIPPED = Flaw("boxes that left their image, cut at its edge", "annotation", "repaired")
NO_AREA = Flaw("boxes without area", "annotation", "left out")
NO_OUTLINE = Flaw("objects without a usable segmentation, whose box is taken for it", "annotation", "repaired")
BAD_AREA = Flaw("objects without a usable area, whose box's is taken", "annotation", "repaired")
SAME_NAME = Flaw("categories with the name of another, taken for the same class", "category", "repaired")

LARGEST = 2.0**24
"""No image has so many pixels on a side; beyond it, float32 misses whole numbers."""
_SLACK = 1.0
"""Pixels by which annotators' boxes leave their images without meaning anything."""
_NOISE = 1e-3
"""Pixels by which rounding moves a box."""


class DataReport:
    """What was wrong with one split, flaw by flaw."""

    def __init__(self, origin: str, checks: Checks = DEFAULT):
        """Starts without flaws; ``origin`` is the file or the data set that sentences name."""
        self.origin = origin
        self.checks = checks
        self.flaws: dict[Flaw, list[int]] = {}
        """Ids of the images, annotations or categories that have each flaw."""

    def settle(self, flaw: Flaw, ids: Sequence[int] | np.ndarray, describe: Callable[[int], str]) -> None:
        """Counts the cases of a flaw, or refuses the data for them.

        Args:
            flaw: what is wrong.
            ids: of what has it; nothing happens where there are none.
            describe: names a case by its position in ``ids``, for a sentence.

        Raises:
            UserError: the flaw is one to refuse; the first cases are named.
        """
        if not len(ids):
            return
        tolerated = self.checks.lenient or flaw.outcome != "refused unless lenient"
        tolerated &= flaw.outcome != "refused"
        if self.checks.strict or not tolerated:
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            cases = ", ".join(describe(k) for k in range(min(len(ids), 5)))
            raise UserError(f"{self.origin} has {flaw.what}: {cases}{more}{'; ' * bool(flaw.hint)}{flaw.hint}.")
        self.flaws.setdefault(flaw, []).extend(int(identity) for identity in ids)

    def outcome(self, flaw: Flaw) -> str:
        """What became of a flaw that was counted: "left out", "repaired" or "truncated"."""
        return "left out" if flaw.outcome == "refused unless lenient" else flaw.outcome


class Images(NamedTuple):
    """The n images of a split."""

    identity: np.ndarray
    """(n,) int64, unique."""
    names: Sequence[str]
    """Of their files."""
    size: np.ndarray
    """(n, 2) int64: height and width in pixels."""

    def describe(self, position: int) -> str:
        """Names an image in a sentence."""
        return f"{self.names[position]} (image {self.identity[position]})"

    def take(self, rows: np.ndarray) -> "Images":
        """Some of the images, in the order of ``rows``."""
        return Images(self.identity[rows], [self.names[row] for row in rows.tolist()], self.size[rows])


class Annotations(NamedTuple):
    """The m objects of all images of a split, in the order of the images."""

    image: np.ndarray
    """(m,) int64, ascending: position of each object's image."""
    identity: np.ndarray
    """(m,) int64: what the files know the object by."""
    boxes: np.ndarray
    """(m, 4), xyxy in pixels: float64 as the files have them, float32 once they are checked."""
    labels: np.ndarray
    """(m,) int32 in [0, classes)."""
    crowd: np.ndarray
    """(m,) bool."""
    area: np.ndarray
    """(m,) float64 or float32, pixels."""

    def take(self, rows: np.ndarray) -> "Annotations":
        """Some of the objects, in the order of ``rows``, or those for which a mask is True."""
        return Annotations(*(column[rows] for column in self))


def check_images(
    identity: np.ndarray,
    names: Sequence[str],
    annotated: np.ndarray,
    found: Sequence[Header | ImageError],
    report: DataReport,
) -> tuple[Images, np.ndarray]:
    """Holds the images of a split against their files.

    Args:
        identity: (n,) int64.
        names: n names of files.
        annotated: (n, 2) int64: height and width that the annotations say; 0 where they say nothing.
        found: what the files' headers say, or why they cannot be used.
        report: counts or refuses.

    Returns:
        the images that remain, and their positions, int64.
    """
    sizes = [header.size if isinstance(header, Header) else (0, 0) for header in found]
    size = np.array(sizes, np.int64).reshape(-1, 2)
    images = Images(identity, names, size)

    def settle(flaw: Flaw, rows: Sequence[int] | np.ndarray, describe: Callable[[int], str]) -> None:
        report.settle(flaw, identity[rows], lambda k: describe(int(rows[k])))

    def failure(row: int) -> str:
        return f"{images.describe(row)} {found[row]}"

    def compared(row: int) -> str:
        (height, width), (true_height, true_width) = annotated[row].tolist(), size[row].tolist()
        header = found[row]
        turned = isinstance(header, Header) and header.turned and (height, width) == (true_width, true_height)
        return (
            f"{images.describe(row)} is {true_width} x {true_height} pixels and annotated as {width} x {height}"
            f"{', as its EXIF orientation would turn it, which is not applied' * turned}"
        )

    errors = {row: header for row, header in enumerate(found) if isinstance(header, ImageError)}
    settle(UNUSABLE_FILE, [row for row, error in errors.items() if not isinstance(error, UndecodableError)], failure)
    settle(CUT_OFF, [row for row, error in errors.items() if isinstance(error, UndecodableError)], failure)
    sound = np.array([row not in errors for row in range(len(found))], bool)
    differs = sound & ((annotated != 0) & (annotated != size)).any(axis=1)
    settle(OTHER_SIZE, np.flatnonzero(differs), compared)
    animated = [row for row, header in enumerate(found) if isinstance(header, Header) and header.animated]
    settle(ANIMATED, animated, images.describe)
    rows = np.flatnonzero(sound & ~differs)
    return images.take(rows), rows


def check_objects(images: Images, annotations: Annotations, report: DataReport) -> tuple[Annotations, np.ndarray]:
    """Cuts boxes at the edges of their images and leaves out those that are nothing.

    Args:
        images: their sizes.
        annotations: with boxes of float64.
        report: counts or refuses.

    Returns:
        the objects that remain, with boxes and areas of float32, and their positions, int64.
    """
    size = images.size[annotations.image][:, ::-1].astype(float)
    boxes = annotations.boxes

    def settle(flaw: Flaw, chosen: np.ndarray) -> None:
        cases = annotations.take(chosen)
        report.settle(flaw, cases.identity, functools.partial(describe_object, images, cases))

    settle(MALFORMED_BOX, np.any(~(np.abs(boxes) < LARGEST), axis=1))
    negative = np.any(boxes[:, 2:] < boxes[:, :2], axis=1)
    settle(NEGATIVE_SIZE, negative)
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    _check_convention(images, annotations, low, high, size, report)
    flat = (low == high).any(axis=1)
    outside = ~flat & ((high <= 0) | (low >= size)).any(axis=1)
    cut = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    moved = (np.abs(np.concatenate([low, high], axis=1) - cut) > _NOISE).any(axis=1)
    boxes = cut.astype(np.float32)
    flat |= ~outside & (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    settle(NO_AREA, flat)
    settle(OUTSIDE, outside)
    settle(CLIPPED, moved & ~flat & ~outside)
    area = annotations.area.astype(np.float32)
    unknown = ~(np.isfinite(area) & (area >= 0)) & ~flat & ~outside
    settle(BAD_AREA, unknown)
    area = np.where(unknown, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), area)
    rows = np.flatnonzero(~flat & ~outside)
    return annotations._replace(boxes=boxes, area=area).take(rows), rows


def describe_object(images: Images, annotations: Annotations, row: int) -> str:
    """Names an object in a sentence."""
    x1, y1, x2, y2 = annotations.boxes[row].tolist()
    height, width = images.size[annotations.image[row]].tolist()
    return (
        f"annotation {annotations.identity[row]} of {images.describe(int(annotations.image[row]))}, "
        f"x {x1:g} to {x2:g}, y {y1:g} to {y2:g} in {width} x {height}"
    )


def _check_convention(
    images: Images, annotations: Annotations, low: np.ndarray, high: np.ndarray, size: np.ndarray, report: DataReport
) -> None:
    """Refuses boxes of which more than half cannot be meant as they are read."""
    leaving = (low < size).all(axis=1) & (high > size + _SLACK).any(axis=1)
    # Read as [x1, y1, x2, y2], the four numbers are low and high - low.
    swapped = (high - low > low).all(axis=1) & (high - low <= size + _SLACK).all(axis=1)
    fractions = (high <= 1).all(axis=1) & (size > 2).all(axis=1)
    hint = (
        "these look like [x1, y1, x2, y2] where [x, y, width, height] should be"
        if 2 * np.count_nonzero(leaving & swapped) > np.count_nonzero(leaving)
        else "check the order and the unit of the numbers"
    )
    for chosen, what, advice in (
        (leaving, "boxes that leave their image", hint),
        (fractions, "boxes of less than a pixel", "these look like fractions of the image where pixels should be"),
    ):
        rows = np.flatnonzero(chosen)
        if 2 * len(rows) > len(low):
            flaw = Flaw(f"{len(rows)} of {len(low)} {what}", "annotation", "refused", advice)
            describe = functools.partial(describe_object, images, annotations.take(rows))
            report.settle(flaw, annotations.identity[rows], describe)


def compare_classes(ours: str, our_names: Sequence[str], theirs: str, their_names: Sequence[str]) -> str:
    """How two lists of classes differ, in words; empty if they are the same in the same order.

    Args:
        ours: what has the first list, for a sentence.
        our_names: of the classes, in the order of their labels.
        theirs: what has the second.
        their_names: of the classes, in the order of their labels.
    """
    if tuple(our_names) == tuple(their_names):
        return ""
    alone = [
        f"{', '.join(map(repr, names[:5]))}{', ...' * (len(names) > 5)} only in {holder}"
        for names, holder in (
            ([name for name in our_names if name not in their_names], ours),
            ([name for name in their_names if name not in our_names], theirs),
        )
        if names
    ]
    if alone or len(our_names) != len(their_names):
        return f"{ours} has {len(our_names)} classes, {theirs} {len(their_names)}: {'; '.join(alone)}"
    place = next(k for k, (a, b) in enumerate(zip(our_names, their_names, strict=True)) if a != b)
    return (
        f"{ours} and {theirs} have the same classes in another order: number {place + 1} is {our_names[place]!r} here "
        f"and {their_names[place]!r} there"
    )
