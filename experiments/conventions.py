"""PPO by the conventions of TRL, OpenRLHF, verl and InstructGPT, from one warm start.

    python experiments/conventions.py --workdir runs/conventions

Each of the `ppo_presets` continues the policy and the reward model of the quickstart, on its task.
All draw as many responses in as many iterations, with the quickstart's learning rates and with the
reward model as the first critic. What else differs is the preset's own: the coefficient and the
bounds of the KL, where the score is paid, whitening, lambda, clips, epochs and minibatches. So the
presets also differ in how many updates they make of the same samples.

The workdir then holds `conventions.png`: gold score and KL by iteration, a curve for each preset.
With several seeds a curve is their mean, and a band shows the lowest and the highest:

    for seed in 0 1 2; do
        python experiments/conventions.py --seed $seed --workdir runs/conventions$seed
    done
    rlhf-jax-plot docs/conventions.png runs/conventions0 runs/conventions1 runs/conventions2 \\
        --stages trl openrlhf verl instructgpt

Result on 2 cores of an Intel Xeon, 2026-11-26, seeds 0, 1, 2, with 4 answers to each of the 128
held-out prompts (the warm start has a gold score of 0.42, 0.40, 0.42):

                   updates   gold               KL, nats per response   distinct bigrams
    TRL            120       0.82, 0.80, 0.81   7.7, 8.9, 8.3           0.13, 0.11, 0.13
    OpenRLHF       30        0.81, 0.78, 0.80   6.1, 6.6, 6.6           0.16, 0.16, 0.16
    verl           30        0.82, 0.74, 0.80   6.3, 7.1, 6.2           0.15, 0.15, 0.17
    InstructGPT    240       0.77, 0.76, 0.66   11.2, 12.1, 19.8        0.10, 0.09, 0.08

At these learning rates the number of updates tells most: with eight minibatches and a KL
coefficient of 0.02 the reward ends highest (2.6 to 3.2, against 2.2 to 2.7 with 30 updates), the
gold score turns after ten iterations and the responses become alike. One update per iteration
learns more slowly and drifts less, even without any KL (verl).
"""

from __future__ import annotations

import quickstart
import side_by_side

from rlhf_jax import abstract, evaluation, pipeline, processes
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import ppo, ppo_presets
from rlhf_jax.algorithms.ppo_presets import Preset
from rlhf_jax.config import Draws
from rlhf_jax.launch import Context, launch
from rlhf_jax.tools import plot

# By the name of their settings in `Config`, which is also that of their stage in the log.
PRESETS = {
    "trl": ppo_presets.trl,
    "openrlhf": ppo_presets.openrlhf,
    "verl": ppo_presets.verl,
    "instructgpt": ppo_presets.instructgpt,
}
# What presets leave open, and what the policies are examined with.
GIVEN = quickstart.config.ppo


def completed(preset: Preset) -> ppo.Config:
    """The preset's settings with the quickstart's samples and learning rates."""
    return preset.config(
        num_iterations=GIVEN.num_iterations,
        batch_size=GIVEN.batch_size,
        sampling=GIVEN.sampling,
        policy_optimizer=GIVEN.policy_optimizer,
        critic_optimizer=GIVEN.critic_optimizer,
    )


class Config(quickstart.WarmUp):
    """The quickstart's warm start, the settings of the presets, and which of them are run."""

    presets: tuple[str, ...] = tuple(PRESETS)
    trl: ppo_presets.TrlConfig = completed(ppo_presets.trl)
    openrlhf: ppo_presets.OpenRlhfConfig = completed(ppo_presets.openrlhf)
    verl: ppo_presets.VerlConfig = completed(ppo_presets.verl)
    instructgpt: ppo_presets.InstructGptConfig = completed(ppo_presets.instructgpt)
    best_of: Draws = 4  # answers to each held-out prompt

    def check(self) -> None:
        """Raises ValueError for a preset that there is not, for one named twice, or for none."""
        named = set(self.presets)
        if not named or named - PRESETS.keys() or len(named) < len(self.presets):
            raise ValueError(f"presets={self.presets}: name one or several of {[*PRESETS]}, once")


config = Config(
    model=quickstart.config.model,
    sft=quickstart.config.sft,
    reward_model=quickstart.config.reward_model,
)


def run(config: Config, context: Context) -> dict:
    """Warms up once, trains by each preset from there, measures all alike and draws the curves."""
    stages = {name: vars(config)[name] for name in config.presets}
    pipeline.check(
        context,
        config.model,
        quickstart.MAX_PROMPT + max(x.sampling.max_new_tokens for x in stages.values()),
        sft=config.sft,
        reward_model=config.reward_model,
        **stages,
    )
    data, clock, seed = quickstart.make(config, context), pipeline.Clock(), config.seed
    policy, scorer, summary = quickstart.warm_up(config, context, data, clock)
    exam = pipeline.exam(
        context, data.task, policy, scorer, GIVEN.sampling, GIVEN.batch_size, seed=seed
    )
    summary["warm_up"] = side_by_side.measure(exam, data, policy, config.best_of)
    for name, settings in stages.items():
        with clock(name):
            trained = pipeline.online(
                ppo.run,
                settings,
                context,
                data.task,
                policy,
                scorer,
                stage=name,
                seed=seed,
                critic=scorer,
                **PRESETS[name].functions,
            ).policy
        summary[name] = side_by_side.measure(exam, data, trained, config.best_of)
    rows = [
        {"preset": name, "minutes": clock.seconds.get(name, 0.0) / 60} | summary[name]
        for name in ("warm_up", *stages)
    ]
    context.log.table("Held-out prompts, preset by preset", rows)
    folder = context.workdir
    figure = (str(folder / "conventions.png"), (str(folder),), config.presets)
    processes.first(lambda: plot.plot(*figure))  # the log, which it reads, is that of process 0
    return summary | {"seconds": clock.seconds}


def programs(config: Config, context: Context) -> list[Program]:
    """What `run` runs: see `abstract`."""
    mesh = context.mesh
    warm, *held = quickstart.warm_up_programs(config, context)
    _, policy, scorer = held
    found = [*warm]
    for name in config.presets:
        stage = ppo.programs(
            vars(config)[name],
            policy=policy,
            scorer=scorer,
            critic=scorer,
            max_prompt=quickstart.MAX_PROMPT,
            ends=quickstart.ENDS,
            mesh=mesh,
            resident=held,
            **PRESETS[name].functions,
        )
        found += abstract.of_stage(name, stage.programs)
    batch = abstract.prompts(mesh, GIVEN.batch_size, quickstart.MAX_PROMPT)
    answers = evaluation.program(
        policy, policy, scorer, GIVEN.sampling, batch, quickstart.ENDS, mesh, resident=held
    )
    return [*found, answers]


if __name__ == "__main__":
    launch(run, config, programs=programs)
