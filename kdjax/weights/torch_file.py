"""The tensors in a file of ``torch.save``, without PyTorch, and without running anything that the file says.

Such a file is a pickle, a program that builds objects by calling functions it names. Here it is not run: its
instructions are read one by one, and only those have an effect that make plain containers, numbers, texts and tensors.
Whatever else it names becomes a placeholder that does nothing, where weights are known to come with such things, as
MMDetection's do with configs and histories beside their state dict; any other name is refused. The file is long because
PyTorch has had two formats, and because of the instructions.
"""

import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError, parsing

MOST_PICKLE_BYTES = 2**29
"""A file's pickle may be no longer. Those of detectors alone have less than a thousandth of it, but MMDetection 3 keeps
the history of every number that it logged: 130 MB after twelve epochs of COCO in batches of 2."""

MOST_INSTRUCTIONS = 2**22
"""Nor may it have more instructions."""

_STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}

_BUILT_IN = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"

_WITH_PLACEHOLDER = {
    *("argparse", "collections", "copyreg", "copy_reg", "datetime", "pathlib", "types"),
    *(
        "numpy",
        "torch",
        "torchvision",
        "timm",
        "mmengine",
        "mmcv",
        "mmdet",
        "detectron2",
        "fvcore",
        "yacs",
        "omegaconf",
    ),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILT_IN.split()),
    "_codecs.encode",
}
"""Modules, and single names of others, that checkpoints mention beside their weights."""

_GETATTR = ("builtins.getattr", "__builtin__.getattr")
"""MMEngine's histories mention their own methods by it."""

_LONGEST_TEXT = 2**20
"""Characters of a text that is kept; NumPy's arrays are longer ones, in pickles of the second protocol."""

_LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)
"""The magic number and the version of the format before PyTorch 1.6."""


Instruction = tuple[pickletools.OpcodeInfo, Any, int | None]
"""Of a pickle: what to do, its argument, and where it stands."""


class WeightFile(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, np.ndarray]
    """By name, in the layout and the type that they are stored in."""
    class_names: tuple[str, ...] | None = None
    """Of the classes that the weights tell apart, in order; None where the file does not say."""


class _Name(NamedTuple):
    """A function or class that the pickle names."""

    name: str


class _Placeholder(NamedTuple):
    """Something that the pickle would make by a call of ``name``; empty, whatever it is given."""

    name: str


