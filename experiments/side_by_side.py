"""Algorithms side by side: one warm start, one reward, equally many samples.

    python experiments/side_by_side.py --workdir runs/side_by_side

Every algorithm continues the policy and the reward model of the quickstart, on its task. The online
ones draw as many responses as its PPO does, and so does Q-learning, from the warm start and all at
once. DPO draws none: it reads the comparisons that the reward model was trained on. Settings are
one guess per algorithm, PPO's are the quickstart's.

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
    A2C           0.82, 0.82, 0.81   4.5, 4.9, 4.4
    MRT           0.78, 0.75, 0.66   9.2, 9.3, 15.6
    ESRL          0.82, 0.79, 0.80   4.8, 5.6, 5.5
    ESRL, random  0.84, 0.81, 0.83   4.7, 5.2, 5.1
    soft Q        0.84, 0.82, 0.82   4.3, 5.0, 4.2
    ILQL          0.81, 0.75, 0.81   5.1, 6.7, 5.4
"""

from __future__ import annotations

import functools

import quickstart

from rlhf_jax import abstract, evaluation, pipeline
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import (
    actor_critic,
    best_of_n,
    dpo,
    esrl,
    grpo,
    mrt,
    online_dpo,
    ppo,
    q_learning,
    reinforce,
)
from rlhf_jax.config import Draws, NonNegative
from rlhf_jax.evaluation import Exam
from rlhf_jax.launch import Context, launch
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import Sampling
from rlhf_jax.sampling.decode import Guide
from rlhf_jax.training.state import OptimizerConfig

# The online algorithms, each by the name of its settings in `Config`. RLOO is REINFORCE with the
# leave-one-out baseline, RAFT is fine-tuning on the best of n.
ONLINE = {
    "ppo": ppo,
    "grpo": grpo,
    "rloo": reinforce,
    "raft": best_of_n,
    "online_dpo": online_dpo,
    "a2c": actor_critic,
    "mrt": mrt,
    "esrl": esrl,
    "esrl_at_random": esrl,
}
# Those that learn action values from answers of the warm start, and decode by them.
BY_VALUE = {"ilql": q_learning.ILQL, "soft_q": q_learning.SOFT_Q_PATHS}
ALGORITHMS = (*ONLINE, "dpo", *BY_VALUE)
NUM_PROMPTS = 384  # to train on, of `reviews.make`
SAMPLING = Sampling(max_new_tokens=quickstart.MAX_RESPONSE)


def falling(learning_rate: float) -> OptimizerConfig:
    """Adam whose rate falls to a tenth."""
    return OptimizerConfig(learning_rate=learning_rate, schedule="linear", final_scale=0.1)


class ValueConfig(q_learning.Config):
    """Settings of Q-learning, and how much its values count in decoding."""

    guide_weight: NonNegative = 1.0  # of Q, beside log p


class Config(quickstart.Config):
    """The quickstart's settings, those of the other algorithms, and which of them are run."""

    algorithms: tuple[str, ...] = ALGORITHMS
    grpo: grpo.Config
    rloo: reinforce.Config
    raft: best_of_n.Config
    online_dpo: online_dpo.Config
    a2c: actor_critic.Config
    mrt: mrt.Config
    esrl: esrl.Config
    esrl_at_random: esrl.Config
    dpo: dpo.Config
    ilql: ValueConfig
    soft_q: ValueConfig
    answers: Draws = 10  # of the warm start to each training prompt, for Q-learning
    best_of: Draws = 4  # answers to each held-out prompt

    def check(self) -> None:
        """Raises ValueError for an algorithm that there is not, or that is named twice."""
        if unknown := set(self.algorithms) - {*ALGORITHMS}:
            raise ValueError(
                f"algorithms={self.algorithms}: {sorted(unknown)} are none of {list(ALGORITHMS)}"
            )
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError(f"algorithms={self.algorithms}: one is named twice; name it once")


SAMPLES = {"num_iterations": 30, "sampling": SAMPLING}
# The same number of samples for what makes one update per iteration.
MANY_UPDATES = {"num_iterations": 120, "sampling": SAMPLING}
ESRL = esrl.Config(
    batch_size=8,
    samples_per_prompt=4,
    train_responses=16,
    policy_optimizer=falling(3e-4),
    kl_coef=0.15,
    **MANY_UPDATES,
)

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
    a2c=actor_critic.Config(
        batch_size=32,
        policy_optimizer=falling(3e-4),
        critic_optimizer=falling(1e-3),
        kl_coef=0.15,
        missing_eos_penalty=1.0,
        whiten_advantages=True,
        **MANY_UPDATES,
    ),
    mrt=mrt.Config(
        batch_size=16,
        samples_per_prompt=8,
        num_minibatches=2,
        policy_optimizer=falling(3e-4),
        alpha=0.05,
        **SAMPLES,
    ),
    esrl=ESRL,
    esrl_at_random=ESRL,
    dpo=dpo.Config(num_steps=200, batch_size=64, optimizer=falling(1e-4), beta=0.15),
    ilql=ValueConfig(
        num_steps=300,
        batch_size=8,
        optimizer=falling(3e-4),
        monte_carlo=0.9,
        cql_weight=0.003,
        guide_weight=8.0,
    ),
    soft_q=ValueConfig(
        num_steps=300, batch_size=8, optimizer=falling(3e-4), beta=0.15, guide_weight=1 / 0.15
    ),
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
            trained, guide = train(config, context, data, policy, scorer, name)
        summary[name] = measure(exam, data, trained, config.best_of, guide)
    rows = [
        {"algorithm": name, "minutes": clock.seconds.get(name, 0.0) / 60} | summary[name]
        for name in ("warm_up", *config.algorithms)
    ]
    context.log.table("Held-out prompts, side by side", rows)
    return summary | {"seconds": clock.seconds}


