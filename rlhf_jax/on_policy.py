"""What must hold between sampler, loss and reference, and what is done where it does not.

A policy gradient is an expectation over responses of the policy itself. Filters, penalties and
processors of the logits draw from another distribution, so an algorithm that assumes the policy's
own refuses them, unless the configuration says what to do: see `Correction`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.sampling.settings import Processor, Sampling
from rlhf_jax.training import state as training

# Where the sampler is not the policy: stop with an error; weight by policy / sampler (`weights`,
# `response_weights`); or train as if it were, which most programs do without a word.
Correction = Literal["refuse", "weight", "ignore"]


def changes(sampling: Sampling, processors: tuple[Processor, ...] = ()) -> list[str]:
    """What makes the sampler another distribution than the policy at its temperature."""
    fields = (f for f in dataclasses.fields(sampling) if f.name != "max_new_tokens")
    found = [
        f"sampling.{field.name}={value}"
        for field in fields
        if field.name != "temperature" and (value := getattr(sampling, field.name)) != field.default
    ]
    return found + ["processors"] * bool(processors)


def check_sampler(name: str, config: Any, processors: tuple[Processor, ...]) -> None:
    """Raises ValueError if the sampler is not the policy and nothing says what to do about it."""
    found = changes(config.sampling, processors)
    if found and config.off_policy == "refuse":
        raise ValueError(
            f"{name} assumes that responses are drawn from the policy, but {', '.join(found)} "
            'makes the sampler another distribution; leave it out, or set off_policy="weight" '
            '(importance weights) or "ignore"'
        )


def _log_ratio(rollout: Rollout) -> Float[Array, "B T"]:
    ratio = rollout.sampler_logprobs - rollout.filtered_logprobs
    return jnp.where(rollout.mask > 0, ratio, 0.0)


def weights(config: Any, rollout: Rollout) -> Float[Array, "B T"]:
    """policy / sampler probability of each token, at most `max_weight`; 1 unless asked for.

    This is truncated importance sampling. Weighting each token by its own ratio corrects the choice
    of the token, not how often its prefix is drawn. A filter never draws the tokens that it drops,
    which no weight can make up for: what is left is the policy's gradient over the kept tokens.
    """
    if config.off_policy != "weight":
        return jnp.ones_like(rollout.mask)
    return jnp.minimum(jnp.exp(_log_ratio(rollout)), config.max_weight)


def response_weights(config: Any, rollout: Rollout) -> Float[Array, " B"]:
    """policy / sampler probability of each response, at most `max_weight`; 1 unless asked for.

    Unbiased, but for the bound, where the sampler can draw whatever the policy can: after
    penalties, not after filters.
    """
    if config.off_policy != "weight":
        return jnp.ones(rollout.mask.shape[0])
    return jnp.minimum(jnp.exp(jnp.sum(_log_ratio(rollout), axis=1)), config.max_weight)


def drift(batch: Any, logprobs: Float[Array, "B T"]) -> dict[str, Array]:
    """Metrics of how far the policy has moved from the one that sampled, over `batch.mask`.

    A loss that reports them is also checked to start each iteration at ratio 1.
    """
    change = logprobs - batch.old_logprobs
    return {
        "policy/approxkl_avg": losses.masked_mean(0.5 * jnp.square(change), batch.mask),
        "val/ratio": losses.masked_mean(jnp.exp(change), batch.mask),
    }


def check(config: Any, dtype: str, iteration: int, metrics: dict[str, float]) -> None:
    """Raises TrainingStopped unless sampler, loss and reference agree as they must on-policy.

    Before the first update of every iteration the ratio is 1: in float32 no token's log-probability
    may differ by more than 1e-4 nats between the sampler and `online.forward`. In bfloat16 the old
    log-probabilities come from `forward`, and the sampler's mean gap is bounded by
    `max_sampler_gap` (the worst token's by ten times that). A loss that reports
    "policy/approxkl_avg" must start its first minibatch at 0 within the same bound. In iteration 0
    the policy is the reference, so their log-probabilities must agree within the same bound.
    Filters do not matter here: the log-probabilities compared are the policy's own.
    """
    training.raise_if_bad(iteration, metrics)
    exact = dtype == "float32"
    bound = 1e-4 if exact else 10 * config.max_sampler_gap  # of the worst token
    worst, mean = metrics["check/logprob_gap"], metrics["check/sampler_gap"]
    if not worst <= bound or not mean <= config.max_sampler_gap:
        raise training.TrainingStopped(
            f"iteration {iteration}: sampler and loss disagree on the log-probability of the same "
            f"token by {max(worst, mean):.3g} nats (bound {bound:g}): the first ratio is not 1"
        )
    first = metrics.get("check/first_approxkl", 0.0)
    if not first <= 0.5 * bound**2:
        raise training.TrainingStopped(
            f"iteration {iteration}: the loss starts at approxkl {first:.3g}, not 0: it scores "
            "tokens differently from how they were sampled (shift, mask or temperature)"
        )
    if iteration == 0 and not metrics["check/reference_gap"] <= bound:
        raise training.TrainingStopped(
            "iteration 0: the policy is not the reference, their log-probabilities differ by "
            f"{metrics['check/reference_gap']:.3g} nats; pass the policy that training starts from"
        )
    if metrics.get("groups/informative", 1.0) == 0.0:
        _say_once(
            f"iteration {iteration}: in 100 % of the groups all responses have the same score, so "
            "nothing is learned from them; see groups/informative for the share in other iterations"
        )


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)
