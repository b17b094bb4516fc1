"""Files of weights to a dict of arrays; no file is ever executed."""

import io
import json
import math
import os
import pathlib
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from kdjax.errors import DataError, UserError, parsing, quoted
from kdjax.paths import Path, as_path, on_this_machine, size_of
from kdjax.weights.torch_file import WeightFile, read_pickle, read_torch_zip

MOST_BYTES = 2**30
"""A file's tensors may have as many bytes together; the largest detector here has 6e8."""

MOST_CHARACTERS = 256
"""Of a tensor's name; messages repeat names."""

MOST_TENSORS = 2**16
"""In a file; the largest detector here has 1500."""

MOST_INDEX_BYTES = 2**24
"""Of what lists the tensors in a file, or in several: a header, the directory of an archive, an index in JSON."""

MOST_GROWTH = 16
"""Times that a file's bytes may become in being unpacked: trained weights hardly shrink in being packed."""

FORMATS = ("safetensors", "an index of several", ".npz", "a file of torch.save", "a pickle")
"""What can be read, in words."""

_OTHERS: dict[bytes, str] = {
    b"<html": "a web page instead of the file",
    b"<!DOCTYPE": "a web page instead of the file",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file: fetch it by git lfs pull",
    b"\x1f\x8b\x08": "compressed by gzip: unpack it",
    b"ustar": "a tar archive: unpack it, or, if it is of torch.save before 0.1.10, save it again",
    b"\x93NUMPY": "a single array of NumPy: save all tensors by name by numpy.savez",
    b"\x89HDF": "a file of HDF5, as Keras writes",
}
"""What else files of weights turn out to be, by something at their beginning."""

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


def read_weights(path: str | os.PathLike, key: str = "") -> WeightFile:
    """The tensors in a file, and the names of their classes where it has them.

    What a file is shows in its content, whatever its name ends in: safetensors, or the index of several such files
    beside it; ``.npz``, one array for each tensor; what ``torch.save`` wrote, in its zip format or the one before
    PyTorch 1.6; or a pickle of NumPy's arrays, such as those of Detectron2. The last two are a state dict, or a dict
    that holds one, as "state_dict", "model" or another key.

    Args:
        path: of the file.
        key: of the state dict in a file that holds several; "" for the usual ones.

    Raises:
        DataError: one sentence says what is wrong with the file.
        UserError: it has no entry ``key``, or several of which one has to be named.
    """
    path = as_path(path)
    try:
        file = _read(path, MOST_BYTES, key)
    except (UserError, OSError, MemoryError) as error:
        reason = quoted(error)
        kind = type(error) if isinstance(error, UserError) else DataError
        raise kind(f"The weights in {path} cannot be read: {reason}.") from error
    if not file.tensors:
        raise DataError(f"The weights in {path} cannot be read: it has no tensors.")
    if len(file.tensors) > MOST_TENSORS:
        raise DataError(f"The weights in {path} are {len(file.tensors)} tensors, more than {MOST_TENSORS}.")
    for name in file.tensors:
        if not name.isprintable() or len(name) > MOST_CHARACTERS:
            raise DataError(f"The weights in {path} have a tensor with the impossible name {name[:MOST_CHARACTERS]!r}.")
    return file


def _read(path: Path, most_bytes: int, key: str) -> WeightFile:
    if path.exists() and not path.is_file():
        # Reading from a pipe would wait for ever.
        raise DataError(f"it is {'a folder' if path.is_dir() else 'no file'}")
    with path.open("rb") as file:
        start = file.read(300)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        with on_this_machine(path) as file:
            return (_read_npz if _has_arrays(file) else read_torch_zip)(file, most_bytes, key)
    if start.startswith(b"\x80"):
        with on_this_machine(path) as file:
            return read_pickle(file, most_bytes, key)
    if start[4:9] == b"\0\0\0\0{":
        return _read_safetensors(path, most_bytes, key)
    if start.lstrip().startswith(b"{"):
        return _read_index(path, most_bytes, key)
    what = next((what for known, what in _OTHERS.items() if known in start), None)
    raise DataError(f"it is {what or ('empty' if not start else 'none of ' + ', '.join(FORMATS))}")


class _Directory(io.BufferedReader):
    """A zip archive of which only the directory is read: at once, as many bytes as the archive claims."""

    def read(self, size: int | None = -1) -> bytes:
        """As a file does; refuses a directory that is longer than any of weights."""
        if size is not None and size > MOST_INDEX_BYTES:
            raise DataError(f"its list of entries has more than {MOST_INDEX_BYTES} bytes")
        return super().read(size)


