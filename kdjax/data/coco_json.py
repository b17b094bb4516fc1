"""What an annotation file in COCO's format says, entry by entry, held against what its keys may be."""

import contextlib
import gc
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdjax.data import flaws
from kdjax.data.check import LARGEST
from kdjax.data.flaws import Checks, DataReport, Flaw
from kdjax.data.folders import read_text, unsafe_name
from kdjax.data.outlines import PolygonStore
from kdjax.data.tables import Annotations
from kdjax.errors import DataError
from kdjax.paths import Path

_IGNORED = ("ignore", "ignored", "difficult", "is_difficult")
"""What converters call the mark of an object that is neither to be found nor to be missed."""
_ANGLES = ("angle", "theta", "rotation_angle")
"""Names of rotations whose unit and sense tools do not agree on."""


def parsed(file: Path, store: PolygonStore, checks: Checks) -> dict[str, Any]:
    """The content of an annotation file; its polygons are in the store."""
    text = read_text(file, checks)
    try:
        with _without_collector():
            content = json.loads(text, object_hook=store.take)
    except RecursionError as error:
        raise DataError(f"{file} is nested too deeply to be annotations.") from error
    except MemoryError as error:
        raise DataError(f"{file} does not fit into memory.") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid json: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; it must be an object with images and annotations.")
    for section in ("images", "annotations", "categories"):
        if section not in content:
            raise DataError(f"{file} has no {section!r}; it must have images, annotations and categories.")
        entries = content[section]
        if not isinstance(entries, list) or set(map(type, entries)) - {dict}:
            raise DataError(f"{file}: {section!r} must be a list of objects.")
    return content


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Parsing makes millions of objects and no cycle; looking for cycles would take a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _column(
    entries: Sequence[dict[str, Any]],
    key: str,
    kinds: Sequence[type],
    report: DataReport,
    describe: Callable[[int], str],
    default: Any = None,
) -> list[Any]:
    """One value of every entry, all of the right kind."""
    values = [entry.get(key, default) for entry in entries]
    if set(map(type, values)) - set(kinds):
        row = next(row for row, value in enumerate(values) if type(value) not in kinds)
        words = " or ".join({int: "an integer", float: "a number", str: "a text"}.get(kind, "absent") for kind in kinds)
        shown = repr(values[row])[:60] if key in entries[row] else "missing"
        raise DataError(f"{report.origin}: {describe(row)} has {key} {shown}; it must be {words}.")
    return values


def _identities(entries: Sequence[dict[str, Any]], key: str, what: str, report: DataReport) -> np.ndarray:
    """Integers of 64 bits, (n,) int64."""
    values = _column(entries, key, (int,), report, lambda row: f"{what} number {row + 1}")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        value = max(values, key=abs)
        raise DataError(f"{report.origin}: {key} {str(value)[:30]} of an {what} is beyond 64 bits.") from None


def _unique(identity: np.ndarray, what: str, report: DataReport) -> None:
    values, count = np.unique(identity, return_counts=True)
    if len(values) != len(identity):
        several = values[count > 1]
        raise DataError(
            f"{report.origin}: {what} id {several[0]} is there {count[count > 1][0]} times"
            f"{f', and {len(several) - 1} other ids are repeated' * (len(several) > 1)}; ids must be unique."
        )


def categories_of(content: dict[str, Any], report: DataReport) -> tuple[tuple[str, ...], tuple[int, ...], np.ndarray]:
    """Names of the classes, the lowest category id of each, and all ids, ascending, with their labels, (k, 2) int64."""
    entries = content["categories"]
    identity = _identities(entries, "id", "category", report)
    _unique(identity, "category", report)
    names = _column(entries, "name", (str,), report, lambda row: f"category {identity[row]}")
    if not len(identity):
        raise DataError(f"{report.origin} has no category.")
    labels: dict[str, int] = {}
    category_ids, repeated = [], []
    order = np.argsort(identity)
    for row in order.tolist():
        if names[row] in labels:
            repeated.append(row)
        else:
            labels[names[row]] = len(labels)
            category_ids.append(int(identity[row]))
    report.settle(
        flaws.SAME_NAME,
        identity[repeated],
        lambda k: f"category {identity[repeated[k]]}, {names[repeated[k]]!r}",
        [names[row] for row in repeated],
    )
    table = np.stack([identity[order], [labels[names[row]] for row in order.tolist()]], axis=1)
    return tuple(labels), tuple(category_ids), table


