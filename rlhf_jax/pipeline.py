"""Stages that experiments compose: each takes an algorithm's `run` and its Config.

A stage continues from its own checkpoints under the workdir, so a run that was interrupted anywhere
is continued by running it again. No algorithm is named here: to replace PPO, only the experiment's
file changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import evaluation, lock, processes, sharding, sizes
from rlhf_jax import online as online_algorithms
from rlhf_jax.config import Config, fold_seed
from rlhf_jax.data import batches, mixing, tokenizers
from rlhf_jax.data.batches import Examples, Loader
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.evaluation import Exam, Gold
from rlhf_jax.launch import Context
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training import alarms, checkpoint, loop
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Runtime


class Split(NamedTuple):
    """Tokenised examples for training, and held-out ones."""

    train: Examples
    held_out: Examples


class Task(NamedTuple):
    """The task of an online stage: its prompts, and a gold score of the answers if one is known."""

    tokenizer: Tokenizer
    prompts: Split
    gold: Gold | None = None  # the score that nothing is trained on; None where it is unknown


def check(
    context: Context,
    shape: transformer.Config,
    longest: int,
    **stages: loop.Config | online_algorithms.Config,
) -> None:
    """Raises ValueError, before anything is trained, for sizes that cannot work in a later stage.

    Sizes that the memory could never hold are among them (`sizes`).

    `shape` is the policy's, `longest` the longest prompt and response together, in tokens; `stages`
    are the configurations of the stages by name.
    """
    check_sizes(context.mesh, shape, longest, **stages)
    sizes.check_model(shape, context.mesh)
    for stage, config in stages.items():
        sizes.check_stage(stage, config, shape, longest, context.mesh)


def check_sizes(
    mesh: jax.sharding.Mesh,
    shape: transformer.Config,
    longest: int,
    **stages: loop.Config | online_algorithms.Config,
) -> None:
    """`check` for a mesh that is only planned for, whose memory the plan itself tells of."""
    for stage, config in stages.items():
        counts = {f"{stage}.{name}": count for name, count in config.row_counts().items()}
        sharding.check_rows(mesh, **counts)
    transformer.check_length(shape, longest)


def new_model(shape: transformer.Config, context: Context, seed: int) -> Model:
    """A model to be trained from scratch, sharded from the beginning.

    Raises ValueError for one that the memory could never hold.
    """
    sizes.check_model(shape, context.mesh, sizes.TRAINED)
    key, shape = jax.random.key(seed), context.compute.of(shape)
    return sharding.initialise(context.mesh, transformer.init, shape, key, static_argnums=0)


def seeded(seed: int, stage: str, config: Config) -> Config:
    """A stage's configuration with the run's seed and the stage's name folded into its own seed."""
    return dataclasses.replace(config, seed=fold_seed(seed, f"{stage}/{config.seed}"))


@contextlib.contextmanager
def runtime(
    context: Context, stage: str, config: checkpoint.Config, data: Callable[[], str] | None = None
) -> Iterator[Runtime]:
    """The runtime of one stage, with its checkpoints under the workdir.

    In a sweep runs that do the same in a stage share its checkpoints (`sweep.Shared`). `data` gives
    the hash of what the stage is trained on; without it the checkpoints are the run's own.
    """
    with contextlib.ExitStack() as stack:
        folder = context.workdir / "checkpoints" / stage
        if context.shared is not None and data is not None:
            folder = context.shared.stage(stage, config, data)
            processes.first(lambda: stack.enter_context(lock.held(folder, context.log.print)))
        stored = Checkpoints(
            folder,
            config.keep,
            best=config.keep_best,
            lowest=config.best_is == "lowest",
            say=context.log.print,
        )
        checkpoints = stack.enter_context(stored)
        yield Runtime(context.mesh, context.log, checkpoints, stage, context.stop, context.together)


def supervised(
    run: Callable,
    evaluate: Callable,
    config: loop.Config,
    context: Context,
    tokenizer: Tokenizer,
    model: Model,
    data: Split,
    *,
    stage: str,
    seed: int,
    **options: Any,
) -> tuple[Model, dict[str, float]]:
    """One supervised stage: (the trained model, its held-out figures named as in a summary).

    `run(config, model, loader, ...)` and `evaluate(config, model, loader, ...)` are an algorithm's;
    `options` go to `run` (for example a loss). If the configuration has `eval_every`, the held-out
    data is also evaluated during training.
    """
    tokenizers.check_vocab(tokenizer, model.config.vocab_size)
    introduce(context, data, tokenizer)
    config = seeded(seed, stage, config)
    train, held_out = (Loader(part, config.batch_size, fold_seed(seed, stage)) for part in data)
    if config.eval_every:
        options["held_out"] = held_out
    with runtime(context, stage, config, data.train.fingerprint) as where:
        trained, _ = run(config, model, train, runtime=where, **options)
    figures = evaluation.held_out(evaluate(config, trained, held_out, mesh=context.mesh))
    context.log.withdraw(stage, alarms.CHANCE)
    for alarm in alarms.of_accuracy(figures):
        context.log.alarm(stage, config.num_steps - 1, alarm)
    return trained, figures


