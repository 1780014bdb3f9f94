"""Reward model: rank loss on K >= 2 responses of one prompt (InstructGPT, arXiv:2203.02155).

Other losses to pass as `loss_fn`: `rating_gap_loss`, `plackett_luce_loss`, `regression_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import abstract, losses, preference_losses
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, NonNegative, Seed
from rlhf_jax.data import epoch, loader
from rlhf_jax.data.batches import Comparisons, Demonstrations, Loader
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import agreement
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

DISPLAY = Display(
    "Reward model",
    ("loss", "rewards/accuracies"),
    {
        "loss": "Loss",
        "rewards/accuracies": "Accuracy on comparisons",
        "rewards/margins": "Margin, chosen minus rejected",
    },
)


class Config(loop.Config):
    """Settings of a reward-model run.

    All responses to a prompt are one element of a batch, so that its pairs are seen together (the
    model overfits otherwise). `batch_size` counts prompts.
    """

    num_steps: Count = 300
    save_every: Count = 300
    centring_coef: NonNegative = 0.0  # weight of (chosen + rejected)^2 of every pair
    seed: Seed = 0  # of the scalar head that training starts from


class Result(NamedTuple):
    """The trained scorer and the metrics of each step this process ran."""

    scorer: Model
    history: list[dict[str, Any]]


def score_batch(scorer: Model, batch: Comparisons, micro_batches: int = 1) -> Float[Array, "B K"]:
    """Scores of all responses, [B, K, T] -> [B, K]; absent responses score 0."""
    prompts, responses, length = batch.tokens.shape

    def forward(tokens, attend):
        scores = heads.sequence_scores(
            scorer, tokens.reshape(-1, length), attend.reshape(-1, length)
        )
        return scores.reshape(-1, responses)

    # All responses of a prompt as one row, so that a slice of rows holds whole prompts.
    rows = (x.reshape(prompts, responses * length) for x in (batch.tokens, batch.attend))
    recompute = heads.must_recompute(scorer)
    scores = heads.map_rows(forward, micro_batches, *rows, recompute=recompute)
    return jnp.where(batch.present > 0, scores, 0.0)


def loss(config: Config, params: dict, batch: Comparisons):
    """Mean over prompts of the mean rank loss over each prompt's pairs, nats.

    InstructGPT eq. 1: a prompt with nine responses weighs as much as one with four. Prompts
    without a pair (all ties) do not count in the mean. With `centring_coef`, every pair adds
    (chosen + rejected)^2 with the same weights.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    ranking = losses.kwise_rank_loss(scores, batch.ranks, batch.present, batch.margin)
    return _mean_over_prompts(config, scores, ranking, batch)


def rating_gap_loss(config: Config, params: dict, batch: Comparisons):
    """`loss` with the gap of a pair's ratings as its margin (Llama 2, arXiv:2307.09288, eq. 2).

    Ratings are taken from the data as they are: scale them there for smaller margins.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    ratings = _ratings(batch)
    gap = ratings[:, :, None] - ratings[:, None, :]
    ranking = losses.kwise_rank_loss(scores, batch.ranks, batch.present, gap)
    return _mean_over_prompts(config, scores, ranking, batch)


def plackett_luce_loss(config: Config, params: dict, batch: Comparisons):
    """Mean over prompts of -log P(ranking) under Plackett-Luce, nats; `centring_coef` as in `loss`.

    It is a likelihood, so a prompt with nine responses weighs more than one with two.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    ranking = losses.plackett_luce_loss(scores, batch.ranks, batch.present)
    return _mean_over_prompts(config, scores, ranking, batch)


