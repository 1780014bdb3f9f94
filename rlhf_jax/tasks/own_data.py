"""SFT, a reward model and PPO on the user's files, from and to Hugging Face folders.

What `experiments/own_data.py` says of the stages and their inputs holds for every experiment that
is made of this `Config`, `run` and `programs`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rlhf_jax import abstract, evaluation, folders, pipeline
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import ppo, ppo_variants, reward_model, sft
from rlhf_jax.config import Draws, Positive, Source, fold_seed
from rlhf_jax.data import batches, formats, mixing, tokenizers
from rlhf_jax.data.batches import Examples, Loader
from rlhf_jax.evaluation import Exam
from rlhf_jax.launch import Context
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import agreement, learned
from rlhf_jax.sampling.rollout import Score
from rlhf_jax.tasks import own_files


class PpoConfig(ppo_variants.PretrainingConfig):
    """PPO, and how much the text of `pretraining` counts in its loss."""

    # Weight of the text's cross entropy, nats per token. None: that of `PretrainingConfig` where
    # there is text.
    pretraining_coef: Positive | None = None


class Config(own_files.Common):
    """What is trained on what."""

    demonstrations: Source = ""  # file of responses to imitate
    demonstrations_format: str = ""  # as preferences_format
    prompts: Source = ""  # file of prompts for PPO; if not given, those of the preferences
    prompts_format: str = ""  # as preferences_format
    scorer: Source = ""  # folder or org/name of a reward model, which is then not trained
    # File of texts or demonstrations whose cross entropy PPO lowers too (PPO-ptx). Their lengths
    # are limited as those of demonstrations are.
    pretraining: Source = ""
    pretraining_format: str = ""  # as preferences_format
    judge_draws: Draws = 4  # answers to each held-out prompt that the judge compares
    sft: sft.Config
    reward_model: reward_model.Config
    ppo: PpoConfig
    best_of: Draws = 4  # answers to each held-out prompt: the n of best-of-n

    def check(self) -> None:
        """Raises ValueError for a weight of text that there is not, or a format without a file."""
        super().check()
        if self.ppo.pretraining_coef is not None and not self.pretraining:
            raise ValueError(
                f"ppo.pretraining_coef={self.ppo.pretraining_coef} is the weight of a text, but "
                "--pretraining names none; name a file or leave the coefficient out"
            )


def open_scorer(
    config: Config, context: Context, tokenizer: tokenizers.Tokenizer
) -> tuple[Model, Score]:
    """The reward model of a folder, and how it is read: at the token where transformers reads it.

    Raises ValueError unless it reads what the policy writes.
    """
    folder = huggingface.fetch(config.scorer)
    own = own_files.open_tokenizer(folder, config.plain_template)
    tokenizers.check_same(tokenizer, own)
    scorer = folders.reward_model(
        folder, tokenizer, context.mesh, own_files.compute_of(config, context)
    )
    if own.chat_template is None or config.raw_prompts:
        return scorer, learned.score
    score = learned.under_template(own, tokenizer.eos_ids)
    more = len(score.after) if isinstance(score, learned.Continued) else 0
    transformer.check_length(scorer.config, _longest(config) + more)
    return scorer, score


class Data(NamedTuple):
    """The user's files, tokenised; None where one is not given.

    first, second: halves of the comparisons to train on, with no prompt in common.
    """

    demonstrations: pipeline.Split | None
    first: Examples | None
    second: Examples | None
    comparisons_eval: Examples | None
    prompts: pipeline.Split | None
    pretraining: Examples | None  # without the held-out ones, whose prompts may be asked later


def read(config: Config, tokenizer: tokenizers.Tokenizer) -> Data:
    """Reads all files before anything is trained. Raises ValueError for unusable files.

    All prompts are formatted alike (`own_files.tokenised`), whichever files are given, so that SFT,
    the reward model and PPO see the same format.
    """
    demonstrations = own_files.open_file(config, "demonstrations", formats.demonstration)
    preferences = own_files.open_file(config, "preferences", formats.comparison)
    prompts = own_files.open_file(config, "prompts", formats.prompt) or preferences
    text = own_files.open_file(config, "pretraining", formats.demonstration)
    others = [file for file in (preferences, prompts) if file]
    own_files.check_prompts(config, tokenizer.chat_template is not None, demonstrations, others)
    # Text without prompts may stand beside prompts in a template: it keeps what was known before.
    own_files.check_prompts(config, tokenizer.chat_template is not None, text, [])
    examples = functools.partial(own_files.tokenised, config, tokenizer)
    sizes = (config.max_prompt, config.max_response)
    found = dict.fromkeys(Data._fields)
    if demonstrations:
        parts = (demonstrations.rows, demonstrations.held_out)
        found["demonstrations"] = pipeline.Split(
            *(examples(batches.demonstrations, demonstrations, part, *sizes) for part in parts)
        )
    if preferences:
        halves = mixing.split(preferences.rows, 0.5, seed=1, format=preferences.format)
        parts = {"first": halves[0], "second": halves[1], "comparisons_eval": preferences.held_out}
        for name, part in parts.items():
            found[name] = examples(batches.comparisons, preferences, part, *sizes)
    if prompts:
        found["prompts"] = pipeline.Split(
            *(
                examples(batches.prompts, prompts, part, config.max_prompt, parse=formats.prompt)
                for part in (prompts.rows, prompts.held_out)
            )
        )
    if text:
        found["pretraining"] = examples(batches.demonstrations, text, text.rows, *sizes)
    return Data(**found)


def train_scorer(
    config: Config, context: Context, tokenizer, policy: Model, data: pipeline.Split, stage: str
) -> tuple[Model, dict]:
    """A reward model from the policy, centred on its own data: (scorer, held-out figures)."""
    scorer, figures = pipeline.supervised(
        reward_model.run,
        reward_model.evaluate,
        config.reward_model,
        context,
        tokenizer,
        policy,
        data,
        stage=stage,
        seed=config.seed,
    )
    own = Loader(data.train, config.reward_model.batch_size, config.seed)
    return reward_model.centre(scorer, own, mesh=context.mesh), figures


def mixed(config: Config) -> tuple[ppo.Config, dict[str, Callable]]:
    """PPO's settings, and its functions where they are not its own: those of a pretraining mix."""
    if not config.pretraining:
        return config.ppo, {}
    coef = config.ppo.pretraining_coef or ppo_variants.PretrainingConfig.pretraining_coef
    settings = dataclasses.replace(config.ppo, pretraining_coef=coef)
    return settings, {"make_batch": ppo_variants.mixed_batch, "loss_fn": ppo_variants.mixed_loss}


