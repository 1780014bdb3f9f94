"""The settings that every online run has, and how its prompts lie on a mesh."""

from __future__ import annotations

import jax

from rlhf_jax import on_policy, sharding
from rlhf_jax.config import Count, Decay, Positive, Seed, Whole
from rlhf_jax.sampling.settings import Sampling
from rlhf_jax.training import state as training


class Config(training.StageConfig):
    """Settings of every online run."""

    num_iterations: Count = 100
    batch_size: Count = 64  # prompts per iteration
    samples_per_prompt: Count = 1  # responses to each prompt
    num_epochs: Count = 4  # passes over the responses of an iteration
    num_minibatches: Count = 1  # updates per pass
    micro_batches: Count = 1  # slices of a forward pass, to save memory; the loss is the same
    sampling: Sampling = Sampling()
    policy_optimizer: training.OptimizerConfig = training.OptimizerConfig(learning_rate=3e-5)
    max_sampler_gap: Positive = 0.05  # mean |sampler - loss| log-probability in bfloat16, nats
    # Where filters, penalties or processors make the sampler another distribution than the policy.
    off_policy: on_policy.Correction = "refuse"
    max_weight: Positive = 2.0  # of policy / sampler, with off_policy="weight"
    # The policy that is evaluated and returned is the exponential average of the policies after
    # each iteration, with this decay. None: the last one.
    ema_decay: Decay | None = None
    reward_timeout: Positive | None = None  # seconds a reward in Python may take per iteration
    save_every: Count = 25  # iterations between checkpoints
    eval_every: Whole = 0  # iterations between evaluations; 0 is never
    seed: Seed = 0

    def check(self) -> None:
        """Raises ValueError for sizes that do not divide each other and for greedy sampling."""
        self.check_best(self.eval_every)
        for name, optimizer in self.optimizers().items():
            training.check_warmup(optimizer, self.num_updates, f"{name}_optimizer")
        responses, parts = self.num_responses, self.num_minibatches
        if responses % parts:
            raise ValueError(
                f"{responses} responses per iteration (batch_size * samples_per_prompt) are not a "
                f"multiple of num_minibatches={parts}"
            )
        if responses // parts % self.micro_batches:
            raise ValueError(
                f"a minibatch of {responses // parts} responses is not a multiple of "
                f"micro_batches={self.micro_batches}"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 is greedy: nothing would be explored")

    @property
    def num_responses(self) -> int:
        """Responses per iteration."""
        return self.batch_size * self.samples_per_prompt

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.num_iterations * self.num_epochs * self.num_minibatches

    def row_counts(self) -> dict[str, int]:
        """The numbers of rows that must divide over a mesh: responses, not prompts.

        Micro-batches too: with fewer rows than devices they save no memory and cost more time.
        """
        name = "batch_size" if self.samples_per_prompt == 1 else "batch_size * samples_per_prompt"
        minibatch = self.num_responses // self.num_minibatches
        return {
            name: self.num_responses,
            "minibatch_size": minibatch,
            "minibatch_size / micro_batches": minibatch // self.micro_batches,
        }

    def optimizers(self) -> dict[str, training.OptimizerConfig]:
        """The optimizer of each network that may be trained."""
        return {"policy": self.policy_optimizer}


class GroupConfig(Config):
    """Settings of an algorithm that compares the responses to a prompt.

    Its batches have a leading axis of groups, the K responses to each prompt, and a minibatch is a
    random part of the groups.
    """

    @property
    def num_groups(self) -> int:
        """Groups per iteration that are trained on."""
        return self.batch_size

    @property
    def rows_per_minibatch(self) -> int:
        """Responses that one update reads."""
        return self.num_groups // self.num_minibatches * self.samples_per_prompt

    def check(self) -> None:
        """Raises ValueError for groups of one response, or for sizes that do not divide."""
        super().check()
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt={self.samples_per_prompt} must be at least 2: the responses "
                "to a prompt are compared"
            )
        if self.num_groups % self.num_minibatches:
            raise ValueError(
                f"{self.num_groups} groups per iteration, which stay together, are not a multiple "
                f"of num_minibatches={self.num_minibatches}"
            )
        if self.rows_per_minibatch % self.micro_batches:
            raise ValueError(
                f"a minibatch of {self.rows_per_minibatch} responses is not a multiple of "
                f"micro_batches={self.micro_batches}"
            )

    def row_counts(self) -> dict[str, int]:
        """The numbers of rows that must divide over a mesh: responses that are sampled, and groups.

        Micro-batches too: with fewer rows than devices they save no memory and cost more time.
        """
        return {
            "batch_size * samples_per_prompt": self.num_responses,
            "groups per minibatch": self.num_groups // self.num_minibatches,
            "minibatch_size / micro_batches": self.rows_per_minibatch // self.micro_batches,
        }


def prompt_rows(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Rows that hold the prompts of an iteration: a multiple of `batch_size`.

    A prompt in one row is read once for all of its samples. Where the mesh does not divide the
    prompts each takes as few rows as make it divide them; it always divides the responses.
    """
    sharding.check_rows(mesh, **config.row_counts())
    shards = sharding.row_shards(mesh)
    copies = (
        n for n in range(1, config.samples_per_prompt + 1) if not config.samples_per_prompt % n
    )
    return next(config.batch_size * n for n in copies if not config.batch_size * n % shards)
