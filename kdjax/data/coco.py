"""People's own data: images in folders, with annotations in COCO's json format.

Annotation files and folders are found by the names that the usual tools give them. All ids may be any integers;
classes are labelled in the ascending order of their category ids, images come in the order of their ids and objects in
that of their annotation ids, whatever the order in the file.
"""

import contextlib
import gc
import itertools
import json
import os
import re
import stat
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from kdjax.data import check
from kdjax.data.check import (
    Annotations,
    Checks,
    DataReport,
    check_images,
    check_objects,
    same_files,
    settle_objects,
    united,
)
from kdjax.data.images import Header, ImageError, for_all, read_header
from kdjax.data.indexed import IndexedSource, check_counts, check_values
from kdjax.data.outlines import PolygonStore, outline_boxes, usable_outlines
from kdjax.errors import UserError
from kdjax.paths import local_path

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""What tools call the splits."""

_LONGEST_NAME = 255
"""Bytes in one part of a path, which file systems allow."""


_IGNORED = ("ignore", "ignored", "difficult", "is_difficult")
"""What converters call the mark of an object that is neither to be found nor to be missed."""
_ANGLES = ("angle", "theta", "rotation_angle")
"""Names of rotations whose unit and sense tools do not agree on."""


class _OutsideError(ImageError):
    """A file that lies elsewhere."""


class _MissingError(ImageError):
    """A file that is not there."""


def open_coco(folder: str | os.PathLike[str], split: str, checks: Checks = check.DEFAULT) -> IndexedSource:
    """Opens one split of a folder with annotations in COCO's format, after checking all of it.

    Args:
        folder: holds annotation files and images.
        split: ``train``, ``validation`` or ``test``, found by the usual names (``annotations/instances_train2017.json``
            and ``train2017/``; ``annotations_val.json`` and ``val/``; ``valid/_annotations.coco.json``; ...); or
            ``<json>:<images>``, an annotation file and a folder of images, relative to ``folder``. With a slice at the
            end, such as ``train[:100]`` or ``train[50%:]``, some of its images in the order of their ids.
        checks: how flaws are met.

    Raises:
        UserError: one sentence with the file, the id, and what is wrong.
    """
    folder = local_path(folder)
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"coco_json:{folder} is no folder that can be read.")
    name, part = _sliced(split)
    file, stem = _annotation_file(folder, name)
    report = DataReport(str(file), checks)
    store = PolygonStore()
    content = _parsed(file, store, checks)
    class_names, category_ids, categories = _categories(content, report)
    identity, names, annotated = _image_entries(content, report)
    annotations, segmentations = _annotation_entries(content, identity, names, categories, report)
    del content

    rows = np.arange(len(identity))[part(len(identity))]
    identity, names, annotated = identity[rows], [names[row] for row in rows.tolist()], annotated[rows]
    annotations, segmentations = _of_images(annotations, segmentations, rows)
    root = _image_folder(folder, file, name, stem, names)
    names, found = _headers(folder, root, identity, names, report)
    images, rows = check_images(identity, names, annotated, found, report)
    annotations, segmentations = _of_images(annotations, segmentations, rows)
    first = same_files(images, annotations, lambda row: (root / images.names[row]).read_bytes(), report)
    images, _, annotations, rows = united(images, annotations, first)
    segmentations = [segmentations[row] for row in rows.tolist()]

    boxes = outline_boxes(segmentations, store, images.size[annotations.image])
    kept, rows = check_objects(images, annotations, report, boxes)
    segmentations = [segmentations[row] for row in rows.tolist()]
    outlines, boxed = usable_outlines(segmentations, store, kept.boxes, images.size[kept.image])
    if outlines:
        settle_objects(check.NO_OUTLINE, boxed, images, kept, report)
    images, annotations, _ = check_counts(images, kept, report)
    paths = images.names
    source = IndexedSource(
        images=images,
        annotations=annotations,
        outlines=outlines,
        class_names=class_names,
        category_ids=category_ids,
        read=lambda row: (root / paths[row]).read_bytes(),
        report=report,
    )
    check_values(source)
    return source


def _sliced(split: str) -> tuple[str, Callable[[int], slice]]:
    """The name of a split, and the slice of its images by their number."""
    match = re.fullmatch(r"(?P<name>.+?)(\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?", split)
    # What has a colon between brackets at its end is meant as a slice.
    if not match or re.search(r"\[[^\[\]]*:[^\[\]]*\]$", match["name"]):
        raise UserError(f"{split!r} is no split; it must be a name, or a name and a slice such as train[:100].")

    def bound(text: str | None, length: int) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)

    low, high = match["low"], match["high"]
    return match["name"], lambda length: slice(bound(low, length), bound(high, length))


def _annotation_file(folder: Path, split: str) -> tuple[Path, str]:
    """The annotation file of a split, and the word in its name or its folder's that says so."""
    if ":" in split or split.endswith(".json"):
        path = folder / split.partition(":")[0]
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read.")
        return path, ""
    words = "|".join(map(re.escape, _SPLITS.get(split, (split,))))
    by_file = re.compile(rf"(?:instances_|annotations_)?((?:{words})(?:\d{{4}})?)(?:[_.](?:annotations|coco))*\.json")
    by_folder = re.compile(rf"((?:{words})(?:\d{{4}})?)")
    found: dict[Path, str] = {}
    for place in (folder, folder / "annotations"):
        for path in sorted(place.glob("*.json")):
            if match := by_file.fullmatch(path.name):
                found[path] = match[1]
    for place in sorted(folder.iterdir()):
        if match := by_folder.fullmatch(place.name):
            for name in ("_annotations.coco.json", "annotations.json", "instances.json", "labels.json"):
                if (place / name).is_file():
                    found[place / name] = match[1]
    explicit = "name the file and the folder of its images, such as annotations/my.json:images"
    if not found:
        others = sorted(str(path.relative_to(folder)) for path in folder.glob("*.json")) + sorted(
            str(path.relative_to(folder)) for path in folder.glob("*/*.json")
        )
        there = f"; it has {', '.join(others[:5])}{', ...' * (len(others) > 5)}" if others else "; it has no json"
        raise UserError(f"{folder} has no annotation file for the split {split!r}{there}: {explicit}.")
    if len(found) > 1:
        several = ", ".join(str(path.relative_to(folder)) for path in found)
        raise UserError(f"{folder} has several annotation files for the split {split!r} ({several}): {explicit}.")
    return next(iter(found.items()))


