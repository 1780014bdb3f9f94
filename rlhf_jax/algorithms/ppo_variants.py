"""PPO with a KL in the loss, a pretraining mix, or rewards of steps: functions for `ppo.run`.

    ppo.run(
        ppo_variants.KlConfig(kl_coef=0.0),
        make_batch=ppo_variants.reference_batch,
        loss_fn=ppo_variants.kl_loss,
        ...
    )

The KL as a reward (`ppo.make_batch`) goes through advantages and whitening; in the loss it acts on
each token by itself. Of the estimates in the loss only k2 has the gradient of the KL of a
token's distribution: that of k1 is 0 in expectation, and that of k3 is of the KL the other way
round, from reference to policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import advantages, losses, online
from rlhf_jax.algorithms import ppo, sft
from rlhf_jax.config import NonNegative
from rlhf_jax.data.records import Demonstrations
from rlhf_jax.models import heads, transformer
from rlhf_jax.rewards import learned, process
from rlhf_jax.sampling.rollout import Rollout

# ------------------------------------------------------------------------------- KL in the loss


class KlConfig(ppo.Config):
    """PPO whose loss has a KL to the reference; set `kl_coef=0` to have it there alone."""

    loss_kl_coef: NonNegative = 0.05  # weight of the KL per token, nats


class ReferenceBatch(NamedTuple):
    """What PPO's loss reads, and the reference's log-probabilities."""

    ppo: ppo.Batch
    ref_logprobs: Float[Array, "B T"]


def reference_batch(
    config: ppo.Config,
    params: dict,
    memory: Any,
    rollout: Rollout,
    *,
    make_batch: Callable = ppo.make_batch,
):
    """`make_batch` with the reference's log-probabilities: (ReferenceBatch, memory, metrics)."""
    batch, memory, metrics = make_batch(config, params, memory, rollout)
    return ReferenceBatch(batch, rollout.ref_logprobs), memory, metrics


def kl_loss(
    config: KlConfig,
    params: dict,
    batch: ReferenceBatch,
    *,
    estimate: Callable[..., Array] = losses.kl_k2,
):
    """`ppo.loss` plus `loss_kl_coef` times the mean of an estimate of the KL per token.

    estimate: `losses.kl_k1`, `kl_k2` or `kl_k3`.
    """
    outputs, mask = online.forward(config, params, batch.ppo), batch.ppo.mask
    value, metrics = ppo.loss_of(config, batch.ppo, outputs)
    kl = estimate(logprobs=outputs.logprobs * mask, ref_logprobs=batch.ref_logprobs)
    kl = losses.masked_mean(kl, mask)
    return value + config.loss_kl_coef * kl, metrics | {"loss/kl_avg": kl}


def exact_kl_loss(config: KlConfig, params: dict, batch: ReferenceBatch):
    """`ppo.loss` plus `loss_kl_coef` times the mean KL per token, over the whole vocabulary.

    It passes through the reference, and a second time through the policy.
    """
    rows, policy, reference = batch.ppo, params["policy"], params["reference"]
    start = rows.tokens.shape[1] - config.sampling.max_new_tokens

    def of_rows(tokens, attend):
        hiddens = tuple(transformer.hidden_states(x, tokens, attend) for x in (policy, reference))
        return heads.token_kl(
            policy, reference, hiddens, tokens, config.sampling.temperature, start
        )

    kl = heads.map_rows(of_rows, config.micro_batches, rows.tokens, rows.attend)
    kl = losses.masked_mean(kl, rows.mask)
    value, metrics = ppo.loss(config, params, rows)
    return value + config.loss_kl_coef * kl, metrics | {"loss/kl_avg": kl}


k1_loss = functools.partial(kl_loss, estimate=losses.kl_k1)
k3_loss = functools.partial(kl_loss, estimate=losses.kl_k3)


# ----------------------------------------------------------------------------- a pretraining mix


class PretrainingConfig(ppo.Config):
    """PPO-ptx (arXiv:2203.02155, eq. 2)."""

    # Weight of the cross entropy of pretraining text, nats per token. The paper's is 27.8.
    pretraining_coef: NonNegative = 27.8


