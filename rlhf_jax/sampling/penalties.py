"""Penalties on the logits, and tokens that are forbidden or forced: before the temperature.

Each is a pure function `(logits [B, V], history, number) -> logits [B, V]` of the logits of the
next token and of what the rows hold so far. They compose. Where a mesh splits the vocabulary, each
device changes the logits of its own part and exchanges nothing.

A row of which no token is left has no distribution to draw from: its log-probabilities are NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax import shards
from rlhf_jax.data.records import Ends
from rlhf_jax.sampling.settings import History, Sampling

Number = float | Array
NO_TOKEN = -1  # stands where a row holds none


def apply(
    sampling: Sampling, ends: Ends, logits: Float[Array, "B V"], history: History
) -> Float[Array, "B V"]:
    """Changes the logits of the next token as `sampling` says. [B, V] -> [B, V].

    The order is that of transformers' `generate`: repetition, n-grams, banned tokens, shortest
    response, forced tokens. It has no presence and frequency penalty; they come after the
    repetition penalty, as in vLLM. What is None or () compiles to nothing, and where everything is,
    the same array is returned.
    Raises ValueError for a banned or forced id outside of the vocabulary.
    """
    if sampling.repetition_penalty is not None:
        logits = repetition_penalty(logits, history, sampling.repetition_penalty)
    if sampling.presence_penalty is not None:
        logits = presence_penalty(logits, history, sampling.presence_penalty)
    if sampling.frequency_penalty is not None:
        logits = frequency_penalty(logits, history, sampling.frequency_penalty)
    if sampling.no_repeat_ngram is not None:
        logits = no_repeat_ngram(logits, history, sampling.no_repeat_ngram)
    if sampling.banned_tokens:
        logits = banned_tokens(logits, history, sampling.banned_tokens)
    if sampling.min_new_tokens is not None:
        logits = min_new_tokens(logits, history, sampling.min_new_tokens, ends.eos_ids)
    if sampling.forced_tokens:
        logits = forced_tokens(logits, history, sampling.forced_tokens)
    return logits


def repetition_penalty(
    logits: Float[Array, "B V"], history: History, penalty: Number
) -> Float[Array, "B V"]:
    """Makes tokens that prompt or response hold less likely, for penalties above 1.

    A positive logit is divided by `penalty` and a negative one multiplied, once however often the
    token occurs, as in transformers and vLLM. Keskar et al. 2019 (CTRL, arXiv 1909.05858, section
    4.1) divide negative logits too, which makes their tokens more likely.
    """
    seen = shards.count_tokens(_rows(history), logits.shape[1]) > 0
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


def presence_penalty(
    logits: Float[Array, "B V"], history: History, penalty: Number
) -> Float[Array, "B V"]:
    """Subtracts `penalty` from the logits of tokens that the response holds.

    The convention of OpenAI and vLLM: the prompt does not count.
    """
    return logits - penalty * (shards.count_tokens(_responses(history), logits.shape[1]) > 0)


def frequency_penalty(
    logits: Float[Array, "B V"], history: History, penalty: Number
) -> Float[Array, "B V"]:
    """Subtracts `penalty` from a token's logit as often as the response holds the token.

    The convention of OpenAI and vLLM: the prompt does not count.
    """
    return logits - penalty * shards.count_tokens(_responses(history), logits.shape[1])


def no_repeat_ngram(logits: Float[Array, "B V"], history: History, n: int) -> Float[Array, "B V"]:
    """Forbids tokens that would end a sequence of n tokens that the row already holds.

    A row is the prompt and the response after it, as in transformers, but padding is no part of it.
    For n = 1 no token occurs twice. Paulus et al. 2017 (arXiv 1705.04304) forbid trigrams of the
    response alone.
    """
    rows = _rows(history)
    ngrams = rows.shape[1] - n + 1
    if ngrams < 1:
        return logits
    # Where fewer than n - 1 columns are filled the slice begins at 0, and no n-gram is complete.
    filled = history.prompts.shape[1] + history.count
    last = jax.lax.dynamic_slice_in_dim(rows, filled - (n - 1), n - 1, axis=1)
    same = jnp.ones((rows.shape[0], ngrams), bool)
    for k in range(n - 1):
        same &= rows[:, k : k + ngrams] == last[:, k : k + 1]
    # Padding in `last` matches padding, but only where `last` itself stands, which no token follows
    # yet: the padding of a row ends at one place.
    repeated = jnp.where(same, rows[:, n - 1 :], NO_TOKEN)
    return jnp.where(shards.count_tokens(repeated, logits.shape[1]) > 0, -jnp.inf, logits)


def banned_tokens(
    logits: Float[Array, "B V"], history: History, ids: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Forbids the tokens `ids`."""
    del history
    _check_ids("banned_tokens", ids, logits.shape[1])
    return jnp.where(_members(ids, logits.shape[1]), -jnp.inf, logits)


def min_new_tokens(
    logits: Float[Array, "B V"], history: History, least: int, eos_ids: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Forbids EOS until the response has `least` tokens; EOS is then not one of them."""
    is_short = history.count < least
    return jnp.where(_members(eos_ids, logits.shape[1]) & is_short, -jnp.inf, logits)


def forced_tokens(
    logits: Float[Array, "B V"], history: History, ids: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Forbids all but the next of the tokens `ids`, with which the response begins.

    Its logit becomes 0, as in transformers, so that it can be drawn even if the functions before
    have forbidden it.
    """
    _check_ids("forced_tokens", ids, logits.shape[1])
    forced = jnp.asarray(ids, jnp.int32)[jnp.minimum(history.count, len(ids) - 1)]
    alone = jnp.where(jnp.arange(logits.shape[1]) == forced, 0.0, -jnp.inf)
    return jnp.where(history.count < len(ids), alone, logits)


def _responses(history: History) -> Int[Array, "B R"]:
    """What was drawn, with `NO_TOKEN` after it."""
    is_drawn = jnp.arange(history.tokens.shape[1]) < history.count
    return jnp.where(is_drawn, history.tokens, NO_TOKEN)


def _rows(history: History) -> Int[Array, "B T"]:
    """Prompts and what was drawn after them, T = P + R, with `NO_TOKEN` for padding."""
    prompts = jnp.where(history.attend > 0, history.prompts, NO_TOKEN)
    return jnp.concatenate([prompts, _responses(history)], axis=1)


def _members(ids: tuple[int, ...], size: int) -> np.ndarray:
    """Which tokens of the vocabulary are among `ids`: booleans [V], a constant of the program."""
    return np.isin(np.arange(size), ids)


def _check_ids(name: str, ids: tuple[int, ...], size: int) -> None:
    if outside := [x for x in ids if x >= size]:
        raise ValueError(
            f"{name} holds {outside}, but the model has ids 0..{size - 1}; remove them"
        )