def _image_folder(folder: Path, file: Path, split: str, stem: str, names: Sequence[str]) -> Path:
    """The folder that holds the images: of the usual ones, where the most of some of their names are."""
    if ":" in split:
        path = folder / split.partition(":")[2]
        if not path.is_dir():
            raise UserError(f"{path} is no folder that can be read.")
        return path
    words = dict.fromkeys(filter(None, (stem, *_SPLITS.get(split, ()))))
    usual = [
        *(place for word in words for place in (folder / word, folder / "images" / word)),
        *(folder / stem / inner for inner in ("images", "data")),
        file.parent,
        folder / "images",
        folder / "data",
        folder,
    ]
    places = [place for place in dict.fromkeys(usual) if place.is_dir()]
    probes = [names[row] for row in np.linspace(0, len(names) - 1, min(len(names), 16), dtype=int)] if names else []
    # Of equals, the first.
    return max(places, key=lambda place: sum(any((place / x).exists() for x in _spellings(name)) for name in probes))


def _spellings(name: str) -> tuple[str, ...]:
    """What a file of that name may be called that was written on another system, or for the web."""
    plain = urllib.parse.unquote(name).replace("\\", "/")
    return name, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))


def _headers(
    folder: Path, root: Path, identity: np.ndarray, names: Sequence[str], report: DataReport
) -> tuple[list[str], list[Header | ImageError]]:
    """The names of the files that are there, and their headers or what is wrong with them."""
    names, checks = list(names), report.checks
    allowed = [os.path.realpath(path) for path in (folder, root)]

    def headers(rows: Sequence[int]) -> list[Header | ImageError]:
        return for_all(lambda k: _file_header(root, names[rows[k]], allowed, checks), len(rows))

    found = headers(range(len(names)))
    missing = [row for row, header in enumerate(found) if isinstance(header, _MissingError)]
    others = _other_names(root, [names[row] for row in missing]) if missing else []
    renamed = {row: other for row, other in zip(missing, others, strict=True) if isinstance(other, str)}
    for row, other in zip(missing, others, strict=True):
        if isinstance(other, ImageError):
            found[row] = other
    rows = list(renamed)
    report.settle(
        check.OTHER_NAME,
        identity[rows],
        lambda k: f"{names[rows[k]]!r} (image {identity[rows[k]]}) for {renamed[rows[k]]!r}{_how(names[rows[k]])}",
        list(renamed.values()),
    )
    for row, other in renamed.items():
        names[row] = other
    for row, header in zip(rows, headers(rows), strict=True):
        found[row] = header
    _settle_links(identity, names, found, report)
    return names, found


