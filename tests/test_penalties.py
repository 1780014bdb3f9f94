"""Penalties, and tokens that are forbidden or forced: on hand-made logits, by brute force, and as
transformers computes them, alone and in `generate`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_huggingface import left_padded

from rlhf_jax import sharding
from rlhf_jax.data.records import Ends
from rlhf_jax.models import heads, huggingface, transformer
from rlhf_jax.sampling import History, Sampling, decode, filters, penalties

INF = float("inf")
ENDS = Ends((7, 9), 0)
# Every number and rule that acts on the logits of the model.
NUMBERS = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3}
RULES = {"no_repeat_ngram": 2, "banned_tokens": (3, 4), "min_new_tokens": 3}
FORCED = {"forced_tokens": (5, 6)}


def history(prompts, responses, width=5, longest=6):
    """A `History` of rows that have drawn equally many tokens. What is not drawn yet is noise."""
    tokens, attend = left_padded(prompts, width)
    drawn = np.random.default_rng(0).integers(0, 10, (len(prompts), longest))
    count = len(responses[0])
    drawn[:, :count] = responses
    return History(tokens, attend, jnp.asarray(drawn, jnp.int32), jnp.int32(count))


@functools.partial(jax.jit, static_argnames="ends")
def apply(sampling, logits, history, ends=ENDS):
    return penalties.apply(sampling, ends, logits, history)


def by_hand(
    logits,
    prompt,
    response,
    *,
    eos_ids=ENDS.eos_ids,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    no_repeat_ngram=None,
    banned_tokens=(),
    min_new_tokens=0,
    forced_tokens=(),
):
    """The logits of one row in plain Python: its prompt and response are lists without padding."""
    if len(response) < len(forced_tokens):
        forced = forced_tokens[len(response)]
        return [0.0 if token == forced else -INF for token in range(len(logits))]
    row, n, out = prompt + response, no_repeat_ngram, []
    ngrams = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)} if n else set()
    for token, x in enumerate(np.asarray(logits, np.float64).tolist()):
        if token in row:
            x = x / repetition_penalty if x > 0 else x * repetition_penalty
        if token in response:
            x -= presence_penalty + frequency_penalty * response.count(token)
        if any((*row, token)[-n:] == ngram for ngram in ngrams):
            x = -INF
        if token in banned_tokens or token in eos_ids and len(response) < min_new_tokens:
            x = -INF
        out.append(x)
    return out


# By hand.


def test_the_repetition_penalty_moves_logits_of_prompt_and_response_down_once_each():
    logits = jnp.array([[2.0, -2.0, 1.0, -1.0, 0.0, 3.0, -INF]])
    seen = history([[1, 2]], [[3, 2, 5, 2, 6]])  # token 0 fills the prompt and does not count
    out = penalties.repetition_penalty(logits, seen, 2.0)
    np.testing.assert_array_equal(out, [[2.0, -4.0, 0.5, -2.0, 0.0, 1.5, -INF]])
    in_prompt = penalties.repetition_penalty(logits, history([[0, 1]], [[2]]), 2.0)
    np.testing.assert_array_equal(in_prompt, [[1.0, -4.0, 0.5, -1.0, 0.0, 3.0, -INF]])


def test_presence_is_subtracted_once_and_frequency_for_each_time_in_the_response():
    logits = jnp.array([[1.0, 1.0, 1.0, 1.0, -INF]])
    seen = history([[0, 1, 1]], [[2, 1, 2, 2, 4]])
    presence = penalties.presence_penalty(logits, seen, 0.25)
    np.testing.assert_array_equal(presence, [[1.0, 0.75, 0.75, 1.0, -INF]])
    frequency = penalties.frequency_penalty(logits, seen, 0.25)
    np.testing.assert_array_equal(frequency, [[1.0, 0.75, 0.25, 1.0, -INF]])
    rewarded = penalties.frequency_penalty(logits, seen, -0.25)
    np.testing.assert_array_equal(rewarded, [[1.0, 1.25, 1.75, 1.0, -INF]])


@pytest.mark.parametrize(
    "n, prompt, response, forbidden",
    [
        (1, [1, 2], [4, 2], {1, 2, 4}),
        (2, [1, 2, 1, 3], [1], {2, 3}),  # 1 2 and 1 3 are there
        (2, [2, 1, 1], [], {1}),  # 1 1 overlaps itself
        (2, [1, 2], [3, 1], {2}),  # begun in the prompt, or across its end
        (2, [1], [2, 3, 2], {3}),
        (3, [1, 2, 3, 1], [2], {3}),
        (3, [1, 2, 3, 2], [1], set()),
        (3, [0, 0, 5], [0, 0], {5}),  # 0 is a token here, and padding before it
        (3, [0], [0], set()),  # padding, 0 and 0 are no trigram
        (4, [1, 2], [3], set()),  # no four tokens yet
        (12, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], set()),  # longer than a row can be
        (11, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], {1}),
        (2, [], [], set()),  # a row that only fills a batch
        (1, [], [], set()),
    ],
)
def test_a_token_that_would_repeat_an_ngram_is_forbidden(n, prompt, response, forbidden):
    out = penalties.no_repeat_ngram(jnp.zeros((1, 8)), history([prompt], [response]), n)
    assert set(np.flatnonzero(np.asarray(out)[0] == -INF).tolist()) == forbidden
    assert (out[0, jnp.array([x for x in range(8) if x not in forbidden])] == 0).all()


def test_banned_forced_and_too_early_tokens_are_impossible():
    logits = jnp.arange(10.0)[None]

    def left(sampling, count):
        out = np.asarray(apply(sampling, logits, history([[1]], [[8] * count])))[0]
        return {token: out[token] for token in np.flatnonzero(out > -INF).tolist()}

    free = {token: float(token) for token in range(10)}
    assert left(Sampling(banned_tokens=(0, 3, 9)), 2) == {
        token: x for token, x in free.items() if token not in (0, 3, 9)
    }
    for count, eos in ((0, False), (2, False), (3, True), (6, True)):
        expected = free if eos else {t: x for t, x in free.items() if t not in ENDS.eos_ids}
        assert left(Sampling(min_new_tokens=3), count) == expected
    both = Sampling(min_new_tokens=3, forced_tokens=(5, 7))  # what is forced may be EOS
    assert [left(both, count) for count in (0, 1)] == [{5: 0.0}, {7: 0.0}]
    assert left(both, 3) == free


def test_an_id_outside_of_the_vocabulary_is_refused():
    for name in ("banned_tokens", "forced_tokens"):
        with pytest.raises(ValueError, match=rf"{name} holds \[8, 9\], but the model has ids 0..7"):
            sampling = Sampling(**{name: (7, 8, 9)})
            penalties.apply(sampling, ENDS, jnp.zeros((1, 8)), history([[1]], [[1]]))


# By brute force.


@pytest.mark.parametrize(
    "options",
    [
        NUMBERS,
        *[{"no_repeat_ngram": n} for n in (1, 2, 3, 4)],
        NUMBERS | RULES | FORCED,
    ],
    ids=str,
)
def test_on_random_rows_the_logits_are_those_of_plain_python(options):
    rng = np.random.default_rng(0)
    sampling = Sampling(max_new_tokens=6, **options)
    forbidden = 0
    for count in range(7):
        # Few different tokens, 0 among them, which is the padding too.
        prompts = [rng.integers(0, 4, rng.integers(0, 6)).tolist() for _ in range(40)]
        responses = rng.integers(0, 4, (40, count)).tolist()
        logits = np.float32(rng.normal(size=(40, 10)))
        out = np.asarray(apply(sampling, logits, history(prompts, responses)))
        expected = [by_hand(*row, **options) for row in zip(logits, prompts, responses)]
        np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)
        forbidden += np.sum(out == -INF)
    assert (forbidden > 0) == (options is not NUMBERS)


# As transformers.


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, RULES], ids=str
)
def test_the_logits_are_those_of_transformers_on_rows_without_padding(options, count):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(count)
    prompts = [rng.integers(0, 4, n).tolist() for n in (5, 4, 2, 1)]
    responses = rng.integers(0, 4, (4, count)).tolist()
    logits = np.float32(2 * rng.normal(size=(4, 10)))
    out = apply(Sampling(max_new_tokens=6, **options), logits, history(prompts, responses))
    eos = list(ENDS.eos_ids)

    def theirs(name, value, start):
        if name == "banned_tokens":
            words = [[token] for token in value]
            return processors.NoBadWordsLogitsProcessor(words, torch.tensor(eos))
        if name == "min_new_tokens":
            return processors.MinNewTokensLengthLogitsProcessor(start, value, eos)
        if name == "no_repeat_ngram":
            return processors.NoRepeatNGramLogitsProcessor(value)
        return processors.RepetitionPenaltyLogitsProcessor(value)

    for row, prompt, response, mine in zip(logits, prompts, responses, np.asarray(out)):
        scores, ids = torch.tensor(row)[None], torch.tensor([prompt + response])
        for name, value in options.items():
            scores = theirs(name, value, len(prompt))(ids, scores)
        np.testing.assert_allclose(mine, scores[0].numpy(), rtol=1e-6)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A random language model in torch, and the same here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, huggingface.load(folder)


@functools.partial(jax.jit, static_argnames="ends")
def continued(model, tokens, attend, sampling, ends):
    keys = decode.row_keys(jax.random.key(0), jnp.arange(len(tokens)))
    return decode.sample(model, tokens, attend, keys, sampling=sampling, ends=ends)


NEW, PAD = 16, 0
SAME = {"repetition_penalty": "repetition_penalty", "no_repeat_ngram": "no_repeat_ngram_size"}


# save_pretrained reads config.json back without closing it (transformers 5.23).
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram": 2},
        {"min_new_tokens": 9},
        {"repetition_penalty": 1.2, "no_repeat_ngram": 3, "min_new_tokens": 9},
    ],
    ids=str,
)
def test_greedy_continuations_are_those_of_generate_with_the_same_settings(options, llamas):
    torch, (theirs, ours) = pytest.importorskip("torch"), llamas
    rng = np.random.default_rng(0)
    tokens, attend = left_padded([rng.integers(1, 40, n) for n in (9, 5, 2, 1)], 9)
    ids, mask = torch.tensor(np.asarray(tokens)).long(), torch.tensor(np.asarray(attend)).long()

    def generate(eos, options):
        # The padding is banned, because as a token it would have been seen before by generate.
        how = {"max_new_tokens": NEW, "bad_words_ids": [[PAD]], "pad_token_id": PAD}
        how |= {SAME.get(name, name): value for name, value in options.items()}
        out = theirs.generate(ids, attention_mask=mask, eos_token_id=eos, do_sample=False, **how)
        return np.pad(out.numpy(), ((0, 0), (0, 9 + NEW - out.shape[1])), constant_values=PAD)

    third = int(generate(None, {})[0, 9 + 2])  # an EOS that ends the first row early
    want, free = generate(third, options), generate(third, {})
    sampling = Sampling(max_new_tokens=NEW, temperature=0, banned_tokens=(PAD,), **options)
    got = continued(ours, tokens, attend, sampling, Ends((third,), PAD))
    np.testing.assert_array_equal(got.tokens, want)
    assert (want != free).any()
    if "min_new_tokens" in options:
        assert (got.lengths > 9).all() and (free[0, 9 + 3 :] == PAD).all()
    # A greedy draw from what the penalties left is not a draw from the policy.
    assert np.isfinite(got.filtered_logprobs).all() and np.isfinite(got.logprobs).all()


# In the sampler.

CONFIG = transformer.Config(
    vocab_size=32,
    num_layers=1,
    d_model=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    d_ff=48,
    max_length=32,
)
B, WIDTH, R = 8, 6, 12
LENGTHS = (6, 1, 4, 3, 6, 2, 5, 1)
ALL = {"max_new_tokens": R, "temperature": 0.7, **NUMBERS, **RULES, **FORCED}


@pytest.fixture(scope="module")
def model():
    return jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return left_padded([rng.integers(10, 32, n).tolist() for n in LENGTHS], WIDTH)


@pytest.fixture(scope="module")
def drawn(model, prompts):
    return jax.tree.map(np.asarray, continued(model, *prompts, Sampling(**ALL), ENDS))


@jax.jit
def said(model, out, temperature):
    """Logits of a full forward pass, and the policy's log-probabilities of the tokens."""
    hidden = transformer.hidden_states(model, out.tokens, out.attend)
    logprobs = heads.token_logprobs(model, hidden, out.tokens, temperature)[0]
    return transformer.logits(model, hidden), logprobs * out.mask


