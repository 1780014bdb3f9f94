"""Process reward model: says of every step of a response whether it is right (arXiv:2211.14275).

The scorer has one output per token, s, the log odds that the step which the token ends is right. It
is trained by binary cross entropy at the last token of each step. TRL's PRMTrainer has two outputs
per token and the cross entropy of two classes, in which only the difference of the two counts: s is
that difference. `rewards/process.py` makes rewards of what the scorer says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from rlhf_jax import abstract, losses
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, Seed
from rlhf_jax.data import epoch, loader
from rlhf_jax.data.batches import Loader, Steps
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import agreement, process
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

DISPLAY = Display(
    "Process reward model",
    ("loss", "accuracy"),
    {"loss": "Loss", "accuracy": "Accuracy on steps", "probability": "Mean probability of right"},
)


class Config(loop.Config):
    """Settings of a run. `batch_size` counts responses, each with all of its steps."""

    num_steps: Count = 300
    save_every: Count = 300
    seed: Seed = 0  # of the scalar head that training starts from


class Result(NamedTuple):
    """The trained scorer and the metrics of each step this process ran."""

    scorer: Model
    history: list[dict[str, Any]]


def score_batch(scorer: Model, batch: Steps, micro_batches: int = 1) -> Float[Array, "B T"]:
    """The log odds at every token; only those at the marks mean anything."""
    forward = functools.partial(process.token_scores, scorer)
    recompute = heads.must_recompute(scorer)
    return heads.map_rows(forward, micro_batches, batch.tokens, batch.attend, recompute=recompute)


def loss(config: Config, params: dict, batch: Steps):
    """Mean over the steps of -y log p - (1 - y) log(1 - p), nats, for labels y in [0, 1].

    p = sigmoid(s), with s of the scorer at the last token of the step. Every step of the batch
    weighs the same.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    nats = optax.sigmoid_binary_cross_entropy(scores, batch.labels)
    right = _right(scores, batch.labels)
    metrics = {
        "accuracy": losses.masked_mean(right, batch.marks),
        "probability": losses.masked_mean(process.probability(scores), batch.marks),
        "num_marks": jnp.sum(batch.marks),
    }
    return losses.masked_mean(nats, batch.marks), metrics


def _right(scores: Any, labels: Any) -> Any:
    """1 where score and label are on the same side; a label of 1/2 is on that of the wrong."""
    return ((scores > 0) == (labels > 0.5)) * 1.0


def run(
    config: Config,
    policy: Model,
    steps: Loader,
    *,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    held_out: Loader | None = None,
    runtime: Runtime | None = None,
) -> Result:
    """Trains a scorer that starts as `policy` (usually the SFT model) under a scalar head.

    A scalar head that `policy` already has is trained further. Continues from the newest checkpoint
    where there is one. `held_out` is evaluated every `eval_every` steps, as by `evaluate`. Raises
    ValueError if the batch does not divide over the mesh, TrainingStopped on a non-finite step.
    """
    runtime = runtime or Runtime()
    for data in filter(None, (steps, held_out)):
        loader.expect(data, "process_reward.run", Steps)

    def figures(_: int, params: dict) -> dict[str, float]:
        return evaluate(config, params["scorer"], held_out, mesh=runtime.mesh)

    trained, history = loop.fit(
        config,
        {"scorer": heads.init_scorer(policy, jax.random.key(config.seed))},
        steps,
        loss_fn=loss_fn,
        make_optimizer=make_optimizer,
        name="process_reward",
        display=DISPLAY,
        runtime=runtime,
        evaluate=figures if held_out else None,
    )
    return Result(trained["scorer"], history)


def evaluate(
    config: Config, scorer: Model, steps: Loader, *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, float]:
    """Held-out metrics {"loss", "accuracy", ...} of all steps, whichever loss trained the scorer.

    Returns:
      loss: the mean of `loss`, nats per step.
      accuracy: the share of the steps whose score is above 0 just where the label is above 1/2.
      accuracy_low, accuracy_high: its 95 % interval, with responses as the independent units.
      base_rate: the share of the labels above 1/2, to compare the accuracy with.
      steps: how many steps there are.
    """
    found = epoch.rows(_scored, (config.micro_batches,), (scorer,), steps, mesh)
    scores, labels, marks = (np.asarray(found[x], np.float64) for x in _SCORED)
    count = marks.sum()
    nats = np.logaddexp(0.0, scores) - labels * scores
    right = (_right(scores, labels) * marks).sum(axis=1)
    accuracy, low, high = agreement.interval(right, marks.sum(axis=1))
    return {
        "loss": float((nats * marks).sum() / count),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "base_rate": float(((labels > 0.5) * marks).sum() / count),
        "steps": int(count),
    }


_SCORED = ("scores", "labels", "marks")


def _scored(micro_batches: int, scorer: Model, batch: Steps) -> dict[str, Array]:
    found = (score_batch(scorer, batch, micro_batches), batch.labels, batch.marks)
    return dict(zip(_SCORED, found))


def programs(
    config: Config,
    policy: Model,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    loss_fn: Callable = loss,
    name: str = "process_reward",
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `run` and `evaluate` run on rows of `length` tokens; `result` is the trained scorer.

    `policy` is a tree of shapes, and `resident` what the experiment holds besides: see `abstract`.
    """
    batch = abstract.steps(mesh, config.batch_size, length)
    key = jax.random.key(config.seed)
    models = {"scorer": abstract.derived(heads.init_scorer, mesh, policy, key)}
    held = (policy, resident)
    stage = abstract.supervised(
        config,
        models,
        batch,
        mesh,
        loss_fn=loss_fn,
        name=name,
        make_optimizer=make_optimizer,
        resident=held,
    )
    scorer = stage.result["scorer"]
    scoring = (_scored, (config.micro_batches,), (scorer,), batch, mesh)
    during = stage.held if config.eval_every else held
    evaluation = abstract.over_rows(f"{name}: evaluate", *scoring, during)
    return Stage([*stage.programs, evaluation], scorer, stage.held)
