"""What may be wrong with annotated images, and what becomes of it: refused, left out, repaired or kept, and counted.

Everything here happens when a source is opened, never in the middle of a run.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from kdjax.data.images import Header, ImageError, UndecodableError
from kdjax.data.sizing import READING, Reading, Sizing
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
    max_detections: int | None = None
    """Detections of an image that are judged, for counting images with more objects; None where nobody judges."""
    sizing: Sizing | None = None
    """How large detectors see the images, for counting objects that are too small then; None where that is open."""
    reading: Reading = READING
    """How image files are read."""
    follow_links: bool = False
    """Take images that are links to files outside of their folder, which are refused."""
    most_json_bytes: int = 10**9
    """A larger annotation file is refused: parsed, it would take several times as much memory."""


DEFAULT = Checks()


class Flaw(NamedTuple):
    """One thing that can be wrong."""

    what: str
    """Of several: "boxes without area"."""
    of: Literal["image", "annotation", "category"]
    outcome: Literal["refused", "refused unless lenient", "left out", "repaired", "truncated", "kept"]
    """What becomes of it; "kept" is what stays as it is and is only said."""
    hint: str = ""
    """What would be right, where that is not plain."""


_LENIENT = "config.data.lenient=True leaves them out"

UNSAFE_NAME = Flaw("file names that could leave the folder of the images", "image", "refused")
LINKED = Flaw(
    "images that are links to files outside of their folder",
    "image",
    "refused",
    "config.data.follow_links=True takes them",
)
OTHER_NAME = Flaw("file names that are spelled otherwise than the file that is there", "image", "repaired")
NO_SIZE = Flaw("images whose height or width is 0 or -1, where nothing or a size should be", "image", "repaired")
SAME_FILE = Flaw("images with the same file as another, whose objects join that one's", "image", "repaired")
COPIED_FILE = Flaw("images with the same file and the same objects as another", "image", "kept", "they count twice")
SHARED_FILE = Flaw("images that the training split holds too", "image", "kept", "what is measured on them is too good")
TURNED = Flaw(
    "images with an orientation mark (EXIF), which is not applied",
    "image",
    "kept",
    "if boxes refer to images as viewers show them, set config.data.upright=True",
)
UNUSABLE_FILE = Flaw("images that cannot be used", "image", "refused unless lenient", _LENIENT)
CUT_OFF = Flaw("images that cannot be decoded", "image", "left out")
OTHER_SIZE = Flaw("images of another size than annotated", "image", "refused unless lenient", _LENIENT)
ANIMATED = Flaw("animated images, of which the first picture is taken", "image", "repaired")
CROWDED = Flaw("images with more objects than config.data.max_objects", "image", "truncated")
UNREACHABLE = Flaw(
    "images with more objects than config.data.max_detections, so that nobody finds all",
    "image",
    "kept",
    "raise it, and max_detections of the models' heads",
)
UNKNOWN_IMAGE = Flaw("annotations of images that are not listed", "annotation", "refused unless lenient", _LENIENT)
UNKNOWN_CATEGORY = Flaw(
    "annotations of categories that are not listed", "annotation", "refused unless lenient", _LENIENT
)
IGNORED = Flaw(
    "objects marked to be ignored, which are taken for crowds: neither learnt nor judged", "annotation", "repaired"
)
UNREAD_FLAG = Flaw("marks to ignore an object that are neither 0 nor 1, and are not read", "annotation", "kept")
MOSTLY_CROWDS = Flaw(
    "crowds, more than half of all objects",
    "annotation",
    "kept",
    "crowds are neither learnt nor judged; of ordinary objects iscrowd is 0",
)
SAME_OBJECT = Flaw("objects with the image, the class and the box of another", "annotation", "left out")
ROTATED = Flaw("boxes with a rotation, which become the upright boxes around them", "annotation", "repaired")
UNREAD_ROTATION = Flaw(
    "boxes with an angle that is not read",
    "annotation",
    "kept",
    "degrees, clockwise or not, as the rotation of an annotation or of its attributes, are",
)
OTHER_OUTLINE = Flaw("objects whose box is not that of their outline", "annotation", "kept", "the box is what counts")
OTHER_AREA = Flaw(
    "objects whose area is larger than their box, or less than a hundredth of it",
    "annotation",
    "kept",
    "COCO's size classes are made of areas",
)
UNKNOWN_BOX = Flaw("boxes of one negative number, which stands for an unknown box", "annotation", "left out")
THIN = Flaw("boxes less than a pixel high or wide", "annotation", "kept")
TINY = Flaw(
    "objects less than 2 pixels high or wide once images are scaled",
    "annotation",
    "kept",
    "a larger config.data.image_size keeps more of them",
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
_NEIGHBOURS = 4
"""Objects with which each one is compared, in an order in which repeated ones are neighbours."""
_READINGS: dict[str, Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]] = {
    "[y, x, height, width]": lambda n, _: (n[1], n[0], n[1] + n[3], n[0] + n[2]),
    "[x1, y1, x2, y2]": lambda n, _: (n[0], n[1], n[2], n[3]),
    "[y1, x1, y2, x2]": lambda n, _: (n[1], n[0], n[3], n[2]),
    "[x1, x2, y1, y2]": lambda n, _: (n[0], n[2], n[1], n[3]),
    "[centre x, centre y, width, height]": lambda n, _: (
        *(n[0] - n[2] / 2, n[1] - n[3] / 2),
        *(n[0] + n[2] / 2, n[1] + n[3] / 2),
    ),
    "[x, y, width, height] from the lower left corner": lambda n, height: (
        *(n[0], height - n[1] - n[3]),
        *(n[0] + n[2], height - n[1]),
    ),
}
"""Other meanings of the numbers of boxes (4, m): from them and the heights of the images (m,) to x1, y1, x2, y2."""


class DataReport:
    """What was wrong with one split, flaw by flaw."""

    def __init__(self, origin: str, checks: Checks = DEFAULT):
        """Starts without flaws; ``origin`` is the file or the data set that sentences name."""
        self.origin = origin
        self.checks = checks
        self.flaws: dict[Flaw, list[int]] = {}
        """Ids of the images, annotations or categories that have each flaw."""
        self.files: dict[Flaw, list[str]] = {}
        """Their images' files, or the categories' names; fewer where that is not known."""

    def settle(
        self,
        flaw: Flaw,
        ids: Sequence[int] | np.ndarray,
        describe: Callable[[int], str],
        files: Sequence[str] = (),
    ) -> None:
        """Counts the cases of a flaw, or refuses the data for them.

        Args:
            flaw: what is wrong.
            ids: of what has it; nothing happens where there are none.
            describe: names a case by its position in ``ids``, for a sentence.
            files: of the images, one for each of ``ids``, or names of the categories; empty where they are not known.

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
        self.files.setdefault(flaw, []).extend(files)

    def outcome(self, flaw: Flaw) -> str:
        """What became of a flaw that was counted: "left out", "repaired", "truncated" or "kept"."""
        return "left out" if flaw.outcome == "refused unless lenient" else flaw.outcome

    def lines(self) -> list[str]:
        """A line for each flaw, with the first cases by their files."""
        found = []
        for flaw, ids in self.flaws.items():
            files = self.files[flaw]
            known = len(files) == len(ids)
            if flaw.of == "annotation":
                cases = [f"{ids[k]} of {files[k]}" if known else f"{ids[k]}" for k in range(min(3, len(ids)))]
            else:
                cases = files[:3] if known else list(map(str, ids[:3]))
            hint = f"; {flaw.hint}" * bool(flaw.hint and flaw.outcome == "kept")
            shown = ", ".join(cases) + ", ..." * (len(ids) > 3)
            found.append(f"  {self.outcome(flaw)}: {len(ids)} {flaw.what} ({flaw.of} {shown}){hint}")
        return found