def test_the_sampler_penalises_the_logits_before_it_divides_them_by_the_temperature(
    model, prompts, drawn
):
    logits, logprobs = said(model, drawn, ALL["temperature"])
    # What is reported as the policy's is of the policy alone.
    np.testing.assert_allclose(drawn.logprobs, logprobs, atol=1e-5)
    options = {name: x for name, x in ALL.items() if name not in ("max_new_tokens", "temperature")}
    for row, length in enumerate(drawn.lengths):
        prompt = drawn.tokens[row, WIDTH - LENGTHS[row] : WIDTH].tolist()
        response = drawn.tokens[row, WIDTH : WIDTH + length].tolist()
        assert response[:2] == [5, 6] and not {3, 4} & set(response)
        assert length > 3 and not {7, 9} & set(response[:3])
        pairs = list(zip(prompt + response, (prompt + response)[1:]))
        assert len(set(pairs)) == len(pairs)
        for t, token in enumerate(response):
            changed = by_hand(logits[row, WIDTH + t - 1], prompt, response[:t], **options)
            left = np.array(changed) / ALL["temperature"]
            expected = left[token] - np.log(np.sum(np.exp(left)))
            np.testing.assert_allclose(drawn.filtered_logprobs[row, WIDTH + t], expected, atol=1e-5)
    np.testing.assert_array_equal(drawn.filtered_logprobs[:, WIDTH : WIDTH + 2], 0.0)


