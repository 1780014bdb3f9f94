"""The transformer and its heads without torch: what padding, packing and caching may not change."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.data.records import Ends
from rlhf_jax.models import decoding, heads, layers, lora, transformer
from rlhf_jax.sampling import decode

CONFIG = transformer.Config(
    vocab_size=31,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    max_length=16,
)
B, T = 4, 12
LENGTHS = (12, 7, 3, 1)


def make_model(config=CONFIG):
    """Random weights, norms included, that make logits of order 1 to 4."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise = noise * leaf.shape[0] ** -0.5
        return jnp.float32(1 + 0.3 * noise if path[-1].key == "scale" else noise)

    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    return transformer.Model(config, jax.tree.map_with_path(draw, shapes.weights))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def scorer(model):
    return transformer.with_score_head(transformer.without_lm_head(model), jax.random.key(5))


hidden_states = jax.jit(transformer.hidden_states)


@jax.jit
def forward(model, tokens, attend):
    return transformer.logits(model, transformer.hidden_states(model, tokens, attend))


def documents(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in lengths]


def padded(rows, side, filler=0, width=T):
    """Rows of different lengths -> tokens, attend, both [B, width], padded on `side`."""
    tokens = np.full((len(rows), width), filler, np.int32)
    attend = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, place], attend[i, place] = row, 1
    return jnp.asarray(tokens), jnp.asarray(attend)


def real(values, attend):
    """The entries at real tokens, row after row: the same order under either padding."""
    return np.asarray(values)[np.asarray(attend) > 0]


def test_padding_on_either_side_and_garbage_under_it_change_nothing_at_real_tokens(model):
    rows = documents()
    right = padded(rows, "right")
    want = real(forward(model, *right), right[1])
    for side in ("left", "right"):
        tokens, attend = padded(rows, side)
        garbage = np.random.default_rng(1).integers(0, CONFIG.vocab_size, tokens.shape)
        tokens = jnp.where(attend > 0, tokens, garbage)
        got = real(forward(model, tokens, attend), attend)
        assert np.abs(got - want).max() < 1e-5
    alone = forward(model, rows[1][None], jnp.ones((1, LENGTHS[1]), jnp.int32))[0]
    np.testing.assert_allclose(want[12:19], alone, atol=1e-5)


def test_a_model_called_outside_of_jit_is_one_compiled_program_a_function(model, scorer, caplog):
    tokens = jnp.ones((3, 7), jnp.int32)

    def programs(function, *args):
        """How many programs XLA compiled for the call."""
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            out = jax.block_until_ready(function(*args))
        return sum("Finished XLA compilation" in x.getMessage() for x in caplog.records), out

    count, hidden = programs(transformer.hidden_states, model, tokens, tokens)
    assert count == 1
    count, (_, cache) = programs(decoding.prefill, model, tokens, tokens, 9)
    assert count == 1
    assert programs(decoding.decode, model, cache, tokens[:, 0])[0] == 1
    assert programs(heads.token_logprobs, model, hidden, tokens, 1.0, 3)[0] == 1
    assert programs(heads.sequence_scores, scorer, tokens, tokens)[0] == 1
    assert programs(transformer.hidden_states, model, tokens + 1, tokens)[0] == 0


def test_a_row_that_is_all_padding_stays_finite(model):
    assert jnp.all(jnp.isfinite(forward(model, *padded([[]] * B, "right"))))


def test_documents_packed_into_a_row_are_read_as_if_each_had_a_row_of_its_own(model):
    rows = documents((5, 3, 2))
    tokens, attend = padded([np.concatenate(rows), *rows], "right")
    attend = attend.at[0].set([1] * 5 + [2] * 3 + [3] * 2 + [0] * 2)
    got = forward(model, tokens, attend)
    separate = real(got[1:], attend[1:])
    np.testing.assert_allclose(real(got[:1], attend[:1]), separate, atol=1e-5)
    # Segment numbers only tell documents apart; the sentence would be empty if they did nothing.
    merged = forward(model, tokens, jnp.minimum(attend, 1))
    assert np.abs(real(merged[:1], attend[:1]) - separate).max() > 0.1


def test_positions_count_real_tokens_and_restart_with_each_document():
    attend = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0], [3, 1, 1, 0, 0, 2], [0] * 6])
    got = np.where(attend > 0, transformer.positions(attend), 0)
    want = [[0, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 0, 0], [0] * 6]
    np.testing.assert_array_equal(got, want)


