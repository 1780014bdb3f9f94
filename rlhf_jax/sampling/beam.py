"""Beam search as one compiled program, with the rules of transformers' `generate(num_beams=N)`.

The N beams of a prompt share its part of the key-value cache, which is read once. After each token
the beams' own parts are reordered on the device.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import config, shards
from rlhf_jax.data.records import Ends
from rlhf_jax.models import decoding, transformer
from rlhf_jax.sampling import decode, filters
from rlhf_jax.sampling.settings import History, Processor

WORST = -1e9  # score of a hypothesis that is not there, as in transformers; finite, so it sorts


class Beam(config.Config):
    """How hypotheses are searched."""

    beams: config.Count = 4  # hypotheses that are continued, and as many finished ones are kept
    max_new_tokens: config.Count = 64  # longest hypothesis, EOS included
    # A hypothesis scores its log-probability divided by length^length_penalty, where the length
    # counts generated tokens, EOS included. Scores are negative, so above 0 favours long ones.
    length_penalty: float = 1.0
    # True stops once `beams` hypotheses are finished. Otherwise the search goes on while a running
    # one could still beat the worst of them: False judges that by its length now, "never" by the
    # length that favours it most. Without a length penalty "never" is exact.
    early_stopping: Literal[True, False, "never"] = False
    num_return: config.Count = 1  # hypotheses returned for each prompt, the best first

    def check(self) -> None:
        """Raises ValueError for more hypotheses than are kept."""
        if self.num_return > self.beams:
            raise ValueError(f"num_return={self.num_return} must be at most beams={self.beams}")


class Hypotheses(NamedTuple):
    """The n best hypotheses of each prompt, by score."""

    tokens: Int[Array, "B n R"]  # padded on the right
    scores: Float[Array, "B n"]  # log-probability in nats / length^length_penalty
    lengths: Int[Array, "B n"]  # generated tokens, EOS included
    finished: Float[Array, "B n"]  # 1 where the hypothesis ends with EOS, not at its longest


class Search(NamedTuple):
    """State of the search: running hypotheses, which share a length, and finished ones."""

    count: Int[Array, ""]  # tokens of the running ones
    cache: Any
    tokens: Int[Array, "B N R"]
    scores: Float[Array, "B N"]  # log-probabilities
    done_tokens: Int[Array, "B N R"]
    done_scores: Float[Array, "B N"]  # with the length penalty
    done: Bool[Array, "B N"]  # whether there is a finished hypothesis in this place
    improvable: Bool[Array, " B"]  # whether a running hypothesis may still be returned


def pick(x: Array, index: Int[Array, "B n"]) -> Array:
    """x[b, index[b]], [B, m, ...] -> [B, n, ...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _best(
    scores: Float[Array, "B N V"], count: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"], Int[Array, "B k"]]:
    """The `count` highest: (scores, beams, tokens), the first where several tie.

    Beam by beam and, where a mesh splits the vocabulary, shard by shard first, so that the scores
    of a shard need not leave it. (On a CPU the compiler gathers them all the same.)
    """
    batch, beams, size = scores.shape
    parts = filters.SHARDS if size % filters.SHARDS == 0 else 1
    each = min(count, size // parts)
    split = shards.constrain_vocabulary(scores.reshape(batch * beams, parts, size // parts))
    found, inside = jax.lax.top_k(split, each)
    tokens = inside + (size // parts) * jnp.arange(parts)[:, None]
    found, tokens = (x.reshape(batch, beams * parts * each) for x in (found, tokens))
    found, place = jax.lax.top_k(shards.constrain_rows(found), count)
    return found, place // (parts * each), jnp.take_along_axis(tokens, place, axis=1)


def _advance(search: Search, logits: Float[Array, "M V"], beam: Beam, ends: Ends, process):
    """Extends every running hypothesis by its best tokens: the next state, cache reordered."""
    batch, beams, _ = search.tokens.shape
    logprobs = process(log_softmax(logits), search.tokens, search.count)
    found, parents = extend(search, logprobs.reshape(batch, beams, -1), beam, ends)
    return found._replace(cache=reordered(search.cache, parents))


def reordered(cache: decoding.Cache, parents: Int[Array, "B N"]) -> decoding.Cache:
    """The cache whose row n of a prompt is what row `parents[n]` was."""

    def moved(x):
        return pick(x.reshape(*parents.shape, *x.shape[1:]), parents).reshape(x.shape)

    return cache._replace(own=jax.tree.map(moved, cache.own))


def extend(
    search: Search, logprobs: Float[Array, "B N V"], beam: Beam, ends: Ends
) -> tuple[Search, Int[Array, "B N"]]:
    """Extends every running hypothesis by its best tokens: (the next state, what each continues).

    The cache stays as it is.
    """
    _, beams, longest = search.tokens.shape
    kept = (1 + len(ends.eos_ids)) * beams  # so that `beams` of them do not end with EOS
    scores, parents, tokens = _best(logprobs + search.scores[:, :, None], kept)
    written = jnp.arange(longest) == search.count
    rows = jnp.where(written, tokens[..., None], pick(search.tokens, parents))
    count = search.count + 1
    ended = jnp.isin(tokens, jnp.asarray(ends.eos_ids, jnp.int32))

    # Only the best `beams` candidates may finish; the others are there to be continued.
    finished = (ended | (count == longest)) & (jnp.arange(kept) < beams)
    full = jnp.all(search.done, axis=1) & (beam.early_stopping is True)
    may_finish = finished & (search.improvable & ~full)[:, None]
    lengths = count.astype(jnp.float32) ** beam.length_penalty
    penalised = jnp.where(may_finish, scores / lengths, WORST)
    done_scores, place = jax.lax.top_k(
        jnp.concatenate([search.done_scores, penalised], axis=1), beams
    )
    done = pick(jnp.concatenate([search.done, may_finish], axis=1), place)
    done_tokens = pick(jnp.concatenate([search.done_tokens, rows], axis=1), place)

    running, place = jax.lax.top_k(jnp.where(ended, WORST, scores), beams)
    parents = pick(parents, place)
    reach = longest if beam.early_stopping == "never" else count
    reach = jnp.where(beam.length_penalty > 0, reach, count).astype(jnp.float32)
    hope = running[:, 0] / reach**beam.length_penalty
    worst = jnp.where(jnp.all(done, axis=1), jnp.min(done_scores, axis=1), WORST)
    found = search._replace(
        count=count,
        tokens=pick(rows, place),
        scores=running,
        done_tokens=done_tokens,
        done_scores=done_scores,
        done=done,
        improvable=search.improvable & (hope > worst),
    )
    return found, parents


def log_softmax(logits: Float[Array, "M V"]) -> Float[Array, "M V"]:
    """With sums that do not depend on the mesh."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted - jnp.log(filters.total(jnp.exp(shifted)))


def search(
    model: transformer.Model,
    prompts: Int[Array, "B P"],
    attend: Int[Array, "B P"],
    *,
    beam: Beam,
    ends: Ends,
    processors: tuple[Processor, ...] = (),
) -> Hypotheses:
    """The hypotheses of highest score that continue left-padded prompts.

    A pure function, to be jitted (with `ends` and `processors` static). The processors change the
    log-probabilities of the next token, whose sum need not stay 1, as in transformers; temperature
    and filters have no place here. In each step the best (1 + number of EOS ids) * `beams`
    candidates are looked at: those that end with EOS finish if they are among the best `beams`, and
    the best `beams` of the others run on. A hypothesis of `max_new_tokens` is finished too.
    Raises ValueError if there are fewer tokens than beams, or as `decode.sample` does.
    """
    check(model, prompts, attend, beam, ends)
    model = decoding.weights_for(model)
    size = prompts.shape[1] + beam.max_new_tokens
    hidden, cache = decoding.prefill(model, prompts, attend, size, beam.beams)
    process = processing(prompts, attend, beam, processors)

    def is_unfinished(search: Search):
        return is_running(search, beam)

    def advance(search: Search):
        last = jax.lax.dynamic_index_in_dim(search.tokens, search.count - 1, 2, keepdims=False)
        hidden, cache = decoding.decode(model, search.cache, last.reshape(-1))
        logits = transformer.logits(model, hidden)
        return _advance(search._replace(cache=cache), logits, beam, ends, process)

    state = start(prompts.shape[0], beam.beams, beam, ends, cache)
    logits = jnp.repeat(transformer.logits(model, hidden), beam.beams, axis=0)
    state = jax.lax.while_loop(is_unfinished, advance, _advance(state, logits, beam, ends, process))
    return returned(state.done_tokens, state.done_scores, beam, ends)


def check(model: transformer.Model, prompts: Array, attend: Array, beam: Beam, ends: Ends) -> None:
    """Raises ValueError if there are fewer tokens than beams, or as `decode.sample` does."""
    if beam.beams > model.config.vocab_size:
        raise ValueError(
            f"beams={beam.beams} must be at most the number of tokens, {model.config.vocab_size}: "
            "no more hypotheses can start"
        )
    decode.check_sampling(prompts, attend, ends)


def processing(prompts: Array, attend: Array, beam: Beam, processors: tuple[Processor, ...]):
    """The processors as one function (log-probabilities [M, V], tokens [B, N, R], count)."""
    repeated = tuple(jnp.repeat(x, beam.beams, axis=0) for x in (prompts, attend))

    def process(logprobs, tokens, count):
        history = History(*repeated, tokens.reshape(-1, beam.max_new_tokens), count)
        for processor in processors:
            logprobs = processor(logprobs, history)
        return logprobs

    return process


def start(batch: int, beams: int, beam: Beam, ends: Ends, cache: Any) -> Search:
    """The state before the first token, of `beams` hypotheses for each prompt."""
    padding = jnp.full((batch, beams, beam.max_new_tokens), ends.pad_id, jnp.int32)
    nothing = jnp.full((batch, beams), WORST)
    first = nothing.at[:, 0].set(0.0)  # all beams are the prompt: the first alone is continued
    none, all_ = nothing > 0, jnp.ones(batch, bool)
    return Search(jnp.int32(0), cache, padding, first, padding, nothing, none, all_)


def is_running(search: Search, beam: Beam) -> Bool[Array, ""]:
    """Whether the hypotheses of any prompt are still worth extending."""
    full = jnp.all(search.done) & (beam.early_stopping is True)
    return (search.count < beam.max_new_tokens) & jnp.any(search.improvable) & ~full


def returned(
    done_tokens: Int[Array, "B N R"], done_scores: Float[Array, "B N"], beam: Beam, ends: Ends
) -> Hypotheses:
    """The best of finished hypotheses that stand in the order of their scores."""
    tokens = done_tokens[:, : beam.num_return]
    is_end = jnp.isin(tokens, jnp.asarray(ends.eos_ids, jnp.int32))
    finished = jnp.any(is_end, axis=2)
    lengths = jnp.where(finished, jnp.argmax(is_end, axis=2) + 1, tokens.shape[2])
    return Hypotheses(
        tokens,
        done_scores[:, : beam.num_return],
        lengths.astype(jnp.int32),
        finished.astype(jnp.float32),
    )