def images_of(content: dict[str, Any], report: DataReport) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids (n,), file names and sizes (n, 2) of all images by ascending id; a size is 0 where it is not said."""
    entries = content["images"]
    identity = _identities(entries, "id", "image", report)
    _unique(identity, "image", report)
    order = np.argsort(identity)
    identity, entries = identity[order], [entries[row] for row in order.tolist()]

    names = _column(entries, "file_name", (str,), report, lambda row: f"image {identity[row]}")

    def describe(row: int) -> str:
        return f"{names[row]!r} (image {identity[row]})"

    unsafe = {row: reason for row, name in enumerate(names) if (reason := unsafe_name(name))}
    rows = list(unsafe)
    report.settle(
        flaws.UNSAFE_NAME,
        identity[rows],
        lambda k: f"image {identity[rows[k]]}, {names[rows[k]][:60]!r} {unsafe[rows[k]]}",
        [names[row] for row in rows],
    )
    sides, unsaid = [], np.zeros(len(entries), bool)
    for key in ("height", "width"):
        values = _column(entries, key, (int, type(None)), report, describe)
        side = np.array([0 if value is None else min(max(value, -1), 2**31) for value in values], np.int64)
        if wrong := [row for row, value in enumerate(values) if value is not None and value < -1]:
            raise DataError(f"{report.origin}: {describe(wrong[0])} has {key} {values[wrong[0]]}; it must be positive.")
        unsaid |= np.array([value in (0, -1) for value in values], bool)
        sides.append(np.maximum(side, 0))
    rows = np.flatnonzero(unsaid).tolist()
    report.settle(flaws.NO_SIZE, identity[rows], lambda k: describe(rows[k]), [names[row] for row in rows])
    return identity, names, np.stack(sides, axis=1)


def annotations_of(
    content: dict[str, Any],
    image_ids: np.ndarray,
    names: Sequence[str],
    categories: np.ndarray,
    report: DataReport,
) -> tuple[Annotations, list[Any]]:
    """All objects by image and id, with boxes of float64, and their segmentations as they are.

    ``categories`` holds ids, ascending, and their labels, (k, 2).
    """
    entries = content["annotations"]
    identity = _identities(entries, "id", "annotation", report)
    _unique(identity, "annotation", report)
    image, label, known = _references(entries, identity, image_ids, names, categories[:, 0], report)
    order = known[np.lexsort((identity[known], image[known]))]
    image, identity, label = image[order], identity[order], label[order]
    entries = [entries[row] for row in order.tolist()]

    def describe(row: int) -> str:
        return f"annotation {identity[row]} of {names[image[row]]} (image {image_ids[image[row]]})"

    crowd = _column(entries, "iscrowd", (int, bool), report, describe, default=0)
    if wrong := set(crowd) - {0, 1}:
        row = next(row for row, value in enumerate(crowd) if value in wrong)
        raise DataError(f"{report.origin}: {describe(row)} has iscrowd {crowd[row]}; it must be 0 or 1.")

    def settle(flaw: Flaw, rows: Sequence[int]) -> None:
        report.settle(flaw, identity[rows], lambda k: describe(rows[k]), [names[row] for row in image[rows].tolist()])

    ignored, unread = _marks(entries, _IGNORED)
    settle(flaws.UNREAD_FLAG, unread)
    crowds = np.array(crowd, bool)
    settle(flaws.IGNORED, [row for row in ignored if not crowds[row]])
    crowds[ignored] = True
    boxes = _boxes(entries, report, describe)
    area = _column(entries, "area", (int, float, type(None)), report, describe)
    areas = _areas(area, np.abs(boxes[:, 2] * boxes[:, 3]))
    angles, unread = _rotations(entries)
    settle(flaws.UNREAD_ROTATION, unread)
    turned = list(angles)
    settle(flaws.ROTATED, turned)
    boxes[turned] = _around(boxes[turned], np.array(list(angles.values()), float))
    annotations = Annotations(
        image=image,
        identity=identity,
        boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        labels=categories[label, 1].astype(np.int32),
        crowd=crowds,
        area=areas,
    )
    return annotations, [entry.get("segmentation") for entry in entries]


def _references(
    entries: Sequence[dict[str, Any]],
    identity: np.ndarray,
    image_ids: np.ndarray,
    names: Sequence[str],
    category_ids: np.ndarray,
    report: DataReport,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions of each annotation's image and of its category, and of the annotations of which both are known.

    ``image_ids`` and ``category_ids`` ascend.
    """
    of_image = _identities(entries, "image_id", "annotation", report)
    of_category = _identities(entries, "category_id", "annotation", report)
    image = np.searchsorted(image_ids, of_image)
    unknown = ~np.isin(of_image, image_ids)
    label = np.searchsorted(category_ids, of_category)
    foreign = ~unknown & ~np.isin(of_category, category_ids)

    rows = np.flatnonzero(unknown)
    report.settle(
        flaws.UNKNOWN_IMAGE,
        identity[rows],
        lambda k: f"annotation {identity[rows[k]]} has image_id {of_image[rows[k]]}",
    )
    strange = np.flatnonzero(foreign)
    files = [names[row] for row in image[strange].tolist()]
    report.settle(
        flaws.UNKNOWN_CATEGORY,
        identity[strange],
        lambda k: f"annotation {identity[strange[k]]} has category_id {of_category[strange[k]]} in {files[k]}",
        files,
    )
    return image, label, np.flatnonzero(~unknown & ~foreign)


