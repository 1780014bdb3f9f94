"""Talking to a checkpoint: the sampler's tokens, streamed; and answers to a file of prompts."""

import dataclasses
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import texts
from rlhf_jax.folders import Pretrained
from rlhf_jax.models import transformer
from rlhf_jax.sampling import decode
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.tools import chat, label, respond

TEMPLATE = (
    "{% for m in messages %}\n<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def pretrained():
    model = jax.jit(transformer.init, static_argnums=0)(tiny.SHAPE, jax.random.key(0))
    return Pretrained(model, tiny.TOKENIZER)


@pytest.fixture
def talk(monkeypatch, capsys):
    """`talk(lines, *flags)` -> what is printed for lines from a pipe."""

    def talk(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.main(list(flags))
        return capsys.readouterr().out

    return talk


def test_the_stream_is_what_the_sampler_draws(pretrained):
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "no_repeat_ngram": 2}
    rules = {"banned_tokens": (5, 6), "min_new_tokens": 5, "forced_tokens": (72, 105)}
    filters = {"top_k": 40, "top_p": 0.9, "min_p": 0.01}
    for flags in (filters, {"temperature": 0.0}, penalties | rules, penalties | {"temperature": 0}):
        sampling = Sampling(max_new_tokens=12, **{"temperature": 1.7} | flags)
        ids, key = [72, 105, 33], decode.row_keys(jax.random.key(4), jnp.array([7]))
        streamed = list(chat.stream_tokens(pretrained, sampling, ids, key))
        tokens, attend = jnp.array([ids]), jnp.ones((1, 3), jnp.int32)  # not padded at all
        sample = jax.jit(functools.partial(decode.sample, ends=tiny.TOKENIZER.ends))
        samples = sample(pretrained.model, tokens, attend, key, sampling=sampling)
        drawn = np.asarray(samples.tokens)[np.asarray(samples.mask) > 0].tolist()
        assert streamed == [token for token in drawn if token not in tiny.TOKENIZER.eos_ids]
        assert len(streamed) > 3


def test_turns_of_like_length_compile_nothing_new(pretrained):
    wide = dataclasses.replace(pretrained.model.config, max_length=128)
    pretrained = pretrained._replace(model=dataclasses.replace(pretrained.model, config=wide))
    counts = []
    for size in (3, 30, 33, 60, 64):
        for number in (0.5, 0.9):  # nor does another temperature or top-p
            sampling = Sampling(max_new_tokens=2, temperature=number, top_p=number)
            list(
                chat.stream_tokens(
                    pretrained,
                    sampling,
                    [65] * size,
                    decode.row_keys(jax.random.key(0), jnp.array([size])),
                )
            )
        counts.append((chat._first_token._cache_size(), chat._next_token._cache_size()))
    first = counts[0]
    assert counts[1] == first
    assert counts[2:] == [(first[0] + 1, first[1] + 1)] * 3


def test_a_character_is_printed_when_all_its_bytes_are_there():
    tokenizer = tiny.TOKENIZER
    text = "né 三原色 🙂!"
    prompt = tokenizer.encode("问：")
    pieces = list(chat.stream_text(tokenizer, prompt, tokenizer.encode(text)))
    assert [piece for piece in pieces if piece] == list(text)
    cut = list(chat.stream_text(tokenizer, prompt, tokenizer.encode("三")[:2]))
    assert cut == [chat.INCOMPLETE]  # an answer that ends within a character still says so


def test_turns_are_rendered_by_the_template_or_continue_the_text():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " there"},
        {"role": "user", "content": "So"},
    ]
    plain = tiny.TOKENIZER
    assert plain.decode(chat.encode(plain, messages)) == "Hi there\nSo"
    templated = dataclasses.replace(plain, settings=plain.settings | {"chat_template": TEMPLATE})
    wanted = "<user>Hi<assistant> there<user>So<assistant>"
    assert templated.decode(chat.encode(templated, messages)) == wanted


def test_a_long_conversation_forgets_its_first_turns_but_not_the_system(pretrained, capsys):
    turns = [{"role": r, "content": r[0] * 6} for r in ("system", *("user", "assistant") * 2)]
    turns.append({"role": "user", "content": "now"})
    sampling = Sampling(max_new_tokens=8)  # of max_length 32
    ids = chat.shorten(pretrained, sampling, turns)
    assert tiny.TOKENIZER.decode(ids) == "ssssss\nuuuuuuaaaaaa\nnow"
    assert "no longer fits" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the prompt has 40 tokens, but .* has room for 24"):
        texts.padded(*pretrained, sampling, [65] * 40)


def test_greedy_continuations_are_the_references_token_for_token(talk, real_data):
    folder = real_data / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())["greedy"]
    flags = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "256"]
    lines = [reference[1]["prompt"], "/new", reference[0]["prompt"]]
    said = talk(lines, *flags)
    first, second = (case["output_text"].removeprefix("<s> ") for case in reference[1::-1])
    assert said == first.removeprefix(lines[0]) + "\n" + second + "\n"


def test_the_seed_decides_what_is_said(talk, real_data):
    flags = ["--model", str(real_data / "models" / "stories260K"), "--max-new-tokens", "8"]
    lines = ["Once upon a time", "Then the dog"]
    one, same, other = (talk(lines, *flags, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same != other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "3"], "top_p=3.0 must be in (0, 1]"),
        (["--banned-tokens", "3", "-4"], "banned_tokens=(3, -4) must be a tuple of token ids"),
        (["--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["--max-new-tokens", "512"], "max_new_tokens=512 must be in 1..511"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(talk, real_data, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        talk(["Hi"], "--model", str(real_data / "models" / "stories260K"), *flags)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such folder"), (".", "the folder of a run; name the model")],
)
def test_a_folder_without_a_model_is_one_line_and_exit_code_2(
    talk, tmp_path, capsys, name, message
):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SystemExit) as stopped:
        talk([], "--model", str(tmp_path / name))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_stream_is_the_answer_to_a_prompt_of_a_file(pretrained):
    sampling = Sampling(max_new_tokens=8, temperature=1.5)
    asked = (["ab", "cde", "fg"], sampling)
    answers = texts.generate(*pretrained, *asked, num_samples=3, progress=False)
    key = decode.row_keys(jax.random.key(0), jnp.array([1]), 2)  # prompt 1, sample 2
    ids = tiny.TOKENIZER.encode("cde")
    streamed = chat.stream_text(
        tiny.TOKENIZER, ids, chat.stream_tokens(pretrained, sampling, ids, key)
    )
    assert answers[3 + 2] == "".join(streamed)


def test_past_failures_are_answered_by_a_checkpoint_and_labelled(tmp_path, real_data):
    rows = [{"prompt": "Tom saw a dog. He", "group": "dogs"}, {"prompt": "Lily was sad"}]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "answers.jsonl"
    flags = ["--model", str(real_data / "models" / "stories260K"), "--output", str(output)]
    sizes = ["--num-samples", "2", "--max-new-tokens", "8"]
    respond.main([str(tmp_path / "failures.jsonl"), *flags, *sizes])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: row[k] for k in row if k != "responses"} for row in written] == rows
    assert all(text.startswith(" ") for row in written for text in row["responses"])
    label.main([str(output), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()
