"""How arrays are divided over devices: the mesh, the rules, and where arrays are put.

A mesh has three axes. `data` splits the batch and replicates the parameters; `fsdp` splits both the
batch and the parameters; `tensor` splits attention heads, hidden units and vocabulary. Only this
module and `shards` name the axes; other modules call their functions to divide arrays by rows or by
`RULES`, or to replicate them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# (pattern of a parameter's path, how its dimensions are split); the first match counts. The path of
# an optimizer moment ends in that of its parameter, so the moment is divided in the same way. There
# is no rule for everything else: a misspelt name must fail and not be silently replicated.
RULES = (
    (r"embed/embedding$", P("tensor", "fsdp")),  # [V, D]
    (r"embed/positions$", P(None, "fsdp")),  # [T, D]
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),  # [D, H * Dh] or [D, F]
    (r"(out|down)/kernel$", P("tensor", "fsdp")),  # [H * Dh, D] or [F, D]
    (r"(query|key|value|gate|up)/bias$", P("tensor")),  # [H * Dh] or [F]
    (r"(out|down)/bias$", P()),
    (r"(head|\bq|twin)/kernel$", P("fsdp", "tensor")),  # [D, V]
    (r"lora_a$", P("fsdp", None)),  # [in, rank]
    (r"lora_b$", P(None, "fsdp")),  # [rank, out]
    (r"score/kernel$", P("fsdp", None)),  # [D, 1]
    (r"score/bias$", P()),
    (r"norm\w*/(scale|bias)$", P()),
    (r"^memory/", P()),  # what an online algorithm carries besides networks
    (r"^scorer/(?!weights/)", P()),  # the parameters of a reward that is no model
)


def make_mesh(
    data: int = 1,
    fsdp: int | None = None,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes (data, fsdp, tensor), each of the given size.

    `fsdp=None` is all devices divided by `data * tensor`. Without `devices` the mesh is of the
    first ones that there are; given ones, such as those of `plan.topology`, are all used.
    Raises ValueError if `data * tensor` does not divide the devices, if the sizes need more than
    there are, or fewer than are given.
    """
    available = jax.device_count() if devices is None else len(devices)
    if min(data, tensor, 1 if fsdp is None else fsdp) < 1:
        raise ValueError(f"mesh data={data},fsdp={fsdp},tensor={tensor}: sizes must be at least 1")
    if fsdp is None:
        if available % (data * tensor):
            raise ValueError(
                f"mesh data={data},tensor={tensor} does not divide the {available} devices; "
                "choose sizes whose product does"
            )
        fsdp = available // (data * tensor)
    wanted = data * fsdp * tensor
    if wanted > available or devices is not None and wanted < available:
        change = "lower" if wanted > available else "raise"
        raise ValueError(
            f"mesh data={data},fsdp={fsdp},tensor={tensor} needs {wanted} devices, but there are "
            f"{available}; {change} a size"
        )
    if wanted < available and devices is None and jax.process_count() > 1:
        raise ValueError(
            f"mesh data={data},fsdp={fsdp},tensor={tensor} uses {wanted} of {available} devices, "
            "but several processes need all of theirs; raise a size"
        )
    devices = jax.devices()[:wanted] if devices is None else list(devices)
    slices = len({x.slice_index for x in devices if hasattr(x, "slice_index")})
    if slices > 1:
        return _mesh_of_slices((data, fsdp, tensor), devices, slices)
    # With Auto axes the compiler propagates shardings; make_mesh's default is Explicit by now.
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def _mesh_of_slices(shape: tuple[int, int, int], devices: list, slices: int) -> Mesh:
    """A mesh of devices in groups with a fast network in each and a slow one between them.

    Slices of TPUs are divided along `data`, whose gradients are all that crosses between them.
    Machines with GPUs follow each other, so that `tensor`, the innermost axis, stays in one.
    """
    if devices[0].platform != "tpu":
        arranged = np.array(devices).reshape(shape)
    elif shape[0] % slices:
        raise ValueError(
            f"mesh data={shape[0]}: there are {slices} slices, so data must be a multiple of that; "
            f"use --mesh data={slices}"
        )
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_of(arrays) -> Mesh | None:
    """The mesh that a tree of arrays is on, by its first array; None where that is on no mesh."""
    where = _mesh_sharding(jax.tree.leaves(arrays)[0])
    return where and where.mesh


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of pieces into which the mesh splits the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def tensor_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of pieces into which the mesh splits heads, hidden units and vocabulary."""
    return mesh.shape["tensor"]


def check_rows(mesh: Mesh | AbstractMesh, **counts: int) -> None:
    """Raises ValueError, naming the field, unless each count is a multiple of `row_shards`."""
    shards = row_shards(mesh)
    for name, count in counts.items():
        if count % shards:
            raise ValueError(
                f"{name}={count} does not divide over data x fsdp = {shards} of the mesh; "
                f"use a multiple of {shards} or a smaller mesh"
            )


def path_name(path: tuple) -> str:
    """A key path of jax as text, for example "layer_0/mlp/up/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_for(mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...]) -> P:
    """How the parameter of this path and shape is split, by `RULES`.

    A dimension that its mesh axis does not divide is not split. Scalars (step counts) are
    replicated. The leading axis of stacked layers is not split, the others are as in one layer.
    Raises ValueError if no rule matches.
    """
    if re.search(r"(^|/)layers/", name):
        return P(None, *spec_for(mesh, name.replace("layers/", ""), shape[1:]))
    if not shape:
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return P(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(spec, shape)
                )
            )
    raise ValueError(f"no rule in sharding.RULES matches {name} {shape}; add one")


