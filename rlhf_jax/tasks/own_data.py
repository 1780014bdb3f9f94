"""SFT, a reward model and PPO on the user's files, from and to Hugging Face folders.

What `experiments/own_data.py` says of the stages and their inputs holds for every experiment that
is made of this `Config`, `run` and `programs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np

from rlhf_jax import abstract, evaluation, folders, pipeline
from rlhf_jax import config as configuration
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import ppo, ppo_variants, reward_model, sft
from rlhf_jax.config import Count, Positive, Share, Source, Whole, fold_seed
from rlhf_jax.data import batches, builders, formats, mixing, tokenizers
from rlhf_jax.data.batches import Examples, Loader
from rlhf_jax.data.records import Ends
from rlhf_jax.data.schema import BadRow, at
from rlhf_jax.evaluation import Exam
from rlhf_jax.launch import Context
from rlhf_jax.models import huggingface, lora, transformer
from rlhf_jax.models.transformer import Compute, Model
from rlhf_jax.rewards import agreement, learned
from rlhf_jax.sampling.rollout import Score

# Qwen2.5 of half a billion parameters.
QWEN = transformer.Config(
    vocab_size=151936,
    num_layers=24,
    d_model=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    d_ff=4864,
    max_length=32768,
    rope_base=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    tied=True,
)
# Ids of a tokenizer are constants of a program, which change neither its size nor its work.
ENDS = Ends(eos_ids=(1,), pad_id=0)


class Common(configuration.Config):
    """What every experiment on the user's own files is told. "" is not given; lengths in tokens."""

    seed: Whole = 0  # of every stage; a stage's own seed is folded into it
    model: Source = ""  # folder or org/name of a language model
    preferences: Source = ""  # file of comparisons
    # Where the fields fit several formats, or none: the name of one, or "en:de" (source:target).
    preferences_format: str = ""
    held_out: Share = 0.1  # share of the prompts that nothing is trained on
    max_prompt: Count = 128  # what is longer is dropped and counted
    max_response: Count = 128  # EOS included
    plain_template: bool = False  # use a plain chat template if the tokenizer has none
    # Feed plain prompts without the chat template. Not for alpaca rows, which are read as chats.
    raw_prompts: bool = False
    on_bad_row: Literal["error", "drop"] = "error"  # what to do with an unusable row
    lora_rank: Whole = 0  # of adapters; 0 trains all weights
    lora_alpha: Positive = 16.0  # an adapter's scale is alpha / rank
    # What `--plan` compiles where no model is named. What it says of `dtype`, `remat` and
    # `scan_layers`, which no folder states, holds for the models that are trained too.
    shape: transformer.Config = QWEN
    num_shown: Count = 4  # prompts in the table of samples


class PpoConfig(ppo_variants.PretrainingConfig):
    """PPO, and how much the text of `pretraining` counts in its loss."""

    # Weight of the text's cross entropy, nats per token. None: that of `PretrainingConfig` where
    # there is text.
    pretraining_coef: Positive | None = None


class Config(Common):
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
    judge_draws: Count = 4  # answers to each held-out prompt that the judge compares
    sft: sft.Config
    reward_model: reward_model.Config
    ppo: PpoConfig
    best_of: Count = 4  # answers to each held-out prompt: the n of best-of-n

    def check(self) -> None:
        """Raises ValueError for a weight of text that there is not."""
        if self.ppo.pretraining_coef is not None and not self.pretraining:
            raise ValueError(
                f"ppo.pretraining_coef={self.ppo.pretraining_coef} is the weight of a text, but "
                "--pretraining names none; name a file or leave the coefficient out"
            )


def open_tokenizer(folder: pathlib.Path, plain_template: bool) -> tokenizers.Tokenizer:
    """The folder's tokenizer, with the plain chat template if it has none and one is asked for."""
    tokenizer = tokenizers.from_folder(folder)
    if plain_template and tokenizer.chat_template is None:
        return tokenizer.with_template(tokenizers.PLAIN_TEMPLATE)
    return tokenizer


def open_scorer(
    config: Config, context: Context, tokenizer: tokenizers.Tokenizer
) -> tuple[Model, Score]:
    """The reward model of a folder, and how it is read: at the token where transformers reads it.

    Raises ValueError unless it reads what the policy writes.
    """
    folder = huggingface.fetch(config.scorer)
    own = open_tokenizer(folder, config.plain_template)
    tokenizers.check_same(tokenizer, own)
    scorer = folders.reward_model(folder, tokenizer, context.mesh, compute_of(config, context))
    if own.chat_template is None or config.raw_prompts:
        return scorer, learned.score
    score = learned.under_template(own, tokenizer.eos_ids)
    more = len(score.after) if isinstance(score, learned.Continued) else 0
    transformer.check_length(scorer.config, _longest(config) + more)
    return scorer, score


def compute_of(config: Common, context: Context) -> Compute:
    """How models are computed: as the command line says, or else as `config.shape` does."""
    shape = context.compute.of(config.shape)
    return Compute(shape.dtype, shape.remat, shape.scan_layers)


def adapted(config: Common, policy: Model) -> Model:
    """The model with an adapter, where one is asked for."""
    if not config.lora_rank:
        return policy
    adapter = lora.Config(rank=config.lora_rank, alpha=config.lora_alpha)
    return lora.attach(policy, adapter, jax.random.key(config.seed))


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


