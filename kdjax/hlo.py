"""What a compiled program says of itself: the traffic to memory, and what its devices tell each other."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_OPERATION = re.compile(r"([\w\-]+)\(")
_OPERAND = re.compile(r"[\w.\-]+")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"body=%?([\w.\-]+)")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
"""Operations that move nothing."""
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One operation of a program's text."""

    name: str
    shape: str
    """As the text has it, a tuple's in parentheses."""
    operation: str
    operands: tuple[str, ...]
    """Their names, and other words."""
    rest: str


class Program(NamedTuple):
    """A compiled program."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


class Collectives(NamedTuple):
    """What the devices tell each other in one call of a program."""

    operations: int
    elements: Mapping[str, int]
    """By dtype, such as "f32": elements that go into them."""


def read_program(text: str) -> Program:
    """Reads XLA's text of a program, as ``compiled.as_text()`` gives it."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line[:1].strip() and (head := _HEAD.match(line)):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            computations[name].append(_instruction(found[1], found[2]))
    return Program({key: tuple(value) for key, value in computations.items()}, entry)


def _instruction(name: str, text: str) -> Instruction:
    shape, text = _shape(text)
    operation = _OPERATION.match(text)
    assert operation, text
    end = _closing(text, operation.end() - 1)
    operands = tuple(_OPERAND.findall(text[operation.end() : end]))
    return Instruction(name, shape, operation[1], operands, text[end + 1 :])


def _shape(text: str) -> tuple[str, str]:
    """The shape at the beginning of a text, and what follows it."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[start:][:80]!r}")


def _arrays(shape: str) -> Iterator[tuple[str, int]]:
    """Dtype and number of elements of each array of a shape."""
    for dtype, sizes in _ARRAY.findall(shape):
        yield dtype, math.prod(int(size) for size in sizes.split(",") if size)


def _size(shape: str) -> int:
    return sum(_BYTES.get(dtype, 1) * count for dtype, count in _arrays(shape))


def traffic(program: Program) -> int:
    """Bytes that one call reads from memory and writes to it: operands and results of its operations.

    A fusion counts as one operation, a loop as often as its body runs; one of :func:`open_loops` once. What stays in a
    nearer memory between two operations is counted all the same.
    """

    def of(name: str) -> int:
        computation = program.computations[name]
        shapes = {x.name: x.shape for x in computation}
        total = 0
        for x in computation:
            if x.operation == "while":
                trips, body = _TRIPS.search(x.rest), _BODY.search(x.rest)
                assert body, x.rest
                total += (int(trips[1]) if trips else 1) * of(body[1])
            elif x.operation.endswith("-start"):
                # Its shape has the operands once more, and what the two halves tell each other.
                total += 2 * sum(_size(shapes.get(operand, "")) for operand in x.operands)
            elif x.operation not in _FREE and not x.operation.endswith("-done"):
                total += _size(x.shape) + sum(_size(shapes.get(operand, "")) for operand in x.operands)
        return total

    return of(program.entry)


def open_loops(program: Program) -> int:
    """Loops of which the text does not say how often they run, as where that depends on what they work on."""
    loops = (x for computation in program.computations.values() for x in computation if x.operation == "while")
    return sum(not _TRIPS.search(x.rest) for x in loops)


def collectives(program: Program) -> Collectives:
    """What the devices tell each other in one call, whatever computation it stands in."""
    operations, elements = 0, Counter[str]()
    for computation in program.computations.values():
        shapes = {x.name: x.shape for x in computation}
        for x in computation:
            if x.operation.removesuffix("-start") in _COLLECTIVES:
                operations += 1
                for operand in x.operands:
                    for dtype, count in _arrays(shapes.get(operand, "")):
                        elements[dtype] += count
    return Collectives(operations, dict(elements))
