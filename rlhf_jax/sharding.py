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
import jax.numpy as jnp
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
    return int(np.prod(part)) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize


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


def constrain(params):
    """Inside a program: the same parameters, or their gradients, split over devices by `RULES`.

    A gradient that is constrained is reduced and scattered; otherwise every device may get all of
    it. Without a mesh nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    return jax.tree.map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(
            x, spec_for(mesh, path_name(path), x.shape)
        ),
        params,
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


def platform() -> str:
    """The kind of device that a program is compiled for: "cpu", "gpu" or "tpu".

    It is that of the devices of the mesh in use, which need not be there: a program for a TPU can
    be compiled on a machine without one. Without a mesh it is jax's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def per_shard(function: Callable, *arrays):
    """Inside a program: `function(*arrays)`, run by each device on its own rows and heads.

    Arrays are [B, H, ...] or, for all heads alike, [B, T]; the result is [B, H, ...]. Compilers
    cannot split kernels, nor loops over rows, by themselves. Where the tensor axis does not divide
    the heads of an array, but is a multiple of them, these are repeated, so that each device has
    the one that its query heads share; otherwise every device computes all heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    size = mesh.shape["tensor"]
    counts = [x.shape[1] for x in arrays if x.ndim > 2]
    split = counts[0] % size == 0 and all(n % size == 0 or size % n == 0 for n in counts)

    def repeated(x):
        if x.ndim == 2 or not split or x.shape[1] % size == 0:
            return x
        return jnp.repeat(x, size // x.shape[1], axis=1)

    heads = P(ROWS, "tensor" if split else None)
    return jax.shard_map(
        function,
        in_specs=tuple(P(ROWS) if x.ndim == 2 else heads for x in arrays),
        out_specs=heads,
        check_vma=False,  # kernels do not say over which axes their results vary
    )(*(repeated(x) for x in arrays))


def for_decoding(params):
    """Inside a program: parameters split over tensor and not over fsdp, as decoding reads them.

    A step of decoding multiplies few rows by every weight. Weights split over fsdp would be
    gathered for each token; these are gathered once. Without a mesh nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def constrained(path, x):
        spec = spec_for(mesh, path_name(path), x.shape)
        spec = P(*(axis if axis == "tensor" else None for axis in spec))
        return jax.lax.with_sharding_constraint(x, spec)

    # First as they are, or a cast before this call might be moved behind the gathering.
    return jax.tree.map_with_path(constrained, constrain(params))


def constrain_vocabulary(x):
    """Inside a program, [B, n, ...]: rows split over data and fsdp, axis n over tensor.

    An n that the tensor axis does not divide is not split. Without a mesh nothing changes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = "tensor" if x.shape[1] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(x, P(ROWS, parts, *(None,) * (x.ndim - 2)))


def take_part(parts, index):
    """Inside a program: part `index` of each row, [B, n, ...], [B] -> [B, ...].

    Parts that are split over tensor are not gathered for it: each device picks from its own, and
    the picked parts are added up, all but one of which are 0.
    """
    index = index.reshape(-1, *(1,) * (parts.ndim - 1))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1:
        return jnp.take_along_axis(parts, index, axis=1)[:, 0]
    numbers = jax.lax.broadcasted_iota(index.dtype, parts.shape, 1)
    return jnp.sum(jnp.where(numbers == index, parts, 0), axis=1, dtype=parts.dtype)


def _divided(mesh: AbstractMesh, spec: P) -> list[str | None]:
    """The axes of a spec; None for those of one device, over which nothing is to be exchanged."""
    return [axis if axis and mesh.shape[axis] > 1 else None for axis in spec]


def lookup(table, ids, dtype, name: str = "embed/embedding", decoding: bool = False):
    """Inside a program: `table[ids].astype(dtype)`, [V, D], [B, T] -> [B, T, D].

    `name` is the path of the table for `RULES`. The table stays where it is: each device looks up
    its columns for the rows of all devices that share a row of the mesh, and then they exchange
    activations. With `decoding` the table is split as `for_decoding` splits it. The gradient adds
    up in the type of the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[ids].astype(dtype)
    check_rows(mesh, rows=ids.shape[0])
    vocabulary, width = _divided(mesh, spec_for(mesh, name, table.shape))
    if decoding:
        width = None

    def on_shard(table, ids):
        if width:
            ids = jax.lax.all_gather(ids, width, axis=0, tiled=True)
        if vocabulary:
            ids = ids - jax.lax.axis_index(vocabulary) * table.shape[0]
            here = (ids >= 0) & (ids < table.shape[0])
            found = table[jnp.clip(ids, 0, table.shape[0] - 1)].astype(dtype)
            found = jax.lax.psum(jnp.where(here[..., None], found, 0), vocabulary)
        else:
            found = table[ids].astype(dtype)
        if width:
            found = jax.lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True)
        return found

    return jax.shard_map(
        on_shard, in_specs=(P(vocabulary, width), P(ROWS)), out_specs=P(ROWS), check_vma=False
    )(table, ids)


def over_vocabulary(fn: Callable, hidden, unembedding, tokens, *numbers):
    """Inside a program: `fn(hidden, unembedding, tokens, *numbers, vocabulary=axis)` on each shard.

    hidden [B, T, D], unembedding [D, V], tokens [B, T] -> arrays [B, T]. The function gets some of
    the rows, all of the width (gathered once, so that no loop of `fn` gathers it again), and the
    columns of one shard of the mesh axis `vocabulary`, or all columns with `vocabulary=None`. Its
    results must be the same on all shards of that axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(hidden, unembedding, tokens, *numbers, vocabulary=None)
    check_rows(mesh, rows=tokens.shape[0])
    width, vocabulary = _divided(mesh, spec_for(mesh, "head/kernel", unembedding.shape))

    def on_shard(hidden, unembedding, tokens, *numbers):
        unembedding = unembedding.astype(hidden.dtype)
        if width:
            unembedding = jax.lax.all_gather(unembedding, width, axis=0, tiled=True)
        return fn(hidden, unembedding, tokens, *numbers, vocabulary=vocabulary)

    return jax.shard_map(
        on_shard,
        in_specs=(P(ROWS), P(width, vocabulary), P(ROWS), *(P() for _ in numbers)),
        out_specs=P(ROWS),
        check_vma=False,
    )(hidden, unembedding, tokens, *numbers)
