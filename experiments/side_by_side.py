"""PPO, GRPO, RLOO, RAFT and DPO side by side: one warm start, one reward, equally many samples.

    python experiments/side_by_side.py --workdir runs/side_by_side

Every algorithm continues the policy and the reward model of the quickstart, on its task. The online
ones draw as many responses as its PPO does. DPO draws none: it reads the comparisons that the
reward model was trained on. Settings are one guess per algorithm, PPO's are the quickstart's.

Result on 2 cores of an Intel Xeon, 2026-11-26, seeds 0, 1, 2, with 4 answers to each of the 128
held-out prompts (docs/algorithms.md has the other figures):

                  gold               KL, nats per response   seconds (seed 0)
    SFT           0.42, 0.40, 0.42   0
    PPO           0.83, 0.81, 0.82   4.9, 5.5, 5.0           54
    RLOO          0.84, 0.81, 0.83   4.7, 5.9, 5.1           30
    online DPO    0.81, 0.76, 0.78   4.5, 4.8, 4.2           26
    DPO           0.78, 0.76, 0.77   3.0, 3.1, 3.2           63
    RAFT          0.75, 0.73, 0.74   7.9, 6.9, 5.8           16
    GRPO          0.72, 0.67, 0.72   6.0, 6.3, 5.9           30
"""

from __future__ import annotations

import functools

import quickstart

from rlhf_jax import abstract, evaluation, pipeline
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import best_of_n, dpo, grpo, online_dpo, ppo, reinforce
from rlhf_jax.config import Count
from rlhf_jax.evaluation import Exam
from rlhf_jax.launch import Context, launch
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import Sampling
from rlhf_jax.training.state import OptimizerConfig

# The online algorithms, each by the name of its settings in `Config`. RLOO is REINFORCE with the
# leave-one-out baseline, RAFT is fine-tuning on the best of n.
ONLINE = {
    "ppo": ppo,
    "grpo": grpo,
    "rloo": reinforce,
    "raft": best_of_n,
    "online_dpo": online_dpo,
}
SAMPLING = Sampling(max_new_tokens=quickstart.MAX_RESPONSE)


def falling(learning_rate: float) -> OptimizerConfig:
    """Adam whose rate falls to a tenth."""
    return OptimizerConfig(learning_rate=learning_rate, schedule="linear", final_scale=0.1)


class Config(quickstart.Config):
    """The quickstart's settings, those of the other algorithms, and which of them are run."""

    algorithms: tuple[str, ...] = (*ONLINE, "dpo")
    grpo: grpo.Config
    rloo: reinforce.Config
    raft: best_of_n.Config
    online_dpo: online_dpo.Config
    dpo: dpo.Config
    best_of: Count = 4  # answers to each held-out prompt

    def check(self) -> None:
        """Raises ValueError for an algorithm that there is not."""
        if unknown := set(self.algorithms) - {*ONLINE, "dpo"}:
            raise ValueError(
                f"algorithms={self.algorithms}: {sorted(unknown)} are none of {[*ONLINE, 'dpo']}"
            )


SAMPLES = {"num_iterations": 30, "sampling": SAMPLING}

config = Config(
    model=quickstart.config.model,
    sft=quickstart.config.sft,
    reward_model=quickstart.config.reward_model,
    ppo=quickstart.config.ppo,
    grpo=grpo.Config(
        batch_size=32,
        samples_per_prompt=4,
        num_epochs=4,
        num_minibatches=2,
        policy_optimizer=falling(3e-4),
        kl_coef=0.15,
        **SAMPLES,
    ),
    rloo=reinforce.Config(
        batch_size=32,
        samples_per_prompt=4,
        num_epochs=4,
        num_minibatches=2,
        policy_optimizer=falling(3e-4),
        kl_coef=0.15,
        **SAMPLES,
    ),
    raft=best_of_n.Config(
        batch_size=16,
        samples_per_prompt=8,
        num_epochs=1,
        policy_optimizer=falling(3e-4),
        **SAMPLES,
    ),
    online_dpo=online_dpo.Config(
        batch_size=64,
        samples_per_prompt=2,
        num_epochs=2,
        num_minibatches=2,
        policy_optimizer=falling(1e-4),
        beta=0.15,
        **SAMPLES,
    ),
    dpo=dpo.Config(num_steps=200, batch_size=64, optimizer=falling(1e-4), beta=0.15),
)


