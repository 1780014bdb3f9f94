"""One decoder-only transformer for every family of models.

By default it is Llama's: RMSNorm, rotary positions, grouped-query attention and SwiGLU. What other
families do differently are options of `Config`, and an option that is off adds no operation. The
layers are linen modules; other modules call pure functions of a `Model`, which is a tree of weights
together with its configuration.

Axes: B batch, T time, S length of the key-value cache, D width of the model, H query heads, K key
and value heads, G = H / K, Dh width of a head, F hidden units of the MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import config, shards
from rlhf_jax.models import attention, layers, rope
from rlhf_jax.models.attention import AttentionInputs

Precision = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Layers = Annotated[int, config.Range(1, 10_000)]  # each of which is traced on its own


class Config(config.Config):
    """Size and options of a transformer; the defaults are those of a small Llama.

    Parameters are always initialised in float32; `dtype` is the type of matrix products.
    """

    vocab_size: config.Count = 512
    num_layers: Layers = 4
    d_model: config.Count = 256  # width of the hidden states
    num_heads: config.Count = 4  # query heads
    num_kv_heads: config.Count = 4  # key and value heads, each shared by equally many query heads
    head_dim: config.Count = 64
    d_ff: config.Count = 704  # hidden units of the MLP
    max_length: config.Count = 2048  # tokens of the longest text
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: config.Whole = 0  # unused first rows of the learned table (OPT: 2)
    rope_base: config.Positive = 10000.0
    rope_scaling: rope.Scaling = rope.Scaling()
    rotary_dim: config.Count | None = None  # leading features of a head that are rotated; None: all
    local_rope_base: config.Positive | None = None  # of layers with a window; None: rope_base
    window: config.Count | None = None  # tokens that each token attends to, with itself; None: all
    full_layers: tuple[config.Whole, ...] = ()  # layers that the window does not apply to
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # Gemma's scale is 1 + the parameter
    norm_eps: config.Positive = 1e-5
    post_norms: bool = False  # the outputs of attention and MLP are normalised too
    parallel: bool = False  # attention and MLP read the same input
    qkv_bias: bool = False  # biases of the query, key and value projections
    out_bias: bool = False  # bias of attention's output projection
    mlp_bias: bool = False  # biases of the MLP
    qk_norm: bool = False  # queries and keys are normalised, head by head
    query_scalar: config.Count | None = None  # logits are divided by its root; None: head_dim
    attention_softcap: config.Positive | None = None  # c: logits become c * tanh(logits / c)
    logit_softcap: config.Positive | None = None  # the same, for the logits of the vocabulary
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # the MLP is down(act(gate(x)) * up(x)), else down(act(up(x)))
    embed_scale: bool = False  # embeddings are multiplied by sqrt(d_model)
    tied: bool = False  # the language-model head is the transposed embedding
    dtype: Precision = "float32"  # of matrix products
    # What the backward pass of a layer computes again, to save memory: nothing, all but the matrix
    # products with kernels, or everything.
    remat: Remat = "none"
    # Training compiles one layer and loops over it (see `stacking`). None: on TPUs and GPUs.
    scan_layers: bool | None = None

    def check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """The weights of a transformer and its configuration.

    The configuration is static, so a `Model` is an ordinary pytree of its weights.
    """

    config: Config = dataclasses.field(metadata={"static": True})
    # Nested dictionaries: "embed", "layer_0", "layer_1", ... and "norm"; "head", the language-model
    # head, unless it is tied; "score", the scalar head, in a reward model or critic; "q" and "twin"
    # in a network of `action_values`. In training the first layers may be stacked in "layers": see
    # `stacking`.
    weights: Any


class Compute(NamedTuple):
    """How any model is computed, whatever its weights are: these fields of `Config`, or None.

    None leaves a field as it is.
    """

    dtype: Precision | None = None
    remat: Remat | None = None
    scan_layers: bool | None = None

    def of(self, shape: Config) -> Config:
        """The configuration with these fields."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return dataclasses.replace(shape, **given)


AS_CONFIGURED = Compute()


def as_stored(config: Config) -> Config:
    """What a folder says of a model: all but how it is computed, which has its default."""
    return dataclasses.replace(config, dtype="float32", remat="none", scan_layers=None)


def computed_as(model: Model, compute: Compute) -> Model:
    """The same weights under a configuration with the fields of `compute`."""
    return dataclasses.replace(model, config=compute.of(model.config))


