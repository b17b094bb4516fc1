"""People's own data as Pascal VOC's tools write them: an XML file of objects for each image, with corners in pixels.

LabelImg, CVAT, Roboflow and Label Studio agree on the elements, not on where files lie or where pixels begin.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from kdjax.data import flaws
from kdjax.data.annotated import annotated_source, sliced
from kdjax.data.flaws import DEFAULT, Checks, DataReport
from kdjax.data.folders import SPLITS, no_split, other_splits, pictures, read_text, readable, split_words
from kdjax.data.images import for_all
from kdjax.data.object_source import IndexedObjects
from kdjax.data.outlines import PolygonStore
from kdjax.errors import DataError
from kdjax.paths import Path

_LABELS = ("Annotations", "annotations", "labels", "xmls")
"""Folders of annotations, in that of a split."""
_IMAGES = ("JPEGImages", "images", "Images", "imgs")
"""And of images."""
_WORDS = tuple(word for split in SPLITS for word in split_words(split))
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _File(NamedTuple):
    """What one annotation file says."""

    image: str
    """What it calls its image; "" where it does not."""
    height: int | None
    width: int | None
    objects: list[tuple[str, tuple[float, ...], str]]
    """Class, xmin, ymin, xmax, ymax, and the mark "difficult"."""


def open_voc(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedObjects:
    """Opens one split of images with annotations in Pascal VOC's XML, after checking all of it.

    ``Annotations/a.xml`` belongs to the image ``a``, in ``JPEGImages`` or beside it. VOC counts pixels from 1 and both
    corners are inside: where all corners are whole numbers from 1 on, 1 is taken off the upper left ones; else none is
    moved, and that is said. Objects marked as difficult are neither learnt nor judged. Classes come in the order of the
    alphabet, of all splits together.

    Args:
        folder: holds ``Annotations``, ``JPEGImages`` and ``ImageSets``, such as ``VOCdevkit/VOC2007``; or a folder for
            each split.
        split: ``train``, ``validation`` or ``test``, or another name: the list ``ImageSets/Main/<split>.txt``, or the
            folder of the usual name, ``train``, ``valid``; a folder with no split at all is ``train``. With a part at
            the end, see :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file or the id, and what is wrong.
    """
    folder = readable(folder, "voc")
    name, part = sliced(split)
    place, listed = _split(folder, name, checks)
    labels, root = _label_folder(place), _image_folder(place)
    others = [] if place == folder else [path for word in _WORDS if (path := folder / word).is_dir()]
    paths = sorted({path for split_folder in (place, *others) for path in _label_folder(split_folder).glob("*.xml")})
    parsed = for_all(lambda k: _parsed(paths[k], checks), len(paths), together=checks.together)
    files = dict(zip(paths, parsed, strict=True))
    if missing := [stem for stem in listed or () if labels / f"{stem}.xml" not in files]:
        raise DataError(f"{labels} has no {missing[0]}.xml, which the list of the split {name!r} names.")
    chosen = {path.stem: file for path, file in files.items() if path.parent == labels}
    if listed is not None:
        chosen = {stem: chosen[stem] for stem in sorted(set(listed))}

    classes = sorted({label for file in files.values() for label, _, _ in file.objects})
    corners = [value for file in files.values() for _, box, _ in file.objects for value in box]
    from_one = all(value.is_integer() and value >= 1 for value in corners)
    report = DataReport(f"{folder} {split}", checks)
    images, renamed = _images(chosen, root, listed is None)
    report.settle(flaws.OTHER_FILE, list(renamed), lambda k: list(renamed.values())[k], list(renamed.values()))
    annotations = _annotations(list(chosen.values()), classes, from_one)
    if not from_one:
        names = [images[entry["image_id"] - 1]["file_name"] for entry in annotations]
        report.settle(flaws.FROM_ZERO, [entry["id"] for entry in annotations], names.__getitem__, names)
    return annotated_source(
        {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": label} for number, label in enumerate(classes)],
        },
        lambda _: root,
        folder=folder,
        part=part,
        report=report,
        store=PolygonStore(),
    )


def _split(folder: Path, split: str, checks: Checks) -> tuple[Path, list[str] | None]:
    """The folder that a split is in, and the stems of its files where a list says them."""
    lists = folder / "ImageSets" / "Main"
    for word in split_words(split):
        if (lists / f"{word}.txt").is_file():
            lines = read_text(lists / f"{word}.txt", checks).splitlines()
            return folder, [line.split()[0] for line in lines if line.strip()]
        if (folder / word).is_dir():
            return folder / word, None
    if split == "train" and not any((folder / word).is_dir() for word in other_splits(split)) and not lists.is_dir():
        return folder, None
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise no_split(
        folder,
        split,
        f"no list ImageSets/Main/{split}.txt and no folder for the split {split!r}",
        f"name one of the lists or of the folders that it has ({', '.join(there[:8]) or 'none'})",
    )


def _label_folder(place: Path) -> Path:
    """Where in the folder of a split the annotations are."""
    return next((place / name for name in _LABELS if any((place / name).glob("*.xml"))), place)


def _image_folder(place: Path) -> Path:
    return next((place / name for name in _IMAGES if (place / name).is_dir()), place)


def _images(files: dict[str, _File], root: Path, folders: bool) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The images of annotation files, in their order, and of those that are called otherwise by it, by their ids.

    Where a split is a folder, images without an annotation file follow.
    """
    there: dict[str, list[str]] = defaultdict(list)
    for name in pictures(root, root):
        there[PurePosixPath(name).stem].append(name)
    images: list[dict[str, Any]] = []
    renamed = {}
    for number, (stem, file) in enumerate(files.items(), start=1):
        said = file.image.replace("\\", "/").rpartition("/")[2]
        own = sorted(there[stem], key=lambda name: (PurePosixPath(name).name != said, name))
        name = own[0] if own else said or f"{stem}.jpg"
        if own and said and PurePosixPath(own[0]).name != said and there.get(PurePosixPath(said).stem):
            renamed[number] = name
        images.append({"id": number, "file_name": name, "height": file.height, "width": file.width})
    if folders:
        taken = {image["file_name"] for image in images}
        for name in sorted(name for names in there.values() for name in names if name not in taken):
            images.append({"id": len(images) + 1, "file_name": name, "unlabelled": True})
    return images, renamed


