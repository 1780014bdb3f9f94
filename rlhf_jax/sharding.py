"""Where arrays live: mesh axes, the one table of rules, and the constraints inside programs.

A mesh has three axes. `data` replicates parameters and splits the batch; `fsdp` splits both the
parameters and the batch; `tensor` splits heads, hidden units and vocabulary. This is the only
module that spells them; every other module asks for "rows", "parameters" or "replicated".
"""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# First match wins. Optimizer moments end in the path of their parameter, so they match too.
# There is no catch-all row: a misspelt name must fail, not be silently replicated.
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
)


def make_mesh(data: int = 1, fsdp: int | None = None, tensor: int = 1) -> Mesh:
    """A (data, fsdp, tensor) mesh; `fsdp=None` takes the devices that the other two leave.

    Raises ValueError if the sizes ask for more devices than there are, or do not divide them.
    """
    available = jax.device_count()
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
    if wanted > available:
        raise ValueError(
            f"mesh data={data},fsdp={fsdp},tensor={tensor} needs {wanted} devices, but there are "
            f"{available}; lower a size"
        )
    devices = jax.devices()[:wanted]
    # Auto axes: shardings are propagated by the compiler. (make_mesh's default is now Explicit.)
    return jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def row_shards(mesh: Mesh) -> int:
    """Into how many pieces the mesh cuts the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, **counts: int) -> None:
    """Raises ValueError, naming the field, unless each count divides over the mesh's rows."""
    shards = row_shards(mesh)
    for name, count in counts.items():
        if count % shards:
            raise ValueError(
                f"{name}={count} does not divide over data x fsdp = {shards} of the mesh; "
                f"use a multiple of {shards} or a smaller mesh"
            )


def path_name(path: tuple) -> str:
    """`('layer_0', 'mlp', 'up', 'kernel')` as jax key path -> "layer_0/mlp/up/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_for(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The rule of one parameter. An axis that does not divide its dimension is left out.

    Scalars (step counts) are replicated. Raises ValueError where no rule matches.
    """
    if not shape:
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, name):
            fits = [
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape)
            ]
            return P(*fits)
    raise ValueError(f"no rule in sharding.RULES matches {name} {shape}; add one")


def tree(mesh: Mesh, arrays):
    """Shardings of a tree of parameters, optimizer moments and scalars, by `RULES`."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, spec_for(mesh, path_name(path), tuple(np.shape(leaf)))
        ),
        arrays,
    )


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp: batches and rollouts."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device: metrics, keys, configurations."""
    return NamedSharding(mesh, P())


def put_rows(mesh: Mesh, batch):
    """A host batch onto the mesh. With several processes each passes its own rows."""
    sharding = rows(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place(mesh: Mesh, arrays):
    """Parameters that already exist onto the mesh, by `RULES`; no copy if they are there."""
    return jax.device_put(arrays, tree(mesh, arrays))


def born(mesh: Mesh, init, *args):
    """`init(*args)`, compiled with sharded outputs: no device ever holds the whole tree."""
    shardings = tree(mesh, jax.eval_shape(init, *args))
    return jax.jit(init, out_shardings=shardings)(*args)


def constrain_rows(x):
    """Inside a program: keep the leading axis split over data and fsdp. No-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.tree.map(
        lambda y: jax.lax.with_sharding_constraint(y, P(ROWS, *(None,) * (y.ndim - 1))), x
    )


def constrain_heads(x):
    """[B, H, ...]: rows over data and fsdp, heads over tensor where they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    heads = "tensor" if x.shape[1] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(x, P(ROWS, heads, *(None,) * (x.ndim - 2)))


def gather_width(table):
    """[V, D]: the vocabulary stays over tensor, the width is gathered from fsdp."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    rows = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table, P(rows, None))