class Embed(nn.Module):
    """Token ids and positions [B, T] -> embeddings [B, T, D]."""

    config: Config
    decoding: bool = False  # the table is that of `decoding.weights_for`

    @nn.compact
    def __call__(self, tokens, positions):
        c = self.config
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        x = shards.lookup(table, tokens, c.dtype, decoding=self.decoding)
        if c.embed_scale:
            x = x * jnp.asarray(c.d_model**0.5, c.dtype)
        if c.positions == "learned":
            rows = (c.max_length + c.position_offset, c.d_model)
            table = self.param("positions", init, rows, jnp.float32)
            at = positions + c.position_offset
            name = "embed/positions"
            x = x + shards.lookup(table, at, c.dtype, name, decoding=self.decoding)
        return x


def _norm(c: Config, name: str) -> nn.Module:
    if c.norm == "layer":
        return layers.LayerNorm(c.norm_eps, name=name)
    return layers.RMSNorm(c.norm_eps, c.norm == "rms_plus_one", name=name)


class Attention(nn.Module):
    """Grouped-query attention with the new tokens as queries."""

    config: Config
    window: int | None  # tokens that each attends to, with itself; None: all

    @nn.compact
    def __call__(self, x, inputs, past=None, column=None):
        """[B, T, D] -> ([B, T, D], (keys, values)).

        `past` is what the cache holds for a layer, (shared, own), each (keys, values): the one new
        token is written into column `column` of its row's own, [B, K, R, Dh], which are returned.
        Without it the keys and values are those of the input, [B, K, T, Dh].
        """
        c, dtype = self.config, x.dtype
        batch, length, _ = x.shape

        def heads(name, count, norm=None):
            y = layers.Linear(count * c.head_dim, dtype, bias=c.qkv_bias, name=name)(x)
            y = y.reshape(batch, length, count, c.head_dim).swapaxes(1, 2)
            if norm and c.qk_norm:
                y = _norm(c, norm)(y)
            if norm and inputs.rotary is not None:
                y = rope.rotate(y, inputs.rotary)
            return shards.constrain_heads(y)

        query = heads("query", c.num_heads, "query_norm")
        keys = heads("key", c.num_kv_heads, "key_norm")
        values = heads("value", c.num_kv_heads)
        how = {"scale": (c.query_scalar or c.head_dim) ** -0.5, "softcap": c.attention_softcap}
        if past is None:
            documents, window = inputs.documents, self.window
            mixed = attention.attend(query, keys, values, documents, window=window, **how)
        else:
            write = jax.lax.dynamic_update_slice_in_dim
            shared, own = past
            keys = write(own[0], keys, column, axis=2)
            values = write(own[1], values, column, axis=2)
            mixed = attention.attend_to_cache(query, shared, (keys, values), inputs.visible, **how)
        mixed = mixed.swapaxes(1, 2)
        mixed = mixed.reshape(batch, length, c.num_heads * c.head_dim)
        out = layers.Linear(c.d_model, dtype, _residual_scale(c), c.out_bias, name="out")
        return out(mixed), (keys, values)