class Images(NamedTuple):
    """The n images of a split."""

    identity: np.ndarray
    """(n,) int64, unique."""
    names: Sequence[str]
    """Of their files."""
    size: np.ndarray
    """(n, 2) int64: height and width in pixels."""
    digest: np.ndarray
    """(n,) int64: equal of files with equal bytes, and hardly ever of others."""

    def describe(self, position: int) -> str:
        """Names an image in a sentence."""
        return f"{self.names[position]} (image {self.identity[position]})"

    def take(self, rows: np.ndarray) -> "Images":
        """Some of the images, in the order of ``rows``."""
        names = [self.names[row] for row in rows.tolist()]
        return Images(self.identity[rows], names, self.size[rows], self.digest[rows])


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
    digest = np.array([header.digest if isinstance(header, Header) else 0 for header in found], np.int64)
    images = Images(identity, names, size, digest)

    def settle(flaw: Flaw, rows: Sequence[int] | np.ndarray, describe: Callable[[int], str]) -> None:
        files = [names[row] for row in rows]
        report.settle(flaw, identity[rows], lambda k: describe(int(rows[k])), files)

    def failure(row: int) -> str:
        return f"{images.describe(row)} {found[row]}"

    def compared(row: int) -> str:
        (height, width), (true_height, true_width) = annotated[row].tolist(), size[row].tolist()
        header = found[row]
        turned = isinstance(header, Header) and header.orientation >= 5 and (height, width) == (true_width, true_height)
        why = "is applied" if report.checks.reading.upright else "is not applied without config.data.upright=True"
        return (
            f"{images.describe(row)} is {true_width} x {true_height} pixels and annotated as {width} x {height}"
            f"{f', which its EXIF orientation exchanges; it {why}' * turned}"
        )

    errors = {row: header for row, header in enumerate(found) if isinstance(header, ImageError)}
    settle(UNUSABLE_FILE, [row for row, error in errors.items() if not isinstance(error, UndecodableError)], failure)
    settle(CUT_OFF, [row for row, error in errors.items() if isinstance(error, UndecodableError)], failure)
    sound = np.array([row not in errors for row in range(len(found))], bool)
    differs = sound & ((annotated != 0) & (annotated != size)).any(axis=1)
    settle(OTHER_SIZE, np.flatnonzero(differs), compared)
    animated = [row for row, header in enumerate(found) if isinstance(header, Header) and header.animated]
    settle(ANIMATED, animated, images.describe)
    marked = [row for row, header in enumerate(found) if isinstance(header, Header) and header.orientation != 1]
    if not report.checks.reading.upright:
        settle(TURNED, [row for row in marked if not differs[row]], images.describe)
    rows = np.flatnonzero(sound & ~differs)
    return images.take(rows), rows


