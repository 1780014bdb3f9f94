"""Clipped PPO against a reward, with a KL leash to a reference (arXiv:1707.06347, 2203.02155).

    prompts -> collect -> Rollout (frozen record) -> update: epochs of minibatches -> policy, critic

One iteration is two compiled programs. The policy is a token-level agent: the state is the prompt
and the response so far, an action is a token, the score comes with the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rlhf_jax import advantages, config, losses, sharding
from rlhf_jax.data.batches import Loader, Prompts
from rlhf_jax.models import heads, lora, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import Log


class Config(config.Config):
    """Settings of a PPO run; clipping, GAE, epochs, value and KL coefficients default to TRL 1.x's.

    With `kl_target` the KL coefficient is adapted (Ziegler et al. 2019).
    """

    num_iterations: int = 100
    batch_size: int = 64  # responses an iteration
    max_new_tokens: int = 64
    num_epochs: int = 4  # passes over them
    num_minibatches: int = 1  # updates a pass
    micro_batches: int = 1  # slices of a forward pass, to save memory; the loss is the same
    policy_optimizer: training.OptimizerConfig = training.OptimizerConfig(learning_rate=3e-5)
    critic_optimizer: training.OptimizerConfig = training.OptimizerConfig(learning_rate=1e-4)
    temperature: float = 1.0
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    value_clip_eps: float = 0.2
    value_coef: float = 0.1
    kl_coef: float = 0.05  # reward a nat
    kl_target: float | None = None  # nats a response
    kl_horizon: float = 10000.0  # responses over which it is adapted
    score_at: Literal["last", "after_eos"] = "last"  # see advantages.shaped_rewards
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    normalise_scores: bool = False  # by the running mean and standard deviation of all
    missing_eos_penalty: float = 0.0  # off the score of a response that did not end
    shared_critic: bool = False  # a head on the policy's trunk, else a network of its own
    max_sampler_gap: float = 0.05  # mean |sampler - loss| log-probability in bfloat16, nats
    save_every: int = 25  # iterations between checkpoints
    seed: int = 0


class Batch(NamedTuple):
    """What the loss of one minibatch reads, all [B, T]; fixed for all epochs of an iteration.

    value_mask is `mask`, extended by one position after EOS when the score is paid there.
    """

    tokens: Int[Array, "B T"]
    attend: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    value_mask: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


class State(NamedTuple):
    """Everything an iteration changes. train.frozen: {"reference", "scorer"}."""

    train: training.TrainState
    iteration: Int[Array, ""]
    kl_coef: Float[Array, ""]
    scores: training.RunningMoments


class Result(NamedTuple):
    """The trained policy and critic (None if shared) and the metrics of each iteration run here."""

    policy: Model
    critic: Model | None
    history: list[dict[str, Any]]


def logprobs_and_values(config: Config, params: dict, batch):
    """(logprobs, values, entropy) of the response tokens, each [B, T], at `config.temperature`.

    `batch` needs `tokens` and `attend`. The critic is `params["critic"]`, or the score head of the
    policy where there is none.
    """
    policy = params["policy"]
    start = batch.tokens.shape[1] - config.max_new_tokens

    def forward(tokens, attend):
        hidden = transformer.hidden_states(policy, tokens, attend)
        logprobs, entropy = heads.token_logprobs(policy, hidden, tokens, config.temperature, start)
        critic = params.get("critic", policy)
        if critic is not policy:
            hidden = transformer.hidden_states(critic, tokens, attend)
        return logprobs, heads.token_values(critic, hidden), entropy

    return heads.map_rows(forward, config.micro_batches, batch.tokens, batch.attend)


def loss(config: Config, params: dict, batch: Batch):
    """Clipped policy loss + value_coef * clipped value loss, each a mean over the global tokens."""
    logprobs, values, entropy = logprobs_and_values(config, params, batch)
    policy_loss = losses.masked_mean(
        losses.clipped_policy_loss(
            logprobs=logprobs,
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            clip_eps=config.clip_eps,
        ),
        batch.mask,
    )
    value_loss = losses.masked_mean(
        losses.clipped_value_loss(
            values=values,
            old_values=batch.old_values,
            returns=batch.returns,
            clip_eps=config.value_clip_eps,
        ),
        batch.value_mask,
    )
    metrics = {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        **diagnostics(config, batch, logprobs, values, entropy),
    }
    return policy_loss + config.value_coef * value_loss, metrics


def diagnostics(config: Config, batch: Batch, logprobs, values, entropy) -> dict[str, Array]:
    """What a PPO loss reports of one minibatch, all inputs [B, T]; a loss of your own may too.

    With "policy/approxkl_avg" among its metrics the run also checks that the loss itself starts
    each iteration at ratio 1.
    """
    change = logprobs - batch.old_logprobs
    ratio = jnp.exp(change)
    # As in lm-human-preferences and TRL a token counts as clipped only where that raises its loss.
    bounded = jnp.clip(ratio, 1.0 - config.clip_eps, 1.0 + config.clip_eps)
    clipped = bounded * batch.advantages < ratio * batch.advantages
    low, high = batch.old_values - config.value_clip_eps, batch.old_values + config.value_clip_eps
    near = jnp.clip(values, low, high)
    moved = jnp.abs(near - batch.returns) > jnp.abs(values - batch.returns)
    return {
        "policy/approxkl_avg": losses.masked_mean(0.5 * jnp.square(change), batch.mask),
        "policy/clipfrac_avg": losses.masked_mean(clipped, batch.mask),
        "policy/entropy_avg": losses.masked_mean(entropy, batch.mask),
        "val/clipfrac_avg": losses.masked_mean(moved, batch.value_mask),
        "val/ratio": losses.masked_mean(ratio, batch.mask),
    }


def make_batch(config: Config, state: State, rollout: Rollout):
    """Rewards, values, advantages and returns of a rollout: (Batch, score moments, metrics).

    Per token r_t = -kl_coef * (log p_old - log p_ref), the score on top (`score_at`), then GAE.
    Whitening uses the unbiased variance, as TRL does; rewards keep their mean.
    """
    params = lora.join(state.train.frozen, state.train.trainable)
    logprobs, old_values, entropy = logprobs_and_values(config, params, rollout)
    mask = rollout.mask
    gap = lambda other: jnp.abs(rollout.old_logprobs - other) * mask  # noqa: E731
    value_mask = advantages.extend_after_eos(mask) if config.score_at == "after_eos" else mask
    kl = losses.kl_k1(logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs)
    moments = state.scores.push(rollout.scores)
    scores = rollout.scores
    if config.normalise_scores:
        scores = (scores - moments.mean) / (moments.std + 1e-8)
    scores = scores - config.missing_eos_penalty * (1.0 - rollout.finished)
    rewards = advantages.shaped_rewards(
        scores=scores, kl=kl, mask=mask, kl_coef=state.kl_coef, score_at=config.score_at
    )
    if config.whiten_rewards:
        rewards = losses.masked_whiten(rewards, value_mask, shift_mean=False, unbiased=True)
    old_values = old_values * value_mask
    gains, returns = advantages.gae(
        rewards=rewards,
        values=old_values,
        mask=value_mask,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
    )
    if config.whiten_advantages:
        gains = losses.masked_whiten(gains, mask, unbiased=True)
    batch = Batch(
        tokens=rollout.tokens,
        attend=rollout.attend,
        mask=mask,
        value_mask=value_mask,
        old_logprobs=rollout.old_logprobs,
        old_values=old_values,
        advantages=gains * mask,
        returns=returns,
    )
    metrics = {
        **_objective(state, rollout, scores, kl, entropy),
        "val/explained_variance": _explained(old_values, returns, value_mask),
        # What the first minibatch's ratio would be, taken over the whole rollout: see `check`.
        "check/logprob_gap": jnp.max(gap(logprobs)),
        "check/sampler_gap": losses.masked_mean(gap(rollout.sampler_logprobs), mask),
        "check/reference_gap": jnp.max(gap(rollout.ref_logprobs)),
    }
    return batch, moments, metrics


def _objective(state, rollout, scores, kl, entropy):
    """Means over the responses of an iteration, under the names that TRL gives them."""
    summed = jnp.sum(kl * rollout.mask, axis=1)
    k3 = losses.kl_k3(logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs)
    return {
        "objective/kl": jnp.mean(summed),
        "objective/kl_k3": jnp.mean(jnp.sum(k3 * rollout.mask, axis=1)),
        "objective/entropy": jnp.mean(jnp.sum(entropy * rollout.mask, axis=1)),
        "objective/scores": jnp.mean(rollout.scores),
        "objective/scores_std": jnp.std(rollout.scores),
        "objective/non_score_reward": jnp.mean(-state.kl_coef * summed),
        "objective/rlhf_reward": jnp.mean(scores - state.kl_coef * summed),
        "objective/length": jnp.mean(rollout.lengths.astype(jnp.float32)),
        "objective/kl_coef": state.kl_coef,
        "num_tokens": jnp.sum(rollout.lengths),
        "val/num_eos_tokens": jnp.sum(rollout.finished),
    }


def _explained(values, returns, mask):
    """1 - Var(G - V) / Var(G) over active tokens."""
    spread = lambda x: losses.masked_mean(  # noqa: E731
        jnp.square(x - losses.masked_mean(x, mask)), mask
    )
    return 1.0 - spread(returns - values) / (spread(returns) + 1e-8)


def adapted_kl_coef(config: Config, kl_coef, kl):
    """coef * (1 + clip(KL / target - 1, +-0.2) * n / horizon); Ziegler et al. 2019, section 2.2."""
    if config.kl_target is None:
        return kl_coef
    error = jnp.clip(kl / config.kl_target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * config.batch_size / config.kl_horizon)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """One transformation a network, each with its own clipping; built inside the compiled step."""
    make, steps = training.make_optimizer, _num_updates(config)
    parts = {
        "policy": make(config.policy_optimizer, steps),
        "critic": make(config.critic_optimizer, steps),
    }
    return optax.partition(parts, lambda params: jax.tree.map_with_path(_network, params))


def _network(path, _):
    """The name of the network that a parameter belongs to."""
    return path[0].key


def iteration_key(config: Config, iteration, purpose: int):
    """Keys come from (seed, iteration, purpose) alone, so nothing random is ever saved."""
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return jax.random.split(key, 2)[purpose]


def collect(
    config: Config,
    score: rollouts.Score,
    eos_ids,
    pad_id,
    models: dict,
    iteration,
    prompts: Prompts,
) -> Rollout:
    """One response a prompt by the current policy, with reference log-probabilities and scores."""
    return rollouts.collect(
        models["policy"],
        models["reference"],
        score,
        models["scorer"],
        prompts,
        iteration_key(config, iteration, 0),
        max_new_tokens=config.max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        temperature=config.temperature,
        micro_batches=config.micro_batches,
    )


def update(loss_fn, config: Config, state: State, rollout: Rollout):
    """All epochs of one iteration as one program: (state, rollout) -> (state, metrics).

    A scan over epochs of a scan over minibatches of `gradient_step`; rows are dealt anew each
    epoch. Metrics of the loss are means over the updates.
    """
    batch, moments, metrics = make_batch(config, state, rollout)
    optimizer = make_optimizer(config)
    rows = rollout.tokens.shape[0]
    size = rows // config.num_minibatches

    def minibatch(train, rows):
        piece = sharding.constrain_rows(jax.tree.map(lambda x: x[rows], batch))
        return training.gradient_step(lambda p, b: loss_fn(config, p, b), optimizer, train, piece)

    def epoch(train, key):
        order = jax.random.permutation(key, rows).reshape(config.num_minibatches, size)
        return jax.lax.scan(minibatch, train, order)

    keys = jax.random.split(iteration_key(config, state.iteration, 1), config.num_epochs)
    rate = training.schedule(config.policy_optimizer, _num_updates(config))(state.train.step)
    train, steps = jax.lax.scan(epoch, state.train, keys)
    metrics |= {name: jnp.mean(values) for name, values in steps.items()}
    if "policy/approxkl_avg" in steps:
        metrics["check/first_approxkl"] = steps["policy/approxkl_avg"][0, 0]
    metrics |= {
        "bad_step": train.bad_step,
        "lr": rate,
        "episode": (state.iteration + 1) * rows,
    }
    new = State(
        train=train,
        iteration=state.iteration + 1,
        kl_coef=adapted_kl_coef(config, state.kl_coef, metrics["objective/kl"]),
        scores=moments,
    )
    old = state._replace(train=train)  # `gradient_step` has kept what was good of it
    good = train.bad_step < 0
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old), metrics


def _num_updates(config):
    return config.num_iterations * config.num_epochs * config.num_minibatches


def check(config: Config, dtype: str, iteration: int, metrics: dict[str, float]) -> None:
    """Raises TrainingStopped unless the numbers are what on-policy arithmetic says they must be.

    Before the first update of every iteration the ratio is 1: in float32 no token's
    log-probability may differ by more than 1e-4 nats between the sampler and
    `logprobs_and_values`. In bfloat16 the old log-probabilities come from the latter, and the
    sampler's mean gap is bounded by `max_sampler_gap` (the worst token by ten times that). A loss
    that reports "policy/approxkl_avg" must start its first minibatch at 0 within the same bound.
    In iteration 0 the policy is the reference, so their log-probabilities agree as closely.
    """
    training.raise_if_bad(iteration, metrics)
    exact = dtype == "float32"
    bound = 1e-4 if exact else 10 * config.max_sampler_gap  # of the worst token
    gap, mean = metrics["check/logprob_gap"], metrics["check/sampler_gap"]
    if not gap <= bound or not mean <= config.max_sampler_gap:
        raise training.TrainingStopped(
            f"iteration {iteration}: sampler and loss disagree on the log-probability of the same "
            f"token by {max(gap, mean):.3g} nats (bound {bound:g}): the first ratio is not 1"
        )
    first = metrics.get("check/first_approxkl", 0.0)
    if not first <= 0.5 * bound**2:
        raise training.TrainingStopped(
            f"iteration {iteration}: the loss starts at approxkl {first:.3g}, not 0: it scores "
            "tokens otherwise than they were sampled (shift, mask or temperature)"
        )
    if iteration == 0 and not metrics["check/reference_gap"] <= bound:
        raise training.TrainingStopped(
            "iteration 0: the policy is not the reference, their log-probabilities differ by "
            f"{metrics['check/reference_gap']:.3g} nats; pass the policy that training starts from"
        )


def networks(config: Config, policy: Model, critic: Model | None) -> dict[str, Model]:
    """What is trained. Without `critic` (or with `shared_critic`) values start at exactly 0."""
    if config.shared_critic:
        return {"policy": transformer.with_score_head(policy, None)}
    if critic is None:
        critic = transformer.with_score_head(transformer.without_lm_head(policy), None)
    return {"policy": policy, "critic": critic}


def init_state(config: Config, policy: Model, critic: Model | None) -> State:
    """State before the first iteration of training `networks`."""
    return State(
        train=training.init_state(make_optimizer(config), networks(config, policy, critic)),
        iteration=jnp.int32(0),
        kl_coef=jnp.float32(config.kl_coef),
        scores=training.RunningMoments.empty(),
    )


def check_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for sizes that do not divide each other or the mesh."""
    rows, parts, slices = config.batch_size, config.num_minibatches, config.micro_batches
    if rows % parts:
        raise ValueError(f"batch_size={rows} is not a multiple of num_minibatches={parts}")
    if rows // parts % slices:
        raise ValueError(
            f"a minibatch of {rows // parts} rows (batch_size / num_minibatches) is not a multiple "
            f"of micro_batches={slices}"
        )
    sharding.check_rows(mesh, batch_size=rows, minibatch_size=rows // parts)


def _compile(config, mesh, state, frozen, loss_fn, score, eos_ids, pad_id):
    """The two programs of an iteration, sample(state, frozen, prompts) and step(.., rollout).

    Sampling reads the state, updating donates it; the frozen models are never copied.
    """
    moving, still = sharding.tree(mesh, state), sharding.tree(mesh, frozen)
    rows, whole = sharding.rows(mesh), sharding.replicated(mesh)
    taken = (whole, moving, still, rows)

    def sample(config, state, frozen, prompts):
        models = lora.join(frozen, state.train.trainable)
        return collect(config, score, eos_ids, pad_id, models, state.iteration, prompts)

    def step(config, state, frozen, rollout):
        state = state._replace(train=state.train._replace(frozen=frozen))
        state, metrics = update(loss_fn, config, state, rollout)
        return state._replace(train=state.train._replace(frozen={})), metrics

    sample = jax.jit(sample, in_shardings=taken, out_shardings=rows)
    step = jax.jit(step, in_shardings=taken, out_shardings=(moving, whole), donate_argnums=1)
    return functools.partial(sample, config), functools.partial(step, config)


def run(
    config: Config,
    *,
    policy: Model,
    score: rollouts.Score,
    scorer: Any = None,
    prompts: Loader,
    eos_ids: tuple[int, ...],
    pad_id: int,
    critic: Model | None = None,
    loss_fn: Callable = loss,
    observe: Callable[[Rollout], dict[str, float]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    log: Log | None = None,
    checkpoints: Checkpoints | None = None,
) -> Result:
    """Improves `policy` on `score(scorer, tokens, attend, mask) -> [B]`, kept near itself by KL.

    The reference is `policy` as given. `critic` (a model with a scalar head, usually the reward
    model) initialises the value network. `observe` sees each rollout on the host, one iteration
    late, and returns metrics of its own (a gold score, say). Continues from the newest checkpoint.
    Raises ValueError for sizes that do not divide, TrainingStopped for a failed check.
    """
    mesh = mesh or sharding.make_mesh()
    log = log or Log(quiet=True)
    check_sizes(config, mesh)
    loop.check_batch(config, prompts)
    with jax.set_mesh(mesh):
        bases = lora.frozen(networks(config, policy, critic))
        frozen = sharding.place(mesh, {"reference": policy, "scorer": scorer, **bases})
        state = sharding.born(mesh, functools.partial(init_state, config), policy, critic)
        state = (checkpoints.restore(state) if checkpoints else None) or state
        sample, step = _compile(config, mesh, state, frozen, loss_fn, score, eos_ids, pad_id)
        start = int(state.iteration)
        checked = lambda i, metrics: check(config, policy.config.dtype, i, metrics)  # noqa: E731
        with log.stage("ppo", config.num_iterations, start=start, check=checked) as stage:

            def report(i, rollout, metrics):
                seen = observe(jax.device_get(rollout)) if observe else {}
                stage.write(i, metrics | seen, tokens=metrics["num_tokens"])
                stage.flush()

            late = None  # the iteration that the device has finished, or is about to
            for i, batch in zip(range(start, config.num_iterations), prompts.from_position(start)):
                rollout = sample(state, frozen, sharding.put_rows(mesh, batch))
                state, metrics = step(state, frozen, rollout)
                if late is not None:
                    report(*late)
                late = (i, rollout, metrics)
                done = i + 1
                if checkpoints and (done % config.save_every == 0 or done == config.num_iterations):
                    report(*late)  # raises if this iteration was bad: nothing bad is ever saved
                    checkpoints.save(done, state)
                    late = None
            if late is not None:
                report(*late)
    trained = lora.join(frozen, state.train.trainable)
    return Result(trained["policy"], trained.get("critic"), stage.history)
