"""Beam search: the hypotheses and scores of transformers, of listing everything, and on meshes."""

import functools

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.data.records import Ends
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.sampling import beam, decode

# The oracle was transformers 5.23; the rules have been these since 4.50, where the length of a
# hypothesis became that of its generated tokens, EOS included.


PAD = 3  # transformers takes EOS for padding where the padding is 0


def search(model, tokens, attend, ends, processors=(), **settings):
    program = jax.jit(functools.partial(beam.search, ends=ends, processors=processors))
    return program(model, tokens, attend, beam=beam.Beam(**settings))


def left_padded(rows):
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), PAD, np.int32)
    attend = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], attend[i, width - len(row) :] = row, 1
    return jnp.asarray(tokens), jnp.asarray(attend)


# ---------------------------------------------------------------------------- torch as the oracle


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The same random Llama in torch and here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.4,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, huggingface.load(folder)


PROMPTS = [[5, 9, 3, 17, 8, 22], [30, 2, 11], [7]]


def theirs_found(theirs, tokens, attend, beams, new, num_return, **settings):
    import torch

    with torch.no_grad():
        found = theirs.generate(
            torch.tensor(np.asarray(tokens)).long(),
            attention_mask=torch.tensor(np.asarray(attend)).long(),
            num_beams=beams,
            num_return_sequences=num_return,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    rows = found.sequences[:, tokens.shape[1] :].numpy()
    rows = np.pad(rows, ((0, 0), (0, new - rows.shape[1])), constant_values=PAD)
    shape = (tokens.shape[0], num_return)
    return rows.reshape(*shape, new), found.sequences_scores.numpy().reshape(shape)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_hypotheses_and_scores_are_those_of_transformers(llama, early_stopping, length_penalty):
    theirs, ours = llama
    tokens, attend = left_padded(PROMPTS)
    settings = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    eos = [6, 13, 21]
    want, scores = theirs_found(theirs, tokens, attend, 4, 12, 3, eos_token_id=eos, **settings)
    found = search(
        ours, tokens, attend, Ends(tuple(eos), PAD), beams=4, max_new_tokens=12, num_return=3,
        **settings,
    )  # fmt: skip
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    np.testing.assert_array_equal(found.tokens, want)
    ended = [[any(t in eos for t in row) for row in rows] for rows in want.tolist()]
    np.testing.assert_array_equal(found.finished, ended)
    assert 0 < np.mean(ended)


@pytest.mark.parametrize("beams", [1, 2, 6])
def test_any_number_of_beams(llama, beams):
    theirs, ours = llama
    tokens, attend = left_padded(PROMPTS)
    if beams == 1:  # which transformers calls greedy search
        found = search(ours, tokens, attend, Ends((6,), PAD), beams=1, max_new_tokens=9)
        samples = jax.jit(functools.partial(decode.sample, ends=Ends((6,), PAD)))(
            ours,
            tokens,
            attend,
            decode.row_keys(jax.random.key(0), jnp.arange(3)),
            sampling=decode.Sampling(max_new_tokens=9, temperature=0.0),
        )
        np.testing.assert_array_equal(found.tokens[:, 0], samples.tokens[:, tokens.shape[1] :])
        logprobs = samples.logprobs.sum(1) / samples.lengths
        np.testing.assert_allclose(found.scores[:, 0], logprobs, atol=1e-5)
        return
    want, scores = theirs_found(theirs, tokens, attend, beams, 9, beams, eos_token_id=6)
    found = search(
        ours, tokens, attend, Ends((6,), PAD), beams=beams, max_new_tokens=9, num_return=beams
    )
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    np.testing.assert_array_equal(found.tokens, want)


def test_stories_continue_as_transformers_continues_them(real_data):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    del torch
    folder = real_data / "models" / "stories260K"
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    tokens, attend = left_padded([[1, 403, 407, 261], [1, 291]])
    want, scores = theirs_found(theirs, tokens, attend, 4, 24, 2, eos_token_id=[1, 2])
    found = search(
        huggingface.load(folder), tokens, attend, Ends((1, 2), PAD),
        beams=4, max_new_tokens=24, num_return=2,
    )  # fmt: skip
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    np.testing.assert_array_equal(found.tokens, want)


# ------------------------------------------------------------------------------- without torch


def test_five_beams_find_the_most_likely_of_all_85_responses():
    model = enumeration.model()
    every = np.asarray(enumeration.logprobs(model).sum(1))
    best = int(np.argmax(every))
    tokens = jnp.array([enumeration.PROMPT])
    found = search(
        model,
        tokens,
        jnp.ones_like(tokens),
        enumeration.ENDS,
        beams=5,
        max_new_tokens=enumeration.LONGEST,
        length_penalty=0.0,
        early_stopping="never",
    )
    np.testing.assert_allclose(found.scores[0, 0], every[best], atol=1e-5)
    np.testing.assert_array_equal(found.tokens[0, 0], enumeration.responses()[0][best])


def test_scores_are_the_log_probabilities_of_a_forward_pass_over_the_length():
    model = tiny.model()
    tokens, attend = left_padded([[70, 71, 72], [80]])
    found = search(
        model, tokens, attend, tiny.TOKENIZER.ends, beams=3, max_new_tokens=6, num_return=3
    )
    rows = jnp.concatenate([jnp.repeat(tokens, 3, axis=0), found.tokens.reshape(6, -1)], axis=1)
    seen = jnp.arange(6) < found.lengths.reshape(6, 1)
    attend = jnp.concatenate([jnp.repeat(attend, 3, axis=0), seen.astype(jnp.int32)], axis=1)
    logits = transformer.logits(model, transformer.hidden_states(model, rows, attend))
    logprobs = enumeration.losses.token_logprobs(logits, rows)[:, 3:]
    want = (logprobs * seen).sum(1) / found.lengths.reshape(-1)
    np.testing.assert_allclose(found.scores.reshape(-1), want, atol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("mesh", ["2x2x2", "1x2x4"])
def test_the_hypotheses_are_the_same_on_every_mesh(mesh):
    tokens, attend = left_padded([[70, 71, 72], [80], [81, 82], [90, 91]])
    settings = {"beams": 3, "max_new_tokens": 6, "num_return": 2}
    want = search(tiny.model(), tokens, attend, tiny.TOKENIZER.ends, **settings)
    model = tiny.model(mesh)
    with jax.set_mesh(tiny.mesh(mesh)):
        got = search(model, tokens, attend, tiny.TOKENIZER.ends, **settings)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-5)


def never_twice(logits, history):
    """No token follows itself."""
    last = jnp.where(
        history.count > 0,
        history.tokens[jnp.arange(len(logits)), jnp.maximum(history.count - 1, 0)],
        history.prompts[:, -1],
    )
    return jnp.where(jnp.arange(logits.shape[1]) == last[:, None], -jnp.inf, logits)


def test_processors_see_the_hypothesis_that_they_change():
    tokens, attend = left_padded([[70, 71, 72], [80]])
    found = search(
        tiny.model(), tokens, attend, tiny.TOKENIZER.ends, (never_twice,),
        beams=3, max_new_tokens=6,
    )  # fmt: skip
    for prompt, row, length in zip(tokens, found.tokens[:, 0], found.lengths[:, 0]):
        row = [int(prompt[-1]), *row[: int(length)].tolist()]
        assert all(a != b for a, b in zip(row, row[1:]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beams": 6}, "beams=6 must be at most the number of tokens, 5"),
        ({"beams": 2, "num_return": 3}, "num_return=3 must be at most beams=2"),
        ({"beams": 0}, "beams=0 must be"),
        ({"early_stopping": 1}, "early_stopping=1 must be one of True, False, 'never'"),
        ({"length_penalty": float("nan")}, "length_penalty=nan must be"),
        ({"length_penalty": float("inf")}, "length_penalty=inf must be"),
        ({"early_stopping": "always"}, "early_stopping='always' must be"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(settings, message):
    tokens = jnp.array([enumeration.PROMPT])
    with pytest.raises(ValueError, match=message):
        search(enumeration.model(), tokens, jnp.ones_like(tokens), enumeration.ENDS, **settings)
