"""Rewards per token and what they make of each action. Arrays in, arrays out."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = float | Float[Array, ""]
ScoreAt = Literal["last", "after_eos"]


def last_token(mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """1 on the last active token of each row; a row without one is all 0."""
    following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    # mask is contiguous: sampled tokens up to and including EOS.
    return mask * (1.0 - following)


def extend_after_eos(mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The mask with the first position after each row's last active token, where there is one."""
    return jnp.maximum(mask, jnp.pad(last_token(mask)[:, :-1], ((0, 0), (1, 0))))


def shaped_rewards(
    *,
    scores: Float[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    kl_coef: Scalar,
    score_at: ScoreAt = "last",
) -> Float[Array, "B T"]:
    """-kl_coef * kl on every active token, plus the score once per row. -> [B, T].

    The sign: reward = -kl_coef (log p_old - log p_ref). The score goes to the last active token
    (InstructGPT, TRL 0.9, OpenRLHF, verl) or, with "after_eos", to the first position after it
    where one exists (TRL 1.x, after lm-human-preferences). A row without active tokens gets 0.
    """
    where = last_token(mask)
    if score_at == "after_eos":
        extended = extend_after_eos(mask)
        where = last_token(extended)
    return jnp.where(mask > 0, -kl_coef * kl, 0.0) + where * scores[:, None]


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
    results are 0 outside the mask. values[t] is of the state before token t is emitted. Inactive
    positions between active ones (tool output, say) are stepped over without discounting.
    """

    def backwards(carry, step):
        advantage, value = carry
        reward_t, value_t, mask_t = step
        delta = reward_t + discount * value - value_t
        new = delta + discount * gae_lambda * advantage
        carry = (
            jnp.where(mask_t > 0, new, advantage),
            jnp.where(mask_t > 0, value_t, value),
        )
        return carry, jnp.where(mask_t > 0, new, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    steps = (rewards.T.astype(jnp.float32), values.T.astype(jnp.float32), mask.T)
    _, advantages = jax.lax.scan(backwards, (zeros, zeros), steps, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask > 0, advantages + values, 0.0)


def leave_one_out(scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Score minus the mean of the other K - 1 samples of the prompt (RLOO, Kool et al. 2019)."""
    count = scores.shape[1]
    if count < 2:
        raise ValueError(f"leave_one_out needs K >= 2 samples of each prompt, got K={count}")
    return (scores - scores.mean(axis=1, keepdims=True)) * (count / (count - 1))


def group_normalised(scores: Float[Array, "B K"], eps: Scalar = 1e-4) -> Float[Array, "B K"]:
    """(score - mean) / (std + eps) over the K samples of a prompt, unbiased std (GRPO, TRL)."""
    count = scores.shape[1]
    if count < 2:
        raise ValueError(f"group_normalised needs K >= 2 samples of each prompt, got K={count}")
    centred = scores - scores.mean(axis=1, keepdims=True)
    return centred / (jnp.std(scores, axis=1, ddof=1, keepdims=True) + eps)
