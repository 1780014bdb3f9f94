"""What a model says of whole rows: log-probabilities, values, scores. All aligned to tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import losses
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model


def map_rows(fn: Callable, micro_batches: int, *arrays):
    """`fn(*arrays)` computed on `micro_batches` slices of the rows, one after another.

    Memory falls to one slice's; the backward pass computes each slice's forward again. Because
    the slices meet in whole [B, ...] outputs before any loss is taken, every loss, whatever its
    reduction, is exactly the loss of the whole batch: there is no mean of means to get wrong.
    Slices are strided, so that rows split over devices stay split.
    """
    if micro_batches == 1:
        return fn(*arrays)
    rows = arrays[0].shape[0]
    if rows % micro_batches:
        raise ValueError(f"micro_batches={micro_batches} does not divide a batch of {rows} rows")
    cut = lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    join = lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:])  # noqa: E731
    one = jax.checkpoint(fn)
    return jax.tree.map(join, jax.lax.map(lambda xs: one(*xs), tuple(cut(x) for x in arrays)))


def token_logprobs(
    model: Model,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    temperature: losses.Scalar = 1.0,
    start: int = 1,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities and entropies from hidden states, nats; 0 before column `start`.

    `start` (static) skips the vocabulary product where nothing was sampled: the prompt columns.
    """
    first = max(start, 1) - 1
    logprobs, entropy = losses.chunked_token_logprobs(
        hidden[:, first:],
        transformer.unembedding(model),
        tokens[:, first:],
        temperature,
        model.config.logit_softcap,
    )
    widen = lambda x: jnp.pad(x, ((0, 0), (first, 0)))  # noqa: E731
    return widen(logprobs), widen(entropy)


def scalar(model: Model, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """The scalar head, float32."""
    head = model.weights["score"]
    return (transformer.dot(hidden.astype(jnp.float32), head["kernel"]) + head["bias"])[..., 0]


def token_values(model: Model, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Value of the state before each token is emitted: the head one token earlier."""
    return losses.align(scalar(model, hidden))


def sequence_scores(
    model: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """The scalar head at the last real token of each row, wherever the padding is. [B]"""
    hidden = transformer.hidden_states(model, tokens, attend)
    steps = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(attend > 0, steps, 0), axis=1)
    return scalar(model, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
