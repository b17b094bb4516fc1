"""The one place where kdjax spreads work over devices.

A step is written for one device, with named-axis means over ``AXIS``; :func:`parallel` maps it. State and teacher are
single logical arrays replicated over the devices (never a stacked copy per device), so that Orbax saves and restores
them as they are, on any number of devices.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
"""Name of the mapped axis: what a module takes as ``axis_name`` inside a step."""

Tree = TypeVar("Tree")

_CACHE = Path.home() / ".cache" / "kdjax" / "xla"


def cache_compilations() -> None:
    """Lets a second start compile nothing anew; ``JAX_COMPILATION_CACHE_DIR`` moves the cache."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(_CACHE))


def replicate(tree: Tree, devices: list[jax.Device] | None = None) -> Tree:
    """Places every array of ``tree`` whole on each of ``devices`` (all by default), once.

    Arrays handed to a mapped function from one device are broadcast again at every call; replicated ones are not.
    """
    mesh = Mesh(np.asarray(devices or jax.devices()), AXIS)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(batch: Tree, devices: list[jax.Device] | None = None, *, parts: int = 1) -> Tree:
    """Reshapes host arrays (N, ...) to (D, N / D, ...) for the D local devices.

    A step that works through its share in ``parts`` meets, in its part p, images of the batch's p-th part only: the
    parts hold the same images however many devices share them.
    """
    count = len(devices) if devices else jax.local_device_count()

    def reshape(x: jax.Array) -> np.ndarray:
        by_part = np.asarray(x).reshape(parts, count, -1, *x.shape[1:])
        return by_part.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

    return jax.tree.map(reshape, batch)


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
