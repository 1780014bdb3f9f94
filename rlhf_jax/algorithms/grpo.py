"""GRPO and its kin: scores compared within the responses to a prompt, no critic (arXiv:2402.03300).

An advantage is one number per response, the loss is PPO's clipped surrogate plus `kl_coef` times an
estimate of the KL to the reference. What the published variants change are functions to pass:

| | `make_batch` | `loss_fn` | settings |
|---|---|---|---|
| GRPO (2402.03300) | `make_batch` | `loss` | |
| Dr. GRPO (2503.20783) | `centred_batch` | `dr_grpo_loss` | `kl_coef=0` |
| DAPO (2503.14476) | `make_batch` | `dapo_loss` | `kl_coef=0`, `clip_eps_high`, `train_groups` |
| GSPO (2507.18071) | `make_batch` | `gspo_loss` | `kl_coef=0`, a `clip_eps` of about 3e-4 |

    grpo.run(config, loss_fn=grpo.dapo_loss, policy=policy, ...)

With `train_groups` an iteration samples `batch_size` groups and trains on so many of those whose
scores differ. (DAPO samples until it has enough; here groups are left empty if there are too few.)

Filters of the sampler are refused, or corrected token by token with `off_policy="weight"`, as in
PPO: see `on_policy.weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, advantages, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, NonNegative
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "GRPO",
    online.HEADLINE,
    {
        **online.CURVES,
        "groups/informative": "Share of prompts whose responses differ in score",
        "policy/clipfrac_avg": "Clip fraction",
        "loss": "Loss",
    },
)


class Config(online.GroupConfig):
    """Settings of a GRPO run; clipping and KL as in the paper, one update per iteration."""

    num_epochs: Count = 1
    samples_per_prompt: Count = 8
    clip_eps: NonNegative = 0.2
    clip_eps_high: NonNegative | None = None  # the upper clip; None: `clip_eps`
    kl_coef: NonNegative = 0.04  # weight of the KL estimate in the loss
    # Groups per iteration that are trained on: first those whose scores differ (DAPO). None: all.
    train_groups: Count | None = None

    def check(self) -> None:
        """Raises ValueError for more groups than are sampled, or as `GroupConfig` does."""
        if self.train_groups is not None and self.train_groups > self.batch_size:
            raise ValueError(
                f"train_groups={self.train_groups} must be at most batch_size={self.batch_size}, "
                "the groups that are sampled"
            )
        super().check()

    @property
    def num_groups(self) -> int:
        """Groups per iteration that are trained on."""
        return self.train_groups or self.batch_size


class Batch(NamedTuple):
    """What the loss of one minibatch reads: K responses to G prompts, which stay together."""

    tokens: Int[Array, "G K T"]
    attend: Int[Array, "G K T"]
    mask: Float[Array, "G K T"]
    old_logprobs: Float[Array, "G K T"]
    ref_logprobs: Float[Array, "G K T"]
    weights: Float[Array, "G K T"]  # of the advantages: see `on_policy.weights`
    advantages: Float[Array, "G K"]


# ---------------------------------------------------------------------------------------- the batch


def make_batch(
    config: Config,
    params: dict,
    memory: Any,
    rollout: Rollout,
    *,
    advantage: Callable[[Array], Array] = advantages.group_normalised,
):
    """Advantages within each group of responses: (Batch, memory, metrics).

    advantage: scores [G, K] -> advantages [G, K].
    """
    del params

    def grouped(x):
        return x.reshape(-1, config.samples_per_prompt, *x.shape[1:])

    scores = grouped(rollout.scores)
    differ = on_policy.groups_that_differ(config, rollout)
    batch = Batch(
        tokens=grouped(rollout.tokens),
        attend=grouped(rollout.attend),
        mask=grouped(rollout.mask),
        old_logprobs=grouped(rollout.old_logprobs),
        ref_logprobs=grouped(rollout.ref_logprobs),
        weights=grouped(on_policy.weights(config, rollout)),
        advantages=advantage(scores),
    )
    metrics = {"groups/scores_std": jnp.mean(jnp.std(scores, axis=1))}
    if config.train_groups is not None:
        order = jnp.argsort(-differ, stable=True)[: config.train_groups]
        batch = jax.tree.map(lambda x: x[order], batch)
        # A group whose scores are equal is only there to fill the batch.
        batch = batch._replace(mask=batch.mask * differ[order][:, None, None])
    return batch, memory, metrics


def centred_batch(config: Config, params: dict, memory: Any, rollout: Rollout):
    """`make_batch` whose advantages are not divided by the standard deviation (Dr. GRPO)."""
    centred = advantages.group_centred
    return make_batch(config, params, memory, rollout, advantage=centred)


# ---------------------------------------------------------------------------------------- the loss


def per_token(log_ratio: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Each token has the ratio of its own probabilities."""
    del mask
    return log_ratio