class _Storage(NamedTuple):
    """The numbers behind one or more tensors."""

    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: Path, most_bytes: int) -> WeightFile:
    """The state dict in a file of ``torch.save``, in the zip format or the one before PyTorch 1.6.

    The file holds the state dict itself, or a dict with it as "state_dict" or "model".

    Args:
        path: of the file.
        most_bytes: how large the tensors may be together.

    Raises:
        UserError: one sentence says what is wrong with the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return (_read_zip if is_zip else _read_legacy)(file, most_bytes)


def _read_zip(file: BinaryIO, most_bytes: int) -> WeightFile:
    with parsing():
        archive = zipfile.ZipFile(file)

    def read(name: str) -> bytes:
        with parsing():
            return archive.read(name)

    with archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError("it is a zip archive, but none of torch.save: it has no data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise UserError("it is a compressed zip archive, which torch.save never writes")
        if sum(entry.file_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
            raise UserError("its parts are larger than the file")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in entries and read(folder + "byteorder") != b"little":
            raise UserError("it was written on a big-endian machine; save it again on a common one")
        if entries[pickles[0]].file_size > MOST_PICKLE_BYTES:
            raise UserError(f"its pickle is longer than {MOST_PICKLE_BYTES} bytes")
        data = folder + "data/"
        return _weights(
            _interpret(io.BytesIO(read(pickles[0]))),
            {name.removeprefix(data): entry.file_size for name, entry in entries.items() if name.startswith(data)},
            lambda key: read(data + key),
            most_bytes,
        )


def _read_legacy(file: BinaryIO, most_bytes: int) -> WeightFile:
    """Four pickles (magic number, protocol, system, object), one of the storages' keys, and the storages."""
    head = io.BytesIO(file.read(MOST_PICKLE_BYTES))
    try:
        start = _interpret(head), _interpret(head)
    except UserError as error:
        raise UserError(f"it does not begin as a file of torch.save does: {error}") from error
    if start != _LEGACY_START:
        raise UserError("it does not begin as a file of torch.save does")
    system = _interpret(head)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError("it was written on a big-endian machine; save it again on a common one")
    storages: dict[str, _Storage] = {}
    content = _interpret(head, storages)
    keys = _interpret(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise UserError("the list of its tensors is broken")
    sizes, offsets, end, length = {}, {}, head.tell(), os.fstat(file.fileno()).st_size
    for key in keys:
        if end > length:
            break
        file.seek(end)
        sizes[key] = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        offsets[key] = end + 8
        end += 8 + sizes[key]
    if end > length:
        raise UserError("it is cut off")

    def load(key: str) -> bytes:
        file.seek(offsets[key])
        return file.read(sizes[key])

    return _weights(content, sizes, load, most_bytes)


def _weights(content: Any, sizes: Mapping[str, int], load: Callable[[str], bytes], most_bytes: int) -> WeightFile:
    """The state dict in what a pickle holds, and the names of its classes.

    Args:
        content: of the pickle.
        sizes: of the storages in bytes, by key.
        load: the bytes of a storage by its key.
        most_bytes: of all that are loaded.
    """
    class_names = _class_names(content)
    if isinstance(content, dict):
        content = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict):
        raise UserError(f"it holds {_described(content)} instead of a dict of tensors; save model.state_dict()")
    storages: dict[str, np.ndarray] = {}
    arrays, total = {}, 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise UserError(f"the entry {name!r} of its state dict is {_described(tensor)} instead of a tensor")
        key, dtype = tensor.storage
        if key not in storages:
            if key not in sizes or sizes[key] % dtype.itemsize:
                raise UserError(f"the data of the tensor {name!r} are missing or cut off")
            total += sizes[key]
            if total > most_bytes:
                raise UserError(f"its tensors have more than {most_bytes} bytes")
            storages[key] = np.frombuffer(load(key), dtype)
        arrays[name] = _view(storages[key], tensor, name)
    return WeightFile(arrays, class_names)


