"""One decoder-only transformer for every family: by default Llama's (RMSNorm, rotary positions,
grouped-query attention, SwiGLU), with an option for each way in which the others differ. An
option that is off adds no operation.

Linen modules with the cache as an argument, wrapped by pure functions over a `Model`: weights
together with the (static) shape that reads them. Axes: B batch, T time, S cache length, D width,
H query heads, K key/value heads, G = H / K, F hidden units, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import config, sharding
from rlhf_jax.models import rope


class Config(config.Config):
    """Shape of a transformer. Parameters are born float32; `dtype` is what products are done in.

    The defaults are Llama's. With `window` a token sees that many tokens, itself included, in all
    layers but `full_layers`, and those windowed layers turn by `local_rope_base` where it is set.
    """

    vocab_size: int = 512
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    d_ff: int = 704
    max_length: int = 2048
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: int = 0  # unused first rows of a table of learned positions (OPT has 2)
    rope_base: float = 10000.0
    rope_scaling: rope.Scaling = rope.Scaling()
    rotary_dim: int | None = None  # leading features of a head that turn; None: all
    local_rope_base: float | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # Gemma's scale is 1 + the parameter
    norm_eps: float = 1e-5
    post_norms: bool = False  # each branch's output is normalised too
    parallel: bool = False  # attention and MLP read the same input
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalised, head by head
    query_scalar: int | None = None  # attention is divided by its root; None: head_dim
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    embed_scale: bool = False  # embeddings are multiplied with the root of the width
    tied: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
}


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


# Of float32 arrays too a TPU would multiply bfloat16, a GPU TF32. bfloat16 arrays are not affected.
dot = functools.partial(jnp.matmul, precision="highest")
_einsum = functools.partial(jnp.einsum, precision="highest")


class Linear(nn.Module):
    """x @ kernel. Tokens are flattened first: [B, T, D] products are 1.5x slower on CPU."""

    features: int
    dtype: Any
    scale: float = 1.0
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.scale * x.shape[-1] ** -0.5)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        flat = x.reshape(-1, x.shape[-1])
        out = dot(flat, kernel.astype(self.dtype))
        if self.has_variable("params", "lora_a"):  # see lora.py
            a, b, scale = (self.get_variable("params", f"lora_{x}") for x in ("a", "b", "scale"))
            out = out + dot(dot(flat, a.astype(self.dtype)), (scale * b).astype(self.dtype))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            out = out + bias.astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


class Embed(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens, positions):
        c = self.config
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        # Rows are split over fsdp, so the width must not be: gather the table, not the lookup.
        x = sharding.gather_width(table.astype(c.dtype))[tokens]
        if c.embed_scale:
            x = x * jnp.asarray(c.d_model**0.5, c.dtype)
        if c.positions == "learned":
            rows = (c.max_length + c.position_offset, c.d_model)
            places = self.param("positions", init, rows, jnp.float32)
            x = x + sharding.gather_width(places.astype(c.dtype))[positions + c.position_offset]
        return x


class RMSNorm(nn.Module):
    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * (1 + scale if self.plus_one else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


def _norm(c: Config, name: str) -> nn.Module:
    if c.norm == "layer":
        return LayerNorm(c.norm_eps, name=name)
    return RMSNorm(c.norm_eps, c.norm == "rms_plus_one", name=name)


class Sight(NamedTuple):
    """What a layer's attention needs to know: `turn` of its queries and keys (None: they do not
    turn), and `visible` [B, T, S], who sees whom."""

    turn: tuple[Array, Array] | None
    visible: Array


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, sight, past=None, column=None):
        """[B, T, D] -> ([B, T, D], (keys, values)).

        With `past` the new keys and values are written into its buffers from `column` on.
        """
        c, dtype = self.config, x.dtype
        batch, length, _ = x.shape

        def heads(name, count, norm=None):
            y = Linear(count * c.head_dim, dtype, bias=c.qkv_bias, name=name)(x)
            y = y.reshape(batch, length, count, c.head_dim).swapaxes(1, 2)
            if norm and c.qk_norm:
                y = _norm(c, norm)(y)
            if norm and sight.turn is not None:
                y = rope.rotate(y, sight.turn)
            return sharding.constrain_heads(y)

        query = heads("query", c.num_heads, "query_norm")
        keys = heads("key", c.num_kv_heads, "key_norm")
        values = heads("value", c.num_kv_heads)
        if past is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            keys = write(past[0], keys, column, axis=2)
            values = write(past[1], values, column, axis=2)
        query = query.reshape(batch, c.num_kv_heads, -1, c.head_dim)  # [B, K, G * T, Dh]
        weights = _einsum("bkqd,bksd->bkqs", query, keys, preferred_element_type=jnp.float32)
        weights = weights * (c.query_scalar or c.head_dim) ** -0.5
        if c.attention_softcap is not None:
            weights = c.attention_softcap * jnp.tanh(weights / c.attention_softcap)
        weights = weights.reshape(batch, c.num_kv_heads, -1, length, keys.shape[2])
        # Finite: a padding row that sees nothing averages instead of turning into NaN.
        weights = jnp.where(sight.visible[:, None, None], weights, -1e30)
        weights = jax.nn.softmax(weights, axis=-1).astype(dtype)
        weights = weights.reshape(batch, c.num_kv_heads, -1, keys.shape[2])
        mixed = _einsum("bkqs,bksd->bkqd", weights, values)
        mixed = mixed.reshape(batch, c.num_heads, length, c.head_dim).swapaxes(1, 2)
        mixed = mixed.reshape(batch, length, c.num_heads * c.head_dim)
        # Residual branches start small, as in GPT-2: variance does not grow with depth.
        out = Linear(c.d_model, dtype, (2 * c.num_layers) ** -0.5, c.out_bias, name="out")(mixed)
        return out, (keys, values)


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c, act = self.config, ACTIVATIONS[self.config.activation]
        if c.gated:
            gate = Linear(c.d_ff, x.dtype, bias=c.mlp_bias, name="gate")(x)
            up = Linear(c.d_ff, x.dtype, bias=c.mlp_bias, name="up")(x)
            inner = act(gate) * up
        else:
            inner = act(Linear(c.d_ff, x.dtype, bias=c.mlp_bias, name="up")(x))
        scale = (2 * c.num_layers) ** -0.5
        return Linear(c.d_model, x.dtype, scale, c.mlp_bias, name="down")(inner)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, sight, past=None, column=None):
        c = self.config
        after = lambda name, y: _norm(c, name)(y) if c.post_norms else y  # noqa: E731
        mixed, kept = Attention(c, name="attention")(
            _norm(c, "attention_norm")(x), sight, past, column
        )
        mixed = x + after("attention_post_norm", mixed)
        read = x if c.parallel else mixed
        x = mixed + after("mlp_post_norm", MLP(c, name="mlp")(_norm(c, "mlp_norm")(read)))
        return sharding.constrain_rows(x), kept


class Trunk(nn.Module):
    """Everything but the heads: tokens to normalised hidden states.

    `sights`: of layers that see the whole text, and of those with a window (None without one).
    """

    config: Config

    @nn.compact
    def __call__(self, tokens, positions, sights, past=None, column=None):
        c = self.config
        x = sharding.constrain_rows(Embed(c, name="embed")(tokens, positions))
        kept = []
        for i in range(c.num_layers):
            layer = None if past is None else (past.keys[i], past.values[i])
            sight = sights[c.window is not None and i not in c.full_layers]
            x, pair = Block(c, name=f"layer_{i}")(x, sight, layer, column)
            kept.append(pair)
        return _norm(c, "norm")(x), tuple(kept)


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


def _sights(c: Config, places, visible, column=0, lengths=None):
    """(whole, windowed) `Sight`s of tokens at positions `places` [B, T], in columns `column` on.

    A window is counted in columns: a document's tokens stand side by side.
    """

    def turn(scaling, base, lengths):
        if c.positions == "learned":
            return None
        return rope.turns(scaling, base, c.rotary_dim or c.head_dim, places, lengths)

    whole = Sight(turn(c.rope_scaling, c.rope_base, lengths), visible)
    if c.window is None:
        return whole, None
    length, size = visible.shape[1:]
    age = column + jnp.arange(length)[:, None] - jnp.arange(size)
    local = whole.turn
    if c.local_rope_base is not None:
        local = turn(rope.Scaling(), c.local_rope_base, None)
    return whole, Sight(local, visible & (age < c.window))


def hidden_states(
    model: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Final normalised hidden states. `attend`: 0 on padding, else the document's number.

    Documents packed into one row do not see each other, and padding on either side changes
    nothing at the real positions. Raises ValueError if the rows outgrow a table of positions.
    """
    c, width = model.config, tokens.shape[1]
    if c.positions == "learned":
        check_length(c, width)
    places, visible, lengths = positions(attend), _visible(attend), None
    limit = rope.longest_alike(c.rope_scaling)
    if limit is not None and width > limit:
        same = attend[:, :, None] == attend[:, None, :]
        lengths = jnp.sum(same, axis=-1)
    sights = _sights(c, places, visible, lengths=lengths)
    return Trunk(c).apply({"params": _trunk(model)}, tokens, places, sights)[0]


