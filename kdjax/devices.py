"""The one place where kdjax spreads work over devices.

A step is written for one device, with named-axis means over ``AXIS``; :func:`parallel` maps it. State and teacher are
single logical arrays replicated over the devices (never a stacked copy per device), so that Orbax saves and restores
them as they are, on any number of devices.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.paths import as_path, in_bucket

AXIS = "devices"
"""Name of the mapped axis: what a module takes as ``axis_name`` inside a step."""

Tree = TypeVar("Tree")

_CACHE = Path.home() / ".cache" / "kdjax" / "xla"


def cache_compilations(workdir: str | os.PathLike[str] = "") -> None:
    """Lets a second start compile nothing anew; ``JAX_COMPILATION_CACHE_DIR`` moves the cache.

    It is in the home directory, or in the folder ``xla`` of a workdir that is in a bucket: of several processes JAX
    lets number 0 alone write it, so that only a shared one serves the others, and at the next start the hosts of a pod
    may be others.

    Args:
        workdir: of the run, if it is one.

    Raises:
        StorageError: the workdir's bucket cannot be reached.
    """
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not place:
        folder = as_path(workdir)
        place = str(folder / "xla" if in_bucket(folder) else _CACHE)
        jax.config.update("jax_compilation_cache_dir", place)
    if "://" in place:
        # XLA's own caches, which would be inside, are for local files.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def device_count() -> int:
    """Devices that share a batch, of all processes."""
    return jax.device_count()


def globalize(tree: Tree, *, mapped: bool = False) -> Tree:
    """Arrays of this process's devices as arrays of those of all processes: whole on each device, or ``mapped``.

    Nothing is copied. In several processes :func:`parallel` gives and takes the former; Orbax saves the latter, and a
    function that is compiled ahead takes nothing else.

    Args:
        tree: of arrays that are whole on each device of this process, the same on all of them.
        mapped: they are (D, ...) over the devices instead, as :func:`split` makes them, and become (all devices, ...).
    """
    spec = PartitionSpec(AXIS) if mapped else PartitionSpec()
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), AXIS), spec)

    def of_all(x: jax.Array) -> jax.Array:
        shape = (jax.device_count(), *x.shape[1:]) if mapped else x.shape
        return jax.make_array_from_single_device_arrays(shape, sharding, [y.data for y in x.addressable_shards])

    return tree if jax.process_count() == 1 else jax.tree.map(of_all, tree)


def replicate(tree: Tree, devices: list[jax.Device] | None = None) -> Tree:
    """Places every array of ``tree`` whole on each of ``devices`` (this process's by default), once.

    Arrays handed to a mapped function from one device are broadcast again at every call; replicated ones are not. Of
    several processes each calls it with the same values.
    """
    mesh = Mesh(np.asarray(devices or jax.local_devices()), AXIS)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(batch: Tree, devices: list[jax.Device] | None = None, *, parts: int = 1) -> Tree:
    """Reshapes host arrays (N, ...) to (D, N / D, ...) and places a part on each of the D devices of this process.

    The copies may be under way when this returns: the arrays given must not change any more.

    A step that works through its share in ``parts`` meets, in its part p, images of the batch's p-th part only: the
    parts hold the same images however many devices share them.
    """
    devices = devices or jax.local_devices()
    count = len(devices)

    def reshape(x: jax.Array) -> np.ndarray:
        by_part = np.asarray(x).reshape(parts, count, -1, *x.shape[1:])
        return by_part.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

    mesh = Mesh(np.asarray(devices), AXIS)
    return jax.device_put(jax.tree.map(reshape, batch), NamedSharding(mesh, PartitionSpec(AXIS)))


class Prefetch(Generic[Tree]):
    """Batches placed on the devices, one ahead of the consumer, so that no step waits for a copy.

    A thread takes them from an iterator and places them with :func:`split`; leaving the context ends it.
    """

    def __init__(self, batches: Iterator[Tree], *, parts: int = 1):
        """Begins with the first batch at once.

        Args:
            batches: of host arrays (N, ...), which nobody changes afterwards.
            parts: as :func:`split` has it.
        """
        self._batches, self._parts = batches, parts
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._upcoming = self._pool.submit(self._fetch)

    def _fetch(self) -> Tree:
        return split(next(self._batches), parts=self._parts)

    def ready(self) -> bool:
        """Whether the next batch is there."""
        return self._upcoming.done()

    def __next__(self) -> Tree:
        batch = self._upcoming.result()
        self._upcoming = self._pool.submit(self._fetch)
        return batch

    def __iter__(self) -> "Prefetch[Tree]":
        return self

    def __enter__(self) -> "Prefetch[Tree]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def parallel(
    step: Callable[..., Any],
    *,
    in_axes: tuple[int | None, ...],
    replicated: bool,
    devices: list[jax.Device] | None = None,
) -> Callable[..., Any]:
    """Maps a per-device ``step`` over ``devices`` (all by default).

    Args:
        step: function of one device's arguments; ``AXIS`` names the mapped axis inside it.
        in_axes: 0 for arguments made by :func:`split`, None for those made by :func:`replicate`.
        replicated: True if every device computes the same outputs (a training step, whose first argument is then
            donated): they come back as one logical array. False if outputs differ by device: (D, ...) comes back.
        devices: the devices to use.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=in_axes,
        out_axes=None if replicated else 0,
        donate_argnums=(0,) if replicated else (),
        devices=devices,
    )
