"""Model FLOPs: the multiplications and additions that a transformer's definition asks for.

They are counted from a model's `Config` and from its real tokens, and they do not depend on how a
program computes them: rematerialisation, padding and the masked half of the attention matrix are
work, but not model FLOPs. Divided by the time and by the peak rate of the devices they are the
model-FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, where each token
attends to whole rows; here a token attends to itself and to what stands before it).

A multiplication and an addition are 2 FLOPs. A forward pass is 2 per token for every weight of a
matrix product, 4 per query head, feature and attended token in each layer, and 2 D V where logits
are needed. A backward pass costs twice its forward pass. Left out are norms, activations, rotary
angles, softmax, embedding lookups, scalar heads and the products of adapters, which are small.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import partition, transformer
from rlhf_jax.models.transformer import Config, Model


def trunk_weights(c: Config) -> int:
    """Entries of the matrices that every token is multiplied with: no embedding, head or norms."""
    attention = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + (3 if c.gated else 2) * c.d_model * c.d_ff)


def forward(c: Config, tokens, attended, logits=0):
    """FLOPs of a forward pass over `tokens`, with a vocabulary product at `logits` of them.

    `attended` is the number of tokens attended to, summed over the tokens and over the layers: see
    `attended_in_row` and `attended_in_rows`. The three may be numbers or traced scalars.
    """
    # Real numbers, because the weights of a large model overflow jax's integers.
    products = float(trunk_weights(c)) * tokens + float(c.d_model * c.vocab_size) * logits
    return 2.0 * (products + 2.0 * c.num_heads * c.head_dim * attended)


def attended_in_row(c: Config, first: int, last: int) -> int:
    """Tokens that the positions [first, last) of one document attend to, over all layers."""
    windowed = _windowed_layers(c)
    everything = (last * (last + 1) - first * (first + 1)) // 2
    if not windowed:
        return c.num_layers * everything
    local = sum(min(position + 1, c.window) for position in range(first, last))
    return (c.num_layers - windowed) * everything + windowed * local


def attended_in_rows(c: Config, attend: Int[Array, "B T"]) -> Float[Array, ""]:
    """The same for rows of documents and padding (`attend` as in `transformer.hidden_states`)."""
    real = (attend > 0).astype(jnp.float32)  # whose sums do not overflow as integers may
    seen = (transformer.positions(attend) + 1) * real
    windowed = _windowed_layers(c)
    everything = (c.num_layers - windowed) * jnp.sum(seen)
    return everything + windowed * jnp.sum(jnp.minimum(seen, c.window)) if windowed else everything


def _windowed_layers(c: Config) -> int:
    return 0 if c.window is None else sum(i not in c.full_layers for i in range(c.num_layers))


def per_token(c: Config, length: int, training: bool = False) -> float:
    """FLOPs per token of a language model on rows of `length` tokens: 2 N, or 6 N in training.

    To these products with N weights, the head's included, comes the attention within the row.
    """
    row = forward(c, length, attended_in_row(c, 0, length), logits=length)
    return (3.0 if training else 1.0) * row / length


def of_update(trainable: dict, frozen: dict, attend: Int[Array, "*b T"]) -> Float[Array, ""]:
    """FLOPs of one update of supervised training on rows [.., T].

    A language model's logits are counted at every real token; a model with a scalar head has none,
    unless it has a language-model head of its own.
    """
    rows = attend.reshape(-1, attend.shape[-1])
    total = jnp.float32(0.0)
    for name, model in _models(trainable, frozen).items():
        speaks = {"head", "q"} & model.weights.keys() or not transformer.has_score_head(model)
        passes = _passes(name, trainable, frozen)
        total += passes * _of_rows(model.config, rows, jnp.sum(rows > 0) * bool(speaks))
    return total


def of_iteration(
    trainable: dict,
    frozen: dict,
    *,
    sampled: Int[Array, "B T"],
    trained: Int[Array, "*b T"],
    start: int,
    samples: int,
    num_epochs: int,
) -> Float[Array, ""]:
    """FLOPs of one iteration of an online algorithm: `sampled` and `trained` are `attend` of rows.

    The policy samples, which is one forward pass with the cache that reads the prompt of `samples`
    consecutive rows once; every model reads the sampled rows once; in every epoch the trained ones
    are updated on the rows `trained`, which may be fewer. Policy and reference need logits, at the
    real tokens from column `start` on, where the responses begin.
    """
    total = jnp.float32(0.0)
    for name, model in _models(trainable, frozen).items():
        speaks = name in ("policy", "reference")
        once = _of_responses(model.config, sampled, start, speaks)
        total += once
        if name == "policy":
            prompts, each = sampled[:, :start], sampled[::samples, :start]
            repeated = _of_rows(model.config, prompts, 0) - _of_rows(model.config, each, 0)
            total += once - repeated
        if name in trainable:
            passes = num_epochs * _passes(name, trainable, frozen)
            total += passes * _of_responses(model.config, trained, start, speaks)
    return total


def _of_responses(c: Config, attend: Int[Array, "*b T"], start: int, speaks: bool):
    """A forward pass over rows, with logits at the real tokens from column `start` on."""
    rows = attend.reshape(-1, attend.shape[-1])
    return _of_rows(c, rows, jnp.sum(rows[:, start:] > 0) * speaks)


def _models(trainable: dict, frozen: dict) -> dict[str, Model]:
    """Every model by name; a reward's parameters need not be one."""
    params: dict[str, Any] = partition.combine(frozen, trainable)
    return {name: model for name, model in params.items() if isinstance(model, Model)}


def _passes(name: str, trainable: dict, frozen: dict) -> float:
    """The cost of an update in forward passes. No gradient is needed of a frozen weight: the base
    of an adapter only passes the gradient on, which is half of a backward pass."""
    if name not in trainable:
        return 1.0
    return 2.0 if name in frozen else 3.0


def _of_rows(c: Config, attend, logits) -> Float[Array, ""]:
    tokens = jnp.sum(attend > 0).astype(jnp.float32)
    return forward(c, tokens, attended_in_rows(c, attend), jnp.asarray(logits, jnp.float32))
