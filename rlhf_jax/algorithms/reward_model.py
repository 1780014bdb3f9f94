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

from rlhf_jax import config, losses, sharding
from rlhf_jax.data.batches import Comparisons, Demonstrations, Loader, real_rows
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import Log


class Config(config.Config):
    """Settings of a reward-model run.

    All responses of a prompt are one element of a batch, so that no pair of it is seen apart from
    the others (it overfits otherwise).
    """

    num_steps: int = 300
    batch_size: int = 32  # prompts, each with all its responses
    micro_batches: int = 1  # slices of a forward pass, to save memory; the loss is the same
    centring_coef: float = 0.0  # weight of (chosen + rejected)^2 of every pair
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    save_every: int = 300  # steps between checkpoints
    seed: int = 0


class Result(NamedTuple):
    """The trained scorer and the metrics of each step this process ran."""

    scorer: Model
    history: list[dict[str, Any]]


def score_batch(scorer: Model, batch: Comparisons, micro_batches: int = 1) -> Float[Array, "B K"]:
    """Scores of all responses, [B, K, T] -> [B, K]; absent responses (mask 0) score 0."""
    prompts, responses, length = batch.tokens.shape
    flat = lambda x: x.reshape(prompts, responses * length)  # noqa: E731

    def forward(tokens, attend):
        scores = heads.sequence_scores(
            scorer, tokens.reshape(-1, length), attend.reshape(-1, length)
        )
        return scores.reshape(-1, responses)

    scores = heads.map_rows(forward, micro_batches, flat(batch.tokens), flat(batch.attend))
    return jnp.where(batch.mask > 0, scores, 0.0)


def loss(config: Config, params: dict, batch: Comparisons):
    """Mean over prompts of the mean rank loss over each prompt's pairs, nats.

    InstructGPT eq. 1: a prompt with nine responses weighs as much as one with four. Prompts
    without a pair (all ties) do not count in the mean. With `centring_coef`, every pair adds
    (chosen + rejected)^2 with the same weights.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    ranking = losses.kwise_rank_loss(scores, batch.ranks, batch.mask, batch.margin)
    return _mean_over_prompts(config, scores, ranking, batch)


def rating_gap_loss(config: Config, params: dict, batch: Comparisons):
    """`loss` with the gap of a pair's ratings as its margin (Llama 2, arXiv:2307.09288, eq. 2).

    Ratings are as the data gives them: divide them there to have smaller margins.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    ratings = _ratings(batch)
    gap = ratings[:, :, None] - ratings[:, None, :]
    ranking = losses.kwise_rank_loss(scores, batch.ranks, batch.mask, gap)
    return _mean_over_prompts(config, scores, ranking, batch)


def plackett_luce_loss(config: Config, params: dict, batch: Comparisons):
    """Mean over prompts of -log P(ranking) under Plackett-Luce, nats; `centring_coef` as in `loss`.

    A prompt with nine responses weighs more than one with two: it is a likelihood.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    ranking = losses.plackett_luce_loss(scores, batch.ranks, batch.mask)
    return _mean_over_prompts(config, scores, ranking, batch)


def regression_loss(config: Config, params: dict, batch: Comparisons):
    """Mean over responses of (score - rating)^2, single responses and ties included.

    Ratings are those of the data; labels are 1 or 0, and ranks without ratings count from 1 for the
    best down to 0 for the worst.
    """
    scores = score_batch(params["scorer"], batch, config.micro_batches)
    squares = losses.score_regression_loss(scores=scores, targets=_ratings(batch))
    return losses.masked_mean(squares, batch.mask), _metrics(scores, batch)


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
    pairs = losses.ranked_pairs(batch.ranks, batch.mask)
    centring = losses.masked_mean(
        jnp.square(scores[:, :, None] + scores[:, None, :]), pairs, axis=(1, 2)
    )
    usable = jnp.max(pairs, axis=(1, 2))
    value = losses.masked_mean(ranking + config.centring_coef * centring, usable)
    return value, _metrics(scores, batch)


def _metrics(scores: Float[Array, "B K"], batch: Comparisons) -> dict[str, Array]:
    pairs = losses.ranked_pairs(batch.ranks, batch.mask)
    gap = scores[:, :, None] - scores[:, None, :]
    right = (gap > 0) + 0.5 * (gap == 0)
    return {
        "rewards/accuracies": losses.masked_mean(right, pairs),
        "rewards/margins": losses.masked_mean(gap, pairs),
        "rewards/chosen": losses.masked_mean(scores[:, :, None] + 0 * gap, pairs),
        "rewards/rejected": losses.masked_mean(scores[:, None, :] + 0 * gap, pairs),
        "num_pairs": jnp.sum(pairs),
        "num_prompts": jnp.sum(jnp.max(pairs, axis=(1, 2))),
    }


def init_scorer(policy: Model, key: Array) -> Model:
    """A language model's trunk under a fresh scalar head: normal, std 1 / sqrt(D + 1), bias 0."""
    return transformer.with_score_head(transformer.without_lm_head(policy), key)


