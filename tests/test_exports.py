"""Exported folders are read elsewhere as they were trained here (see `exports_elsewhere`)."""

import dataclasses
import json
import os
import pathlib

import exports_elsewhere
import jax
import jax.numpy as jnp
import pytest
import tiny

from rlhf_jax import folders
from rlhf_jax.data import chat, tokenizers
from rlhf_jax.data.schema import Message
from rlhf_jax.models import heads, huggingface, lora, transformer
from rlhf_jax.models.huggingface import configurations
from rlhf_jax.rewards import learned
from rlhf_jax.tasks import own_data

pytestmark = pytest.mark.usefixtures("compile_cache")

TEMPLATES = {
    name: tiny.TOKENIZER.with_template(x) for name, x in exports_elsewhere.TEMPLATES.items()
}
TALK = [Message(**turn) for turn in exports_elsewhere.ASKED] + [Message("assistant", "Blue. ")]
CASES = ["gemma3", "llama", *(f"reward {name}" for name in TEMPLATES)]
EOS = tiny.TOKENIZER.eos_ids[0]
# As R1's: an answer is asked for with <think>, which a finished turn does not have.
THINKING = tiny.TOKENIZER.with_template(
    "{% for m in messages %}{{ m.role[0] + ':' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:<think>' }}{% endif %}"
)


# Read by transformers.


def test_the_installed_transformers_reads_what_was_made_here(tmp_path):
    pytest.importorskip("torch")
    exports_elsewhere.write(tmp_path)
    found = exports_elsewhere.read(tmp_path)["differences"]
    assert list(found) == CASES and max(found.values()) < 1e-4


def test_transformers_4_57_read_it_too_as_is_stored_with_its_release():
    stored = pathlib.Path(exports_elsewhere.__file__).with_suffix(".json")
    stored = json.loads(stored.read_text())
    assert stored["transformers"].startswith("4.57.")
    assert list(stored["differences"]) == CASES and max(stored["differences"].values()) < 1e-4


# The end of a conversation.


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_finished_conversation_of_a_reward_model_ends_at_the_token_that_was_trained(name):
    before = TEMPLATES[name]
    after = chat.ending_at_eos(before)
    trained, _ = chat.conversation(before, TALK)
    assert trained[-1] == EOS
    assert after.encode(chat.render(after, TALK)) == trained
    assert chat.conversation(after, TALK) == chat.conversation(before, TALK)
    # What is asked, and what does not end with an answer, has the text it had.
    for some in (TALK[:1], TALK[:3]):
        assert chat.render(after, some, ask=True) == chat.render(before, some, ask=True)
        assert chat.render(after, some) == chat.render(before, some)
    assert chat.render(after, TALK, ask=True) == chat.render(before, TALK, ask=True)


def test_a_template_that_ends_at_eos_is_left_alone():
    assert chat.ending_at_eos(TEMPLATES["llama3"]) is TEMPLATES["llama3"]
    once = chat.ending_at_eos(TEMPLATES["chatml"])
    assert chat.ending_at_eos(once) is once


def test_the_chat_template_of_a_real_tokenizer_ends_at_its_eos(real_data):
    tokenizer = tokenizers.from_folder(real_data / "tokenizers" / "minimind")
    assert chat.ids_after_eos(tokenizer) == tuple(tokenizer.encode("\n"))
    after = chat.ending_at_eos(tokenizer)
    trained, _ = chat.conversation(tokenizer, TALK)
    assert after.encode(chat.render(after, TALK)) == trained


def test_a_template_under_which_a_finished_answer_is_another_text_is_said(caplog):
    chat.ending_at_eos(THINKING)
    chat.ending_at_eos(tiny.TOKENIZER.with_template("{{ raise_exception('no') }}"))
    assert [x.message[:53] for x in caplog.records] == 2 * [
        "under this chat template a finished conversation is a"
    ]


def test_a_policy_and_a_reward_model_of_its_template_belong_together():
    for policy in TEMPLATES.values():
        tokenizers.check_same(policy, chat.ending_at_eos(policy))
    with pytest.raises(ValueError, match="differ in chat template; take a reward model of the pol"):
        tokenizers.check_same(TEMPLATES["llama3"], chat.ending_at_eos(TEMPLATES["chatml"]))


# Reward models of others, whose templates stand as they were trained.


def test_a_reward_model_of_others_is_read_after_eos_where_its_template_goes_on(caplog):
    line_break = tuple(b"\n")
    assert chat.ids_after_eos(TEMPLATES["chatml"]) == line_break
    read = {name: learned.under_template(x, (EOS,)) for name, x in TEMPLATES.items()}
    assert read["chatml"] == learned.Continued((EOS,), line_break)
    assert read["llama3"] is learned.score
    assert read["no eos"] is learned.score
    assert [x.message[:61] for x in caplog.records] == [
        "the reward model's chat template writes no EOS after an answe"
    ]
    ours = {name: chat.ending_at_eos(x) for name, x in TEMPLATES.items()}
    assert all(learned.under_template(x, (EOS,)) is learned.score for x in ours.values())


