"""People's own data as YOLO's tools write them: a text file of objects for each image, in fractions of it.

Ultralytics, Roboflow, CVAT, Label Studio, LabelImg and Darknet agree on the lines, not on where files lie.
"""

import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from kdjax.data.annotated import annotated_source, sliced
from kdjax.data.flaws import DEFAULT, Checks, DataReport
from kdjax.data.folders import no_split, other_splits, pictures, read_text, readable, split_words
from kdjax.data.images import for_all
from kdjax.data.object_source import IndexedObjects
from kdjax.data.outlines import PolygonStore
from kdjax.errors import DataError, UserError, quoted
from kdjax.paths import Path, as_path, exists, in_bucket, is_file, is_folder

_NAMES = ("classes.txt", "obj.names", "labels.txt", "labels/classes.txt", "train/classes.txt")
"""Files with a class in each line, where there is no yaml."""
_FARTHEST = 2.0
"""Larger numbers are no fractions that annotators let stand a little outside of the image."""
_OUTSIDE = 0.02
"""By how much they do."""
_FORM = "each line must be a class and four numbers, or a class and the corners of an outline"


def open_yolo(folder: str | os.PathLike[str], split: str, checks: Checks = DEFAULT) -> IndexedObjects:
    """Opens one split of images with YOLO's text files, after checking all of it.

    A line is ``class x y width height``, the centre and the size of a box, or ``class x1 y1 x2 y2 x3 y3 ...``, an
    outline; numbers are fractions of the image's width and height, classes count from 0. Points of poses are not read.
    The file of ``images/a.jpg`` is ``labels/a.txt``, or ``a.txt`` beside it; an image without one shows nothing.

    Args:
        folder: holds a yaml file with ``names`` and perhaps ``train``, ``val``, ``test`` and ``path``, or is that
            file; or holds a list of the classes, such as ``classes.txt`` or ``obj.names``.
        split: ``train``, ``validation`` or ``test``: what the yaml says, or the folder or the list of images of the
            usual name, ``images/val``, ``valid/images``, ``val``, ``val.txt``; a folder with no split at all is
            ``train``. With a part at the end, see :func:`kdjax.data.annotated.sliced`.
        checks: how flaws are met.

    Raises:
        NoSplitError: the folder has no such split.
        DataError: one sentence with the file, the line or the id, and what is wrong.
    """
    path = as_path(folder)
    file: Path | None = path
    if path.is_file():
        folder, said = path.parent, _parsed(path, checks)
    else:
        folder = readable(path, "yolo")
        file, said = _yaml_file(folder, checks)
    classes, where = _classes(folder, file, said, checks)
    if is_folder(base := folder / str(said.get("path") or "")):
        folder = base if in_bucket(base) else pathlib.Path(os.path.normpath(base))
    name, part = sliced(split)
    names = _images(folder, file, said, name, checks)
    store = PolygonStore()
    lines = _Lines(len(classes), where, "kpt_shape" in said, store, checks)
    images: list[dict[str, Any]] = []
    own = for_all(lambda k: _labels(folder, names[k], checks), len(names), together=checks.together)
    for number, (image, labels) in enumerate(zip(names, own, strict=True), start=1):
        images.append({"id": number, "file_name": image, "unlabelled": labels is None})
        if labels:
            lines.add(labels, number)
    for image, labels in _without_image(folder, names, [labels.file for labels in own if labels], checks):
        images.append({"id": len(images) + 1, "file_name": image})
        lines.add(labels, len(images))
    if all(image.get("unlabelled") for image in images):
        raise DataError(
            f"{folder} has no label file for any of the {len(names)} images of the split {name!r}: that of {names[0]} "
            f"would be {_label_names(names[0])[0]}."
        )
    lines.refuse_other_meanings(str(folder))
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return annotated_source(
        {"images": images, "annotations": lines.annotations, "categories": categories},
        lambda _: folder,
        folder=folder,
        part=part,
        report=DataReport(f"{folder} {split}", checks),
        store=store,
        fractions=True,
    )


def _yaml_file(folder: Path, checks: Checks) -> tuple[Path | None, dict[str, Any]]:
    """The yaml file of a folder that lists classes, and what it says; None and {} where there is none."""
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    said: dict[Path, Any] = {}
    broken: list[DataError] = []
    for file in files:
        try:
            said[file] = _yaml(file, checks)
        except DataError as error:
            broken.append(error)
    found = [file for file, content in said.items() if isinstance(content, dict) and "names" in content]
    if not found and broken and not any((folder / name).is_file() for name in _NAMES):
        raise broken[0]
    if len(found) > 1:
        several = ", ".join(file.name for file in found)
        raise UserError(f"{folder} has several yaml files with names ({several}): name one, yolo:{found[0]}.")
    return (found[0], said[found[0]]) if found else (None, {})


def _yaml(file: Path, checks: Checks) -> Any:
    text = read_text(file, checks)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{file} is not valid yaml: {quoted(error)}.") from error


