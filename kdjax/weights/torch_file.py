"""The tensors in a file of ``torch.save`` or of ``pickle``, without PyTorch, and without running what the file says.

PyTorch has had two formats: a zip archive, with a pickle that names the other entries as its tensors' data, and before
version 1.6 some pickles with the data behind them. Detectron2 and Caffe2 keep arrays of NumPy in a pickle alone. What
may stand in a pickle is said in :mod:`kdjax.weights.pickles`.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from kdjax.errors import DataError, UserError, parsing
from kdjax.weights.own_config import MOST_CHARACTERS, read_config
from kdjax.weights.pickles import Array, Block, DType, Storage, Tensor, described, interpret, to_bytes

MOST_PICKLE_BYTES = 2**29
"""The pickle in a zip archive may be no longer. Those of detectors alone have less than a thousandth of it, but
MMDetection 3 keeps the history of every number that it logged: 130 MB after twelve epochs of COCO in batches of 2."""

MOST_DIMENSIONS = 8
"""Of a tensor."""

_LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)
"""The magic number and the version of the format before PyTorch 1.6."""

_KEYS = ("state_dict", "model", "model_state_dict", "net")
"""Where checkpoints keep the state dict, the first that is there."""


class WeightFile(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, np.ndarray]
    """By name, in the layout and the type that they are stored in."""
    class_names: tuple[str, ...] | None = None
    """Of the classes that the weights tell apart, in order; None where the file does not say."""
    notes: tuple[str, ...] = ()
    """What was chosen among several things in the file, in words."""
    config: Mapping[str, Any] = {}
    """The detector's config by its program, see :func:`kdjax.weights.own_config.read_config`; {} where there is none.
    """


class _Content(NamedTuple):
    """What a pickle describes, and where the numbers are."""

    object: Any
    sizes: Mapping[str, int]
    """Of the storages in bytes, by key."""
    load: Callable[[str], bytes]
    """The bytes of a storage by its key."""
    stream: BinaryIO
    """Of the pickle, in which long texts were left."""


def read_torch_zip(path: Path, most_bytes: int, key: str) -> WeightFile:
    """The state dict in a file of ``torch.save`` in its zip format.

    Args:
        path: of the file.
        most_bytes: how large the tensors may be together.
        key: of the entry that is the state dict; "" for the usual ones.

    Raises:
        DataError: one sentence says what is wrong with the file.
        OSError: it cannot be read.
    """
    with parsing():
        archive = zipfile.ZipFile(path)

    def read(name: str) -> bytes:
        with parsing():
            return archive.read(name)

    with archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise DataError("it is a zip archive, but none of torch.save: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "constants.pkl" in entries:
            raise DataError("it is a TorchScript program, which would have to be run; save model.state_dict() instead")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise DataError("it is a compressed zip archive, which torch.save never writes")
        if sum(entry.file_size for entry in entries.values()) > path.stat().st_size:
            raise DataError("its parts are larger than the file")
        if folder + "byteorder" in entries and read(folder + "byteorder") != b"little":
            raise DataError("it was written on a big-endian machine; save it again on a common one")
        if entries[pickles[0]].file_size > MOST_PICKLE_BYTES:
            raise DataError(f"its pickle is longer than {MOST_PICKLE_BYTES} bytes")
        data, stream = folder + "data/", io.BytesIO(read(pickles[0]))
        sizes = {name.removeprefix(data): entry.file_size for name, entry in entries.items() if name.startswith(data)}
        content = _Content(interpret(stream), sizes, lambda key: read(data + key), stream)
        return _weights(content, most_bytes, key)


def read_pickle(path: Path, most_bytes: int, key: str) -> WeightFile:
    """The state dict in a file of ``torch.save`` before PyTorch 1.6, or arrays in one of ``pickle.dump``.

    Args:
        path: of the file.
        most_bytes: how large the tensors may be together.
        key: of the entry that is the state dict; "" for the usual ones.

    Raises:
        DataError: one sentence says what is wrong with the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        first = interpret(file)
        if first == _LEGACY_START[0]:
            return _weights(_legacy(file), most_bytes, key)
        return _weights(_Content(first, {}, lambda key: b"", file), most_bytes, key)


