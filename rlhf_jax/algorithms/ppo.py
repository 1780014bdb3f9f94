"""Clipped PPO against a reward, with a KL penalty to a reference (arXiv:1707.06347, 2203.02155).

The policy acts token by token: the state is the prompt and the response so far, an action is a
token, and the score comes with the last one. `online` runs the iterations.

Its gradient assumes that the policy itself was sampled. With `off_policy="weight"` advantages are
weighted token by token (`on_policy.weights`), which corrects penalties but for the bound on the
weights and the distribution of prefixes; filters leave the gradient over the tokens that they keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, advantages, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.config import NonNegative, Positive, Share
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling.rollout import Outputs, Rollout
from rlhf_jax.training import state as training
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "PPO",
    online.HEADLINE,
    {
        **online.CURVES,
        "loss/value_avg": "Value loss",
        "policy/clipfrac_avg": "Policy clip fraction",
        "loss": "Loss",
    },
)


class CriticConfig(online.Config):
    """Settings of runs with a critic: rewards per token, advantages, and the value loss's weight.

    GAE, value and KL coefficients default to TRL 1.x's. With `kl_target` the KL coefficient is
    adapted (Ziegler et al. 2019).
    """

    critic_optimizer: training.OptimizerConfig = training.OptimizerConfig(learning_rate=1e-4)
    discount: Share = 1.0
    gae_lambda: Share = 0.95
    value_coef: NonNegative = 0.1
    kl_coef: NonNegative = 0.05  # reward subtracted per nat of KL
    kl_target: Positive | None = None  # nats per response
    kl_horizon: Positive = 10000.0  # responses over which the coefficient is adapted
    score_at: Literal["last", "after_eos"] = "last"  # see advantages.shaped_rewards
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    normalise_scores: bool = False  # by the running mean and standard deviation of all scores
    missing_eos_penalty: NonNegative = 0.0  # subtracted from the score of a response without EOS
    shared_critic: bool = False  # a scalar head on the policy's trunk, not a network of its own

    def optimizers(self) -> dict[str, training.OptimizerConfig]:
        """One for each network; a shared critic is trained with the policy."""
        return {"policy": self.policy_optimizer, "critic": self.critic_optimizer}


class Config(CriticConfig):
    """Settings of a PPO run; clipping and epochs default to TRL 1.x's too."""

    clip_eps: NonNegative = 0.2
    value_clip_eps: NonNegative = 0.2


class Batch(NamedTuple):
    """What the loss of one minibatch reads; fixed for all epochs of an iteration."""

    tokens: Int[Array, "B T"]
    attend: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    # `mask`, and the position after EOS if the score is paid there.
    value_mask: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


class Memory(NamedTuple):
    """What PPO carries from one iteration to the next besides its networks."""

    kl_factor: Float[Array, ""]  # the adapted KL coefficient is kl_coef * kl_factor
    scores: training.RunningMoments


# With the unbiased variance, as TRL and verl do.
whiten = functools.partial(losses.masked_whiten, unbiased=True)


class Result(NamedTuple):
    """The trained policy and critic (None if shared) and the metrics of each iteration run here."""

    policy: Model
    critic: Model | None
    history: list[dict[str, Any]]


def loss(config: Config, params: dict, batch: Batch):
    """Clipped policy loss + value_coef * clipped value loss, each a mean over the tokens."""
    return loss_of(config, batch, online.forward(config, params, batch))


def loss_of(config: Config, batch: Batch, outputs: Outputs, dual_clip: losses.Scalar | None = None):
    """`loss` of what `online.forward` returned, for a loss of your own that adds to it.

    dual_clip: see `losses.clipped_policy_loss`.
    """
    logprobs, values, entropy = outputs
    policy_loss = losses.masked_mean(
        losses.clipped_policy_loss(
            logprobs=logprobs,
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            clip_eps=config.clip_eps,
            dual_clip=dual_clip,
        ),
        batch.mask,
    )
    value_loss = losses.masked_mean(
        losses.clipped_value_loss(
            values=values,
            old_values=batch.old_values,
            returns=batch.returns,
            clip_eps=config.value_clip_eps,
        ),
        batch.value_mask,
    )
    metrics = {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        **diagnostics(config, batch, logprobs, values, entropy),
    }
    return policy_loss + config.value_coef * value_loss, metrics


def diagnostics(
    config: Config,
    batch: Batch,
    logprobs: Float[Array, "B T"],
    values: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    clip_eps_high: losses.Scalar | None = None,
) -> dict[str, Array]:
    """Metrics of one minibatch for a PPO loss, or for a loss of your own.

    `clip_eps_high` is the upper clip where it is not `config.clip_eps`. If a loss reports
    "policy/approxkl_avg", the run also checks that it starts each iteration at ratio 1.
    """
    ratio = jnp.exp(logprobs - batch.old_logprobs)
    # As in lm-human-preferences and TRL a token counts as clipped only where that raises its loss.
    high = config.clip_eps if clip_eps_high is None else clip_eps_high
    bounded = jnp.clip(ratio, 1.0 - config.clip_eps, 1.0 + high)
    clipped = bounded * batch.advantages < ratio * batch.advantages
    eps = config.value_clip_eps
    bounded_values = batch.old_values + jnp.clip(values - batch.old_values, -eps, eps)
    value_clipped = jnp.abs(bounded_values - batch.returns) > jnp.abs(values - batch.returns)
    return {
        **on_policy.drift(batch, logprobs),
        "policy/clipfrac_avg": losses.masked_mean(clipped, batch.mask),
        "policy/entropy_avg": losses.masked_mean(entropy, batch.mask),
        "val/clipfrac_avg": losses.masked_mean(value_clipped, batch.value_mask),
    }


