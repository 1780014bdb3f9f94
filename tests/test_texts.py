"""Text in, text out: the sampler's own tokens as texts, and the log-probabilities of texts."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import folders, losses, texts
from rlhf_jax.algorithms import sft
from rlhf_jax.data import tokenizers
from rlhf_jax.data.schema import Message
from rlhf_jax.models import transformer
from rlhf_jax.sampling import beam, decode, diverse
from rlhf_jax.sampling.beam import Beam
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.sampling.diverse import DiverseBeam

pytestmark = pytest.mark.usefixtures("compile_cache")

WIDE = dataclasses.replace(tiny.SHAPE, max_length=128)
SAMPLING = Sampling(max_new_tokens=8, temperature=1.5)
PROMPTS = ["ab", "x" * 40, "cde", "y" * 70, "fg"]  # of the widths 32, 64, 32, 120 and 32
CHATS = tiny.TOKENIZER.with_template(tokenizers.PLAIN_TEMPLATE)
TURNS = [{"role": "user", "content": "fg"}]
EOS = tiny.TOKENIZER.eos_ids[0]


@pytest.fixture(scope="module")
def model():
    return jax.jit(transformer.init, static_argnums=0)(WIDE, jax.random.key(0))


generate = functools.partial(texts.generate, tokenizer=tiny.TOKENIZER, progress=False)
logprobs = functools.partial(texts.logprobs, tokenizer=tiny.TOKENIZER, progress=False)


@pytest.fixture(scope="module")
def answers(model):
    """Three answers to each prompt."""
    return generate(model, prompts=PROMPTS, sampling=SAMPLING, seed=4, num_samples=3)


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_is_what_the_sampler_draws_for_its_number_as_text(model, answers):
    """Prompts 0 and 4, unpadded, with the keys of sample 2; a token below 256 is its byte."""
    prompts = jnp.array([[ord(c) for c in PROMPTS[i]] for i in (0, 4)])
    keys = decode.row_keys(jax.random.key(4), jnp.array([0, 4]), 2)
    sample = jax.jit(functools.partial(decode.sample, ends=tiny.TOKENIZER.ends, sampling=SAMPLING))
    drawn = sample(model, prompts, jnp.ones_like(prompts), keys)
    for i, tokens, mask in zip((0, 4), np.asarray(drawn.tokens), np.asarray(drawn.mask)):
        said = bytes(x for x in tokens[mask > 0].tolist() if x < 256)
        assert answers[3 * i + 2] == said.decode(errors="replace")
    assert len(answers) == 15 and len(set(answers)) == 15


def test_a_search_gives_the_texts_of_the_best_hypotheses(model):
    settings = Beam(beams=3, max_new_tokens=8, num_return=2)
    found = texts.search(model, tiny.TOKENIZER, PROMPTS, settings, batch_size=2, progress=False)
    assert len(found) == 10
    prompts = jnp.array([[ord(c) for c in PROMPTS[i]] for i in (0, 4)])
    search = jax.jit(functools.partial(beam.search, ends=tiny.TOKENIZER.ends, beam=settings))
    best = search(model, prompts, jnp.ones_like(prompts))
    for i, rows, lengths in zip((0, 4), np.asarray(best.tokens), np.asarray(best.lengths)):
        for k in range(2):
            said = bytes(x for x in rows[k][: lengths[k]].tolist() if x < 256)
            assert found[2 * i + k] == said.decode(errors="replace")
    with pytest.raises(ValueError, match="beams=265 must be at most the number of tokens, 264"):
        texts.search(model, tiny.TOKENIZER, ["ab"], Beam(beams=265), progress=False)


def test_groups_of_a_diverse_search_are_searched(model):
    settings = DiverseBeam(beams=4, groups=2, diversity=5.0, max_new_tokens=6, num_return=4)
    found = texts.search(model, tiny.TOKENIZER, ["ab"], settings, progress=False)
    prompts = jnp.array([[ord("a"), ord("b")]])
    how = {"beam": settings, "ends": tiny.TOKENIZER.ends}
    best = jax.jit(functools.partial(diverse.search, **how))(model, prompts, prompts * 0 + 1)
    for said, row, length in zip(found, np.asarray(best.tokens)[0], np.asarray(best.lengths)[0]):
        wanted = bytes(x for x in row[:length].tolist() if x < 256)
        assert said == wanted.decode(errors="replace")
    plain = Beam(beams=4, max_new_tokens=6, num_return=4)
    assert found != texts.search(model, tiny.TOKENIZER, ["ab"], plain, progress=False)


def test_answers_depend_neither_on_the_batch_nor_on_the_other_prompts(model, answers):
    few = generate(model, prompts=PROMPTS, sampling=SAMPLING, seed=4, num_samples=3, batch_size=4)
    assert few == answers
    others = ["other", *PROMPTS[1:3], "y" * 3, "of another width " * 3]
    found = generate(model, prompts=others, sampling=SAMPLING, seed=4, num_samples=2)
    for i in (1, 2):
        assert found[2 * i : 2 * i + 2] == answers[3 * i : 3 * i + 2]
    assert found[6:8] != answers[9:11]
    assert generate(model, prompts=PROMPTS, sampling=SAMPLING, seed=5) != answers[::3]


def test_a_further_call_compiles_nothing_but_a_further_width(model, answers):
    """One program for each width, whatever the prompts, the seed and the real numbers are."""
    before = texts._answers._cache_size()
    for size in (1, 31, 32, 33, 64, 65, 119, 120):
        sampling = dataclasses.replace(SAMPLING, temperature=size / 60)
        generate(model, prompts=["z" * size] * (size % 5 + 1), sampling=sampling, seed=size)
    assert texts._answers._cache_size() == before
    counts = []
    for size in (25, 57, 1, 9, 24, 40, 26):  # with six bytes of the response and EOS 32, 64, ...
        logprobs(model, prompts=["z" * size], responses=["z" * 6], temperature=size / 30)
        counts.append(texts._token_logprobs._cache_size())
    assert counts[1:] == [counts[0] + 1] * 6


@pytest.mark.parametrize("name", ["2x2x2", "1x8x1"])
def test_a_model_on_a_mesh_answers_there_with_the_same_tokens(name):
    sampling = Sampling(max_new_tokens=6)
    alone = generate(tiny.model(), prompts=tiny.WORDS, sampling=sampling, num_samples=2)
    spread = generate(tiny.model(name), prompts=tiny.WORDS, sampling=sampling, num_samples=2)
    assert spread == alone
    pairs = {"prompts": tiny.WORDS, "responses": tiny.WORDS[::-1]}
    for one, two in zip(logprobs(tiny.model(), **pairs), logprobs(tiny.model(name), **pairs)):
        np.testing.assert_allclose(one, two, atol=1e-5)
    message = r"batch_size=3 does not divide over data x fsdp = \d"
    with pytest.raises(ValueError, match=message):
        generate(tiny.model(name), prompts=["ab"], sampling=sampling, batch_size=3)


def test_no_prompts_give_no_answers(model):
    assert generate(model, prompts=[]) == []
    assert logprobs(model, prompts=[], responses=[]) == []


def test_progress_is_shown_line_by_line_where_there_is_no_terminal(model, answers, capsys):
    def printed(**how):
        texts.generate(model, tiny.TOKENIZER, ["ab"] * 20, SAMPLING, **how)
        return capsys.readouterr().out.split("\n")

    first, second, rest = printed()
    assert first.startswith("answers 1/2 ") and second.startswith("answers 2/2 ") and not rest
    assert printed(progress=False) == [""]


# -------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_logits_at_the_response_and_its_eos(model, temperature):
    pairs = [("ab", "cdef"), ("ghi", "jkl"), ("m", "nopqr")]  # six bytes together
    tokens = jnp.array([[*(ord(c) for c in prompt + said), EOS] for prompt, said in pairs])

    @jax.jit
    def expected(model):
        hidden = transformer.hidden_states(model, tokens, jnp.ones_like(tokens))
        return losses.token_logprobs(transformer.logits(model, hidden), tokens, temperature)

    prompts, responses = zip(*pairs)
    found = logprobs(model, prompts=prompts, responses=responses, temperature=temperature)
    for nats, row, (prompt, said) in zip(found, expected(model), pairs):
        assert nats.shape == (len(said) + 1,)
        np.testing.assert_allclose(nats, row[len(prompt) :], atol=1e-5)


def test_their_mean_over_all_tokens_is_the_loss_of_fine_tuning():
    model = tiny.model()
    backwards = [word[::-1] for word in tiny.WORDS]
    nats = np.concatenate(logprobs(model, prompts=tiny.WORDS, responses=backwards, batch_size=5))
    loss = sft.evaluate(tiny.SFT, model, tiny.demonstrations(), mesh=tiny.mesh())["loss"]
    assert -nats.mean() == pytest.approx(loss, rel=1e-5)


def test_a_text_without_a_prompt_begins_where_something_stands_before_it(model):
    (alone,) = logprobs(model, prompts=[""], responses=["abcdef"])
    (after,) = logprobs(model, prompts=["a"], responses=["bcdef"])
    np.testing.assert_array_equal(alone, after)


def test_a_real_model_gives_the_log_probabilities_of_torch(real_data):
    """stories260K: a whole text, and the same text as prompt and response; EOS is id 1, its BOS."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = real_data / "models" / "stories260K"
    case = json.loads((folder / "reference.json").read_text())["teacher_forced"][0]
    ids = torch.tensor([[*case["input_ids"], 1]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(ids).logits.log_softmax(-1)[0, :-1]
    expected = expected.gather(1, ids[0, 1:, None])[:, 0].numpy()
    model, tokenizer = folders.load(folder)
    prompt, end = case["text"].split(" Tom had", 1)
    prompts, responses = ["", prompt], [case["text"], " Tom had" + end]
    whole, part = texts.logprobs(model, tokenizer, prompts, responses, progress=False)
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    np.testing.assert_allclose(
        part, expected[len(tokenizer.encode_prompt(prompt)) - 1 :], atol=1e-4
    )
    assert len(part) < len(whole) and whole[:-1].mean() == pytest.approx(
        -case["mean_nll"], abs=1e-4
    )


# ----------------------------------------------------------------------- prompts, and what is wrong


def test_a_text_is_a_users_turn_where_there_is_a_template_and_messages_need_one(model):
    assert texts.encode(CHATS, " fg\n") == texts.encode(CHATS, TURNS)
    assert texts.encode(CHATS, TURNS) == texts.encode(CHATS, [Message("user", "fg")])
    assert CHATS.decode(texts.encode(CHATS, "fg")) == "user:\nfg\nassistant:\n"
    assert texts.encode(CHATS, "fg", raw_prompts=True) == [ord("f"), ord("g")]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        generate(model, prompts=[TURNS], sampling=SAMPLING)


def test_an_answer_and_its_log_probability_are_of_the_same_rendered_prompt(model):
    rendered = "user:\nfg\nassistant:\n"
    asked = {"sampling": SAMPLING, "seed": 1}
    as_chat = texts.generate(model, CHATS, ["fg"], progress=False, **asked)
    assert as_chat == generate(model, prompts=[rendered], **asked)
    (nats,) = texts.logprobs(model, CHATS, [TURNS], ["said"], progress=False)
    (plain,) = logprobs(model, prompts=[rendered], responses=["said"])
    np.testing.assert_array_equal(nats, plain)


def test_a_space_at_the_start_of_an_answer_is_kept(real_data):
    """Llama's tokenizers drop it where the answer is decoded alone."""
    tokenizer = tokenizers.from_folder(real_data / "models" / "stories260K")
    ids = tokenizer.encode("Once upon a time")
    asked, said = ids[:2], ids[2:]
    assert not tokenizer.decode(said).startswith(" ")
    assert texts.continuation(tokenizer, asked, said).startswith(" ")
    assert (
        tokenizer.decode(asked) + texts.continuation(tokenizer, asked, said) == "Once upon a time"
    )
    assert texts.continuation(tokenizer, asked, []) == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "ab"}, "prompts='ab' is one text; put it into a list"),
        ({"prompts": ["ab", ""]}, r"prompts\[1\] \(''\): the prompt has no tokens"),
        (
            {"prompts": ["ab", "z" * 121]},
            r"prompts\[1\] \('zz.*\) has 121 tokens, but with max_new_tokens=8 .* room for 120; sh",
        ),
        (
            {"prompts": ["ab"], "sampling": Sampling(top_k=265)},
            "top_k=265 must be at most the number of tokens of the model, 264",
        ),
        ({"prompts": ["ab"], "num_samples": 0}, r"num_samples=0 must be in \[1, 1e\+06\]"),
        ({"prompts": ["ab"], "batch_size": 0}, "batch_size=0 must be 1 or more"),
        (
            {"prompts": ["ab"], "sampling": Sampling(max_new_tokens=128)},
            "max_new_tokens=128 must be in 1..127",
        ),
    ],
)
def test_what_cannot_be_answered_is_named(model, given, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"sampling": SAMPLING} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"responses": []}, "1 prompts and 0 responses: give one response to each prompt"),
        ({"responses": "cd"}, "responses='cd' is one text; put it into a list"),
        (
            {"responses": ["z" * 126]},
            r"prompts\[0\] \('ab'\) and its response have 129 tokens, .* max_length=128; shorten",
        ),
        ({"responses": ["cd"], "temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"responses": ["cd"], "batch_size": 0}, "batch_size=0 must be 1 or more"),
    ],
)
def test_what_has_no_log_probability_is_named(model, given, message):
    with pytest.raises(ValueError, match=message):
        logprobs(model, prompts=["ab"], **given)
