"""Files that are replaced all at once: who reads one, or is killed while writing, finds the old or the new one."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from kdjax.errors import UserError
from kdjax.paths import Path, as_path, in_bucket


@contextlib.contextmanager
def writing(flag: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Says by which flag a path was named that turns out not to be one that can be written.

    Raises:
        UserError: in place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written ({error.strerror or error}).") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as JSON all at once: a reader, or a run killed meanwhile, finds the old file or the new one.

    Arrays become lists; numbers that are not finite become null.
    """
    replace_text(as_path(path), json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Puts ``text`` in the place of a file in one move; in a bucket every object appears whole."""
    if in_bucket(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Lets the operating system write a file, or the names in a folder, to the disk; a bucket does so by itself."""
    if in_bucket(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
    errno.ENOTDIR,
)
"""Errors of storage that is full, protected, damaged or gone."""


def refusal(error: BaseException, folder: Path) -> str:
    """In its own words, why storage refused, where that is what an error is about; "" otherwise.

    Args:
        error: libraries may have wrapped the operating system's in one of theirs, which has its words.
        folder: what was written or read; of a bucket every error counts, networks have many.
    """
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error.strerror or str(error)
    words = " ".join(str(error).split())
    if found := [os.strerror(number) for number in _REFUSALS if os.strerror(number) in words]:
        return found[0]
    if error.__cause__ is not None and (deeper := refusal(error.__cause__, folder)):
        return deeper
    return f"{type(error).__name__}: {words[:200]}" if in_bucket(folder) and isinstance(error, Exception) else ""


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
