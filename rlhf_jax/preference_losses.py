"""Losses of preferences, on what a policy says of whole responses: DPO and its relatives.

Arrays in, arrays out, one small function per equation, as in `losses`. A response y to a prompt x
has an implicit reward: beta * (log p(y|x) - log p_ref(y|x)), or beta times the mean of log p over
the tokens of y where there is no reference. The gap of a pair is the reward of its better response
minus that of the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses
from rlhf_jax.losses import Scalar

# No mean log-probability is taken to be closer to 0 than this: the odds of 1 are infinite.
MAX_MEAN_LOGP = -1e-6

# ------------------------------------------------------------------------------------ of each pair


def gaps(x: Float[Array, "B K"]) -> Float[Array, "B K K"]:
    """x_i - x_j at [b, i, j], for every two responses of a prompt. [B, K] -> [B, K, K]."""
    return x[:, :, None] - x[:, None, :]


def sigmoid_loss(gap: Float[Array, "*n"], label_smoothing: Scalar = 0.0) -> Float[Array, "*n"]:
    """-(1 - e) log sigmoid(gap) - e log sigmoid(-gap), in nats per pair, where e is the smoothing.

    With e = 0 it is the loss of DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). Conservative
    DPO (Mitchell 2023, "cDPO") takes e for the chance that a pair is labelled the wrong way round;
    the loss is then least where sigmoid(gap) = 1 - e.
    """
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(gap) - (
        label_smoothing * jax.nn.log_sigmoid(-gap)
    )


def hinge_loss(gap: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """max(0, 1 - gap), SLiC's hinge (Zhao et al. 2023, arXiv:2305.10425) on the gap of rewards."""
    return jax.nn.relu(1.0 - gap)


def ipo_loss(gap: Float[Array, "*n"], beta: Scalar) -> Float[Array, "*n"]:
    """(gap - 1 / (2 beta))^2: IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), whose tau is beta.

    Here the gap is one of log-ratios without the factor beta: of their means per token, as TRL has
    it, or of their sums.
    """
    return jnp.square(gap - 1.0 / (2.0 * beta))


def log_odds(mean_logps: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log p / (1 - p) of p = exp(mean_logps), the geometric mean of the token probabilities.

    Hong et al. 2024 (ORPO, arXiv:2403.07691, eq. 4). A gap of log odds goes through `sigmoid_loss`
    (eq. 7). At p = 1 the odds would be infinite: log p is taken to be `MAX_MEAN_LOGP` at most.
    """
    mean_logps = jnp.minimum(mean_logps, MAX_MEAN_LOGP)
    return mean_logps - jnp.log(-jnp.expm1(mean_logps))


# -------------------------------------------------------------------------------- of each response


def kto_loss(
    *, rewards: Float[Array, "*n"], baseline: Scalar, desirable: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """1 - sigmoid(reward - baseline) where `desirable` is 1, 1 - sigmoid(baseline - reward) else.

    KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7) with both of its weights 1. The baseline
    is beta times the KL divergence to the reference.
    """
    gain = rewards - baseline
    return jax.nn.sigmoid(jnp.where(desirable > 0, -gain, gain))


# ------------------------------------------------------------------------------- means and metrics


def mean_over_prompts(terms: Float[Array, "B K K"], pairs: Float[Array, "B K K"]) -> Array:
    """Mean over prompts of the mean of `terms` over each one's `pairs`. [B, K, K] x 2 -> [].

    As InstructGPT weighs comparisons (arXiv:2203.02155, eq. 1): a prompt with nine responses counts
    as much as one with two. A prompt without a pair does not count; without any the mean is 0.
    `losses.ranked_pairs` gives the pairs.
    """
    means = losses.masked_mean(terms, pairs, axis=(1, 2))
    return losses.masked_mean(means, jnp.max(pairs, axis=(1, 2)))


def pair_metrics(rewards: Float[Array, "B K"], pairs: Float[Array, "B K K"]) -> dict[str, Array]:
    """TRL's "rewards/...", as means over `pairs`, and the numbers of pairs and of prompts with one.

    `pairs` is 1 at [b, i, j] where response i is better than j. A tie in reward is half right.
    """
    gap = gaps(rewards)
    return {
        "rewards/accuracies": losses.masked_mean((gap > 0) + 0.5 * (gap == 0), pairs),
        "rewards/margins": losses.masked_mean(gap, pairs),
        **sides("rewards", rewards, pairs),
        "num_pairs": jnp.sum(pairs),
        "num_prompts": jnp.sum(jnp.max(pairs, axis=(1, 2))),
    }


def sides(name: str, x: Float[Array, "B K"], pairs: Float[Array, "B K K"]) -> dict[str, Array]:
    """{"name/chosen", "name/rejected"}: means of x over the better and over the worse side."""
    return {
        f"{name}/chosen": losses.masked_mean(x, jnp.sum(pairs, axis=2)),
        f"{name}/rejected": losses.masked_mean(x, jnp.sum(pairs, axis=1)),
    }
