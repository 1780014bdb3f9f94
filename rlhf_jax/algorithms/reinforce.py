"""REINFORCE with a baseline that you pass, RLOO among them (Williams 1992; arXiv:2402.14740).

A response is one action: its reward is the score, minus `kl_coef` times the sampled KL to the
reference, and its advantage is the reward minus a baseline.

    gradient = mean over responses of advantage * gradient of log p(response)

A `Baseline` is a function of the rewards, [prompts, K], and of what it remembers. `leave_one_out`
(RLOO), `greedy` (self-critical training), `moving_average` and `nothing` are independent of the
response that they are subtracted from, so they leave the gradient's expectation as it is.
`batch_mean` and `queue` contain the response itself: they scale it, by (N - 1) / N where N rewards
are averaged, and keep its direction.

The gradient is that of the policy that sampled, so `loss` is for one update per iteration.
`clipped_loss` is for several: PPO's clipped surrogate with the ratio of whole responses.

With `off_policy="weight"` each response is weighted by policy / sampler
(`on_policy.response_weights`): unbiased for penalties, but for the bound on the weights. Filters
leave the gradient over the responses that they let through, and there a baseline is no longer
neutral: it raises or lowers the share of all of them together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, advantages, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, NonNegative
from rlhf_jax.sampling import decode
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.decode import Choose
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training import state as training
from rlhf_jax.training.metrics import Display

DISPLAY = Display("REINFORCE", online.HEADLINE, {**online.CURVES, "loss": "Loss"})


class Config(online.Config):
    """Settings of a REINFORCE run; by default RLOO's of TRL, but with one update per iteration."""

    num_epochs: Count = 1
    samples_per_prompt: Count = 2
    kl_coef: NonNegative = 0.05  # reward subtracted per nat of KL
    clip_eps: NonNegative = 0.2  # of `clipped_loss`
    # Divides the log-probability of a response by its length. The gradient is then no longer that
    # of the expected reward: it gives the tokens of short responses more weight.
    mean_over_tokens: bool = False


class Batch(NamedTuple):
    """What the loss of one minibatch reads."""

    tokens: Int[Array, "B T"]
    attend: Int[Array, "B T"]
    mask: Float[Array, "B T"]  # 0 in all of a row that is not trained on, as greedy responses are
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, " B"]


# --------------------------------------------------------------------------------------- baselines


class Baseline(NamedTuple):
    """What is subtracted from the rewards.

    of: (memory, rewards [G, K]) -> (baselines [G, K], memory). memory: what the first iteration is
    given. samples: the least K. greedy: the first of the K responses takes the most likely tokens;
    `of` gets its reward, but it is not trained on.
    """

    of: Callable[[Any, Array], tuple[Array, Any]]
    memory: Any = ()
    samples: int = 1
    greedy: bool = False


def _nothing(memory, rewards):
    return jnp.zeros_like(rewards), memory


def _batch_mean(memory, rewards):
    return jnp.full_like(rewards, jnp.mean(rewards)), memory


def _leave_one_out(memory, rewards):
    return rewards - advantages.leave_one_out(rewards), memory


def _greedy(memory, rewards):
    return jnp.broadcast_to(rewards[:, :1], rewards.shape), memory


nothing = Baseline(_nothing)
batch_mean = Baseline(_batch_mean)
leave_one_out = Baseline(_leave_one_out, samples=2)
greedy = Baseline(_greedy, samples=2, greedy=True)


class Average(NamedTuple):
    """An exponential average of batch means, `value / weight`."""

    value: Float[Array, ""]
    weight: Float[Array, ""]  # of the means so far, towards 1


def _moving_average(decay: float, memory: Average, rewards):
    value = decay * memory.value + (1.0 - decay) * jnp.mean(rewards)
    weight = decay * memory.weight + (1.0 - decay)
    mean = memory.value / jnp.maximum(memory.weight, jnp.finfo(jnp.float32).tiny)
    return jnp.full_like(rewards, mean), Average(value, weight)


