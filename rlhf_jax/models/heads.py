"""Log-probabilities, values and scores of whole rows.

Everything per token is aligned to the tokens: entry t is about token t, given the tokens before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import losses, shards
from rlhf_jax.models import layers, transformer
from rlhf_jax.models.transformer import Model


def map_rows(fn: Callable, micro_batches: int, *arrays, recompute: bool = True):
    """`fn(*arrays)`, computed on `micro_batches` slices of the rows one after the other.

    This divides the memory of the activations by `micro_batches`; the backward pass computes the
    forward pass of each slice again. With `recompute=False` (see `must_recompute`) it does not, and
    what the slices keep is kept for all of them: where layers are computed again, their inputs.

    The outputs of all slices are joined to [B, ...] before a loss is computed, so any loss, however
    it is reduced, is exactly that of the whole batch. Each slice takes every `micro_batches`-th
    row, so that rows split over devices stay split.
    Raises ValueError if `micro_batches` does not divide the rows.
    """
    if micro_batches == 1:
        return fn(*arrays)
    rows = arrays[0].shape[0]
    if rows % micro_batches:
        raise ValueError(f"micro_batches={micro_batches} does not divide a batch of {rows} rows")

    def cut(x):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(rows, *x.shape[2:])

    one_slice = jax.checkpoint(fn) if recompute else fn
    slices = tuple(cut(x) for x in arrays)
    return jax.tree.map(join, jax.lax.map(lambda piece: one_slice(*piece), slices))


def must_recompute(*models: Model) -> bool:
    """Whether a slice of `map_rows` that these models read is to be computed again.

    Not where all of their layers are computed again as a whole (`remat="full"`), because that would
    be a third forward pass.
    """
    return any(model.config.remat != "full" for model in models)


@functools.partial(transformer.jit, static_argnames=("start", "entropy_gradient"))
def token_logprobs(
    model: Model,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    temperature: losses.Scalar = 1.0,
    start: int = 1,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probabilities, entropies) per token, nats, from hidden states; 0 before column `start`.

    Columns before `start`, such as those of the prompts, are not multiplied by the unembedding.
    """
    first = max(start, 1) - 1
    softcap = model.config.logit_softcap
    logprobs, entropy = shards.over_vocabulary(
        functools.partial(
            losses.chunked_token_logprobs, softcap=softcap, entropy_gradient=entropy_gradient
        ),
        hidden[:, first:],
        transformer.unembedding(model),
        tokens[:, first:],
        temperature,
    )
    skipped = ((0, 0), (first, 0))
    return jnp.pad(logprobs, skipped), jnp.pad(entropy, skipped)


def scalar(model: Model, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """The scalar head's output for hidden states, float32."""
    head = model.weights["score"]
    return (layers.dot(hidden.astype(jnp.float32), head["kernel"]) + head["bias"])[..., 0]


def token_values(model: Model, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Value of the state before each token: the scalar head's output one token earlier."""
    return losses.align(scalar(model, hidden))


@transformer.jit
def sequence_scores(
    model: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """Score of each row: the scalar head at its last real token, with padding on either side."""
    hidden = transformer.hidden_states(model, tokens, attend)
    steps = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(attend > 0, steps, 0), axis=1)
    return scalar(model, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def over_logits(
    fn: Callable,
    models: tuple[Model, ...],
    hiddens: tuple[Float[Array, "B T D"], ...],
    tokens: Int[Array, "B T"],
    start: int = 1,
    chunk_bytes: int = 2**24,
) -> Any:
    """`fn(logits, tokens)` of the logits that predict each token, without a [B, T, V] array.

    `fn` gets the logits of each model, [B, C, V] float32 with soft caps, and the tokens [B, C] of
    some positions at a time, and returns a tree of [B, C]; the result is a tree of [B, T], aligned
    to the tokens and 0 before column `start`. The backward pass computes the logits again. For what
    `token_logprobs` does not give. Over a mesh each chunk gathers the head and adds up its whole
    gradient, unlike there, so it is slow with many devices or token ids.
    """
    first, batch = max(start, 1), tokens.shape[0]
    length = tokens.shape[1] - first
    width = max(model.config.vocab_size for model in models)
    chunk = max(1, chunk_bytes // (4 * batch * width))
    chunks = -(-length // chunk)
    chunk = -(-length // chunks)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(arrays):
        hiddens, tokens = arrays
        logits = tuple(map(transformer.logits, models, hiddens))
        return fn(tuple(x.astype(jnp.float32) for x in logits), tokens)

    def joined(x):
        x = x.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :length]
        return jnp.pad(x, ((0, 0), (first, 0)))

    hiddens = tuple(split(hidden[:, first - 1 : -1]) for hidden in hiddens)
    return jax.tree.map(joined, jax.lax.map(of_chunk, (hiddens, split(tokens[:, first:]))))


def token_kl(
    model: Model,
    reference: Model,
    hidden: Float[Array, "B T D"],
    ref_hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    temperature: losses.Scalar = 1.0,
    start: int = 1,
) -> Float[Array, "B T"]:
    """KL of the model's distribution of each token to the reference's, over the whole vocabulary.

    Nats, [B, T]; 0 before column `start`. It has the gradient of the KL.
    """

    def of_chunk(logits, tokens):
        del tokens
        own, other = (jax.nn.log_softmax(x / temperature) for x in logits)
        return jnp.sum(jnp.exp(own) * (own - other), axis=-1)

    pair = (hidden, jax.lax.stop_gradient(ref_hidden))
    return over_logits(of_chunk, (model, reference), pair, tokens, start)
