"""Where the annotation files and the images of COCO's format lie, by the names that the usual tools give them."""

import os
import re
import stat
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from kdjax.data import flaws
from kdjax.data.flaws import Checks, DataReport
from kdjax.data.images import Header, ImageError, for_all, read_header
from kdjax.errors import UserError

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""What tools call the splits."""
_LONGEST_NAME = 255
"""Bytes in one part of a path, which file systems allow."""


class _OutsideError(ImageError):
    """A file that lies elsewhere."""


class _MissingError(ImageError):
    """A file that is not there."""


def annotation_file(folder: Path, split: str) -> tuple[Path, str]:
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


def image_folder(folder: Path, file: Path, split: str, stem: str, names: Sequence[str]) -> Path:
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


def unsafe_name(name: str) -> str:
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


def _spellings(name: str) -> tuple[str, ...]:
    """What a file of that name may be called that was written on another system, or for the web."""
    plain = urllib.parse.unquote(name).replace("\\", "/")
    return name, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))


def headers_of(
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
        flaws.OTHER_NAME,
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
        flaws.LINKED,
        identity[rows],
        lambda k: f"image {identity[rows[k]]}, {names[rows[k]]!r} {found[rows[k]]}",
        [names[row] for row in rows],
    )