def _how(name: str) -> str:
    """What is special about a name that no file has, for a sentence."""
    if "\\" in name:
        return ", with a backslash instead of a slash"
    return ", with percent escapes" if urllib.parse.unquote(name) != name else ""


def _other_names(root: Path, names: Sequence[str]) -> list[str | ImageError]:
    """For each name that no file in a folder has, the one file whose name means the same, or what is wrong.

    Backslashes, percent escapes, Unicode's forms and the case of letters mean nothing, nor do folders before a name
    that are not there.
    """
    there: dict[str, list[str]] = defaultdict(list)
    stems: dict[str, list[str]] = defaultdict(list)
    for place, _, files in os.walk(root):
        for file in files:
            path = os.path.relpath(os.path.join(place, file), root)
            there[_plain(path)].append(path)
            stems[os.path.splitext(_plain(path))[0]].append(path)

    def other(name: str) -> str | ImageError:
        parts = _plain(name).split("/")
        for k in range(len(parts)):
            match there["/".join(parts[k:])]:
                case [path]:
                    return path
                case [path, second, *_]:
                    return ImageError(f"is missing, and {path!r} and {second!r} are both much the same name")
        near = stems[os.path.splitext(_plain(name))[0]]
        return ImageError(f"is missing{f', unlike {near[0]}' if near else ''}{_how(name)}")

    return [other(name) for name in names]


def _plain(name: str) -> str:
    """What names that mean the same file have in common."""
    text = unicodedata.normalize("NFKC", urllib.parse.unquote(name).replace("\\", "/")).casefold()
    parts = [part.strip() for part in text.replace("+", " ").split("/")]
    return "/".join(part for part in parts if part not in ("", "."))


def _parsed(file: Path, store: PolygonStore, checks: Checks) -> dict[str, Any]:
    """The content of an annotation file; its polygons are in the store."""
    try:
        size = file.stat().st_size
        if size > checks.most_json_bytes:
            raise UserError(
                f"{file} has {size:,} bytes, more than the {checks.most_json_bytes:,} that are read; "
                "config.data.max_json_bytes raises that limit."
            )
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} begins with a byte order mark; it must be plain UTF-8, saved without one.")
    try:
        text = data.decode()
        del data
        with _without_collector():
            content = json.loads(text, object_hook=store.take)
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply to be annotations.") from error
    except MemoryError as error:
        raise UserError(f"{file} does not fit into memory.") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid json in UTF-8: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; it must be an object with images and annotations.")
    for section in ("images", "annotations", "categories"):
        if section not in content:
            raise UserError(f"{file} has no {section!r}; it must have images, annotations and categories.")
        entries = content[section]
        if not isinstance(entries, list) or set(map(type, entries)) - {dict}:
            raise UserError(f"{file}: {section!r} must be a list of objects.")
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
        raise UserError(f"{report.origin}: {describe(row)} has {key} {shown}; it must be {words}.")
    return values


def _identities(entries: Sequence[dict[str, Any]], key: str, what: str, report: DataReport) -> np.ndarray:
    """Integers of 64 bits, (n,) int64."""
    values = _column(entries, key, (int,), report, lambda row: f"{what} number {row + 1}")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        value = max(values, key=abs)
        raise UserError(f"{report.origin}: {key} {str(value)[:30]} of an {what} is beyond 64 bits.") from None


def _unique(identity: np.ndarray, what: str, report: DataReport) -> None:
    values, count = np.unique(identity, return_counts=True)
    if len(values) != len(identity):
        several = values[count > 1]
        raise UserError(
            f"{report.origin}: {what} id {several[0]} is there {count[count > 1][0]} times"
            f"{f', and {len(several) - 1} other ids are repeated' * (len(several) > 1)}; ids must be unique."
        )


