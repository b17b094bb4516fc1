"""The one place where kdjax spreads work over devices.

A step is written for one device, with named-axis means over ``AXIS``; :func:`parallel` maps it. State and teacher are
single logical arrays replicated over the devices (never a stacked copy per device), so that Orbax saves and restores
them as they are, on any number of devices.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
"""Name of the mapped axis: what a module takes as ``axis_name`` inside a step."""

Tree = TypeVar("Tree")


def replicate(tree: Tree, devices: list[jax.Device] | None = None) -> Tree:
    """Places every array of ``tree`` whole on each of ``devices`` (all by default), once.

    Arrays handed to a mapped function from one device are broadcast again at every call; replicated ones are not.
    """
    mesh = Mesh(np.asarray(devices or jax.devices()), AXIS)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(batch: Tree, devices: list[jax.Device] | None = None) -> Tree:
    """Reshapes host arrays (N, ...) to (D, N / D, ...) for the D local devices."""
    count = len(devices) if devices else jax.local_device_count()
    return jax.tree.map(lambda x: np.asarray(x).reshape(count, -1, *np.shape(x)[1:]), batch)


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
