"""Minimum risk training (Shen et al. 2016, arXiv:1512.02433).

An iteration samples K candidates for each prompt and minimises their expected cost, the cost being
minus the score, under the policy renormalised over the candidate set S:

    risk = sum over y in S of Q(y) cost(y),    Q(y) = p(y)^alpha / sum over y' in S of p(y')^alpha

Its gradient with respect to log p(y) is alpha Q(y) (cost(y) - risk): the risk itself is the
baseline, so a constant added to all scores changes nothing, and a set of one candidate teaches
nothing. `length_averaged_loss` takes the mean log-probability of a token in place of alpha log p,
as Edunov et al. 2018 do (arXiv:1711.04956, eq. 8).

Prompts that have references (`batches.prompts(max_reference=...)`) put them into the set, as the
paper does: each is the first of the K candidates, so K - 1 are samples. A candidate that occurs
before in its set counts once. Neither is neutral: with duplicates removed and the reference
included the risk is not an estimate of the expected cost (Choshen et al. 2020, arXiv:1907.01752).

The set may come from any sampler, because Q does not ask how its candidates were drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import abstract, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, Positive, Share
from rlhf_jax.data import loader
from rlhf_jax.data.records import Prompts
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "Minimum risk training",
    online.HEADLINE,
    {
        **online.CURVES,
        "loss/risk": "Risk: minus the expected score under Q",
        "candidates/distinct": "Distinct candidates per prompt",
        "loss": "Loss",
    },
)


class Config(online.GroupConfig):
    """Settings of a minimum risk run; alpha is the paper's best, one update per iteration."""

    num_epochs: Count = 1
    samples_per_prompt: Count = 8  # K, the candidates for each prompt, its reference included
    alpha: Positive = 5e-3  # sharpness of Q; 1 is the policy itself
    keep_duplicates: bool = False  # count a candidate as often as it was drawn
    # Weight of the cross entropy of the references, nats per token; that of the risk is the rest.
    mle_share: Share = 0.0


class Batch(NamedTuple):
    """The K candidates for each of G prompts, which stay together."""

    tokens: Int[Array, "G K T"]
    attend: Int[Array, "G K T"]
    mask: Float[Array, "G K T"]
    old_logprobs: Float[Array, "G K T"]
    scores: Float[Array, "G K"]
    counts: Float[Array, "G K"]  # 1 where the candidate belongs to the set, 0 on duplicates
    references: Float[Array, "G K"] | None  # 1 where the candidate is the reference


# --------------------------------------------------------------------------------- candidate sets


def is_duplicate(tokens: Int[Array, "G K T"], mask: Float[Array, "G K T"]) -> Bool[Array, "G K"]:
    """Whether the same response occurs earlier in its set. Only what `mask` holds is compared."""
    ids = jnp.where(mask > 0, tokens, -1)
    same = jnp.all(ids[:, :, None] == ids[:, None], axis=-1)
    earlier = jnp.arange(ids.shape[1])[:, None] > jnp.arange(ids.shape[1])
    return jnp.any(same & earlier, axis=2)


def log_weights(
    log_masses: Float[Array, "G K"], counts: Float[Array, "G K"]
) -> Float[Array, "G K"]:
    """log Q: the log-softmax over the candidates that count, -inf elsewhere. [G, K] -> [G, K].

    `log_masses` are alpha log p. A set in which none counts is -inf throughout.
    """
    kept = jnp.where(counts > 0, log_masses, -jnp.inf)
    total = jax.nn.logsumexp(kept, axis=1, keepdims=True)
    return jnp.where(counts > 0, log_masses - jnp.where(jnp.isfinite(total), total, 0.0), -jnp.inf)


def risk(
    log_masses: Float[Array, "G K"], costs: Float[Array, "G K"], counts: Float[Array, "G K"]
) -> Float[Array, " G"]:
    """The expected cost under Q of each set. Costs of candidates that do not count may be NaN.

    The gradient is computed from costs minus their plain mean, which leaves it as it is but for
    the rounding of large constants.
    """
    log_masses, costs, counts = losses.matched(log_masses=log_masses, costs=costs, counts=counts)
    mean = losses.masked_mean(costs, counts, axis=1)[:, None]
    centred = jnp.where(counts > 0, costs - mean, 0.0)
    weights = jnp.exp(log_weights(log_masses, counts))
    return jnp.sum(weights * centred, axis=1) + mean[:, 0]


