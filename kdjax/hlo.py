"""What a program's text says of it: traffic to memory, operations in loops, and what its devices tell each other.

XLA counts one turn of a loop, and for TPUs does not write down how many there are. Those of JAX's ``scan``, ``map`` and
``fori_loop`` count from 0 up to a constant that their condition names; all other loops are open.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_OPERATION = re.compile(r"([\w\-]+)\(")
_OPERAND = re.compile(r"[\w.\-]+")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)")
_STEPS = ("stride", "lhs_dilate", "rhs_dilate")
"""Parts of a window that are 1 where it does not say otherwise."""
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
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

    A fusion counts as one operation, a loop as often as its body runs; one of :func:`open_loops` once. Of an array that
    an operation takes slices of, or replaces a slice of, the slices count. What stays in a nearer memory between two
    operations is counted all the same.
    """

    def of(name: str) -> int:
        computation = program.computations[name]
        shapes = {x.name: x.shape for x in computation}
        total = 0
        for x in computation:
            if x.operation == "while":
                total += (_turns(program, x) or 1) * of(_named(_BODY, x))
            elif x.operation.endswith("-start"):
                # Its shape has the operands once more, and what the two halves tell each other.
                total += 2 * sum(_size(shapes.get(operand, "")) for operand in x.operands)
            elif x.operation not in _FREE and not x.operation.endswith("-done"):
                total += _written(program, shapes, x) + sum(
                    _read(program, x, place, shapes[operand])
                    for place, operand in enumerate(y for y in x.operands if y in shapes)
                )
        return total

    return of(program.entry)


def _read(program: Program, x: Instruction, place: int, shape: str) -> int:
    """Bytes that an operation reads of an operand: of one that only slices are taken of, the slices."""
    if x.operation in ("dynamic-slice", "dynamic-update-slice") and place == 0:
        return _size(x.shape) if x.operation == "dynamic-slice" else 0
    if x.operation != "fusion":
        return _size(shape)
    inside = program.computations[_named(_CALLED, x)]
    names = {y.name for y in inside}

    def of(name: str) -> int:
        used = _size(shape) if name == inside[-1].name else 0
        for y in inside:
            for place, operand in enumerate(z for z in y.operands if z in names):
                if operand == name:
                    used += of(y.name) if y.operation == "bitcast" else _read(program, y, place, shape)
        return used

    (parameter,) = (y.name for y in inside if y.operation == "parameter" and y.operands[0] == str(place))
    return min(_size(shape), of(parameter))


def _written(program: Program, shapes: Mapping[str, str], x: Instruction) -> int:
    """Bytes that an operation writes: of an array in which it replaces a slice, the slice."""
    if x.operation == "dynamic-update-slice":
        return _size(shapes[x.operands[1]])
    if x.operation != "fusion":
        return _size(x.shape)
    inside = program.computations[_named(_CALLED, x)]
    made = {y.name: y for y in inside}
    shapes = {y.name: y.shape for y in inside}

    def of(y: Instruction) -> int:
        if y.operation == "tuple":
            return sum(of(made[name]) for name in y.operands if name in made)
        if y.operation == "bitcast":
            return of(made[y.operands[0]])
        return _written(program, shapes, y)

    return of(inside[-1])


def _named(pattern: re.Pattern[str], x: Instruction) -> str:
    """The computation that an operation names."""
    found = pattern.search(x.rest)
    assert found, x.rest
    return found[1]


def _turns(program: Program, loop: Instruction) -> int | None:
    """How often the body of a loop runs; None where the text does not say so."""
    if said := _TRIPS.search(loop.rest):
        return int(said[1])
    condition = program.computations.get(_named(_CONDITION, loop), ())
    if not condition or condition[-1].operation != "compare" or "direction=LT" not in condition[-1].rest:
        return None
    # An operand counts from 0, by one.
    bounds = [x for x in condition if x.operation == "constant" and x.name in condition[-1].operands]
    return int(bounds[0].operands[0]) if bounds else None


def open_loops(program: Program) -> int:
    """Loops of which the text does not say how often they run, as where that depends on what they work on."""
    loops = (x for computation in program.computations.values() for x in computation if x.operation == "while")
    return sum(_turns(program, x) is None for x in loops)


def uncounted_flops(program: Program) -> int:
    """Operations of matrix products and convolutions in loops, beyond the one turn that XLA counts.

    Of a convolution those count, as XLA has it, that meet the map and not its padding.
    """

    def of(name: str, turns: int) -> tuple[int, int]:
        """With every loop's turns, of so many calls; and as XLA counts one call."""
        computation = program.computations[name]
        shapes = {x.name: x.shape for x in computation}
        whole = once = 0
        for x in computation:
            if x.operation in ("dot", "convolution"):
                flops = _flops(x, [shapes[operand] for operand in x.operands if operand in shapes])
                whole, once = whole + turns * flops, once + flops
            elif x.operation in ("while", "call", "fusion"):
                loop = x.operation == "while"
                inner = of(_named(_BODY if loop else _CALLED, x), turns * (_turns(program, x) or 1 if loop else 1))
                whole, once = whole + inner[0], once + inner[1]
        return whole, once

    whole, once = of(program.entry, 1)
    return whole - once


def _flops(x: Instruction, operands: Sequence[str]) -> int:
    """Of a product of two arrays."""
    sizes = [_sizes(shape) for shape in (*operands, x.shape)]
    if x.operation == "dot":
        contracted = _named(_CONTRACTED, x)
        return 2 * math.prod(sizes[2]) * math.prod(sizes[0][int(axis)] for axis in contracted.split(",") if axis)
    labels = _LABELS.search(x.rest)
    assert labels, x.rest
    left, kernel, result = (
        dict(zip(letters, size, strict=True)) for letters, size in zip(labels.groups(), sizes, strict=True)
    )
    window = {
        name: text.split("x") for name, text in _WINDOW.findall(x.rest.partition("window={")[2].partition("}")[0])
    }
    meetings = 1
    for axis, size in enumerate(window.get("size", ())):
        stride, spread, apart = (int(window[key][axis]) if key in window else 1 for key in _STEPS)
        low = int(window["pad"][axis].partition("_")[0]) if "pad" in window else 0
        at = stride * np.arange(result[str(axis)])[:, None] + apart * np.arange(int(size)) - low
        meetings *= int(((at >= 0) & (at <= spread * (left[str(axis)] - 1)) & (at % spread == 0)).sum())
    return 2 * result["b"] * result["f"] * kernel["i"] * meetings


def _sizes(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    assert found, shape
    return [int(size) for size in found[2].split(",") if size]


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