def same_files(
    images: Images, annotations: Annotations, read: Callable[[int], bytes], report: DataReport
) -> np.ndarray:
    """Finds files that are there under several ids, by one name or several.

    Copies under other names with the same objects are kept; in the others, objects would be missing.

    Args:
        images: with the digests of their files; files with equal ones are compared as a whole.
        annotations: their objects.
        read: the bytes of the file at a position.
        report: counts or refuses.

    Returns:
        (n,) int64: of each image, the position of the one that its objects belong to.
    """
    count = len(images.identity)
    first, of_file, copies = np.arange(count), np.arange(count), []
    _, inverse, equal = np.unique(images.digest, return_inverse=True, return_counts=True)
    seen: dict[bytes, int] = {}
    for row in np.flatnonzero(equal[inverse] > 1).tolist():
        with contextlib.suppress(OSError):
            of_file[row] = other = seen.setdefault(hashlib.sha256(read(row)).digest(), row)
            if other == row:
                continue
            if images.names[row] != images.names[other] and _objects(annotations, row) == _objects(annotations, other):
                copies.append(row)
            else:
                first[row] = other
    for flaw, rows in ((SAME_FILE, np.flatnonzero(first != np.arange(count)).tolist()), (COPIED_FILE, copies)):
        described = [f"{images.describe(row)} has that of {images.describe(int(of_file[row]))}" for row in rows[:5]]
        report.settle(flaw, images.identity[rows], described.__getitem__, [images.names[row] for row in rows])
    return first


def _objects(annotations: Annotations, image: int) -> set[tuple[float, ...]]:
    """Class, crowd mark and box of the objects of an image."""
    rows = slice(*np.searchsorted(annotations.image, [image, image + 1]).tolist())
    columns = annotations.labels[rows, None], annotations.crowd[rows, None], annotations.boxes[rows].round(1)
    return set(map(tuple, np.concatenate(columns, axis=1).tolist()))


