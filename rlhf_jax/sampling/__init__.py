"""Sampling: its settings, the compiled decode loop, and the rollouts of online algorithms."""

from rlhf_jax.sampling.decode import (
    Samples,
    categorical,
    greedy,
    row_keys,
    sample,
)
from rlhf_jax.sampling.rollout import Drawing, Rollout
from rlhf_jax.sampling.settings import History, Processor, Sampling

__all__ = [
    "Drawing",
    "History",
    "Processor",
    "Rollout",
    "Samples",
    "Sampling",
    "categorical",
    "greedy",
    "row_keys",
    "sample",
]
