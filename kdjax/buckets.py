"""The client of buckets, as etils' paths find it: one that says so when a bucket is out of reach."""

from typing import Any

import gcsfs

from kdjax.errors import AwayError, quoted
from kdjax.paths import is_away


class Buckets(gcsfs.GCSFileSystem):  # type: ignore[misc]
    """No answer is neither "no" nor an error of a file: what reads files would take them for missing or damaged.

    Raises:
        AwayError: the bucket did not answer for a minute of attempts.
    """

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._call(*args, **kwargs)
        except Exception as error:
            if not is_away(error):
                raise
            raise AwayError(f"{type(error).__name__}: {quoted(error)}") from error

    async def _isfile(self, path: str) -> bool:
        try:
            return bool((await self._info(path))["type"] == "file")
        except OSError:
            return False