class MixedBatch(NamedTuple):
    """What PPO's loss reads, and N rows of text for each response."""

    ppo: ppo.Batch
    text_tokens: Int[Array, "B N S"]
    text_attend: Int[Array, "B N S"]
    text_mask: Float[Array, "B N S"]


def mixed_batch(
    config: ppo.Config,
    params: dict,
    memory: Any,
    rollout: Rollout,
    pretraining: Demonstrations | None = None,
    *,
    make_batch: Callable = ppo.make_batch,
):
    """`make_batch` with the iteration's text, `pretraining` of the run: (MixedBatch, ...).

    Raises ValueError without `pretraining`, or if its rows are no multiple of the responses.
    """
    batch, memory, metrics = make_batch(config, params, memory, rollout)
    count = batch.tokens.shape[0]
    if pretraining is None:
        raise ValueError("there is no text to mix in; give run a Loader of it as pretraining=")
    if pretraining.tokens.shape[0] % count:
        raise ValueError(
            f"{pretraining.tokens.shape[0]} rows of text per iteration are no multiple of "
            f"its {count} responses; change the batch_size of pretraining="
        )
    text = (x.reshape(count, -1, x.shape[1]) for x in pretraining)
    return MixedBatch(batch, *text), memory, metrics


def mixed_loss(config: PretrainingConfig, params: dict, batch: MixedBatch):
    """`ppo.loss` plus `pretraining_coef` times the cross entropy of the text, nats per token."""
    value, metrics = ppo.loss(config, params, batch.ppo)
    rows = (x.reshape(-1, x.shape[2]) for x in batch[1:])
    slices = sft.Config(micro_batches=config.micro_batches)
    nats, _ = sft.loss(slices, params, Demonstrations(*rows))
    return value + config.pretraining_coef * nats, metrics | {"loss/pretraining": nats}


# ------------------------------------------------------------------------------ rewards of steps


def step_batch(
    marks: process.Marks, worth: Callable[[Array], Array] = process.probability
) -> Callable:
    """A `make_batch` for `ppo.run` that pays every step of a response at its end.

    The scorer of the run, which `process_reward.run` has trained, is read at the marks of each
    response, and `worth` makes rewards of its log odds. Where that is the probability that the step
    is right, a response of more steps can earn more. With `jax.nn.log_sigmoid` it cannot: the
    rewards then add up to the log of the probability that all steps are right. The step that the
    last token ends, and `missing_eos_penalty`, are paid where `score_at` says; the other steps at
    their marks. The metrics of scores are of the sum over the steps, and what `score=` gives is not
    trained on. The same arguments give the same object.

    Raises ValueError if `marks` are not `Marks`; when it runs, also for a scorer without a scalar
    head, and for `normalise_scores`, whose moments are of whole responses.
    """
    return _step_batch_of(process.checked(marks), worth)


@functools.cache
def _step_batch_of(marks: process.Marks, worth: Callable) -> Callable:
    return functools.partial(_step_batch, marks, worth)


def _step_batch(
    marks: process.Marks,
    worth: Callable,
    config: ppo.CriticConfig,
    params: dict,
    memory: Any,
    rollout: Rollout,
):
    if config.normalise_scores:
        raise ValueError(
            "normalise_scores=True would scale the scores of whole responses, but each step is "
            "paid by itself; leave it out"
        )
    scorer = params["scorer"]
    learned.check(scorer)
    log_odds = heads.map_rows(
        functools.partial(process.token_scores, scorer),
        config.micro_batches,
        rollout.tokens,
        rollout.attend,
    )
    steps = process.step_marks(marks, rollout.tokens, rollout.mask)
    paid = jnp.where(steps > 0, worth(log_odds), 0.0)
    earlier = paid * (1.0 - advantages.last_token(rollout.mask))

    def pay(*, scores: Array, **rest: Any) -> Array:
        """The last token gets what is left of the sum: its own step, less the penalty."""
        at_end = scores - jnp.sum(earlier, axis=1)
        return earlier + advantages.shaped_rewards(scores=at_end, **rest)

    whole = rollout._replace(scores=jnp.sum(paid, axis=1))
    batch, memory, metrics = ppo.make_batch(config, params, memory, whole, pay=pay)
    metrics["objective/scores_std"] = jnp.std(whole.scores)
    return batch, memory, metrics | {"objective/steps": jnp.mean(jnp.sum(steps, axis=1))}