def make_batch(
    config: CriticConfig,
    params: dict,
    memory: Memory,
    rollout: Rollout,
    *,
    kl_estimate: Callable[..., Array] = losses.kl_k1,
    pay: Callable[..., Array] = advantages.shaped_rewards,
    whiten: Callable[..., Array] = whiten,
):
    """Rewards, values, advantages and returns of a rollout: (Batch, Memory, metrics).

    Per token r_t = -kl_coef * KL estimate, plus the score at `score_at`; then GAE. Whitened rewards
    keep their mean. `kl_estimate`, `pay` and `whiten` are functions like their defaults.
    """
    mask = rollout.mask
    value_mask = advantages.extend_after_eos(mask) if config.score_at == "after_eos" else mask
    kl = kl_estimate(logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs)
    kl_coef = config.kl_coef * memory.kl_factor
    moments = memory.scores.push(rollout.scores)
    scores = rollout.scores
    if config.normalise_scores:
        scores = (scores - moments.mean) / (moments.std + 1e-8)
    scores = scores - config.missing_eos_penalty * (1.0 - rollout.finished)
    rewards = pay(scores=scores, kl=kl, mask=mask, kl_coef=kl_coef, score_at=config.score_at)
    if config.whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False)
    old_values = rollout.values * value_mask
    estimates, returns = advantages.gae(
        rewards=rewards,
        values=old_values,
        mask=value_mask,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
    )
    if config.whiten_advantages:
        estimates = whiten(estimates, mask)
    batch = Batch(
        tokens=rollout.tokens,
        attend=rollout.attend,
        mask=mask,
        value_mask=value_mask,
        old_logprobs=rollout.old_logprobs,
        old_values=old_values,
        advantages=estimates * mask * on_policy.weights(config, rollout),
        returns=returns,
    )
    response_kl = jnp.sum(kl * mask, axis=1)
    # As in TRL the scores that the rewards hold: rlhf_reward = scores + non_score_reward.
    metrics = {
        "objective/scores": jnp.mean(scores),
        "objective/raw_scores": jnp.mean(rollout.scores),
        "objective/non_score_reward": jnp.mean(-kl_coef * response_kl),
        "objective/rlhf_reward": jnp.mean(scores - kl_coef * response_kl),
        "objective/kl_coef": kl_coef,
        "val/explained_variance": _explained_variance(old_values, returns, value_mask),
    }
    factor = adapted_kl_factor(config, memory.kl_factor, jnp.mean(response_kl))
    return batch, Memory(factor, moments), metrics


def _explained_variance(values, returns, mask):
    """1 - Var(G - V) / Var(G) over the mask."""

    def variance(x):
        return losses.masked_mean(jnp.square(x - losses.masked_mean(x, mask)), mask)

    return 1.0 - variance(returns - values) / (variance(returns) + 1e-8)


def adapted_kl_factor(config: CriticConfig, factor, kl):
    """factor * (1 + clip(KL / target - 1, +-0.2) * n / horizon); Ziegler et al. 2019, section 2.2.

    n is the number of responses per iteration. Without `kl_target` the factor does not change.
    """
    if config.kl_target is None:
        return factor
    error = jnp.clip(kl / config.kl_target - 1.0, -0.2, 0.2)
    return factor * (1.0 + error * config.num_responses / config.kl_horizon)


def networks(config: CriticConfig, policy: Model, critic: Model | None) -> dict[str, Model]:
    """What is trained. Without `critic` (or with `shared_critic`) values start at exactly 0.

    Raises ValueError for a `critic` together with `shared_critic`, which would not use it.
    """
    if config.shared_critic:
        if critic is not None:
            raise ValueError("critic= does nothing with shared_critic=True; leave one of them out")
        headed = transformer.has_score_head(policy)
        return {"policy": policy if headed else transformer.with_score_head(policy, None)}
    if critic is None:
        critic = transformer.with_score_head(transformer.without_lm_head(policy), None)
    return {"policy": policy, "critic": critic}


def algorithm(make_batch: Callable = make_batch, loss_fn: Callable = loss) -> online.Algorithm:
    """PPO as `online` runs it."""
    memory = Memory(jnp.float32(1.0), training.RunningMoments.empty())
    return online.Algorithm("ppo", DISPLAY, networks, make_batch, loss_fn, memory)


def run(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> Result:
    """Trains `policy` on a reward, with a KL penalty to where it starts; see `online.Inputs`.

    `critic`, a model with a scalar head and usually the reward model, starts the value network.
    """
    trained, history = online.run(config, algorithm(make_batch, loss_fn), **inputs)
    return Result(trained["policy"], trained.get("critic"), history)


def programs(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **shapes: Unpack[abstract.Inputs],
) -> Stage:
    """What `run` runs; `result` is the trained policy."""
    return abstract.online(config, algorithm(make_batch, loss_fn), **shapes)