def united(
    images: Images, annotations: Annotations, first: np.ndarray
) -> tuple[Images, np.ndarray, Annotations, np.ndarray]:
    """Gives the objects of every image to the first one with its file, see :func:`same_files`.

    Returns:
        the images that remain and their positions, and the objects in the new order and their former positions.
    """
    kept = np.flatnonzero(first == np.arange(len(first)))
    image = np.searchsorted(kept, first[annotations.image])
    order = np.argsort(image, kind="stable")
    return images.take(kept), kept, annotations._replace(image=image).take(order), order


def check_objects(
    images: Images, annotations: Annotations, report: DataReport, outlines: np.ndarray | None = None
) -> tuple[Annotations, np.ndarray]:
    """Cuts boxes at the edges of their images and leaves out those that are nothing.

    Args:
        images: their sizes.
        annotations: with boxes of float64.
        report: counts or refuses.
        outlines: (m, 4), the boxes around the objects' outlines, xyxy in pixels; NaN where there is no outline.

    Returns:
        the objects that remain, with boxes and areas of float32, and their positions, int64.
    """
    size = images.size[annotations.image][:, ::-1].astype(float)
    boxes = annotations.boxes

    def settle(flaw: Flaw, chosen: np.ndarray) -> None:
        settle_objects(flaw, chosen, images, annotations, report)

    settle(MALFORMED_BOX, np.any(~(np.abs(boxes) < LARGEST), axis=1))
    corner, side = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    unknown = (np.concatenate([corner, side], axis=1) == corner[:, :1]).all(axis=1) & (corner[:, 0] < 0)
    settle(UNKNOWN_BOX, unknown)
    settle(NEGATIVE_SIZE, (side < 0).any(axis=1) & ~unknown)
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    _check_convention(images, annotations, low, high, size, report)
    if outlines is not None:
        settle(OTHER_OUTLINE, _check_outlines(images, annotations, low, high, size, outlines, report))
    flat = (low == high).any(axis=1)
    outside = ~flat & ~unknown & ((high <= 0) | (low >= size)).any(axis=1)
    whole = np.prod(high - low, axis=1)
    cut = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    moved = (np.abs(np.concatenate([low, high], axis=1) - cut) > _NOISE).any(axis=1)
    boxes = cut.astype(np.float32)
    side = boxes[:, 2:] - boxes[:, :2]
    flat |= ~outside & ~unknown & (side <= 0).any(axis=1)
    sound: np.ndarray = ~flat & ~outside & ~unknown
    settle(NO_AREA, flat)
    settle(OUTSIDE, outside)
    settle(CLIPPED, moved & sound)
    settle(THIN, (side < 1).any(axis=1) & sound)
    area = annotations.area.astype(np.float32)
    bad = ~(np.isfinite(area) & (area > 0)) & sound
    settle(BAD_AREA, bad)
    settle(OTHER_AREA, ((area > 1.1 * whole + 2) | (area < 0.01 * whole - 1)) & sound & ~bad)
    area = np.where(bad, np.prod(side, axis=1), area)
    checked = annotations._replace(boxes=boxes, area=area)
    rows = np.flatnonzero(sound)
    repeated = rows[_repeated(checked.take(rows))]
    settle(SAME_OBJECT, np.isin(np.arange(len(sound)), repeated))
    rows = np.setdiff1d(rows, repeated)
    return checked.take(rows), rows


def settle_objects(
    flaw: Flaw, chosen: np.ndarray, images: Images, annotations: Annotations, report: DataReport
) -> None:
    """Counts or refuses the objects for which a mask, or of which the positions, are given."""
    cases = annotations.take(chosen)
    files = [images.names[image] for image in cases.image.tolist()]
    report.settle(flaw, cases.identity, functools.partial(describe_object, images, cases), files)