def train(
    config: Config, context: Context, data: quickstart.Data, policy: Model, scorer: Model, name: str
) -> tuple[Model, Guide | None]:
    """The policy after one of the algorithms, and the action values that guide it if there are."""
    settings = vars(config)[name]
    if name in BY_VALUE:
        return policy, action_values(config, context, data, policy, scorer, name)
    if name == "dpo":
        trained, _ = pipeline.supervised(
            dpo.run,
            functools.partial(dpo.evaluate, reference=policy),
            settings,
            context,
            data.task.tokenizer,
            policy,
            data.comparisons,
            stage=name,
            seed=config.seed,
        )
        return trained, None
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
    ).policy, None


def action_values(
    config: Config, context: Context, data: quickstart.Data, policy: Model, scorer: Model, name: str
) -> Guide:
    """What Q-learning makes of answers of the policy to the training prompts."""
    settings, size = vars(config)[name], config.ppo.batch_size
    found = pipeline.from_answers(
        q_learning.run,
        settings,
        context,
        data.task,
        policy,
        pipeline.exam(context, data.task, policy, scorer, SAMPLING, size, seed=config.seed),
        answers=config.answers,
        length=quickstart.MAX_PROMPT + quickstart.MAX_RESPONSE,
        stage=name,
        seed=config.seed,
        method=BY_VALUE[name],
    )
    return Guide(found.network, settings.guide_weight)


def options(name: str, scorer: Model) -> dict:
    """What an algorithm is given besides policy and reward."""
    given = {
        "ppo": {"critic": scorer},
        "a2c": {"critic": scorer},
        "rloo": {"loss_fn": reinforce.clipped_loss},
        "esrl_at_random": {"priority": esrl.at_random},
    }
    return given.get(name, {})


def measure(
    exam: Exam, data: quickstart.Data, policy: Model, best_of: int, guide: Guide | None = None
) -> dict[str, float]:
    """Means over `best_of` answers to each held-out prompt."""
    answers = [evaluation.evaluate(exam, policy, number, guide=guide) for number in range(best_of)]
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
    warm, *held = quickstart.warm_up_programs(config, context)
    found = [*warm, answering(config, context, held)]
    for name in config.algorithms:
        found += abstract.of_stage(name, programs_of(config, context, held, name))
    return found


def programs_of(config: Config, context: Context, held: list[Model], name: str) -> list[Program]:
    """What one of the algorithms runs; `held` are the new model, the policy and the scorer."""
    settings, (_, policy, scorer) = vars(config)[name], held
    length = quickstart.MAX_PROMPT + quickstart.MAX_RESPONSE
    if name == "dpo":
        return dpo.programs(settings, policy, length, context.mesh, resident=held).programs
    if name in BY_VALUE:
        method = {"responses": config.answers, "method": BY_VALUE[name]}
        stage = q_learning.programs(settings, policy, length, context.mesh, resident=held, **method)
        guide = Guide(stage.result, settings.guide_weight)
        return [*stage.programs, answering(config, context, held, guide)]
    number = {"num_prompts": NUM_PROMPTS} if ONLINE[name] is esrl else {}
    stage = ONLINE[name].programs(
        settings,
        policy=policy,
        scorer=scorer,
        max_prompt=quickstart.MAX_PROMPT,
        ends=quickstart.ENDS,
        mesh=context.mesh,
        resident=held,
        **number,
        **options(name, scorer),
    )
    return stage.programs


def answering(
    config: Config, context: Context, held: list[Model], guide: Guide | None = None
) -> Program:
    """What draws answers, here and for Q-learning."""
    _, policy, scorer = held
    batch = abstract.prompts(context.mesh, config.ppo.batch_size, quickstart.MAX_PROMPT)
    return evaluation.program(
        policy,
        policy,
        scorer,
        SAMPLING,
        batch,
        quickstart.ENDS,
        context.mesh,
        guide=guide,
        resident=held,
    )


if __name__ == "__main__":
    launch(run, config, programs=programs)