def reinforce(
    config: Config,
    context: Context,
    task: pipeline.Task,
    policy: Model,
    scorer: Model,
    score: Score,
    text: Examples | None,
) -> Model:
    """The policy after PPO against the scorer's `score`; the scorer also starts the critic.

    Of `text` each iteration takes one row for each response.
    """
    settings, options = mixed(config)
    if text is not None:
        context.log.print(f"pretraining: {batches.describe(text.counts)}")
        context.log.print(batches.show(text[0], task.tokenizer))
        seed = fold_seed(config.seed, "pretraining")
        options["pretraining"] = Loader(text, settings.num_responses, seed)
    result = pipeline.online(
        ppo.run,
        settings,
        context,
        task,
        policy,
        scorer,
        stage="ppo",
        seed=config.seed,
        critic=scorer,
        score=score,
        **options,
    )
    return result.policy


def win_rate(config: Config, exam: Exam, before: Model, after: Model) -> dict:
    """How often answers of `after` win over those of `before`, by the exam's reward."""

    def scores(policy: Model) -> np.ndarray:
        numbers = range(config.judge_draws)
        return np.stack([evaluation.answer(exam, policy, i).scores for i in numbers], axis=1)

    return agreement.win_rate(scores(before), scores(after))


def compare(
    config: Config, context: Context, exam: Exam, before: Model, after: Model, judge: Model | None
) -> dict:
    """Answers the exam before and after PPO: the figures, with the win rate if there is a judge."""
    compared = evaluation.compare(exam, before, after, config.best_of)
    evaluation.show(context.log, compared, config.num_shown)
    judged = exam._replace(scorer=judge, score=learned.score)
    won = {} if judge is None else win_rate(config, judged, before, after)
    return evaluation.summarise(compared) | won


def check_sizes(config: Config, context: Context, policy: Model) -> None:
    """Raises ValueError for sizes that a later stage could not work with."""
    pipeline.check(context, policy.config, _longest(config), **_stages(config))


def _longest(config: Config) -> int:
    text = config.max_response if config.pretraining else 0
    return config.max_prompt + max(config.ppo.sampling.max_new_tokens, text)


def _stages(config: Config) -> dict:
    return {"sft": config.sft, "reward_model": config.reward_model, "ppo": config.ppo}


