"""The user's own files, end to end at toy size: from a Hugging Face folder and back to one."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import launch
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import own_data as task
from rlhf_jax.tasks import own_files

pytestmark = pytest.mark.usefixtures("caches")
ONE_DEVICE = ["--mesh", "data=1,fsdp=1,tensor=1"]
ANIMALS = "cat dog bird fish frog bear duck goat lion wolf deer mole crab swan hare seal".split()


@pytest.fixture
def files(tmp_path):
    """Demonstrations, comparisons and prompts in three different layouts."""
    rows = {
        "demonstrations": [
            {"prompt": f"One day, a {x}", "completion": f" was happy. The {x} ran home."}
            for x in ANIMALS
        ],
        "preferences": [
            {
                "prompt": f"Once, a big {x}",
                "responses": [f" played with {x}s.", f" was sad {x}", f" no {x}"],
                "ranks": [0, 1, 1],
            }
            for x in ANIMALS
        ],
        "prompts": [{"prompt": f"The little {x}"} for x in ANIMALS],
    }
    return {name: jsonl(tmp_path / f"{name}.jsonl", these) for name, these in rows.items()}


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(own_data, pretraining_coef=None, **changes):
    config = own_data.config
    return dataclasses.replace(
        config,
        sft=tiny.short(config.sft, num_steps=2, batch_size=4),
        reward_model=tiny.short(config.reward_model, num_steps=2, batch_size=4),
        ppo=tiny.short(
            config.ppo,
            num_iterations=2,
            batch_size=8,
            sampling=Sampling(max_new_tokens=8),
            num_epochs=1,
            pretraining_coef=pretraining_coef,
        ),
        max_prompt=24,
        max_response=24,
        held_out=0.25,
        best_of=2,
        judge_draws=2,
        **changes,
    )


@pytest.fixture
def own_data(experiment):
    return experiment("own_data")


@pytest.fixture
def start(own_data):
    """`start(config, workdir)` runs the experiment and returns its summary."""

    def start(config, workdir):
        return launch.launch(task.run, config, ["--workdir", str(workdir), *ONE_DEVICE])

    return start


def logits(folder, tokens):
    model = huggingface.load(folder)
    hidden = transformer.hidden_states(model, *map(jnp.asarray, (tokens, np.ones_like(tokens))))
    return np.asarray(transformer.logits(model, hidden))


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_pretrained_model_is_tuned_aligned_and_read_by_transformers(
    own_data, start, tmp_path, files, real_data, lora_rank
):
    torch = pytest.importorskip("torch")
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    model = str(real_data / "models" / "stories260K")
    summary = start(small(own_data, model=model, lora_rank=lora_rank, **files), tmp_path / "run")
    assert 0.0 <= summary["ppo"]["win_rate_low"] <= summary["ppo"]["win_rate"] <= 1.0
    assert summary["ppo"]["kl"] != 0.0 and "gold_after" not in summary["ppo"]
    export = tmp_path / "run" / "export"
    asked = torch.tensor([[1, 403, 407, 261, 378, 400]])
    policy = AutoModelForCausalLM.from_pretrained(export / "policy")
    with torch.no_grad():
        told = policy.generate(asked, max_new_tokens=8, do_sample=False)
        theirs = policy(told).logits.numpy()
        scorer = AutoModelForSequenceClassification.from_pretrained(export / "reward_model")
        assert scorer(told).logits.shape == (1, 1)
    ours = logits(export / "policy", told.numpy())
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    start_of = asked.shape[1]
    assert ours[0, start_of - 1 : -1].argmax(-1).tolist() == told[0, start_of:].tolist()
    assert np.abs(theirs - logits(model, told.numpy())).max() > 1e-3  # trained, not copied
    assert len(AutoTokenizer.from_pretrained(export / "policy").decode(told[0])) > 10


def test_each_stage_starts_alone_from_what_an_earlier_one_exported(
    own_data, start, tmp_path, files, real_data
):
    model = str(real_data / "models" / "stories260K")
    tuned = small(own_data, model=model, demonstrations=files["demonstrations"])
    assert start(tuned, tmp_path / "one").keys() == {"sft", "seconds"}
    sft = str(tmp_path / "one" / "export" / "sft")
    ranked = small(own_data, model=sft, preferences=files["preferences"])
    summary = start(ranked, tmp_path / "two")
    assert "sft" not in summary and summary["reward_model"]["eval_pairs"] > 0
    scorer = str(tmp_path / "two" / "export" / "reward_model")
    aligned = small(own_data, model=sft, scorer=scorer, prompts=files["prompts"])
    summary = start(aligned, tmp_path / "three")
    assert summary.keys() == {"ppo", "seconds"} and "win_rate" not in summary["ppo"]


def test_a_scorer_that_reads_other_tokens_is_refused(
    own_data, start, tmp_path, files, real_data, capsys
):
    config = small(
        own_data,
        model=str(real_data / "models" / "stories260K"),
        scorer=str(real_data / "tokenizers" / "minimind"),
        prompts=files["prompts"],
    )
    with pytest.raises(SystemExit) as stopped:
        start(config, tmp_path / "run")
    assert stopped.value.code == 2
    assert "policy and reward model differ in ids" in capsys.readouterr().err


def test_no_model_and_no_prompts_are_one_line(own_data, start, tmp_path, real_data, capsys):
    with pytest.raises(SystemExit):
        start(small(own_data), tmp_path / "run")
    assert "--model is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(small(own_data, model=str(real_data / "models" / "stories260K")), tmp_path / "run")
    assert "nothing to do: name --demonstrations, --pref" in capsys.readouterr().err


def test_folders_of_the_wrong_kind_are_refused_before_anything_is_trained(
    own_data, start, tmp_path, files, real_data, capsys
):
    model = str(real_data / "models" / "stories260K")
    config = small(own_data, model=model, scorer=model, **files)
    with pytest.raises(SystemExit):
        start(config, tmp_path / "run")
    assert "a language model, where a reward model is needed" in capsys.readouterr().err
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(real_data / "models" / "stories260K" / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(real_data / "tokenizers" / "minimind" / name)
    with pytest.raises(SystemExit):
        start(small(own_data, model=str(folder), preferences=files["preferences"]), tmp_path / "x")
    assert "the tokenizer has ids up to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "x").exists()


def test_rows_that_fit_two_formats_are_read_as_the_one_that_is_named(
    own_data, tmp_path, files, real_data, capsys
):
    """As UltraFeedback has them: messages of the better answer beside both sides."""
    turns = [
        [{"role": "user", "content": f"What does a {x} do?"}, {"role": "assistant", "content": y}]
        for x in ANIMALS
        for y in ("It runs.", "It sleeps.")
    ]
    rows = [
        {"prompt": a[0]["content"], "chosen": a, "rejected": b, "messages": a}
        for a, b in zip(turns[::2], turns[1::2])
    ]
    # The first row is faulty, and must not decide how the others are read.
    file = jsonl(tmp_path / "ultra.jsonl", [{"chosen": 3}, *rows])
    config = small(own_data, preferences=file, prompts=files["prompts"], plain_template=True)
    config = dataclasses.replace(config, max_prompt=64, max_response=64, on_bad_row="drop")
    tokenizer = own_files.open_tokenizer(real_data / "models" / "stories260K", True)
    with pytest.raises(
        ValueError,
        match=r"none of its 17 rows .*:2: the fields fit .*name one by --preferences-format",
    ):
        task.read(config, tokenizer)
    config = dataclasses.replace(config, preferences_format="preference")
    data = task.read(config, tokenizer)
    parts = (data.first, data.second, data.comparisons_eval)
    assert sum(len(part) for part in parts) == len(ANIMALS)
    with pytest.raises(
        ValueError, match="format='parquet' is not known; use one of text, prompt, "
    ):
        task.read(dataclasses.replace(config, preferences_format="parquet"), tokenizer)


QUESTIONS = [f"What does a {x} do?" for x in ANIMALS]
TEXTS = {
    "text": [{"prompt": q, "completion": "It runs."} for q in QUESTIONS],
    "alpaca": [{"instruction": q, "input": "", "output": "It runs."} for q in QUESTIONS],
    "ultrachat": [
        {
            "prompt": q,
            "messages": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": "It runs."},
            ],
        }
        for q in QUESTIONS
    ],
}
PAIRS = {
    "text": [{"prompt": q, "chosen": "It runs.", "rejected": "It is."} for q in QUESTIONS],
    "alpaca": [{"instruction": q, "output": ["It runs.", "It is."]} for q in QUESTIONS],
    "ultrafeedback": [
        {
            "prompt": q,
            "chosen": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": "It runs."},
            ],
            "rejected": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": "It is."},
            ],
        }
        for q in QUESTIONS
    ],
}


@pytest.mark.parametrize("told", [*TEXTS, None])
@pytest.mark.parametrize("ranked", PAIRS)
@pytest.mark.parametrize("asked", ["text", None])
def test_the_policy_is_asked_as_it_was_taught_and_scored_whatever_the_files(
    own_data, tmp_path, real_data, told, ranked, asked
):
    tokenizer = own_files.open_tokenizer(real_data / "tokenizers" / "minimind", False)
    config = small(own_data, preferences=jsonl(tmp_path / "pairs.jsonl", PAIRS[ranked]))
    config = dataclasses.replace(config, max_prompt=64)
    if told:
        told = jsonl(tmp_path / "texts.jsonl", TEXTS[told])
    if asked:
        asked = jsonl(tmp_path / "prompts.jsonl", [{"prompt": q} for q in QUESTIONS])
    config = dataclasses.replace(config, demonstrations=told or "", prompts=asked or "")
    data = task.read(config, tokenizer)
    prompts = {tuple(row.ids.tolist()) for part in data.prompts for row in part.rows}
    assert len(prompts) == len(ANIMALS)
    parts = [*(data.demonstrations or ()), data.first, data.second, data.comparisons_eval]
    documents = [document for part in parts for row in part.rows for document in row.documents]
    assert documents
    for ids, _ in documents:
        assert any(tuple(ids[: len(prompt)].tolist()) == prompt for prompt in prompts)
    if asked:  # PPO alone, with a scorer from elsewhere
        alone = dataclasses.replace(config, demonstrations="", preferences="")
        found = task.read(alone, tokenizer).prompts
        assert {tuple(row.ids.tolist()) for part in found for row in part.rows} == prompts


def test_raw_prompts_are_fed_as_they_stand_and_not_beside_messages(own_data, tmp_path, real_data):
    tokenizer = own_files.open_tokenizer(real_data / "tokenizers" / "minimind", False)
    pairs = jsonl(tmp_path / "pairs.jsonl", PAIRS["text"])
    config = small(own_data, preferences=pairs, raw_prompts=True)
    data = task.read(config, tokenizer)
    assert tokenizer.decode(data.prompts[0].rows[0].ids) in QUESTIONS
    chats = jsonl(tmp_path / "chats.jsonl", TEXTS["ultrachat"])
    config = dataclasses.replace(config, demonstrations=chats)
    with pytest.raises(ValueError, match="chats.jsonl: its rows are read as messages, which raw"):
        task.read(config, tokenizer)
    plain = own_files.open_tokenizer(real_data / "models" / "stories260K", False)
    with pytest.raises(ValueError, match="the tokenizer has no chat template; .* --plain-template"):
        task.read(config, plain)


def test_entries_of_a_dataset_info_and_pairs_of_languages_are_files_too(
    own_data, tmp_path, real_data
):
    tokenizer = own_files.open_tokenizer(real_data / "models" / "stories260K", False)
    rows = [{"en": q, "de": "Es läuft."} for q in QUESTIONS]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    config = small(own_data, demonstrations=file, demonstrations_format="en:de")
    config = dataclasses.replace(config, max_prompt=64, max_response=64)
    train, held_out = task.read(config, tokenizer).demonstrations
    assert len(train) + len(held_out) == len(ANIMALS)
    info = tmp_path / "dataset_info.json"
    columns = {"prompt": "en", "response": "de"}
    info.write_text(json.dumps({"mine": {"file_name": "pairs.jsonl", "columns": columns}}))
    config = dataclasses.replace(
        config, demonstrations=f"{info}:mine", demonstrations_format="", plain_template=True
    )
    tokenizer = own_files.open_tokenizer(real_data / "models" / "stories260K", True)
    train, held_out = task.read(config, tokenizer).demonstrations
    assert len(train) + len(held_out) == len(ANIMALS)
    wrong = dataclasses.replace(config, demonstrations=file)
    with pytest.raises(ValueError, match="pairs.jsonl:1: the row is a translation without a dir"):
        task.read(wrong, tokenizer)
    twice = dataclasses.replace(config, demonstrations_format="alpaca")
    with pytest.raises(ValueError, match="info.json:mine: the entry says its format; leave 'alp"):
        task.read(twice, tokenizer)


def test_texts_without_prompts_do_not_stand_beside_prompts_in_a_template(
    own_data, tmp_path, real_data
):
    tokenizer = own_files.open_tokenizer(real_data / "tokenizers" / "minimind", False)
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": q} for q in QUESTIONS])
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": q} for q in QUESTIONS])
    config = small(own_data, demonstrations=texts)
    assert len(task.read(config, tokenizer).demonstrations) == 2  # alone they may
    config = dataclasses.replace(config, prompts=prompts)
    with pytest.raises(
        ValueError, match="texts.jsonl: its texts have no prompts, .* --raw-prompts"
    ):
        task.read(config, tokenizer)
    data = task.read(dataclasses.replace(config, raw_prompts=True), tokenizer)
    assert tokenizer.decode(data.prompts[0].rows[0].ids) in QUESTIONS
    few = jsonl(tmp_path / "few.jsonl", [{"text": "one"}, {"text": "two"}])
    config = small(own_data, demonstrations=few)
    with pytest.raises(ValueError, match="few.jsonl: . rows to train on and . held out; give more"):
        task.read(dataclasses.replace(config, held_out=0.01), tokenizer)


@pytest.mark.slow
def test_more_iterations_replace_the_exported_policy(own_data, start, tmp_path, files, real_data):
    model = str(real_data / "models" / "stories260K")
    config = small(own_data, model=model, preferences=files["preferences"])
    start(config, tmp_path / "run")
    file = tmp_path / "run" / "export" / "policy" / "model.safetensors"
    before = file.read_bytes()
    longer = tiny.short(config.ppo, num_iterations=3)
    start(dataclasses.replace(config, ppo=longer), tmp_path / "run")
    assert file.read_bytes() != before
    assert not list(file.parents[1].glob(".*"))


# ------------------------------------------------------------------------------ a pretraining mix

STORIES = [{"text": f"Once upon a time there was a little {x}. It was happy."} for x in ANIMALS]


def test_text_is_mixed_into_ppo(own_data, start, tmp_path, files, real_data, capsys):
    config = small(
        own_data,
        model=str(real_data / "models" / "stories260K"),
        preferences=files["preferences"],
        pretraining=jsonl(tmp_path / "stories.jsonl", [*STORIES, {"text": "A word. " * 99}]),
    )
    start(config, tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    nats = [line["loss/pretraining"] for line in lines if line["stage"] == "ppo"]
    assert "pretraining: " in (printed := capsys.readouterr().out) and "1 text over" in printed
    # The model was trained on such stories: 1.5 nats per token, and 6.2 from nothing.
    assert len(nats) == 2 and all(0.5 < x < 3.0 for x in nats)


def test_the_coefficient_is_the_papers_or_the_one_given_and_without_text_there_is_none(own_data):
    plain = small(own_data)
    assert task.mixed(plain) == (plain.ppo, {})
    assert task.mixed(small(own_data, pretraining="a"))[0].pretraining_coef == 27.8
    given, functions = task.mixed(small(own_data, pretraining="a", pretraining_coef=0.5))
    assert given.pretraining_coef == 0.5 and functions.keys() == {"make_batch", "loss_fn"}


def test_text_keeps_its_form_where_prompts_go_through_a_template(own_data, tmp_path, real_data):
    tokenizer = own_files.open_tokenizer(real_data / "tokenizers" / "minimind", False)
    pairs = jsonl(tmp_path / "pairs.jsonl", PAIRS["text"])
    told = jsonl(tmp_path / "told.jsonl", TEXTS["text"])
    config = small(own_data, preferences=pairs, pretraining=jsonl(tmp_path / "s.jsonl", STORIES))
    config = dataclasses.replace(config, max_prompt=64)
    text = task.read(config, tokenizer).pretraining
    assert len(text) < len(STORIES)  # a share is held out of this file too
    assert tokenizer.decode(text.rows[0].documents[0].ids).startswith("Once upon a time")
    config = dataclasses.replace(config, pretraining=told)
    data = task.read(config, tokenizer)
    prompts = {tuple(row.ids.tolist()) for row in data.prompts.train.rows}
    for row in data.pretraining.rows:  # demonstrations begin as the policy is asked
        ids = row.documents[0].ids.tolist()
        assert any(tuple(ids[: len(prompt)]) == prompt for prompt in prompts)
    chats = jsonl(tmp_path / "chats.jsonl", TEXTS["ultrachat"])
    plain = own_files.open_tokenizer(real_data / "models" / "stories260K", False)
    with pytest.raises(ValueError, match="chats.jsonl: its rows are read as messages, but the"):
        task.read(dataclasses.replace(config, pretraining=chats), plain)


def test_a_weight_of_nothing_and_a_weight_without_text_are_refused(own_data):
    with pytest.raises(ValueError, match="pretraining_coef=0.0 must be above 0 or None"):
        small(own_data, pretraining="stories.jsonl", pretraining_coef=0.0)
    with pytest.raises(
        ValueError, match="pretraining_coef=2.0 is the weight of a text, but --pret"
    ):
        small(own_data, pretraining_coef=2.0)


def test_text_that_cannot_be_mixed_is_refused_in_one_line_before_anything_is_trained(
    own_data, start, tmp_path, files, real_data, capsys
):
    given = {"model": str(real_data / "models" / "stories260K")}
    stories = jsonl(tmp_path / "stories.jsonl", STORIES)
    long = jsonl(tmp_path / "long.jsonl", [{"text": f"{x} " * 99} for x in ANIMALS])
    ranked = given | {"preferences": files["preferences"]}
    told = given | {"demonstrations": files["demonstrations"]}
    for inputs, pretraining, lengths, message in (
        (ranked, str(tmp_path / "none.jsonl"), {}, "none.jsonl: no such file or folder"),
        (ranked, jsonl(tmp_path / "empty.jsonl", []), {}, "empty.jsonl"),
        (ranked, long, {}, "no usable row is left"),
        (ranked, stories, {"max_response": 500}, "need 524 positions, but the model has max_len"),
        (told, stories, {}, "is mixed into PPO, which is not run without a reward model; name"),
    ):
        config = small(own_data, pretraining=pretraining, **inputs)
        with pytest.raises(SystemExit) as stopped:
            start(dataclasses.replace(config, **lengths), tmp_path / "run")
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and message in error and "\n" not in error
        assert not (tmp_path / "run").exists()
