"""A reward written in Python: it reads texts on the host while the device runs `judge`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax import sharding
from rlhf_jax.data.batches import Examples
from rlhf_jax.data.schema import Example
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.sampling import rollout

# (prompts, responses, rows) -> one score per response. `rows` are the rows of the data set that the
# prompts come from, as they were read: `row.extra` holds the fields that the format did not use.
Reward = Callable[[list[str], list[str], list[Example]], Sequence[float]]


def scores(
    reward: Reward, tokenizer: Tokenizer, examples: Examples, samples: Any, index: Any
) -> Float[np.ndarray, " B"]:
    """The reward of each sample that this process answers for, on the host. [B]

    With one process these are all. See `sharding.own_rows`, and `put_own_rows`, which puts the
    scores of several together.
    `samples` have `tokens`, `attend` and `mask` [B, T]; `index` [B] are the numbers of their
    prompts.
    Raises ValueError, naming the response, unless the reward gives one finite number for each.
    """
    samples, index = sharding.own_rows((samples, index))
    if not len(index):  # several processes split tensors among them, and another one scores
        return np.zeros(0, np.float32)
    prompts, responses = rollout.texts(tokenizer, samples)
    rows = [examples.sources[i % len(examples)] for i in index.tolist()]
    returned = reward(prompts, responses, rows)
    name = getattr(reward, "__name__", "the reward")
    try:
        values = np.asarray(returned)
    except ValueError:  # rows of unequal length
        values = np.asarray(None)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} returned {str(returned)[:80]}; a reward returns numbers")
    values = rollout.check_scores(reward, values.astype(np.float32), len(responses))
    for i in np.flatnonzero(~np.isfinite(values)):
        raise ValueError(
            f"{name} gave {values[i]} to response {i} of the batch, {responses[i][:60]!r}; "
            "a reward is a finite number"
        )
    return values


def check_arguments(reward: Callable, *names: str) -> None:
    """Raises ValueError unless `reward` can be called with these arguments, in this order."""
    try:
        inspect.signature(reward).bind(*names)
    except TypeError as error:
        name = getattr(reward, "__name__", "the reward")
        called = ", ".join(names)
        raise ValueError(f"{name} is called as {name}({called}), but {error}") from None