@functools.cache
def moving_average(decay: float = 0.9) -> Baseline:
    """The exponential average of the mean rewards of earlier iterations; 0 in the first.

    It is not biased towards 0: the weights of the earlier means add up to 1, as in Adam.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"moving_average(decay={decay}) must be in [0, 1)")
    return Baseline(
        functools.partial(_moving_average, decay), Average(jnp.float32(0.0), jnp.float32(0.0))
    )


def _queue(memory: training.Queue, rewards):
    memory = memory.push(rewards.reshape(-1))
    mean = losses.masked_mean(memory.values, memory.held)
    return jnp.full_like(rewards, mean), memory


@functools.cache
def queue(size: int = 1000) -> Baseline:
    """The mean of the last `size` rewards, those of this iteration included (ESRL, 2308.02223).

    A queue smaller than the rewards of an iteration holds the last `size` of them.
    """
    if size < 1:
        raise ValueError(f"queue(size={size}) must hold at least one reward")
    return Baseline(_queue, training.Queue.empty(size))


# ------------------------------------------------------------------------------------ the algorithm


def make_batch(baseline: Baseline, config: Config, params: dict, memory: Any, rollout: Rollout):
    """Rewards and advantages of a rollout: (Batch, memory, metrics)."""
    del params
    mask = rollout.mask
    kl = losses.kl_k1(logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs)
    kl = losses.masked_sum(kl, mask, axis=1)
    rewards = rollout.scores - config.kl_coef * kl
    grouped = rewards.reshape(-1, config.samples_per_prompt)
    baselines, memory = baseline.of(memory, grouped)
    is_trained = jnp.ones(grouped.shape)
    if baseline.greedy:
        is_trained = is_trained.at[:, 0].set(0.0)
    is_trained = is_trained.reshape(-1)
    gains = (grouped - baselines).reshape(-1)
    batch = Batch(
        tokens=rollout.tokens,
        attend=rollout.attend,
        mask=mask * is_trained[:, None],
        old_logprobs=rollout.old_logprobs,
        advantages=gains * is_trained * on_policy.response_weights(config, rollout),
    )
    metrics = {
        **_measured(config, baseline, rollout),
        "objective/rlhf_reward": losses.masked_mean(rewards, is_trained),
        "objective/non_score_reward": losses.masked_mean(-config.kl_coef * kl, is_trained),
        "objective/baseline": losses.masked_mean(baselines.reshape(-1), is_trained),
        "objective/advantages_std": jnp.sqrt(losses.masked_mean(gains**2, is_trained)),
    }
    return batch, memory, metrics


def _measured(config: Config, baseline: Baseline, rollout: Rollout) -> dict[str, Array]:
    """The metrics of the rollout, without its greedy responses."""
    if not baseline.greedy:
        return {}
    drawn = rollouts.drawn(rollout, config.samples_per_prompt)
    return rollouts.measurements(drawn) | {"num_tokens": jnp.sum(rollout.lengths)}


def loss(config: Config, params: dict, batch: Batch):
    """-(mean over responses of advantage * log p(response)).

    Its value says nothing about progress; its gradient is that of the expected reward. With
    `mean_over_tokens` log p is a mean over the tokens of the response.
    """
    logprobs, _, entropy = online.forward(config, params, batch)
    each = -batch.advantages * _of_responses(config, logprobs, batch.mask)
    return _mean_over_responses(each, batch), _metrics(batch, logprobs, entropy)


def clipped_loss(config: Config, params: dict, batch: Batch):
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7) with one ratio for a whole response.

    The first update of an iteration has the gradient of `loss`. TRL's RLOO is this loss.
    """
    logprobs, _, entropy = online.forward(config, params, batch)
    each = losses.clipped_policy_loss(
        logprobs=_of_responses(config, logprobs, batch.mask),
        old_logprobs=_of_responses(config, batch.old_logprobs, batch.mask),
        advantages=batch.advantages,
        clip_eps=config.clip_eps,
    )
    return _mean_over_responses(each, batch), _metrics(batch, logprobs, entropy)


def _of_responses(config: Config, logprobs, mask) -> Float[Array, " B"]:
    reduce = losses.masked_mean if config.mean_over_tokens else losses.masked_sum
    return reduce(logprobs, mask, axis=1)


def _mean_over_responses(each: Float[Array, " B"], batch: Batch) -> Float[Array, ""]:
    return losses.masked_mean(each, jnp.max(batch.mask, axis=1))


def _metrics(batch: Batch, logprobs, entropy) -> dict[str, Array]:
    entropy = losses.masked_mean(entropy, batch.mask)
    return on_policy.drift(batch, logprobs) | {"policy/entropy_avg": entropy}


def algorithm(
    config: Config, baseline: Baseline = leave_one_out, loss_fn: Callable = loss
) -> online.Algorithm:
    """REINFORCE as `online` runs it.

    Raises ValueError if the baseline needs more samples of each prompt, or if `loss` is to be used
    for several updates on the same responses.
    """
    if config.samples_per_prompt < baseline.samples:
        raise ValueError(
            f"samples_per_prompt={config.samples_per_prompt} must be at least {baseline.samples}: "
            "this baseline compares the responses to a prompt"
        )
    updates = config.num_epochs * config.num_minibatches
    if loss_fn is loss and updates > 1:
        raise ValueError(
            f"num_epochs * num_minibatches = {updates} updates per iteration, but `loss` is the "
            "policy gradient in the first only; pass loss_fn=reinforce.clipped_loss"
        )
    return online.Algorithm(
        "reinforce",
        DISPLAY,
        online.policy_alone,
        _make_batch(baseline.of, baseline.greedy),
        loss_fn,
        baseline.memory,
    )


@functools.cache
def _make_batch(of: Callable, is_greedy: bool) -> Callable:
    """`make_batch` of a baseline, the same object for the same baseline (see `loop.compiled`)."""
    return functools.partial(make_batch, Baseline(of, greedy=is_greedy))


@functools.cache
def greedy_first(count: int, choose: Choose = decode.categorical) -> Choose:
    """A `choose` that takes the most likely token in the first of `count` consecutive rows."""

    def chosen(logits, keys):
        is_first = jnp.arange(logits.shape[0]) % count == 0
        return jnp.where(is_first, decode.greedy(logits, keys), choose(logits, keys))

    return chosen


def run(
    config: Config,
    *,
    baseline: Baseline = leave_one_out,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> online.Result:
    """Trains `policy` on a reward, with a KL penalty to where it starts; see `online.Inputs`.

    With the `greedy` baseline one of the `samples_per_prompt` responses is the greedy one.
    Raises ValueError as `algorithm` does, and for inputs that do not fit.
    """
    if baseline.greedy:
        choose = inputs.get("choose", decode.categorical)
        inputs["choose"] = greedy_first(config.samples_per_prompt, choose)
    trained, history = online.run(config, algorithm(config, baseline, loss_fn), **inputs)
    return online.Result(trained["policy"], history)


def programs(
    config: Config,
    *,
    baseline: Baseline = leave_one_out,
    loss_fn: Callable = loss,
    **shapes: Unpack[abstract.Inputs],
) -> Stage:
    """What `run` runs; `result` is the trained policy."""
    return abstract.online(config, algorithm(config, baseline, loss_fn), **shapes)
