"""The exponential average of a policy's weights, carried beside an algorithm's own memory.

With a decay of None there is no average, and the memory is the algorithm's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Decay = float | Float[Array, ""] | None


class Averaged(NamedTuple):
    """The memory of a run that averages: the algorithm's own, and the average."""

    memory: Any
    policy: Any


def start(decay: Decay, memory: Any, policy: Any) -> Any:
    """The memory before the first iteration; the average starts as a copy of the policy."""
    return memory if decay is None else Averaged(memory, jax.tree.map(jnp.copy, policy))


def own(decay: Decay, memory: Any) -> Any:
    """The algorithm's own part of a memory."""
    return memory if decay is None else memory.memory


def moved(decay: Decay, before: Any, memory: Any, policy: Any) -> Any:
    """The memory after an iteration: its own part replaced, the average moved to the policy."""
    if decay is None:
        return memory
    average = jax.tree.map(lambda x, y: y + decay * (x - y), before.policy, policy)
    return Averaged(memory, average)


def networks(decay: Decay, memory: Any, trainable: dict[str, Any]) -> dict[str, Any]:
    """The networks, with the average in place of the policy where there is one."""
    return trainable if decay is None else {**trainable, "policy": memory.policy}
