"""How arrays are divided over devices: the mesh, the rules, and constraints inside programs.

A mesh has three axes. `data` splits the batch and replicates the parameters; `fsdp` splits both the
batch and the parameters; `tensor` splits attention heads, hidden units and vocabulary. Only this
module names the axes; other modules call its functions to divide arrays by rows or by `RULES`, or
to replicate them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
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
    (r"head/kernel$", P("fsdp", "tensor")),  # [D, V]
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
    devices = jax.devices()[:wanted] if devices is None else list(devices)
    # With Auto axes the compiler propagates shardings; make_mesh's default is Explicit by now.
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


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


def spec_for(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """How the parameter of this path and shape is split, by `RULES`.

    A dimension that its mesh axis does not divide is not split. Scalars (step counts) are
    replicated. Raises ValueError if no rule matches.
    """
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


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of batches and rollouts: their rows (the leading axis) over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of metrics, keys and configurations: the whole array on every device."""
    return NamedSharding(mesh, P())


def put_rows(mesh: Mesh, batch):
    """Puts a batch of host arrays onto the mesh. With several processes, each passes its rows."""
    sharding = rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


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


def _shape(leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a shape with a sharding on one device, without the padding of layouts."""
    part = leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(part)) * leaf.dtype.itemsize


def constrain_rows(x, name: str = "rows"):
    """Inside a program: the same arrays, with their rows split over data and fsdp.

    Without a mesh they are returned as they are. Raises ValueError, which calls the rows `name`, if
    the mesh does not divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    check_rows(mesh, **{name: jax.tree.leaves(x)[0].shape[0]})
    return jax.tree.map(
        lambda y: jax.lax.with_sharding_constraint(y, P(ROWS, *(None,) * (y.ndim - 1))), x
    )


def constrain_heads(x):
    """Inside a program, [B, H, ...]: rows split over data and fsdp, heads over tensor.

    Heads that the tensor axis does not divide stay whole. Without a mesh nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    heads = "tensor" if x.shape[1] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(x, P(ROWS, heads, *(None,) * (x.ndim - 2)))


def gather_width(table):
    """Inside a program, [V, D]: vocabulary split over tensor, width gathered from fsdp.

    Without a mesh nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    rows = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table, P(rows, None))