def regression_loss(config: Config, params: dict, batch: Comparisons):
    """Mean over responses of (score - rating)^2, single responses and ties included.

    Ratings are those of the data; labels give 1 or 0, and ranks alone give 1 for the best response
    down to 0 for the worst.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    squares = losses.score_regression_loss(scores=scores, targets=_ratings(batch))
    return losses.masked_mean(squares, batch.present), _metrics(scores, batch)


def _ratings(batch: Comparisons) -> Float[Array, "B K"]:
    if batch.scores is None:
        raise ValueError(
            "this loss reads ratings, which only some rows of the dataset have; give every row its "
            "scores, or none (its ranks then stand in for them)"
        )
    return batch.scores


def _mean_over_prompts(
    config: Config, scores: Float[Array, "B K"], ranking: Float[Array, " B"], batch: Comparisons
):
    pairs = losses.ranked_pairs(batch.ranks, batch.present)
    penalty = losses.centring_penalty(chosen=scores[:, :, None], rejected=scores[:, None, :])
    centring = losses.masked_mean(penalty, pairs, axis=(1, 2))
    usable = jnp.max(pairs, axis=(1, 2))
    value = losses.masked_mean(ranking + config.centring_coef * centring, usable)
    return value, _metrics(scores, batch)


def _metrics(scores: Float[Array, "B K"], batch: Comparisons) -> dict[str, Array]:
    pairs = losses.ranked_pairs(batch.ranks, batch.present)
    return preference_losses.pair_metrics(scores, pairs)


def run(
    config: Config,
    policy: Model,
    comparisons: Loader,
    *,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    held_out: Loader | None = None,
    runtime: Runtime | None = None,
) -> Result:
    """Trains a scorer that starts as `policy` (usually the SFT model) under a scalar head.

    A scalar head that `policy` already has, as a reward model does, is trained further; pass
    `transformer.without_score_head(policy)` to start a new one. Continues from the newest
    checkpoint where there is one. The result is not centred: see `centre`. `held_out` is evaluated
    every `eval_every` steps ("eval/loss", "eval/accuracy" and its interval). Raises ValueError if
    the batch does not divide over the mesh, TrainingStopped on a non-finite step.
    """
    runtime = runtime or Runtime()
    for data in filter(None, (comparisons, held_out)):
        loader.expect(data, "reward_model.run", Comparisons)

    def figures(_: int, params: dict) -> dict[str, float]:
        return evaluate(config, params["scorer"], held_out, mesh=runtime.mesh)

    trained, history = loop.fit(
        config,
        {"scorer": heads.init_scorer(policy, jax.random.key(config.seed))},
        comparisons,
        loss_fn=loss_fn,
        make_optimizer=make_optimizer,
        name="reward_model",
        display=DISPLAY,
        runtime=runtime,
        evaluate=figures if held_out else None,
    )
    return Result(trained["scorer"], history)


def centre(scorer: Model, responses: Loader, *, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Shifts the head's bias so that `responses`, usually demonstrations, have mean score 0.

    The rank loss does not see a shift; PPO's value function and KL trade-off do (InstructGPT,
    section 3.5). Every demonstration, or every response of every comparison, counts once.
    Raises ValueError for packed rows, whose documents have no score of their own.
    """
    if any(np.max(batch.attend) > 1 for batch in responses.epoch_batches()):
        raise ValueError(
            "packed rows hold several documents; centre on the demonstrations unpacked"
        )
    total, count = epoch.sums(_score_sums, (), (scorer,), responses, mesh)
    head = scorer.weights["score"]
    head = {**head, "bias": head["bias"] - total / count}
    return Model(scorer.config, {**scorer.weights, "score": head})


def _score_sums(scorer: Model, batch: Demonstrations | Comparisons):
    """(sum of the scores, number of responses) of a batch."""
    if isinstance(batch, Comparisons):
        scores, real = score_batch(scorer, batch), batch.present
    else:
        scores = heads.sequence_scores(scorer, batch.tokens, batch.attend)
        real = jnp.max(batch.mask, axis=1)
    return losses.masked_sum(scores, real), jnp.sum(real)


def score_all(
    scorer: Model,
    comparisons: Loader,
    *,
    micro_batches: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, np.ndarray]:
    """{"scores", "ranks", "present", "lengths"} of all rows in order, host arrays [N, K] each.

    Lengths are in tokens, prompt included. They are the arguments of `agreement.agreement`.
    """
    return epoch.rows(_scored, (micro_batches,), (scorer,), comparisons, mesh)


def _scored(micro_batches: int, scorer: Model, batch: Comparisons) -> dict[str, Array]:
    return {
        "scores": score_batch(scorer, batch, micro_batches),
        "ranks": batch.ranks,
        "present": batch.present,
        "lengths": jnp.sum(batch.attend > 0, axis=2),
    }


def evaluate(
    config: Config, scorer: Model, comparisons: Loader, *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, float]:
    """Held-out metrics {"loss", "accuracy", ...}, the same ones whichever loss trained the scorer.

    The loss is the plain rank loss (mean over the prompts that have a pair, nats), without margin
    and centring penalty; the others are those of `agreement`: accuracy over pairs with its 95 %
    interval, and the accuracy of length alone. Raises ValueError if no two responses differ in
    rank.
    """
    found = score_all(scorer, comparisons, micro_batches=config.micro_batches, mesh=mesh)
    figures = agreement.agreement(**found)
    scores, ranks, present = (jnp.asarray(found[x]) for x in ("scores", "ranks", "present"))
    ranking = losses.kwise_rank_loss(scores, ranks, present)
    usable = jnp.max(losses.ranked_pairs(ranks, present), axis=(1, 2))
    loss = float(losses.masked_mean(ranking, usable))
    return {"loss": loss} | figures


def programs(
    config: Config,
    policy: Model,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    responses: int = 2,
    loss_fn: Callable = loss,
    centred_on: Demonstrations | None = None,
    name: str = "reward_model",
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `run`, `evaluate` and `centre` run; `result` is the trained scorer.

    The comparisons have `responses` rows of `length` tokens; `centre` reads a batch `centred_on`,
    or them. `policy` is a tree of shapes, and `resident` what the experiment holds besides: see
    `abstract`.
    """
    batch = abstract.comparisons(mesh, config.batch_size, length, responses)
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
    rest = [
        abstract.over_rows(f"{name}: evaluate", *scoring, during),
        abstract.over_rows(
            f"{name}: centre", _score_sums, (), (scorer,), centred_on or batch, mesh, held
        ),
    ]
    return Stage([*stage.programs, *rest], scorer, stage.held)
