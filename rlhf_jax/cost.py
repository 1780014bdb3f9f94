"""What a compiled program does, read from its text: matrix products, bytes moved, collectives.

    found = cost.of(hlo.read(compiled.as_text()))

XLA's own `cost_analysis()` counts the body of a loop once. Here everything in a loop is counted as
often as the loop runs, nested loops included. All figures are of one device. What is read is the
optimised module, so products that the compiler merged, repeated or left out are counted as it will
run them.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from rlhf_jax.hlo import CALLED, NAMES, Instruction, Module, Shape, attribute, root, trip_count

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that move nothing by themselves: names for parts of other buffers, calls, whose
# computations are counted instead, and the second half of a transfer, counted with its first.
SILENT = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
    "async-done",
    "copy-done",
    "send-done",
    "recv-done",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "domain",
    "opt-barrier",
    *(f"{kind}-done" for kind in COLLECTIVES),
}

_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")


class Collective(NamedTuple):
    """A transfer between devices, and how often a device takes part in it."""

    kind: str
    shapes: tuple[Shape, ...]  # of the whole array on one device: the larger of operand and result
    group: int  # devices that take part
    count: int  # executions
    loops: tuple[str, ...]  # the loops that it is in, outermost first, by the paths of jax
    where: str

    @property
    def payload(self) -> float:
        """Bytes of the array, once."""
        return sum((shape.bytes for shape in self.shapes), 0.0)

    @property
    def received(self) -> float:
        """Bytes that a device receives in one execution, by the ring algorithms' lower bound."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.payload


class Cost(NamedTuple):
    """What one device does in one execution of a program.

    flops: of matrix products, a multiplication and an addition counting two. bytes: read from and
    written to HBM. unbounded: loops without a trip count, counted `max_trips` times. opaque:
    kernels whose work the module does not state, so that it is missing in the other figures.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unbounded: int = 0
    opaque: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other)))

    def repeated(self, times: int, loop: str) -> Cost:
        """This, `times` times in a loop."""
        inside = tuple(
            c._replace(count=c.count * times, loops=(loop, *c.loops)) for c in self.collectives
        )
        return Cost(self.flops * times, self.bytes * times, inside, self.unbounded, self.opaque)


def of(module: Module, max_trips: int = 1) -> Cost:
    """The cost of a module.

    `max_trips` stands in for the trip count of loops whose end depends on the data.
    """
    return _Count(module, max_trips).of(None)


class _Count:
    """Adds up the cost of computations, each of which is looked at once."""

    def __init__(self, module: Module, max_trips: int):
        self.module, self.max_trips = module, max_trips
        self.of = functools.cache(self._of)

    def _of(self, name: str | None) -> Cost:
        computation = self.module.computations[name or self.module.entry]
        total = Cost()
        for instruction in computation.values():
            total = total + self._one(instruction, computation)
        return total

    def _one(self, x: Instruction, computation: dict[str, Instruction]) -> Cost:
        if x.opcode == "while":
            return self._loop(x, computation)
        if x.opcode == "conditional":
            names = _BRANCHES.search(x.rest)
            names = NAMES.findall(names[1]) if names else _EITHER.findall(x.rest)
            return max((self.of(name) for name in names), key=lambda c: (c.flops, c.bytes))
        if x.opcode in ("call", "async-start"):
            return self.of(CALLED.search(x.rest)[1])
        if x.opcode == "fusion":
            name = CALLED.search(x.rest)[1]
            inner = self.of(name)._replace(bytes=self._fusion_bytes(x, computation))
            # How a TPU names a reduce-scatter: an all-reduce of which each device makes its part.
            return _scattered(inner) if name.startswith("all-reduce-scatter") else inner
        found = Cost(bytes=self._bytes(x, computation))
        if x.opcode in ("dot", "convolution"):
            operands = [computation[name].shapes[0] for name in x.operands[:2]]
            flops = _dot_flops if x.opcode == "dot" else _convolution_flops
            return found._replace(flops=flops(x, *operands))
        if x.opcode == "custom-call":
            return _custom(x, found)
        kind = x.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            made = _collective(kind, x, computation)
            # A group of one device transfers nothing: jax asks for those over an axis of size 1.
            return found._replace(collectives=(made,) if made.group > 1 else ())
        return found

    def _loop(self, x: Instruction, computation: dict[str, Instruction]) -> Cost:
        body = self.of(attribute("body", x))
        trips = trip_count(self.module, x, computation)
        if trips is not None:
            return body.repeated(trips, x.where)
        found = body.repeated(self.max_trips, x.where)
        return found._replace(unbounded=found.unbounded + 1)

    def _bytes(self, x: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes that one instruction outside of fusions reads and writes."""
        if x.opcode in SILENT:
            return 0.0
        operands = [computation[name].shapes for name in x.operands if name in computation]
        if x.opcode in ("copy-start", "slice-start"):  # (destination, source, context)
            destination, source = x.shapes[0], operands[0][0]
            moved = min(destination.bytes, source.bytes)
            return moved * (destination.in_hbm + source.in_hbm)
        if x.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm(x.shapes)
        if x.opcode == "dynamic-update-slice":
            return 2 * _hbm(operands[1])
        return _hbm(x.shapes) + sum(map(_hbm, operands))

    def _fusion_bytes(self, x: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes at the border of a fusion. Of what it only slices, the slices count.

        A fusion that writes a slice into a buffer, which is done in place, reads and writes as much
        as that slice.
        """
        inner = self.module.computations[CALLED.search(x.rest)[1]]
        users: dict[str, list[Instruction]] = {}
        for instruction in inner.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)

        def uses(name: str) -> list[tuple[Instruction, str]]:
            """Who reads a value, and under which name: a bitcast is the same value."""
            found = []
            for user in users.get(name, ()):
                found += uses(user.name) if user.opcode == "bitcast" else [(user, name)]
            return found

        total = 0.0
        parameters = {int(p.inside): p for p in inner.values() if p.opcode == "parameter"}
        for number, operand in enumerate(x.operands):
            shapes = computation[operand].shapes if operand in computation else ()
            if number not in parameters or not shapes or not shapes[0].in_hbm:
                continue
            read = 0.0
            for user, name in uses(parameters[number].name):
                if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                    read += user.shapes[0].bytes
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    read += 0.0
                else:
                    read = math.inf
            total += min(read, _hbm(shapes))
        last = root(inner)
        roots = [inner[name] for name in last.operands] if last.opcode == "tuple" else [last]
        for shape, written in zip(x.shapes, roots):
            while written.opcode == "bitcast" and written.operands[0] in inner:
                written = inner[written.operands[0]]
            size = shape.bytes
            if written.opcode == "dynamic-update-slice":
                size = min(size, 2 * inner[written.operands[1]].shapes[0].bytes)
            total += size * shape.in_hbm
        return total


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return sum((shape.bytes for shape in shapes if shape.in_hbm), 0.0)


def _custom(x: Instruction, found: Cost) -> Cost:
    """A kernel states its work as cost_estimate, or not at all."""
    flops = re.search(r'"?flops"?:\s*"?(\d+)', x.rest)
    if flops:
        return found._replace(flops=float(flops[1]))
    kernel = re.search(r'custom_call_target="(tpu_custom_call|__cudnn|__onednn|mosaic)', x.rest)
    return found._replace(opaque=1 if kernel else 0)


def _collective(kind: str, x: Instruction, computation: dict[str, Instruction]) -> Collective:
    operands = tuple(
        s for name in x.operands if name in computation for s in computation[name].shapes
    )
    arrays = [s for s in x.shapes if s.bytes]
    if x.opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > len(operands):
        arrays = arrays[len(operands) : 2 * len(operands)]  # (operands, results, contexts)
    by_size = [sum(s.bytes for s in shapes) for shapes in (operands, arrays)]
    shapes = operands if by_size[0] > by_size[1] else tuple(arrays)
    return Collective(kind, shapes, _group(x.rest), 1, (), x.where)


def _scattered(inner: Cost) -> Cost:
    kinds = {"all-reduce": "reduce-scatter"}
    return inner._replace(
        collectives=tuple(c._replace(kind=kinds.get(c.kind, c.kind)) for c in inner.collectives)
    )


def _group(rest: str) -> int:
    """The number of devices in a group; 2 for the pairs of a permutation.

    {{0,1},{2,3}}, [2,2]<=[4] and mesh['a'=2,'b'=2] {'b'} are three ways to write groups of 2.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if tiled:
        return int(tiled[2])
    named = re.search(r"replica_groups=\w+\[([^\]]*)\] \{([^}]*)\}", rest)
    if not named:
        return 2
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)


