"""Files of annotated images in folders: what tools call splits, names that mean the same file, texts and headers."""

import io
import os
import re
import stat
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from kdjax.data import flaws
from kdjax.data.flaws import Checks, DataReport
from kdjax.data.images import Header, ImageError, for_all, read_header
from kdjax.errors import DataError, UserError
from kdjax.paths import Path, as_path, files_in, in_bucket, size_of

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""What tools call the splits."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_LONGEST_NAME = 255
"""Bytes in one part of a path, which file systems allow."""


class NoSplitError(UserError):
    """The folder has no such split; nothing in it is wrong."""

    def __init__(self, sentence: str, split: str):
        super().__init__(sentence)
        self.split = split


class _OutsideError(ImageError):
    """A file that lies elsewhere."""


class _MissingError(ImageError):
    """A file that is not there."""


def readable(folder: str | os.PathLike[str], kind: str) -> Path:
    """The path of a folder of data.

    Raises:
        UserError: it is none, or cannot be read.
    """
    path = as_path(folder)
    if not path.is_dir() or not (in_bucket(path) or os.access(path, os.R_OK | os.X_OK)):
        raise UserError(f"{kind}:{path} is no folder that can be read.")
    return path


def split_words(split: str) -> tuple[str, ...]:
    """What a split may be called, itself first.

    >>> split_words("validation"), split_words("holiday")
    (('validation', 'val', 'valid'), ('holiday',))
    """
    return SPLITS.get(split, (split,))


def other_splits(split: str) -> tuple[str, ...]:
    """What the other splits may be called."""
    return tuple(word for other in SPLITS if other != split for word in SPLITS[other])


def pictures(root: Path, place: Path) -> list[str]:
    """The files in a folder, and in the folders below it, that are called as images are, relative to ``root``; sorted.

    Links to folders are not followed.
    """
    return sorted(path.replace(os.sep, "/") for path in _files(root, place) if path.lower().endswith(_PICTURES))


def _files(root: Path, place: Path) -> Iterator[str]:
    """The files in a folder, and in the folders below it, relative to ``root``."""
    if in_bucket(place):
        yield from (os.path.relpath(path, root) for path in files_in(place))
        return
    for parent, _, files in os.walk(place):
        inner = os.path.relpath(parent, root)
        yield from (os.path.normpath(os.path.join(inner, file)) for file in files)


def no_split(folder: Path, split: str, lacks: str, advice: str) -> NoSplitError:
    """The sentence about a split that is not there.

    Args:
        folder: of the data.
        split: the one that is asked for.
        lacks: what the folder has not.
        advice: how to name what it has.
    """
    held_out = (
        "; a part of the training split is config.data.eval_split='train[held_out]', and what remains 'train[kept]'"
    )
    return NoSplitError(f"{folder} has {lacks}: {advice}{held_out * (split == 'validation')}.", split)


def read_text(file: Path, checks: Checks) -> str:
    """The whole of a text file.

    Raises:
        DataError: it is too large, cannot be read, or is no plain UTF-8.
    """
    try:
        if not in_bucket(file) and not stat.S_ISREG(os.stat(file).st_mode):
            raise DataError(f"{file} is no file that can be read.")
        size = size_of(file)
        if size > checks.most_json_bytes:
            raise DataError(
                f"{file} has {size:,} bytes, more than the {checks.most_json_bytes:,} that are read; "
                "config.data.max_json_bytes raises that limit."
            )
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or 'no such file'}).") from error
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} begins with a byte order mark; it must be plain UTF-8, saved without one.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not in UTF-8: {error}.") from error


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


def spellings(name: str) -> tuple[str, ...]:
    """What a file of that name may be called that was written on another system, or for the web."""
    plain = urllib.parse.unquote(name).replace("\\", "/")
    return name, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))


def headers_of(
    folder: Path, root: Path, identity: np.ndarray, names: Sequence[str], report: DataReport
) -> tuple[list[str], list[Header | ImageError]]:
    """The names of the files that are there, and their headers or what is wrong with them."""
    names, checks = list(names), report.checks
    allowed = [os.path.realpath(path) for path in (folder, root)]

    def header_of(name: str) -> Header | ImageError:
        return _object_header(root / name, checks) if in_bucket(root) else _file_header(root, name, allowed, checks)

    def headers(rows: Sequence[int]) -> list[Header | ImageError]:
        return for_all(lambda k: header_of(names[rows[k]]), len(rows), together=checks.together)

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
    for path in _files(root, root):
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


def _object_header(path: Path, checks: Checks) -> Header | ImageError:
    """As :func:`_file_header`, of an image in a bucket, where there are no links."""
    try:
        return read_header(io.BytesIO(path.read_bytes()), checks.reading)
    except ImageError as error:
        return error
    except FileNotFoundError:
        return _MissingError("is missing")
    except OSError as error:
        return ImageError(f"cannot be read ({error})")


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