# ------------------------------------------------------------------------------------ the algorithm


def make_batch(config: Config, params: dict, memory: Any, rollout: Rollout):
    """The candidate sets of a rollout: (Batch, memory, metrics)."""
    del params

    def grouped(x):
        return x.reshape(-1, config.samples_per_prompt, *x.shape[1:])

    tokens, mask, scores = grouped(rollout.tokens), grouped(rollout.mask), grouped(rollout.scores)
    distinct = 1.0 - is_duplicate(tokens, mask)
    batch = Batch(
        tokens=tokens,
        attend=grouped(rollout.attend),
        mask=mask,
        old_logprobs=grouped(rollout.old_logprobs),
        scores=scores,
        counts=jnp.ones(scores.shape) if config.keep_duplicates else distinct,
        references=None if rollout.given is None else grouped(rollout.given),
    )
    metrics = {
        "candidates/distinct": jnp.mean(jnp.sum(distinct, axis=1)),
        "candidates/best_score": jnp.mean(jnp.max(scores, axis=1)),
    }
    return batch, memory, metrics


def sharpened(config: Config, logps: Float[Array, "G K"], lengths: Float[Array, "G K"]):
    """alpha log p of each candidate (Shen et al., eq. 14)."""
    del lengths
    return config.alpha * logps


def length_averaged(config: Config, logps: Float[Array, "G K"], lengths: Float[Array, "G K"]):
    """The mean log-probability of a candidate's tokens (Edunov et al., eq. 8), without alpha."""
    del config
    return logps / jnp.maximum(lengths, 1.0)


def loss(config: Config, params: dict, batch: Batch, *, log_mass: Callable = sharpened):
    """Mean risk of the candidate sets, mixed with the references' cross entropy by `mle_share`.

    log_mass: (config, log p [G, K] in nats, tokens [G, K]) -> what Q is the softmax of.
    """
    rows = batch._replace(**{name: _flat(getattr(batch, name)) for name in ("tokens", "attend")})
    logprobs, _, entropy = online.forward(config, params, rows)
    logprobs, entropy = (x.reshape(batch.mask.shape) for x in (logprobs, entropy))
    logps = losses.masked_sum(logprobs, batch.mask, axis=2)
    masses = log_mass(config, logps, jnp.sum(batch.mask, axis=2))
    risks = jnp.mean(risk(masses, -batch.scores, batch.counts))
    weights = jnp.exp(log_weights(masses, batch.counts))
    metrics = {
        **on_policy.drift(batch, logprobs),
        "policy/entropy_avg": losses.masked_mean(entropy, batch.mask),
        "loss/risk": risks,
        "candidates/largest_weight": jnp.mean(jnp.max(weights, axis=1)),
    }
    if batch.references is None:
        return risks, metrics
    imitated = losses.masked_mean(-logprobs, batch.mask * batch.references[:, :, None])
    metrics["loss/mle"] = imitated
    return (1.0 - config.mle_share) * risks + config.mle_share * imitated, metrics


def length_averaged_loss(config: Config, params: dict, batch: Batch):
    """`loss` whose Q does not favour short candidates."""
    return loss(config, params, batch, log_mass=length_averaged)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def algorithm(make_batch: Callable = make_batch, loss_fn: Callable = loss) -> online.Algorithm:
    """Minimum risk training as `online` runs it."""
    return online.Algorithm(
        "mrt",
        DISPLAY,
        online.policy_alone,
        make_batch,
        loss_fn,
        any_sampler=True,
        references=True,
    )


def run(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> online.Result:
    """Trains `policy` on the risk of its own candidates; see `online.Inputs`.

    Raises ValueError if `mle_share` is the weight of references that the prompts do not have.
    """
    loader.expect(inputs.get("prompts"), "mrt.run", Prompts)
    if config.mle_share and not inputs["prompts"].examples.shape.reference:
        raise ValueError(
            f"mle_share={config.mle_share} is the weight of the references, but the prompts have "
            "none; read them with batches.prompts(max_reference=...)"
        )
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
