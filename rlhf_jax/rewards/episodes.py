"""Scored responses as episodes: an action is a token, and the score comes with the last one."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import advantages
from rlhf_jax.data.records import Comparisons


class Episodes(NamedTuple):
    """N responses, each after its prompt."""

    tokens: Int[Array, "N T"]
    attend: Int[Array, "N T"]
    mask: Float[Array, "N T"]  # 1 on the actions: the response's tokens
    rewards: Float[Array, "N T"]


def of_responses(batch: Comparisons) -> Episodes:
    """All responses of a batch, N = B * K; absent ones have no action.

    Raises ValueError where only some rows of the data have scores.
    """
    if batch.scores is None:
        raise ValueError(
            "this loss reads scores, which only some rows of the dataset have; give every row its "
            "scores, or none (its ranks then stand in for them)"
        )
    tokens, attend, mask = (
        x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.attend, batch.mask)
    )
    last = advantages.last_token(mask)
    return Episodes(tokens, attend, mask, jnp.where(last > 0, batch.scores.reshape(-1, 1), 0.0))
