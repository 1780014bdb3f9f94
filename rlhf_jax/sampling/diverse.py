"""Diverse beam search: groups of beams that avoid each other's tokens (arXiv:1610.02424).

The beams are divided into groups, each of which is a beam search by itself. At every position the
groups choose one after the other, and a token loses `diversity` nats for each running hypothesis of
an earlier group that takes it there: the Hamming diversity of the paper, as transformers had it
under `num_beam_groups`. The scores of hypotheses contain what they lost. It was checked against a
search written out in Python, not against transformers: there a group that is done may no longer
count, and here its running hypotheses go on to keep others from their tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import config
from rlhf_jax.data.records import Ends
from rlhf_jax.models import decoding, transformer
from rlhf_jax.sampling import beam as beams
from rlhf_jax.sampling.settings import Processor


class DiverseBeam(beams.Beam):
    """How diverse hypotheses are searched; `beams` are those of all groups together."""

    groups: config.Count = 2  # searches that avoid each other; 1 is a plain beam search
    diversity: config.NonNegative = 0.5  # nats that a token loses where an earlier group takes it

    def check(self) -> None:
        """Raises ValueError for beams that do not divide into groups, or as `Beam` does."""
        super().check()
        if self.beams % self.groups:
            raise ValueError(f"beams={self.beams} are not a multiple of groups={self.groups}")


def search(
    model: transformer.Model,
    prompts: Int[Array, "B P"],
    attend: Int[Array, "B P"],
    *,
    beam: DiverseBeam,
    ends: Ends,
    processors: tuple[Processor, ...] = (),
) -> beams.Hypotheses:
    """The hypotheses of highest score of all groups; see `beam.search` for everything else.

    Raises ValueError if there are fewer tokens than beams, or as `decode.sample` does.
    """
    beams.check(model, prompts, attend, beam, ends)
    model, batch = decoding.weights_for(model), prompts.shape[0]
    size, each = prompts.shape[1] + beam.max_new_tokens, beam.beams // beam.groups
    hidden, cache = decoding.prefill(model, prompts, attend, size, beam.beams)
    process = beams.processing(prompts, attend, beam, processors)

    def extend(groups, cache, logits):
        tokens = jnp.concatenate([group.tokens for group in groups], axis=1)
        logprobs = process(beams.log_softmax(logits), tokens, groups[0].count)
        logprobs = logprobs.reshape(batch, beam.groups, each, -1)
        lost = jnp.zeros((batch, logprobs.shape[-1]))
        found, rows = [], []
        for i, group in enumerate(groups):
            group, parents = beams.extend(group, logprobs[:, i] - lost[:, None], beam, ends)
            lost += beam.diversity * _taken(group, logprobs.shape[-1])
            found.append(group)
            rows.append(parents + i * each)
        return tuple(found), beams.reordered(cache, jnp.concatenate(rows, axis=1))

    def is_unfinished(state):
        groups, _ = state
        running = [beams.is_running(group, beam) for group in groups]
        return jnp.any(jnp.stack(running))

    def advance(state):
        groups, cache = state
        last = jnp.concatenate([_last(group) for group in groups], axis=1)
        hidden, cache = decoding.decode(model, cache, last.reshape(-1))
        return extend(groups, cache, transformer.logits(model, hidden))

    first = (beams.start(batch, each, beam, ends, ()),) * beam.groups
    logits = jnp.repeat(transformer.logits(model, hidden), beam.beams, axis=0)
    groups, _ = jax.lax.while_loop(is_unfinished, advance, extend(first, cache, logits))
    scores, order = jax.lax.top_k(
        jnp.concatenate([group.done_scores for group in groups], axis=1), beam.beams
    )
    tokens = beams.pick(jnp.concatenate([group.done_tokens for group in groups], axis=1), order)
    return beams.returned(tokens, scores, beam, ends)


def _last(search: beams.Search) -> Int[Array, "B N"]:
    """The newest token of each running hypothesis."""
    return jax.lax.dynamic_index_in_dim(search.tokens, search.count - 1, 2, keepdims=False)


def _taken(search: beams.Search, size: int) -> Float[Array, "B V"]:
    """How many running hypotheses end with each token."""
    return jnp.sum(jax.nn.one_hot(_last(search), size), axis=1)