def check_inputs(config: Config) -> None:
    """Raises ValueError for inputs that make no run, or that no stage would read."""
    if not config.model:
        raise ValueError("--model is missing: name the folder of a language model")
    if not (config.demonstrations or config.preferences or config.scorer):
        raise ValueError("nothing to do: name --demonstrations, --preferences or --scorer")
    if config.pretraining and not (config.preferences or config.scorer):
        raise ValueError(
            f"--pretraining {config.pretraining} is mixed into PPO, which is not run without a "
            "reward model; name --preferences or --scorer too, or leave it out"
        )


def run(config: Config, context: Context) -> dict:
    """The stages whose inputs are given; returns the summary."""
    check_inputs(config)
    base = huggingface.fetch(config.model)
    tokenizer = own_files.open_tokenizer(base, config.plain_template)
    compute = own_files.compute_of(config, context)
    policy = folders.language_model(base, tokenizer, context.mesh, compute)
    check_sizes(config, context, policy)
    scorer, score = None, learned.score
    if config.scorer:
        scorer, score = open_scorer(config, context, tokenizer)
    data, seed, clock, summary = read(config, tokenizer), config.seed, pipeline.Clock(), {}
    if scorer is not None and data.prompts is None:
        raise ValueError("--prompts is missing: PPO needs prompts, and no preferences have any")
    policy, judge = own_files.adapted(config, policy), None

    def export(name: str, model: Model) -> None:
        folders.export(context.workdir / "export" / name, model, tokenizer, base)

    if data.demonstrations:
        with clock("sft"):
            policy, summary["sft"] = pipeline.supervised(
                sft.run,
                sft.evaluate,
                config.sft,
                context,
                tokenizer,
                policy,
                data.demonstrations,
                stage="sft",
                seed=seed,
            )
            export("sft", policy)
    if data.first is None and scorer is None:
        return summary | {"seconds": clock.seconds}

    def ranked(stage: str, train: Examples) -> Model:
        halves = pipeline.Split(train, data.comparisons_eval)
        with clock(stage):
            trained, summary[stage] = train_scorer(
                config, context, tokenizer, policy, halves, stage
            )
        return trained

    if scorer is None:
        scorer = ranked("reward_model", data.first)
        export("reward_model", scorer)
    if data.second is not None:
        judge = ranked("judge", data.second)
    task = pipeline.Task(tokenizer, data.prompts)
    with clock("ppo"):
        tuned = reinforce(config, context, task, policy, scorer, score, data.pretraining)
        export("policy", tuned)
    with clock("evaluation"):
        exam = pipeline.exam(
            context, task, policy, scorer, config.ppo.sampling, config.ppo.batch_size, seed=seed
        )._replace(score=score)
        summary["ppo"] = compare(config, context, exam, policy, tuned, judge)
    return summary | {"seconds": clock.seconds}


def programs(config: Config, context: Context) -> list[Program]:
    """What `run` runs where all files are given, of pairs of responses: see `abstract`.

    Text is mixed in where it is named. Of a named model only the config.json is read.
    """
    mesh, shape = context.mesh, config.shape
    if config.model:
        shape = huggingface.shape(huggingface.fetch(config.model))
    shape = own_files.compute_of(config, context).of(shape)
    pipeline.check_sizes(mesh, shape, _longest(config), **_stages(config))
    length = config.max_prompt + config.max_response
    initial = abstract.derived(own_files.adapted, mesh, config, abstract.model(shape, mesh))
    tuned = sft.programs(config.sft, initial, length, mesh)
    ranked = (config.reward_model, tuned.result, length, mesh)
    first = reward_model.programs(*ranked)
    judge = reward_model.programs(*ranked, name="judge", resident=first.result)
    policy, scorer = rated = (tuned.result, first.result)
    settings, functions = mixed(config)
    rows = settings.num_responses
    aligned = ppo.programs(
        settings,
        policy=policy,
        scorer=scorer,
        critic=scorer,
        max_prompt=config.max_prompt,
        ends=own_files.ENDS,
        mesh=mesh,
        pretraining=abstract.demonstrations(mesh, rows, length) if config.pretraining else None,
        resident=judge.result,
        **functions,
    )
    batch = abstract.prompts(mesh, config.ppo.batch_size, config.max_prompt)
    held = (judge.result, aligned.held if config.ppo.eval_every else rated)
    answers = evaluation.program(
        aligned.result, *rated, config.ppo.sampling, batch, own_files.ENDS, mesh, resident=held
    )
    return [*tuned.programs, *first.programs, *judge.programs, *aligned.programs, answers]
