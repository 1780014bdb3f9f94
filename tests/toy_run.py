"""A whole run at toy size, which tests start as one process or as several.

SFT, a reward model, PPO, evaluation, export and a reward in Python; the summary holds what must not
depend on the number of processes.
"""

import jax
import numpy as np
import tiny

from rlhf_jax import config as configuration
from rlhf_jax import evaluation, folders, pipeline, processes, sharding
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Source, Whole
from rlhf_jax.data import batches, builders
from rlhf_jax.launch import launch
from rlhf_jax.rewards import host
from rlhf_jax.sampling import Sampling
from rlhf_jax.training.state import OptimizerConfig

# A small rate, because Adam's first steps blow up the rounding of small gradients.
ADAM = OptimizerConfig(learning_rate=1e-3, schedule="constant")


class Config(configuration.Config):
    """Three stages, and where the words come from."""

    seed: Whole = 0
    words: Source = ""  # a file of prompts; "" is the words of `tiny`
    sft: sft.Config
    reward_model: reward_model.Config
    ppo: ppo.Config


config = Config(
    sft=sft.Config(num_steps=4, batch_size=8, optimizer=ADAM, save_every=2, eval_every=2),
    reward_model=reward_model.Config(num_steps=4, batch_size=8, optimizer=ADAM),
    # Four prompts an iteration, twice each: eight rows on eight devices.
    ppo=ppo.Config(
        num_iterations=3,
        batch_size=4,
        samples_per_prompt=2,
        sampling=Sampling(max_new_tokens=8),
        num_epochs=2,
        policy_optimizer=ADAM,
        critic_optimizer=ADAM,
        save_every=1,
    ),
)


def scored_in_python(mesh, exam, answers):
    """What a reward in Python gives eight answers that are split over a mesh: scores, and the mean
    of a part."""
    asked = []

    def length_and_prompt(prompts, responses, rows):
        assert prompts == [row.prompt for row in rows]
        asked.extend(prompts)
        lengths = [len(r.encode()) for r in responses]
        scores = [length + 100.0 * ord(p[0]) for length, p in zip(lengths, prompts)]
        return host.Scored(scores, {"length": lengths})

    places = sharding.process_rows(mesh, 8)
    rows = jax.tree.map(lambda x: np.resize(x, (8, *x.shape[1:]))[places], answers)
    index = np.arange(8)[places] % len(exam.prompts.examples)
    samples, index = sharding.put_rows(mesh, (rows, index))
    score = host.for_run(length_and_prompt, exam.tokenizer, exam.prompts.examples, None)
    own = score(samples, index, samples.tokens)
    assert len(asked) == len(own.scores)
    counts = processes.texts(str(len(asked)))
    assert sum(map(int, counts)) == 8  # each answer once, by whichever process
    scores, parts = jax.tree.map(lambda x: sharding.put_own_rows(mesh, x, 8), own)
    assert scores.sharding == sharding.rows(mesh)
    told = host.report(mesh, parts)
    assert set(told) == {"reward/length", "reward/seconds", "reward/waited"}
    return sharding.to_host(scores).tolist(), float(told["reward/length"])


def run(config, context):
    """All stages; returns their figures."""
    words = tiny.WORDS
    if config.words:
        words = [row["prompt"] for row, _ in builders.load(config.words)]
    told = [{"prompt": word, "completion": word[::-1]} for word in words]
    ranked = [{"prompt": word, "chosen": word[::-1] + "!", "rejected": word} for word in words]
    demonstrations, comparisons, prompts = (
        pipeline.Split(*(make(part, tiny.TOKENIZER, *sizes) for part in (rows[:9], rows[9:])))
        for make, rows, sizes in (
            (batches.demonstrations, told, (4, 5)),
            (batches.comparisons, ranked, (4, 5)),
            (batches.prompts, told, (4,)),
        )
    )
    task = pipeline.Task(tiny.TOKENIZER, prompts, lambda prompt, response: float(len(response)))
    stages = (context, tiny.TOKENIZER)
    seed, summary = config.seed, {}
    policy = pipeline.new_model(tiny.SHAPE, context, seed)
    policy, summary["sft"] = pipeline.supervised(
        sft.run, sft.evaluate, config.sft, *stages, policy, demonstrations, stage="sft", seed=seed
    )
    scorer, summary["reward_model"] = pipeline.supervised(
        reward_model.run,
        reward_model.evaluate,
        config.reward_model,
        *stages,
        policy,
        comparisons,
        stage="reward_model",
        seed=seed,
    )
    own = batches.Loader(comparisons.train, 8, seed)
    scorer = reward_model.centre(scorer, own, mesh=context.mesh)
    folders.export(context.workdir / "export" / "scorer", scorer, tiny.TOKENIZER)
    trained = pipeline.online(
        ppo.run, config.ppo, context, task, policy, scorer, stage="ppo", seed=seed, critic=scorer
    ).policy
    exam = pipeline.exam(context, task, policy, scorer, config.ppo.sampling, 8, seed=seed)
    compared = evaluation.compare(exam, policy, trained, 2)
    evaluation.show(context.log, compared, 2)
    summary["ppo"] = evaluation.summarise(compared)
    folders.export(context.workdir / "export" / "policy", trained, tiny.TOKENIZER)
    read = folders.load(context.workdir / "export" / "policy", context.mesh).model
    assert tiny.equal(*map(sharding.to_host, (read.weights, trained.weights)))
    answers = evaluation.answer(exam, trained)
    # Rows over both processes, and tensors over both: then the first one scores for the other.
    for mesh in (context.mesh, sharding.make_mesh(fsdp=1, tensor=8)):
        scores, length = scored_in_python(mesh, exam, answers)
        summary[f"in Python, tensor={mesh.shape['tensor']}"] = scores
        summary[f"mean length, tensor={mesh.shape['tensor']}"] = length
    return summary


if __name__ == "__main__":
    launch(run, config)
