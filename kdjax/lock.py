"""Whose workdir it is: one run at a time writes there.

On this machine, and over NFS, the kernel knows who holds it and lets go however that process ends. In a bucket, and
on file systems without ``flock``, the owner renews a file every half a minute; one that was not renewed for three
minutes is nobody's.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from kdjax.errors import Exit, StorageError, UserError, reason
from kdjax.paths import Path, in_bucket

LOCK_FILE = ".lock"
"""In a workdir while a run is in it: JSON that names the process."""

_STARTED = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
_WITHOUT_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

# All in seconds.
_PATIENCE = 1.0
"""For an owner that is just ending, or has not yet written its name."""
_RENEWAL = 30.0
_LOST = 180.0
_SETTLING = 2.0
"""Longer than it takes from reading a file to having written it: then those who did so at once see who was last."""


def take(workdir: Path) -> contextlib.ExitStack:
    """Makes a workdir this process's own until what is returned is closed; a dead owner's is taken over.

    Args:
        workdir: made if missing.

    Raises:
        UserError: another run is in it. Where that is on another host, of which cannot be known whether it is still
            there, the exit code says to start again.
        StorageError: it cannot be written.
    """
    path = workdir / LOCK_FILE
    with contextlib.ExitStack() as taken:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            taken.enter_context(_renewed(path) if in_bucket(path) else _locked(path))
        except OSError as error:
            if in_bucket(path) or error.errno not in _WITHOUT_FLOCK:
                raise StorageError(
                    f"--workdir={workdir} cannot be used ({reason(error)}); name a folder that can be "
                    "written, or a new one."
                ) from error
            taken.enter_context(_renewed(path))
        return taken.pop_all()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """The file, locked by the kernel."""
    deadline = time.monotonic() + _PATIENCE
    while (file := _attempt(path)) is None:
        if time.monotonic() > deadline:
            raise _refusal(path)
        time.sleep(_PATIENCE / 20)
    with file:
        file.truncate(0)
        file.write(json.dumps(_me()))
        file.flush()
        try:
            yield
        finally:
            # While it is locked: whoever has opened it meanwhile sees that it is gone.
            with contextlib.suppress(OSError):
                path.unlink()


def _attempt(path: pathlib.Path) -> TextIO | None:
    """The file, opened and locked; None where another process has it, or has just removed it."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("a+"))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                opened.pop_all()
                return file
    return None


@contextlib.contextmanager
def _renewed(path: Path) -> Iterator[None]:
    """The file, renewed by a thread."""
    me = {**_me(), "token": uuid.uuid4().hex}

    def write() -> None:
        text = json.dumps({**me, "renewed": time.time()})
        # Nobody must read half of it; the objects of a bucket are whole anyway.
        whole = path if in_bucket(path) else path.with_name(f"{LOCK_FILE}.{me['token']}")
        whole.write_text(text)
        if not in_bucket(path):
            os.replace(whole, path)

    def is_others(owner: Mapping[str, Any]) -> bool:
        return owner.get("token", me["token"]) != me["token"]

    def renew() -> None:
        while not ended.wait(_RENEWAL) and not is_others(_owner(path)):
            with contextlib.suppress(Exception):  # Of the network: three minutes leave room for further attempts.
                write()
        if not ended.is_set():
            print(f"kdjax: {_refusal(path)}", file=sys.stderr, flush=True)
            os._exit(Exit.AGAIN)

    if _is_there(_written(path)):
        raise _refusal(path)
    write()
    time.sleep(_SETTLING)
    if is_others(_written(path)):
        raise _refusal(path)
    ended = threading.Event()
    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_RENEWAL)
        with contextlib.suppress(Exception):  # Of the network: in three minutes nobody minds.
            if not is_others(_owner(path)):
                path.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "started": _STARTED}


def _owner(path: Path) -> dict[str, Any]:
    """What a lock's file says of its owner; {} where there is none, or it cannot be read."""
    try:
        return _written(path)
    except Exception:  # Of the network, too.
        return {}


def _written(path: Path) -> dict[str, Any]:
    """What a lock's file says of its owner; {} where there is none, or it is damaged.

    Raises:
        OSError: it cannot be read.
    """
    try:
        said = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_there(owner: Mapping[str, Any]) -> bool:
    """Whether an owner has been heard of, and is not known to have ended."""
    renewed, pid = owner.get("renewed"), owner.get("pid")
    if not isinstance(renewed, float) or time.time() - renewed > _LOST:
        return False
    if owner.get("host") != platform.node() or not isinstance(pid, int):
        return True
    # In a container that was started again everybody has the number of who was there before.
    return owner.get("started") == _STARTED if pid == os.getpid() else _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _refusal(path: Path) -> UserError:
    owner = _owner(path)
    pid, host, started = (owner.get(key, "unknown") for key in ("pid", "host", "started"))
    elsewhere = host != platform.node()
    error = UserError(
        f"{path.parent} is in use: by process {pid} on {host}, which started at {started}. Wait until it has ended, "
        "stop it, or choose another --workdir"
        + "; if that host is gone, start again in three minutes" * elsewhere
        + "."
    )
    if elsewhere:
        error.exit_code = Exit.AGAIN
    return error
