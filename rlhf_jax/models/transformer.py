"""One decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Linen modules with the cache as an argument, wrapped by pure functions over a `Model`: weights
together with the (static) shape that reads them. Axes: B batch, T time, S cache length, D width,
H query heads, K key/value heads, G = H / K, F hidden units, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import config, sharding


class Config(config.Config):
    """Shape of a transformer. Parameters are float32; `dtype` is what products are computed in."""

    vocab_size: int = 512
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    d_ff: int = 704
    max_length: int = 2048
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A weight tree and its shape. The shape is static, so a `Model` is an ordinary pytree.

    `weights` holds `embed`, `layer_0` .. and `norm`; `head` unless tied; `score` if it has a scalar
    head (reward model or critic).
    """

    config: Config = dataclasses.field(metadata={"static": True})
    weights: Any


class Cache(NamedTuple):
    """Keys and values of every layer, one buffer a layer so that each is updated in place.

    keys, values: per layer [B, K, S, Dh]; attend [B, S]: 1 on columns that hold a real token;
    length []: columns written so far (the same for all rows: prompts are padded on the left).
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    attend: Int[Array, "B S"]
    length: Int[Array, ""]


class Linear(nn.Module):
    """x @ kernel. Tokens are flattened first: [B, T, D] products are 1.5x slower on CPU."""

    features: int
    dtype: Any
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.scale * x.shape[-1] ** -0.5)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        flat = x.reshape(-1, x.shape[-1])
        out = flat @ kernel.astype(self.dtype)
        if self.has_variable("params", "lora_a"):  # see lora.py
            a, b, scale = (self.get_variable("params", f"lora_{x}") for x in ("a", "b", "scale"))
            out = out + flat @ a.astype(self.dtype) @ (scale * b).astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


class Embed(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        # Rows are split over fsdp, so the width must not be: gather the table, not the lookup.
        return sharding.gather_width(table.astype(c.dtype))[tokens]


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


def rotate(x: Float[Array, "B H T Dh"], turn: tuple[Array, Array]):
    """Rotary embedding, half-rotated layout (first half with second half, as transformers).

    `turn` is from `turns`. Rolled, not split and joined: about 4 % of a training step on CPU.
    """
    cos, sin = turn
    return (x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


def turns(shape: Config, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Cosines and sines for `rotate`, [B, 1, T, Dh] float32; the sines' first half is negated."""
    half = jnp.arange(0, shape.head_dim, 2, dtype=jnp.float32)
    angles = positions[:, None, :, None] * shape.rope_base ** (-half / shape.head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, turn, visible, past=None, column=None):
        """[B, T, D] -> ([B, T, D], (keys, values)). `visible` [B, T, S] says who sees whom.

        With `past` the new keys and values are written into its buffers from `column` on.
        """
        c, dtype = self.config, x.dtype
        batch, length, _ = x.shape

        def heads(name, count):
            y = Linear(count * c.head_dim, dtype, name=name)(x)
            y = y.reshape(batch, length, count, c.head_dim).swapaxes(1, 2)
            return sharding.constrain_heads(y)

        query = rotate(heads("query", c.num_heads), turn)
        keys = rotate(heads("key", c.num_kv_heads), turn)
        values = heads("value", c.num_kv_heads)
        if past is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            keys = write(past[0], keys, column, axis=2)
            values = write(past[1], values, column, axis=2)
        query = query.reshape(batch, c.num_kv_heads, -1, c.head_dim)  # [B, K, G * T, Dh]
        weights = jnp.einsum("bkqd,bksd->bkqs", query, keys, preferred_element_type=jnp.float32)
        weights = weights * c.head_dim**-0.5
        weights = weights.reshape(batch, c.num_kv_heads, -1, length, keys.shape[2])
        # Finite: a padding row that sees nothing averages instead of turning into NaN.
        weights = jnp.where(visible[:, None, None], weights, -1e30)
        weights = jax.nn.softmax(weights, axis=-1).astype(dtype)
        weights = weights.reshape(batch, c.num_kv_heads, -1, keys.shape[2])
        mixed = jnp.einsum("bkqs,bksd->bkqd", weights, values)
        mixed = mixed.reshape(batch, c.num_heads, length, c.head_dim).swapaxes(1, 2)
        mixed = mixed.reshape(batch, length, c.num_heads * c.head_dim)
        # Residual branches start small, as in GPT-2: variance does not grow with depth.
        out = Linear(c.d_model, dtype, (2 * c.num_layers) ** -0.5, name="out")(mixed)
        return out, (keys, values)


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = Linear(c.d_ff, x.dtype, name="gate")(x)
        up = Linear(c.d_ff, x.dtype, name="up")(x)
        scale = (2 * c.num_layers) ** -0.5
        return Linear(c.d_model, x.dtype, scale, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, turn, visible, past=None, column=None):
        eps = self.config.norm_eps
        mixed, kept = Attention(self.config, name="attention")(
            RMSNorm(eps, name="attention_norm")(x), turn, visible, past, column
        )
        x = x + mixed
        x = x + MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        return sharding.constrain_rows(x), kept


