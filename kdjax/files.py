"""Files that are replaced all at once: who reads one, or is killed while writing, finds the old or the new one."""

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from kdjax.errors import DataError, StorageError, reason
from kdjax.paths import Path, absolute, as_path, in_bucket, move

T = TypeVar("T")


@contextlib.contextmanager
def writing(flag: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Says by which flag a path was named that turns out not to be one that can be written.

    Raises:
        StorageError: in place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"--{flag}={path} cannot be written ({reason(error)}).") from error


def check_writable(flag: str, path: str | os.PathLike[str]) -> None:
    """Refuses a file that could not be written after all the work.

    Raises:
        StorageError: it cannot be written.
    """
    place = as_path(path)
    if in_bucket(place):
        return
    with writing(flag, path):
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=place.absolute().parent):
            pass


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as JSON all at once: a reader, or a run killed meanwhile, finds the old file or the new one.

    Arrays become lists; numbers that are not finite become null.
    """
    replace_text(as_path(path), json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Writes a list item by item, one in each line of the JSON, and puts it in the place of a file at the end.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with json_list(folder / "list.json") as add:
    ...     add(1)
    ...     add({"a": [2]})
    >>> json.loads((folder / "list.json").read_text())
    [1, {'a': [2]}]
    """
    temporary, between = path.with_name(path.name + ".tmp"), "["
    with temporary.open("w") as file:

        def add(item: Any) -> None:
            nonlocal between
            file.write(f"{between}\n{json.dumps(plain(item), allow_nan=False)}")
            between = ","

        yield add
        file.write("[]\n" if between == "[" else "\n]\n")
    move(temporary, path)


def read_json(path: Path, kind: type[T]) -> T:
    """What a JSON file holds.

    Args:
        path: of the file.
        kind: what it must hold, such as a dict.

    Raises:
        DataError: it is missing, is no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}).") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} is damaged (it holds no {kind.__name__}).")
    return value


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """As :func:`replace_bytes`, in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Puts ``data`` in the place of a file in one move; in a bucket every object appears whole."""
    if in_bucket(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Lets the operating system write the names in a folder to the disk; a bucket does so by itself."""
    if in_bucket(folder):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # Some file systems cannot do that for folders, which is no reason to end.
        if error.errno in _FULL:
            raise
    finally:
        os.close(handle)


def seal(value: Any) -> str:
    """Hexadecimal sha256 of plain JSON, however it is laid out in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_AWAY = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
"""Errors of storage that is full or damaged, and of paths that are gone or protected."""
_BUSY = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
"""Errors of reading that say nothing of what is read."""
AWAY_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""In the words of TensorStore: a bucket that is out of reach for now."""
_BUSY_WORDS = (*AWAY_WORDS, "PERMISSION_DENIED", "UNAUTHENTICATED")
"""In its words, errors of reading that say nothing of what is read."""


def unread(error: BaseException) -> str:
    """In its own words, why storage could not be read, where that says nothing of what is read; "" otherwise."""
    if isinstance(error, OSError) and error.errno in _BUSY:
        return reason(error)
    words = str(error)
    found = [text for text in (*map(os.strerror, _BUSY), *_BUSY_WORDS) if text in words]
    return found[0] if found else unread(error.__cause__) if error.__cause__ is not None else ""


def refusal(error: BaseException, folder: Path) -> str:
    """In its own words, why storage refused, where that is what an error is about; "" otherwise.

    Args:
        error: libraries may have wrapped the operating system's in one of theirs, which has its words.
        folder: what was written or read; of a bucket every error counts, networks have many.
    """
    if isinstance(error, OSError) and error.errno in (*_FULL, *_AWAY):
        return reason(error)
    words = " ".join(str(error).split())
    if found := [os.strerror(number) for number in (*_FULL, *_AWAY) if os.strerror(number) in words]:
        return found[0]
    if error.__cause__ is not None and (deeper := refusal(error.__cause__, folder)):
        return deeper
    return f"{type(error).__name__}: {words[:200]}" if in_bucket(folder) and isinstance(error, Exception) else ""


@contextlib.contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Says in words where the storage of a folder refuses to be written or read.

    Raises:
        StorageError: in place of the operating system's error, unless that is about something else: a file that is
            missing in a folder that is there is a mistake of ours.
    """
    try:
        yield
    except OSError as error:
        named = "" if error.filename is None else os.path.abspath(os.fsdecode(error.filename))
        inside = named.startswith(f"{absolute(folder)}{os.sep}") or named == str(absolute(folder))
        away = error.errno in _AWAY and inside and (error.errno != errno.ENOENT or not folder.exists())
        if error.errno not in _FULL and not away:
            raise
        raise StorageError(
            f"{error.filename or folder} cannot be written or read any more ({error.strerror}); what was saved is as "
            "it was. Make room, or mend it; the same command goes on from there."
        ) from error


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: arrays become lists, numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
