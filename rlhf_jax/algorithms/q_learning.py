"""Q-learning from scored responses: ILQL, double DQN and soft Q, and decoding by what they learn.

    result = q_learning.run(config, policy, answers)                  # ILQL
    result = q_learning.run(config, policy, answers, method=q_learning.DOUBLE_DQN)
    texts.generate(policy, tokenizer, prompts, guide=Guide(result.network, 8.0))

The state is the prompt and the response so far, an action is a token, and the reward is the
response's score, which comes with its last token. The policy stays as it is. A network of its own
learns Q(s, a) from responses that are there already (`batches.scored`), whoever wrote them, and
tokens are then drawn from softmax(log p + weight * Q): see `decode.Guide`.

What Q(s, a) is regressed on, with s' the state after the action:

    ILQL          r + discount V(s'), V an expectile of Q over the data; the Q of tokens that are
                  not in the data is held down (arXiv:2206.11871)
    DOUBLE_DQN    r + discount * the target's Q of the token that Q finds best among the policy's
                  `top_k` most likely ones (arXiv:1509.06461)
    SOFT_Q        r + discount V(s'), V = beta log E_p exp(Q / beta) (arXiv:1702.08165)
    SOFT_Q_PATHS  the score minus the advantages Q - V of the later tokens, so that the score
                  reaches every token at once (arXiv:1702.08892)

The optimum of soft Q is the policy that maximises score - beta * KL to p, the aim of PPO with this
KL coefficient, and Guide(network, 1 / beta) draws from it. Targets come from an exponential average
of the network. With `monte_carlo` they are mixed with the score that the response did get, which
reaches early tokens at once and is the value of whoever wrote the data. `tabular` is Q-learning
without a network, for the page and for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, advantages, losses
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, NonNegative, Positive, Range, Seed, Share
from rlhf_jax.data import loader
from rlhf_jax.data.batches import Comparisons, Loader
from rlhf_jax.models import action_values, heads, partition, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import episodes
from rlhf_jax.rewards.episodes import Episodes
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

DISPLAY = Display(
    "Q-learning",
    ("loss", "q/error"),
    {
        "loss": "Loss",
        "q/error": "Mean |Q of the last token - score|",
        "q/first": "Q of the first token",
        "q/last": "Q of the last token",
    },
)


class Config(loop.Config):
    """Settings of a run; those of ILQL lie between the published ones of its three tasks.

    `batch_size` counts prompts: all responses to one are one element of a batch.
    """

    discount: Share = 1.0
    target_decay: Share = 0.995  # of the average that is the target network, per step
    monte_carlo: Share = 0.0  # weight in the targets of the return that the response got
    expectile: Annotated[float, Range(0.5, 1)] = 0.7  # of ILQL's V; 0.5 is the mean
    cql_weight: NonNegative = 0.1  # in ILQL, of the cross entropy of Q, which holds others down
    top_k: Count = 16  # tokens of the policy that the maximum of double DQN is taken over
    beta: Positive = 0.1  # of soft Q: score per nat of KL
    seed: Seed = 0  # of the twin head that ILQL starts from


class Result(NamedTuple):
    """The network of action values and the metrics of each step this process ran."""

    network: Model
    history: list[dict[str, Any]]


# --------------------------------------------------------------------------------- the equations


def targets(config: Config, rows: Episodes, values: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """What Q is regressed on: r + discount V(s'), mixed with the return of the response.

    `values` [N, T] are of the state before each token. No gradient passes.
    """
    bootstrapped = rows.rewards + config.discount * advantages.of_next(values, rows.mask)
    returns, _ = advantages.gae(
        rewards=rows.rewards,
        values=jnp.zeros_like(rows.rewards),
        mask=rows.mask,
        discount=config.discount,
        gae_lambda=1.0,
    )
    mixed = bootstrapped + config.monte_carlo * (returns - bootstrapped)
    return jax.lax.stop_gradient(mixed)


def expectile_loss(
    *, values: Float[Array, "*n"], samples: Float[Array, "*n"], expectile: losses.Scalar
) -> Float[Array, "*n"]:
    """|expectile - 1(sample < value)| (sample - value)^2: its mean is least at the expectile.

    Raises ValueError if shapes differ.
    """
    values, samples = losses.matched(values=values, samples=samples)
    weight = jnp.where(samples < values, 1.0 - expectile, expectile)
    return weight * jnp.square(samples - values)


def path_targets(
    rows: Episodes, q: Float[Array, "N T"], values: Float[Array, "N T"]
) -> Float[Array, "N T"]:
    """The sum of r from t on, minus that of Q - V after t. No gradient passes.

    At the optimum Q - V is beta log(p_tilted / p), and on every path this is Q of the token t
    (Nachum et al. 2017, arXiv:1702.08892, without a discount). [N, T], [N, T] -> [N, T]
    """
    terms = jnp.where(rows.mask > 0, rows.rewards - (q - values), 0.0)
    from_here = jnp.cumsum(terms[:, ::-1], axis=1)[:, ::-1]
    return jax.lax.stop_gradient((from_here + q - values) * rows.mask)


def tabular(
    table: Float[Array, "S A"],
    transitions: tuple[Array, Array, Array, Array],
    *,
    rate: losses.Scalar,
    discount: losses.Scalar = 1.0,
) -> Float[Array, "S A"]:
    """Watkins' Q-learning on a table: Q(s, a) += rate (r + discount max Q(s') - Q(s, a)), in order.

    transitions: states [N], actions [N], rewards [N], and next states [N], -1 at the end.
    """

    def learn(table, transition):
        state, action, reward, following = transition
        best = jnp.where(following < 0, 0.0, jnp.max(table[following]))
        error = reward + discount * best - table[state, action]
        return table.at[state, action].add(rate * error), None

    return jax.lax.scan(learn, table, transitions)[0]


# ------------------------------------------------------------------------------------- the losses


def _check_target(network: Model, target: Model) -> None:
    """Raises ValueError unless both have arrays of the same names and shapes."""
    shapes = [jax.tree.map(jnp.shape, x.weights) for x in (network, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the target network has other arrays than the network that learns; make it of the same "
            "policy and by the same function"
        )


def ilql_loss(config: Config, params: dict, batch: Comparisons):
    """Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871), without its policy head.

    Mean over the tokens of (y - Q)^2 for both heads, the expectile loss of V to the lower of the
    target's heads, and `cql_weight` times the cross entropy of the token under each softmax(Q).
    The paper also trains p on the data; here p is the policy that decoding is given. Its networks
    have heads of two layers, these have one.
    """
    rows, network, target = episodes.of_responses(batch), params["network"], params["target"]
    _check_target(network, target)
    frozen = jax.lax.stop_gradient(target)

    def of_rows(tokens, attend):
        hidden = transformer.hidden_states(network, tokens, attend)
        theirs = transformer.hidden_states(frozen, tokens, attend)
        twins = action_values.chosen(frozen, theirs, tokens)
        lower = jnp.minimum(*(q for q, _ in twins))
        return (
            action_values.chosen(network, hidden, tokens),
            heads.token_values(network, hidden),
            lower,
        )

    found, values, lower = _mapped(of_rows, config, rows, network)
    wanted = targets(config, rows, values)
    mask = rows.mask
    q_loss = sum(losses.masked_mean(jnp.square(q - wanted), mask) for q, _ in found)
    cql_loss = sum(losses.masked_mean(total - q, mask) for q, total in found)
    v_loss = losses.masked_mean(
        expectile_loss(values=values, samples=lower, expectile=config.expectile), mask
    )
    metrics = {"loss/q": q_loss, "loss/value": v_loss, "loss/cql": cql_loss}
    metrics |= _metrics(rows, jnp.minimum(*(q for q, _ in found)))
    return q_loss + v_loss + config.cql_weight * cql_loss, metrics


def double_dqn_loss(config: Config, params: dict, batch: Comparisons):
    """Huber loss of double DQN (van Hasselt et al. 2016, arXiv:1509.06461), a mean over the tokens.

    The maximum is over the policy's `top_k` most likely tokens: one over the whole vocabulary would
    be of tokens that no response of the data has, whose Q is whatever it happens to be.
    """
    rows, network, target = episodes.of_responses(batch), params["network"], params["target"]
    _check_target(network, target)
    models = (params["policy"], network, target)

    def of_rows(tokens, attend):
        hiddens = tuple(transformer.hidden_states(x, tokens, attend) for x in models)
        best = action_values.limited_best(*models, hiddens, tokens, config.top_k)
        return _q(network, hiddens[1], tokens), best

    q, best = _mapped(of_rows, config, rows, network)
    wanted = targets(config, rows, best)
    value = losses.masked_mean(optax.huber_loss(q, wanted), rows.mask)
    return value, _metrics(rows, q)


def soft_q_loss(config: Config, params: dict, batch: Comparisons):
    """(r + discount V(s') - Q)^2, a mean over the tokens, V = beta log E_p exp(Q / beta)."""
    rows = episodes.of_responses(batch)
    q, _, values = _soft(config, params, rows)
    value = losses.masked_mean(jnp.square(targets(config, rows, values) - q), rows.mask)
    return value, _metrics(rows, q)


def soft_q_paths_loss(config: Config, params: dict, batch: Comparisons):
    """(`path_targets` - Q)^2, a mean over the tokens; `discount` and `monte_carlo` are not read."""
    rows = episodes.of_responses(batch)
    q, theirs, values = _soft(config, params, rows)
    value = losses.masked_mean(jnp.square(path_targets(rows, theirs, values) - q), rows.mask)
    return value, _metrics(rows, q)


def _soft(config: Config, params: dict, rows: Episodes):
    """(Q of each token, the target's, the target's V of the state before it), [N, T] each."""
    network, target = params["network"], params["target"]
    _check_target(network, target)
    policy, frozen = jax.lax.stop_gradient((params["policy"], target))

    def of_rows(tokens, attend):
        said, own, theirs = (
            transformer.hidden_states(x, tokens, attend) for x in (policy, network, frozen)
        )
        values = action_values.soft_value(policy, frozen, (said, theirs), tokens, config.beta)
        return _q(network, own, tokens), _q(frozen, theirs, tokens), values

    return _mapped(of_rows, config, rows, network)


def _q(network: Model, hidden: Float[Array, "N T D"], tokens: Int[Array, "N T"]):
    """Q of each token by the first head."""
    return action_values.chosen(network, hidden, tokens)[0][0]


def _mapped(of_rows: Callable, config: Config, rows: Episodes, network: Model):
    recompute = heads.must_recompute(network)
    return heads.map_rows(
        of_rows, config.micro_batches, rows.tokens, rows.attend, recompute=recompute
    )


def _metrics(rows: Episodes, q: Float[Array, "N T"]) -> dict[str, Array]:
    last = advantages.last_token(rows.mask)
    first = rows.mask * (jnp.cumsum(rows.mask, axis=1) == 1)
    return {
        "q/error": losses.masked_mean(jnp.abs(q - rows.rewards), last),
        "q/first": losses.masked_mean(q, first),
        "q/last": losses.masked_mean(q, last),
    }


# ---------------------------------------------------------------------------------------- the run


class Method(NamedTuple):
    """A loss, a function (policy, key) -> the network it trains, and whether it reads the policy.

    `params` has "network", "target" and, if it is read, "policy". bootstraps: whether the loss
    reads `discount` and `monte_carlo`.
    """

    loss: Callable
    network: Callable[[Model, Array], Model]
    reads_policy: bool = True
    bootstraps: bool = True


ILQL = Method(ilql_loss, action_values.twin, reads_policy=False)
DOUBLE_DQN = Method(double_dqn_loss, action_values.single)
SOFT_Q = Method(soft_q_loss, action_values.single)
SOFT_Q_PATHS = Method(soft_q_paths_loss, action_values.single, bootstraps=False)


def init_state(
    config: Config, trainable: Any, make_optimizer: MakeOptimizer = training.make_optimizer
) -> training.TrainState:
    """`loop.init_state` with the target network, a copy."""
    return training.averaging(loop.init_state(config, trainable, make_optimizer), "network")


def update(
    loss_fn: Callable,
    config: Config,
    state: training.TrainState,
    frozen: dict,
    batch: Any,
    make_optimizer: MakeOptimizer = training.make_optimizer,
):
    """`loop.update` with the target network among the frozen ones, which then follows."""
    target = partition.combine(frozen, state.average)["network"]
    frozen = {**frozen, "target": target}
    state, metrics = loop.update(loss_fn, config, state, frozen, batch, make_optimizer)
    return training.averaged(state, config.target_decay), metrics


def run(
    config: Config,
    policy: Model,
    answers: Loader,
    *,
    method: Method = ILQL,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    runtime: Runtime | None = None,
) -> Result:
    """Trains a network of action values, continuing from the newest checkpoint where there is one.

    It starts as the trunk of `policy`, with new heads of which all but the twin are 0. `answers` is
    a loader of `batches.scored`. In a policy with an adapter only the adapter and the heads are
    trained. The policy itself does not change. Raises ValueError if the batch does not divide over
    the mesh or has no scores, or for settings that the method does not read; TrainingStopped on a
    non-finite step.
    """
    loader.expect(answers, "q_learning.run", Comparisons)
    if not isinstance(method, Method):
        raise ValueError(f"method={method!r} is no Method; pass one, such as q_learning.ILQL")
    if not method.bootstraps and (config.discount != 1 or config.monte_carlo):
        raise ValueError(
            f"discount={config.discount} and monte_carlo={config.monte_carlo}: targets of paths "
            "are whole returns; leave them at 1 and 0, or use SOFT_Q"
        )
    trained, history = loop.fit(
        config,
        {"network": method.network(policy, jax.random.key(config.seed))},
        answers,
        loss_fn=method.loss,
        name="q_learning",
        display=DISPLAY,
        runtime=runtime or Runtime(),
        frozen={"policy": policy} if method.reads_policy else {},
        init=init_state,
        update=update,
        make_optimizer=make_optimizer,
    )
    return Result(trained["network"], history)


def programs(
    config: Config,
    policy: Model,
    length: int,
    mesh: jax.sharding.Mesh,
    *,
    responses: int = 1,
    method: Method = ILQL,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `run` runs; `result` is the trained network.

    The answers have `responses` rows of `length` tokens for each prompt. `policy` is a tree of
    shapes, and `resident` is what the experiment holds besides: see `abstract`.
    """
    stage = abstract.supervised(
        config,
        {"network": abstract.derived(method.network, mesh, policy, jax.random.key(config.seed))},
        abstract.comparisons(mesh, config.batch_size, length, responses),
        mesh,
        loss_fn=method.loss,
        name="q_learning",
        frozen={"policy": policy} if method.reads_policy else {},
        init=init_state,
        update=update,
        make_optimizer=make_optimizer,
        resident=resident,
    )
    return stage._replace(result=stage.result["network"])
