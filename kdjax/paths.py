"""Paths as people write them, on this machine or in a bucket."""

import contextlib
import functools
import importlib
import itertools
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import util
from typing import Any, TypeAlias, TypeGuard

from etils import epath

from kdjax.errors import AwayError, StorageError, UnreachedError, UserError, quoted, reason

Path: TypeAlias = pathlib.Path | epath.Path
"""Of this machine's files one of pathlib; of a bucket's one of etils, which has pathlib's methods."""

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)")
_PACKAGES = ("gcsfs", "google.cloud.storage")
"""What reads and writes buckets: etils' paths the first, Orbax both."""


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path that a person wrote: ``gs://bucket/runs``, or one on this machine, whose leading ``~`` is the home.

    Shells leave ``--workdir=~/runs`` as it is. The first time that a bucket is named it is asked for.

    >>> as_path("~/runs/first") == pathlib.Path.home() / "runs" / "first"
    True
    >>> as_path("s3://bucket/first")
    Traceback (most recent call last):
    kdjax.errors.UserError: s3://bucket/first is in no place that is known: name a local folder or gs://<bucket>/<folder>.

    Raises:
        UserError: a URL of something else, or the home directory of somebody unknown.
        UnreachedError: a bucket that cannot be reached for now.
        StorageError: a bucket that is not there, or not for this account.
    """
    text = os.fspath(path)
    if url := _URL.fullmatch(text):
        bucket, _, inner = url[2].partition("/")  # pathlib made one slash of two.
        if url[1].lower() != "gs" or not bucket:
            raise UserError(f"{text} is in no place that is known: name a local folder or gs://<bucket>/<folder>.")
        return _reached(bucket) / inner.strip("/")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} begins with a home directory that is not known: write it out.") from error


@functools.cache
def _reached(bucket: str) -> epath.Path:
    """A bucket that is there."""
    take_client(f"gs://{bucket}")
    path = epath.Path(f"gs://{bucket}")
    try:
        path.stat()
    except Exception as error:  # Whatever network, credentials and packages raise.
        kind = UnreachedError if is_away(error) else StorageError
        raise kind(
            f"gs://{bucket} cannot be reached ({_named(error)}): check its name, this machine's network and what its "
            "account may do there."
        ) from error
    return path


def take_client(url: str) -> None:
    """Lets all paths of buckets go through our client; before the first of them is used, for etils remembers.

    Args:
        url: what needs it.

    Raises:
        UserError: a package is missing.
    """
    if lacking := [package for package in _PACKAGES if not _installed(package)]:
        raise UserError(f"{url} needs the package {lacking[0]}: install it with `pip install 'kdjax[gcs]'`.")
    _register()


@functools.cache
def _register() -> None:
    # Where TensorFlow is installed, etils would take its file system instead, which is another one.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Other processes write there, too: what was listed before does not hold.
    fsspec = importlib.import_module("fsspec")
    fsspec.config.conf["gs"] = {"use_listings_cache": False}
    fsspec.register_implementation("gcs", _client(), clobber=True)  # What etils calls gs://.
    for logger in ("gcsfs", "google.auth"):  # They print what they also raise.
        logging.getLogger(logger).setLevel(logging.CRITICAL)


def has_client() -> bool:
    """Whether :func:`take_client` was called: only then a path may be in a bucket."""
    return _register.cache_info().currsize > 0


def look_up(path: epath.Path) -> None:
    """Asks for the bucket itself, as Orbax does that keeps checkpoints there, and listing its objects does not.

    Raises:
        OSError: this account may not.
    """
    importlib.import_module("fsspec").filesystem("gcs").call("GET", "b/{}", str(path).split("/")[2], json_out=True)


@functools.cache
def _client() -> type:
    """A client of buckets that raises :class:`AwayError` where one does not answer for a minute of attempts.

    To gcsfs itself that is an error of a file, or means that there is no such folder.
    """
    gcsfs: Any = importlib.import_module("gcsfs")

    class Buckets(gcsfs.GCSFileSystem):
        async def _call(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super()._call(*args, **kwargs)
            except Exception as error:
                if not is_away(error):
                    raise
                raise AwayError(_named(error)) from error

        call = importlib.import_module("fsspec.asyn").sync_wrapper(_call)  # What its files write by.

        async def _isfile(self, path: str) -> bool:
            try:
                return bool((await self._info(path))["type"] == "file")
            except OSError:
                return False

    return Buckets


def is_away(error: BaseException) -> bool:
    """Whether an error says that a bucket is out of reach for now, after its client has tried for a minute.

    What a bucket refuses, as an account that may not read it, is none of these.
    """
    retry: Any = sys.modules.get("gcsfs.retry")  # Without it no bucket was asked for.
    return retry is not None and (
        isinstance(error, AwayError | TimeoutError) or bool(retry.is_retriable(error)) or _is_transient(error)
    )


def _is_transient(error: BaseException) -> bool:
    """As :func:`is_away`, of the client by which Orbax asks for buckets."""
    kinds: Any = sys.modules.get("google.api_core.exceptions")
    return kinds is not None and isinstance(error, kinds.ServerError | kinds.TooManyRequests | kinds.RetryError)


def _refuses(error: BaseException) -> bool:
    """Whether an error of a client says that a bucket is not for this account."""
    if type(error) is OSError:
        return error.errno is None and str(error).startswith("Forbidden")  # In gcsfs' words.
    return type(error).__module__.startswith(("gcsfs.", "google.")) and getattr(error, "code", None) in (401, 403)


def _named(error: BaseException) -> str:
    return quoted(error) if isinstance(error, AwayError) else f"{type(error).__name__}: {quoted(error)}"


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Says in words that a bucket is out of reach for now, or not for this account.

    Raises:
        UnreachedError: in place of the client's error, where :func:`is_away`.
        StorageError: in place of a client's error that says what this account may not do.
    """
    try:
        yield
    except Exception as error:
        if _refuses(error):
            raise StorageError(
                f"A bucket does not let this account do all that a run does there ({quoted(error)}): give it the roles "
                "that docs/hosts.md names, then the same command again; nothing that was saved is lost."
            ) from error
        if not is_away(error):
            raise
        raise UnreachedError(
            f"A bucket cannot be reached any more ({_named(error)}): give the same command again once it can be; "
            "nothing that was saved is lost."
        ) from error


