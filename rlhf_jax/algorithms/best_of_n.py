"""Best of n, and fine-tuning on it: rejection-sampling fine-tuning, RAFT (arXiv:2304.06767).

`expected_best` and `kl_bound` say what taking the best of n responses would give, and `run` trains
the policy towards it: an iteration samples K responses to each prompt, keeps the one with the
highest reward, and takes supervised steps on those. Nothing is kept from earlier iterations, and
there is no KL term. No step assumes that the policy itself was sampled, so the sampler may have
filters and penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "Best of n",
    online.HEADLINE,
    {**online.CURVES, "objective/best_scores": "Reward of the best", "loss": "Loss"},
)

# ----------------------------------------------------------------------------- what best of n gives


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n, nats: an upper bound of the KL of best of n to the policy.

    It is often quoted as an equality, but for discrete responses it is only a bound (Beirami et al.
    2024, arXiv:2401.01879). Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"the best of n={n} responses needs at least one")
    return math.log(n) - (n - 1) / n


def expected_best(
    proxy: Float[np.ndarray, "*b N"], gold: Float[np.ndarray, "*b N"], n: int
) -> Float[np.ndarray, "*b"]:
    """The expected gold score of the best of n responses by `proxy`, from N >= n draws. [N] -> [].

    Unbiased: the mean over all subsets of n draws of the gold score of the subset's best, ties
    broken at random. Draw i in ascending order is the best of C(i - 1, n - 1) of C(N, n) subsets.
    Raises ValueError if the shapes differ or there are fewer than n draws.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    draws = proxy.shape[-1]
    if proxy.shape != gold.shape or not 1 <= n <= draws:
        raise ValueError(
            f"best of {n} from proxy {proxy.shape} and gold {gold.shape}: their shapes must be the "
            f"same, [.., N], and 1 <= n <= N"
        )
    weights = np.array([math.comb(i, n - 1) / math.comb(draws, n) for i in range(draws)])

    def of_prompt(proxy, gold):
        order = np.argsort(proxy, kind="stable")
        _, group, sizes = np.unique(proxy[order], return_inverse=True, return_counts=True)
        shared = np.bincount(group, weights) / sizes  # tied draws are equally likely to be taken
        return np.dot(shared[group], gold[order])

    rows = zip(proxy.reshape(-1, draws), gold.reshape(-1, draws))
    return np.array([of_prompt(*row) for row in rows]).reshape(proxy.shape[:-1])


# ------------------------------------------------------------------------------------ the algorithm


class Config(online.Config):
    """Settings of a RAFT run: one pass over the best of 8 in each iteration."""

    num_epochs: Count = 1
    samples_per_prompt: Count = 8

    def check(self) -> None:
        """Raises ValueError for sizes that do not divide each other."""
        super().check()
        kept = f"batch_size={self.batch_size} responses per iteration, one to each prompt,"
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"{kept} are not a multiple of num_minibatches={self.num_minibatches}")
        if self.batch_size // self.num_minibatches % self.micro_batches:
            raise ValueError(f"{kept} do not divide into micro_batches={self.micro_batches}")

    def row_counts(self) -> dict[str, int]:
        """The numbers of rows that must divide over a mesh: those that are sampled, and kept."""
        kept = self.batch_size // self.num_minibatches
        return {
            "batch_size * samples_per_prompt": self.num_responses,
            "batch_size / num_minibatches": kept,
            "minibatch_size / micro_batches": kept // self.micro_batches,
        }


class Batch(NamedTuple):
    """The best response to each of G prompts."""

    tokens: Int[Array, "G T"]
    attend: Int[Array, "G T"]
    mask: Float[Array, "G T"]
    old_logprobs: Float[Array, "G T"]


def make_batch(config: Config, params: dict, memory: Any, rollout: Rollout):
    """The best response to each prompt, the first of those that tie: (Batch, memory, metrics)."""
    del params
    scores = rollout.scores.reshape(-1, config.samples_per_prompt)
    best = jnp.argmax(scores, axis=1)

    def of_best(x):
        grouped = x.reshape(*scores.shape, *x.shape[1:])
        return jax.vmap(lambda group, i: group[i])(grouped, best)

    batch = Batch(*(of_best(getattr(rollout, name)) for name in Batch._fields))
    metrics = {
        "objective/best_scores": jnp.mean(jnp.max(scores, axis=1)),
        "objective/best_length": jnp.mean(jnp.sum(batch.mask, axis=1)),
    }
    return batch, memory, metrics


def loss(config: Config, params: dict, batch: Batch):
    """Cross entropy of the best responses, nats: a mean over their tokens.

    It is measured at the temperature that sampled, so with one response per prompt the gradient of
    the sum over tokens is 0 in expectation: a policy does not change by imitating itself.
    """
    logprobs, _, entropy = online.forward(config, params, batch)
    metrics = {
        **on_policy.drift(batch, logprobs),
        "policy/entropy_avg": losses.masked_mean(entropy, batch.mask),
    }
    return -losses.masked_mean(logprobs, batch.mask), metrics


def algorithm(make_batch: Callable = make_batch, loss_fn: Callable = loss) -> online.Algorithm:
    """RAFT as `online` runs it."""
    return online.Algorithm(
        "best_of_n", DISPLAY, online.policy_alone, make_batch, loss_fn, any_sampler=True
    )


def run(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> online.Result:
    """Trains `policy` on its own best responses, iteration by iteration; see `online.Inputs`."""
    trained, history = online.run(config, algorithm(make_batch, loss_fn), **inputs)
    return online.Result(trained["policy"], history)


def programs(
    config: Config,
    *,
    make_batch: Callable = make_batch,
    loss_fn: Callable = loss,
    **shapes: Unpack[abstract.Inputs],
) -> Stage:
    """What `run` runs; `result` is the trained policy."""
    return abstract.online(config, algorithm(make_batch, loss_fn), **shapes)