def run(config: Config, context: Context) -> dict:
    """Warms up once, trains with each algorithm from there, and measures all alike."""
    stages = {name: vars(config)[name] for name in config.algorithms}
    longest = quickstart.MAX_PROMPT + quickstart.MAX_RESPONSE
    pipeline.check(context, config.model, longest, **stages)
    data, clock = quickstart.make(config, context), pipeline.Clock()
    policy, scorer, summary = quickstart.warm_up(config, context, data, clock)
    exam = pipeline.exam(
        context, data.task, policy, scorer, SAMPLING, config.ppo.batch_size, seed=config.seed
    )
    summary["warm_up"] = measure(exam, data, policy, config.best_of)
    for name in config.algorithms:
        with clock(name):
            trained = train(config, context, data, policy, scorer, name)
        summary[name] = measure(exam, data, trained, config.best_of)
    rows = [
        {"algorithm": name, "minutes": clock.seconds.get(name, 0.0) / 60} | summary[name]
        for name in ("warm_up", *config.algorithms)
    ]
    context.log.table("Held-out prompts, side by side", rows)
    return summary | {"seconds": clock.seconds}


def train(
    config: Config, context: Context, data: quickstart.Data, policy: Model, scorer: Model, name: str
) -> Model:
    """The policy after one of the algorithms."""
    settings = vars(config)[name]
    if name == "dpo":
        return pipeline.supervised(
            dpo.run,
            functools.partial(dpo.evaluate, reference=policy),
            settings,
            context,
            data.task.tokenizer,
            policy,
            data.comparisons,
            stage=name,
            seed=config.seed,
        )[0]
    return pipeline.online(
        ONLINE[name].run,
        settings,
        context,
        data.task,
        policy,
        scorer,
        stage=name,
        seed=config.seed,
        **options(name, scorer),
    ).policy


def options(name: str, scorer: Model) -> dict:
    """What an algorithm is given besides policy and reward."""
    return {"ppo": {"critic": scorer}, "rloo": {"loss_fn": reinforce.clipped_loss}}.get(name, {})


def measure(exam: Exam, data: quickstart.Data, policy: Model, best_of: int) -> dict[str, float]:
    """Means over `best_of` answers to each held-out prompt."""
    answers = [evaluation.evaluate(exam, policy, number) for number in range(best_of)]
    found = [
        evaluation.figures(one)
        | {
            "grammatical": quickstart.share(data.made.grammatical, one.responses),
            "distinct_bigrams": evaluation.distinct_bigrams(one.responses),
        }
        for one in answers
    ]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def programs(config: Config, context: Context) -> list[Program]:
    """What `run` runs: see `abstract`."""
    length, mesh = quickstart.MAX_PROMPT + quickstart.MAX_RESPONSE, context.mesh
    warm, *held = quickstart.warm_up_programs(config, context)
    _, policy, scorer = held
    found = [*warm]
    for name in config.algorithms:
        settings = vars(config)[name]
        if name == "dpo":
            found += dpo.programs(settings, policy, length, mesh, resident=held).programs
            continue
        found += (
            ONLINE[name]
            .programs(
                settings,
                policy=policy,
                scorer=scorer,
                max_prompt=quickstart.MAX_PROMPT,
                ends=quickstart.ENDS,
                mesh=mesh,
                resident=held,
                **options(name, scorer),
            )
            .programs
        )
    batch = abstract.prompts(mesh, config.ppo.batch_size, quickstart.MAX_PROMPT)
    answers = evaluation.program(
        policy, policy, scorer, SAMPLING, batch, quickstart.ENDS, mesh, resident=held
    )
    return [*found, answers]


if __name__ == "__main__":
    launch(run, config, programs=programs)