class File(NamedTuple):
    """The rows of a file with their line numbers, split by prompt, and their format."""

    path: str
    rows: list
    held_out: list
    format: formats.FormatLike
    kinds: set[str]  # of its prompts: "messages", "text", or "none" for text without a prompt


def open_file(config: Common, path: str, format: str) -> File | None:
    """The file, None without a path. Raises ValueError if one part of the split would be empty."""
    if not path:
        return None
    source, format = formats.located(path, format)
    found = builders.load(source, on_bad_row=config.on_bad_row)
    rows, held_out = mixing.split(found, config.held_out, format=format)
    kinds = set()
    for row, _ in rows:
        with contextlib.suppress(BadRow):
            prompt = formats.either(row, format).prompt
            kinds.add("messages" if isinstance(prompt, tuple) else "text" if prompt else "none")
    if rows and not kinds and config.on_bad_row == "error":
        row, where = rows[0]
        with at(where):
            formats.either(row, format)  # says what is wrong with it
    if not rows or not held_out:
        raise ValueError(
            f"{path}: {len(rows)} rows to train on and {len(held_out)} held out; give more "
            f"rows or another held_out than {config.held_out}"
        )
    return File(path, rows, held_out, format, kinds)


def check_prompts(
    config: Common, template: bool, demonstrations: File | None, others: list[File]
) -> None:
    """Raises ValueError if prompts of different files would be formatted differently.

    `template`: whether the tokenizer has a chat template.
    """
    chats = [file for file in (demonstrations, *others) if file and "messages" in file.kinds]
    if chats and not template:
        raise ValueError(
            f"{chats[0].path}: its rows are read as messages, but the tokenizer has no chat "
            "template; take the model and tokenizer of a chat model, or --plain-template"
        )
    if chats and config.raw_prompts:
        raise ValueError(
            f"{chats[0].path}: its rows are read as messages, which raw prompts of other files "
            "would not look like; leave --raw-prompts out"
        )
    plain = demonstrations and others and not chats and "none" in demonstrations.kinds
    if plain and template and not config.raw_prompts:
        raise ValueError(
            f"{demonstrations.path}: its texts have no prompts, so they teach nothing about the "
            "chat template that prompts would go through; feed those as they stand by --raw-prompts"
        )


def tokenised(
    config: Common,
    tokenizer: tokenizers.Tokenizer,
    tokenize: Callable[..., Examples],
    file: File,
    rows: list,
    *sizes: int,
    parse: Callable = formats.read,
) -> Examples:
    """Rows of a file as examples. Where the tokenizer has a chat template, prompts go through it.

    `tokenize` is a function of `batches` and `sizes` are its limits.
    """
    format = file.format
    if tokenizer.chat_template is not None and not config.raw_prompts:
        format = formats.as_messages(format, parse)
    return tokenize(rows, tokenizer, *sizes, format=format, on_bad_row=config.on_bad_row)


def read(config: Config, tokenizer: tokenizers.Tokenizer) -> Data:
    """Reads all files before anything is trained. Raises ValueError for unusable files.

    All prompts are formatted alike (`tokenised`), whichever files are given, so that SFT, the
    reward model and PPO see the same format.
    """
    demonstrations = open_file(config, config.demonstrations, config.demonstrations_format)
    preferences = open_file(config, config.preferences, config.preferences_format)
    prompts = open_file(config, config.prompts, config.prompts_format) or preferences
    text = open_file(config, config.pretraining, config.pretraining_format)
    others = [file for file in (preferences, prompts) if file]
    check_prompts(config, tokenizer.chat_template is not None, demonstrations, others)
    # Text without prompts may stand beside prompts in a template: it keeps what was known before.
    check_prompts(config, tokenizer.chat_template is not None, text, [])
    examples = functools.partial(tokenised, config, tokenizer)
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
    tokenizer = open_tokenizer(base, config.plain_template)
    compute = compute_of(config, context)
    policy = folders.language_model(base, tokenizer, context.mesh, compute)
    check_sizes(config, context, policy)
    scorer, score = None, learned.score
    if config.scorer:
        scorer, score = open_scorer(config, context, tokenizer)
    data, seed, clock, summary = read(config, tokenizer), config.seed, pipeline.Clock(), {}
    if scorer is not None and data.prompts is None:
        raise ValueError("--prompts is missing: PPO needs prompts, and no preferences have any")
    policy, judge = adapted(config, policy), None

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
    shape = compute_of(config, context).of(shape)
    pipeline.check_sizes(mesh, shape, _longest(config), **_stages(config))
    length = config.max_prompt + config.max_response
    initial = abstract.derived(adapted, mesh, config, abstract.model(shape, mesh))
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
        ends=ENDS,
        mesh=mesh,
        pretraining=abstract.demonstrations(mesh, rows, length) if config.pretraining else None,
        resident=judge.result,
        **functions,
    )
    batch = abstract.prompts(mesh, config.ppo.batch_size, config.max_prompt)
    held = (judge.result, aligned.held if config.ppo.eval_every else rated)
    answers = evaluation.program(
        aligned.result, *rated, config.ppo.sampling, batch, ENDS, mesh, resident=held
    )
    return [*tuned.programs, *first.programs, *judge.programs, *aligned.programs, answers]
