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

import contextlib
import pathlib
import sys
from typing import Literal, NamedTuple

import jax
import numpy as np

from rlhf_jax import pipeline
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data import batches, builders, formats, mixing, tokenizers
from rlhf_jax.data.batches import Examples
from rlhf_jax.data.schema import BadRow
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import huggingface, lora
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import agreement, learned
from rlhf_jax.training.state import OptimizerConfig

sys.path.append(str(pathlib.Path(__file__).parent))
import preferences

# "" recognises each row by its fields.
Format = Literal["", *formats.FORMATS]


class Config(pipeline.AlignmentConfig):
    """Files and folders as above; lengths in tokens; `held_out` is a share of the prompts.

    ..._format: for rows whose fields fit several formats, or none but the one that is named.

    lora_rank: 0 trains all weights. plain_template: for a tokenizer without a chat template.
    judge_draws: answers a prompt that the judge compares.
    """

    model: str = ""
    demonstrations: str = ""
    demonstrations_format: Format = ""
    preferences: str = ""
    preferences_format: Format = ""
    prompts: str = ""
    prompts_format: Format = ""
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


def open_tokenizer(folder: pathlib.Path, plain_template: bool) -> tokenizers.Tokenizer:
    """The folder's tokenizer, with the plain chat template where one is asked for."""
    tokenizer = tokenizers.from_folder(folder)
    return tokenizer.with_template(tokenizers.PLAIN_TEMPLATE) if plain_template else tokenizer


def open_scorer(config: Config, context: Context, tokenizer: tokenizers.Tokenizer) -> Model:
    """The reward model of a folder. Raises ValueError unless it reads what the policy writes."""
    folder = huggingface.fetch(config.scorer)
    tokenizers.check_same(tokenizer, open_tokenizer(folder, config.plain_template))
    scorer = huggingface.load(folder, context.mesh)
    if "score" not in scorer.weights:
        raise ValueError(f"{config.scorer}: a language model, where a reward model is needed")
    tokenizers.check_vocab(tokenizer, scorer.config.vocab_size)
    return scorer


class Data(NamedTuple):
    """The user's files, tokenised; None where there is none. (training part, held-out part) each.

    first, second: halves of the comparisons to train on, without a prompt in common.
    """

    demonstrations: tuple[Examples, Examples] | None
    first: Examples | None
    second: Examples | None
    comparisons_eval: Examples | None
    prompts: tuple[Examples, Examples] | None


class File(NamedTuple):
    """Rows with where they stand, split by prompt, and how they are to be read."""

    rows: list
    held_out: list
    options: dict

    def examples(self, read, *arguments) -> tuple[Examples, Examples]:
        """Both parts, tokenised."""
        return tuple(read(part, *arguments, **self.options) for part in (self.rows, self.held_out))

    def has_chats(self) -> bool:
        """Whether some prompt is made of messages."""
        for row, where in self.rows:
            with contextlib.suppress(BadRow):
                if not isinstance(formats.prompt(row, where, self.options["format"]).prompt, str):
                    return True
        return False


def open_file(config: Config, path: str, format: str) -> File | None:
    """None without a path. Raises ValueError for a file of which one part would be empty."""
    if not path:
        return None
    options = {"format": format or None, "on_bad_row": config.on_bad_row}
    found = builders.load(path, on_bad_row=config.on_bad_row)
    rows, held_out = mixing.split(found, config.held_out, format=options["format"])
    if not rows or not held_out:
        raise ValueError(
            f"{path}: {len(rows)} rows to train on and {len(held_out)} held out; give more "
            f"rows or another held_out than {config.held_out}"
        )
    return File(rows, held_out, options)


def read(config: Config, tokenizer: tokenizers.Tokenizer) -> Data:
    """Reads all files before anything is trained. Raises ValueError for what no stage can use."""
    sizes = (tokenizer, config.max_prompt, config.max_response)
    told = open_file(config, config.demonstrations, config.demonstrations_format)
    ranked = open_file(config, config.preferences, config.preferences_format)
    asked = open_file(config, config.prompts, config.prompts_format) or ranked
    found = dict.fromkeys(Data._fields)
    if told:
        found["demonstrations"] = told.examples(batches.demonstrations, *sizes)
    if ranked:
        halves = mixing.split(ranked.rows, 0.5, seed=1, format=ranked.options["format"])
        parts = (*halves, ranked.held_out)
        names = ("first", "second", "comparisons_eval")
        for name, part in zip(names, parts):
            found[name] = batches.comparisons(part, *sizes, **ranked.options)
    if asked:
        # Plain prompts are asked as the other files ask: through the template where they are chats.
        if any(file.has_chats() for file in (told, ranked) if file):
            template = formats.as_messages(asked.options["format"])
            asked = asked._replace(options=asked.options | {"format": template})
        found["prompts"] = asked.examples(batches.prompts, tokenizer, config.max_prompt)
    return Data(**found)


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
    if config.judge_draws < 1:
        raise ValueError(f"judge_draws={config.judge_draws} must be at least 1")
    base = huggingface.fetch(config.model)
    tokenizer = open_tokenizer(base, config.plain_template)
    policy = preferences.language_model(base, tokenizer, context)
    pipeline.check(config, context.mesh, policy.config, config.max_prompt)
    scorer = open_scorer(config, context, tokenizer) if config.scorer else None
    data, clock, summary = read(config, tokenizer), pipeline.Clock(), {}
    if scorer is not None and data.prompts is None:
        raise ValueError("--prompts is missing: PPO needs prompts, and no preferences have any")
    if config.lora_rank:
        adapter = lora.Config(rank=config.lora_rank)
        policy = lora.attach(policy, adapter, jax.random.key(config.seed))

    def export(name: str, model: Model) -> None:
        (context.workdir / "export").mkdir(exist_ok=True)
        preferences.export(context.workdir / "export" / name, model, tokenizer, base)

    if data.demonstrations:
        with clock("sft"):
            policy, summary["sft"] = pipeline.fine_tune(
                config, context, policy, tokenizer, *data.demonstrations
            )
            export("sft", policy)
    if data.first is None and scorer is None:
        return summary | {"seconds": clock.seconds}
    task = pipeline.Task(tokenizer, data.first, data.comparisons_eval, data.first, *data.prompts)
    judge = None
    if scorer is None:
        with clock("reward_model"):
            scorer, summary["reward_model"] = pipeline.train_scorer(config, context, task, policy)
            export("reward_model", scorer)
    if data.second is not None:
        with clock("judge"):
            other = task._replace(comparisons=data.second, centre_on=data.second)
            judge, summary["judge"] = pipeline.train_scorer(config, context, other, policy, "judge")
    with clock("ppo"):
        tuned = pipeline.optimise(config, context, task, policy, scorer).policy
        export("policy", tuned)
    with clock("evaluation"):
        compared = pipeline.compare(config, context, task, policy, tuned, scorer)
        summary["ppo"] = pipeline.summarise(config, compared)
        if judge is not None:
            summary["ppo"] |= judged(config, context, task, judge, policy, tuned)
    return summary | {"seconds": clock.seconds}


if __name__ == "__main__":
    launch(run, config)