def run(
    config: Config,
    policy: Model,
    comparisons: Loader,
    *,
    loss_fn: Callable = loss,
    name: str = "reward_model",
    mesh: jax.sharding.Mesh | None = None,
    log: Log | None = None,
    checkpoints: Checkpoints | None = None,
) -> Result:
    """Trains a scorer that starts as `policy` (usually the SFT model) under a scalar head.

    Continues from the newest checkpoint where there is one. Not centred yet: see `centre`. `name`
    is the stage's in the log.
    Raises ValueError if the batch does not divide over the mesh, TrainingStopped on a non-finite
    step.
    """
    trained, history = loop.fit(
        config,
        lambda policy: {"scorer": init_scorer(policy, jax.random.key(config.seed))},
        policy,
        loss_fn,
        comparisons,
        name=name,
        mesh=mesh or sharding.make_mesh(),
        log=log or Log(quiet=True),
        checkpoints=checkpoints,
    )
    return Result(trained["scorer"], history)


def centre(scorer: Model, responses: Loader, *, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Shifts the head's bias so that `responses`, usually the demonstrations, score mean 0.

    The rank loss does not see a shift; PPO's value function and KL trade-off do (InstructGPT,
    section 3.5). Every demonstration, or every response of every comparison, counts once.
    Raises ValueError for packed rows, whose documents have no score of their own.
    """
    mesh = mesh or sharding.make_mesh()

    def sums(scorer, batch: Demonstrations | Comparisons):
        if isinstance(batch, Comparisons):
            scores, real = score_batch(scorer, batch), batch.mask
        else:
            scores = heads.sequence_scores(scorer, batch.tokens, batch.attend)
            real = jnp.max(batch.mask, axis=1)
        return losses.masked_sum(scores, real), jnp.sum(real)

    batches = responses.epoch_batches()
    if any(np.max(batch.attend) > 1 for batch in batches):
        raise ValueError(
            "packed rows hold several documents; centre on the demonstrations unpacked"
        )
    with jax.set_mesh(mesh):
        compiled = jax.jit(sums)
        totals = [compiled(scorer, sharding.put_rows(mesh, batch)) for batch in batches]
        total, count = (sum(float(x) for x in column) for column in zip(*totals))
    head = scorer.weights["score"]
    head = {**head, "bias": head["bias"] - total / count}
    return Model(scorer.config, {**scorer.weights, "score": head})


def score_all(
    scorer: Model, comparisons: Loader, *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, np.ndarray]:
    """{"scores", "ranks", "mask", "lengths"}, [N, K] each, of all rows in order: host arrays.

    Lengths are tokens, prompt included. What `rewards.agreement` reads.
    """
    mesh = mesh or sharding.make_mesh()
    with jax.set_mesh(mesh):
        compiled = jax.jit(score_batch)
        parts = []
        for batch in comparisons.epoch_batches():
            scores = compiled(scorer, sharding.put_rows(mesh, batch))
            found = (scores, batch.ranks, batch.mask, np.sum(batch.attend, axis=2))
            parts.append([np.asarray(x)[: real_rows(batch)] for x in found])
    names = ("scores", "ranks", "mask", "lengths")
    return {name: np.concatenate(part) for name, part in zip(names, zip(*parts))}


def evaluate(
    config: Config, scorer: Model, comparisons: Loader, *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, float]:
    """Held-out rank loss (mean over prompts) and accuracy (mean over pairs; a tie is half).

    Whatever loss trained the scorer. Raises ValueError if no two responses differ in rank.
    """
    mesh = mesh or sharding.make_mesh()

    def sums(config, scorer, batch):
        value, metrics = loss(config, {"scorer": scorer}, batch)
        prompts, pairs = metrics["num_prompts"], metrics["num_pairs"]
        return value * prompts, prompts, metrics["rewards/accuracies"] * pairs, pairs

    with jax.set_mesh(mesh):
        compiled = jax.jit(sums)
        totals = [
            compiled(config, scorer, sharding.put_rows(mesh, batch))
            for batch in comparisons.epoch_batches()
        ]
        value, prompts, right, pairs = (sum(float(x) for x in column) for column in zip(*totals))
    if not pairs:
        raise ValueError("no two held-out responses differ in rank; evaluate on comparisons")
    return {"eval_loss": value / prompts, "eval_accuracy": right / pairs, "eval_pairs": pairs}
