"""Trees of arrays in folders of Orbax's: read for one process alone, and held against what they were.

Whatever Orbax raises over damaged files is met in here.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from kdjax.errors import DataError, StorageError, UnreachedError, parsing
from kdjax.files import AWAY_WORDS, unread
from kdjax.paths import Path


class DamagedError(DataError):
    """What was saved is not there any more, or not as it was saved."""


class OthersError(Exception):
    """Arrays are sound, and others than wanted; it says which."""


def digest(arrays: Any, kind: Callable[[], Any] = hashlib.sha256) -> str:
    """Hexadecimal digest, sha256 by default, of all arrays' bytes, in the order of their paths."""
    digest = kind()
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def digests(arrays: Any) -> dict[str, str]:
    """By path: what an array is, and the hexadecimal xxh3 of its bytes, which finds what chance has changed.

    It takes an eighteenth of sha256's time: checkpoints are many.
    """
    return {path: f"{kind} {digest(x, xxhash.xxh3_128)}" for path, kind, x in _described(arrays)}


def _changed(arrays: Any, known: Mapping[str, str]) -> list[str]:
    """Paths of the arrays that are not what :func:`digests` said, or earlier versions, which took sha256."""
    return [
        path
        for path, kind, x in _described(arrays)
        if known[path] not in (f"{kind} {digest(x, of)}" for of in (xxhash.xxh3_128, hashlib.sha256))
    ]


def _described(arrays: Any) -> Iterator[tuple[str, str, Any]]:
    """Paths, what is there, and the arrays."""
    for (path, kind), x in zip(kinds(arrays).items(), jax.tree.leaves(arrays), strict=True):
        yield path, kind, x


def kinds(tree: Any) -> dict[str, str]:
    """By path, dtype and shape of the arrays of a tree, such as float32[3,5]."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"
        for path, x in leaves
    }


def misfits(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The first arrays that differ between two of :func:`kinds`, in words; "" where none does.

    Orbax would say so only for some, in pages, and casts another dtype silently.
    """
    paths = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
    lines = [f"{path} is {old.get(path, 'absent')}, wanted {new.get(path, 'absent')}" for path in paths[:3]]
    return "; ".join(lines) + f" and {len(paths) - 3} more" * (len(paths) > 3)


def alone() -> ocp.StandardCheckpointer:
    """Writes and reads arrays for this process, whatever others do meanwhile."""
    me = jax.process_index()
    # The prefix keeps its barriers apart from those of another process that does the same.
    alone = ocp.options.MultiprocessingOptions(me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}")
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


ADVICE = "take an undamaged copy of that folder, or make it anew"


def read_arrays(arrays: Path, like: Any = None, known: Mapping[str, str] | None = None) -> Any:
    """The arrays in a folder of Orbax's, for this process alone.

    Args:
        arrays: the folder.
        like: their shapes and dtypes and where they are to be; None for all that there are, on the default device.
        known: what :func:`digests` said of them before they were saved.

    Raises:
        DamagedError: they cannot be read, or are not those that were saved.
        StorageError: they cannot be read now, which says nothing of them.
        UnreachedError: the same, of a bucket that cannot be reached.
        OthersError: they are sound, and others than wanted.
    """
    what = f"The arrays in {arrays}"
    before = {path: kind.partition(" ")[0] for path, kind in known.items()} if known is not None else None
    if like is not None and before is not None and (others := misfits(before, kinds(like))):
        raise OthersError(others)
    with alone() as checkpointer:
        with _orbax(what):
            saved = checkpointer.metadata(arrays).item_metadata.tree
        if before is not None and (others := misfits(kinds(saved), before)):
            raise DamagedError(f"{what} are damaged: {others}; {ADVICE}.")
        if like is not None and (others := misfits(kinds(saved), kinds(like))):
            raise OthersError(others)
        with _orbax(what):
            read = checkpointer.restore(arrays, jax.tree.map(_on_default_device, saved) if like is None else like)
    if known is not None and (changed := _changed(read, known)):
        raise DamagedError(f"{what} are damaged: {', '.join(changed[:3])} are not what was saved; {ADVICE}.")
    return read


@contextlib.contextmanager
def _orbax(what: str) -> Iterator[None]:
    """Says what cannot be read where Orbax fails: it raises whatever missing or damaged files lead it to."""
    try:
        with parsing():
            yield
    except DataError as error:
        if isinstance(error.__cause__, jax.errors.JaxRuntimeError | MemoryError):
            # The files may be sound: there is no room for them.
            raise error.__cause__ from None
        if words := unread(error):
            kind = UnreachedError if words in AWAY_WORDS else StorageError
            raise kind(f"{what} cannot be read now ({words}); mend that, and start again.") from error
        raise DamagedError(f"{what} cannot be read ({str(error)[:200]}); {ADVICE}.") from error


def _on_default_device(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
