"""Attention one block of queries at a time, in jax alone, without an array [T, T].

The weights of a block are [block, keys] and are computed again in the backward pass from the log of
each query's sum (as in FlashAttention, arXiv:2205.14135): the largest array is linear in T. The
blocks of a row are divided into groups. A group is one compiled loop over its blocks, with the keys
that its last block may see, so most keys that the diagonal hides are not read. Within a window the
row is one group, and a block reads the keys of its window alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import layers

HIDDEN = -1e30  # the logit of a key that a query may not see; not -inf, which would give NaN

GROUPS = 4  # so many loops are compiled; more would visit fewer hidden keys

_product = functools.partial(layers.einsum, preferred_element_type=jnp.float32)


class Form(NamedTuple):
    """What is constant in a program; `attention.attend` explains the first three."""

    scale: float
    softcap: float | None
    window: int | None
    block: int  # queries of a block


def visible(
    query_documents: Int[Array, "B T"],
    key_documents: Int[Array, "B S"],
    query_columns: Int[Array, " T"],
    key_columns: Int[Array, " S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Whether a query may see a key: of its own document, not later, and within the window.

    Padding counts as a document, of number 0, so every query sees at least itself. A window is
    counted in columns, which is the same as in positions because the tokens of a document stand
    side by side.
    """
    distance = query_columns[:, None] - key_columns
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return near & (query_documents[:, :, None] == key_documents[:, None, :])


def attend(
    query: Float[Array, "B H T Dh"],
    keys: Float[Array, "B K T Dh"],
    values: Float[Array, "B K T Dh"],
    documents: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    block: int,
) -> Float[Array, "B H T Dh"]:
    """Causal attention within the documents of a row; the arguments are `attention.attend`'s.

    `block` is the number of queries in a block; rows are padded to a multiple of it.
    """
    batch, heads, length, width = query.shape
    block = min(block, length)
    pad = -length % block

    def padded(x, axis):
        return jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)]) if pad else x

    out = _attend(
        # The queries of a group of heads, which share their keys, stand side by side.
        padded(query.reshape(batch, keys.shape[1], -1, length, width), 3),
        padded(keys, 2),
        padded(values, 2),
        padded(documents, 1),
        Form(scale, softcap, window, block),
    )
    return out.reshape(batch, heads, length + pad, width)[:, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, keys, values, documents, form):
    """[B, K, G, T, Dh], [B, K, T, Dh] twice, [B, T] -> [B, K, G, T, Dh]."""
    return _forward(query, keys, values, documents, form)[0]


class _Group(NamedTuple):
    """Consecutive blocks of queries, and the columns of the keys that they may see."""

    queries: slice
    keys: slice
    # So many keys are read by a block, of which the last one is its own; None: all of `keys`.
    near: int | None = None


def _groups(length: int, form: Form) -> list[_Group]:
    if form.window is not None and (near := form.window + form.block - 1) < length:
        return [_Group(slice(0, length), slice(0, length), near)]
    size = form.block * -(-length // (form.block * GROUPS))
    ends = [(i, min(i + size, length)) for i in range(0, length, size)]
    return [_Group(slice(start, end), slice(0, end)) for start, end in ends]


def _first(start, group: _Group, form: Form):
    """The first column of the keys that the block at column `start` reads."""
    return 0 if group.near is None else jnp.maximum(start + form.block - group.near, 0)


def _near(x, first, group: _Group, axis: int):
    """The keys that a block reads, of those of its group."""
    if group.near is None:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first, group.near, axis)


def _add_near(total, step, first, group: _Group):
    """Adds to the gradient of all keys, [B, K, S, Dh], that of the keys that a block reads."""
    if group.near is None:
        return total + step
    step = step + _near(total, first, group, 2)
    return jax.lax.dynamic_update_slice_in_dim(total, step, first, 2)