class MLP(nn.Module):
    """The position-wise network, [B, T, D] -> [B, T, D] through F hidden units."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config

        def hidden(name):
            return layers.Linear(c.d_ff, x.dtype, bias=c.mlp_bias, name=name)(x)

        activation = layers.ACTIVATIONS[c.activation]
        if c.gated:
            inner = jax.checkpoint(lambda gate, up: activation(gate) * up)(
                hidden("gate"), hidden("up")
            )
        else:
            inner = activation(hidden("up"))
        return layers.Linear(c.d_model, x.dtype, _residual_scale(c), c.mlp_bias, name="down")(inner)


def _residual_scale(c: Config) -> float:
    """Initial scale of the kernels whose output is added to the hidden states, so that the variance
    of these does not grow with the number of layers (GPT-2, section 2.3)."""
    return (2 * c.num_layers) ** -0.5


class Block(nn.Module):
    """One layer: attention and MLP, each added to the hidden states that it reads."""

    config: Config
    window: int | None  # that of its attention

    @nn.compact
    def __call__(self, x, inputs, past=None, column=None):
        c = self.config

        def post_norm(name, y):
            return _norm(c, name)(y) if c.post_norms else y

        mix = Attention(c, self.window, name="attention")
        mixed, kv = mix(_norm(c, "attention_norm")(x), inputs, past, column)
        mixed = x + post_norm("attention_post_norm", mixed)
        mlp_input = _norm(c, "mlp_norm")(x if c.parallel else mixed)
        x = mixed + post_norm("mlp_post_norm", MLP(c, name="mlp")(mlp_input))
        return shards.constrain_rows(x), kv


class Period(nn.Module):
    """One repetition of the pattern of layers, which `Trunk` scans over."""

    config: Config
    size: int  # number of layers

    @nn.compact
    def __call__(self, x, inputs):
        for i in range(self.size):
            window = window_of(self.config, i)
            x, _ = Block(self.config, window, name=layer_name(i))(x, inputs[window is not None])
        return x, None


class Trunk(nn.Module):
    """The transformer without its heads: token ids to final hidden states.

    The weights of the first layers may be stacked (`stacking`); these are then one compiled loop.
    """

    config: Config
    repeats: int = 0  # repetitions of the pattern of layers that are stacked
    decoding: bool = False  # keys and values are kept, and nothing is differentiated

    @nn.compact
    def __call__(self, tokens, positions, inputs, past=None, column=None):
        """[B, T] -> (hidden states [B, T, D], normalised; (keys, values) per layer).

        `inputs` is a pair of `AttentionInputs`: for layers without a window and for those with one.
        Keys and values are those of the layers that are not stacked. `past` and `column` are those
        of `Attention`, the former per layer.
        """
        c, size = self.config, pattern(self.config)
        x = shards.constrain_rows(Embed(c, self.decoding, name="embed")(tokens, positions))
        if self.repeats:
            stack = nn.scan(
                _rematerialised(c, Period, in_loop=True),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.repeats,
            )
            x, _ = stack(c, size, name=STACK)(x, inputs)
        kv = []
        block = Block if self.decoding else _rematerialised(c, Block)
        for i in range(self.repeats * size, c.num_layers):
            window = window_of(c, i)
            layer = block(c, window, name=layer_name(i))
            layer_past = None if past is None else past[i]
            x, layer_kv = layer(x, inputs[window is not None], layer_past, column)
            kv.append(layer_kv)
        return _norm(c, "norm")(x), tuple(kv)


STACK = "layers"  # the key of the stacked layers in the weights
HEADS = ("head", "score", "q", "twin")  # the keys of what reads the final hidden states


def layer_name(i: int) -> str:
    """The key of a layer in the weights."""
    return f"layer_{i}"


def window_of(c: Config, i: int) -> int | None:
    """The window of layer i; None where its tokens attend to everything before them."""
    return None if i in c.full_layers else c.window


def pattern(c: Config) -> int:
    """Layers after which the kinds of layers repeat: 1 where all are alike, 2 in Gemma 2."""
    kinds = [window_of(c, i) for i in range(c.num_layers)]
    return next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[: len(kinds) - p])


def _rematerialised(c: Config, module: type[nn.Module], in_loop: bool = False) -> type[nn.Module]:
    """The module with what its backward pass computes again, as `Config.remat` says."""
    if c.remat == "none":
        return module
    # Products with kernels are kept; those of attention, which have batch axes, are not.
    dots = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    policy = dots if c.remat == "dots" else jax.checkpoint_policies.nothing_saveable
    # A loop keeps XLA from merging the second computation with the first.
    return nn.remat(module, policy=policy, prevent_cse=not in_loop)


def positions(attend: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token in its document: padding is not counted, each document starts at 0."""
    real = (attend > 0).astype(jnp.int32)
    before = jnp.cumsum(real, axis=1) - real
    starts = jnp.pad(attend[:, 1:] != attend[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


def attention_inputs(c: Config, positions, documents=None, lengths=None, visible=None):
    """`AttentionInputs` of layers without a window and of layers with one (None if there are none).

    `positions` [B, T] are those of the new tokens, and `lengths` is as in `rope.cos_sin`. Whole
    rows have `documents` [B, T]; a token that attends to a cache has `visible(window)`, which gives
    the columns that a layer with this window sees.
    """

    def rotary(scaling, base, lengths):
        if c.positions == "learned":
            return None
        return rope.cos_sin(scaling, base, c.rotary_dim or c.head_dim, positions, lengths)

    def inputs(angles, window):
        return AttentionInputs(angles, documents, visible and visible(window))

    angles = rotary(c.rope_scaling, c.rope_base, lengths)
    everything = inputs(angles, None)
    if c.window is None:
        return everything, None
    if c.local_rope_base is not None:
        angles = rotary(rope.Scaling(), c.local_rope_base, None)
    return everything, inputs(angles, c.window)


# The public functions are compiled, because a model that is run operation by operation takes many
# seconds the first time. Called within another compiled function they are inlined, which leaves
# that function's program as it would be without.
jit = functools.partial(jax.jit, inline=True)


@jit
def hidden_states(
    model: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Final normalised hidden states of whole rows.

    `attend` is 0 on padding and elsewhere the number of the document that a token belongs to (1 if
    there is one document per row). Documents packed into one row do not attend to each other, and
    padding on either side does not change the hidden states of real tokens.
    Raises ValueError if rows are longer than a table of learned positions.
    """
    c, width = model.config, tokens.shape[1]
    if c.positions == "learned":
        check_length(c, width)
    at, lengths = positions(attend), None
    fixed = rope.fixed_up_to(c.rope_scaling)
    if fixed is not None and width > fixed:
        lengths = jnp.sum(attend[:, :, None] == attend[:, None, :], axis=-1)
    inputs = attention_inputs(c, at, attend, lengths=lengths)
    trunk = trunk_weights(model)
    repeats = jax.tree.leaves(trunk[STACK])[0].shape[0] if STACK in trunk else 0
    return Trunk(c, repeats).apply({"params": trunk}, tokens, at, inputs)[0]


def check_length(shape: Config, size: int) -> None:
    """Raises ValueError if a prompt with its response, `size` tokens, is too long for the model.

    The limit is `max_length`. With dynamic-NTK and LongRoPE scaling it may be lower: a token beyond
    `original_length` would rotate all keys in the cache differently.
    """
    limit, name = shape.max_length, "max_length"
    fixed = rope.fixed_up_to(shape.rope_scaling)
    if shape.positions == "rotary" and fixed is not None and fixed < limit:
        limit, name = fixed, f"{shape.rope_scaling.kind} rope, whose original_length"
    if size > limit:
        raise ValueError(
            f"prompt and response need {size} positions, but the model has {name}={limit}; "
            "shorten one of them"
        )


def unembedding(model: Model) -> Float[Array, "D V"]:
    """The language-model head: its own kernel, or the transposed embedding where it is tied."""
    if model.config.tied:
        return model.weights["embed"]["embedding"].T
    return model.weights["head"]["kernel"]


def logits(model: Model, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """Logits of the next token from hidden states, float32, soft-capped where the model is."""
    kernel = unembedding(model).astype(hidden.dtype)
    out = layers.dot(hidden, kernel, preferred_element_type=jnp.float32)
    cap = model.config.logit_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)


def trunk_weights(model: Model) -> dict:
    """The weights that `Trunk` reads: all but those of the heads."""
    return {k: v for k, v in model.weights.items() if k not in HEADS}


def init(shape: Config, key: Array) -> Model:
    """A new language model, initialised from `key`; `sharding.initialise` makes it sharded."""
    trunk_key, head_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1), jnp.int32)
    inputs = attention_inputs(shape, tokens, tokens)
    weights = Trunk(shape).init(trunk_key, tokens, tokens, inputs)["params"]
    if not shape.tied:
        scale = shape.d_model**-0.5
        kernel = scale * jax.random.normal(head_key, (shape.d_model, shape.vocab_size))
        weights["head"] = {"kernel": kernel}
    return Model(shape, weights)


def has_score_head(model: Model) -> bool:
    """Whether the model has a scalar head, as reward models and critics do."""
    return "score" in model.weights


def with_score_head(model: Model, key: Array | None) -> Model:
    """The model with a new scalar head: kernel normal with std 1 / sqrt(D + 1), bias 0.

    Huang et al. 2023, item 8. With `key=None` the kernel is 0 too, so that a critic's values start
    at exactly 0 (item 11). Raises ValueError if the model has a scalar head already, because what
    that head has learned would be lost.
    """
    if has_score_head(model):
        raise ValueError(
            "the model already has a scalar head; train that one, or remove it first with "
            "transformer.without_score_head"
        )
    width = model.config.d_model
    kernel = jnp.zeros((width, 1)) if key is None else _random_head(width, key)
    score = {"kernel": kernel, "bias": jnp.zeros((1,))}
    return Model(model.config, {**model.weights, "score": score})


@functools.partial(jax.jit, static_argnums=0)
def _random_head(width: int, key: Array) -> Float[Array, "D 1"]:
    # Compiled, because separate operations round differently in the last digit.
    return jax.random.normal(key, (width, 1)) * (width + 1) ** -0.5


def without_score_head(model: Model) -> Model:
    """The model without its scalar head, for example to start a new one."""
    return Model(model.config, {k: v for k, v in model.weights.items() if k != "score"})


def without_lm_head(model: Model) -> Model:
    """The model without its language-model head, which reward models and critics do not need."""
    return Model(model.config, {k: v for k, v in model.weights.items() if k != "head"})


def without_score_bias(model: Model) -> Model:
    """The model with its scalar head's bias set to 0, which shifts all scores alike."""
    score = {**model.weights["score"], "bias": jnp.zeros((1,))}
    return Model(model.config, {**model.weights, "score": score})