def test_the_same_tokens_are_drawn_where_a_mesh_splits_the_vocabulary(model, prompts, drawn):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    with jax.set_mesh(mesh):
        placed, rows = sharding.place(mesh, model), sharding.put_rows(mesh, prompts)
        out = continued(placed, *rows, Sampling(**ALL), ENDS)
    np.testing.assert_array_equal(out.tokens, drawn.tokens)
    np.testing.assert_allclose(out.filtered_logprobs, drawn.filtered_logprobs, atol=1e-5)


@pytest.mark.parametrize("size", [32, 30])
def test_no_device_gathers_the_logits(size):
    """A vocabulary that the tensor axis does not divide is on every device as it is."""
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    where = NamedSharding(mesh, P(("data", "fsdp"), "tensor" if size == 32 else None))
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(B, size)))
    prompts, responses = rng.integers(0, 10, (B, 5)), rng.integers(0, 10, (B, 3))
    seen, sampling = history(prompts.tolist(), responses.tolist()), Sampling(**ALL)
    with jax.set_mesh(mesh):
        placed = History(*sharding.put_rows(mesh, seen[:3]), seen.count)
        arguments = sampling, jax.device_put(logits, where), placed
        program = jax.jit(
            lambda sampling, *rest: penalties.apply(sampling, ENDS, *rest), out_shardings=where
        )
        program = program.lower(*arguments).compile()
        out = program(*arguments)
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()
    np.testing.assert_allclose(out, apply(sampling, logits, seen), rtol=1e-6)


# The compiled program.


def test_what_is_off_compiles_to_nothing():
    logits, seen = jnp.zeros((1, 8)), history([[1]], [[1]])
    assert penalties.apply(Sampling(), ENDS, logits, seen) is logits
    assert filters.apply(logits) is logits
    keys = jax.random.split(jax.random.key(0), 1)
    _, logprobs, filtered = decode.draw(logits, keys, 0, Sampling())
    assert filtered is logprobs


def test_new_numbers_and_positions_do_not_recompile_but_another_rule_does():
    traces = []

    @jax.jit
    def one(sampling, logits, history):
        traces.append(sampling)
        return penalties.apply(sampling, ENDS, logits, history)

    logits = jnp.arange(10.0)[None]
    for number, count in ((1.5, 0), (0.5, 4), (2, 6)):
        numbers = dict.fromkeys(NUMBERS, number)
        one(Sampling(**numbers, **RULES, **FORCED), logits, history([[1]], [[2] * count]))
    assert len(traces) == 1
    one(Sampling(**NUMBERS, **RULES | {"no_repeat_ngram": 3}), logits, history([[1]], [[2]]))
    assert len(traces) == 2