def test_what_follows_eos_is_appended_where_a_response_has_ended(monkeypatch):
    pad, seen = tiny.TOKENIZER.pad_id, []

    def sequence_scores(scorer, *rows):
        seen.append(rows)
        return jnp.zeros(4)

    monkeypatch.setattr(heads, "sequence_scores", sequence_scores)
    responses = [[9, EOS, pad, pad], [9, 8, 7, EOS], [9, 8, 7, 6], [EOS, pad, pad, pad]]
    tokens = jnp.asarray([[pad, pad, 97, 98, *x] for x in responses])
    scorer = transformer.Model(tiny.SHAPE, {"score": {}})
    score = learned.Continued((5, EOS), (10, 11))
    score(scorer, tokens, jnp.where(tokens == pad, 0, 1), jnp.zeros(tokens.shape))
    ((tokens, attend),) = seen
    wanted = ["9 E 10 11", "9 8 7 E 10 11", "9 8 7 6", "E 10 11"]
    for row, on, want in zip(tokens.tolist(), attend.tolist(), wanted):
        want = [97, 98, *(EOS if x == "E" else int(x) for x in want.split())]
        assert on == [0, 0] + [1] * len(want) + [0] * (8 - len(want))
        assert [x for x, real in zip(row, on) if real] == want


def test_a_run_on_a_folder_reads_the_reward_model_where_transformers_does(experiment, tmp_path):
    tokenizer, model = TEMPLATES["chatml"], tiny.model()
    scorer = transformer.with_score_head(transformer.without_lm_head(model), None)
    ids = {"eos_token_id": EOS, "pad_token_id": tokenizer.pad_id}
    huggingface.save(tmp_path / "theirs", scorer, fields=ids)
    tokenizer.save(tmp_path / "theirs")
    folders.export(tmp_path / "ours", scorer, tokenizer)
    context, config = tiny.context(tiny.mesh()), experiment("own_data").config
    sampling = dataclasses.replace(config.ppo.sampling, max_new_tokens=16)
    config = dataclasses.replace(
        config, max_prompt=16, ppo=dataclasses.replace(config.ppo, sampling=sampling)
    )

    def score(name, **changes):
        changed = dataclasses.replace(config, scorer=str(tmp_path / name), **changes)
        return own_data.open_scorer(changed, context, tokenizer)[1]

    assert score("ours") is learned.score
    assert score("theirs", raw_prompts=True) is learned.score
    assert score("theirs", max_prompt=15) == learned.Continued((EOS,), tuple(b"\n"))
    with pytest.raises(ValueError, match="33 positions"):  # one more than it has
        score("theirs")


# The files of a folder.


def test_what_a_tokenizer_returns_is_kept_and_else_what_language_models_read(tmp_path):
    tiny.TOKENIZER.save(tmp_path / "new")
    file = tmp_path / "new" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    file.write_text(json.dumps(settings | {"model_input_names": ["input_ids"]}))
    tokenizers.from_folder(tmp_path / "new").save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert again["model_input_names"] == ["input_ids"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_may_be_read_by_whom_the_umask_lets_read(tmp_path, umask):
    model = tiny.model()
    adapted = lora.attach(model, lora.Config(rank=1), jax.random.key(0))
    before = os.umask(umask)
    try:
        folders.export(tmp_path / "model", model, tiny.TOKENIZER)
        huggingface.save_adapter(tmp_path / "adapter", adapted, like=tmp_path / "model")
    finally:
        os.umask(before)
    files = [x for x in tmp_path.rglob("*") if x.is_file()]
    assert {x.suffix for x in files} == {".json", ".safetensors"}
    assert {x.stat().st_mode & 0o777 for x in files} == {0o666 & ~umask}


@pytest.mark.parametrize("query_scalar", [None, 20])
@pytest.mark.parametrize("family", ["Gemma3ForCausalLM", "Gemma2ForCausalLM"])
def test_a_gemma_without_a_window_is_written_with_full_layers_and_comes_back(family, query_scalar):
    three = family.startswith("Gemma3")
    shape = dataclasses.replace(
        tiny.SHAPE,
        num_layers=3,
        norm="rms_plus_one",
        embed_scale=True,
        post_norms=True,
        qk_norm=three,
        logit_softcap=None if three else 30.0,
        query_scalar=query_scalar,
    )
    fields = configurations.fields_from(shape)
    assert fields["architectures"] == [family]
    assert fields["layer_types"] == 3 * ["full_attention"]
    # transformers divides logits by its root, and makes the mask of a window that no layer has.
    assert fields["query_pre_attn_scalar"] == (query_scalar or shape.head_dim)
    assert fields["sliding_window"] >= 1
    back = configurations.config_from(fields)
    assert back == dataclasses.replace(shape, query_scalar=query_scalar or shape.head_dim)
    assert transformer.as_stored(shape).window is None


# What is not finite.


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_not_exported_and_what_is_there_stays(bad, tmp_path):
    model = tiny.model()
    folders.export(tmp_path / "policy", model, tiny.TOKENIZER)
    before = (tmp_path / "policy" / "model.safetensors").read_bytes()
    scale = model.weights["norm"]["scale"].at[3].set(bad)
    broken = dataclasses.replace(model, weights=model.weights | {"norm": {"scale": scale}})
    for export in (
        lambda: folders.export(tmp_path / "policy", broken, tiny.TOKENIZER),
        lambda: huggingface.save(tmp_path / "other", broken),
    ):
        with pytest.raises(ValueError, match="weight norm/scale is NaN or infinite as float"):
            export()
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_a_weight_beyond_half_precision_is_not_written_as_an_infinity(tmp_path):
    model = tiny.model()
    scale = model.weights["norm"]["scale"].at[0].set(7e4)
    large = dataclasses.replace(model, weights=model.weights | {"norm": {"scale": scale}})
    with pytest.raises(ValueError, match="infinite as float16, .*, or write it as float32"):
        huggingface.save(tmp_path / "half", large, dtype="float16")
    huggingface.save(tmp_path / "whole", large, dtype="bfloat16")