def _has_arrays(path: pathlib.Path) -> bool:
    """Whether a zip archive is one of ``numpy.savez``."""
    with _Directory(io.FileIO(path)) as file, parsing(), zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_safetensors(path: Path, most_bytes: int, key: str) -> WeightFile:
    _refuse_key(key)
    if size_of(path) > most_bytes:
        raise DataError(f"it has more than {most_bytes} bytes")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_INDEX_BYTES:
            raise DataError(f"its header has more than {MOST_INDEX_BYTES} bytes")
    try:
        with on_this_machine(path) as file, safe_open(file, framework="numpy"):
            data = path.read_bytes()
    except SafetensorError as error:
        raise DataError(f"it is no whole file of safetensors ({error})") from error
    # The library would copy each tensor; it has held the header against the file.
    with parsing():
        header = json.loads(data[8 : 8 + length])
    state = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        if tensor["dtype"] not in _SAFETENSORS_TYPES:
            raise DataError(f"the tensor {name!r} is of {tensor['dtype']}, not of {', '.join(_SAFETENSORS_TYPES)}")
        dtype, count = np.dtype(_SAFETENSORS_TYPES[tensor["dtype"]]), math.prod(tensor["shape"])
        with parsing():
            place = 8 + length + tensor["data_offsets"][0]
            # Of nothing NumPy makes no array where the file ends.
            flat = np.frombuffer(data, dtype, count, place) if count else np.zeros(0, dtype)
            state[name] = flat.reshape(tensor["shape"])
    return WeightFile(state)


def _read_index(path: Path, most_bytes: int, key: str) -> WeightFile:
    """The tensors in several files of safetensors, of which the index in JSON says who has what."""
    _refuse_key(key)
    if size_of(path) > MOST_INDEX_BYTES:
        raise DataError(f"it has more than {MOST_INDEX_BYTES} bytes")
    with parsing():
        index = json.loads(path.read_text(encoding="utf-8"))
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
        raise DataError("it is JSON without a weight_map, which names the file of each tensor")
    tensors: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(places.values()):
        if pathlib.PurePath(name).name != name:
            raise DataError(f"its weight_map names {name!r}, which is no file beside it")
        shard = path.parent / name
        try:
            found = _read_shard(shard, most_bytes - sum(x.nbytes for x in tensors.values()))
        except (DataError, OSError) as error:
            raise DataError(f"its part {name}: {error}") from error
        wanted = {key for key, place in places.items() if place == name}
        if wanted - found.keys():
            raise DataError(f"its part {name} has no tensor {min(wanted - found.keys())!r}")
        tensors |= {key: found[key] for key in wanted}
    return WeightFile(tensors)


def _read_shard(path: Path, most_bytes: int) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError("there is no such file")
    return _read_safetensors(path, most_bytes, "").tensors


def _refuse_key(key: str) -> None:
    if key:
        raise UserError(f"it holds one set of tensors and no entries, such as {key!r}")


def _read_npz(path: pathlib.Path, most_bytes: int, key: str) -> WeightFile:
    _refuse_key(key)
    with parsing():
        archive = zipfile.ZipFile(path)
    with archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > most_bytes:
            raise DataError(f"its arrays have more than {most_bytes} bytes")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise DataError("it is packed in a way that numpy.savez never packs")
        if size > MOST_INDEX_BYTES + MOST_GROWTH * size_of(path):
            raise DataError(f"its arrays would become more than {MOST_GROWTH} times as large as the file")
        for entry in entries:
            with parsing(), archive.open(entry) as file:
                shape, dtype = _npy_header(file)
            if not all(type(side) is int and side >= 0 for side in shape):
                raise DataError(f"the array {entry.filename!r} has the impossible shape {shape}")
            # NumPy would allocate what the header claims before it sees that there is less.
            if dtype.hasobject:
                raise DataError(f"the array {entry.filename!r} holds Python objects instead of numbers")
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise DataError(f"the array {entry.filename!r} is larger than its data")
    with parsing(), np.load(path, allow_pickle=False) as file:
        return WeightFile({name: file[name] for name in file.files})


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise DataError(f"it has an array of the unknown version {version}")
    shape, _, dtype = _NPY_HEADERS[version](file)
    return shape, dtype


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
