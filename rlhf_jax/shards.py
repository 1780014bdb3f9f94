"""Inside compiled programs: how their arrays are divided, and what each device does on its shard.

Without a mesh (`jax.set_mesh`) all of these are the plain operations of one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.sharding import ROWS


def constrain_rows(x, name: str = "rows"):
    """Inside a program: the same arrays, with their rows split over data and fsdp.

    Without a mesh they are returned as they are. Raises ValueError, which calls the rows `name`, if
    the mesh does not divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sharding.check_rows(mesh, **{name: jax.tree.leaves(x)[0].shape[0]})
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
            x, sharding.spec_for(mesh, sharding.path_name(path), x.shape)
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
        spec = sharding.spec_for(mesh, sharding.path_name(path), x.shape)
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


def count_tokens(ids, size: int):
    """Inside a program: how often each token occurs in its row, [B, T] -> [B, V] with V = `size`.

    Ids that are negative or not below V are not counted. Where the tensor axis divides V, each
    device counts the tokens of its own part of the vocabulary, and nothing is exchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty or size % mesh.shape["tensor"] else mesh.shape["tensor"]
    width = size // parts

    def on_shard(ids):
        here = ids if parts == 1 else ids - jax.lax.axis_index("tensor") * width
        here = jnp.where((here >= 0) & (here < width), here, width)  # which is dropped
        rows = jnp.arange(ids.shape[0])[:, None]
        return jnp.zeros((ids.shape[0], width), jnp.int32).at[rows, here].add(1, mode="drop")

    if mesh.empty:
        return on_shard(ids)
    sharding.check_rows(mesh, rows=ids.shape[0])
    return jax.shard_map(
        on_shard,
        in_specs=P(ROWS),
        out_specs=P(ROWS, "tensor" if parts > 1 else None),
        check_vma=False,
    )(ids)


def _divided(mesh: AbstractMesh, spec: P) -> list[str | None]:
    """The axes of a spec; None where an axis has size 1, because nothing is exchanged over it."""
    return [axis if axis and mesh.shape[axis] > 1 else None for axis in spec]


def _rows_of(table, ids):
    """`table[ids]`, which would clamp ids outside of the table; here their rows are NaN."""
    return table.at[ids].get(mode="fill", wrap_negative_indices=False)


def lookup(table, ids, dtype, name: str = "embed/embedding", decoding: bool = False):
    """Inside a program: `table[ids].astype(dtype)`, [V, D], [B, T] -> [B, T, D].

    An id that is negative or not below V gives NaN, as `jnp.take` does, and no other token's row.
    `name` is the path of the table for `RULES`. The table stays where it is: each device looks up
    its columns for the rows of all devices that share a row of the mesh, and then they exchange
    activations. With `decoding` the table is split as `for_decoding` splits it. The gradient adds
    up in the type of the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _rows_of(table, ids).astype(dtype)
    sharding.check_rows(mesh, rows=ids.shape[0])
    size = table.shape[0]
    vocabulary, width = _divided(mesh, sharding.spec_for(mesh, name, table.shape))
    if decoding:
        width = None

    def on_shard(table, ids):
        if width:
            ids = jax.lax.all_gather(ids, width, axis=0, tiled=True)
        if vocabulary:
            absent = jnp.where((ids >= 0) & (ids < size), 0, jnp.nan).astype(dtype)
            ids = ids - jax.lax.axis_index(vocabulary) * table.shape[0]
            here = (ids >= 0) & (ids < table.shape[0])
            found = table[jnp.clip(ids, 0, table.shape[0] - 1)].astype(dtype)
            found = jax.lax.psum(jnp.where(here[..., None], found, absent[..., None]), vocabulary)
        else:
            found = _rows_of(table, ids).astype(dtype)
        if width:
            found = jax.lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True)
        return found

    return jax.shard_map(
        on_shard,
        in_specs=(P(vocabulary, width), P(ROWS)),
        out_specs=P(ROWS),
        check_vma=False,
    )(table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axis: str, dtype, x):
    """The shards [n, ...] of all devices on an axis, joined; the gradient goes back to each.

    What is exchanged has the type `dtype`. The result has that of `x`, as float32 masters do, so
    that a loop that uses it adds up its gradient in that type. jax would then reduce and scatter
    the gradient, and a TPU's compiler may reduce all of it on every device, which moves twice as
    many bytes. Here each device receives its part from every other, and adds them up.
    """
    return jax.lax.all_gather(x.astype(dtype), axis, axis=0, tiled=True).astype(x.dtype)


def _gather_forward(axis, dtype, x):
    return _gather(axis, dtype, x), None


def _gather_backward(axis, dtype, _, gradient):
    size = jax.lax.axis_size(axis)
    parts = gradient.astype(dtype).reshape(size, -1, *gradient.shape[1:])
    parts = jax.lax.all_to_all(parts, axis, split_axis=0, concat_axis=0)
    return (jnp.sum(parts.astype(gradient.dtype), axis=0),)


_gather.defvjp(_gather_forward, _gather_backward)


def over_vocabulary(fn: Callable, hidden, unembedding, tokens, *numbers):
    """Inside a program: `fn(hidden, unembedding, tokens, *numbers, vocabulary=axis)` on each shard.

    hidden [B, T, D], unembedding [D, V], tokens [B, T] -> arrays [B, T]; for several models
    `hidden` and `unembedding` are tuples. The function gets some of the rows, all of the width
    (gathered once, so that no loop of `fn` gathers it again), and the columns of one shard of the
    mesh axis `vocabulary`, or all columns with `vocabulary=None`. Its results must be the same on
    all shards of that axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(hidden, unembedding, tokens, *numbers, vocabulary=None)
    sharding.check_rows(mesh, rows=tokens.shape[0])
    specs = {sharding.spec_for(mesh, "head/kernel", x.shape) for x in jax.tree.leaves(unembedding)}
    if len(specs) > 1:
        raise ValueError(f"heads of different shapes are split differently on this mesh: {specs}")
    width, vocabulary = _divided(mesh, specs.pop())

    def on_shard(hidden, unembedding, tokens, *numbers):
        if width:
            unembedding = jax.tree.map(
                lambda x, head: _gather(width, x.dtype, head), hidden, unembedding
            )
        return fn(hidden, unembedding, tokens, *numbers, vocabulary=vocabulary)

    return jax.shard_map(
        on_shard,
        in_specs=(
            P(ROWS),
            P(width, vocabulary),
            P(ROWS),
            *(P() for _ in numbers),
        ),
        out_specs=P(ROWS),
        check_vma=False,
    )(hidden, unembedding, tokens, *numbers)
