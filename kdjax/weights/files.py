"""Files of weights to a dict of arrays; no file is ever executed."""

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize

from kdjax.errors import UserError, parsing
from kdjax.paths import local_path
from kdjax.weights.torch_file import WeightFile, read_torch_file

MOST_BYTES = 2**30
"""A file's tensors may have as many bytes together; the largest detector here has 6e8."""

MOST_CHARACTERS = 256
"""Of a tensor's name; messages repeat names."""

_SAFETENSORS_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_weights(path: str | os.PathLike) -> WeightFile:
    """The tensors in a file, and the names of their classes where it has them.

    Args:
        path: ``.safetensors``; ``.npz``, one array for each tensor; or ``.pth``, ``.pt`` or ``.bin``, written by
            ``torch.save`` in its zip format or the one before PyTorch 1.6: a state dict, or a dict that holds one as
            "state_dict" or "model".

    Raises:
        UserError: one sentence says what is wrong with the file.
    """
    path = local_path(path)
    if path.suffix not in READERS:
        raise UserError(f"{path} cannot be read as weights; its name must end in one of {', '.join(READERS)}.")
    if path.exists() and not path.is_file():
        # Reading from a pipe would wait for ever.
        raise UserError(f"The weights in {path} cannot be read: it is {'a folder' if path.is_dir() else 'no file'}.")
    try:
        file = READERS[path.suffix](path, MOST_BYTES)
    except (UserError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"The weights in {path} cannot be read: {reason}.") from error
    if not file.tensors:
        raise UserError(f"The weights in {path} cannot be read: it has no tensors.")
    for name in file.tensors:
        if not name.isprintable() or len(name) > MOST_CHARACTERS:
            raise UserError(f"The weights in {path} have a tensor with the impossible name {name[:MOST_CHARACTERS]!r}.")
    return file


def _read_safetensors(path: Path, most_bytes: int) -> WeightFile:
    if path.stat().st_size > most_bytes:
        raise UserError(f"it has more than {most_bytes} bytes")
    state = {}
    data = path.read_bytes()
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise UserError(f"it is no whole file of safetensors ({error})") from error
    for name, tensor in tensors:
        if tensor["dtype"] not in _SAFETENSORS_TYPES:
            raise UserError(f"the tensor {name!r} is of {tensor['dtype']}, not of {', '.join(_SAFETENSORS_TYPES)}")
        dtype = np.dtype(_SAFETENSORS_TYPES[tensor["dtype"]])
        state[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return WeightFile(state)


def _read_npz(path: Path, most_bytes: int) -> WeightFile:
    with parsing():
        archive = zipfile.ZipFile(path)
    with archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > most_bytes:
            raise UserError(f"its arrays have more than {most_bytes} bytes")
        for entry in entries:
            with parsing(), archive.open(entry) as file:
                shape, dtype = _npy_header(file)
            if not all(type(side) is int and side >= 0 for side in shape):
                raise UserError(f"the array {entry.filename!r} has the impossible shape {shape}")
            # NumPy would allocate what the header claims before it sees that there is less.
            if dtype.hasobject:
                raise UserError(f"the array {entry.filename!r} holds Python objects instead of numbers")
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise UserError(f"the array {entry.filename!r} is larger than its data")
    with parsing(), np.load(path, allow_pickle=False) as file:
        return WeightFile({name: file[name] for name in file.files})


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise UserError(f"it has an array of the unknown version {version}")
    shape, _, dtype = _NPY_HEADERS[version](file)
    return shape, dtype


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


READERS: dict[str, Callable[[Path, int], WeightFile]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys((".pth", ".pt", ".bin"), read_torch_file),
}
"""By the end of the file's name."""