def _repeated(annotations: Annotations) -> np.ndarray:
    """Which objects are earlier ones again, (m,) bool: of the same image and class, with a box that is hardly moved.

    Half a pixel, or a twentieth of the shorter side if that is less, is what rounding and other units of files move.
    """
    boxes = annotations.boxes.astype(np.float64)
    # Equal boxes have equal numbers here; in a grid of objects, no others have.
    number = boxes @ np.sqrt([1.0, 2.0, 3.0, 5.0])
    order = np.lexsort((number, annotations.crowd, annotations.labels, annotations.image))
    group = np.stack([annotations.image, annotations.labels, annotations.crowd])[:, order]
    boxes = boxes[order]
    slack = np.minimum(0.5, 0.05 * (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf))[:, None]
    repeated = np.zeros(len(order), bool)
    for step in range(1, _NEIGHBOURS + 1):
        near = (np.abs(boxes[step:] - boxes[:-step]) <= slack[step:]).all(axis=1)
        near &= (group[:, step:] == group[:, :-step]).all(axis=0)
        repeated[np.maximum(order[step:], order[:-step])[near]] = True
    return repeated


def scaled_sides(images: Images, annotations: Annotations, sizing: Sizing) -> np.ndarray:
    """Width and height of all boxes once images are scaled as in evaluation, in pixels: (m, 2)."""
    shapes = np.array(sizing.shapes)[sizing.choose(images.size)]
    scale = sizing.scale(images.size, shapes)
    return (annotations.boxes[:, 2:] - annotations.boxes[:, :2]) * scale[annotations.image][:, None]


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
    side = high - low
    leaving = (low < size).all(axis=1) & (high > size + _SLACK).any(axis=1)
    # Read as [x1, y1, x2, y2], the four numbers are low and high - low.
    swapped = (side > low).all(axis=1) & (side <= size + _SLACK).all(axis=1)
    fractions = (high <= 1).all(axis=1) & (high > 0).all(axis=1) & (size > 2).all(axis=1)
    as_corners, as_sides = np.prod(side - low, axis=1), np.prod(side, axis=1)
    of_corners = swapped & _about(annotations.area, as_corners) & ~_about(annotations.area, as_sides)
    corners = "these look like [x1, y1, x2, y2] where [x, y, width, height] should be"
    hint = "check the order and the unit of the numbers"
    if 2 * np.count_nonzero(leaving & swapped) > np.count_nonzero(leaving):
        hint = corners
    for chosen, what, advice in (
        (leaving, "boxes that leave their image", hint),
        (fractions, "boxes of less than a pixel", "these look like fractions of the image where pixels should be"),
        (of_corners, "boxes whose width times height is not their area", corners),
    ):
        if 2 * np.count_nonzero(chosen) > len(low):
            flaw = Flaw(f"{np.count_nonzero(chosen)} of {len(low)} {what}", "annotation", "refused", advice)
            settle_objects(flaw, np.flatnonzero(chosen), images, annotations, report)


def _about(area: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(area - expected) <= 1 + 0.01 * np.abs(expected)


def _check_outlines(
    images: Images,
    annotations: Annotations,
    low: np.ndarray,
    high: np.ndarray,
    size: np.ndarray,
    outlines: np.ndarray,
    report: DataReport,
) -> np.ndarray:
    """Which boxes are not those of their outlines, (m,) bool; refuses them where most have another meaning."""
    slack = 2 + 0.05 * (outlines[:, 2:] - outlines[:, :2]).max(axis=1, initial=0)[:, None]
    # Where there is no outline, a comparison with NaN is False.
    differs = (np.abs(np.concatenate([low, high], axis=1) - outlines) > slack).any(axis=1)
    known = np.count_nonzero(np.isfinite(outlines[:, 0]))
    if 2 * np.count_nonzero(differs) <= known:
        return differs
    numbers = np.concatenate([low, high - low], axis=1).T
    for words, reading in _READINGS.items():
        meant = np.stack(reading(numbers, size[:, 1]), axis=1)
        fits = differs & (np.abs(meant - outlines) <= slack).all(axis=1)
        if 2 * np.count_nonzero(fits) > known:
            what = f"{np.count_nonzero(differs)} of {known} boxes that are not those of their outlines"
            advice = f"these look like {words} where [x, y, width, height] should be"
            settle_objects(Flaw(what, "annotation", "refused", advice), differs, images, annotations, report)
    return differs


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
