"""Diverse beam search against plain beam search and a search written out in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.models import transformer
from rlhf_jax.sampling import beam as beams
from rlhf_jax.sampling import diverse

pytestmark = pytest.mark.usefixtures("compile_cache")

ENDS = tiny.TOKENIZER.ends
SIZE = 12  # ids that may be drawn; id 11 ends
END = 11


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 10, (3, 4))
    attend = np.ones((3, 4), np.int32)
    attend[1, :2] = 0
    return jnp.asarray(tokens), jnp.asarray(attend)


@functools.cache
def model():
    found = jax.jit(transformer.init, static_argnums=0)(
        dataclasses.replace(tiny.SHAPE, vocab_size=SIZE), jax.random.key(3)
    )
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, found)


def searched(beam, mesh=None):
    function = diverse.search if isinstance(beam, diverse.DiverseBeam) else beams.search
    ends = ENDS._replace(eos_ids=(END,), pad_id=0)
    return jax.jit(
        lambda model, tokens, attend: function(model, tokens, attend, beam=beam, ends=ends)
    )(model(), *prompts())


@functools.cache
def next_logprobs(row, response):
    """log p of every next token, float64, from a pass over the whole row."""
    tokens, attend = prompts()
    size = 12
    ids = np.zeros((1, size), np.int32)
    real = np.zeros((1, size), np.int32)
    width = tokens.shape[1]
    ids[0, :width], real[0, :width] = tokens[row], attend[row]
    ids[0, width : width + len(response)] = response
    real[0, width : width + len(response)] = 1
    logits = _logits(model(), jnp.asarray(ids), jnp.asarray(real))[0, width + len(response) - 1]
    logits = np.float64(logits)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@jax.jit
def _logits(model, ids, real):
    return transformer.logits(model, transformer.hidden_states(model, ids, real))


def by_hand(row, groups, each, diversity, longest, penalty=1.0):
    """The finished hypotheses of all groups, by Python: (score, tokens), the best first."""
    running = [[(0.0, ())] for _ in range(groups)]
    done = [[] for _ in range(groups)]
    improvable = [True] * groups
    for count in range(1, longest + 1):
        taken = np.zeros(SIZE)
        if not any(improvable):
            break
        for g in range(groups):
            options = [
                (score + x - diversity * taken[token], (*response, token))
                for score, response in running[g]
                for token, x in enumerate(next_logprobs(row, response))
            ]
            options.sort(key=lambda pair: -pair[0])
            options = options[: 2 * each]
            ended = [pair[1][-1] == END for pair in options]
            for place, (score, response) in enumerate(options):
                if (ended[place] or count == longest) and place < each and improvable[g]:
                    done[g].append((score / count**penalty, response))
            done[g] = sorted(done[g], key=lambda pair: -pair[0])[:each]
            running[g] = [pair for pair, end in zip(options, ended) if not end][:each]
            for _, response in running[g]:
                taken[response[-1]] += 1
            if count < longest:
                hope = running[g][0][0] / count**penalty
                worst = done[g][-1][0] if len(done[g]) == each else -np.inf
                improvable[g] &= hope > worst
    return sorted((pair for group in done for pair in group), key=lambda pair: -pair[0])


def responses(found, row):
    return [
        tuple(tokens[:length].tolist())
        for tokens, length in zip(found.tokens[row], found.lengths[row])
    ]


@pytest.mark.parametrize(("groups", "each", "diversity"), [(2, 2, 0.7), (3, 1, 2.0), (2, 3, 0.0)])
def test_it_finds_what_a_search_by_hand_finds(groups, each, diversity):
    count = groups * each
    beam = diverse.DiverseBeam(
        beams=count,
        groups=groups,
        diversity=diversity,
        max_new_tokens=5,
        num_return=count,
    )
    found = searched(beam)
    for row in range(3):
        wanted = by_hand(row, groups, each, diversity, 5)[:count]
        assert responses(found, row) == [pair[1] for pair in wanted]
        np.testing.assert_allclose(found.scores[row], [pair[0] for pair in wanted], atol=1e-4)


def test_one_group_is_a_plain_beam_search():
    how = {"beams": 3, "max_new_tokens": 6, "num_return": 3}
    one = searched(diverse.DiverseBeam(groups=1, diversity=1.0, **how))
    two = searched(beams.Beam(**how))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)


def test_a_penalty_makes_the_groups_differ():
    def distinct(diversity):
        beam = diverse.DiverseBeam(
            beams=4, groups=4, diversity=diversity, max_new_tokens=5, num_return=4
        )
        return [len(set(responses(searched(beam), row))) for row in range(3)]

    assert distinct(0.0) == [1, 1, 1]
    assert distinct(5.0) == [4, 4, 4]


def test_beams_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="beams=4 are not a multiple of groups=3"):
        diverse.DiverseBeam(beams=4, groups=3)
    with pytest.raises(ValueError, match="beams=14 must be at most the number of tokens, 12"):
        searched(diverse.DiverseBeam(beams=14, groups=2))