def _class_names(content: Any) -> tuple[str, ...] | None:
    """The names of the classes where MMDetection leaves them: ``meta.CLASSES``, since 3.0 ``meta.dataset_meta``."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return None
    data = meta.get("dataset_meta")
    places = [meta, *([data] if isinstance(data, dict) else [])]
    for names in (place.get(key) for place in places for key in ("CLASSES", "classes")):
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _view(storage: np.ndarray, tensor: _Tensor, name: str) -> np.ndarray:
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    if not all(type(x) is int and 0 <= x < 2**48 for x in sizes) or len(tensor.shape) != len(tensor.strides):
        raise UserError(f"the tensor {name!r} has an impossible shape")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    size = int(np.prod(tensor.shape, dtype=object))
    if size > storage.size or (size and last >= storage.size):
        raise UserError(f"the tensor {name!r} is larger than its data")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


def _described(value: Any) -> str:
    return value.name if isinstance(value, (_Name, _Placeholder)) else f"a {type(value).__name__.strip('_').lower()}"


def _interpret(stream: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    """What one pickle describes, of plain containers, tensors and placeholders; leaves the stream behind its end.

    Args:
        stream: the pickle begins here.
        storages: is filled with the storages that the pickle mentions, by key.
    """
    try:
        return _Machine(storages if storages is not None else {}).run(_instructions(stream))
    except (IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"its pickle is broken ({type(error).__name__})") from error


def _instructions(stream: BinaryIO) -> Iterator[Instruction]:
    with parsing():
        yield from pickletools.genops(stream)


class _Machine:
    """The stack machine of pickle, without its calls."""

    def __init__(self, storages: dict[str, _Storage]):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages

    def run(self, instructions: Iterator[Instruction]) -> Any:
        """Follows the instructions to the end."""
        for count, (opcode, argument, _) in enumerate(instructions):
            if count > MOST_INSTRUCTIONS:
                raise UserError(f"its pickle has more than {MOST_INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name](argument))
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise UserError(f"its pickle has the instruction {opcode.name}, which weights do not need")
        raise UserError("its pickle has no end")

    def _pop(self) -> Any:
        if self._marks and self._marks[-1] >= len(self._stack):
            raise IndexError
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _discard(self, _: Any) -> None:
        self._pop()

    def _tuple(self, size: int | None) -> None:
        items = self._pop_to_mark() if size is None else [self._pop() for _ in range(size)][::-1]
        self._stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        self._stack.append(self._pop_to_mark())

    def _dict(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._stack.append({})
        self._set(items)

    def _append(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise TypeError
        if isinstance(self._stack[-1], dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Other keys are of no use here, and hashing nested ones may take for ever.
                if isinstance(key, (str, int, float, type(None))):
                    self._stack[-1][key] = value

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[int(index)])

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else int(index)] = self._stack[-1]

    def _global(self, argument: str | None) -> None:
        if argument is None:
            name = self._pop()
            module = self._pop()
            if not isinstance(module, str) or not isinstance(name, str):
                raise TypeError
            argument = f"{module} {name}"
        name = argument.replace(" ", ".", 1)
        if name.split(".")[0] not in _WITH_PLACEHOLDER and name not in (*_WITH_PLACEHOLDER, *_GETATTR):
            raise _needless(name)
        self._stack.append(_Name(name))

    def _storage(self, _: Any) -> None:
        """A persistent id: ("storage", type, key, device, number of elements), and in the old format a view."""
        identity = self._pop()
        if not isinstance(identity, tuple) or len(identity) < 5:
            raise TypeError
        kind, type_, key, _, _, *view = identity
        name = _described(type_)
        if kind != "storage" or not isinstance(key, str) or any(x is not None for x in view):
            raise UserError("it keeps tensors in a way that this version does not know")
        if name not in _STORAGES:
            raise UserError(f"it has tensors of {name}; they must be one of {', '.join(_STORAGES)}")
        storage = _Storage(key, np.dtype(_STORAGES[name]))
        if self._storages.setdefault(key, storage) != storage:
            raise UserError(f"the data {key!r} have two types")
        self._stack.append(storage)

    def _call(self, _: Any) -> None:
        arguments = self._pop()
        name = _described(self._pop())
        made: Any = _Placeholder(name)
        if name in _GETATTR:
            made = _attribute(name, arguments)
        elif name == "collections.OrderedDict" and arguments == ():
            made = {}
        elif name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            if not isinstance(arguments, tuple) or len(arguments) < 4:
                raise TypeError
            made = _Tensor(*arguments[:4])
            views = isinstance(made.shape, tuple) and isinstance(made.strides, tuple)
            if not isinstance(made.storage, _Storage) or not views:
                raise TypeError
        elif name == "torch._utils._rebuild_parameter":
            made = arguments[0]
        self._stack.append(made)


def _attribute(name: str, arguments: Any) -> _Placeholder:
    """A method that a class of a known library mentions; nothing is looked up, and nothing else may be asked for."""
    match arguments:
        case (_Name(owner) | _Placeholder(owner), str(attribute)):
            known = owner.split(".")[0] in _WITH_PLACEHOLDER and attribute.isidentifier()
            if known and not attribute.startswith("_"):
                return _Placeholder(f"{owner}.{attribute}")
    raise _needless(name)


def _needless(name: str) -> UserError:
    return UserError(
        f"it names {name}, which weights do not need; if you trust the file, save its state dict alone, preferably as "
        ".safetensors"
    )


def _text(text: str) -> Any:
    return text if len(text) <= _LONGEST_TEXT else _Placeholder("str")


_CONSTANTS: Mapping[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: _Placeholder("set"),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), lambda x: x),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), lambda x: x),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _text),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _text),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), lambda _: _Placeholder("bytes")),
}
"""What instructions put on the stack, given their argument."""

_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine._mark,
    "POP": _Machine._discard,
    "TUPLE": lambda machine, _: machine._tuple(None),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine._set([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set(machine._pop_to_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._put),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine._global),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine._call),
    "BINPERSID": _Machine._storage,
    # Attributes of an object, such as the versions of layers that PyTorch adds to a state dict.
    "BUILD": _Machine._discard,
}
"""What the other instructions do, given their argument; whatever is absent is refused."""
