"""The sampler: its loop, its draws, its filters, and that only the prompt decides a row's noise."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax import sharding
from rlhf_jax.data.batches import Prompts
from rlhf_jax.data.records import Ends
from rlhf_jax.models import heads, transformer
from rlhf_jax.sampling import Sampling, decode, filters, rollout

CONFIG = transformer.Config(
    vocab_size=32,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=32,
)
B, P, R = 8, 6, 12
LENGTHS = (6, 1, 4, 3, 6, 2, 5, 1)
PAD, EOS = 0, (7, 9, 11)


@pytest.fixture(scope="module")
def model():
    return jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    """Left-padded prompts of different lengths. One holds an EOS id, which must not end it."""
    rng = np.random.default_rng(0)
    attend = (np.arange(P) >= P - np.array(LENGTHS)[:, None]).astype(np.int32)
    tokens = np.where(attend, rng.integers(12, 32, (B, P)), PAD).astype(np.int32)
    tokens[0, -1] = EOS[1]
    return Prompts(jnp.array(tokens), jnp.array(attend), jnp.arange(B, dtype=jnp.int32) + 100)


@functools.partial(jax.jit, static_argnames=("ends", "choose", "processors"))
def compiled(model, prompts, key, number, **how):
    keys = decode.row_keys(key, prompts.index, number)
    return decode.sample(model, prompts.tokens, prompts.attend, keys, **how)


def options(eos_ids=EOS, pad_id=PAD, choose=decode.categorical, processors=(), **sampling):
    """All arguments spelled out, so that tests share compilations."""
    return {
        "sampling": Sampling(**{"max_new_tokens": R} | sampling),
        "ends": Ends(eos_ids, pad_id),
        "choose": choose,
        "processors": processors,
    }


def draw(model, prompts, key, number=0, **changes):
    return compiled(model, prompts, key, number, **options(**changes))


def take(prompts, rows):
    return jax.tree.map(lambda x: x[np.array(rows)], prompts)


@jax.jit
def logits_of(model, tokens, attend):
    return transformer.logits(model, transformer.hidden_states(model, tokens, attend))


@jax.jit
def logprobs_of(model, out, temperature):
    """What a full forward pass says of sampled rows (`Samples` or a `Rollout`)."""
    hidden = transformer.hidden_states(model, out.tokens, out.attend)
    return heads.token_logprobs(model, hidden, out.tokens, temperature)[0] * out.mask


# The loop, with a policy of three lines in place of a model.

COUNTER_VOCAB = 100


def counter(cache, tokens):
    """A policy sure that the next token is the last one plus 1; the cache counts its calls."""
    return 12.0 * jax.nn.one_hot(tokens + 1, COUNTER_VOCAB), cache + 1


def count_up(starts, max_new_tokens, eos_ids, step=counter):
    """Continues `starts` (token s is followed by s + 1, s + 2, ...)."""
    starts = jnp.array(starts)
    run = functools.partial(
        decode.decode_loop,
        step,
        sampling=Sampling(max_new_tokens=max_new_tokens),
        ends=Ends(eos_ids, PAD),
    )
    logits, cache = counter(jnp.int32(0), starts)
    keys = decode.row_keys(jax.random.key(0), jnp.arange(len(starts)))
    return jax.jit(run)(cache, logits, keys)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 40])
def test_a_row_runs_up_to_and_including_its_first_eos_id_whatever_the_block_length(length):
    starts, ends = (4, 1, 10, 20, 38), (7, 24)
    tokens, logprobs, _, lengths = count_up(starts, length, ends)
    for row, start in enumerate(starts):
        expected = []
        while len(expected) < length and not set(ends) & set(expected):
            expected.append(start + 1 + len(expected))
        padding = [PAD] * (length - len(expected))
        np.testing.assert_array_equal(tokens[row], expected + padding)
        assert lengths[row] == len(expected)
        sure = -np.log1p((COUNTER_VOCAB - 1) * np.exp(-12.0))  # -0.0006
        np.testing.assert_allclose(logprobs[row, : len(expected)], sure, rtol=0, atol=5e-6)
        np.testing.assert_array_equal(logprobs[row, len(expected) :], 0.0)
    assert tokens.shape == logprobs.shape == (len(starts), length)


@pytest.mark.parametrize(
    "starts, length, steps",
    [
        ((33, 33), 40, 0),  # all first tokens are EOS: the policy is never asked again
        ((30, 33), 40, 13),  # 39 steps are cut into 3 blocks of 13
        ((7, 33), 40, 26),  # the last row ends after 27 tokens, with the second block
        ((40, 33), 18, 18),  # no EOS in one row: 17 steps are 2 blocks of 9, the last step idle
        ((40, 33), 17, 16),
    ],
)
def test_the_loop_stops_with_the_block_in_which_the_last_row_ends(starts, length, steps):
    seen = []

    def counted(cache, tokens):
        jax.debug.callback(lambda number: seen.append(int(number)), cache)
        return counter(cache, tokens)

    jax.block_until_ready(count_up(starts, length, (34,), counted))
    jax.effects_barrier()
    assert sorted(seen) == list(range(1, steps + 1))


# Sampling from a model.


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("chosen", [{}, {"top_k": 3.0}], ids=["all", "top_k"])
def test_the_sampler_s_logprobs_are_those_of_a_full_forward_pass(
    model, prompts, temperature, chosen
):
    out = draw(model, prompts, jax.random.key(1), temperature=temperature, **chosen)
    np.testing.assert_allclose(out.logprobs, logprobs_of(model, out, temperature), atol=1e-5)
    assert np.abs(np.asarray(out.logprobs)[np.asarray(out.mask) > 0]).min() > 0.0


def test_masks_lengths_and_flags_follow_from_the_tokens(model, prompts):
    out = jax.tree.map(np.asarray, draw(model, prompts, jax.random.key(1)))
    np.testing.assert_array_equal(out.tokens[:, :P], prompts.tokens)
    np.testing.assert_array_equal(out.attend[:, :P], prompts.attend)
    assert not out.mask[:, :P].any()
    for row in range(B):
        response = out.tokens[row, P:]
        ends = np.flatnonzero(np.isin(response, EOS))
        length = ends[0] + 1 if len(ends) else R
        active = np.arange(R) < length
        assert out.lengths[row] == length
        assert out.finished[row] == (len(ends) > 0)
        np.testing.assert_array_equal(out.mask[row, P:], active)
        np.testing.assert_array_equal(out.attend[row, P:], active)
        np.testing.assert_array_equal(response[~active], PAD)
        np.testing.assert_array_equal(out.logprobs[row, P:][~active], 0.0)
    # The case has rows that end, at different lengths and by different ids, and rows that do not.
    assert 0 < out.finished.sum() < B
    assert len(set(out.lengths.tolist())) > 2


def test_greedy_is_the_argmax_of_a_full_forward_pass_token_by_token(model, prompts):
    out = draw(model, prompts, jax.random.key(1), choose=decode.greedy, eos_ids=(1,))
    tokens = np.pad(prompts.tokens, ((0, 0), (0, R)))
    attend = np.pad(prompts.attend, ((0, 0), (0, R)))
    done = np.zeros(B, bool)
    for t in range(P, P + R):
        best = np.asarray(logits_of(model, tokens, attend))[:, t - 1].argmax(axis=-1)
        tokens[:, t] = np.where(done, PAD, best)
        attend[:, t] = ~done
        done |= best == 1
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.attend, attend)


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-jnp.inf, -jnp.inf, -5.0]])
    keys = decode.row_keys(jax.random.key(0), jnp.arange(3))
    np.testing.assert_array_equal(decode.greedy(logits, keys), [1, 0, 2])


@pytest.mark.parametrize("filtered", [{}, {"top_k": 3}], ids=["all", "top_k"])
def test_temperature_0_is_greedy_and_reports_the_logprobs_at_temperature_1(
    model, prompts, filtered
):
    cold = draw(model, prompts, jax.random.key(1), temperature=0, **filtered)
    best = draw(model, prompts, jax.random.key(2), choose=decode.greedy, **filtered)
    np.testing.assert_array_equal(cold.tokens, best.tokens)
    np.testing.assert_array_equal(cold.logprobs, best.logprobs)
    np.testing.assert_allclose(cold.logprobs, logprobs_of(model, cold, 1.0), atol=1e-5)
    # Filters are for draws: at temperature 0 there are none, whatever is set.
    np.testing.assert_allclose(cold.filtered_logprobs, cold.logprobs, rtol=0, atol=1e-6)


def test_temperature_0_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, logprobs, _ = decode.draw(logits, keys, 0, Sampling(temperature=0))
    np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_allclose(np.exp(logprobs), [1 / (2 + np.exp(-2.0)), 1 / 3], rtol=1e-6)


def test_at_temperature_0_no_filter_drops_the_most_likely_token():
    """The entropy is 1.22 nats, so -log 0.2 = 1.61 is more typical than -log 0.5 = 0.69."""
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.2, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 1)
    for temperature, expected in ((0, (1, 0.5, 0.5)), (1, (0, 0.2, 0.5))):
        sampling = Sampling(temperature=temperature, typical_p=0.3)
        token, logprobs, filtered = decode.draw(logits, keys, 0, sampling, decode.greedy)
        assert token[0] == expected[0]
        np.testing.assert_allclose(np.exp([logprobs[0], filtered[0]]), expected[1:], rtol=1e-6)


def test_filtered_logprobs_are_those_of_the_tokens_that_were_left(model, prompts):
    out = draw(model, prompts, jax.random.key(1), temperature=0.7, top_k=3)
    logits = np.asarray(logits_of(model, out.tokens, out.attend), np.float64) / 0.7
    for row, t in zip(*np.nonzero(np.asarray(out.mask))):
        left = np.sort(logits[row, t - 1])[-3:]
        expected = logits[row, t - 1, out.tokens[row, t]] - np.log(np.exp(left).sum())
        np.testing.assert_allclose(out.filtered_logprobs[row, t], expected, atol=1e-5)
    assert not np.asarray(out.filtered_logprobs)[np.asarray(out.mask) == 0].any()
    plain = draw(model, prompts, jax.random.key(1))
    np.testing.assert_array_equal(plain.filtered_logprobs, plain.logprobs)


def never_twice(logits, history):
    """Forbids the tokens that the response already has."""
    drawn = jnp.arange(history.tokens.shape[1]) < history.count
    seen = jnp.any(jax.nn.one_hot(history.tokens, logits.shape[1]) * drawn[None, :, None], axis=1)
    return jnp.where(seen, -jnp.inf, logits)


def only_of_the_prompt(logits, history):
    """Allows the tokens of the prompt, and EOS."""
    known = jax.nn.one_hot(history.prompts, logits.shape[1]) * history.attend[:, :, None]
    known = jnp.any(known, axis=1).at[:, jnp.array(EOS)].set(True)
    return jnp.where(known, logits, -jnp.inf)


def test_processors_change_what_is_drawn_and_see_prompt_and_response(model, prompts):
    processors = (never_twice, only_of_the_prompt)
    out = draw(model, prompts, jax.random.key(1), temperature=0.7, processors=processors)
    out = jax.tree.map(np.asarray, out)
    logits = np.asarray(logits_of(model, out.tokens, out.attend), np.float64) / 0.7
    for row in range(B):
        prompt = set(np.asarray(prompts.tokens)[row, P - LENGTHS[row] :].tolist())
        response = out.tokens[row, P : P + out.lengths[row]].tolist()
        assert out.finished[row] and len(set(response)) == len(response)
        for t, token in enumerate(response, P):
            allowed = sorted((prompt | set(EOS)) - set(response[: t - P]))
            left = logits[row, t - 1, allowed]
            expected = logits[row, t - 1, token] - np.log(np.exp(left).sum())
            np.testing.assert_allclose(out.filtered_logprobs[row, t], expected, atol=1e-5)
    # What is reported as the policy's is of the policy alone.
    np.testing.assert_allclose(out.logprobs, logprobs_of(model, out, 0.7), atol=1e-5)


def test_a_pad_that_is_an_eos_id_is_refused(model, prompts):
    with pytest.raises(ValueError, match=r"pad_id=9 is an EOS id \(7, 9, 11\)"):
        draw(model, prompts, jax.random.key(0), pad_id=9)


def test_prompts_padded_on_the_right_are_refused_where_their_values_can_be_seen(model, prompts):
    keys = decode.row_keys(jax.random.key(0), prompts.index)
    backwards = prompts.attend[:, ::-1]
    for call in (
        lambda: decode.check_prompts(prompts.tokens, backwards),
        lambda: decode.sample(model, prompts.tokens, backwards, keys, **options()),
    ):
        with pytest.raises(ValueError, match="prompt 1 .*padded on the right.*on the left"):
            call()
    with pytest.raises(ValueError, match=r"tokens \(8, 6\) and attend \(8, 5\)"):
        decode.check_prompts(prompts.tokens, backwards[:, 1:])
    decode.check_prompts(prompts.tokens, prompts.attend)
    decode.check_prompts(prompts.tokens, np.zeros((B, P), np.int32))  # rows that only fill a batch


def test_prompt_and_response_must_fit_the_model(model, prompts):
    shapes = jax.eval_shape(
        functools.partial(draw, max_new_tokens=32 - P), model, prompts, jax.random.key(0)
    )
    assert shapes.tokens.shape == (B, 32)
    with pytest.raises(ValueError, match="33 positions.*max_length=32"):
        draw(model, prompts, jax.random.key(0), max_new_tokens=33 - P)


# A row's noise.


@pytest.fixture(scope="module")
def whole(model, prompts):
    return jax.tree.map(np.asarray, draw(model, prompts, jax.random.key(3)))


@pytest.mark.parametrize("rows", [(7, 6, 5, 4, 3, 2, 1, 0), (4,)], ids=["reversed", "alone"])
def test_a_prompt_gets_the_same_tokens_in_any_batch(model, prompts, whole, rows):
    out = draw(model, take(prompts, rows), jax.random.key(3))
    np.testing.assert_array_equal(out.tokens, whole.tokens[list(rows)])
    np.testing.assert_allclose(out.logprobs, whole.logprobs[list(rows)], atol=1e-5)


def test_a_prompt_gets_the_same_tokens_beside_other_rows_and_under_more_padding(
    model, prompts, whole
):
    longer = Prompts(
        jnp.full((3, P + 5), 20, jnp.int32), jnp.ones((3, P + 5), jnp.int32), jnp.arange(3)
    )
    tokens, attend = (jnp.pad(x, ((0, 0), (5, 0))) for x in (prompts.tokens, prompts.attend))
    ours = Prompts(tokens, attend, prompts.index)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), longer, ours)
    out = draw(model, both, jax.random.key(3))
    np.testing.assert_array_equal(out.tokens[3:, 5:], whole.tokens)
    np.testing.assert_allclose(out.logprobs[3:, 5:], whole.logprobs, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_a_prompt_gets_the_same_tokens_on_any_mesh(model, prompts, whole, sizes):
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = sharding.place(mesh, model)
        out = draw(placed, sharding.put_rows(mesh, prompts), jax.random.key(3))
    assert len(placed.weights["head"]["kernel"].sharding.device_set) == np.prod(sizes)
    np.testing.assert_array_equal(out.tokens, whole.tokens)
    np.testing.assert_allclose(out.logprobs, whole.logprobs, atol=1e-5)


def test_iterations_samples_and_prompts_have_noise_of_their_own(model, prompts):
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[4], x.shape), prompts)
    same = same._replace(index=prompts.index)
    key = jax.random.key(3)
    first = draw(model, same, jax.random.fold_in(key, 0), eos_ids=())
    later = draw(model, same, jax.random.fold_in(key, 1), eos_ids=())
    second = draw(model, same, jax.random.fold_in(key, 0), eos_ids=(), number=1)
    rows = np.concatenate([np.asarray(x.tokens) for x in (first, later, second)])
    assert len(np.unique(rows, axis=0)) == 3 * B
    # Positions too: 12 draws from 32 nearly flat tokens give about 10 different ones.
    assert np.mean([len(set(row)) for row in rows[:, P:].tolist()]) > 8
    again = draw(model, same, jax.random.fold_in(key, 0), eos_ids=())
    np.testing.assert_array_equal(again.tokens, first.tokens)


def test_a_prompt_that_is_repeated_draws_the_samples_of_separate_calls(model, prompts):
    three, key = take(prompts, (4, 0, 6)), jax.random.key(3)
    alone = np.stack([draw(model, three, key, number=2 + k).tokens for k in range(3)], axis=1)
    assert all(len(np.unique(samples, axis=0)) == 3 for samples in alone)
    repeated = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), three)
    again = draw(model, repeated, key, number=2)
    np.testing.assert_array_equal(again.tokens, alone.reshape(9, P + R))
    # Wherever the repetitions stand.
    tiled = jax.tree.map(lambda x: np.concatenate([x] * 3), three)
    again = draw(model, tiled, key, number=2)
    np.testing.assert_array_equal(again.tokens, alone.swapaxes(0, 1).reshape(9, P + R))


def test_the_keys_of_different_prompts_are_those_of_the_prompt_and_its_sample_s_number():
    key, index = jax.random.key(3), jnp.array([7, 0, 2**31 - 1])
    for number in (0, 5):
        expected = [jax.random.fold_in(jax.random.fold_in(key, i), number) for i in index]
        actual = decode.row_keys(key, index, number)
        np.testing.assert_array_equal(
            jax.random.key_data(actual), jax.random.key_data(jnp.stack(expected))
        )


# One draw.


@functools.partial(jax.jit, static_argnums=1)
def histogram(logits, draws):
    """How often `categorical` draws each token in `draws` draws, 512 keys at a time."""

    def one(counts, index):
        keys = decode.row_keys(jax.random.key(5), index)
        tokens = decode.categorical(jnp.broadcast_to(logits, (512, logits.shape[0])), keys)
        return counts.at[tokens].add(1), None

    index = jnp.arange(draws, dtype=jnp.int32).reshape(-1, 512)
    return jax.lax.scan(one, jnp.zeros(logits.shape[0], jnp.int32), index)[0]


@pytest.mark.parametrize("size", [1, 5, 37, 4096])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0], ids=["flat", "spread", "peaked"])
def test_draws_follow_the_softmax_and_never_a_token_of_probability_0(size, scale):
    rng = np.random.default_rng(size)
    logits = np.float32(scale * rng.normal(size=size))
    logits[rng.random(size) < 0.2] = -np.inf
    logits[rng.integers(size)] = 1.0
    draws = 512 * 240  # > 1e5
    counts = np.asarray(histogram(jnp.array(logits), draws))
    exact = np.exp(logits.astype(np.float64) - logits.max())
    exact /= exact.sum()
    assert counts.sum() == draws
    assert counts[exact == 0].sum() == 0
    # Rare tokens share one bin, so that every bin expects at least 5.
    rare = exact * draws < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(exact[~rare], exact[rare].sum()) * draws
    keep = expected > 0
    statistic = np.sum((seen - expected)[keep] ** 2 / expected[keep])
    assert stats.chi2.sf(statistic, max(keep.sum() - 1, 1)) > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1e-38, 0.3, 0.5, 1.0 - 2.0**-24, 1.0])
def test_no_uniform_number_selects_a_weight_of_0(uniform):
    rng = np.random.default_rng(0)
    weights = rng.random((500, 37)) * (rng.random((500, 37)) < 0.3) * 10.0 ** rng.normal(size=37)
    weights = np.float32(weights)[weights.sum(axis=1) > 0]
    weights[0] = 0.0
    weights[0, 5] = 1e-30
    index = np.asarray(decode._invert(jnp.array(weights), jnp.full(len(weights), uniform)))
    assert (np.take_along_axis(weights, index[:, None], axis=1) > 0).all()
    if uniform == 0.0:
        np.testing.assert_array_equal(index, (weights > 0).argmax(axis=1))


def test_inversion_is_the_inverse_of_the_cumulative_sum():
    weights = np.float32([[1, 0, 2, 5]] * 6)
    index = decode._invert(jnp.array(weights), jnp.array([0.0, 0.12, 0.125, 0.37, 0.375, 0.99]))
    np.testing.assert_array_equal(index, [0, 0, 2, 2, 3, 3])


@pytest.mark.parametrize(
    "found, stage, probabilities",
    [
        (15405709, 0, [2.5e-10, 2.5e-10, 2.5e-10, 2.5e-10, 1.0]),  # a block of mass 1e-9
        (4014849, 1, [1e-9, 0.5, 0.25, 0.25, 1e-9]),  # a token of mass 1e-9, first of its block
    ],
)
def test_a_token_of_probability_1e_9_is_not_drawn_once_in_2_to_the_23(found, stage, probabilities):
    key = jax.random.fold_in(jax.random.key(0), found)
    # Found by search: 23-bit uniforms, which is what jax.random.uniform gives, are 0 for this key.
    assert jax.random.uniform(key, (2,))[stage] == 0.0
    token = decode.categorical(jnp.log(jnp.array([probabilities])), key[None])
    assert probabilities[int(token[0])] > 1e-3
    assert (decode._uniforms(key) > 1e-9).all()


def test_uniform_numbers_lie_strictly_between_0_and_1():
    keys = jax.random.split(jax.random.key(0), 1 << 16)
    numbers = np.asarray(jax.jit(jax.vmap(decode._uniforms))(keys), np.float64)
    assert 0 < numbers.min() and numbers.max() < 1
    for stage in numbers.T:
        assert stats.kstest(stage, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.02


# Filters.

INF = float("inf")


def kept(logits, **options):
    """Which tokens a filter keeps, as booleans; what is kept must keep its logit."""
    logits = jnp.array(logits, jnp.float32)
    out = np.asarray(jax.jit(filters.apply)(logits, **options))
    keep = out > -INF
    np.testing.assert_array_equal(out[keep], np.asarray(logits)[keep])
    return keep


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"top_k": 1.0}, "1000"),
        ({"top_k": 2.0}, "1110"),  # the tie at the border survives
        ({"top_k": 3.0}, "1110"),
        ({"top_k": 99.0}, "1111"),
        ({"top_p": 0.5}, "1000"),  # mass 0.5 is reached by the first token alone
        ({"top_p": 0.51}, "1010"),  # the crossing token counts; of equals the later one stays
        ({"top_p": 0.72}, "1110"),
        ({"top_p": 1.0}, "1111"),
        ({"top_p": 1e-9}, "1000"),
        ({"min_p": 0.36}, "1110"),
        ({"min_p": 0.45}, "1000"),
        ({"min_p": 0.0}, "1111"),
        ({"min_p": 1.0}, "1000"),
        # The entropy is 1.22 nats, and the -log p are 0.69, 1.61, 1.61, 2.30: in the order of their
        # distances the tokens are 2 and 3, which tie, then 1, then 4.
        ({"typical_p": 1e-9}, "0110"),
        ({"typical_p": 0.19}, "0110"),
        ({"typical_p": 0.39}, "0110"),
        ({"typical_p": 0.41}, "1110"),
        ({"typical_p": 0.89}, "1110"),
        ({"typical_p": 0.91}, "1111"),
        ({"typical_p": 1.0}, "1111"),
        ({"epsilon_cutoff": 0.0}, "1111"),
        ({"epsilon_cutoff": 0.11}, "1110"),
        ({"epsilon_cutoff": 0.21}, "1000"),
        ({"epsilon_cutoff": 1.0}, "1000"),  # one is always kept
        ({}, "1111"),
    ],
)
def test_filters_keep_the_tokens_a_hand_count_keeps(options, expected):
    logits = np.log([[0.5, 0.2, 0.2, 0.1]])
    np.testing.assert_array_equal(kept(logits, **options)[0], [c == "1" for c in expected])


def test_of_tied_tokens_top_p_keeps_only_as_many_as_it_needs():
    flat = np.zeros((1, 8))
    for p, count in ((0.1, 1), (0.125, 1), (0.25, 2), (0.3, 3), (0.5, 4), (0.9, 8), (1.0, 8)):
        np.testing.assert_array_equal(kept(flat, top_p=p)[0], np.arange(8) >= 8 - count)


def test_top_p_measures_what_top_k_left():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    np.testing.assert_array_equal(kept(logits, top_p=0.55)[0], [1, 1, 0, 0])
    np.testing.assert_array_equal(kept(logits, top_k=2.0, top_p=0.55)[0], [1, 0, 0, 0])


def test_each_filter_measures_what_those_before_it_left():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    # Typical-p sees 4/7 and 3/7, whose entropy of 0.68 nats is nearer to -log 4/7 = 0.56.
    np.testing.assert_array_equal(kept(logits, typical_p=0.25)[0], [0, 1, 0, 0])
    np.testing.assert_array_equal(kept(logits, top_k=2.0, typical_p=0.25)[0], [1, 0, 0, 0])
    # The cut-off sees 3/5 and 2/5, the two most typical.
    np.testing.assert_array_equal(kept(logits, epsilon_cutoff=0.35)[0], [1, 0, 0, 0])
    np.testing.assert_array_equal(
        kept(logits, typical_p=0.45, epsilon_cutoff=0.35)[0], [0, 1, 1, 0]
    )


def test_of_tokens_that_tie_typical_p_and_the_cut_off_keep_all():
    flat = np.zeros((1, 8))
    for options in ({"typical_p": 0.01}, {"typical_p": 0.99}, {"epsilon_cutoff": 0.9}):
        assert kept(flat, **options).all()
    masked = np.where(np.arange(8) < 3, 0.0, -INF)[None]
    for options in ({"typical_p": 0.01}, {"epsilon_cutoff": 0.9}):
        np.testing.assert_array_equal(kept(masked, **options)[0], np.arange(8) < 3)


@pytest.mark.parametrize("kind", ["random", "tied", "peaked", "masked"])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_filters_keep_exactly_the_tokens_that_transformers_keeps(kind, temperature):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(40, 50)) * (8.0 if kind == "peaked" else 1.5))
    if kind == "tied":
        logits = np.round(logits)
    if kind == "masked":
        logits[rng.random(logits.shape) < 0.5] = -INF
    grid = [
        *[{"top_k": k} for k in (1.0, 2.0, 7.0, 49.0, 50.0, 80.0)],
        *[{"top_p": p} for p in (0.013, 0.37, 0.73, 0.951, 0.9991)],
        *[{"min_p": p} for p in (0.0117, 0.113, 0.71)],
        *[{"typical_p": p} for p in (0.013, 0.21, 0.57, 0.913, 0.9991)],
        *[{"epsilon_cutoff": p} for p in (0.00031, 0.0117, 0.113, 0.71)],
        {"top_k": 5.0, "top_p": 0.813},
        {"top_k": 20.0, "top_p": 0.913, "min_p": 0.0513},
        {"top_p": 0.613, "min_p": 0.113},
        {"top_k": 30.0, "typical_p": 0.613, "epsilon_cutoff": 0.0317},
        {"min_p": 0.0113, "typical_p": 0.813},
    ]
    theirs = {
        "top_k": lambda k: warpers.TopKLogitsWarper(int(k)),
        "top_p": warpers.TopPLogitsWarper,
        "min_p": warpers.MinPLogitsWarper,
        "typical_p": warpers.TypicalLogitsWarper,
        "epsilon_cutoff": warpers.EpsilonLogitsWarper,
    }
    for options in grid:
        scores = warpers.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        for name, value in options.items():
            scores = theirs[name](value)(None, scores)
        scaled = logits / np.float32(temperature)
        keep, expected = kept(scaled, **options), scores.numpy() > -INF
        if kind == "tied":  # which of equals top-p leaves is torch's unstable sort's choice
            keep = np.sort(np.where(keep, scaled, -INF))
            expected = np.sort(np.where(expected, scaled, -INF))
        np.testing.assert_array_equal(keep, expected, err_msg=str(options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k=0.0 must be at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"min_p": 2.0}, r"min_p=2.0 must be in \[0, 1\]"),
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": INF}, "temperature=inf must be finite"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"typical_p": 0.0}, r"typical_p=0.0 must be in \(0, 1\]"),
        ({"epsilon_cutoff": 1.1}, r"epsilon_cutoff=1.1 must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0 or None"),
        ({"repetition_penalty": INF}, "repetition_penalty=inf must be finite or None"),
        ({"presence_penalty": INF}, "presence_penalty=inf must be finite"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be finite"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram=0 must be at least 1 or None"),
        ({"no_repeat_ngram": 2.0}, "no_repeat_ngram=2.0 must be a whole number"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens=9 must be at most max_new_tokens=8",
        ),
        ({"banned_tokens": (3, -1)}, r"banned_tokens=\(3, -1\) must be a tuple of token ids"),
        ({"banned_tokens": [3]}, r"banned_tokens=\[3\] must be a tuple of token ids"),
        (
            {"forced_tokens": (1.0,)},
            r"forced_tokens=\(1.0,\) must be a tuple of numbers, each a whole",
        ),
        (
            {"forced_tokens": (1, 2, 3), "max_new_tokens": 2},
            "forced_tokens has 3 ids, but must have at most max_new_tokens=2",
        ),
        (
            {"forced_tokens": (1, 2), "banned_tokens": (3, 2)},
            r"forced_tokens=\(1, 2\) holds \[2\], which banned_tokens forbids; remove",
        ),
    ],
)
def test_a_setting_outside_its_range_is_refused(options, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
    Sampling(top_k=1, top_p=1, min_p=0, typical_p=1, epsilon_cutoff=0, temperature=0)
    Sampling(max_new_tokens=2, min_new_tokens=2, forced_tokens=(1, 1), presence_penalty=-3)


# The compiled program.


def test_a_new_temperature_or_filter_value_does_not_recompile_but_a_filter_switched_on_does():
    traces = []

    @jax.jit
    def one(logits, keys, sampling):
        traces.append(sampling)
        return decode.draw(logits, keys, 0, sampling)

    logits, keys = jnp.arange(8.0)[None], jax.random.split(jax.random.key(0), 1)
    results = []
    for temperature, k, p in ((1.0, 3, 0.9), (0.5, 2, 0.5), (9.0, 6, 0.9), (0, 1, 1)):
        settings = {"temperature": temperature, "top_k": k, "top_p": p, "min_p": p / 2}
        results.append(one(logits, keys, Sampling(**settings)))
    assert len(traces) == 1
    assert len({float(filtered[0]) for _, _, filtered in results}) > 1
    one(logits, keys, Sampling(top_k=3))
    assert len(traces) == 2
    one(logits, keys, Sampling(top_k=4, temperature=3.0))
    assert len(traces) == 2


def program(model, prompts, **changes):
    """The optimised HLO of `draw`."""
    lowered = compiled.lower(model, prompts, jax.random.key(0), 0, **options(**changes))
    return lowered.compile().as_text()


@pytest.fixture(scope="module")
def plain(model, prompts):
    return program(model, prompts)


def test_a_filter_that_is_off_compiles_to_nothing_and_one_that_is_on_needs_no_sort(
    model, prompts, plain
):
    assert filters.apply(logits := jnp.zeros((2, 5))) is logits
    ordering = "u32[8,32]"  # logits as ordered integers, which only a filter looks at
    on = program(
        model, prompts, top_k=3.0, top_p=0.9, min_p=0.1, typical_p=0.9, epsilon_cutoff=0.01
    )
    assert ordering not in plain and ordering in on
    # XLA's sort takes 10 times as long as the search for the border (CPU, [32, 4096]).
    assert not re.search(r"\bsort\(", plain + on)


def test_the_cache_is_updated_in_place(plain):
    cache = (B, CONFIG.num_kv_heads, P + R, CONFIG.head_dim)
    made = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", plain)
    made = [(tuple(int(n) for n in shape.split(",")), op) for shape, op in made]
    count = collections.Counter(op for shape, op in made if shape == cache)
    # Keys and values of a layer: grown once after the prompt, then updated, and never else made.
    pairs = 2 * CONFIG.num_layers
    assert count["dynamic-update-slice"] == pairs and count["fusion"] <= 2 * pairs
    handed_on = {"parameter", "get-tuple-element", "bitcast"}
    assert set(count) - handed_on <= {"dynamic-update-slice", "pad", "fusion"}
    assert not [shape for shape, op in made if op == "copy" and np.prod(shape) >= np.prod(cache)]


# What an online algorithm collects.


def score(bias, tokens, attend, mask):
    """How many sampled tokens are even, plus a bias; a mask on padding would cost 100."""
    return bias + jnp.sum(mask * (tokens % 2 == 0), axis=1) - 100.0 * jnp.sum(mask * (attend == 0))


@functools.partial(jax.jit, static_argnames="micro_batches")
def gather(policy, reference, prompts, micro_batches=1):
    sampling = Sampling(max_new_tokens=R, temperature=0.7)
    samples, index = rollout.sample(
        policy,
        prompts,
        jax.random.key(1),
        sampling=sampling,
        drawing=rollout.Drawing(Ends(EOS, PAD)),
    )
    return rollout.judge(
        {"policy": policy, "reference": reference, "scorer": jnp.float32(0.5)},
        samples,
        index,
        sampling=sampling,
        score=score,
        micro_batches=micro_batches,
    )


@pytest.fixture(scope="module")
def reference():
    return jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(8))


def test_a_rollout_holds_what_the_policy_did_and_what_others_say_of_it(model, reference, prompts):
    got = gather(model, reference, prompts, micro_batches=2)
    samples = draw(model, prompts, jax.random.key(1), temperature=0.7)
    for name in ("tokens", "attend", "mask", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(samples, name), err_msg=name)
    np.testing.assert_array_equal(got.old_logprobs, got.sampler_logprobs)
    np.testing.assert_allclose(got.old_logprobs, samples.logprobs, atol=1e-5)
    np.testing.assert_array_equal(got.index, prompts.index)
    np.testing.assert_allclose(got.ref_logprobs, logprobs_of(reference, got, 0.7), atol=1e-5)
    assert np.abs(got.ref_logprobs - got.old_logprobs).max() > 0.1
    even = [
        sum(int(token) % 2 == 0 for token in row[P : P + int(n)])
        for row, n in zip(got.tokens, got.lengths)
    ]
    np.testing.assert_array_equal(got.scores, np.float32(even) + 0.5)
    for name in ("old_logprobs", "sampler_logprobs", "ref_logprobs"):
        array = np.asarray(getattr(got, name))
        assert array.shape == (B, P + R) and array.dtype == np.float32
        assert (array[np.asarray(got.mask) == 0] == 0.0).all(), name


def test_a_policy_that_is_its_reference_has_no_kl(model, prompts):
    got = gather(model, model, prompts)
    np.testing.assert_allclose(got.old_logprobs, got.ref_logprobs, atol=1e-5)


def test_in_bfloat16_the_old_logprobs_are_those_of_the_pass_that_the_loss_runs(model, prompts):
    # Wide enough for a product with one row and one with many to round differently.
    shape = dataclasses.replace(CONFIG, num_layers=1, d_model=512, d_ff=512, dtype="bfloat16")
    half = jax.jit(transformer.init, static_argnums=0)(shape, jax.random.key(0))
    got = gather(half, half, prompts)
    np.testing.assert_array_equal(got.old_logprobs, got.ref_logprobs)
    assert (got.old_logprobs != got.sampler_logprobs).any()
    np.testing.assert_allclose(got.old_logprobs, got.sampler_logprobs, atol=0.15)