def test_cached_decode_gives_what_the_full_forward_gives_at_every_position(model):
    prompts, responses = documents((6, 5, 3, 1)), documents((6,) * B, seed=1)
    width = 6
    tokens, attend = padded(prompts, "left", width=width)
    full_tokens = jnp.concatenate([tokens, jnp.stack(responses)], axis=1)
    full_attend = jnp.concatenate([attend, jnp.ones((B, 6), jnp.int32)], axis=1)
    want = forward(model, full_tokens, full_attend)[:, width - 1 :]

    @jax.jit
    def cached(model, tokens, attend, responses):
        hidden, cache = decoding.prefill(model, tokens, attend, T)

        def step(cache, token):
            hidden, cache = decoding.decode(model, cache, token)
            return cache, hidden

        _, rest = jax.lax.scan(step, cache, responses.T)
        hidden = jnp.concatenate([hidden[:, None], rest.swapaxes(0, 1)], axis=1)
        return transformer.logits(model, hidden)

    got = cached(model, tokens, attend, full_tokens[:, width:])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rows_that_continue_the_same_prompt_share_its_part_of_the_cache(model):
    """Three rows after each prompt decode as if each had read the prompt itself."""
    tokens, attend = padded(documents((6, 5, 3, 1)), "left", width=6)
    rows = jax.random.randint(jax.random.key(0), (3 * B, 4), 0, CONFIG.vocab_size)

    @functools.partial(jax.jit, static_argnames="count")
    def cached(model, tokens, attend, rows, count):
        _, cache = decoding.prefill(model, tokens, attend, 10, count)

        def step(cache, token):
            hidden, cache = decoding.decode(model, cache, token)
            return cache, hidden

        cache, hidden = jax.lax.scan(step, cache, rows.T)
        return hidden, [x.shape[::2] for x in jax.tree.leaves(cache.shared)]

    got, held = cached(model, tokens, attend, rows, 3)
    repeated = (jnp.repeat(x, 3, axis=0) for x in (tokens, attend))
    want, _ = cached(model, *repeated, rows, 1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert held == [(B, 6)] * (2 * CONFIG.num_layers)


def test_a_prompt_and_response_longer_than_the_model_are_refused(model):
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="need 17 positions, but the model has max_length=16"):
        decoding.prefill(model, tokens, tokens, 17)


def test_a_token_does_not_change_what_was_said_before_it(model):
    tokens, attend = padded(documents((T,) * B), "right")
    changed = tokens.at[:, 8].set((tokens[:, 8] + 1) % CONFIG.vocab_size)
    before, after = forward(model, tokens, attend), forward(model, changed, attend)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert jnp.all(jnp.abs(before - after)[:, 8:].max(axis=-1) > 1e-3)


def test_grouped_query_attention_is_full_attention_with_repeated_key_and_value_heads(model):
    full = dataclasses.replace(CONFIG, num_kv_heads=CONFIG.num_heads)
    group = CONFIG.num_heads // CONFIG.num_kv_heads

    def repeat(path, x):
        if path[-2].key not in ("key", "value"):
            return x
        kernel = x.reshape(CONFIG.d_model, CONFIG.num_kv_heads, CONFIG.head_dim)
        return jnp.repeat(kernel, group, axis=1).reshape(CONFIG.d_model, -1)

    weights = jax.tree.map_with_path(repeat, model.weights)
    batch = padded(documents(), "left")
    want = real(forward(model, *batch), batch[1])
    got = real(forward(transformer.Model(full, weights), *batch), batch[1])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_heads_that_do_not_group_are_refused():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        transformer.Config(num_heads=4, num_kv_heads=3)


def test_a_tied_model_reads_out_with_its_embedding():
    config = dataclasses.replace(CONFIG, tied=True)
    tied = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    assert "head" not in tied.weights
    embedding = jnp.arange(6.0).reshape(3, 2)
    model = transformer.Model(config, {"embed": {"embedding": embedding}})
    np.testing.assert_allclose(transformer.logits(model, jnp.array([1.0, 10.0])), [10, 32, 54])


def test_the_scalar_head_reads_the_last_real_token_under_both_paddings(scorer):
    rows = documents()
    score = jax.jit(heads.sequence_scores)
    left, right = score(scorer, *padded(rows, "left")), score(scorer, *padded(rows, "right"))
    hidden = hidden_states(scorer, *padded(rows, "right"))
    last = hidden[jnp.arange(B), jnp.array(LENGTHS) - 1]
    head = scorer.weights["score"]
    want = last @ head["kernel"][:, 0] + head["bias"]
    np.testing.assert_allclose(right, want, atol=1e-5)
    np.testing.assert_allclose(left, want, atol=1e-5)
    assert np.std(want) > 0.1


def test_the_value_of_a_token_is_the_head_one_token_earlier(scorer):
    hidden = jax.random.normal(jax.random.key(0), (2, 5, CONFIG.d_model))
    values = heads.token_values(scorer, hidden)
    head = scorer.weights["score"]
    np.testing.assert_array_equal(values[:, 0], 0)
    want = hidden[:, :-1] @ head["kernel"][:, 0] + head["bias"]
    np.testing.assert_allclose(values[:, 1:], want, atol=1e-6)


def test_token_logprobs_may_skip_the_columns_before_start(model):
    tokens, attend = padded(documents(), "left")
    hidden = hidden_states(model, tokens, attend)
    want = losses.token_logprobs(forward(model, tokens, attend), tokens, 0.7)
    for start in (0, 1, 6):
        logprobs, entropy = heads.token_logprobs(model, hidden, tokens, 0.7, start)
        np.testing.assert_allclose(logprobs[:, start:], want[:, start:], atol=1e-5)
        assert not np.any(logprobs[:, :start]) and not np.any(entropy[:, :start])


