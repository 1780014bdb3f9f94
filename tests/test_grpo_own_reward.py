"""GRPO with a reward in Python at toy size: from folder to folder, its plan, its bad inputs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax import launch
from rlhf_jax.data import tokenizers
from rlhf_jax.data.schema import Example
from rlhf_jax.models import huggingface
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import own_files

pytestmark = pytest.mark.usefixtures("caches")
ONE_DEVICE = ["--mesh", "data=1,fsdp=1,tensor=1"]
ANIMALS = "cat dog bird fish frog bear duck goat lion wolf deer mole crab swan hare seal".split()


@pytest.fixture
def program(experiment):
    return experiment("grpo_own_reward")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Once, a big {x}"}) + "\n" for x in ANIMALS))
    return str(path)


def small(program, **changes):
    config = program.config
    settings = tiny.short(
        config.grpo,
        num_iterations=2,
        batch_size=4,
        samples_per_prompt=4,
        sampling=Sampling(max_new_tokens=8),
        policy_optimizer=tiny.ADAM,
    )
    return dataclasses.replace(
        config, grpo=settings, max_prompt=24, max_response=8, held_out=0.25, best_of=2, **changes
    )


def start(program, config, workdir):
    return launch.launch(program.run, config, ["--workdir", str(workdir), *ONE_DEVICE])


def test_the_reward_by_hand(program):
    responses = ["I smiled. We laughed.", "He was sad.", "a b c a b c a b c"]
    happy, sad, repeated = program.reward(["", "", ""], responses, [Example("")] * 3).scores
    assert happy == 1.0 and sad == 0.0
    assert 0.0 <= repeated < 0.5  # no word of sentiment, and half the share of repeated n-grams off


def test_a_pretrained_model_is_tuned_measured_and_exported(
    program, tmp_path, prompts, real_data, called_programs, monkeypatch
):
    model = str(real_data / "models" / "stories260K")
    # A plan cannot read the tokenizer; the ids that end a text are constants of its programs.
    monkeypatch.setattr(own_files, "ENDS", tokenizers.from_folder(model).ends)
    config = small(program, model=model, prompts=prompts)
    summary = start(program, config, tmp_path / "run")
    assert {"score_before", "score_after", "kl"} <= summary["grpo"].keys()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = next(row for row in map(json.loads, lines) if "loss" in row)
    assert {"reward/words", "reward/repetition", "groups/informative"} <= first.keys()

    # What `--plan` compiles is what was run.
    planned = called_programs.of(program.programs(config, tiny.context(tiny.mesh())))
    assert planned <= set(called_programs.called)

    tuned, base = (huggingface.load(x) for x in (tmp_path / "run" / "export", model))
    pairs = zip(jax.tree.leaves(tuned.weights), jax.tree.leaves(base.weights))
    assert max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs) > 1e-4
    assert start(program, config, tmp_path / "run") == summary


def test_what_is_missing_or_unusable_is_one_line(program, tmp_path, prompts, real_data, capsys):
    model = str(real_data / "models" / "stories260K")
    for fields, message in (
        ({"prompts": prompts}, "name a language model by --model, and a file of prompts"),
        ({"model": model}, "name a language model by --model, and a file of prompts"),
    ):
        with pytest.raises(SystemExit) as stopped:
            start(program, small(program, **fields), tmp_path / "run")
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and message in error and "\n" not in error
        assert not (tmp_path / "run").exists()
