"""Rewards per token, and advantages: GAE per token, or scores compared within a prompt.

Arrays in, arrays out. All arithmetic is float32, whatever the inputs are.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses
from rlhf_jax.losses import Scalar

ScoreAt = Literal["last", "after_eos"]


def last_token(mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """1 on the last active token of each row, else 0; a row without one is all 0. [B, T] -> [B, T].

    The mask may have gaps, for example where a tool's output stands between sampled tokens.
    """
    steps = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask > 0, steps, -1), axis=1, keepdims=True)
    return (steps == last).astype(jnp.float32)


def extend_after_eos(mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The mask with the position after each row's last active token, where there is one."""
    following = jnp.pad(last_token(mask)[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(mask.astype(jnp.float32), following)


def of_next(values: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The value of the state after each active token; 0 after the last one. [B, T] -> [B, T].

    `values` are of the state before each token. The mask has no gaps.
    """
    following = jnp.where(mask > 0, values, 0.0)[:, 1:]
    return jnp.pad(following, ((0, 0), (0, 1))) * mask


def shaped_rewards(
    *,
    scores: Float[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    kl_coef: Scalar,
    score_at: ScoreAt = "last",
) -> Float[Array, "B T"]:
    """Rewards per token: -kl_coef * kl on every active token, and the score once per row.

    [B], [B, T], [B, T] -> [B, T], float32. `kl` is log p_old - log p_ref in nats. The score is paid
    at the last active token of the row (InstructGPT, TRL 0.9, OpenRLHF, verl) or, with "after_eos",
    at the position after it where there is one (TRL 1.x, after lm-human-preferences). A row without
    active tokens gets 0.
    Raises ValueError if shapes differ.
    """
    kl, mask = losses.matched(kl=kl, mask=mask)
    if jnp.shape(scores) != mask.shape[:1]:
        raise ValueError(
            f"scores {jnp.shape(scores)} must hold one number per row of mask {mask.shape}: shape "
            f"{mask.shape[:1]}"
        )
    scores = jnp.asarray(scores, jnp.float32)[:, None]
    paid = last_token(extend_after_eos(mask) if score_at == "after_eos" else mask)
    penalty = kl_coef * jnp.where(mask > 0, kl, 0.0)
    return jnp.where(paid > 0, scores, 0.0) - penalty


def gae(
    *,
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    discount: Scalar,
    gae_lambda: Scalar,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates and returns (advantage + value). All [B, T] -> two [B, T].

    Schulman et al. 2016 (arXiv:1506.02438), eq. 16: A_t = delta_t + discount * lambda * A_{t+1},
    delta_t = r_t + discount * V_{t+1} - V_t, with the value after the last active token 0. Both
    results are 0 outside the mask, float32. values[t] is of the state before token t is emitted.
    Inactive positions between active ones (for example a tool's output) are skipped without
    discounting. Raises ValueError if shapes differ.
    """

    rewards, values, mask = losses.matched(rewards=rewards, values=values, mask=mask)

    def step_back(following, step):
        following_advantage, following_value = following
        reward, value, mask = step
        error = reward + discount * following_value - value
        advantage = error + discount * gae_lambda * following_advantage
        following = (
            jnp.where(mask > 0, advantage, following_advantage),
            jnp.where(mask > 0, value, following_value),
        )
        return following, jnp.where(mask > 0, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    steps = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(step_back, (zeros, zeros), steps, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask > 0, advantages + values, 0.0)


def _groups(scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """The scores in float32. Raises ValueError unless each prompt has at least two samples."""
    shape = jnp.shape(scores)
    if len(shape) != 2:
        raise ValueError(
            f"scores {shape} must be [B, K], the K samples of a prompt in one row; where they "
            "follow each other, scores.reshape(-1, K) makes it so"
        )
    if shape[1] < 2:
        raise ValueError(
            f"scores {shape} must hold K >= 2 samples of each prompt, got K={shape[1]}"
        )
    return jnp.asarray(scores, jnp.float32)


def leave_one_out(scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Score minus the mean of the other K - 1 samples of the prompt. [B, K] -> [B, K].

    RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).
    Raises ValueError unless scores are [B, K] with K >= 2.
    """
    scores = _groups(scores)
    count = scores.shape[1]
    return (scores - scores.mean(axis=1, keepdims=True)) * (count / (count - 1))


def group_normalised(scores: Float[Array, "B K"], eps: Scalar = 1e-4) -> Float[Array, "B K"]:
    """(score - mean) / (std + eps) over the K samples of a prompt. [B, K] -> [B, K].

    The standard deviation is the unbiased one. GRPO (arXiv:2402.03300, eq. 4) with TRL's epsilon.
    Raises ValueError unless scores are [B, K] with K >= 2.
    """
    scores = _groups(scores)
    centred = scores - scores.mean(axis=1, keepdims=True)
    return centred / (jnp.std(scores, axis=1, ddof=1, keepdims=True) + eps)


def group_centred(scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Score minus the mean over the K samples of a prompt, this one included. [B, K] -> [B, K].

    Dr. GRPO (arXiv:2503.20783), which does not divide by the standard deviation.
    Raises ValueError unless scores are [B, K] with K >= 2.
    """
    scores = _groups(scores)
    return scores - scores.mean(axis=1, keepdims=True)
