"""Supervised fine-tuning: cross entropy on the completion's tokens, EOS included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import abstract, losses
from rlhf_jax.abstract import Stage
from rlhf_jax.data import epoch, loader
from rlhf_jax.data.batches import Demonstrations, Loader
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

DISPLAY = Display("Supervised fine-tuning", ("loss",), {"loss": "Loss, nats per token"})


class Config(loop.Config):
    """Settings of a fine-tuning run."""


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

    logprobs, entropy = heads.map_rows(
        forward,
        config.micro_batches,
        batch.tokens,
        batch.attend,
        recompute=heads.must_recompute(policy),
    )
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
    make_optimizer: MakeOptimizer = training.make_optimizer,
    held_out: Loader | None = None,
    runtime: Runtime | None = None,
) -> Result:
    """Fine-tunes `policy`, continuing from the newest checkpoint where there is one.

    `held_out` is evaluated every `eval_every` steps ("eval/loss"). The caller's parameters do not
    change. Raises ValueError if the batch does not divide over the mesh, TrainingStopped on a
    non-finite step.
    """
    runtime = runtime or Runtime()
    for data in filter(None, (demonstrations, held_out)):
        loader.expect(data, "sft.run", Demonstrations)

    def figures(_: int, params: dict) -> dict[str, float]:
        return evaluate(config, params["policy"], held_out, mesh=runtime.mesh)

    trained, history = loop.fit(
        config,
        {"policy": policy},
        demonstrations,
        loss_fn=loss_fn,
        make_optimizer=make_optimizer,
        name="sft",
        display=DISPLAY,
        runtime=runtime,
        evaluate=figures if held_out else None,
    )
    return Result(trained["policy"], history)


def evaluate(
    config: Config, policy: Model, demonstrations: Loader, *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, float]:
    """{"loss"}: cross entropy on held-out demonstrations, nats per completion token."""
    total, count = epoch.sums(_nats, (), (config, policy), demonstrations, mesh)
    return {"loss": total / count}


def _nats(config: Config, policy: Model, batch: Demonstrations):
    """(nats, completion tokens) of a batch."""
    mean, metrics = loss(config, {"policy": policy}, batch)
    return mean * metrics["num_tokens"], metrics["num_tokens"]


def programs(
    config: Config,
    policy: Model,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `run` and `evaluate` run on rows of `length` tokens; `result` is the trained policy.

    `policy` is a tree of shapes, and `resident` what the experiment holds besides: see `abstract`.
    """
    batch = abstract.demonstrations(mesh, config.batch_size, length)
    stage = abstract.supervised(
        config,
        {"policy": policy},
        batch,
        mesh,
        loss_fn=loss_fn,
        name="sft",
        make_optimizer=make_optimizer,
        resident=resident,
    )
    trained = stage.result["policy"]
    held = stage.held if config.eval_every else (policy, resident)
    evaluated = evaluation(config, trained, batch, mesh, held)
    return Stage([*stage.programs, evaluated], trained, stage.held)


def evaluation(
    config: Config,
    policy: Model,
    batch: Demonstrations,
    mesh: jax.sharding.Mesh,
    resident: Any = (),
) -> abstract.Program:
    """What `evaluate` runs on a batch; all but `config` are shapes."""
    return abstract.over_rows("sft: evaluate", _nats, (), (config, policy), batch, mesh, resident)