class Trunk(nn.Module):
    """Everything but the heads: tokens to normalised hidden states."""

    config: Config

    @nn.compact
    def __call__(self, tokens, positions, visible, past=None, column=None):
        c = self.config
        x = sharding.constrain_rows(Embed(c, name="embed")(tokens))
        turn = turns(c, positions)
        kept = []
        for i in range(c.num_layers):
            layer = None if past is None else (past.keys[i], past.values[i])
            x, pair = Block(c, name=f"layer_{i}")(x, turn, visible, layer, column)
            kept.append(pair)
        return RMSNorm(c.norm_eps, name="norm")(x), tuple(kept)


def positions(attend: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token within its document: padding does not count, segments restart at 0."""
    real = (attend > 0).astype(jnp.int32)
    before = jnp.cumsum(real, axis=1) - real
    starts = jnp.pad(attend[:, 1:] != attend[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


def _visible(attend):
    """[B, T] -> [B, T, T]: a token sees itself and earlier ones of its own document."""
    steps = jnp.arange(attend.shape[1])
    same = (attend[:, :, None] == attend[:, None, :]) & (attend[:, None, :] > 0)
    return same & (steps[:, None] >= steps[None, :])


def hidden_states(
    model: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Final normalised hidden states. `attend`: 0 on padding, else the document's number.

    Documents packed into one row do not see each other, and padding on either side changes
    nothing at the real positions.
    """
    hidden, _ = Trunk(model.config).apply(
        {"params": _trunk(model)}, tokens, positions(attend), _visible(attend)
    )
    return hidden


def check_length(shape: Config, size: int) -> None:
    """Raises ValueError if a prompt with its response outgrows the model."""
    if size > shape.max_length:
        raise ValueError(
            f"prompt and response need {size} positions, but the model has max_length="
            f"{shape.max_length}; shorten one of them"
        )


def prefill(
    model: Model, tokens: Int[Array, "B P"], attend: Int[Array, "B P"], size: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads left-padded prompts: hidden state of their last token, and a cache of `size` columns.

    Raises ValueError if `size` is more than the model's `max_length`.
    """
    check_length(model.config, size)
    width = tokens.shape[1]
    hidden, kept = Trunk(model.config).apply(
        {"params": _trunk(model)}, tokens, positions(attend), _visible(attend)
    )
    grow = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, size - width), (0, 0)))  # noqa: E731
    cache = Cache(
        keys=tuple(grow(k) for k, _ in kept),
        values=tuple(grow(v) for _, v in kept),
        attend=jnp.pad(attend, ((0, 0), (0, size - width))),
        length=jnp.int32(width),
    )
    return hidden[:, -1], cache


def decode(
    model: Model, cache: Cache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Cache]:
    """Appends one token to every row; its hidden state, and the cache with it."""
    position = jnp.sum(cache.attend > 0, axis=1)[:, None]
    attend = jax.lax.dynamic_update_slice_in_dim(
        cache.attend, jnp.ones_like(cache.attend[:, :1]), cache.length, axis=1
    )
    hidden, kept = Trunk(model.config).apply(
        {"params": _trunk(model)},
        tokens[:, None],
        position,
        (attend > 0)[:, None],
        cache,
        cache.length,
    )
    keys, values = zip(*kept)
    return hidden[:, 0], Cache(keys, values, attend, cache.length + 1)


def unembedding(model: Model) -> Float[Array, "D V"]:
    """The language-model head: its own kernel, or the transposed embedding where tied."""
    if model.config.tied:
        return model.weights["embed"]["embedding"].T
    return model.weights["head"]["kernel"]


def logits(model: Model, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """Hidden states to float32 logits."""
    kernel = unembedding(model).astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def _trunk(model):
    return {k: v for k, v in model.weights.items() if k not in ("head", "score")}


def init(shape: Config, key: Array) -> Model:
    """A new language model. Compile it through `sharding.born` to have it born sharded."""
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(
            f"num_heads={shape.num_heads} is not a multiple of num_kv_heads={shape.num_kv_heads}"
        )
    trunk_key, head_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1), jnp.int32)
    weights = Trunk(shape).init(trunk_key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"]
    if not shape.tied:
        scale = shape.d_model**-0.5
        kernel = scale * jax.random.normal(head_key, (shape.d_model, shape.vocab_size))
        weights["head"] = {"kernel": kernel}
    return Model(shape, weights)


def with_score_head(model: Model, key: Array | None) -> Model:
    """The model with a fresh scalar head: normal with std 1 / sqrt(D + 1), bias 0.

    Huang et al. 2023, item 8. `key=None` makes it exactly zero (item 11: a value head that starts
    at V = 0).
    """
    width = model.config.d_model
    kernel = jnp.zeros((width, 1)) if key is None else jax.random.normal(key, (width, 1))
    score = {"kernel": kernel * (width + 1) ** -0.5, "bias": jnp.zeros((1,))}
    return Model(model.config, {**model.weights, "score": score})


def without_lm_head(model: Model) -> Model:
    """The model without its language-model head (reward models and critics need none)."""
    return Model(model.config, {k: v for k, v in model.weights.items() if k != "head"})
