"""What is computed of the logits or action values of several models, without a [B, T, V] array.

    chunked(token_kl, hiddens, unembeddings, tokens, temperature) -> [B, T]

A function of logits, such as `token_kl`, gets those of every head at some positions, [B, C, V]
each, and the tokens there. Inside `jax.shard_map`, `vocabulary` names the mesh axis whose shards
hold the columns of the heads; sums and maxima then run over all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import losses
from rlhf_jax.losses import Scalar


def chunked(
    of_logits: Callable,
    hiddens: tuple[Float[Array, "B T _"], ...],
    unembeddings: tuple[Float[Array, "_ V"], ...],
    tokens: Int[Array, "B T"],
    *numbers: Scalar,
    vocabulary: str | None = None,
):
    """What `of_logits` returns, [B, C] each, for all positions: [B, T] each.

    of_logits: (one [B, C, V] for each head, tokens [B, C], *numbers, vocabulary=axis) -> [B, C], or
    a tuple of them. Results are aligned to the tokens, and entry 0 is 0. Logits are computed for
    some positions at a time (`losses.chunking`), and again in the backward pass.
    """
    split, joined = losses.chunking(*tokens.shape, unembeddings[0].shape[1])

    @jax.checkpoint
    def of_chunk(arrays):
        hiddens, tokens = arrays
        logits = tuple(losses.head_logits(*x) for x in zip(hiddens, unembeddings))
        return of_logits(logits, tokens, *numbers, vocabulary=vocabulary)

    chunks = (tuple(split(losses.align(x)) for x in hiddens), split(tokens))
    return jax.tree.map(joined, jax.lax.map(of_chunk, chunks))


def of_heads(of_logits: Callable, **static: Any) -> Callable:
    """`chunked` of a function of logits with its static arguments, for `shards.over_vocabulary`."""
    return functools.partial(chunked, functools.partial(of_logits, **static))


def token_kl(
    logits: tuple[Float[Array, "B C V"], Float[Array, "B C V"]],
    tokens: Int[Array, "B C"],
    temperature: Scalar = 1.0,
    *,
    softcaps: tuple[Scalar | None, Scalar | None] = (None, None),
    vocabulary: str | None = None,
) -> Float[Array, "B C"]:
    """KL(p || q) of the distributions of each token, in nats. The logits are those of p and of q.

    The tokens are not read.
    """
    del tokens
    p, q = (
        log_softmax(losses.scaled_logits(x, temperature, cap), vocabulary)
        for x, cap in zip(logits, softcaps)
    )
    return _total(jnp.exp(p) * (p - q), vocabulary)


def chosen(
    values: tuple[Float[Array, "B C V"], ...],
    tokens: Int[Array, "B C"],
    *,
    vocabulary: str | None = None,
) -> tuple[tuple[Array, Array], ...]:
    """(value of the token, log-sum-exp of the values of all tokens), [B, C] each, of each head."""

    def of_head(values):
        columns = losses.columns(tokens, values.shape[-1], vocabulary)
        is_chosen = jnp.arange(values.shape[-1]) == columns[..., None]
        found = _total(jnp.where(is_chosen, values, 0.0), vocabulary)
        return found, _logsumexp(values, vocabulary)

    return tuple(map(of_head, values))


def soft_value(
    heads: tuple[Float[Array, "B C V"], Float[Array, "B C V"]],
    tokens: Int[Array, "B C"],
    beta: Scalar,
    *,
    softcap: Scalar | None = None,
    vocabulary: str | None = None,
) -> Float[Array, "B C"]:
    """beta log sum_a p(a) exp(Q(a) / beta). The heads are the logits of p and Q.

    It lies between the mean of Q under p (beta to infinity) and its maximum (beta to 0).
    """
    del tokens
    logprobs = log_softmax(losses.scaled_logits(heads[0], 1.0, softcap), vocabulary)
    return beta * _logsumexp(logprobs + heads[1] / beta, vocabulary)


def limited_best(
    heads: tuple[Float[Array, "B C V"], Float[Array, "B C V"], Float[Array, "B C V"]],
    tokens: Int[Array, "B C"],
    *,
    top_k: int,
    vocabulary: str | None = None,
) -> Float[Array, "B C"]:
    """The target's value of the token that Q finds best among the `top_k` most likely ones.

    The heads are the logits of a policy, Q, and its target. No gradient passes.
    """
    del tokens

    def likeliest(likely, *values):
        likely, places = jax.lax.top_k(likely, min(top_k, likely.shape[-1]))
        return likely, *(jnp.take_along_axis(x, places, axis=-1) for x in values)

    found = likeliest(*jax.lax.stop_gradient(heads))
    if vocabulary is not None:  # the likeliest of the likeliest of each shard
        gather = functools.partial(jax.lax.all_gather, axis_name=vocabulary, axis=-1, tiled=True)
        found = likeliest(*map(gather, found))
    _, values, targets = found
    best = jnp.argmax(values, axis=-1)[..., None]
    return jnp.take_along_axis(targets, best, axis=-1)[..., 0]


def log_softmax(logits: Float[Array, "B C V"], vocabulary: str | None) -> Float[Array, "B C V"]:
    """The log-softmax over all shards of the axis `vocabulary`."""
    shifted = logits - _largest(logits, vocabulary)[..., None]
    return shifted - jnp.log(_total(jnp.exp(shifted), vocabulary))[..., None]


def _logsumexp(x: Float[Array, "B C V"], vocabulary: str | None) -> Float[Array, "B C"]:
    largest = _largest(x, vocabulary)
    return largest + jnp.log(_total(jnp.exp(x - largest[..., None]), vocabulary))


def _largest(x: Float[Array, "B C V"], vocabulary: str | None) -> Float[Array, "B C"]:
    found = jax.lax.stop_gradient(jnp.max(x, axis=-1))
    return found if vocabulary is None else jax.lax.pmax(found, vocabulary)


def _total(x: Float[Array, "B C V"], vocabulary: str | None) -> Float[Array, "B C"]:
    found = jnp.sum(x, axis=-1)
    return found if vocabulary is None else jax.lax.psum(found, vocabulary)