def online(
    run: Callable,
    config: online_algorithms.Config,
    context: Context,
    task: Task,
    policy: Model,
    scorer: Model | None,
    *,
    stage: str,
    seed: int,
    **options: Any,
) -> Any:
    """One online stage: the algorithm's result.

    The reward is `scorer`, a learned one, or one of the options: `score` or `reward`. These go to
    `run`, as all options do (for example a critic). The gold score is logged in training where the
    task has one, and if the configuration has `eval_every`, held-out prompts are also answered.
    """
    tokenizers.check_vocab(task.tokenizer, policy.config.vocab_size)
    introduce(context, task.prompts, task.tokenizer)
    if task.gold is not None:
        options["observe"] = lambda rollout: _gold(task, rollout)
    if config.eval_every:
        judged = {name: options[name] for name in ("score", "reward") if name in options}
        held_out = exam(
            context, task, policy, scorer, config.sampling, config.batch_size, seed=seed, **judged
        )

        def evaluate(done: int, policy: Model) -> dict[str, float]:
            found = evaluation.evaluate(held_out, policy)
            first = zip(found.prompts[:4], found.responses, found.scores)
            rows = [{"prompt": p, "completion": r, "score": float(s)} for p, r, s in first]
            context.log.samples(stage, done, rows)
            return evaluation.figures(found)

        options["evaluate"] = evaluate
    config = seeded(seed, stage, config)
    with runtime(context, stage, config, task.prompts.train.fingerprint) as where:
        return run(
            config,
            policy=policy,
            scorer=scorer,
            prompts=Loader(task.prompts.train, config.batch_size, fold_seed(seed, stage)),
            tokenizer=task.tokenizer,
            runtime=where,
            **options,
        )


def from_answers(
    run: Callable,
    config: loop.Config,
    context: Context,
    task: Task,
    policy: Model,
    exam: Exam,
    *,
    answers: int,
    length: int,
    stage: str,
    seed: int,
    most: int | None = None,
    **options: Any,
) -> Any:
    """One stage that learns from answers of `policy` itself: the algorithm's result.

    It gives `answers` of them to each training prompt (`most`: of the first so many), and the
    exam's reward scores them. `run(config, policy, loader, ...)` is an algorithm's that takes
    `batches.scored`, here of the ids that were drawn; `length` is T, prompt and answer together.
    """
    prompts = Loader(task.prompts.train.first(most), exam.prompts.batch_size)
    asked = exam._replace(prompts=prompts, gold=None)
    drawn = [evaluation.answer(asked, policy, number) for number in range(answers)]
    scores = np.stack([evaluation.assess(asked, draw).scores for draw in drawn], axis=1)
    samples = evaluation.sampled(drawn, scores)
    examples = batches.sampled_scored(samples, task.tokenizer, length)
    context.log.print(f"{stage}: {batches.describe(examples.counts)}")
    config = seeded(seed, stage, config)
    with runtime(context, stage, config, examples.fingerprint) as where:
        data = Loader(examples, config.batch_size, seed)
        return run(config, policy, data, runtime=where, **options)


def _gold(task: Task, rollout: Rollout) -> dict[str, float]:
    pairs = list(zip(*rollouts.texts(task.tokenizer, rollout)))
    if rollout.given is not None:
        pairs = [pair for pair, given in zip(pairs, rollout.given) if not given]
    return {"objective/gold": float(np.mean([task.gold(*pair) for pair in pairs]))}


def exam(
    context: Context,
    task: Task,
    reference: Model,
    scorer: Any,
    sampling: Sampling,
    batch_size: int,
    *,
    seed: int,
    **settings: Any,
) -> Exam:
    """The held-out prompts of a task as an exam; `settings` are further fields of `Exam`."""
    return Exam(
        prompts=Loader(task.prompts.held_out, batch_size, seed),
        tokenizer=task.tokenizer,
        sampling=sampling,
        reference=reference,
        scorer=scorer,
        gold=task.gold,
        seed=seed,
        mesh=context.mesh,
        **settings,
    )


def introduce(context: Context, data: Split, tokenizer: Tokenizer) -> None:
    """Prints what was read, kept and dropped, and one example with its loss mask.

    Raises ValueError where processes of one run have read different data.
    """
    name = type(data.train[0]).__name__.lower()
    for part, examples in (("", data.train), (", held out", data.held_out)):
        processes.agree(f"the data ({name}{part})", lambda x=examples: x.fingerprint())
    context.log.print(f"{name}: {batches.describe(data.train.counts)}")
    context.log.print(f"{name}, held out: {batches.describe(data.held_out.counts)}")
    if isinstance(data.train[0], batches.Demonstrations):
        share = mixing.utilisation(data.train)
        context.log.print(f"{name}: {share:.0%} of the positions are tokens")
    context.log.print(batches.show(data.train[0], tokenizer))


class Clock:
    """Wall seconds by stage, of this process (a resumed run counts what it ran itself)."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str):
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 1)