# ---------------------------------------------------------------------------- matrix products


def _dot_flops(x: Instruction, left: Shape, _: Shape) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
    dims = [int(i) for i in contracted[1].split(",") if i] if contracted else []
    return 2.0 * x.shapes[0].size * math.prod(left.dims[i] for i in dims)


def _convolution_flops(x: Instruction, left: Shape, right: Shape) -> float:
    """2 x output positions x features x taps that fall on an element.

    On a TPU every matrix product is a convolution. Its batch dimensions are spatial ones, whose
    window is dilated so that all taps but one fall beside the array.
    """
    lhs, rest = re.search(r"dim_labels=([\w?]+)_([\w?]+->[\w?]+)", x.rest).groups()
    rhs, out = rest.split("->")
    window = re.search(r"window=\{([^}]*)\}", x.rest)
    given = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    digits = sorted(c for c in out if c.isdigit())

    def each(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * len(digits)

    sizes, strides = each("size", "1"), each("stride", "1")
    pads, dilations, spreads = each("pad", "0_0"), each("rhs_dilate", "1"), each("lhs_dilate", "1")
    taps = 1
    for i, digit in enumerate(digits):
        kernel = np.arange(int(sizes[i]))
        outputs = np.arange(x.shapes[0].dims[out.index(digit)])
        low = int(pads[i].split("_")[0])
        at = outputs[:, None] * int(strides[i]) - low + kernel[None] * int(dilations[i])
        spread, bound = int(spreads[i]), left.dims[lhs.index(digit)]
        taps *= int(np.sum((at % spread == 0) & (at >= 0) & (at // spread < bound)))
    batch = x.shapes[0].dims[out.index("b")]
    features = x.shapes[0].dims[out.index("f")]
    return 2.0 * batch * features * right.dims[rhs.index("i")] * taps
