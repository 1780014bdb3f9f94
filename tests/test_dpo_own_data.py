"""DPO on the user's preferences at toy size: from folder to folder, its plan, its bad inputs."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import launch
from rlhf_jax.data import tokenizers
from rlhf_jax.models import huggingface, lora, transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import own_files

pytestmark = pytest.mark.usefixtures("caches")
ONE_DEVICE = ["--mesh", "data=1,fsdp=1,tensor=1"]
ANIMALS = "cat dog bird fish frog bear duck goat lion wolf deer mole crab swan hare seal".split()


@pytest.fixture
def program(experiment):
    return experiment("dpo_own_data")


@pytest.fixture
def preferences(tmp_path):
    rows = [
        {"prompt": f"Once, a big {x}", "chosen": " was happy.", "rejected": f" was sad {x}"}
        for x in ANIMALS
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(program, **changes):
    config = program.config
    return dataclasses.replace(
        config,
        dpo=tiny.short(config.dpo, num_steps=3, batch_size=4, optimizer=tiny.ADAM),
        sampling=Sampling(max_new_tokens=8),
        max_prompt=24,
        max_response=24,
        held_out=0.25,
        **changes,
    )


def start(program, config, workdir):
    return launch.launch(program.run, config, ["--workdir", str(workdir), *ONE_DEVICE])


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_pretrained_model_is_tuned_measured_and_exported(
    program, tmp_path, preferences, real_data, called_programs, monkeypatch, lora_rank
):
    model = str(real_data / "models" / "stories260K")
    config = small(program, model=model, preferences=preferences, lora_rank=lora_rank)
    summary = start(program, config, tmp_path / "run")
    found = summary["dpo"]
    assert found["eval_accuracy_low"] <= found["eval_accuracy"] <= found["eval_accuracy_high"]
    assert found["eval_loss"] < np.log(2) and found["eval_pairs"] > 0
    assert {"likelihood_before", "likelihood_after", "length_before", "kl"} <= found.keys()
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all({"prompt", "before", "after"} <= row.keys() for row in rows) and rows

    # What `--plan` compiles is what was run, but for the ids of the tokenizer.
    monkeypatch.setattr(own_files, "ENDS", tokenizers.from_folder(model).ends)
    mesh = tiny.mesh()
    planned = called_programs.of(program.programs(config, tiny.context(mesh)))
    assert planned == set(called_programs.called)

    # The folder holds a whole model, the adapter merged, that differs from the one it came from.
    tuned, base = (huggingface.load(x) for x in (tmp_path / "run" / "export", model))
    assert not lora.has_adapter(tuned)
    tokens = jnp.array([[1, 403, 407, 261, 378, 400]])

    def logits(model):
        hidden = transformer.hidden_states(model, tokens, jnp.ones_like(tokens))
        return np.asarray(transformer.logits(model, hidden))

    assert np.abs(logits(tuned) - logits(base)).max() > 1e-3
    # A finished run is not run again, and other settings in its folder are refused.
    assert start(program, config, tmp_path / "run") == summary
    with pytest.raises(SystemExit) as stopped:
        start(program, dataclasses.replace(config, seed=1), tmp_path / "run")
    assert stopped.value.code == 2


def test_what_is_missing_or_unusable_is_one_line(program, tmp_path, preferences, real_data, capsys):
    model = str(real_data / "models" / "stories260K")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in ANIMALS))
    for fields, message in (
        ({"preferences": preferences}, "--model is missing: name a language model and a file of"),
        ({"model": model}, "--preferences is missing: name a language model and a file of comp"),
        ({"model": model, "preferences": str(prompts)}, "prompts.jsonl:"),
    ):
        with pytest.raises(SystemExit) as stopped:
            start(program, small(program, **fields), tmp_path / "run")
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and message in error and "\n" not in error
        assert not (tmp_path / "run").exists()
