"""The sizes of the benchmarks' steps, and two lower bounds on their time.

`flops` are those of the model, and `bytes` have to move at least; the measured rates of a large
matrix product and a large copy turn them into seconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models import flops, transformer

FLOAT = 4  # bytes: parameters, gradients and moments are float32 wherever a model is trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a step."""

    batch: int = 32  # rows, or pairs of the reward model
    prompt: int = 64  # tokens
    response: int = 64  # tokens
    model: transformer.Config = transformer.Config(vocab_size=4096)
    epochs: int = 4  # of an iteration of PPO
    # Rows that continue the same prompt in sampling and GRPO, and beams of beam search. DPO and
    # reward models read pairs.
    samples: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError if the samples do not divide the batch."""
        if self.samples < 1 or self.batch % self.samples:
            raise ValueError(f"samples={self.samples} do not divide the batch of {self.batch} rows")


class Work(NamedTuple):
    """What any program for a step must do at least: the FLOPs of the model, and bytes to move."""

    flops: float
    bytes: float


def forward_flops(c: transformer.Config, rows: int, first: int, last: int, heads: int) -> float:
    """A forward pass over positions [first, last) of `rows` rows, the rest being cached.

    The vocabulary product is counted at `heads` positions per row.
    """
    return rows * flops.forward(c, last - first, flops.attended_in_row(c, first, last), heads)


def weight_bytes(c: transformer.Config, head: bool) -> float:
    """The matrices a forward pass reads; of the embedding only the rows looked up, ignored here."""
    weights = flops.trunk_weights(c) + (c.d_model * c.vocab_size if head else 0)
    return jnp.dtype(c.dtype).itemsize * weights


def update_bytes(parameters: Any) -> float:
    """An update moves ten floats a parameter: read forward and backward, its gradient written and
    read, itself and both moments of Adam read and written. Activations are not counted."""
    return 10.0 * FLOAT * sum(x.size for x in jax.tree.leaves(parameters))


def sft_work(config: Workload, policy: transformer.Model) -> Work:
    """One update: forward and twice that backward, logits at every position, no recomputation."""
    length = config.prompt + config.response
    forward = forward_flops(config.model, config.batch, 0, length, heads=length)
    return Work(3 * forward, update_bytes(policy))


def reward_model_work(config: Workload, scorer: transformer.Model) -> Work:
    """One update on twice the rows, without a vocabulary product."""
    length = config.prompt + config.response
    return Work(
        3 * forward_flops(config.model, 2 * config.batch, 0, length, heads=0), update_bytes(scorer)
    )


def sampling_work(config: Workload) -> Work:
    """Prefill with one row of logits, then R - 1 decoding steps (the last token is never read).

    Bytes: the weights once a step, prefill being one; every step reads the cache up to its
    position, the part of a prompt once for all of its rows. Logits and the writes to the cache (1 /
    length of its reads) are not counted.
    """
    c, steps = config.model, config.response - 1
    prompts, last = config.batch // config.samples, config.prompt + steps
    flops = forward_flops(c, prompts, 0, config.prompt, heads=1)
    flops += forward_flops(c, config.batch, config.prompt, last, heads=steps)
    columns = prompts * steps * config.prompt + config.batch * steps * (steps + 1) // 2
    cache = 2 * jnp.dtype(c.dtype).itemsize * c.num_layers * c.num_kv_heads * c.head_dim
    return Work(flops, config.response * weight_bytes(c, head=True) + cache * columns)


def dpo_work(config: Workload, policy: transformer.Model) -> Work:
    """One update on pairs, logits at the responses, and a forward pass of the reference."""
    c, rows, length = config.model, 2 * config.batch, config.prompt + config.response
    forward = forward_flops(c, rows, 0, length, heads=config.response)
    return Work(4 * forward, update_bytes(policy) + weight_bytes(c, head=True))


def grpo_work(config: Workload, policy: transformer.Model) -> Work:
    """Sampling; one forward pass of the reference and of the policy; one update."""
    c, length = config.model, config.prompt + config.response
    sampling = sampling_work(config)
    forward = forward_flops(c, config.batch, 0, length, heads=config.response)
    reads = 2 * weight_bytes(c, head=True)
    return Work(sampling.flops + 5 * forward, sampling.bytes + reads + update_bytes(policy))


def ppo_work(config: Workload, policy: transformer.Model, critic: transformer.Model | None) -> Work:
    """Sampling; one forward pass of reference, scorer, policy and critic; then the epochs.

    Two of the passes need logits, at the response only. An epoch is three forward passes of policy
    (with logits) and critic. Without `critic` the policy's trunk does its work.
    """
    c, length = config.model, config.prompt + config.response
    sampling = sampling_work(config)
    speaks = forward_flops(c, config.batch, 0, length, heads=config.response)
    scores = forward_flops(c, config.batch, 0, length, heads=0)
    values = 0.0 if critic is None else scores
    reads = 2 * weight_bytes(c, head=True) + (1 + (critic is not None)) * weight_bytes(c, False)
    return Work(
        sampling.flops + 2 * speaks + scores + values + 3 * config.epochs * (speaks + values),
        sampling.bytes + reads + config.epochs * update_bytes((policy, critic)),
    )
