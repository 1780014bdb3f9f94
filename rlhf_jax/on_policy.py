"""What must hold between sampler, loss and reference, and what is done where it does not.

A policy gradient is an expectation over responses of the policy itself. Filters, penalties and
processors of the logits draw from another distribution, so an algorithm that assumes the policy's
own refuses them, unless the configuration says what to do: see `Correction`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses
from rlhf_jax.sampling import decode
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.decode import Choose
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.sampling.settings import Processor, Sampling
from rlhf_jax.training import state as training

# Where the sampler is not the policy: stop with an error; weight by policy / sampler (`weights`,
# `response_weights`); or train as if it were, which most programs do without a word.
Correction = Literal["refuse", "weight", "ignore"]


# With these numbers a penalty or a filter does nothing.
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
}


def changes(sampling: Sampling, processors: tuple[Processor, ...] = ()) -> list[str]:
    """What makes the sampler another distribution than the policy at its temperature."""
    found = [
        f"sampling.{name}={value}"
        for name, value in vars(sampling).items()
        if name not in ("max_new_tokens", "temperature")
        and value not in (None, (), NEUTRAL.get(name))
    ]
    return found + ["processors"] * bool(processors)


def check_sampler(
    name: str,
    config: Any,
    processors: tuple[Processor, ...],
    choose: Choose,
    any_sampler: bool = False,
) -> None:
    """Raises ValueError if the sampler is not the policy and nothing says what to do about it.

    any_sampler: the algorithm is right for every sampler, and so has no use for weights.
    """
    if any_sampler:
        if config.off_policy == "weight":
            raise ValueError(
                f'{name} is right for any sampler and has no weights; leave off_policy="weight" out'
            )
        return
    if choose is decode.greedy:
        raise ValueError(
            f"{name} learns from responses that are drawn at random; leave choose=greedy out"
        )
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


def groups_that_differ(config: Any, rollout: Rollout) -> Float[Array, " G"]:
    """1 where the responses to a prompt differ in score, 0 where all have the same one."""
    scores = rollout.scores.reshape(-1, config.samples_per_prompt)
    return jnp.sign(jnp.max(scores, axis=1) - jnp.min(scores, axis=1))


def measurements(config: Any, rollout: Rollout) -> dict[str, Array]:
    """The metrics of a rollout that every algorithm reports."""
    drawn = rollout
    if rollout.given is not None:
        drawn = rollouts.drawn(rollout._replace(pretraining=None), config.samples_per_prompt)
    metrics = rollouts.measurements(drawn) | rollouts.gaps(rollout)
    metrics["num_tokens"] = jnp.sum(rollout.lengths)
    if config.samples_per_prompt > 1:
        metrics["groups/informative"] = jnp.mean(groups_that_differ(config, rollout))
    if config.off_policy == "weight":
        metrics["sampler/weight_avg"] = losses.masked_mean(weights(config, rollout), rollout.mask)
    return metrics


def drift(batch: Any, logprobs: Float[Array, "*b T"]) -> dict[str, Array]:
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
    log-probabilities are those of `forward`, and the sampler's may differ from them by
    `max_sampler_gap` on average. A loss that reports "policy/approxkl_avg" must start its first
    minibatch at 0, and in iteration 0 the policy must be the reference, both within 1e-4 nats per
    token, in bfloat16 ten times `max_sampler_gap`.
    Filters do not matter here: the log-probabilities compared are the policy's own.
    """
    if metrics["check/bad_scores"] > 0:
        raise training.TrainingStopped(
            f"iteration {iteration}: {metrics['check/bad_scores']:.0f} scores of the reward are "
            "NaN or infinite; nothing of this iteration was saved"
        )
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


def checks(config: Any, dtype: str) -> Callable[[int, dict[str, float]], None]:
    """`check` for every iteration of a run, and a warning, once, where no group can teach."""
    warned = False

    def of_iteration(iteration: int, metrics: dict[str, float]) -> None:
        nonlocal warned
        check(config, dtype, iteration, metrics)
        if not warned and metrics.get("groups/informative", 1.0) == 0.0:
            warned = True
            logging.getLogger(__name__).warning(
                "iteration %d: in 100 %% of the groups all responses have the same score, so "
                "comparing them teaches nothing; groups/informative is the share where they "
                "differ, in every iteration",
                iteration,
            )

    return of_iteration
