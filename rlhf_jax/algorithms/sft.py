"""Supervised fine-tuning: cross entropy on the completion's tokens, EOS included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import config, losses, sharding
from rlhf_jax.data.batches import Demonstrations, Loader
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import Log


class Config(config.Config):
    """Settings of a fine-tuning run."""

    num_steps: int = 500
    batch_size: int = 32  # rows, of all devices together
    micro_batches: int = 1  # slices of a forward pass, to save memory; the loss is the same
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    save_every: int = 500  # steps between checkpoints


class Result(NamedTuple):
    """The trained policy and the metrics of each step this process ran."""

    policy: Model
    history: list[dict[str, Any]]


def loss(config: Config, params: dict, batch: Demonstrations):
    """Mean cross entropy over the completion tokens of the whole batch, nats per token.

    The mean divides by the global number of completion tokens, so that padding, packing, batch
    order, micro-batches and mesh do not change it. Documents packed into a row are kept apart by
    their segment numbers in `attend`.
    """
    policy = params["policy"]

    def forward(tokens, attend):
        hidden = transformer.hidden_states(policy, tokens, attend)
        return heads.token_logprobs(policy, hidden, tokens)

    logprobs, entropy = heads.map_rows(forward, config.micro_batches, batch.tokens, batch.attend)
    value = losses.masked_mean(-logprobs, batch.mask)
    metrics = {
        "entropy": losses.masked_mean(entropy, batch.mask),
        "num_tokens": jnp.sum(batch.mask),
    }
    return value, metrics


def run(
    config: Config,
    policy: Model,
    demonstrations: Loader,
    *,
    loss_fn: Callable = loss,
    mesh: jax.sharding.Mesh | None = None,
    log: Log | None = None,
    checkpoints: Checkpoints | None = None,
) -> Result:
    """Fine-tunes `policy`, continuing from the newest checkpoint where there is one.

    Raises ValueError if the batch does not divide over the mesh, TrainingStopped on a non-finite
    step. The caller's parameters are left alone.
    """
    trained, history = loop.fit(
        config,
        lambda policy: {"policy": policy},
        policy,
        loss_fn,
        demonstrations,
        name="sft",
        mesh=mesh or sharding.make_mesh(),
        log=log or Log(quiet=True),
        checkpoints=checkpoints,
    )
    return Result(trained["policy"], history)


def evaluate(
    config: Config, policy: Model, demonstrations: Loader, *, mesh: jax.sharding.Mesh | None = None
) -> float:
    """Cross entropy on held-out demonstrations, nats per completion token, every row once."""
    mesh = mesh or sharding.make_mesh()

    def sums(config, policy, batch):
        mean, metrics = loss(config, {"policy": policy}, batch)
        return mean * metrics["num_tokens"], metrics["num_tokens"]

    with jax.set_mesh(mesh):
        compiled = jax.jit(sums)
        totals = [
            compiled(config, policy, sharding.put_rows(mesh, batch))
            for batch in demonstrations.epoch_batches()
        ]
        total, count = (sum(float(x) for x in column) for column in zip(*totals))
    return total / count
