"""What a run needs on a TPU slice that is not there: memory, work, transfers, and whether it fits.

    devices = plan.topology("v5e:4x4")
    mesh = sharding.make_mesh(devices=devices)
    rows = [plan.compiled(program, mesh) for program in programs(config, context)]

Every program is compiled by the TPU's own compiler (libtpu, which runs on any Linux machine), from
shapes alone. All figures are of one device. `launch` calls `report` for `--plan`, and
`docs/scaling.md` says how to read its table.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import importlib.util
import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.interpreters import partial_eval

from rlhf_jax import chips, cost, hlo, sharding
from rlhf_jax.abstract import Program
from rlhf_jax.cost import Collective, Cost

GIB = 2**30
# The lowest, which compiles about four times as fast. It can change which collectives appear and
# what memory a program takes, so tables name the effort that made them.
EFFORT = -1.0


class Chip(NamedTuple):
    """One chip of a TPU in its slice; `chips` has its peak figures."""

    kind: str  # jax's `device_kind`
    links: float  # bytes per second from its neighbours, over all of its links together
    dims: int  # of the torus that a slice is
    settings: dict[str, str]  # for the compiler

    @property
    def peak(self) -> chips.Chip:
        """Its memory and rates."""
        return chips.CHIPS[self.kind]


# links: of the page of each chip in Google Cloud's TPU documentation ("TPU v5e", "TPU v5p",
# "TPU v6e"): v5e's are "Interchip Interconnect BW 1600 Gbps", v5p's 4800 Gbps and v6e's 3584 Gbps;
# newer versions of the pages give both directions together, as bytes, and round. For v4 the page
# names none: 6 links of 50 GB/s are from arXiv:2304.01433, table 4.
CHIPS = {
    "v4": Chip("TPU v4", 300e9, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip("TPU v5 lite", 200e9, 2, {}),
    "v5p": Chip("TPU v5", 600e9, 3, {}),
    "v6e": Chip("TPU v6 lite", 448e9, 2, {}),
}
SLICES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}


class Row(NamedTuple):
    """One program on one device. Without a `cost` it was not compiled: it does not fit, or is none.

    alone: bytes that the program needs with the arguments that it reads. elsewhere: bytes of what
    is resident and not among these; negative where arguments share a buffer. seconds: of compiling.
    """

    program: Program
    alone: float
    elsewhere: float
    cost: Cost | None
    seconds: float
    broken: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes that the device must have."""
        return self.alone + self.elsewhere


