"""TAMER: a model of people's ratings, acted on at once (Knox & Stone 2008, ICDL).

    result = tamer.run(config, policy, ratings)
    texts.generate(policy, tokenizer, prompts, guide=Guide(result.network, 4.0))

A rating is of a whole response (`batches.scored`) or of one of its steps (`batches.steps`). It is
taken to be a weighted sum of what each token of that part earns by itself,

    rating = sum over its tokens of c_t H(s_t, a_t),     the c_t of a part add up to 1

and H is learned by regression. It says what a token earns now and nothing of what follows, which is
Q-learning with a discount of 0: no target network, and no value of a next state. Tokens are drawn
from softmax(log p + weight * H): see `decode.Guide`; a large weight is the greedy choice of the
paper.

The paper's setting is a game with ratings some seconds late, its features are given, and c_t is the
share of a rating's delay that falls on step t. That a text's tokens take the place of time is our
design, and so are the two credits: `uniform`, and `recent`, in which the end of a part counts more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, advantages, losses
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Share
from rlhf_jax.data import loader
from rlhf_jax.data.batches import Comparisons, Loader, Steps
from rlhf_jax.models import action_values, heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import episodes
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

DISPLAY = Display(
    "TAMER",
    ("loss", "ratings/error"),
    {"loss": "Loss", "ratings/error": "Mean |predicted - given rating|"},
)


class Config(loop.Config):
    """Settings of a run.

    `batch_size` counts prompts with all responses to each, or rows of steps.
    """

    credit_decay: Share = 0.9  # only `recent` reads it: of the credit, per token before the last


class Result(NamedTuple):
    """The network of what tokens earn, and the metrics of each step this process ran."""

    network: Model
    history: list[dict[str, Any]]


class Feedback(NamedTuple):
    """Responses whose parts are rated."""

    tokens: Int[Array, "N T"]
    attend: Int[Array, "N T"]
    parts: Int[Array, "N T"]  # 1, 2, ... on the tokens of each rated part, 0 elsewhere
    ends: Float[Array, "N T"]  # 1 on the last token of each part
    ratings: Float[Array, "N T"]  # of the part, on its last token


def feedback(batch: Comparisons | Steps) -> Feedback:
    """A batch as rated parts: steps, or whole responses.

    Raises ValueError where only some rows of the data have scores.
    """
    if isinstance(batch, Steps):
        return Feedback(batch.tokens, batch.attend, batch.parts, batch.marks, batch.labels)
    rows = episodes.of_responses(batch)
    ends = advantages.last_token(rows.mask)
    return Feedback(rows.tokens, rows.attend, rows.mask.astype(jnp.int32), ends, rows.rewards)


# ------------------------------------------------------------------------------------- the credit


def per_part(x: Float[Array, "N T"], parts: Int[Array, "N T"]) -> Float[Array, "N S"]:
    """Sums of x over the tokens of each part, S = T + 1; column 0 is of what belongs to none."""
    size = x.shape[1] + 1
    return jax.vmap(lambda x, part: jnp.zeros(size).at[part].add(x))(x, parts)


def normalised(weights: Float[Array, "N T"], parts: Int[Array, "N T"]) -> Float[Array, "N T"]:
    """Weights divided by their sum over the part; 0 where there is no part."""
    total = jnp.take_along_axis(per_part(weights, parts), parts, axis=1)
    return jnp.where(parts > 0, weights / jnp.where(parts > 0, total, 1.0), 0.0)


def uniform(config: Config, given: Feedback) -> Float[Array, "N T"]:
    """Every token of a part has the same credit."""
    del config
    return normalised(jnp.ones(given.parts.shape), given.parts)


def recent(config: Config, given: Feedback) -> Float[Array, "N T"]:
    """The last token of a part has the most credit, each before it `credit_decay` of the next."""
    steps = jnp.arange(given.parts.shape[1])
    last = per_part(steps * given.ends, given.parts)
    back = jnp.take_along_axis(last, given.parts, axis=1) - steps
    return normalised(config.credit_decay ** jnp.where(given.parts > 0, back, 0), given.parts)


# --------------------------------------------------------------------------------------- the loss


def loss(config: Config, params: dict, batch: Comparisons | Steps, *, credit: Callable = uniform):
    """Mean over the rated parts of (rating - sum of c_t H_t)^2.

    credit: (config, feedback) -> c [N, T], whose sum over each part is 1.
    """
    given, network = feedback(batch), params["network"]

    def of_rows(tokens, attend):
        hidden = transformer.hidden_states(network, tokens, attend)
        return action_values.chosen(network, hidden, tokens)[0][0]

    earned = heads.map_rows(
        of_rows,
        config.micro_batches,
        given.tokens,
        given.attend,
        recompute=heads.must_recompute(network),
    )
    earned = jnp.where(given.parts > 0, earned * credit(config, given), 0.0)
    predicted = per_part(earned, given.parts)
    rated, ratings = (per_part(x, given.parts) for x in (given.ends, given.ratings))
    errors = predicted - ratings
    metrics = {"ratings/error": losses.masked_mean(jnp.abs(errors), rated)}
    return losses.masked_mean(jnp.square(errors), rated), metrics


recent_loss = functools.partial(loss, credit=recent)


# ---------------------------------------------------------------------------------------- the run


def run(
    config: Config,
    policy: Model,
    ratings: Loader,
    *,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    runtime: Runtime | None = None,
) -> Result:
    """Trains a network of what tokens earn, continuing from the newest checkpoint if there is one.

    It starts as the trunk of `policy` with a head at 0; the policy itself does not change. All
    ratings are learned from in every epoch, whoever wrote the responses. `ratings` is a loader of
    `batches.scored` or of `batches.steps`. Raises ValueError if the batch does not divide over the
    mesh or has no scores, TrainingStopped on a non-finite step.
    """
    if ratings.examples.kind is not Steps:
        loader.expect(ratings, "tamer.run", Comparisons)
    trained, history = loop.fit(
        config,
        {"network": action_values.single(policy, jax.random.key(config.seed))},
        ratings,
        loss_fn=loss_fn,
        make_optimizer=make_optimizer,
        name="tamer",
        display=DISPLAY,
        runtime=runtime or Runtime(),
    )
    return Result(trained["network"], history)


def programs(
    config: Config,
    policy: Model,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    responses: int = 1,
    loss_fn: Callable = loss,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `run` runs on responses of whole ratings; `result` is the trained network.

    The arguments are those of `q_learning.programs`.
    """
    key = jax.random.key(config.seed)
    stage = abstract.supervised(
        config,
        {"network": abstract.derived(action_values.single, mesh, policy, key)},
        abstract.comparisons(mesh, config.batch_size, length, responses),
        mesh,
        loss_fn=loss_fn,
        name="tamer",
        make_optimizer=make_optimizer,
        resident=resident,
    )
    return stage._replace(result=stage.result["network"])