def tree(mesh: Mesh, arrays):
    """The sharding of every array in a tree of parameters, optimizer moments and scalars."""

    def sharding(path, leaf):
        return NamedSharding(mesh, spec_for(mesh, path_name(path), tuple(np.shape(leaf))))

    return jax.tree.map_with_path(sharding, arrays)


def with_leading_axis(array) -> NamedSharding | None:
    """The sharding of several such arrays in one; None inside a program or without a mesh."""
    where = _mesh_sharding(array)
    return where and NamedSharding(where.mesh, P(None, *where.spec))


def without_leading_axis(array) -> NamedSharding | None:
    """The sharding of a slice of the leading axis; None inside a program or without a mesh."""
    where = _mesh_sharding(array)
    return where and NamedSharding(where.mesh, P(*where.spec[1:]))


def _mesh_sharding(array) -> NamedSharding | None:
    where = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    return where if isinstance(where, NamedSharding) else None


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of batches and rollouts: their rows (the leading axis) over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of metrics, keys and configurations: the whole array on every device."""
    return NamedSharding(mesh, P())


def process_rows(mesh: Mesh, count: int) -> np.ndarray:
    """The numbers of those rows of a batch of `count` that this process's devices hold, ascending.

    They need not follow each other, because a mesh orders devices by how they are wired, and where
    `tensor` reaches across processes, several of these hold the same rows. Raises ValueError if the
    mesh does not divide the rows.
    """
    check_rows(mesh, rows=count)
    return np.arange(count).reshape(row_shards(mesh), -1)[_process_shards(mesh)].reshape(-1)


def _process_shards(mesh: Mesh) -> list[int]:
    """The numbers of the row shards that this process's devices hold."""
    here = jax.process_index()
    shards = mesh.devices.reshape(row_shards(mesh), -1)
    return [i for i, shard in enumerate(shards) if any(x.process_index == here for x in shard)]