def topology(name: str) -> list[jax.Device]:
    """The devices of a slice, for example "v5e:4x4", which can be compiled for but hold nothing.

    Raises ValueError for a slice that does not exist, and without the compiler.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    sizes = shape.split("x")
    exists = chip and len(sizes) == chip.dims and all(re.fullmatch("[1-9][0-9]*", x) for x in sizes)
    if not exists:
        _unknown(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--plan {name}: the TPU's compiler is not installed; pip install -e '.[plan]'"
        )
    # Without these the compiler asks a cloud's metadata server where it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    settings = chip.settings
    if math.prod(map(int, sizes)) == 1:
        settings = {**settings, "chips_per_host_bounds": [1, 1, 1]}
    try:
        found = topologies.get_topology_desc(name, "tpu", **settings)
    except jax.errors.JaxRuntimeError as error:
        _unknown(name, error)
    return list(found.devices)


def _unknown(name: str, error: Exception | None = None) -> NoReturn:
    kind, _, shape = name.lower().partition(":")

    def closest(word: str, words: Iterable[str]) -> str:
        return max(words, key=lambda x: difflib.SequenceMatcher(None, word, x).ratio())

    guess = closest(kind, CHIPS)
    raise ValueError(
        f"--plan {name}: no such slice; did you mean {guess}:"
        f"{closest(shape, SLICES[CHIPS[guess].dims])}? A slice is a chip ({', '.join(CHIPS)}) and "
        "the sizes of its torus"
    ) from error


def chip_of(mesh: jax.sharding.Mesh) -> Chip:
    """The chip that a mesh of `topology` devices is made of."""
    kind = mesh.devices.flat[0].device_kind
    return next(chip for chip in CHIPS.values() if chip.kind == kind)


@contextlib.contextmanager
def compiler(effort: float = EFFORT) -> Iterator[None]:
    """Compiles with this effort (0 is XLA's own), anew and not from a cache."""
    settings = {
        "jax_exec_time_optimization_effort": effort,
        "jax_enable_compilation_cache": False,
    }
    before = {name: operator.attrgetter(name)(jax.config) for name in settings}

    def change(to: dict) -> None:
        for name, value in to.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax decides only once whether there is one

    change(settings)
    try:
        yield
    finally:
        change(before)


def compiled(program: Program, mesh: jax.sharding.Mesh, same: Row | None = None) -> Row:
    """Compiles a program for the mesh and reads what it does. One that does not fit has no cost.

    `same` is the row of another stage's program that is the same one, which is not compiled again.
    """
    resident = _resident(program)
    if program.function is None:
        return Row(program, 0.0, resident, None, 0.0)
    if same is not None:
        change = resident - _resident(same.program)
        return same._replace(program=program, elsewhere=same.elsewhere + change, seconds=0.0)
    start = time.perf_counter()
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments)
        lowered = traced.lower(lowering_platforms=(platform,))
    elsewhere = resident - _read_bytes(traced, program)
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        alone = exhausted(str(error))
        if alone is None:
            raise
        return Row(program, alone, elsewhere, None, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    found = cost.of(hlo.read(executable.as_text()), program.max_trips)
    alone = float(executable.memory_analysis().peak_memory_in_bytes)
    return Row(program, alone, elsewhere, found, seconds, violations(program, found, mesh))


def exhausted(message: str) -> float | None:
    """Bytes that a program needs, by the compiler's message that it does not fit.

    Its arguments and results are among them, though the message may speak of temporaries. None for
    another message.
    """
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ")


def _resident(program: Program) -> float:
    """Bytes on a device of all arguments and all that is resident, each buffer once."""
    leaves = jax.tree.leaves((program.arguments, program.resident))
    return _bytes({id(x): x for x in leaves}.values())


def _read_bytes(traced: Any, program: Program) -> float:
    """Bytes on a device of the arguments that the program reads: jax leaves out all others."""
    jaxpr = traced.jaxpr.jaxpr
    _, is_read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _bytes(x for x, used in zip(jax.tree.leaves(program.arguments), is_read) if used)


def _bytes(leaves: Iterable[Any]) -> float:
    """Bytes on a device of those that are shapes and not numbers of a configuration."""
    shapes = (x for x in leaves if isinstance(x, jax.ShapeDtypeStruct))
    return float(sum(map(sharding.device_bytes, shapes)))


def _is_same(one: Program, other: Program) -> bool:
    if one.function is None or one.function is not other.function:
        return False
    (a, tree), (b, other_tree) = (jax.tree.flatten(x.arguments) for x in (one, other))
    return tree == other_tree and a == b


# ---------------------------------------------------------------------------- rules of transfers


def violations(program: Program, found: Cost, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """What is transferred that should not be, one sentence each.

    No collective on something as large as a weight, or as wide as the vocabulary, in any loop but
    the scan over layers and the loops over optimizer steps. No all-reduce of a gradient at its full
    size where the weight is split over devices: each of these keeps only its own part.
    """
    sizes, vocabularies = _weights(program, mesh)
    lengths = _lengths(program)
    broken = collections.Counter()
    for c in found.collectives:
        for shape in c.shapes:
            # Activations [B, T, ..] may have as many elements as some weight.
            if (
                len(shape.dims) == 3
                and shape.dims[1] in lengths
                and not vocabularies & set(shape.dims)
            ):
                continue
            wide = vocabularies & set(shape.dims) and shape.size > max(shape.dims)
            if c.loops and not _may_transfer(program, c) and (shape.size in sizes or wide):
                broken[f"{c.kind} of {shape} in the loop {c.loops[-1]}"] += c.count
            elif c.kind == "all-reduce" and shape.size in sizes:
                broken[f"all-reduce of a whole gradient {shape} from {c.where}"] += c.count
    return tuple(f"{what}, {count:g} times" for what, count in broken.items())


def _weights(program: Program, mesh: jax.sharding.Mesh) -> tuple[set[int], set[int]]:
    """(numbers of elements of the weights that are split, whole or divided by `tensor`;
    sizes of the vocabulary)."""
    tensor = sharding.tensor_shards(mesh)
    sizes, vocabularies = set(), set()
    for path, leaf in jax.tree.leaves_with_path(program.arguments):
        name = sharding.path_name(path)
        if not re.search(r"weights/.*(kernel|embedding)$", name) or "score/" in name:
            continue
        if "embed/" in name:
            vocabularies |= {leaf.shape[0], leaf.shape[0] // tensor}
        size = math.prod(leaf.shape)
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        layers = leaf.shape[0] if len(leaf.shape) == 3 else 1
        if size // part > tensor:
            sizes |= {n for whole in (size, size // layers) for n in (whole, whole // tensor)}
    return sizes, vocabularies


def _lengths(program: Program) -> set[int]:
    """The lengths of the rows of tokens that a program reads."""
    leaves = jax.tree.leaves_with_path(program.arguments)
    return {leaf.shape[-1] for path, leaf in leaves if sharding.path_name(path).endswith("tokens")}


def _may_transfer(program: Program, c: Collective) -> bool:
    """Whether the innermost loop of a collective is the scan over layers or over optimizer steps.

    jax writes the path of an operation down: a gradient is under jvp, and layers are under Trunk.
    """
    loop = c.loops[-1]
    return bool(re.search(r"Trunk\)*/[^/]*/?while$|Trunk\)*/while$", loop)) or (
        program.updates and "jvp" not in loop
    )


# ---------------------------------------------------------------------------- the report


def report(
    title: str, programs: list[Program], mesh: jax.sharding.Mesh, show: Callable[[str], None]
) -> str | None:
    """Compiles all programs and shows the table, line by line.

    Returns why they do not fit, None where they do.
    """
    chip = chip_of(mesh)
    peak = chip.peak
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    show(f"{title}: {mesh.devices.size} x {chip.kind}, mesh {sizes}, compiler effort {EFFORT:g}")
    show(
        f"of one chip: {peak.hbm / GIB:g} GiB of HBM, {peak.flops / 1e12:g} TFLOP/s in bfloat16, "
        f"{peak.bandwidth / 1e9:g} GB/s of HBM, {chip.links / 1e9:g} GB/s between chips\n"
    )
    rows = []
    for line in header():
        show(line)
    with compiler():
        for program in programs:
            same = (row for row in rows if _is_same(row.program, program))
            rows.append(compiled(program, mesh, next(same, None)))
            show(line_of(rows[-1], chip))
    show("")
    for row in rows:
        for broken in row.broken:
            show(f"{row.program.name}: {broken}")
    largest = max(rows, key=lambda row: row.total)
    most = f"{largest.program.name} holds {_gib(largest.total)} of {_gib(chip.peak.hbm)} GiB"
    failed = [row for row in rows if row.total > chip.peak.hbm]
    if not failed:
        count = sum(len(row.broken) for row in rows)
        show(f"fits: {most}" + (f", but {count} transfers break a rule (above)" if count else ""))
        return None
    for row in failed:
        show(f"{row.program.name} does not fit: {'; '.join(remedies(row, mesh))}")
    return f"does not fit: {most}"


COLUMNS = (
    "program",
    "peak GiB",
    "elsewhere",
    "total",
    "of HBM",
    "TFLOP",
    "GB moved",
    "collectives: GiB (times)",
    "floors, s: products",
    "HBM",
    "links",
    "compiled in s",
)


def header() -> list[str]:
    """The first two lines of the table, which is written as Markdown."""
    return ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]


def line_of(row: Row, chip: Chip) -> str:
    """The line of a program in the table."""
    memory = [
        _gib(row.alone),
        _gib(row.elsewhere),
        _gib(row.total),
        f"{row.total / chip.peak.hbm:.0%}",
    ]
    found, program = row.cost, row.program
    if found is None:
        work = ["-"] * 6
    else:
        by_kind: dict[str, list[float]] = {}
        for c in found.collectives:
            total = by_kind.setdefault(c.kind, [0.0, 0.0])
            total[0] += c.payload * c.count
            total[1] += c.count
        listed = ", ".join(f"{k} {_gib(size)} ({n:g})" for k, (size, n) in sorted(by_kind.items()))
        received = sum(c.received * c.count for c in found.collectives)
        unknown = f" + {found.opaque} kernels" if found.opaque else ""
        work = [
            f"{found.flops / 1e12:.3g}{unknown}",
            f"{found.bytes / 1e9:.3g}{unknown}",
            listed or "none",
            f"{found.flops / chip.peak.flops:.3g}",
            f"{found.bytes / chip.peak.bandwidth:.3g}",
            f"{received / chip.links:.3g}",
        ]
    seconds = f"{row.seconds:.0f}" if program.function else "-"
    return "| " + " | ".join([program.name, *memory, *work, seconds]) + " |"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def remedies(row: Row, mesh: jax.sharding.Mesh) -> list[str]:
    """What to change so that a program fits, the largest gain first."""
    program = row.program
    held = _held(program)
    temporaries = max(row.total - sum(held.values()), 0.0)
    found = []
    rows = program.rows // sharding.row_shards(mesh)
    most = f"its temporaries take {_gib(temporaries)} GiB"
    if program.max_trips > 1:
        found.append((temporaries, f"{most}: fewer rows or a larger tensor axis"))
    elif rows > 1:
        change = f"micro_batches up to {rows} times as many with remat none, or remat full"
        found.append((temporaries, f"{most}: {change}"))
    elif program.function is not None:
        change = "layers computed again (remat), a larger tensor axis, or shorter rows"
        found.append((temporaries, f"{most} with one row per device: {change}"))
    if held["moments"]:
        size = _gib(held["moments"])
        found.append((held["moments"], f"the optimizer's moments take {size} GiB: LoRA"))
    if held["frozen"]:
        size = _gib(held["frozen"])
        found.append((held["frozen"] / 2, f"frozen float32 models take {size} GiB: bfloat16"))
    if mesh.devices.size > math.prod(mesh.shape[axis] for axis in sharding.AXES[1:]):
        found.append((held["moments"] / 4, "parameters are not split over data: fsdp instead"))
    found = [text for _, text in sorted(found, reverse=True)]
    return [*found, "or a larger slice"]


def _held(program: Program) -> dict[str, float]:
    """Bytes of arrays on a device: the optimizer's moments, frozen float32 weights, the rest."""
    sizes = {"moments": 0.0, "frozen": 0.0, "other": 0.0}
    seen: set[int] = set()
    trees: Any = (program.arguments, program.resident)
    for path, leaf in jax.tree.leaves_with_path(trees):
        if not isinstance(leaf, jax.ShapeDtypeStruct) or id(leaf) in seen:
            continue
        seen.add(id(leaf))
        name = sharding.path_name(path)
        trained = "trainable/" in name or "opt_state/" in name
        frozen = not trained and "weights/" in name and leaf.dtype == "float32"
        kind = "moments" if "opt_state/" in name else "frozen" if frozen else "other"
        sizes[kind] += sharding.device_bytes(leaf)
    return sizes
