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
from rlhf_jax.models.transformer import Model, Trunk, jit, trunk_weights


class Cache(NamedTuple):
    """The key-value cache: one buffer per layer, so that each is updated in place."""

    keys: tuple[Array, ...]  # per layer [B, K, S, Dh]
    values: tuple[Array, ...]  # per layer [B, K, S, Dh]
    attend: Int[Array, "B S"]  # 1 in columns that hold a real token
    length: Int[Array, ""]  # columns written so far; the same in all rows, padded on the left


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


@functools.partial(jit, static_argnames="size")
def prefill(
    model: Model, tokens: Int[Array, "B P"], attend: Int[Array, "B P"], size: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads prompts, padded on the left: (hidden state of their last token, key-value cache).

    The cache has `size` columns: the width of the prompts plus the longest response.
    Raises ValueError if that is too long for the model (`check_length`).
    """
    transformer.check_length(model.config, size)
    width, at = tokens.shape[1], transformer.positions(attend)
    inputs = transformer.attention_inputs(model.config, at, attend)
    trunk = Trunk(model.config, decoding=True)
    hidden, kv = trunk.apply({"params": trunk_weights(model)}, tokens, at, inputs)

    def grow(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - width), (0, 0)))

    cache = Cache(
        keys=tuple(grow(keys) for keys, _ in kv),
        values=tuple(grow(values) for _, values in kv),
        attend=jnp.pad(attend, ((0, 0), (0, size - width))),
        length=jnp.int32(width),
    )
    return hidden[:, -1], cache


@jit
def decode(
    model: Model, cache: Cache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Cache]:
    """Appends one token to every row: (its hidden state, the cache with it)."""
    c = model.config
    at = jnp.sum(cache.attend > 0, axis=1)[:, None]
    attend = jax.lax.dynamic_update_slice_in_dim(
        cache.attend, jnp.ones_like(cache.attend[:, :1]), cache.length, axis=1
    )
    inputs = transformer.attention_inputs(c, at, attend, cache.length)
    hidden, kv = Trunk(c, decoding=True).apply(
        {"params": trunk_weights(model)}, tokens[:, None], at, inputs, cache, cache.length
    )
    keys, values = zip(*kv)
    return hidden[:, 0], Cache(keys, values, attend, cache.length + 1)
