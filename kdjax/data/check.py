"""Holds annotated images and their objects against each other and against their files.

Everything here happens when a source is opened, never in the middle of a run. What is wrong is refused, left out,
repaired or kept, and counted, see :mod:`kdjax.data.flaws`.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from kdjax.data import flaws
from kdjax.data.flaws import DataReport, Flaw
from kdjax.data.images import Header, ImageError, UndecodableError
from kdjax.data.sizing import Sizing
from kdjax.data.tables import Annotations, Images, settle_objects

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
    cut_off = [row for row, error in errors.items() if isinstance(error, UndecodableError)]
    settle(flaws.UNUSABLE_FILE, [row for row in errors if row not in cut_off], failure)
    settle(flaws.CUT_OFF, cut_off, failure)
    sound = np.array([row not in errors for row in range(len(found))], bool)
    differs = sound & ((annotated != 0) & (annotated != size)).any(axis=1)
    settle(flaws.OTHER_SIZE, np.flatnonzero(differs), compared)
    animated = [row for row, header in enumerate(found) if isinstance(header, Header) and header.animated]
    settle(flaws.ANIMATED, animated, images.describe)
    marked = [row for row, header in enumerate(found) if isinstance(header, Header) and header.orientation != 1]
    if not report.checks.reading.upright:
        settle(flaws.TURNED, [row for row in marked if not differs[row]], images.describe)
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
    first, copies = np.arange(count), []
    of_file = equal_files(images, read)
    for row in np.flatnonzero(of_file != np.arange(count)).tolist():
        other = int(of_file[row])
        if images.names[row] != images.names[other] and _objects(annotations, row) == _objects(annotations, other):
            copies.append(row)
        else:
            first[row] = other
    repeated = np.flatnonzero(first != np.arange(count)).tolist()
    for flaw, rows in ((flaws.SAME_FILE, repeated), (flaws.COPIED_FILE, copies)):
        described = [f"{images.describe(row)} has that of {images.describe(int(of_file[row]))}" for row in rows[:5]]
        report.settle(flaw, images.identity[rows], described.__getitem__, [images.names[row] for row in rows])
    return first


def equal_files(images: Images, read: Callable[[int], bytes]) -> np.ndarray:
    """Of each image, the position of the first one whose file has the same bytes, (n,) int64: its own for most.

    Args:
        images: with the digests of their files; files with equal ones are compared as a whole.
        read: the bytes of the file at a position.
    """
    first = np.arange(len(images.identity))
    _, inverse, equal = np.unique(images.digest, return_inverse=True, return_counts=True)
    seen: dict[bytes, int] = {}
    for row, content in file_digests(np.flatnonzero(equal[inverse] > 1), read).items():
        first[row] = seen.setdefault(content, row)
    return first


def file_digests(rows: np.ndarray, read: Callable[[int], bytes]) -> dict[int, bytes]:
    """SHA-256 of the files at some positions, without those that cannot be read."""
    found = {}
    for row in rows.tolist():
        with contextlib.suppress(OSError):
            found[row] = hashlib.sha256(read(row)).digest()
    return found


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

    settle(flaws.MALFORMED_BOX, np.any(~(np.abs(boxes) < LARGEST), axis=1))
    corner, side = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    unknown = (np.concatenate([corner, side], axis=1) == corner[:, :1]).all(axis=1) & (corner[:, 0] < 0)
    settle(flaws.UNKNOWN_BOX, unknown)
    settle(flaws.NEGATIVE_SIZE, (side < 0).any(axis=1) & ~unknown)
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    _check_convention(images, annotations, low, high, size, report)
    if outlines is not None:
        settle(flaws.OTHER_OUTLINE, _check_outlines(images, annotations, low, high, size, outlines, report))
    flat = (low == high).any(axis=1)
    outside = ~flat & ~unknown & ((high <= 0) | (low >= size)).any(axis=1)
    whole = np.prod(high - low, axis=1)
    cut = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    moved = (np.abs(np.concatenate([low, high], axis=1) - cut) > _NOISE).any(axis=1)
    boxes = cut.astype(np.float32)
    side = boxes[:, 2:] - boxes[:, :2]
    flat |= ~outside & ~unknown & (side <= 0).any(axis=1)
    sound: np.ndarray = ~flat & ~outside & ~unknown
    settle(flaws.NO_AREA, flat)
    settle(flaws.OUTSIDE, outside)
    settle(flaws.CLIPPED, moved & sound)
    settle(flaws.THIN, (side < 1).any(axis=1) & sound)
    area = annotations.area.astype(np.float32)
    bad = ~(np.isfinite(area) & (area > 0)) & sound
    settle(flaws.BAD_AREA, bad)
    settle(flaws.OTHER_AREA, ((area > 1.1 * whole + 2) | (area < 0.01 * whole - 1)) & sound & ~bad)
    area = np.where(bad, np.prod(side, axis=1), area)
    checked = annotations._replace(boxes=boxes, area=area)
    rows = np.flatnonzero(sound)
    repeated = rows[_repeated(checked.take(rows))]
    settle(flaws.SAME_OBJECT, np.isin(np.arange(len(sound)), repeated))
    rows = np.setdiff1d(rows, repeated)
    return checked.take(rows), rows


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
    scale = sizing.evaluation_scale(images.size)
    return (annotations.boxes[:, 2:] - annotations.boxes[:, :2]) * scale[annotations.image][:, None]


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