def check_length(shape: Config, size: int) -> None:
    """Raises ValueError if a prompt with its response outgrows the model.

    With dynamic-NTK and LongRoPE frequencies that is the length from which a token more would
    turn all the keys in the cache another way.
    """
    limit, name = shape.max_length, "max_length"
    alike = rope.longest_alike(shape.rope_scaling)
    if shape.positions == "rotary" and alike is not None and alike < limit:
        limit, name = alike, f"{shape.rope_scaling.kind} rope, whose original_length"
    if size > limit:
        raise ValueError(
            f"prompt and response need {size} positions, but the model has {name}={limit}; "
            "shorten one of them"
        )


def prefill(
    model: Model, tokens: Int[Array, "B P"], attend: Int[Array, "B P"], size: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads left-padded prompts: hidden state of their last token, and a cache of `size` columns.

    Raises ValueError if `size` is more than the model can continue to (`check_length`).
    """
    check_length(model.config, size)
    width, places = tokens.shape[1], positions(attend)
    hidden, kept = Trunk(model.config).apply(
        {"params": _trunk(model)},
        tokens,
        places,
        _sights(model.config, places, _visible(attend)),
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
    c = model.config
    position = jnp.sum(cache.attend > 0, axis=1)[:, None]
    attend = jax.lax.dynamic_update_slice_in_dim(
        cache.attend, jnp.ones_like(cache.attend[:, :1]), cache.length, axis=1
    )
    hidden, kept = Trunk(c).apply(
        {"params": _trunk(model)},
        tokens[:, None],
        position,
        _sights(c, position, (attend > 0)[:, None], cache.length),
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
    """Hidden states to float32 logits, soft-capped where the model says so."""
    kernel = unembedding(model).astype(hidden.dtype)
    out = dot(hidden, kernel, preferred_element_type=jnp.float32)
    cap = model.config.logit_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)


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
    sights = _sights(shape, tokens, jnp.ones((1, 1, 1), bool))
    weights = Trunk(shape).init(trunk_key, tokens, tokens, sights)["params"]
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


def without_score_bias(model: Model) -> Model:
    """The model with its scalar head's bias at 0: scores shift together, rankings stay."""
    score = {**model.weights["score"], "bias": jnp.zeros((1,))}
    return Model(model.config, {**model.weights, "score": score})
