"""The reward of a learned model."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model


def score(
    scorer: Model,
    tokens: Int[Array, "B T"],
    attend: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, " B"]:
    """The reward model read at the last real token of prompt and response together. [B]

    The signature of every on-device reward: `(params, tokens, attend, mask) -> [B]`.
    """
    del mask
    return heads.sequence_scores(scorer, tokens, attend)
