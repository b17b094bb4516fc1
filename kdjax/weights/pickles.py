"""What a pickle describes, without running anything that it says.

A pickle is a program that builds objects by calling functions it names. Here it is not run: its instructions are read
one by one, and only those have an effect that make plain containers, numbers, texts, tensors of PyTorch and arrays of
NumPy. Whatever else it names becomes a placeholder that does nothing, where weights are known to come with such things,
as MMDetection's do with configs and histories beside their state dict; any other name is refused. The file is long
because of the instructions.
"""

import dataclasses
import io
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdjax.errors import DataError, quoted

MOST_INSTRUCTIONS = 2**22
"""A pickle may have no more."""

MOST_KEPT = 2**26
"""Characters of all its short texts together."""

LONGEST_KEPT = 2**12
"""Bytes of a text that is kept in memory; a longer one is a place in the file, where the numbers of an array stand."""

_LONGEST = 2**40
"""Bytes that anything in a file can have."""

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

_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1")
"""Of NumPy's arrays, as it abbreviates them."""

_BUILT_IN = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"

_WITH_PLACEHOLDER = {
    *("argparse", "collections", "copyreg", "copy_reg", "datetime", "pathlib", "types"),
    *("numpy", "torch", "torchvision", "timm", "mmengine", "mmcv", "mmdet", "mmcls", "mmpretrain", "mmrazor"),
    *("detectron2", "fvcore", "yacs", "omegaconf", "pytorch_lightning", "lightning", "lightning_fabric"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILT_IN.split()),
    "_codecs.encode",
}
"""Modules, and single names of others, that checkpoints mention beside their weights."""

_GETATTR = ("builtins.getattr", "__builtin__.getattr")
"""MMEngine's histories mention their own methods by it."""

_BYTES = ("builtins.bytes", "__builtin__.bytes")
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")

Instruction = tuple[str, Any]
"""Of a pickle: what to do, and its argument."""


class Name(NamedTuple):
    """A function or class that the pickle names."""

    name: str


class Placeholder(NamedTuple):
    """Something that the pickle would make by a call of ``name``; empty, whatever it is given."""

    name: str


class Storage(NamedTuple):
    """The numbers behind one or more tensors."""

    key: str
    dtype: np.dtype


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Block(NamedTuple):
    """A long text, or many bytes, that are left where they stand."""

    start: int
    """Where the stream has them."""
    length: int
    """In bytes."""
    utf8: bool
    """Whether each of the bytes meant is a character in UTF-8, as older pickles have them."""


@dataclasses.dataclass(slots=True, eq=False)
class DType:
    """The type of an array's numbers; None where no array of it is read."""

    dtype: np.dtype | None


@dataclasses.dataclass(slots=True, eq=False)
class Array:
    """An array of NumPy; empty until the pickle sets its state, whose parts are as they stand there."""

    dtype: Any = None
    shape: Any = (0,)
    fortran: bool = False
    data: Any = b""


