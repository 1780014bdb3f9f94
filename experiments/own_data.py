"""SFT, reward model and PPO on your own files, from and to Hugging Face folders.

    python experiments/own_data.py --model DIR --demonstrations F --preferences F --prompts F

DIR holds a language model and its tokenizer (org/name is fetched from the Hugging Face hub); the
files are in any layout that `rlhf_jax.data` recognises (alpaca, sharegpt, TRL, HH-RLHF, ...). The
workdir's `export/` then holds `sft`, `reward_model` and `policy`, folders that transformers reads.
What is not given is skipped: without --demonstrations the model is taken as tuned already, with
--scorer DIR no reward model is trained, without both --preferences and --scorer the run ends after
SFT; so each stage starts alone from a folder that an earlier one exported. Without --prompts those
of the preferences are used.

Nobody knows a gold score here. A share of all prompts is held out of every file, and on these the
tuned policy is compared with the one that SFT left, by a judge that PPO never saw: a second reward
model, trained on the other half of the comparisons. It shares the first one's data source, so it
can share its mistakes: read the table of samples too.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import numpy as np

from rlhf_jax import pipeline
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data import batches, builders, mixing, tokenizers
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import huggingface, lora, transformer
from rlhf_jax.rewards import agreement, learned
from rlhf_jax.training.state import OptimizerConfig


class Config(pipeline.AlignmentConfig):
    """Files and folders as above; lengths in tokens; `held_out` is a share of the prompts.

    lora_rank: 0 trains all weights. plain_template: for a tokenizer without a chat template.
    judge_draws: answers a prompt that the judge compares.
    """

    model: str = ""
    demonstrations: str = ""
    preferences: str = ""
    prompts: str = ""
    scorer: str = ""
    held_out: float = 0.1
    max_prompt: int = 128
    max_response: int = 128
    plain_template: bool = False
    on_bad_row: Literal["error", "drop"] = "error"
    lora_rank: int = 0
    judge_draws: int = 4
    sft: sft.Config = sft.Config()


config = Config(
    sft=sft.Config(num_steps=200, batch_size=16, optimizer=OptimizerConfig(learning_rate=5e-4)),
    reward_model=reward_model.Config(
        num_steps=120, batch_size=16, optimizer=OptimizerConfig(learning_rate=2e-4)
    ),
    ppo=ppo.Config(
        num_iterations=20,
        batch_size=32,
        max_new_tokens=128,
        policy_optimizer=OptimizerConfig(learning_rate=1e-4, final_scale=0.1),
        critic_optimizer=OptimizerConfig(learning_rate=3e-4, final_scale=0.1),
        kl_coef=0.1,
        missing_eos_penalty=1.0,
    ),
    best_of=4,
)


def open_tokenizer(folder: str, plain_template: bool) -> tokenizers.Tokenizer:
    """The folder's tokenizer, with the plain chat template where one is asked for."""
    tokenizer = tokenizers.from_folder(folder)
    return tokenizer.with_template(tokenizers.PLAIN_TEMPLATE) if plain_template else tokenizer


def open_scorer(config: Config, context: Context, tokenizer: tokenizers.Tokenizer):
    """The reward model of a folder. Raises ValueError unless it reads what the policy writes."""
    theirs = open_tokenizer(config.scorer, config.plain_template)
    tokenizers.check_same(tokenizer, theirs)
    return huggingface.load(config.scorer, context.mesh)


