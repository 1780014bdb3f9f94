"""The reward of a learned model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.data import chat
from rlhf_jax.data.tokenizers import Tokenizer
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


@dataclasses.dataclass(frozen=True)
class Continued:
    """`score` of a reward model that was trained on more text after the EOS of an answer.

    So were those of others whose chat template writes more after EOS, in ChatML a line break, for
    transformers reads a score at the last token of the text. These tokens are appended where a
    response has ended; one that was cut off is scored at its last token.
    """

    eos_ids: tuple[int, ...]  # the policy's
    after: tuple[int, ...]  # what follows EOS

    def __call__(
        self,
        scorer: Any,
        tokens: Int[Array, "B T"],
        attend: Int[Array, "B T"],
        mask: Float[Array, "B T"],
    ) -> Float[Array, " B"]:
        count, length = len(self.after), tokens.shape[1]
        last = jnp.max(jnp.where(attend > 0, jnp.arange(length), 0), axis=1, keepdims=True)
        ended = jnp.isin(jnp.take_along_axis(tokens, last, axis=1), jnp.asarray(self.eos_ids))
        wider = ((0, 0), (0, count))
        tokens, attend, mask = (jnp.pad(x, wider) for x in (tokens, attend, mask))
        number = jnp.arange(length + count) - last - 1
        new = ended & (number >= 0) & (number < count)
        after = jnp.asarray(self.after, tokens.dtype)[jnp.clip(number, 0, count - 1)]
        return score(scorer, jnp.where(new, after, tokens), jnp.where(new, 1, attend), mask)


def under_template(tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> Callable:
    """How a reward model scores answers to messages where transformers does, under its template.

    `tokenizer` is the one in the folder of the reward model, and `eos_ids` are those of the policy.
    A reward model that was trained here is scored at EOS: `folders.export` writes its template so.
    Logs a warning if the template writes no EOS, because the policy ends its answers with one.
    """
    after = chat.ids_after_eos(tokenizer)
    if after is None:
        logging.getLogger(__name__).warning(
            "the reward model's chat template writes no EOS after an answer, but responses are "
            "scored at their EOS: if it was trained under this template, its scores are others"
        )
    return Continued(eos_ids, after) if after else score


def check(scorer: Any) -> None:
    """Raises ValueError unless `scorer` is a model with a scalar head."""
    if not isinstance(scorer, Model) or "score" not in scorer.weights:
        raise ValueError(
            "a learned reward needs scorer=, a model with a scalar head such as reward_model.run "
            "trains; a reward of another kind is given as score= or reward="
        )