def interpret(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """What one pickle describes, of plain containers, tensors, arrays and placeholders.

    Args:
        stream: the pickle begins here; it is left behind the pickle's end.
        storages: is filled with the storages that the pickle mentions, by key.

    Raises:
        DataError: it is broken, names something that weights do not need, or is too large.
    """
    try:
        return _Machine(storages if storages is not None else {}).run(_instructions(stream))
    except (IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise DataError(f"its pickle is broken ({type(error).__name__})") from error


def described(value: Any) -> str:
    """What was found instead of a tensor, in words.

    >>> described(Placeholder("torch.nn.Module")), described([])
    ('torch.nn.Module', 'a list')
    """
    if isinstance(value, (Name, Placeholder)):
        return value.name
    return "a long text" if isinstance(value, Block) else f"a {type(value).__name__.lower()}"


def to_bytes(text: str) -> bytes:
    """The bytes that a text stands for, as pickles have them that Python 2 can read or has written.

    Raises:
        DataError: it has characters that are none of the first 256.
    """
    try:
        return text.encode("latin-1")
    except UnicodeError as error:
        raise DataError("its pickle is broken (a text stands where bytes should be)") from error


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}
"""How the length of an argument is written before it."""


def _instructions(stream: BinaryIO) -> Iterator[Instruction]:
    kept = 0
    while code := stream.read(1):
        opcode = _OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise DataError(f"its pickle has the unknown instruction {code!r}")
        argument = _argument(opcode, stream) if opcode.arg else None
        if isinstance(argument, (str, bytes, bytearray)):
            kept += len(argument)
            if kept > MOST_KEPT:
                raise DataError(f"the texts in its pickle have more than {MOST_KEPT} characters")
        yield opcode.name, argument
    raise DataError("its pickle has no end")


def _argument(opcode: Any, stream: BinaryIO) -> Any:
    """The argument of an instruction; a :class:`Block` where it is long."""
    source = stream
    if opcode.arg.n == pickletools.UP_TO_NEWLINE:
        lines = 2 if opcode.name in ("GLOBAL", "INST") else 1
        source = io.BytesIO(b"".join(stream.readline(LONGEST_KEPT) for _ in range(lines)))
    elif opcode.arg.n in _LENGTHS:
        layout = _LENGTHS[opcode.arg.n]
        head = stream.read(struct.calcsize(layout))
        if len(head) < struct.calcsize(layout):
            raise DataError("its pickle is broken (it ends too early)")
        length = struct.unpack(layout, head)[0]
        if not 0 <= length <= _LONGEST:
            raise DataError(f"its pickle is broken (something in it has {length} bytes)")
        if length > LONGEST_KEPT:
            block = Block(stream.tell(), length, utf8="UNICODE" in opcode.name)
            stream.seek(length, io.SEEK_CUR)
            return block
        source = io.BytesIO(head + stream.read(length))
    try:
        return opcode.arg.reader(source)
    except ValueError as error:
        raise DataError(f"its pickle is broken ({quoted(error)})") from error


class _Machine:
    """The stack machine of pickle, without its calls."""

    def __init__(self, storages: dict[str, Storage]):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages

    def run(self, instructions: Iterator[Instruction]) -> Any:
        """Follows the instructions to the end."""
        for count, (name, argument) in enumerate(instructions):
            if count > MOST_INSTRUCTIONS:
                raise DataError(f"its pickle has more than {MOST_INSTRUCTIONS} instructions")
            if name == "STOP":
                return self._pop()
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name](argument))
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise DataError(f"its pickle has the instruction {name}, which weights do not need")
        raise DataError("its pickle has no end")

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
        self._stack.append(Name(name))

    def _storage(self, _: Any) -> None:
        """A persistent id: ("storage", type, key, device, number of elements), and in the old format a view."""
        identity = self._pop()
        if not isinstance(identity, tuple) or len(identity) < 5:
            raise TypeError
        kind, type_, key, _, _, *view = identity
        name = described(type_)
        if kind != "storage" or not isinstance(key, str) or any(x is not None for x in view):
            raise _unknown_tensors()
        if name not in _STORAGES:
            raise DataError(f"it has tensors of {name}; they must be one of {', '.join(_STORAGES)}")
        storage = Storage(key, np.dtype(_STORAGES[name]))
        if self._storages.setdefault(key, storage) != storage:
            raise DataError(f"the data {key!r} have two types")
        self._stack.append(storage)

    def _call(self, _: Any) -> None:
        arguments = self._pop()
        name = described(self._pop())
        made: Any = Placeholder(name)
        if name in _GETATTR:
            made = _attribute(name, arguments)
        elif name == "collections.OrderedDict" and arguments == ():
            made = {}
        elif name == "collections.OrderedDict" and (pairs := _pairs(arguments)) is not None:
            # As Python 2 wrote it.
            made = dict(pairs)
        elif name in _MADE:
            if not isinstance(arguments, tuple):
                raise TypeError
            made = _MADE[name](*arguments)
        self._stack.append(made)

    def _build(self, _: Any) -> None:
        """Sets the state of an array or its type; others, such as the versions of layers that PyTorch adds, do not."""
        state = self._pop()
        match self._stack[-1], state:
            case Array() as array, (_, shape, dtype, fortran, data):
                array.dtype, array.shape, array.fortran, array.data = dtype, shape, fortran is True, data
            case DType(dtype=np.dtype() as dtype) as known, (_, ">", *_):
                known.dtype = dtype.newbyteorder(">")


def _pairs(arguments: Any) -> list[Any] | None:
    """The entries of a dict that is made of a list of pairs, and of nothing else; None where it is not."""
    match arguments:
        case ([*entries],) if all(isinstance(x, list | tuple) and len(x) == 2 for x in entries):
            return [(key, value) for key, value in entries if isinstance(key, str | int)]
    return None


def _attribute(name: str, arguments: Any) -> Placeholder:
    """A method that a class of a known library mentions; nothing is looked up, and nothing else may be asked for."""
    match arguments:
        case (Name(owner) | Placeholder(owner), str(attribute)):
            known = owner.split(".")[0] in _WITH_PLACEHOLDER and attribute.isidentifier()
            if known and not attribute.startswith("_"):
                return Placeholder(f"{owner}.{attribute}")
    raise _needless(name)


def _needless(name: str) -> DataError:
    return DataError(
        f"it names {name}, which weights do not need; if you trust the file, save its state dict alone, preferably as "
        ".safetensors"
    )


def _unknown_tensors() -> DataError:
    return DataError("it keeps tensors in a way that this version does not know")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise _unknown_tensors()
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError
    return Tensor(storage, offset, shape, strides)


def _dtype(name: Any, *_: Any) -> DType:
    return DType(np.dtype(name) if name in _DTYPES else None)


def _encoded(text: Any, *_: Any) -> Any:
    """The bytes that a pickle before Python 3 knew them writes as the characters of the same numbers."""
    if isinstance(text, str):
        return to_bytes(text)
    return text if isinstance(text, Block) else Placeholder("bytes")


_MADE: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(_REBUILD, _tensor),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encoded,
    **dict.fromkeys(_BYTES, lambda *content: Placeholder("bytes") if content else b""),
    **dict.fromkeys(_RECONSTRUCT, lambda *_: Array()),
    **dict.fromkeys(_FROM_BUFFER, lambda data, dtype, shape, order="C", *_: Array(dtype, shape, order == "F", data)),
}
"""What calls have an effect: our stand-ins of what they make, given their arguments."""


_CONSTANTS: Mapping[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: Placeholder("set"),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), lambda x: x),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), lambda x: x),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), lambda x: x),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), lambda x: x),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), lambda x: x),
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
    "BUILD": _Machine._build,
}
"""What the other instructions do, given their argument; whatever is absent is refused."""