def _annotations(files: Sequence[_File], classes: Sequence[str], from_one: bool) -> list[dict[str, Any]]:
    """The objects of files, the first one's image being number 1."""
    start = float(from_one)
    found: list[dict[str, Any]] = []
    for row, file in enumerate(files):
        for label, (x1, y1, x2, y2), difficult in file.objects:
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": row + 1,
                    "category_id": classes.index(label),
                    "bbox": [x1 - start, y1 - start, x2 - x1 + start, y2 - y1 + start],
                    "difficult": {"0": 0, "1": 1, "": 0}.get(difficult, difficult),
                }
            )
    return found


def _parsed(file: Path, checks: Checks) -> _File:
    """What an annotation file says."""
    text = read_text(file, checks)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{file} defines a document type; annotations have none.")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file} is not valid XML: {error}.") from error
    if root.tag != "annotation":
        raise DataError(f"{file} holds <{root.tag}>; it must be an <annotation>.")
    height, width = (_side(file, root, name) for name in ("height", "width"))
    objects = []
    for number, entry in enumerate(root.findall("object"), start=1):
        label, corners = _text(entry, "name"), [_text(entry, f"bndbox/{name}") for name in _CORNERS]
        if not label:
            raise DataError(f"{file}: object {number} has no name, which is its class.")
        try:
            box = tuple(float(corner) for corner in corners)
        except ValueError:
            shown = ", ".join(f"{name} {corner!r}" for name, corner in zip(_CORNERS, corners, strict=True))
            raise DataError(f"{file}: object {number} has {shown}; its bndbox must have four numbers.") from None
        objects.append((label, box, _text(entry, "difficult")))
    return _File(_text(root, "filename"), height, width, objects)


def _side(file: Path, root: ElementTree.Element, name: str) -> int | None:
    said = _text(root, f"size/{name}")
    try:
        return int(said) if said else None
    except ValueError:
        raise DataError(f"{file} has {name} {said!r}; it must be a whole number of pixels.") from None


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