def _blocks(x, group: _Group, form: Form, axis: int):
    """The blocks of a group on a new leading axis, to be scanned over."""
    x = jax.lax.slice_in_dim(x, group.queries.start, group.queries.stop, axis=axis)
    x = x.reshape(*x.shape[:axis], -1, form.block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x, axis: int):
    """Undoes `_blocks`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _seen(query_documents, documents, start, group: _Group, form: Form) -> Bool[Array, "B C S"]:
    """Which of the keys that it reads the block at column `start` may see."""
    first = _first(start, group, form)
    near = _near(documents[:, group.keys], first, group, 1)
    columns, rows = first + jnp.arange(near.shape[1]), start + jnp.arange(form.block)
    return visible(query_documents, near, rows, columns, form.window)


def _capped(logits, form: Form):
    logits = logits * form.scale
    return logits if form.softcap is None else form.softcap * jnp.tanh(logits / form.softcap)


def _starts(group: _Group, form: Form):
    return jnp.arange(group.queries.start, group.queries.stop, form.block)


def _forward(query, keys, values, documents, form):
    """The result, and what the backward pass needs."""
    batch, heads, count, length, width = query.shape

    def of_group(group: _Group):
        every = [x[:, :, group.keys] for x in (keys, values)]

        def of_block(arrays):
            q, own, start = arrays
            k, v = (_near(x, _first(start, group, form), group, 2) for x in every)
            logits = _product("bkqd,bksd->bkqs", q.reshape(batch, heads, -1, width), k)
            logits = _capped(logits, form).reshape(batch, heads, count, form.block, -1)
            seen = _seen(own, documents, start, group, form)
            logits = jnp.where(seen[:, None, None], logits, HIDDEN)
            highest = jnp.max(logits, axis=-1, keepdims=True)
            weights = jnp.exp(logits - highest)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            flat = weights.astype(values.dtype).reshape(batch, heads, count * form.block, -1)
            mixed = _product("bkqs,bksd->bkqd", flat, v).reshape(q.shape) / total
            return mixed.astype(query.dtype), (highest + jnp.log(total))[..., 0]

        blocks = (_blocks(query, group, form, 3), _blocks(documents, group, form, 1))
        mixed, log_total = jax.lax.map(of_block, (*blocks, _starts(group, form)))
        return _joined(mixed, 3), _joined(log_total, 3)

    parts = [of_group(group) for group in _groups(length, form)]
    out, log_total = (jnp.concatenate(x, axis=3) for x in zip(*parts))
    return out, (query, keys, values, documents, out, log_total)


def _backward(form, saved, change):
    """Gradients of query, keys and values, from that of the result (`change`).

    Weights are [keys, queries] here, so that two of the three products with them need no transposed
    copy.
    """
    query, keys, values, documents, out, log_total = saved
    batch, heads, count, length, width = query.shape
    # The derivative of a softmax subtracts the mean of the incoming gradient under its weights.
    # As a product: XLA's own sum of so few numbers takes ten times as long on a CPU.
    mean = _product("bkgtd,bkgtd->bkgt", change, out)

    def of_group(group: _Group):
        every = [x[:, :, group.keys] for x in (keys, values)]

        def flat(x):
            return x.reshape(batch, heads, count * form.block, *x.shape[4:])

        def of_block(sums, arrays):
            q, d, log_total, mean, own, start = arrays
            first = _first(start, group, form)
            k, v = (_near(x, first, group, 2) for x in every)
            q, d, log_total, mean = map(flat, (q, d, log_total, mean))
            logits = _capped(_product("bksd,bkqd->bksq", k, q), form)
            seen = jnp.swapaxes(_seen(own, documents, start, group, form), 1, 2)
            seen = jnp.tile(seen, (1, 1, count))[:, None]  # the queries of `count` heads
            weights = jnp.where(seen, jnp.exp(logits - log_total[:, :, None]), 0.0)
            to_weights = _product("bksd,bkqd->bksq", v, d)
            to_logits = weights * (to_weights - mean[:, :, None]) * form.scale
            if form.softcap is not None:
                to_logits = to_logits * (1 - jnp.square(logits / form.softcap))
            weights, to_logits = (x.astype(query.dtype) for x in (weights, to_logits))
            steps = (
                _product("bksq,bkqd->bksd", to_logits, q),
                _product("bksq,bkqd->bksd", weights, d),
            )
            to_q = _product("bksq,bksd->bkqd", to_logits, k)
            to_q = to_q.reshape(batch, heads, count, form.block, width)
            sums = tuple(_add_near(x, step, first, group) for x, step in zip(sums, steps))
            return sums, to_q.astype(query.dtype)

        zeros = jnp.zeros(every[0].shape, jnp.float32)
        rows = (_blocks(x, group, form, 3) for x in (query, change, log_total, mean))
        blocks = (*rows, _blocks(documents, group, form, 1), _starts(group, form))
        (to_k, to_v), to_q = jax.lax.scan(of_block, (zeros, zeros), blocks)
        return to_k, to_v, _joined(to_q, 3)

    to_keys, to_values = (jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    to_query = []
    for group in _groups(length, form):
        to_k, to_v, to_q = of_group(group)
        to_keys = to_keys.at[:, :, group.keys].add(to_k)
        to_values = to_values.at[:, :, group.keys].add(to_v)
        to_query.append(to_q)
    gradients = (jnp.concatenate(to_query, axis=3), to_keys, to_values)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (query, keys, values))), None


_attend.defvjp(_forward, _backward)
