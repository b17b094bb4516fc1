"""What is remembered of a run's image files, so that other bytes under the same names are found when it goes on.

Opening a source reads some bytes of every file; a flipped bit between them would be other pixels in the same run. So a
file of the run's folder has the size and the time of the last change of every image file, which cost one question to
the file system at every start, and the SHA-256 of those that were once read for it.
"""

import hashlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from kdjax.data.images import for_all
from kdjax.data.indexed import Files, IndexedSource
from kdjax.errors import DataError, StorageError, parsing, reason
from kdjax.files import replace_bytes
from kdjax.paths import Path, stamp_of, unreadable
from kdjax.types import Source

MANIFEST_FILE = "data_manifest.npz"

_ROW = np.dtype([("size", np.int64), ("time", np.int64), ("digest", np.int64), ("sha256", np.uint8, 32)])
"""Of a file: bytes, nanoseconds since 1970, what :class:`kdjax.data.tables.Images` has, and zeros where nobody read it.
"""
_SHOWN = 5


class Seen(NamedTuple):
    """Files of a source, and what they are without reading them."""

    origin: str
    """Of the source."""
    files: Files
    rows: np.ndarray
    """(n,) of ``_ROW``, the SHA-256 zeros."""


def look(splits: Mapping[str, Source]) -> dict[str, Seen]:
    """What the image files of a run are without reading them; the processes that opened them together look together.

    Sources whose images have no files of their own are left out: records have checksums.

    Args:
        splits: the sources by name.

    Returns:
        by name of the split, kind and names of the files: other images are other data, which the stages' identities
        tell.

    Raises:
        StorageError: some cannot be found any more.
    """
    found = {}
    for name, source in splits.items():
        if not isinstance(source, IndexedSource):
            continue
        for files in source.files:
            names = hashlib.sha256("\n".join(files.names).encode(errors="surrogatepass")).hexdigest()
            kind = "" if files.kind == "image" else f"-{files.kind.replace(' ', '-')}"
            rows = _seen(files, together=source.report.checks.together)
            found[f"{name}{kind}-{names[:16]}"] = Seen(source.origin, files, rows)
    return found


def check_manifest(file: Path, seen: Mapping[str, Seen], *, begun: bool, whole: bool) -> None:
    """Holds the image files of a run against what they were when it began, and remembers what they are.

    Args:
        file: of the manifest.
        seen: what :func:`look` finds.
        begun: whether there is something to go on with; otherwise the files may be what they are.
        whole: read all files, and not only those whose bytes are known and whose time has changed.

    Raises:
        DataError: some have other bytes than before, or the manifest is damaged.
        StorageError: some cannot be read any more, or the manifest not be written.
    """
    known = _read(file) if begun and file.is_file() else {}
    found = {key: _settled(one, known.get(key), whole, file) for key, one in seen.items()}
    if any(key not in known or not np.array_equal(rows, known[key]) for key, rows in found.items()):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **cast(Any, found))
        try:
            replace_bytes(file, buffer.getvalue())
        except OSError as error:
            raise StorageError(f"{file} cannot be written ({reason(error)}).") from error


def _read(file: Path) -> dict[str, np.ndarray]:
    """The rows by the key of their split."""
    try:
        with parsing(), np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as content:
            rows = dict(content)
    except DataError as error:
        raise DataError(
            f"{file} is damaged ({error}): delete it, and the image files are remembered as they are now."
        ) from error
    return {key: x for key, x in rows.items() if x.dtype == _ROW}


def _settled(seen: Seen, before: np.ndarray | None, whole: bool, file: Path) -> np.ndarray:
    """The rows of a source's files, (n,) of ``_ROW``; refuses files that have other bytes than before."""
    origin, files, rows = seen.origin, seen.files, seen.rows.copy()
    if before is None:
        before = rows.copy()
    known, moved = before["sha256"].any(axis=1), rows["time"] != before["time"]
    changed = (rows["size"] != before["size"]) | (rows["digest"] != before["digest"])
    rows["sha256"] = before["sha256"]
    read = np.flatnonzero(~changed & (whole | (moved & known)))
    rows["sha256"][read] = _digests(files, read)
    changed |= known & (rows["sha256"] != before["sha256"]).any(axis=1)
    if changed.any():
        raise DataError(
            f"{origin} has {_some(files, changed)} with other bytes than when this run began: put them back as "
            f"they were, choose another --workdir, or delete the stages in {file.parent} to start anew."
        )
    if (unknown := moved & ~known).any():
        print(
            f"{origin} has {_some(files, unknown)} with another time than at the last start. Sizes, and the "
            "bytes that every start reads, are the same; config.data.digest=True, from the first start on, compares "
            "all bytes.",
            flush=True,
        )
    return rows


def _seen(files: Files, *, together: bool) -> np.ndarray:
    """What files are without reading them."""

    def stamp(row: int) -> tuple[int, int]:
        try:
            return stamp_of(files.path(row))
        except OSError as error:
            raise unreadable(files.describe(row), error) from error

    rows = np.zeros(len(files.names), _ROW)
    stamps = np.array(for_all(stamp, len(rows), together=together), np.int64).reshape(-1, 2)
    rows["size"], rows["time"], rows["digest"] = stamps[:, 0], stamps[:, 1], files.digest
    return rows


def _digests(files: Files, rows: np.ndarray) -> np.ndarray:
    """SHA-256 of some files, (k, 32) uint8."""

    def digest(place: int) -> bytes:
        row = int(rows[place])
        try:
            return hashlib.sha256(files.read(row)).digest()
        except OSError as error:
            raise unreadable(files.describe(row), error) from error

    return np.frombuffer(b"".join(for_all(digest, len(rows))), np.uint8).reshape(-1, 32)


def _some(files: Files, chosen: np.ndarray) -> str:
    """How many files of that kind, and the names of the first."""
    rows = np.flatnonzero(chosen)
    names = ", ".join(files.names[row] for row in rows[:_SHOWN].tolist())
    return f"{len(rows)} {files.kind} file{'s' * (len(rows) > 1)} ({names}{', ...' * (len(rows) > _SHOWN)})"
