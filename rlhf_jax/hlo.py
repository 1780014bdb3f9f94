"""The text of a compiled module as records, and how often its loops run."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
NAMES = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:?\{"?n"?:"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Shape(NamedTuple):
    """An array of a module: of one device, without its layout."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True  # False in a TPU's vector memory, which costs no bandwidth

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without the padding of a layout; 0 for what is no array, such as a token."""
        return float(self.size * BYTES.get(self.dtype, 0))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a module."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    rest: str  # the attributes after the operands
    inside: str  # what stands between the parentheses
    is_root: bool

    @property
    def where(self) -> str:
        """The path of jax's operation that it comes from, "" where the compiler made it."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


class Module(NamedTuple):
    """The computations of a module by name, each its instructions by name, and the entry's name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def read(text: str) -> Module:
    """Parses the text of a compiled module."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            current[found[2]] = _instruction(found, line)
        elif header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current:  # an attribute of a kernel, which goes on over several lines
            last = next(reversed(current))
            current[last] = current[last]._replace(rest=current[last].rest + line)
    if not entry:
        raise ValueError("this is not the text of a compiled module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(found: re.Match, line: str) -> Instruction:
    start = found.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    shapes = _shapes(line[start:stop])
    opcode = _OPCODE.match(line, stop)
    begin = opcode.end() - 1
    end = _closing(line, begin)
    inside, rest = line[begin + 1 : end - 1], line[end:]
    operands = tuple(NAMES.findall(inside)) if opcode[1] != "constant" else ()
    return Instruction(found[2], opcode[1], shapes, operands, rest, inside, bool(found[1]))


def _closing(line: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(line)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(x.lstrip("<=")) for x in dims.split(",") if x)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(dtype, sizes, space is None or space[1] == "0"))
    return tuple(found)


def attribute(name: str, x: Instruction) -> str:
    """The computation that an attribute such as `body` names."""
    return re.search(rf"\b{name}=%?([\w.\-]+)", x.rest)[1]


# ---------------------------------------------------------------------------- trip counts


def trip_count(module: Module, x: Instruction, computation: dict[str, Instruction]) -> int | None:
    """How often a loop runs that counts up to a constant; None for any other loop.

    A TPU's compiler does not write trip counts down, so they are read from the condition, which
    compares an entry of the loop's tuple with a constant, and from the body, which adds to it.
    """
    known = _TRIPS.search(x.rest)
    if known:
        return int(known[1])
    condition = module.computations[attribute("condition", x)]
    body = module.computations[attribute("body", x)]
    start = computation.get(x.operands[0])

    def initial(entry: int) -> int | None:
        if start is None or start.opcode != "tuple":
            return None
        value = _affine(module, computation, start.operands[entry], {})
        return value[1] if value and value[0] is None else None

    test, environment = root(condition), {}
    while test.opcode in ("fusion", "copy", "bitcast"):
        if test.opcode != "fusion":
            test = condition[test.operands[0]]
            continue
        environment = {
            i: _affine(module, condition, name, environment) for i, name in enumerate(test.operands)
        }
        condition = module.computations[CALLED.search(test.rest)[1]]
        test = root(condition)
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = (_affine(module, condition, y, environment) for y in test.operands)
    if counter is None or counter[0] is None or limit is None:
        return None
    entry, end = counter[0], limit[1] if limit[0] is None else initial(limit[0])
    last = root(body)
    step = _affine(module, body, last.operands[entry], {}) if last.opcode == "tuple" else None
    step = step[1] if step and step[0] == entry and step[1] > 0 else None
    begin = initial(entry)
    if end is None or begin is None or step is None:
        return None
    return -(-(end - counter[1] - begin) // step)


def root(computation: dict[str, Instruction]) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(x for x in computation.values() if x.is_root)


def _affine(module, computation, name: str, environment: dict) -> tuple[int | None, int] | None:
    """A whole number as (entry of the loop's tuple, or None for a constant; what is added to it).

    `environment` gives the parameters of a fused computation. None for anything else.
    """
    x = computation.get(name)
    if x is None:
        return None
    of = functools.partial(_affine, module, computation, environment=environment)
    if x.opcode == "constant":
        return (None, int(x.inside)) if re.fullmatch(r"-?\d+", x.inside) else None
    if x.opcode == "parameter":
        return environment.get(int(x.inside))
    if x.opcode == "get-tuple-element":
        return int(re.search(r"index=(\d+)", x.rest)[1]), 0
    if x.opcode in ("copy", "bitcast"):
        return of(x.operands[0])
    if x.opcode == "add":
        first, second = map(of, x.operands)
        if first is None or second is None or None not in (first[0], second[0]):
            return None
        return first[0] if second[0] is None else second[0], first[1] + second[1]
    if x.opcode == "fusion":
        inner = module.computations[CALLED.search(x.rest)[1]]
        given = {i: of(operand) for i, operand in enumerate(x.operands)}
        return _affine(module, inner, root(inner).name, given)
    return None