def _legacy(file: BinaryIO) -> _Content:
    """Three pickles after the magic number (protocol, system, object), one of the storages' keys, and the storages."""
    if interpret(file) != _LEGACY_START[1]:
        raise DataError("it does not begin as a file of torch.save does")
    system = interpret(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DataError("it was written on a big-endian machine; save it again on a common one")
    storages: dict[str, Storage] = {}
    content = interpret(file, storages)
    keys = interpret(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise DataError("the list of its tensors is broken")
    sizes, offsets, end, length = {}, {}, file.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        if end > length:
            break
        file.seek(end)
        sizes[key] = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        offsets[key] = end + 8
        end += 8 + sizes[key]
    if end > length:
        raise DataError("it is cut off")

    def load(key: str) -> bytes:
        file.seek(offsets[key])
        return file.read(sizes[key])

    return _Content(content, sizes, load, file)


def _weights(content: _Content, most_bytes: int, key: str) -> WeightFile:
    """The state dict in what a pickle describes, and the names of its classes."""
    state, notes = _state_dict(content.object, key)
    loaded: dict[str | Array, np.ndarray] = {}
    arrays, total = {}, 0
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, (Tensor, Array)):
            raise DataError(f"the entry {name!r} of its state dict is {described(value)} instead of a tensor")
        place = value.storage.key if isinstance(value, Tensor) else value
        if place not in loaded:
            size = _storage_size(value, content, name) if isinstance(value, Tensor) else _array_size(value, name)
            total += size
            if total > most_bytes:
                raise DataError(f"its tensors have more than {most_bytes} bytes")
            loaded[place] = (
                np.frombuffer(content.load(value.storage.key), value.storage.dtype)
                if isinstance(value, Tensor)
                else _array(value, size, content.stream, name)
            )
        arrays[name] = _view(loaded[place], value, name) if isinstance(value, Tensor) else loaded[place]
    return WeightFile(arrays, _class_names(content.object), notes, _config(content))


def _state_dict(content: Any, key: str) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The state dict in an object, and which of several it is, in words.

    Raises:
        DataError: there is none.
        UserError: none has that key, or there are several and none has a usual one.
    """
    if not isinstance(content, dict):
        raise DataError(f"it holds {described(content)} instead of a dict of tensors; save model.state_dict()")
    found = [name for name, value in content.items() if isinstance(name, str) and _is_state_dict(value)]
    usual = [name for name in _KEYS if isinstance(content.get(name), dict)]
    if key:
        if not isinstance(content.get(key), dict):
            raise UserError(f"it has no dict of tensors {key!r}; it has {', '.join(found) or 'none'}")
        chosen = key
    elif usual:
        chosen = usual[0]
    elif len(found) == 1:
        chosen = found[0]
    elif found:
        raise UserError(f"it has several dicts of tensors, {', '.join(found)}: name the one to take as its key")
    else:
        return content, ()
    others = [name for name in found if name != chosen]
    if not others and chosen in usual:
        return content[chosen], ()
    return content[chosen], (f"its entry {chosen} is taken" + f", not {', '.join(others)}" * bool(others),)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(x, (Tensor, Array)) for x in value.values())


def _meta(content: Any) -> dict[Any, Any]:
    """What MMDetection says of a checkpoint."""
    meta = content.get("meta") if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def _config(content: _Content) -> dict[str, Any]:
    """The config whose text MMDetection leaves there: ``meta.config``, since 3.0 ``meta.cfg``."""
    for key in ("config", "cfg"):
        text = _meta(content.object).get(key)
        if isinstance(text, Block) and text.length <= MOST_CHARACTERS:
            content.stream.seek(text.start)
            text = content.stream.read(text.length).decode("utf-8", errors="replace")
        if isinstance(text, str):
            return read_config(text)
    return {}


def _class_names(content: Any) -> tuple[str, ...] | None:
    """The names of the classes where MMDetection leaves them: ``meta.CLASSES``, since 3.0 ``meta.dataset_meta``."""
    meta = _meta(content)
    data = meta.get("dataset_meta")
    places = [meta, *([data] if isinstance(data, dict) else [])]
    for names in (place.get(key) for place in places for key in ("CLASSES", "classes")):
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _storage_size(tensor: Tensor, content: _Content, name: str) -> int:
    """In bytes."""
    key, dtype = tensor.storage
    if key not in content.sizes or content.sizes[key] % dtype.itemsize:
        raise DataError(f"the data of the tensor {name!r} are missing or cut off")
    return content.sizes[key]


def _view(storage: np.ndarray, tensor: Tensor, name: str) -> np.ndarray:
    _check_shape(tensor.shape, name, (tensor.offset, *tensor.strides))
    if len(tensor.shape) != len(tensor.strides):
        raise _impossible(name)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    size = math.prod(tensor.shape)
    if size > storage.size or (size and last >= storage.size):
        raise DataError(f"the tensor {name!r} is larger than its data")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


def _check_shape(shape: tuple[Any, ...], name: str, others: tuple[Any, ...] = ()) -> None:
    if len(shape) > MOST_DIMENSIONS or not all(type(x) is int and 0 <= x < 2**48 for x in (*shape, *others)):
        raise _impossible(name)
    # NumPy refuses sides whose product is too large, even beside one of 0.
    if math.prod(filter(None, shape)) >= 2**48:
        raise _impossible(name)


def _impossible(name: str) -> DataError:
    return DataError(f"the tensor {name!r} has an impossible shape")


def _array_size(array: Array, name: str) -> int:
    """In bytes, of its numbers."""
    if not isinstance(array.dtype, DType) or array.dtype.dtype is None:
        raise DataError(f"the array {name!r} is not of plain numbers")
    if not isinstance(array.shape, tuple):
        raise _impossible(name)
    _check_shape(array.shape, name)
    return math.prod(array.shape) * array.dtype.dtype.itemsize


def _array(array: Array, size: int, stream: BinaryIO, name: str) -> np.ndarray:
    """An array of so many bytes, whose data may still stand in the stream."""
    data = array.data
    if isinstance(data, Block):
        # A byte is one character of UTF-8, or two.
        if data.length > size * (2 if data.utf8 else 1):
            raise DataError(f"the data of the array {name!r} are larger than itself")
        stream.seek(data.start)
        data = stream.read(data.length)
        if array.data.utf8:
            with parsing():
                data = data.decode("utf-8")
    if isinstance(data, str):
        data = to_bytes(data)
    if not isinstance(data, (bytes, bytearray)) or len(data) != size:
        raise DataError(f"the data of the array {name!r} are missing or cut off")
    flat = np.frombuffer(data, array.dtype.dtype)
    return flat.reshape(array.shape, order="F" if array.fortran else "C")