def _categories(content: dict[str, Any], report: DataReport) -> tuple[tuple[str, ...], tuple[int, ...], np.ndarray]:
    """Names of the classes, the lowest category id of each, and all ids, ascending, with their labels, (k, 2) int64."""
    entries = content["categories"]
    identity = _identities(entries, "id", "category", report)
    _unique(identity, "category", report)
    names = _column(entries, "name", (str,), report, lambda row: f"category {identity[row]}")
    if not len(identity):
        raise UserError(f"{report.origin} has no category.")
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
        check.SAME_NAME,
        identity[repeated],
        lambda k: f"category {identity[repeated[k]]}, {names[repeated[k]]!r}",
        [names[row] for row in repeated],
    )
    table = np.stack([identity[order], [labels[names[row]] for row in order.tolist()]], axis=1)
    return tuple(labels), tuple(category_ids), table


def _image_entries(content: dict[str, Any], report: DataReport) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids (n,), file names and sizes (n, 2) of all images by ascending id; a size is 0 where it is not said."""
    entries = content["images"]
    identity = _identities(entries, "id", "image", report)
    _unique(identity, "image", report)
    order = np.argsort(identity)
    identity, entries = identity[order], [entries[row] for row in order.tolist()]

    names = _column(entries, "file_name", (str,), report, lambda row: f"image {identity[row]}")

    def describe(row: int) -> str:
        return f"{names[row]!r} (image {identity[row]})"

    unsafe = {row: reason for row, name in enumerate(names) if (reason := _unsafe(name))}
    rows = list(unsafe)
    report.settle(
        check.UNSAFE_NAME,
        identity[rows],
        lambda k: f"image {identity[rows[k]]}, {names[rows[k]][:60]!r} {unsafe[rows[k]]}",
        [names[row] for row in rows],
    )
    sides, unsaid = [], np.zeros(len(entries), bool)
    for key in ("height", "width"):
        values = _column(entries, key, (int, type(None)), report, describe)
        side = np.array([0 if value is None else min(max(value, -1), 2**31) for value in values], np.int64)
        if wrong := [row for row, value in enumerate(values) if value is not None and value < -1]:
            raise UserError(f"{report.origin}: {describe(wrong[0])} has {key} {values[wrong[0]]}; it must be positive.")
        unsaid |= np.array([value in (0, -1) for value in values], bool)
        sides.append(np.maximum(side, 0))
    rows = np.flatnonzero(unsaid).tolist()
    report.settle(check.NO_SIZE, identity[rows], lambda k: describe(rows[k]), [names[row] for row in rows])
    return identity, names, np.stack(sides, axis=1)


def _unsafe(name: str) -> str:
    """Why a file name is not one of a file in the folder of the images; empty if it is."""
    try:
        longest = max(len(part.encode()) for part in name.split("/"))
    except UnicodeEncodeError:
        return "is no text"
    if not name.strip("./"):
        return "names no file"
    if "\0" in name:
        return "holds a NUL byte"
    if "://" in name:
        return "is a URL"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "is absolute"
    if ".." in re.split(r"[/\\]", name):
        return "leads upwards"
    return f"has a part of {longest} bytes" if longest > _LONGEST_NAME else ""


def _annotation_entries(
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
    of_image = _identities(entries, "image_id", "annotation", report)
    of_category = _identities(entries, "category_id", "annotation", report)
    image = np.searchsorted(image_ids, of_image)
    unknown = ~np.isin(of_image, image_ids)
    label = np.searchsorted(categories[:, 0], of_category)
    foreign = ~unknown & ~np.isin(of_category, categories[:, 0])

    rows = np.flatnonzero(unknown)
    report.settle(
        check.UNKNOWN_IMAGE,
        identity[rows],
        lambda k: f"annotation {identity[rows[k]]} has image_id {of_image[rows[k]]}",
    )
    strange = np.flatnonzero(foreign)
    files = [names[row] for row in image[strange].tolist()]
    report.settle(
        check.UNKNOWN_CATEGORY,
        identity[strange],
        lambda k: f"annotation {identity[strange[k]]} has category_id {of_category[strange[k]]} in {files[k]}",
        files,
    )
    known = np.flatnonzero(~unknown & ~foreign)
    order = known[np.lexsort((identity[known], image[known]))]
    image, identity, label = image[order], identity[order], label[order]
    entries = [entries[row] for row in order.tolist()]

    def describe(row: int) -> str:
        return f"annotation {identity[row]} of {names[image[row]]} (image {image_ids[image[row]]})"

    crowd = _column(entries, "iscrowd", (int, bool), report, describe, default=0)
    if wrong := set(crowd) - {0, 1}:
        row = next(row for row, value in enumerate(crowd) if value in wrong)
        raise UserError(f"{report.origin}: {describe(row)} has iscrowd {crowd[row]}; it must be 0 or 1.")

    def settle(flaw: check.Flaw, rows: Sequence[int]) -> None:
        report.settle(flaw, identity[rows], lambda k: describe(rows[k]), [names[row] for row in image[rows].tolist()])

    ignored, unread = _marks(entries, _IGNORED)
    settle(check.UNREAD_FLAG, unread)
    crowds = np.array(crowd, bool)
    settle(check.IGNORED, [row for row in ignored if not crowds[row]])
    crowds[ignored] = True
    boxes = _boxes(entries, report, describe)
    area = _column(entries, "area", (int, float, type(None)), report, describe)
    areas = _areas(area, np.abs(boxes[:, 2] * boxes[:, 3]))
    angles, unread = _rotations(entries)
    settle(check.UNREAD_ROTATION, unread)
    turned = list(angles)
    settle(check.ROTATED, turned)
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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < check.LARGEST:
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
    report.settle(check.MALFORMED_BOX, wrong, lambda k: f"{describe(wrong[k])}, bbox {repr(values[wrong[k]])[:60]}")
    return np.array(values, np.float64).reshape(-1, 4)


def _all_boxes(values: Sequence[Any]) -> bool:
    """Whether all are lists of four finite numbers that a pixel may have; of a million in a second."""
    if set(map(type, values)) - {list} or set(map(len, values)) - {4}:
        return False
    numbers = list(itertools.chain.from_iterable(values))
    return not set(map(type, numbers)) - {int, float} and all(map(check.LARGEST.__gt__, map(abs, numbers)))


def _areas(values: Sequence[Any], of_boxes: np.ndarray) -> np.ndarray:
    """Areas as the file has them, (m,) float64: those of the boxes where it has none, -1 for what is no area."""
    area = [0 if value is None else value if 0 <= value < check.LARGEST**2 else -1 for value in values]
    return np.where([value is None for value in values], of_boxes, np.array(area, np.float64))


def _of_images(annotations: Annotations, segmentations: list[Any], rows: np.ndarray) -> tuple[Annotations, list[Any]]:
    """The objects of some images, which become the images 0, 1, ...; ``rows`` ascends."""
    chosen = np.isin(annotations.image, rows)
    kept = annotations.take(chosen)
    return kept._replace(image=np.searchsorted(rows, kept.image)), list(itertools.compress(segmentations, chosen))


def _file_header(root: Path, name: str, allowed: Sequence[str], checks: Checks) -> Header | ImageError:
    """What the header of an image file says, or why the file cannot be used."""
    path = os.path.join(root, name)
    try:
        linked = stat.S_ISLNK(os.lstat(path).st_mode)
        if linked or "/" in name:
            real = os.path.realpath(path)
            inside = any(os.path.commonpath([real, place]) == place for place in allowed)
            if not inside and not checks.follow_links:
                return _OutsideError(f"is a link to {real}")
            if linked and not os.path.exists(real):
                return ImageError(f"is a link to {real}, which is missing")
        # Opening anything else may wait for ever.
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            return ImageError("is a folder" if stat.S_ISDIR(mode) else "is no file")
        with open(path, "rb") as file:
            return read_header(file, checks.reading)
    except ImageError as error:
        return error
    except FileNotFoundError:
        return _MissingError("is missing")
    except OSError as error:
        return ImageError(f"cannot be read ({error.strerror})")


def _settle_links(
    identity: np.ndarray, names: Sequence[str], found: Sequence[Header | ImageError], report: DataReport
) -> None:
    rows = [row for row, header in enumerate(found) if isinstance(header, _OutsideError)]
    report.settle(
        check.LINKED,
        identity[rows],
        lambda k: f"image {identity[rows[k]]}, {names[rows[k]]!r} {found[rows[k]]}",
        [names[row] for row in rows],
    )
