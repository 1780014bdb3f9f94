"""The reward of a learned model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model


def score(
    scorer: Any,
    tokens: Int[Array, "B T"],
    attend: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, " B"]:
    """The scalar head of `scorer` at the last real token of prompt and response. [B]

    Every reward on the device has this signature: `(params, tokens, attend, mask) -> [B]`. Raises
    ValueError if `scorer` is not a model with a scalar head.
    """
    del mask
    check(scorer)
    return heads.sequence_scores(scorer, tokens, attend)


def check(scorer: Any) -> None:
    """Raises ValueError unless `scorer` is a model with a scalar head."""
    if not isinstance(scorer, Model) or "score" not in scorer.weights:
        raise ValueError(
            "a learned reward needs scorer=, a model with a scalar head such as reward_model.run "
            "trains; a reward of another kind is given as score= or reward="
        )
