"""Decoding with a key-value cache: the weights it reads, the prompt, and a token at a time."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import shards
from rlhf_jax.models import stacking, transformer
from rlhf_jax.models.attention import Visible
from rlhf_jax.models.transformer import Model, Trunk, jit, trunk_weights


class Cache(NamedTuple):
    """The key-value cache of M = B * N rows, of which N consecutive ones continue the same prompt.

    Where N > 1 the rows share the keys and values of their prompt. Where N = 1 these stand in the
    row's own buffer before what it writes, and nothing is shared: on a CPU two products with few
    columns each take as long as two with twice as many. Every layer has buffers of its own, so that
    each is updated in place.
    """

    # Keys and values per layer, [B, K, P, Dh] each; None per layer where nothing is shared.
    shared: tuple[tuple[Array, Array] | None, ...]
    own: tuple[tuple[Array, Array], ...]  # [M, K, R, Dh] each, or P + R columns
    attend: Int[Array, "B P"]  # 1 on the real tokens of the prompts, which are padded on the left
    length: Int[Array, ""]  # tokens that each row has written


def weights_for(model: Model) -> Model:
    """The language model as decoding reads it, to be made once before a loop over tokens.

    Layers have weights of their own, because a loop over stacked ones would copy the key-value
    cache for every token; matrices have the type of the products; and no weight is split over fsdp,
    or it would be gathered for every token. For an unstacked float32 model on one device this is
    the model itself.
    """
    model = stacking.unstack(model)

    def cast(x: Array) -> Array:
        # Norms, biases and adapters' scales are used in float32.
        return x.astype(model.config.dtype) if jnp.ndim(x) > 1 else x

    weights = {name: x for name, x in model.weights.items() if name != "score"}
    weights = shards.for_decoding(jax.tree.map(cast, weights))
    return dataclasses.replace(model, weights=weights)


@functools.partial(jit, static_argnames=("size", "rows"))
def prefill(
    model: Model, tokens: Int[Array, "B P"], attend: Int[Array, "B P"], size: int, rows: int = 1
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads prompts, padded on the left: (hidden state of their last token, key-value cache).

    `size` is the width of the prompts plus the longest response, and `rows` the number N of
    responses to each prompt. Raises ValueError if that is too long for the model (`check_length`).
    """
    transformer.check_length(model.config, size)
    width, at = tokens.shape[1], transformer.positions(attend)
    inputs = transformer.attention_inputs(model.config, at, attend)
    trunk = Trunk(model.config, decoding=True)
    hidden, kv = trunk.apply({"params": trunk_weights(model)}, tokens, at, inputs)

    def grown(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - width), (0, 0)))

    def empty(x):
        batch, heads, _, head_dim = x.shape
        shape = (batch * rows, heads, size - width, head_dim)
        return shards.constrain_heads(jnp.zeros(shape, x.dtype))

    if rows == 1:
        shared, own = (None,) * len(kv), jax.tree.map(grown, kv)
    else:
        shared, own = kv, jax.tree.map(empty, kv)
    return hidden[:, -1], Cache(shared, own, attend, jnp.int32(0))


@jit
def decode(
    model: Model, cache: Cache, tokens: Int[Array, " M"]
) -> tuple[Float[Array, "M D"], Cache]:
    """Appends one token to every row: (its hidden state, the cache with it)."""
    c = model.config
    width, rows = cache.attend.shape[1], tokens.shape[0] // cache.attend.shape[0]
    at = jnp.sum(cache.attend > 0, axis=1) + cache.length
    at = jnp.repeat(at, rows)[:, None]
    # Columns are counted from the first one of the prompt.
    is_shared, size = cache.shared[0] is not None, cache.own[0][0].shape[2]
    start, here = width if is_shared else 0, width + cache.length

    def visible(window):
        def near(columns):
            seen = columns <= here
            return seen if window is None else seen & (here - columns < window)

        prompt = cache.attend > 0
        own = near(start + jnp.arange(size))[None]
        if is_shared:
            return Visible(prompt & near(jnp.arange(width)), own)
        padded = ((0, 0), (0, size - width))
        return Visible(None, own & jnp.pad(prompt, padded, constant_values=True))

    inputs = transformer.attention_inputs(c, at, visible=visible)
    past = tuple(zip(cache.shared, cache.own))
    hidden, own = Trunk(c, decoding=True).apply(
        {"params": trunk_weights(model)}, tokens[:, None], at, inputs, past, here - start
    )
    return hidden[:, 0], cache._replace(own=own, length=cache.length + 1)
