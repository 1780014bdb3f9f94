"""Attention one block of queries and keys at a time, in jax alone.

The softmax is taken while the blocks pass by (Milakov and Gimelshein 2018; FlashAttention,
arXiv:2205.14135), and the backward pass computes the weights of a block again from the log of
each query's sum, so no array has both the queries and the keys of a whole row. Blocks above the
diagonal, and those that a window has left behind, are not visited: which ones these are is known
when the program is compiled, so one loop runs over a constant list of blocks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import layers

HIDDEN = -1e30  # the logit of a key that a query may not see; not -inf, which would give NaN

_slice = jax.lax.dynamic_slice_in_dim
_write = jax.lax.dynamic_update_slice_in_dim
_product = functools.partial(layers.einsum, preferred_element_type=jnp.float32)


class Form(NamedTuple):
    """What is constant in a program; `attention.attend` explains the first three."""

    scale: float
    softcap: float | None
    window: int | None
    block: int  # queries, and keys, of a block


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

    `block` is the number of queries, and of keys, in a block; rows are padded to a multiple of it.
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


def _schedule(length: int, form: Form) -> Int[np.ndarray, "N 2"]:
    """First column of the queries and of the keys of each block that is not wholly hidden."""
    starts = range(0, length, form.block)
    reach = length if form.window is None else form.window
    return np.array(
        [(i, j) for i in starts for j in starts if j <= i and i - (j + form.block - 1) < reach],
        np.int32,
    )


def _hide(weights, documents, i, j, form):
    """Logits [B, K, G, C, C] of the queries from column i on and the keys from j on."""
    steps = jnp.arange(form.block)
    rows, columns = (_slice(documents, start, form.block, 1) for start in (i, j))
    seen = visible(rows, columns, i + steps, j + steps, form.window)
    return jnp.where(seen[:, None, None], weights, HIDDEN)


def _logits(query, keys, form):
    """[B, K, G, C, Dh], [B, K, C, Dh] -> [B, K, G, C, C], scaled and soft-capped, float32."""
    flat = query.reshape(*keys.shape[:2], -1, query.shape[-1])
    weights = _product("bkqd,bksd->bkqs", flat, keys).reshape(*query.shape[:4], -1) * form.scale
    if form.softcap is None:
        return weights
    return form.softcap * jnp.tanh(weights / form.softcap)


def _forward(query, keys, values, documents, form):
    """The result, and what the backward pass needs."""
    batch, heads, group, length, width = query.shape

    def step(carry, start):
        total, highest, mixed = carry
        i, j = start
        weights = _logits(_slice(query, i, form.block, 3), _slice(keys, j, form.block, 2), form)
        weights = _hide(weights, documents, i, j, form)
        before = _slice(highest, i, form.block, 3)
        now = jnp.maximum(before, jnp.max(weights, axis=-1))
        # Where all keys so far were hidden this is 1 for each of them, until a visible key, the
        # query itself at the latest, multiplies what they have left by exp(HIDDEN - now) = 0.
        weights = jnp.exp(weights - now[..., None])
        kept = jnp.exp(before - now)
        new_total = _slice(total, i, form.block, 3) * kept + jnp.sum(weights, axis=-1)
        flat = weights.astype(values.dtype).reshape(batch, heads, -1, form.block)
        new = _product("bkqs,bksd->bkqd", flat, _slice(values, j, form.block, 2))
        old = _slice(mixed, i, form.block, 3)
        new = old * kept[..., None] + new.reshape(old.shape)
        carry = _write(total, new_total, i, 3), _write(highest, now, i, 3), _write(mixed, new, i, 3)
        return carry, None

    shape = (batch, heads, group, length)
    start = jnp.zeros(shape), jnp.full(shape, HIDDEN), jnp.zeros((*shape, width))
    (total, highest, mixed), _ = jax.lax.scan(step, start, _schedule(length, form))
    out = (mixed / total[..., None]).astype(query.dtype)
    return out, (query, keys, values, documents, out, highest + jnp.log(total))


def _backward(form, saved, change):
    """Gradients of query, keys and values, from that of the result (`change`)."""
    query, keys, values, documents, out, log_total = saved
    batch, heads, _, _, width = query.shape
    # The derivative of a softmax subtracts the mean of the incoming gradient under its weights.
    mean = jnp.sum(change.astype(jnp.float32) * out, axis=-1)

    def step(carry, start):
        to_query, to_keys, to_values = carry
        i, j = start
        q, d = (_slice(x, i, form.block, 3) for x in (query, change))
        k, v = (_slice(x, j, form.block, 2) for x in (keys, values))
        logits = _logits(q, k, form)
        weights = jnp.exp(
            _hide(logits, documents, i, j, form) - _slice(log_total, i, form.block, 3)[..., None]
        )
        flat_d = d.reshape(batch, heads, -1, width)
        to_weights = _product("bkqd,bksd->bkqs", flat_d, v).reshape(weights.shape)
        to_logits = weights * (to_weights - _slice(mean, i, form.block, 3)[..., None]) * form.scale
        if form.softcap is not None:
            to_logits = to_logits * (1 - jnp.square(logits / form.softcap))

        def flat(x):
            return x.astype(query.dtype).reshape(batch, heads, -1, form.block)

        to_logits = flat(to_logits)
        to_v = _product("bkqs,bkqd->bksd", flat(weights), flat_d)
        to_k = _product("bkqs,bkqd->bksd", to_logits, q.reshape(flat_d.shape))
        to_q = _product("bkqs,bksd->bkqd", to_logits, k).reshape(q.shape)
        carry = (
            _write(to_query, _slice(to_query, i, form.block, 3) + to_q, i, 3),
            _write(to_keys, _slice(to_keys, j, form.block, 2) + to_k, j, 2),
            _write(to_values, _slice(to_values, j, form.block, 2) + to_v, j, 2),
        )
        return carry, None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, keys, values))
    gradients, _ = jax.lax.scan(step, start, _schedule(query.shape[3], form))
    return *(g.astype(x.dtype) for g, x in zip(gradients, (query, keys, values))), None


_attend.defvjp(_forward, _backward)
