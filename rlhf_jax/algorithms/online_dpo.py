"""Online DPO: of the responses that the policy samples itself, the best is preferred to the worst.

Guo et al. 2024 (arXiv:2402.04792): a judge, here a reward, compares two responses to each prompt,
and the pair goes through the loss of DPO at once. Of K > 2 responses the best and the worst make
the pair. Where their scores are equal there is no pair. `online` runs the iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, losses, on_policy, online, preference_losses
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, NonNegative, Positive
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training import state as training
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "Online DPO",
    online.HEADLINE,
    {
        **online.CURVES,
        "objective/scores_margin": "Score of the best response minus that of the worst",
        "rewards/accuracies": "Accuracy of the implicit reward",
        "loss": "Loss",
    },
)


class Config(online.Config):
    """Settings of an online DPO run; beta, the epochs and two samples default to TRL 1.x's."""

    samples_per_prompt: Count = 2  # of which the best and the worst are compared
    num_epochs: Count = 1
    policy_optimizer: training.OptimizerConfig = training.OptimizerConfig(learning_rate=1e-6)
    beta: Positive = 0.1  # reward per nat of log-ratio to the reference
    missing_eos_penalty: NonNegative = 0.0  # subtracted from the score of a response without EOS

    def check(self) -> None:
        """Raises ValueError for a single sample, and for sizes that do not divide each other."""
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt={self.samples_per_prompt} leaves nothing to compare; online "
                "DPO takes the best and the worst of 2 responses or more"
            )
        super().check()
        if self.batch_size % self.num_minibatches:
            raise ValueError(
                f"batch_size={self.batch_size} pairs per iteration, one of each prompt, are not a "
                f"multiple of num_minibatches={self.num_minibatches}"
            )
        if self.rows_per_minibatch % self.micro_batches:
            raise ValueError(
                f"a minibatch of {self.rows_per_minibatch} responses, two of each prompt, is not a "
                f"multiple of micro_batches={self.micro_batches}"
            )

    @property
    def rows_per_minibatch(self) -> int:
        """Responses that one update reads: the two of each pair."""
        return 2 * self.batch_size // self.num_minibatches

    def row_counts(self) -> dict[str, int]:
        """The numbers of rows that must divide over a mesh: responses that are sampled, and pairs.

        Micro-batches too: with fewer rows than devices they save no memory and cost more time.
        """
        return {
            "batch_size * samples_per_prompt": self.num_responses,
            "batch_size / num_minibatches": self.batch_size // self.num_minibatches,
            "minibatch_size / micro_batches": self.rows_per_minibatch // self.micro_batches,
        }


class Batch(NamedTuple):
    """The best and the worst response to each prompt, in this order; a pair stays together."""

    tokens: Int[Array, "B 2 T"]
    attend: Int[Array, "B 2 T"]
    mask: Float[Array, "B 2 T"]
    old_logprobs: Float[Array, "B 2 T"]
    ref_logps: Float[Array, "B 2"]  # the reference's log p(y|x), nats per response
    decided: Float[Array, " B"]  # 1 where the best has the higher score, 0 where both are alike


def loss(config: Config, params: dict, batch: Batch):
    """Mean over the decided pairs of -log sigmoid(reward of the best - reward of the worst), nats.

    The reward is beta * (log p(y|x) - log p_ref(y|x)): DPO, arXiv:2305.18290, eq. 7.
    """
    ratios, metrics = log_ratios(config, params, batch)
    gap = config.beta * (ratios[:, 0] - ratios[:, 1])
    return losses.masked_mean(preference_losses.sigmoid_loss(gap), batch.decided), metrics


def log_ratios(
    config: Config, params: dict, batch: Batch
) -> tuple[Float[Array, "B 2"], dict[str, Array]]:
    """(log p(y|x) - log p_ref(y|x) of best and worst, nats per response; metrics).

    For `loss`, or for a loss of your own. The log-probabilities are at the sampling temperature, as
    the reference's are.
    """
    length = batch.tokens.shape[-1]
    rows = {name: getattr(batch, name).reshape(-1, length) for name in ("tokens", "attend")}
    logprobs, _, entropy = online.forward(config, params, batch._replace(**rows))
    logprobs, entropy = (x.reshape(batch.mask.shape) for x in (logprobs, entropy))
    logps = losses.masked_sum(logprobs, batch.mask, axis=2)
    ratios = logps - batch.ref_logps
    pairs = batch.decided[:, None, None] * jnp.array([[0.0, 1.0], [0.0, 0.0]])
    metrics = {
        **preference_losses.pair_metrics(config.beta * ratios, pairs),
        **preference_losses.sides("logps", logps, pairs),
        **on_policy.drift(batch, logprobs),
        "policy/entropy_avg": losses.masked_mean(entropy, batch.mask),
    }
    return ratios, metrics


def make_batch(config: Config, params: dict, memory: Any, rollout: Rollout):
    """The best and the worst response to each prompt: (Batch, memory, metrics).

    Of several responses with the same score the first one counts.
    """
    del params
    scores = rollout.scores - config.missing_eos_penalty * (1.0 - rollout.finished)
    # The responses to a prompt stand in consecutive rows.
    grouped = scores.reshape(config.batch_size, config.samples_per_prompt)
    picked = jnp.stack([jnp.argmax(grouped, axis=1), jnp.argmin(grouped, axis=1)], axis=1)
    first = config.samples_per_prompt * jnp.arange(config.batch_size)
    rows = first[:, None] + picked
    margin = jnp.max(grouped, axis=1) - jnp.min(grouped, axis=1)
    batch = Batch(
        tokens=rollout.tokens[rows],
        attend=rollout.attend[rows],
        mask=rollout.mask[rows],
        old_logprobs=rollout.old_logprobs[rows],
        ref_logps=losses.masked_sum(rollout.ref_logprobs, rollout.mask, axis=1)[rows],
        decided=jnp.sign(margin),  # NaN where a score is, so that the run stops
    )
    metrics = {
        "objective/scores": jnp.mean(scores),
        "objective/raw_scores": jnp.mean(rollout.scores),
        "objective/scores_margin": jnp.mean(margin),
        "objective/ties": jnp.mean(margin == 0),
    }
    return batch, memory, metrics


def algorithm(make_batch: Callable = make_batch, loss_fn: Callable = loss) -> online.Algorithm:
    """Online DPO as `online` runs it; its loss compares responses, whatever drew them."""
    return online.Algorithm(
        "online_dpo", DISPLAY, online.policy_alone, make_batch, loss_fn, any_sampler=True
    )


def run(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> online.Result:
    """Trains `policy` on a reward, compared with where it starts; see `online.Inputs`."""
    trained, history = online.run(config, algorithm(make_batch, loss_fn), **inputs)
    return online.Result(trained["policy"], history)


def programs(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **shapes: Unpack[abstract.Inputs],
) -> Stage:
    """What `run` runs; `result` is the trained policy."""
    return abstract.online(config, algorithm(make_batch, loss_fn), **shapes)
