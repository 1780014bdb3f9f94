"""Sampling: filters, the compiled decode loop, and what an online algorithm collects with it."""

from rlhf_jax.sampling.decode import Samples, categorical, greedy, row_keys, sample
from rlhf_jax.sampling.filters import Filters
from rlhf_jax.sampling.rollout import Rollout, collect

__all__ = [
    "Filters",
    "Rollout",
    "Samples",
    "categorical",
    "collect",
    "greedy",
    "row_keys",
    "sample",
]
