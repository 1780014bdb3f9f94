"""Advantage actor-critic on tokens (A2C; Mnih et al. 2016, arXiv:1602.01783), without PPO's clips.

The rewards, values and advantages are those of PPO (`ppo.make_batch`), and so is the critic. The
loss is the policy gradient as it stands:

    -mean(A_t log p_t) + value_coef mean((V_t - G_t)^2 / 2) - entropy_coef mean(H_t)

each a mean over the tokens of the minibatch. Its first update has the gradient of `ppo.loss`; after
that the responses are no longer those of the policy. PPO answers with ratios and clips, A2C with
one update per iteration. `reuse_responses` allows more, so that the claim can be tested that it is
the clips that keep PPO stable.

Samplers that are not the policy are refused, or weighted token by token, as in PPO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import jax.numpy as jnp

from rlhf_jax import abstract, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import Count, NonNegative
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "Actor-critic",
    online.HEADLINE,
    {**online.CURVES, "loss/value_avg": "Value loss", "loss": "Loss"},
)


class Config(ppo.CriticConfig):
    """Settings of an A2C run; one update per iteration, advantages as they are."""

    num_epochs: Count = 1
    whiten_advantages: bool = False
    entropy_coef: NonNegative = 0.0  # reward per nat of the entropy of a token
    # Allows several updates per iteration, of which only the first is the policy gradient.
    reuse_responses: bool = False

    def check(self) -> None:
        """Raises ValueError for several updates per iteration that were not asked for."""
        super().check()
        updates = self.num_epochs * self.num_minibatches
        if updates > 1 and not self.reuse_responses:
            raise ValueError(
                f"num_epochs * num_minibatches = {updates} updates per iteration, but the policy "
                "gradient holds for the first only; use ppo, or set reuse_responses=True"
            )


def loss(config: Config, params: dict, batch: ppo.Batch):
    """Policy gradient, value loss and entropy bonus, each a mean over the tokens."""
    logprobs, values, entropy = online.forward(config, params, batch, entropy_gradient=True)
    policy_loss = losses.masked_mean(-batch.advantages * logprobs, batch.mask)
    value_loss = losses.masked_mean(0.5 * jnp.square(values - batch.returns), batch.value_mask)
    mean_entropy = losses.masked_mean(entropy, batch.mask)
    metrics = {
        **on_policy.drift(batch, logprobs),
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        "policy/entropy_avg": mean_entropy,
    }
    total = policy_loss + config.value_coef * value_loss - config.entropy_coef * mean_entropy
    return total, metrics


def algorithm(make_batch: Callable = ppo.make_batch, loss_fn: Callable = loss) -> online.Algorithm:
    """A2C as `online` runs it."""
    return ppo.algorithm(make_batch, loss_fn)._replace(name="actor_critic", display=DISPLAY)


def run(
    config: Config,
    *,
    make_batch: Callable = ppo.make_batch,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> ppo.Result:
    """Trains `policy` on a reward, with a KL penalty to where it starts; see `online.Inputs`.

    `critic`, a model with a scalar head and usually the reward model, starts the value network.
    """
    trained, history = online.run(config, algorithm(make_batch, loss_fn), **inputs)
    return ppo.Result(trained["policy"], trained.get("critic"), history)


def programs(
    config: Config,
    *,
    make_batch: Callable = ppo.make_batch,
    loss_fn: Callable = loss,
    **shapes: Unpack[abstract.Inputs],
) -> Stage:
    """What `run` runs; `result` is the trained policy."""
    return abstract.online(config, algorithm(make_batch, loss_fn), **shapes)