def _marks(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> tuple[list[int], list[int]]:
    """The positions of the entries that have one of some marks, and of those whose marks cannot be read."""
    marked, unread = [], []
    for key in keys:
        for row, value in _said(entries, key):
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                unread.append(row)
            elif value:
                marked.append(row)
    return sorted(set(marked)), sorted(set(unread))


def _said(entries: Sequence[dict[str, Any]], key: str) -> Iterator[tuple[int, Any]]:
    """The position of every entry that says something under a key, or in its attributes, and what."""
    for row, entry in enumerate(entries):
        if key in entry:
            value = entry[key]
        elif "attributes" in entry and isinstance(entry["attributes"], dict):
            value = entry["attributes"].get(key)
        else:
            continue
        if value is not None:
            yield row, value


def _rotations(entries: Sequence[dict[str, Any]]) -> tuple[dict[int, float], list[int]]:
    """Degrees by which boxes are turned, by their position, and the positions of those that cannot be read.

    Where there is an outline, the box is held against that instead.
    """
    angles: dict[int, float] = {}
    unread: list[int] = []
    for row, value in _said(entries, "rotation"):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
            unread.append(row)
        elif value % 180 and not _is_outline(entries[row].get("segmentation")):
            angles[row] = float(value)
    for key in _ANGLES:
        unread += [row for row, value in _said(entries, key) if value]
    return angles, sorted(set(unread))


def _is_outline(segmentation: Any) -> bool:
    """Whether a segmentation, as its polygons' store leaves it, says anything."""
    return isinstance(segmentation, dict) or (isinstance(segmentation, tuple) and len(segmentation) > 1)


def _around(boxes: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """The upright boxes around boxes (m, 4) that are turned about their centres; x, y, width and height."""
    cosine, sine = np.abs(np.cos(np.deg2rad(degrees)))[:, None], np.abs(np.sin(np.deg2rad(degrees)))[:, None]
    side = np.abs(boxes[:, 2:])
    around = cosine * side + sine * side[:, ::-1]
    return np.concatenate([boxes[:, :2] + (boxes[:, 2:] - around) / 2, around], axis=1)


def _boxes(entries: Sequence[dict[str, Any]], report: DataReport, describe: Callable[[int], str]) -> np.ndarray:
    """The boxes as they are in the file, (m, 4) float64, x, y, width and height."""
    values: list[Any] = [entry.get("bbox") for entry in entries]
    wrong = [] if _all_boxes(values) else [row for row, box in enumerate(values) if not _all_boxes([box])]
    report.settle(flaws.MALFORMED_BOX, wrong, lambda k: f"{describe(wrong[k])}, bbox {repr(values[wrong[k]])[:60]}")
    return np.array(values, np.float64).reshape(-1, 4)


def _all_boxes(values: Sequence[Any]) -> bool:
    """Whether all are lists of four finite numbers that a pixel may have; of a million in a second."""
    if set(map(type, values)) - {list} or set(map(len, values)) - {4}:
        return False
    numbers = list(itertools.chain.from_iterable(values))
    return not set(map(type, numbers)) - {int, float} and all(map(LARGEST.__gt__, map(abs, numbers)))


def _areas(values: Sequence[Any], of_boxes: np.ndarray) -> np.ndarray:
    """Areas as the file has them, (m,) float64: those of the boxes where it has none, -1 for what is no area."""
    area = [0 if value is None else value if 0 <= value < LARGEST**2 else -1 for value in values]
    return np.where([value is None for value in values], of_boxes, np.array(area, np.float64))