class Files:
    """The user's rows, train and held out, read once; no prompt is on both sides of any file."""

    def __init__(self, config: Config, tokenizer: tokenizers.Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def split(self, name: str) -> tuple[list, list]:
        """(training rows, held-out rows) of a file, and an error where nothing is held out."""
        path = getattr(self.config, name)
        rows = builders.load(path, on_bad_row=self.config.on_bad_row)
        rows, held_out = mixing.split(rows, self.config.held_out)
        if not rows or not held_out:
            raise ValueError(
                f"{path}: {len(rows)} rows to train on and {len(held_out)} held out; give more "
                f"rows or another held_out than {self.config.held_out}"
            )
        return rows, held_out

    def demonstrations(self, rows: list) -> batches.Examples:
        c = self.config
        sizes = (self.tokenizer, c.max_prompt, c.max_response)
        return batches.demonstrations(rows, *sizes, on_bad_row=c.on_bad_row)

    def comparisons(self, rows: list) -> batches.Examples:
        c = self.config
        sizes = (self.tokenizer, c.max_prompt, c.max_response)
        return batches.comparisons(rows, *sizes, on_bad_row=c.on_bad_row)

    def prompts(self, rows: list) -> batches.Examples:
        c = self.config
        return batches.prompts(rows, self.tokenizer, c.max_prompt, on_bad_row=c.on_bad_row)


def export(config: Config, context: Context, name: str, model, tokenizer) -> None:
    """Writes workdir/export/name, unless an earlier process of this run has."""
    folder = context.workdir / "export" / name
    if folder.exists():
        return
    model = lora.merge(model)
    head = "score" if name == "reward_model" else "lm"
    if head == "score":
        model = transformer.without_score_bias(model)
    ids = {"eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id}
    huggingface.save(folder, model, like=config.model, head=head, fields=ids)
    tokenizer.save(folder)


def judged(config: Config, context: Context, task: pipeline.Task, judge, before, after) -> dict:
    """Win rate of `after` over `before` on the held-out prompts by the judge, with its interval."""
    respond = pipeline.responder(
        config, context, task.tokenizer, task.prompts_eval, before, learned.score, judge
    )

    def scores(policy):
        draws = range(config.judge_draws)
        return np.stack([respond(policy, i).scores for i in draws], axis=1)

    return agreement.win_rate(scores(before), scores(after))


def run(config: Config, context: Context) -> dict:
    """The stages whose inputs are given; returns the summary."""
    if not config.model:
        raise ValueError("--model is missing: name the folder of a language model")
    config = dataclasses.replace(config, model=str(huggingface.fetch(config.model)))
    tokenizer = open_tokenizer(config.model, config.plain_template)
    policy = huggingface.load(config.model, context.mesh)
    pipeline.check(config, context.mesh, policy.config, config.max_prompt)
    files, clock, summary = Files(config, tokenizer), pipeline.Clock(), {}
    if config.lora_rank:
        adapter = lora.Config(rank=config.lora_rank)
        policy = lora.attach(policy, adapter, jax.random.key(config.seed))
    if config.demonstrations:
        with clock("sft"):
            examples = [files.demonstrations(rows) for rows in files.split("demonstrations")]
            policy, summary["sft"] = pipeline.fine_tune(
                config, context, policy, tokenizer, *examples
            )
            export(config, context, "sft", policy, tokenizer)
    if not config.preferences and not config.scorer:
        return summary | {"seconds": clock.seconds}

    judge = None
    scorer = open_scorer(config, context, tokenizer) if config.scorer else None
    source = "prompts" if config.prompts else "preferences"
    if not config.prompts and not config.preferences:
        raise ValueError("--prompts is missing: PPO needs prompts, and no preferences have any")
    task = pipeline.Task(tokenizer, None, None, None, *map(files.prompts, files.split(source)))
    if config.preferences:
        rows, held_out = files.split("preferences")
        halves = mixing.split(rows, 0.5, seed=1)
        first, second, eval_ = map(files.comparisons, (*halves, held_out))
        task = task._replace(comparisons_eval=eval_)
        for name, half in (("reward_model", first), ("judge", second)):
            if name == "reward_model" and scorer is not None:
                continue
            with clock(name):
                part = task._replace(comparisons=half, centre_on=half)
                trained, summary[name] = pipeline.train_scorer(config, context, part, policy, name)
            if name == "judge":
                judge = trained
            else:
                scorer = trained
                export(config, context, name, scorer, tokenizer)
    with clock("ppo"):
        tuned = pipeline.optimise(config, context, task, policy, scorer).policy
        export(config, context, "policy", tuned, tokenizer)
    with clock("evaluation"):
        compared = pipeline.compare(config, context, task, policy, tuned, scorer)
        summary["ppo"] = pipeline.summarise(config, compared)
        if judge is not None:
            summary["ppo"] |= judged(config, context, task, judge, policy, tuned)
    return summary | {"seconds": clock.seconds}


if __name__ == "__main__":
    launch(run, config)
