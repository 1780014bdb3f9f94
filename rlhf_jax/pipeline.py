"""SFT -> reward model -> PPO -> evaluation, each stage a function that experiments compose.

The only module that imports several algorithms. A stage continues from its own checkpoints under
the workdir, so a run that was interrupted anywhere is continued by running it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config, sharding
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data import batches, mixing, tokenizers
from rlhf_jax.data.batches import Examples, Loader
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.launch import Context
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import learned
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training.checkpoint import Checkpoints

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
Gold = Callable[[str, str], float]  # (prompt, response) -> the score that nobody trains on


class AlignmentConfig(config.Config):
    """Reward model, PPO and evaluation of a policy that exists."""

    seed: int = 0  # of every stage; a stage's own seed is added to it
    reward_model: reward_model.Config = reward_model.Config()
    ppo: ppo.Config = ppo.Config()
    best_of: int = 16  # answers to a prompt in the evaluation, and of best-of-n
    num_shown: int = 4  # prompts in the table of samples


class Config(AlignmentConfig):
    """The whole path: a new model, SFT, then what `AlignmentConfig` does."""

    model: transformer.Config = transformer.Config()
    sft: sft.Config = sft.Config()


class Task(NamedTuple):
    """What the stages after SFT read: a tokenizer, tokenised examples, and the judge of texts.

    `centre_on` are the responses that shall score 0 on average: the demonstrations, or the
    policy's own samples where there are none. `gold` is None where nobody knows the truth.
    """

    tokenizer: Tokenizer
    comparisons: Examples
    comparisons_eval: Examples
    centre_on: Examples
    prompts: Examples
    prompts_eval: Examples
    gold: Gold | None = None


class Evaluation(NamedTuple):
    """Responses to the held-out prompts, in their order (again for each draw), and their scores.

    gold: None where the task has none. kl, reference_nats: of each response, to and under the
    reference; lengths in tokens.
    """

    prompts: list[str]
    responses: list[str]
    gold: np.ndarray | None
    scores: np.ndarray
    kl: np.ndarray
    reference_nats: np.ndarray
    lengths: np.ndarray


def check(
    config: AlignmentConfig, mesh: jax.sharding.Mesh, shape: transformer.Config, max_prompt: int
) -> None:
    """Raises ValueError, before anything is trained, for sizes that cannot work in a later stage.

    `shape` is the policy's, `max_prompt` the longest prompt in tokens.
    """
    for stage, part in vars(config).items():
        if not isinstance(part, sft.Config | reward_model.Config | ppo.Config):
            continue
        for name, value in vars(part).items():
            if type(value) is int and name != "seed" and value < 1:
                raise ValueError(f"{stage}.{name}={value} must be at least 1")
        if part.batch_size % part.micro_batches:
            raise ValueError(
                f"{stage}.batch_size={part.batch_size} is not a multiple of micro_batches="
                f"{part.micro_batches}"
            )
        sharding.check_rows(mesh, **{f"{stage}.batch_size": part.batch_size})
    if config.best_of < 1:
        raise ValueError(f"best_of={config.best_of} must be at least 1")
    ppo.check_sizes(config.ppo, mesh)
    transformer.check_length(shape, max_prompt + config.ppo.max_new_tokens)


def new_model(shape: transformer.Config, context: Context, seed: int) -> Model:
    """A model to be trained from scratch, born sharded."""
    return sharding.born(context.mesh, lambda: transformer.init(shape, jax.random.key(seed)))


def fine_tune(
    config: Any,
    context: Context,
    initial: Model,
    tokenizer: Tokenizer,
    demonstrations: Examples,
    demonstrations_eval: Examples,
):
    """SFT of a model by `config.sft` and `config.seed`: (policy, {"eval_loss"})."""
    settings = config.sft
    tokenizers.check_vocab(tokenizer, initial.config.vocab_size)
    introduce(context, "demonstrations", demonstrations, demonstrations_eval, tokenizer)
    with stage_checkpoints(context, "sft") as checkpoints:
        result = sft.run(
            settings,
            initial,
            Loader(demonstrations, settings.batch_size, config.seed),
            mesh=context.mesh,
            log=context.log,
            checkpoints=checkpoints,
        )
    held_out = Loader(demonstrations_eval, settings.batch_size, config.seed)
    loss = sft.evaluate(settings, result.policy, held_out, mesh=context.mesh)
    return result.policy, {"eval_loss": loss}


def fit_scorer(
    config: Any,
    context: Context,
    policy: Model,
    examples: Examples,
    loss_fn: Callable = reward_model.loss,
    name: str = "reward_model",
) -> Model:
    """A scorer that starts as `policy`, by `config.reward_model` and `config.seed`.

    `name` is the stage's in logs and checkpoints, for a run that trains several of them.
    """
    settings = _seeded(config, config.reward_model)
    with stage_checkpoints(context, name) as checkpoints:
        return reward_model.run(
            settings,
            policy,
            Loader(examples, settings.batch_size, config.seed),
            loss_fn=loss_fn,
            name=name,
            mesh=context.mesh,
            log=context.log,
            checkpoints=checkpoints,
        ).scorer


def train_scorer(
    config: AlignmentConfig, context: Context, task: Task, policy: Model, name: str = "reward_model"
):
    """A reward model from `policy`, centred as `task` says: (scorer, held-out figures)."""
    introduce(context, "comparisons", task.comparisons, task.comparisons_eval, task.tokenizer)
    scorer = fit_scorer(config, context, policy, task.comparisons, name=name)
    centre_on, held_out = (
        Loader(examples, config.reward_model.batch_size, config.seed)
        for examples in (task.centre_on, task.comparisons_eval)
    )
    scorer = reward_model.centre(scorer, centre_on, mesh=context.mesh)
    return scorer, reward_model.evaluate(config.reward_model, scorer, held_out, mesh=context.mesh)


def optimise(
    config: AlignmentConfig, context: Context, task: Task, policy: Model, scorer: Model
) -> ppo.Result:
    """PPO of `policy` against `scorer`, the critic starting as the scorer."""
    settings = _seeded(config, config.ppo)
    introduce(context, "prompts", task.prompts, task.prompts_eval, task.tokenizer)

    def observe(rollout: Rollout) -> dict[str, float]:
        if task.gold is None:
            return {}
        prompts, responses = texts(task.tokenizer, rollout)
        return {"objective/gold": float(np.mean([*map(task.gold, prompts, responses)]))}

    with stage_checkpoints(context, "ppo") as checkpoints:
        return ppo.run(
            settings,
            policy=policy,
            score=learned.score,
            scorer=scorer,
            critic=scorer,
            prompts=Loader(task.prompts, settings.batch_size, config.seed),
            eos_ids=task.tokenizer.eos_ids,
            pad_id=task.tokenizer.pad_id,
            observe=observe,
            mesh=context.mesh,
            log=context.log,
            checkpoints=checkpoints,
        )


class Comparison(NamedTuple):
    """Held-out prompts answered n times before and after, and once by best-of-n of before."""

    before: Evaluation
    after: Evaluation
    best_of_n: Evaluation


def compare(
    config: AlignmentConfig,
    context: Context,
    task: Task,
    before: Model,
    after: Model,
    scorer: Model,
) -> Comparison:
    """Both policies, and best-of-n of the first, on the held-out prompts with the same noise.

    Each policy answers every prompt n = `best_of` times, and all answers count. Best-of-n takes, of
    the first policy's answers to a prompt, the one that the reward model likes most.
    Prints the table and keeps the samples for the report.
    """
    sample = responder(
        config, context, task.tokenizer, task.prompts_eval, before, learned.score, scorer
    )

    def draws(policy: Model) -> list[Evaluation]:
        numbers = range(config.best_of)
        return [evaluate(task.tokenizer, task.gold, sample(policy, i)) for i in numbers]

    firsts, lasts = draws(before), draws(after)
    first, last = firsts[0], lasts[0]
    best = np.argmax(np.stack([draw.scores for draw in firsts]), axis=0)
    one = lambda field, i: None if field is None else field[i : i + 1]  # noqa: E731
    picked = [Evaluation(*(one(field, i) for field in firsts[k])) for i, k in enumerate(best)]
    name = "score" if task.gold is None else "gold"
    of = lambda x, i: round(float((x.scores if task.gold is None else x.gold)[i]), 2)  # noqa: E731
    rows = [
        {
            "prompt": first.prompts[i],
            "before": first.responses[i],
            "after": last.responses[i],
            f"{name} before": of(first, i),
            f"{name} after": of(last, i),
        }
        for i in range(min(config.num_shown, len(first.prompts)))
    ]
    context.log.table("The same prompts before and after PPO", rows)
    context.log.samples("evaluation", 0, rows)
    return Comparison(_join(firsts), _join(lasts), _join(picked))


def _join(evaluations: list[Evaluation]) -> Evaluation:
    """One after another."""

    def along(field):
        if field[0] is None:
            return None
        return sum(field, []) if isinstance(field[0], list) else np.concatenate(field)

    return Evaluation(*map(along, zip(*evaluations)))


def summarise(config: AlignmentConfig, comparison: Comparison) -> dict[str, float | int]:
    """The figures of a `Comparison` that every task has. KL in nats a response, to `before`."""
    before, after, best = comparison
    once = len(best.responses)  # a share of distinct pairs falls with the amount of text
    gold = {"gold_before": before, "gold_after": after, "gold_best_of_n": best}
    gold = {} if best.gold is None else {k: float(x.gold.mean()) for k, x in gold.items()}
    return {
        **gold,
        "best_of": config.best_of,
        "score_before": float(before.scores.mean()),
        "score_after": float(after.scores.mean()),
        "score_best_of_n": float(best.scores.mean()),
        "kl": float(after.kl.mean()),
        "distinct_bigrams_before": distinct_bigrams(before.responses[:once]),
        "distinct_bigrams_after": distinct_bigrams(after.responses[:once]),
        "length_before": float(before.lengths.mean()),
        "length_after": float(after.lengths.mean()),
    }


def align(
    config: AlignmentConfig, context: Context, task: Task, policy: Model, clock: Clock
) -> tuple[dict, Comparison]:
    """Reward model, PPO and evaluation of a policy: ({"reward_model", "ppo"} figures, answers)."""
    with clock("reward_model"):
        scorer, figures = train_scorer(config, context, task, policy)
    with clock("ppo"):
        trained = optimise(config, context, task, policy, scorer).policy
    with clock("evaluation"):
        compared = compare(config, context, task, policy, trained, scorer)
    return {"reward_model": figures, "ppo": summarise(config, compared)}, compared


def responder(
    config: AlignmentConfig,
    context: Context,
    tokenizer: Tokenizer,
    prompts: Examples,
    reference: Model,
    score: rollouts.Score,
    scorer: Any,
) -> Callable[[Model, int], Rollout]:
    """`respond(policy, sample) -> Rollout` (host arrays) on all prompts in order, compiled once.

    `sample` numbers the draw: the same number gives any policy the same noise.
    """
    settings = config.ppo
    loader = Loader(prompts, settings.batch_size, config.seed)
    rows = sharding.rows(context.mesh)

    def collect(temperature, policy, reference, scorer, batch, sample):
        # Apart from the iterations of training, which count from 0.
        key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
        return rollouts.collect(
            policy,
            reference,
            score,
            scorer,
            batch,
            jax.random.fold_in(key, sample),
            max_new_tokens=settings.max_new_tokens,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            temperature=temperature,
            micro_batches=settings.micro_batches,
        )

    compiled = jax.jit(collect, out_shardings=rows)

    def respond(policy: Model, sample: int) -> Rollout:
        parts = []
        with jax.set_mesh(context.mesh):
            for batch in loader.epoch_batches():
                real = batches.real_rows(batch)
                batch = sharding.put_rows(context.mesh, batch)
                models = (policy, reference, scorer)
                rollout = compiled(settings.temperature, *models, batch, jnp.int32(sample))
                parts.append(jax.tree.map(lambda x, n=real: np.asarray(x)[:n], rollout))
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

    return respond


def evaluate(tokenizer: Tokenizer, gold: Gold | None, rollout: Rollout) -> Evaluation:
    """A rollout as texts and figures. Host arrays."""
    prompts, responses = texts(tokenizer, rollout)
    judged = None if gold is None else np.array([*map(gold, prompts, responses)])
    nats = -np.sum(rollout.ref_logprobs * rollout.mask, axis=1)
    kl = np.sum(rollout.old_logprobs * rollout.mask, axis=1) + nats
    return Evaluation(prompts, responses, judged, rollout.scores, kl, nats, rollout.lengths)


def introduce(
    context: Context, name: str, examples: Examples, held_out: Examples, tokenizer: Tokenizer
) -> None:
    """Before step 1: what was read, kept and dropped, and one example with its loss mask."""
    context.log.print(f"{name}: {batches.describe(examples.counts)}")
    context.log.print(f"{name}, held out: {batches.describe(held_out.counts)}")
    if isinstance(examples[0], batches.Demonstrations):
        context.log.print(f"{name}: {mixing.utilisation(examples):.0%} of the positions are tokens")
    context.log.print(batches.show(examples[0], tokenizer))


def texts(tokenizer: Tokenizer, rollout: Rollout) -> tuple[list[str], list[str]]:
    """Prompts and responses of a rollout as text."""
    rollout = jax.device_get(rollout)  # by a mask, device arrays compile once for each length
    prompts, responses = [], []
    for tokens, attend, mask in zip(rollout.tokens, rollout.attend, rollout.mask):
        prompts.append(tokenizer.decode(tokens[(attend > 0) & (mask == 0)].tolist()))
        responses.append(tokenizer.decode(tokens[mask > 0].tolist()))
    return prompts, responses


def distinct_bigrams(responses: Sequence[str]) -> float:
    """Distinct word pairs as a share of all word pairs of the responses; 0 without any.

    Words stand between blanks; a Chinese character or a kana is one by itself.
    """
    pairs = [pair for words in map(_WORDS.findall, responses) for pair in zip(words, words[1:])]
    return len(set(pairs)) / max(len(pairs), 1)


def _seeded(config: Any, part: Any) -> Any:
    """A stage's configuration with the run's seed added to its own."""
    return dataclasses.replace(part, seed=config.seed + part.seed)


def stage_checkpoints(context: Context, stage: str) -> Checkpoints:
    """The checkpoints of one stage under the workdir."""
    return Checkpoints(context.workdir / "checkpoints" / stage)


class Clock:
    """Wall seconds by stage, of this process (a resumed run counts what it ran itself)."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str):
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 1)
