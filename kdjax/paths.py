"""Paths as people write them."""

import os
import re
from pathlib import Path

from kdjax.errors import UserError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/.*")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine, in which a leading ``~`` is the home directory.

    Shells leave ``--workdir=~/runs`` as it is.

    >>> local_path("~/runs/first") == Path.home() / "runs" / "first"
    True
    >>> local_path("gs://bucket/first")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    kdjax.errors.UserError: gs://bucket/first is no path on this machine: name a local folder, ...

    Raises:
        UserError: a URL, such as ``gs://bucket/runs``, or the home directory of somebody unknown.
    """
    if _URL.fullmatch(os.fspath(path)):
        raise UserError(
            f"{os.fspath(path)} is no path on this machine: name a local folder, such as one where the bucket is "
            "mounted."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{os.fspath(path)} begins with a home directory that is not known: write it out.") from error