def test_mapping_over_slices_of_the_rows_is_the_plain_map_gradients_included(model):
    tokens, attend = padded(documents(), "right")

    def loss(model, micro_batches):
        def rows(tokens, attend):
            hidden = transformer.hidden_states(model, tokens, attend)
            return heads.token_logprobs(model, hidden, tokens)

        logprobs, entropy = heads.map_rows(rows, micro_batches, tokens, attend)
        return losses.masked_mean(logprobs, attend), (logprobs, entropy)

    value = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    want = value(model, 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), value(model, 2), want)


def test_a_number_of_slices_that_does_not_divide_the_rows_is_refused():
    with pytest.raises(ValueError, match="micro_batches=3 does not divide a batch of 4 rows"):
        heads.map_rows(lambda x: x, 3, jnp.zeros((4, 2)))


def test_a_bfloat16_model_stays_near_float32_and_its_log_softmax_is_float32(model):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    half = transformer.Model(config, model.weights)
    tokens, attend = padded(documents(), "left")
    hidden = hidden_states(half, tokens, attend)
    assert hidden.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half.weights))
    got, want = forward(half, tokens, attend), forward(model, tokens, attend)
    assert got.dtype == jnp.float32
    # A rounding is 0.4 %; there are some ten of them on the way to logits of up to 4.
    assert 0 < np.abs(real(got - want, attend)).max() < 0.1
    logprobs, entropy = heads.token_logprobs(half, hidden, tokens)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    # Given these hidden states nothing more is lost: float64 arithmetic on them says the same.
    kernel = np.asarray(transformer.unembedding(half).astype(jnp.bfloat16), np.float64)
    exact = np.exp(np.asarray(hidden, np.float64) @ kernel)
    exact = np.log(exact / exact.sum(axis=-1, keepdims=True))[:, :-1]
    exact = np.take_along_axis(exact, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs[:, 1:], exact, atol=1e-5)


def test_a_norm_of_bfloat16_is_computed_in_float32_and_rounded_once():
    x = jax.random.normal(jax.random.key(0), (64, 16)).astype(jnp.bfloat16)
    scale = jax.random.normal(jax.random.key(1), (16,))
    got = layers.RMSNorm(1e-5).apply({"params": {"scale": scale}}, x)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(scale)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8)  # half a unit


def test_a_fresh_scalar_head_has_std_one_over_root_of_width_plus_one_or_is_zero():
    wide = transformer.Model(transformer.Config(d_model=4096), {})
    score = transformer.with_score_head(wide, jax.random.key(0)).weights["score"]
    assert abs(np.std(score["kernel"]) * 4097**0.5 - 1) < 0.05
    assert score["bias"].shape == (1,) and not np.any(score["bias"])
    zero = transformer.with_score_head(wide, None).weights["score"]
    assert not np.any(zero["kernel"]) and not np.any(zero["bias"])


def test_a_scalar_head_is_not_replaced_unless_it_is_removed_first(scorer):
    with pytest.raises(ValueError, match="already has a scalar head; .*without_score_head"):
        transformer.with_score_head(scorer, jax.random.key(0))
    bare = transformer.without_score_head(scorer)
    assert transformer.has_score_head(scorer) and not transformer.has_score_head(bare)
    again = transformer.with_score_head(bare, None)
    assert not np.any(again.weights["score"]["kernel"])


def test_float32_products_are_float32_on_every_device_forward_backward_and_in_sampling():
    """A TPU or GPU multiplies at less unless each product says otherwise; a CPU hides it."""
    model = lora.attach(make_model(), lora.Config(rank=2), jax.random.key(0))
    scorer = transformer.with_score_head(model, jax.random.key(1))
    tokens = jnp.ones((B, T), jnp.int32)

    def forward(weights):
        changed = transformer.Model(model.config, weights)
        hidden = transformer.hidden_states(changed, tokens, tokens)
        logprobs, _ = heads.token_logprobs(changed, hidden, tokens)
        return jnp.sum(logprobs) + jnp.sum(transformer.logits(changed, hidden))

    def sample(model):
        keys = decode.row_keys(jax.random.key(0), jnp.arange(B))
        few = decode.Sampling(max_new_tokens=3)
        return decode.sample(model, tokens, tokens, keys, sampling=few, ends=Ends((1,), 0))

    def score(scorer):
        return heads.token_values(scorer, transformer.hidden_states(scorer, tokens, tokens))

    for function, argument in (
        (jax.grad(forward), model.weights),
        (sample, model),
        (score, scorer),
        (lora.merge, model),
    ):
        text = str(jax.make_jaxpr(function)(argument))
        assert text.count("dot_general[") > 0
        exact = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
        assert text.count("dot_general[") == exact