def unreadable(what: str, error: OSError) -> UserError:
    """What to raise where a file that was there cannot be read any more."""
    kind = UnreachedError if is_away(error) else StorageError
    return kind(f"{what} cannot be read any more ({reason(error)}).")


def _installed(package: str) -> bool:
    try:
        return util.find_spec(package) is not None
    except ModuleNotFoundError:  # Of what stands before the last dot.
        return False


def in_bucket(path: Path) -> TypeGuard[epath.Path]:
    """Whether a path of :func:`as_path` is in a bucket: there are no moves and no links, and an object is whole."""
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """The path from the root; in a bucket every one is."""
    return path if in_bucket(path) else path.absolute()


def exists(path: Path) -> bool:
    """Whether something is there; not, as ``os.path`` has it, under a name that nothing can have."""
    return path.exists() if in_bucket(path) else os.path.exists(path)


def is_file(path: Path) -> bool:
    """Whether a file is there, as :func:`exists`."""
    return path.is_file() if in_bucket(path) else os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether a folder is there, as :func:`exists`."""
    return path.is_dir() if in_bucket(path) else os.path.isdir(path)


def remove(folder: Path) -> None:
    """Removes a folder and all that is in it, if it is there."""
    if in_bucket(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Gives a damaged file or folder the name ``<name>.corrupt``, or one with a number; returns that."""
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (path.with_name(f"{path.name}.corrupt{suffix}") for suffix in suffixes)
    aside = next(name for name in names if not exists(name))
    move(path, aside)
    return aside


def move(path: Path, target: Path, mark: str = "") -> None:
    """Gives a file or a folder another name; in a bucket files are copied, and the old ones removed.

    Args:
        path: what there is.
        target: what is not there yet.
        mark: name of the file that says that a folder is whole: it is copied last and removed first, so that whenever
            this is cut off a whole folder has one, and one that is not has none.
    """
    if not in_bucket(path):
        path.rename(target)
    elif path.is_file():
        target.write_bytes(path.read_bytes())
        path.unlink()
    else:
        copy_files(path, target, mark)
        if mark:
            (path / mark).unlink(missing_ok=True)
        remove(path)


def copy_files(folder: Path, target: Path, mark: str = "") -> None:
    """Copies what is in a folder of a bucket; last the file of this name, which says that the folder is whole."""
    for file in sorted(files_in(folder), key=lambda file: file == folder / mark):
        (target / file.relative_to(folder)).write_bytes(file.read_bytes())


def size_of(file: Path) -> int:
    """Bytes in a file.

    Raises:
        OSError: there is no such file.
    """
    return file.stat().length if in_bucket(file) else file.stat().st_size


def stamp_of(file: Path) -> tuple[int, int]:
    """Bytes in a file, and the time of its last change in nanoseconds since 1970.

    Raises:
        OSError: there is no such file.
    """
    if in_bucket(file):
        found = file.stat()
        return found.length, int(found.mtime * 1e9)
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def on_this_machine(file: Path) -> Iterator[pathlib.Path]:
    """A file, or of one in a bucket a copy for as long as it is needed: for readers that go back and forth."""
    if not in_bucket(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / file.name
        with file.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield copy


def files_in(folder: Path) -> Iterator[Path]:
    """The files in a folder of a bucket, and in the folders below it."""
    # A console makes an object for a folder, which is listed by its name as if it were inside, perhaps beside what is.
    for path in dict.fromkeys(folder.iterdir()):
        if path.name == folder.name and not path.exists():
            continue
        if path.is_dir():
            yield from files_in(path)
        else:
            yield path
