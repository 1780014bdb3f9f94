"""The user's own files, end to end at toy size: from a Hugging Face folder and back to one."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments import ONE_DEVICE, caches, experiment

from rlhf_jax import launch
from rlhf_jax.models import huggingface, transformer

__all__ = ["caches"]  # a fixture that applies itself
pytestmark = pytest.mark.usefixtures("compile_cache")
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
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return {name: str(path) for name, path in paths.items()}


def small(own_data, **changes):
    config = own_data.config
    return dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, num_steps=2, batch_size=4),
        reward_model=dataclasses.replace(config.reward_model, num_steps=2, batch_size=4),
        ppo=dataclasses.replace(
            config.ppo, num_iterations=2, batch_size=8, max_new_tokens=8, num_epochs=1
        ),
        max_prompt=24,
        max_response=24,
        held_out=0.25,
        best_of=2,
        judge_draws=2,
        **changes,
    )


def start(config, workdir):
    own_data = experiment("own_data")
    return launch.launch(own_data.run, config, ["--workdir", str(workdir), *ONE_DEVICE])


def logits(folder, tokens):
    model = huggingface.load(folder)
    hidden = transformer.hidden_states(model, *map(jnp.asarray, (tokens, np.ones_like(tokens))))
    return np.asarray(transformer.logits(model, hidden))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_pretrained_model_is_tuned_aligned_and_read_by_transformers(
    tmp_path, files, real_data, lora_rank
):
    torch = pytest.importorskip("torch")
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    own_data = experiment("own_data")
    model = str(real_data / "models" / "stories260K")
    summary = start(small(own_data, model=model, lora_rank=lora_rank, **files), tmp_path / "run")
    assert 0.0 <= summary["ppo"]["win_rate_low"] <= summary["ppo"]["win_rate"] <= 1.0
    assert summary["ppo"]["kl"] != 0.0 and "gold_after" not in summary["ppo"]
    export = tmp_path / "run" / "export"
    tokens = np.array([[1, 403, 407, 261, 378, 400]])
    policy = AutoModelForCausalLM.from_pretrained(export / "policy")
    with torch.no_grad():
        theirs = policy(torch.tensor(tokens)).logits.numpy()
        told = policy.generate(torch.tensor(tokens), max_new_tokens=8, do_sample=False)
        scorer = AutoModelForSequenceClassification.from_pretrained(export / "reward_model")
        assert scorer(torch.tensor(tokens)).logits.shape == (1, 1)
    np.testing.assert_allclose(logits(export / "policy", tokens), theirs, atol=1e-4)
    assert np.abs(theirs - logits(model, tokens)).max() > 1e-3  # trained, not copied
    assert len(AutoTokenizer.from_pretrained(export / "policy").decode(told[0])) > 10


def test_each_stage_starts_alone_from_what_an_earlier_one_exported(tmp_path, files, real_data):
    own_data = experiment("own_data")
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


def test_a_scorer_that_reads_other_tokens_is_refused(tmp_path, files, real_data, capsys):
    own_data = experiment("own_data")
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


def test_no_model_and_no_prompts_are_one_line(tmp_path, real_data, capsys):
    own_data = experiment("own_data")
    with pytest.raises(SystemExit):
        start(small(own_data), tmp_path / "run")
    assert "--model is missing" in capsys.readouterr().err


def test_folders_of_the_wrong_kind_are_refused_before_anything_is_trained(
    tmp_path, files, real_data, capsys
):
    own_data = experiment("own_data")
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
    tmp_path, files, real_data, capsys
):
    """As UltraFeedback has them: messages of the better answer beside both sides."""
    own_data = experiment("own_data")
    turns = [
        [{"role": "user", "content": f"What does a {x} do?"}, {"role": "assistant", "content": y}]
        for x in ANIMALS
        for y in ("It runs.", "It sleeps.")
    ]
    rows = [
        {"prompt": a[0]["content"], "chosen": a, "rejected": b, "messages": a}
        for a, b in zip(turns[::2], turns[1::2])
    ]
    file = tmp_path / "ultra.jsonl"
    # The first row is faulty, and must not decide how the others are read.
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"chosen": 3}, *rows]))
    config = small(own_data, preferences=str(file), prompts=files["prompts"], plain_template=True)
    config = dataclasses.replace(config, model=str(real_data / "models" / "stories260K"))
    config = dataclasses.replace(config, max_prompt=64, max_response=64, on_bad_row="drop")
    tokenizer = own_data.open_tokenizer(own_data.pathlib.Path(config.model), True)
    with pytest.raises(ValueError, match="no usable row is left .*32 faulty|faulty row"):
        own_data.read(config, tokenizer)
    config = dataclasses.replace(config, preferences_format="preference")
    data = own_data.read(config, tokenizer)
    parts = (data.first, data.second, data.comparisons_eval)
    assert sum(len(part) for part in parts) == len(ANIMALS)
    asked = tokenizer.decode(data.prompts[0].rows[0][0])
    assert "The little" in asked and asked.strip().endswith("assistant:")
    with pytest.raises(SystemExit):
        launch.launch(own_data.run, config, ["--preferences-format", "parquet"])
    assert "invalid choice" in capsys.readouterr().err.lower()


def test_more_iterations_replace_the_exported_policy(tmp_path, files, real_data):
    own_data = experiment("own_data")
    model = str(real_data / "models" / "stories260K")
    config = small(own_data, model=model, preferences=files["preferences"])
    start(config, tmp_path / "run")
    file = tmp_path / "run" / "export" / "policy" / "model.safetensors"
    before = file.read_bytes()
    longer = dataclasses.replace(config.ppo, num_iterations=3)
    start(dataclasses.replace(config, ppo=longer), tmp_path / "run")
    assert file.read_bytes() != before
    assert not list(file.parents[1].glob(".*"))
