"""SFT, a reward model and PPO on a synthetic task, on two CPU cores in minutes.

    python experiments/quickstart.py

Claim: a small language model that imitates reviews of mixed quality learns, from noisy comparisons
alone, to write reviews that a hidden judge likes (`rlhf_jax.tasks.reviews` generates both the task
and the judge). Nothing is downloaded.

Result on 2 cores of an Intel Xeon, 2026-11-24, with 16 answers to each of 128 held-out prompts:

    seed                                     0               1               2
    SFT loss, nats per token               0.647           0.638           0.611
    scorer's accuracy, of reachable    0.735 of 0.762  0.722 of 0.757  0.745 of 0.761
    gold, SFT -> PPO                   0.418 -> 0.831  0.403 -> 0.814  0.421 -> 0.816
    gold, best of 16 by the scorer         0.694           0.680           0.710
    KL, nats per response                   4.8             5.7             4.7
    grammatical, SFT -> PPO            0.923 -> 0.913  0.913 -> 0.899  0.913 -> 0.914
    distinct bigrams, SFT -> PPO       0.225 -> 0.158  0.225 -> 0.150  0.244 -> 0.164

Seed 0 takes 2.6 minutes (2026-11-26, compilation included).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rlhf_jax import abstract, evaluation, folders, pipeline, processes
from rlhf_jax import config as configuration
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Count, Draws, Whole
from rlhf_jax.data import batches, builders, tokenizers
from rlhf_jax.data.batches import Loader
from rlhf_jax.data.records import Ends
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import reviews
from rlhf_jax.training.state import OptimizerConfig

MAX_PROMPT, MAX_RESPONSE = 12, 40
ENDS = Ends(eos_ids=(1,), pad_id=0)  # of `tokenizers.train_bpe`


class WarmUp(configuration.Config):
    """A new model, and the two stages that reinforcement learning starts from."""

    seed: Whole = 0  # of every stage; a stage's own seed is folded into it
    model: transformer.Config
    sft: sft.Config
    reward_model: reward_model.Config


class Config(WarmUp):
    """The warm start, PPO, and the evaluation."""

    ppo: ppo.Config
    best_of: Draws = 16  # answers to each held-out prompt: the n of best-of-n
    num_shown: Count = 4  # prompts in the table of samples


config = Config(
    model=transformer.Config(
        vocab_size=768,
        num_layers=2,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=352,
        max_length=128,
        tied=False,
    ),
    sft=sft.Config(
        num_steps=360,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30, schedule="cosine"),
    ),
    reward_model=reward_model.Config(
        num_steps=200,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=20, schedule="cosine"),
    ),
    ppo=ppo.Config(
        num_iterations=30,
        batch_size=128,
        sampling=Sampling(max_new_tokens=MAX_RESPONSE),
        num_minibatches=2,
        policy_optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", final_scale=0.1),
        critic_optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", final_scale=0.1),
        kl_coef=0.15,
        missing_eos_penalty=1.0,
    ),
)


class Data(NamedTuple):
    """The task, generated and tokenised."""

    made: reviews.Task
    demonstrations: pipeline.Split
    comparisons: pipeline.Split
    task: pipeline.Task  # prompts and the hidden judge


class Start(NamedTuple):
    """What imitation and comparisons give: where reinforcement learning starts."""

    policy: Model
    scorer: Model
    figures: dict[str, dict[str, float]]  # held out, of both stages


def make(config: WarmUp, context: Context) -> Data:
    """Generates the task in the workdir and trains the tokenizer."""
    made = reviews.make(config.seed, context.workdir / "data", num_comparisons=12800)
    train = builders.load(made.demonstrations, "train[:95%]")
    held_out = builders.load(made.demonstrations, "train[95%:]")
    texts = (row["prompt"] + row["completion"] for row, _ in train)
    tokenizer = tokenizers.train_bpe(texts, config.model.vocab_size)
    processes.first(lambda: tokenizer.save(context.workdir / "tokenizer"))
    sizes = (tokenizer, MAX_PROMPT, MAX_RESPONSE)
    demonstrations = pipeline.Split(
        *(batches.demonstrations(part, *sizes) for part in (train, held_out))
    )
    comparisons = pipeline.Split(
        batches.comparisons(builders.load(made.comparisons), *sizes),
        batches.comparisons(builders.load(made.comparisons_eval), *sizes),
    )
    prompts = pipeline.Split(
        batches.prompts(builders.load(made.prompts), tokenizer, MAX_PROMPT),
        batches.prompts(builders.load(made.prompts_eval), tokenizer, MAX_PROMPT),
    )
    return Data(made, demonstrations, comparisons, pipeline.Task(tokenizer, prompts, made.gold))


def warm_up(config: WarmUp, context: Context, data: Data, clock: pipeline.Clock) -> Start:
    """Trains the policy to imitate, and the reward model on comparisons."""
    seed, tokenizer, figures = config.seed, data.task.tokenizer, {}
    with clock("sft"):
        initial = pipeline.new_model(config.model, context, seed)
        policy, figures["sft"] = pipeline.supervised(
            sft.run,
            sft.evaluate,
            config.sft,
            context,
            tokenizer,
            initial,
            data.demonstrations,
            stage="sft",
            seed=seed,
        )

    with clock("reward_model"):
        scorer, found = pipeline.supervised(
            reward_model.run,
            reward_model.evaluate,
            config.reward_model,
            context,
            tokenizer,
            policy,
            data.comparisons,
            stage="reward_model",
            seed=seed,
        )
        centred_on = Loader(data.demonstrations.train, config.reward_model.batch_size, seed)
        scorer = reward_model.centre(scorer, centred_on, mesh=context.mesh)
        figures["reward_model"] = found | {"best_reachable_accuracy": data.made.best_accuracy}
    return Start(policy, scorer, figures)


def run(config: Config, context: Context) -> dict:
    """Makes the task, trains and evaluates; returns the summary."""
    pipeline.check(
        context,
        config.model,
        MAX_PROMPT + config.ppo.sampling.max_new_tokens,
        sft=config.sft,
        reward_model=config.reward_model,
        ppo=config.ppo,
    )
    data, clock, seed = make(config, context), pipeline.Clock(), config.seed
    policy, scorer, summary = warm_up(config, context, data, clock)

    with clock("ppo"):
        trained = pipeline.online(
            ppo.run,
            config.ppo,
            context,
            data.task,
            policy,
            scorer,
            stage="ppo",
            seed=seed,
            critic=scorer,
        ).policy

    for name, model in {"policy": trained, "reward_model": scorer}.items():
        folders.export(context.workdir / "export" / name, model, data.task.tokenizer)
    with clock("evaluation"):
        exam = pipeline.exam(
            context,
            data.task,
            policy,
            scorer,
            config.ppo.sampling,
            config.ppo.batch_size,
            seed=seed,
        )
        compared = evaluation.compare(exam, policy, trained, config.best_of)
        evaluation.show(context.log, compared, config.num_shown)
        is_grammatical = data.made.grammatical
        summary["ppo"] = evaluation.summarise(compared) | {
            "grammatical_before": share(is_grammatical, compared.before.responses),
            "grammatical_after": share(is_grammatical, compared.after.responses),
        }
    return summary | {"seconds": clock.seconds}


class Warm(NamedTuple):
    """The programs of `warm_up`, and the shapes of the models that it leaves behind."""

    programs: list[Program]
    initial: Model
    policy: Model
    scorer: Model


def warm_up_programs(config: WarmUp, context: Context) -> Warm:
    """What `warm_up` runs: see `abstract`. The new model stays where it is until the end."""
    length, mesh = MAX_PROMPT + MAX_RESPONSE, context.mesh
    initial = abstract.model(context.compute.of(config.model), mesh)
    tuned = sft.programs(config.sft, initial, length, mesh)
    ranked = reward_model.programs(
        config.reward_model,
        tuned.result,
        length,
        mesh,
        centred_on=abstract.demonstrations(mesh, config.reward_model.batch_size, length),
        resident=initial,
    )
    return Warm([*tuned.programs, *ranked.programs], initial, tuned.result, ranked.result)


def programs(config: Config, context: Context) -> list[Program]:
    """What `run` runs: see `abstract`."""
    mesh, (warm, initial, policy, scorer) = context.mesh, warm_up_programs(config, context)
    aligned = ppo.programs(
        config.ppo,
        policy=policy,
        scorer=scorer,
        critic=scorer,
        max_prompt=MAX_PROMPT,
        ends=ENDS,
        mesh=mesh,
        resident=initial,
    )
    batch = abstract.prompts(mesh, config.ppo.batch_size, MAX_PROMPT)
    held = (initial, aligned.held if config.ppo.eval_every else ())
    answers = evaluation.program(
        aligned.result, policy, scorer, config.ppo.sampling, batch, ENDS, mesh, resident=held
    )
    return [*warm, *aligned.programs, answers]


def share(condition: Callable[[str], bool], texts: list[str]) -> float:
    """The share of texts for which a condition holds."""
    return sum(map(condition, texts)) / len(texts)


if __name__ == "__main__":
    launch(run, config, programs=programs)
