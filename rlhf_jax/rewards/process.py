"""Process rewards: a score for every step of a response, from a learned model.

    marks = process.marks_of(tokenizer)
    best_of_n.run(config, ..., scorer=scorer, score=process.score(marks))
    ppo.run(config, ..., scorer=scorer, score=process.score(marks),
            make_batch=ppo_variants.step_batch(marks))

The scorer is one that `algorithms/process_reward.py` trains. Its scalar head at the last token of a
step is the log odds that the step is right, given the prompt and the steps before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import advantages, losses
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import learned
from rlhf_jax.sampling.rollout import Score

# What a step is worth by its log odds: the probability that it is right.
probability = jax.nn.sigmoid

# (probabilities [B, T], marks [B, T]) -> [B]: what a response is worth by those of its steps.
Reduce = Callable[[Array, Array], Array]


class Marks(NamedTuple):
    """Which tokens of a sampled response end a step. `marks_of` finds them for a tokenizer."""

    step_ends: tuple[int, ...]  # ids; with () the whole response is one step
    eos_ids: tuple[int, ...] = ()  # of these one that follows the end of a step is no step itself


def marks_of(tokenizer: Tokenizer, separator: str = "\n") -> Marks:
    """Marks at every token whose text ends with `separator`, and the tokenizer's EOS.

    A policy may write the separator as a part of a longer token, such as ".\\n". Raises ValueError
    if no single token ends with it.
    """
    ids = [[i] for i in range(tokenizer.vocab_size)]
    texts = tokenizer.backend.decode_batch(ids, skip_special_tokens=True)
    found = tuple(i for i, text in enumerate(texts) if separator and text.endswith(separator))
    if not found:
        raise ValueError(
            f"no token of the tokenizer ends with {separator!r}; let steps end with a text that is "
            "one token, or a part of one"
        )
    return Marks(found, tokenizer.eos_ids)


def checked(marks: Any) -> Marks:
    """Returns `marks`. Raises ValueError unless they are tuples of token ids, 0 or above."""
    ids = [*marks] if isinstance(marks, Marks) else [None]
    if not all(isinstance(x, tuple) and all(type(i) is int and i >= 0 for i in x) for x in ids):
        raise ValueError(
            f"marks={str(marks)[:60]} must be process.Marks of two tuples of token ids, such as "
            "process.marks_of(tokenizer) gives"
        )
    return marks


def step_marks(
    marks: Marks, tokens: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """1 on the last token of each step of a response, else 0. `mask` is 1 on the response.

    These are the tokens that end a step, and the last token of the response, whatever it is; but
    not an EOS right after the end of a step.
    """
    ends = jnp.isin(tokens, jnp.asarray(marks.step_ends, tokens.dtype)) * (mask > 0)
    last = advantages.last_token(mask)
    if marks.eos_ids:
        before_last = advantages.last_token(mask * (1.0 - last))
        after_step = jnp.sum(ends * before_last, axis=1, keepdims=True)
        is_eos = jnp.isin(tokens, jnp.asarray(marks.eos_ids, tokens.dtype))
        last = last * (1.0 - after_step * is_eos)
    return jnp.maximum(ends, last).astype(jnp.float32)


@transformer.jit
def token_scores(
    scorer: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The scalar head at every token, float32: at the end of a step, the log odds that it is right.

    Entry t is of the text up to and including token t.
    """
    return heads.scalar(scorer, transformer.hidden_states(scorer, tokens, attend))


def least(probabilities: Float[Array, "B T"], marks: Float[Array, "B T"]) -> Float[Array, " B"]:
    """That of the worst step; 1 for a row without marks. [B, T], [B, T] -> [B]."""
    return jnp.min(jnp.where(marks > 0, probabilities, 1.0), axis=1)


def mean(probabilities: Float[Array, "B T"], marks: Float[Array, "B T"]) -> Float[Array, " B"]:
    """The mean over the steps; 0 for a row without marks. [B, T], [B, T] -> [B]."""
    return losses.masked_mean(probabilities, marks, axis=1)


def last(probabilities: Float[Array, "B T"], marks: Float[Array, "B T"]) -> Float[Array, " B"]:
    """That of the last step; 0 for a row without marks. [B, T], [B, T] -> [B]."""
    return losses.masked_sum(probabilities, advantages.last_token(marks), axis=1)


def product(probabilities: Float[Array, "B T"], marks: Float[Array, "B T"]) -> Float[Array, " B"]:
    """The probability that all steps are right; 1 for a row without marks. [B, T], [B, T] -> [B].

    Lightman et al. 2023 (arXiv:2305.20050), section 2.6.
    """
    return jnp.prod(jnp.where(marks > 0, probabilities, 1.0), axis=1)


def score(marks: Marks, reduce: Reduce = least) -> Score:
    """A reward on the device: (params, tokens, attend, mask) -> [B], where `params` is the scorer.

    `reduce` makes one number of the probabilities of the steps: `least`, `mean`, `last`, `product`,
    or a function of your own like them. The same arguments give the same object. Raises ValueError
    if `marks` are not `Marks`; the reward does for a scorer without a scalar head.
    """
    return _score_of(checked(marks), reduce)


@functools.cache
def _score_of(marks: Marks, reduce: Reduce) -> Score:
    # Programs are compiled by the identity of their functions.
    return functools.partial(_score, marks, reduce)


def _score(
    marks: Marks,
    reduce: Reduce,
    params: Any,
    tokens: Int[Array, "B T"],
    attend: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, " B"]:
    learned.check(params)
    probabilities = probability(token_scores(params, tokens, attend))
    return reduce(probabilities, step_marks(marks, tokens, mask))