def per_sequence(log_ratio: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Each token has the geometric mean of the ratios of its response (GSPO)."""
    return jnp.broadcast_to(losses.masked_mean(log_ratio, mask, axis=1)[:, None], log_ratio.shape)


def sequence_mean(each: Float[Array, "B T"], mask: Float[Array, "B T"], longest: int) -> Array:
    """The mean over responses of the mean over their tokens (GRPO, eq. 3)."""
    del longest
    return losses.masked_mean(losses.masked_mean(each, mask, axis=1), jnp.max(mask, axis=1))


def token_mean(each: Float[Array, "B T"], mask: Float[Array, "B T"], longest: int) -> Array:
    """The mean over all tokens of the minibatch (DAPO)."""
    del longest
    return losses.masked_mean(each, mask)


def constant_length(each: Float[Array, "B T"], mask: Float[Array, "B T"], longest: int) -> Array:
    """The sum over tokens divided by responses times `longest`, `max_new_tokens` (Dr. GRPO)."""
    count = jnp.maximum(jnp.sum(jnp.max(mask, axis=1)), 1.0)
    return losses.masked_sum(each, mask) / (count * longest)


def loss(
    config: Config,
    params: dict,
    batch: Batch,
    *,
    log_ratio: Callable = per_token,
    aggregate: Callable = sequence_mean,
):
    """The clipped surrogate plus `kl_coef` times the KL to the reference.

    log_ratio: (log-ratios [B, T], mask) -> those that are clipped. aggregate: (losses [B, T], mask,
    max_new_tokens) -> the loss. The KL is the k3 estimate of each token (arXiv:2402.03300, eq. 4),
    whose gradient is not that of the KL: see `losses.kl_k3`.
    """
    rows = Batch(*(x.reshape(-1, *x.shape[2:]) for x in batch))
    logprobs, _, entropy = online.forward(config, params, rows)
    mask = rows.mask
    logprobs = logprobs * mask  # as those in the batch; else the KL of padding may overflow
    ratio = log_ratio(logprobs - rows.old_logprobs, mask)
    gains = rows.advantages[:, None] * rows.weights
    each = losses.clipped_policy_loss(
        logprobs=ratio,
        old_logprobs=jnp.zeros_like(ratio),
        advantages=gains,
        clip_eps=config.clip_eps,
        clip_eps_high=config.clip_eps_high,
    )
    kl = losses.kl_k3(logprobs=logprobs, ref_logprobs=rows.ref_logprobs)
    high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
    ratio = jnp.exp(ratio)
    clipped = ((gains > 0) & (ratio > 1 + high)) | ((gains < 0) & (ratio < 1 - config.clip_eps))
    metrics = {
        **on_policy.drift(rows, logprobs),
        "policy/clipfrac_avg": losses.masked_mean(clipped, mask),
        "policy/entropy_avg": losses.masked_mean(entropy, mask),
        "loss/kl_avg": losses.masked_mean(kl, mask),
    }
    return aggregate(each + config.kl_coef * kl, mask, config.sampling.max_new_tokens), metrics


def dr_grpo_loss(config: Config, params: dict, batch: Batch):
    """`loss` with a constant divisor, so that long responses are not favoured where they fail."""
    return loss(config, params, batch, aggregate=constant_length)


def dapo_loss(config: Config, params: dict, batch: Batch):
    """`loss` as a mean over all tokens, so that those of long responses weigh as much as others."""
    return loss(config, params, batch, aggregate=token_mean)


def gspo_loss(config: Config, params: dict, batch: Batch):
    """`loss` with the ratio of whole responses."""
    return loss(config, params, batch, log_ratio=per_sequence)


# ------------------------------------------------------------------------------------ the algorithm


def algorithm(make_batch: Callable = make_batch, loss_fn: Callable = loss) -> online.Algorithm:
    """GRPO as `online` runs it."""
    return online.Algorithm("grpo", DISPLAY, online.policy_alone, make_batch, loss_fn)


def run(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> online.Result:
    """Trains `policy` on a reward; the loss has the KL to where it starts. See `online.Inputs`."""
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
