"""Sampling: its settings, the compiled decode loop, and the rollouts of online algorithms."""

from rlhf_jax.sampling.decode import (
    History,
    Processor,
    Samples,
    Sampling,
    categorical,
    greedy,
    row_keys,
    sample,
)
from rlhf_jax.sampling.rollout import Drawing, Rollout

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