def _parsed(file: Path, checks: Checks) -> dict[str, Any]:
    said = _yaml(file, checks)
    if not isinstance(said, dict):
        raise DataError(f"{file} holds a {type(said).__name__}; it must have names, and where the images are.")
    return said


def _classes(folder: Path, file: Path | None, said: dict[str, Any], checks: Checks) -> tuple[list[str], Path]:
    """The classes in the order of their numbers, and the file that lists them."""
    if file:
        names = said.get("names")
        if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
            names = [names[number] for number in range(len(names))]
        if isinstance(names, list) and any(isinstance(name, bool) for name in names):
            raise DataError(f"{file} has names that yaml takes for true or false: write them in quotes, such as 'yes'.")
        if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
            raise DataError(
                f"{file} has names {str(said.get('names', 'missing'))[:60]}; they must be a list of classes, or their "
                "numbers from 0 to their names."
            )
        if said.get("nc", len(names)) != len(names):
            raise DataError(f"{file} has nc {said['nc']} and {len(names)} names; both are the number of classes.")
        return [str(name) for name in names], file
    found = [folder / name for name in _NAMES if (folder / name).is_file()] or sorted(folder.glob("*.names"))
    if not found:
        raise DataError(
            f"{folder} says nowhere what its classes are: it must have a yaml file with names, as data.yaml, or "
            "classes.txt with a class in each line."
        )
    lines = [line.strip() for line in read_text(found[0], checks).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not all(lines):
        raise DataError(f"{found[0]} has an empty line or no class; it must have a class in each line.")
    return lines, found[0]


def _images(folder: Path, file: Path | None, said: dict[str, Any], split: str, checks: Checks) -> list[str]:
    """The images of a split, relative to the folder, each once, in the order of their names."""
    words = split_words(split)
    key = next((word for word in words if said.get(word)), None)
    if key:
        entries = said[key] if isinstance(said[key], list) else [said[key]]
        if not all(isinstance(entry, str) for entry in entries):
            raise DataError(
                f"{file} has {key} {str(said[key])[:60]}; it must be a folder, a list of images, or several."
            )
        places = [_place(folder, file.parent if file else folder, entry) for entry in entries]
        if missing := [entry for entry, place in zip(entries, places, strict=True) if place is None]:
            if key == "train" or split == "test":
                raise DataError(f"{file} has {key} {missing[0]!r}, which is not there; it is looked for from {folder}.")
            raise no_split(folder, split, f"no {missing[0]!r}, which {file} names for {key}", "correct it")
    else:
        places = [_usual(folder, words)]
        if places == [None] and split == "train" and not said.get("val") and not _usual(folder, other_splits(split)):
            places = [folder / "images" if (folder / "images").is_dir() else folder]
        if places == [None]:
            raise no_split(folder, split, f"no images for the split {split!r}", "name them in data.yaml")
    found = [image for place in places if place for image in _listed(folder, place, checks)]
    if not found:
        raise DataError(f"{', '.join(map(str, places))} has no image.")
    return sorted(set(found))


def _usual(folder: Path, words: Iterable[str]) -> Path | None:
    """Where the images of a split called by one of the words are usually."""
    usual = [place for word in words for place in (f"images/{word}", f"{word}/images", word, f"{word}.txt")]
    return next((folder / place for place in usual if exists(folder / place)), None)


def _place(folder: Path, home: Path, entry: str) -> Path | None:
    """What a yaml file calls so: from the path that it names or from its own folder, also without leading "../"."""
    inner = entry
    while inner.startswith(("../", "./", "..\\", ".\\")):
        inner = inner[3:] if inner.startswith("..") else inner[2:]
    tried = [folder / entry, home / entry, folder / inner, home / inner]
    found = next((place for place in tried if exists(place)), None)
    if found and not in_bucket(found) and not found.is_relative_to(folder):
        # An absolute path to where a link leads, or one that leaves the folder and comes back.
        inside = os.path.relpath(os.path.realpath(found), os.path.realpath(folder))
        return found if inside.startswith("..") else folder / inside
    return found


def _listed(folder: Path, place: Path, checks: Checks) -> list[str]:
    """The images in a folder, or in the lines of a text file, relative to the folder of the data."""
    if place.is_dir():
        return pictures(folder, place)
    lines = [line.strip() for line in read_text(place, checks).splitlines()]
    found = []
    for line in filter(None, lines):
        # Lists of Ultralytics begin with ./, which is the list's own folder.
        path = place.parent / line if line.startswith("./") else folder / line
        # Those of CVAT with data/, which may not be there.
        parts = pathlib.PurePath(line).parts
        inner = [folder.joinpath(*parts[k:]) for k in range(1, len(parts))]
        path = next((other for other in (path, *inner) if exists(other)), path)
        found.append(os.path.relpath(path, folder).replace(os.sep, "/"))
    return found


def _label_names(image: str) -> list[str]:
    """What the label file of an image may be called: with labels for the last images in its path, or beside it."""
    stem = os.path.splitext(image)[0]
    head, found, tail = f"/{stem}".rpartition("/images/")
    swapped = [f"{head}/labels/{tail}.txt".lstrip("/")] if found else [f"labels/{stem}.txt"]
    return [*swapped, f"{stem}.txt"]


class _Labels(NamedTuple):
    """A label file."""

    file: Path
    text: str


def _labels(folder: Path, image: str, checks: Checks) -> _Labels | None:
    """The label file of an image, None where there is none."""
    file = next((folder / name for name in _label_names(image) if is_file(folder / name)), None)
    return _Labels(file, read_text(file, checks)) if file else None


def _without_image(
    folder: Path, names: Sequence[str], own: Sequence[Path], checks: Checks
) -> list[tuple[str, _Labels]]:
    """Label files beside ``own``, those of some images, that belong to no image, and what that may be called."""
    places = {file.parent for file in own}
    known = {folder / name for image in names for name in _label_names(image)} | {folder / name for name in _NAMES}
    found: list[tuple[str, _Labels]] = []
    others = sorted(file for place in places for file in place.glob("*.txt") if file not in known)
    if not others:
        return found
    of_pictures = {folder / name for image in pictures(folder, folder) for name in _label_names(image)}
    for file in (file for file in others if file not in of_pictures):
        stem = os.path.relpath(file, folder).replace(os.sep, "/").removesuffix(".txt")
        head, inner, tail = f"/{stem}".rpartition("/labels/")
        # A file of numbers; others, such as lists of classes or of images, begin otherwise.
        if is_file(file) and b"".join(file.read_bytes()[:64].split()[:1]).isdigit():
            image = f"{head}/images/{tail}.jpg".lstrip("/") if inner else f"{stem}.jpg"
            found.append((image, _Labels(file, read_text(file, checks))))
    return found


class _Lines:
    """The objects that label files say, collected as COCO's annotations in fractions of their images."""

    def __init__(self, classes: int, where: Path, poses: bool, store: PolygonStore, checks: Checks):
        self.annotations: list[dict[str, Any]] = []
        self._classes, self._where, self._poses, self._store, self._checks = classes, where, poses, store, checks
        self._large: list[str] = []
        """Places of numbers that are no fractions."""
        self._corners: list[str] = []
        """Places of boxes that leave their image, but not if they are read as corners."""

    def add(self, labels: _Labels, image_id: int) -> None:
        """Adds the objects of an image."""
        for number, line in enumerate(labels.text.splitlines(), start=1):
            if words := line.split():
                self._add(words, f"line {number} of {labels.file}", image_id)

    def refuse_other_meanings(self, origin: str) -> None:
        """Refuses numbers of which most are meant otherwise than they are read."""
        for places, what, advice in (
            (self._large, f"with numbers above {_FARTHEST:g}", "pixels where fractions of the image's sides should be"),
            (
                self._corners,
                "that leave their image",
                "x1 y1 x2 y2 where the centre, the width and the height should be",
            ),
        ):
            if 2 * len(places) > len(self.annotations):
                raise DataError(
                    f"{origin} has {len(places)} of {len(self.annotations)} objects {what}, such as {places[0]}: these "
                    f"look like {advice}."
                )

    def _add(self, words: Sequence[str], place: str, image_id: int) -> None:
        try:
            label, *numbers = map(float, words)
        except ValueError:
            raise DataError(f"{place} is {' '.join(words)[:60]!r}; {_FORM}.") from None
        if self._poses:
            numbers = numbers[:4]
        outline = len(numbers) >= 6 and len(numbers) % 2 == 0
        if len(numbers) != 4 and not outline:
            confidence = "; a sixth is a confidence, which predictions have and annotations have not" * (
                len(words) == 6
            )
            raise DataError(f"{place} has {len(words)} numbers; {_FORM}{confidence}.")
        if not label.is_integer() or not all(map(math.isfinite, numbers)):
            raise DataError(f"{place} is {' '.join(words)[:60]!r}; {_FORM}.")
        if not (0 <= label < self._classes or self._checks.lenient):
            raise DataError(
                f"{place} has class {label:g}, and {self._where} has the classes 0 to {self._classes - 1}; "
                "config.data.lenient=True leaves such objects out."
            )
        if max(map(abs, numbers)) > _FARTHEST:
            self._large.append(place)
        entry: dict[str, Any] = {"id": len(self.annotations) + 1, "image_id": image_id, "category_id": int(label)}
        if outline:
            (left, top), (right, bottom) = ((f(numbers[0::2]), f(numbers[1::2])) for f in (min, max))
            entry |= {"bbox": [left, top, right - left, bottom - top], "segmentation": [numbers]}
        else:
            x, y, width, height = numbers
            entry["bbox"] = left, top, _, _ = [x - width / 2, y - height / 2, width, height]
            leaves = min(left, top) < -_OUTSIDE or max(left + width, top + height) > 1 + _OUTSIDE
            if leaves and x < width <= 1 and y < height <= 1:
                self._corners.append(place)
        self.annotations.append(self._store.take(entry))