def put_rows(mesh: Mesh, batch):
    """Puts a batch of host arrays onto the mesh, split by rows.

    With several processes each passes its own rows (`process_rows`), and nothing is communicated.
    """
    sharding = rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    own, shards = _process_shards(mesh), row_shards(mesh)

    def put(x):
        size = x.shape[0] // len(own)

        def piece(index):
            begin = own.index((index[0].start or 0) // size) * size
            return x[begin : begin + size]

        return jax.make_array_from_callback((size * shards, *x.shape[1:]), sharding, piece)

    return jax.tree.map(put, batch)


def own_rows(arrays):
    """The rows of arrays split by rows that this process answers for, on the host.

    Every row belongs to one process, also where `tensor` reaches across processes and several hold
    it; a process may then have none. Nothing is communicated. With one process these are all rows.
    """

    def pieces(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        size = x.shape[0] // row_shards(x.sharding.mesh)
        data = {(shard.index[0].start or 0) // size: shard.data for shard in x.addressable_shards}
        return [data[i] for i in _own_shards(x.sharding.mesh)]

    def join(x, found):
        if isinstance(found, list):
            return np.concatenate(found) if found else np.zeros((0, *x.shape[1:]), x.dtype)
        return found

    leaves, structure = jax.tree.flatten(arrays)
    found = jax.device_get([pieces(x) for x in leaves])
    return jax.tree.unflatten(structure, map(join, leaves, found))


def put_own_rows(mesh: Mesh, array: np.ndarray, count: int):
    """The inverse of `own_rows` for one array of `count` rows in all; nothing is waited for.

    Where `tensor` reaches across processes, the devices send the rows to those that lack them.
    """
    shards = mesh.devices.reshape(row_shards(mesh), -1)
    if all(x.process_index == shard[0].process_index for shard in shards for x in shard):
        return put_rows(mesh, array)
    own, size = _own_shards(mesh), count // len(shards)

    def piece(index):
        if index[0].start:  # not the first device of the row shard
            return np.zeros((1, size, *array.shape[1:]), array.dtype)
        begin = own.index((index[1].start or 0) // size) * size
        return array[None, begin : begin + size]

    copies = (mesh.shape["tensor"], count, *array.shape[1:])
    found = jax.make_array_from_callback(copies, NamedSharding(mesh, P("tensor", ROWS)), piece)
    return _first_copy(rows(mesh))(found)


@functools.lru_cache
def _first_copy(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda x: x[0], out_shardings=sharding)


def _own_shards(mesh: Mesh) -> list[int]:
    """The numbers of the row shards of which this process holds the first device."""
    here = jax.process_index()
    shards = mesh.devices.reshape(row_shards(mesh), -1)
    return [i for i, shard in enumerate(shards) if shard[0].process_index == here]


def gather(arrays):
    """The same arrays, readable by every process: those split over several are made whole.

    This only enqueues work on the devices, each of which will hold the whole arrays. All processes
    must call it, in the same order. With one process nothing happens.
    """

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return _copy_to(replicated(x.sharding.mesh))(x)

    return jax.tree.map(whole, arrays)


@functools.lru_cache
def _copy_to(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda x: x, out_shardings=sharding)


def to_host(arrays):
    """A tree of arrays as arrays of the host, whole on every process.

    Where they are split over several processes, one at a time is gathered onto every device, so the
    devices need room for the largest of them. All processes must call it, in the same order.
    """
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return jax.tree.map(lambda x: jax.device_get(gather(x)), arrays)


def place(mesh: Mesh, arrays):
    """Puts existing parameters onto the mesh, split by `RULES`; not copied if they are there."""
    return jax.device_put(arrays, tree(mesh, arrays))


def initialise(mesh: Mesh, init: Callable, *args, static_argnums=()):
    """`init(*args)`, computed already sharded by `RULES`, so that no device holds a whole tree.

    `static_argnums`, as in `jax.jit`, names the arguments that are constants of the program, such
    as a model's shape. jax caches a compiled program with its function, so pass a function that is
    defined once and takes what varies as arguments. A lambda or a `functools.partial` made for the
    call is a new function, which is compiled again.
    """
    shapes = jax.jit(init, static_argnums=static_argnums).eval_shape(*args)
    compiled = jax.jit(init, static_argnums=static_argnums, out_shardings=tree(mesh, shapes))
    return compiled(*args)


def abstract(mesh: Mesh, init: Callable, *args, static_argnums=()):
    """What `initialise` would return, as shapes with their shardings: nothing is computed.

    The arguments may be shapes themselves.
    """
    shapes = jax.jit(init, static_argnums=static_argnums).eval_shape(*args)
    return jax.tree.map(_shape, shapes, tree(mesh, shapes))


def abstract_rows(mesh: Mesh, batch):
    """What `put_rows` would return for a batch of shapes, as shapes with their shardings."""
    return jax.tree.map(lambda x: _shape(x, rows(mesh)), batch)


def cast(x, dtype):
    """An array, or a shape with a sharding, in another type; itself where it has that type."""
    if x.dtype == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)


def _shape(leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a shape with a sharding on one device, without the padding of layouts."""
    part = leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(part)) * leaf.dtype.itemsize
