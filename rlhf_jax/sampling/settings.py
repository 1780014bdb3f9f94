"""How responses are drawn: the settings, and what the functions that change logits may look at."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Annotated, NamedTuple

from jaxtyping import Array, Int

from rlhf_jax import config


class Sampling(config.Config):
    """How responses are drawn.

    Real numbers are traced: a new value does not recompile. None or () switches a penalty or a
    filter off statically, so that nothing is compiled for it. They are applied in the order of the
    fields, each to what the one before left: the penalties to the logits of the model (see
    `penalties.apply`), then the temperature, then the filters (see `filters.apply`). Temperature 0
    applies no filter.
    """

    max_new_tokens: config.Count = 64  # longest response, EOS included
    # Divides the positive logits of tokens in prompt or response, and multiplies the negative ones.
    repetition_penalty: config.Positive | None = None
    presence_penalty: float | None = None  # subtracted from the logits of tokens in the response
    frequency_penalty: float | None = None  # the same, as often as the response has the token
    no_repeat_ngram: config.Count | None = None  # no sequence of so many tokens occurs twice
    banned_tokens: tuple[int, ...] = ()  # ids that are never drawn
    min_new_tokens: config.Count | None = None  # how many tokens come before EOS at least
    forced_tokens: tuple[int, ...] = ()  # ids that the response begins with
    temperature: config.NonNegative = 1.0  # divides the logits; 0 takes the most likely token
    top_k: Annotated[float, config.Range(1)] | None = None  # draw from the k most likely tokens
    # Draw from the most likely tokens that together have this probability.
    top_p: Annotated[float, config.Range(0, 1, open_low=True)] | None = None
    min_p: config.Share | None = None  # draw from tokens with p >= min_p * the largest p
    # Draw from the tokens with -log p nearest to the entropy that together have this probability.
    typical_p: Annotated[float, config.Range(0, 1, open_low=True)] | None = None
    epsilon_cutoff: config.Share | None = None  # draw from tokens with p >= epsilon_cutoff

    def check(self) -> None:
        """Raises ValueError for ids that are none, and for contradicting fields."""
        if self.top_k is not None and not float(self.top_k).is_integer():
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 1, or None")
        _check_ids("banned_tokens", self.banned_tokens)
        _check_ids("forced_tokens", self.forced_tokens)
        if both := sorted(set(self.banned_tokens) & set(self.forced_tokens)):
            raise ValueError(
                f"forced_tokens={self.forced_tokens} holds {both}, which banned_tokens forbids; "
                "remove them from one of the two"
            )
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be at most "
                f"max_new_tokens={self.max_new_tokens}"
            )
        if len(self.forced_tokens) > self.max_new_tokens:
            raise ValueError(
                f"forced_tokens has {len(self.forced_tokens)} ids, but must have at most "
                f"max_new_tokens={self.max_new_tokens}"
            )


def _check_ids(name: str, ids: tuple[int, ...]) -> None:
    def is_id(x) -> bool:
        return isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= 0

    if not isinstance(ids, tuple) or not all(map(is_id, ids)):
        raise ValueError(f"{name}={ids!r} must be a tuple of token ids, whole numbers at least 0")


def check_vocabulary(sampling: Sampling, size: int) -> None:
    """Raises ValueError if `top_k` exceeds the model's `size` tokens.

    Outside of jit, where the number is known. `filters.apply` itself then keeps all tokens.
    """
    if sampling.top_k is not None and sampling.top_k > size:
        raise ValueError(
            f"top_k={sampling.top_k:.0f} must be at most the number of tokens of the model, {size}"
        )


class History(NamedTuple):
    """What a penalty or a processor may look at beside the logits. R is `max_new_tokens`."""

    prompts: Int[Array, "B P"]  # padded on the left
    attend: Int[Array, "B P"]  # 1 on the real tokens of the prompts
    tokens: Int[Array, "B R"]  # drawn so far in the first `count` columns, then padding
    count: Int[Array, ""]


Processor = Callable[[Array, History], Array]  # (logits [B, V], history) -> logits [B, V]
