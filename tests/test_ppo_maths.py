"""What the algorithms' losses compute: exact enumeration, invariances, printed values of others."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, online
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data.batches import Comparisons, Demonstrations, Prompts
from rlhf_jax.data.records import Ends
from rlhf_jax.models import heads, transformer
from rlhf_jax.rewards import learned
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.sampling.rollout import Drawing, Rollout
from rlhf_jax.training import loop
from rlhf_jax.training import state as training

SHAPE = transformer.Config(
    vocab_size=5,
    num_layers=1,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    d_ff=8,
    max_length=64,
)
EOS, PAD = 4, 0
DRAWING = Drawing(Ends((EOS,), PAD))
FIRST_MEMORY = ppo.Memory(jnp.float32(1.0), training.RunningMoments.empty())


# The backend's optimisations double the time to compile and change no formula.
compile_quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def floats(table):
    return jnp.asarray(table, jnp.float32)


def ints(table):
    return jnp.asarray(table, jnp.int32)


@pytest.fixture(scope="module")
def models():
    """A policy, another policy, and two networks with scalar heads that are not zero."""
    new = compile_quickly(lambda i: transformer.init(SHAPE, jax.random.key(i)))
    policy, reference, critic, scorer = map(new, range(4))

    def headed(model, i):
        return transformer.with_score_head(transformer.without_lm_head(model), jax.random.key(i))

    return {
        "policy": policy,
        "reference": reference,
        "critic": headed(critic, 5),
        "scorer": headed(scorer, 6),
    }


@jax.jit
def plain_logprobs(model, tokens, attend, temperature=1.0):
    """[B, T] by one log-softmax over everything, read off one token earlier."""
    hidden = transformer.hidden_states(model, tokens, attend)
    logprobs = jax.nn.log_softmax(transformer.logits(model, hidden) / temperature)
    rows, steps = np.indices(tokens.shape)
    return logprobs[rows, np.maximum(steps - 1, 0), tokens] * (steps > 0)


@jax.jit
def plain_entropy(model, tokens, attend, temperature=1.0):
    """[B, T]: - sum p log p of the distribution that each token was drawn from, 0 for the first."""
    hidden = transformer.hidden_states(model, tokens, attend)
    logp = jax.nn.log_softmax(transformer.logits(model, hidden) / temperature)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.concatenate([jnp.zeros_like(entropy[:, :1]), entropy[:, :-1]], axis=1)


@jax.jit
def plain_values(model, tokens, attend):
    """[B, T]: the head on the hidden state one token earlier."""
    hidden = transformer.hidden_states(model, tokens, attend)
    head = model.weights["score"]
    said = (hidden @ head["kernel"])[..., 0] + head["bias"][0]
    return jnp.concatenate([jnp.zeros_like(said[:, :1]), said[:, :-1]], axis=1)


def norms(grads):
    return np.array([float(jnp.linalg.norm(g)) for g in jax.tree.leaves(grads)])


@functools.cache
def gradient_of(loss):
    """One program a loss: (config, params, batch) -> ((loss, metrics), gradients)."""

    def program(config, params, batch):
        return jax.value_and_grad(loss, argnums=1, has_aux=True)(config, params, batch)

    return compile_quickly(program)


def same_loss_and_gradients(loss, params, *cases):
    """Every (config, batch) gives the loss, metrics and gradient norms of the first, to 1e-5."""
    (value, metrics), grads = gradient_of(loss)(cases[0][0], params, cases[0][1])
    assert np.isfinite(value) and norms(grads).max() > 1e-3
    for config, batch in cases[1:]:
        (other, others), other_grads = gradient_of(loss)(config, params, batch)
        assert float(other) == pytest.approx(float(value), rel=1e-5)
        np.testing.assert_allclose(norms(other_grads), norms(grads), rtol=1e-5, atol=1e-7)
        for key, number in others.items():
            assert float(number) == pytest.approx(float(metrics[key]), rel=1e-5, abs=1e-6), key


# ------------------------------------------------------------- the gradient, by exact enumeration

PROMPT = [PAD, 1, 2]  # the first is padding
LENGTH = 3


def every_response(eos):
    """All responses of up to three tokens: 125 of fixed length, or 85 that may end with EOS."""
    rows = []
    for row in itertools.product(range(5), repeat=LENGTH):
        if eos and EOS in row:
            row = row[: row.index(EOS) + 1]
        if row not in rows:
            rows.append(row)
    return rows


def rollout_of(responses, scores, models, temperature):
    """The rollout in which the policy gave these responses to one prompt, judged by the critic."""
    count = len(responses)
    tokens = np.full((count, len(PROMPT) + LENGTH), PAD)
    tokens[:, : len(PROMPT)] = PROMPT
    mask = np.zeros(tokens.shape)
    for b, row in enumerate(responses):
        tokens[b, len(PROMPT) :][: len(row)] = row
        mask[b, len(PROMPT) :][: len(row)] = 1
    attend = mask.copy()
    attend[:, 1 : len(PROMPT)] = 1
    tokens, attend, mask = ints(tokens), ints(attend), floats(mask)
    logprobs = [
        plain_logprobs(models[name], tokens, attend, temperature) * mask
        for name in ("policy", "reference")
    ]
    return Rollout(
        tokens=tokens,
        attend=attend,
        mask=mask,
        old_logprobs=logprobs[0],
        sampler_logprobs=logprobs[0],
        filtered_logprobs=logprobs[0],
        forward_logprobs=logprobs[0],
        ref_logprobs=logprobs[1],
        entropy=plain_entropy(models["policy"], tokens, attend, temperature),
        values=plain_values(models["critic"], tokens, attend),
        scores=floats(scores),
        lengths=ints([len(row) for row in responses]),
        finished=floats([row[-1] == EOS for row in responses]),
        index=jnp.arange(count),
    )


def plain_config(**changes):
    """No whitening, no discount: the estimator of the policy gradient is unbiased."""
    return ppo.Config(
        **{
            "sampling": Sampling(max_new_tokens=LENGTH, temperature=0.7),
            "num_epochs": 1,
            "whiten_advantages": False,
            "gae_lambda": 1.0,
        }
        | changes
    )


@pytest.mark.parametrize("eos, score_at", [(False, "last"), (True, "last"), (True, "after_eos")])
def test_the_expected_ppo_gradient_is_the_gradient_of_the_expected_reward(models, eos, score_at):
    responses = every_response(eos)
    assert len(responses) == (85 if eos else 125)
    scores = np.random.default_rng(1).normal(size=len(responses))
    config = plain_config(kl_coef=0.3, score_at=score_at)
    rollout = rollout_of(responses, scores, models, 0.7)
    tokens, attend, mask = rollout.tokens, rollout.attend, rollout.mask

    def expected_reward(policy):
        """Sum over all responses of p(response) * (score - kl_coef * log p / p_ref)."""
        total = jnp.sum(plain_logprobs(policy, tokens, attend, 0.7) * mask, axis=1)
        reference = jnp.sum(rollout.ref_logprobs, axis=1)
        p = jnp.exp(total)
        return jnp.sum(p * (rollout.scores - 0.3 * (total - reference))), p

    exact, p = compile_quickly(jax.grad(expected_reward, has_aux=True))(models["policy"])
    np.testing.assert_allclose(jnp.sum(p), 1.0, rtol=1e-5)

    @compile_quickly
    def estimate(policy, critic):
        # The values are a random critic's: as a baseline they must not bias the gradient.
        batch, _, _ = ppo.make_batch(config, {}, FIRST_MEMORY, rollout)
        # Each response as often as it is drawn; the loss divides by the number of tokens.
        weight = p[:, None] * jnp.sum(mask)
        batch = batch._replace(advantages=batch.advantages * weight)

        def loss(policy):
            return ppo.loss(config, {"policy": policy, "critic": critic}, batch)[0]

        return jax.grad(loss)(policy)

    actual = estimate(models["policy"], models["critic"])
    assert norms(exact).max() > 0.05
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(exact)):
        np.testing.assert_allclose(-a, b, rtol=1e-3, atol=2e-6)


def a2c_loss(config, params, batch):
    """- mean log pi * A + value_coef * 1/2 mean (V - G)^2, nothing clipped, no ratio."""
    logprobs = plain_logprobs(
        params["policy"], batch.tokens, batch.attend, config.sampling.temperature
    )
    values = plain_values(params["critic"], batch.tokens, batch.attend)
    policy = -jnp.sum(logprobs * batch.advantages * batch.mask) / jnp.sum(batch.mask)
    error = jnp.square(values - batch.returns) * batch.value_mask
    return policy + config.value_coef * 0.5 * jnp.sum(error) / jnp.sum(batch.value_mask), {}


def some_rollout(models, count=8):
    responses = every_response(eos=True)[:: 85 // count][:count]
    return rollout_of(responses, np.random.default_rng(3).normal(size=count), models, 0.7)


def with_values_of_0(rollout):
    """Then returns are the rewards still to come."""
    return rollout._replace(values=jnp.zeros_like(rollout.values))


def fresh_state(config, models):
    networks = ppo.networks(config, models["policy"], models["critic"])
    return online.init_state(config, FIRST_MEMORY, networks)


def update(loss, config):
    """(state, rollout) -> (state, metrics): the algorithm's whole update, compiled."""
    program = functools.partial(online.update, ppo.make_batch, loss, config)
    return compile_quickly(lambda state, rollout: program(state, {}, rollout))


@pytest.mark.parametrize("score_at", ["last", "after_eos"])
def test_the_gradient_of_the_first_minibatch_is_that_of_a2c(models, score_at):
    config = plain_config(score_at=score_at, gae_lambda=0.9)
    batch, _, _ = make_batch(config, some_rollout(models))
    params = {"policy": models["policy"], "critic": models["critic"]}
    ours, a2c = (gradient_of(loss)(config, params, batch)[1] for loss in (ppo.loss, a2c_loss))
    assert norms(a2c["policy"]).max() > 1e-3 and norms(a2c["critic"]).max() > 1e-3
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(a2c)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_ppo_with_one_epoch_and_one_minibatch_is_a_step_of_a2c(models):
    optimizer = training.OptimizerConfig(eps=1e-2, max_grad_norm=1e9)
    config = plain_config(batch_size=8, policy_optimizer=optimizer, critic_optimizer=optimizer)
    state, rollout = fresh_state(config, models), some_rollout(models)
    after, _ = update(ppo.loss, config)(state, rollout)
    batch, _, _ = make_batch(config, rollout)
    _, grads = gradient_of(a2c_loss)(config, state.train.trainable, batch)
    # The first step of Adam: g / (|g| + eps), whatever the moments' decay.
    moved = 0.0
    for new, old, g in zip(
        *map(jax.tree.leaves, (after.train.trainable, state.train.trainable, grads))
    ):
        expected = -optimizer.learning_rate * g / (jnp.abs(g) + 1e-2)
        np.testing.assert_allclose(new - old, expected, rtol=1e-3, atol=2e-7)
        moved = max(moved, float(jnp.abs(expected).max()))
    assert moved > 1e-4


# --------------------------------------------------------------------------------- printed values


def worked(models):
    """A batch whose policy and value losses are those of TRL 1.x's worked example.

    The ratio is set through the old log-probabilities, values and returns relative to V.
    """
    width = 2 + 5
    mask = np.zeros((2, width))
    mask[0, 2:5] = mask[1, 2:] = 1
    value_mask = mask.copy()
    value_mask[0, 5] = 1

    def on(rows):
        table = np.full((2, width), 9.0)  # never to be read
        for line, row in zip(table, rows):
            line[2 : 2 + len(row)] = row
        return floats(table)

    change = on([(0.3, -0.1, 0.05), (-0.4, 0.1, 0.0, 0.25, -0.05)])
    gains = on(
        [(1.263919, 1.186388, 1.081749), (-0.486352, -0.372002, -0.850338, -0.732118, -1.091245)]
    )
    old_values = on([(0.1, 0.2, 0.3, 0.4), (0.0, -0.1, 0.2, 0.1, 0.3)])
    returns = on(
        [(0.889912, 0.93675, 0.965, 1.0), (-0.410231, -0.431822, -0.459812, -0.47875, -0.525)]
    )
    tokens = ints(np.random.default_rng(2).integers(0, 4, (2, width)))
    attend = ints(np.maximum(mask, [1, 1, 0, 0, 0, 0, 0]))
    logprobs = plain_logprobs(models["policy"], tokens, attend)
    values = plain_values(models["critic"], tokens, attend)
    return ppo.Batch(
        tokens=tokens,
        attend=attend,
        mask=floats(mask),
        value_mask=floats(value_mask),
        old_logprobs=logprobs - change,
        old_values=values - 0.3,
        advantages=gains,
        returns=values - 0.3 + returns - old_values,
    )


def test_the_loss_and_its_measurements_are_those_of_trl_1(models):
    config = ppo.Config(sampling=Sampling(max_new_tokens=5))
    params = {"policy": models["policy"], "critic": models["critic"]}
    (total, metrics), _ = gradient_of(ppo.loss)(config, params, worked(models))
    assert metrics["loss/policy_avg"] == pytest.approx(-0.012347, abs=2e-6)
    assert metrics["loss/value_avg"] == pytest.approx(0.270834, abs=2e-6)
    assert total == pytest.approx(0.014737, abs=2e-6)
    # exp(.3) with A > 0 and exp(-.4) with A < 0 are clipped; exp(.25) with A < 0 is not.
    assert metrics["policy/clipfrac_avg"] == 0.25
    change = np.array([0.3, -0.1, 0.05, -0.4, 0.1, 0.0, 0.25, -0.05])
    assert metrics["policy/approxkl_avg"] == pytest.approx(0.5 * np.mean(change**2), rel=1e-4)
    assert metrics["val/ratio"] == pytest.approx(np.exp(change).mean(), rel=1e-5)
    # The step of 0.3 is cut to 0.2; that is worse only where the return lies above the old value.
    assert metrics["val/clipfrac_avg"] == pytest.approx(4 / 9)


def test_the_entropy_is_that_of_the_policy_at_its_temperature(models):
    config = ppo.Config(sampling=Sampling(max_new_tokens=5, temperature=0.5))
    batch = worked(models)
    params = {"policy": models["policy"], "critic": models["critic"]}
    (_, metrics), _ = gradient_of(ppo.loss)(config, params, batch)
    hidden = transformer.hidden_states(models["policy"], batch.tokens, batch.attend)
    p = np.asarray(jax.nn.softmax(transformer.logits(models["policy"], hidden) / 0.5), np.float64)
    entropy = -(p * np.log(p)).sum(-1)[:, :-1]
    expected = entropy[np.asarray(batch.mask)[:, 1:] > 0].mean()
    assert metrics["policy/entropy_avg"] == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------- rollouts to batches


compiled_make_batch = compile_quickly(ppo.make_batch)


def make_batch(config, rollout, memory=FIRST_MEMORY):
    return compiled_make_batch(config, {}, memory, rollout)


def test_a_policy_away_from_its_reference_is_paid_minus_the_kl(models):
    config = plain_config(kl_coef=0.3)
    rollout = with_values_of_0(some_rollout(models))
    batch, _, metrics = make_batch(config, rollout)
    metrics = rollouts.measurements(rollout) | metrics
    gap = np.asarray((rollout.old_logprobs - rollout.ref_logprobs) * rollout.mask)
    start = len(PROMPT)
    expected = np.asarray(rollout.scores) - 0.3 * gap.sum(axis=1)
    np.testing.assert_allclose(batch.returns[:, start], expected, rtol=1e-5, atol=1e-6)
    assert metrics["objective/kl"] == pytest.approx(gap.sum(axis=1).mean(), rel=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(
        -0.3 * gap.sum(1).mean(), rel=1e-5
    )
    assert metrics["objective/rlhf_reward"] == pytest.approx(expected.mean(), rel=1e-4)
    k3 = (np.exp(-gap) - 1 + gap).sum(axis=1).mean()
    assert metrics["objective/kl_k3"] == pytest.approx(k3, rel=1e-4)


def test_scores_are_normalised_by_all_scores_so_far_and_lowered_for_a_missing_eos(models):
    config = plain_config(kl_coef=0.0, normalise_scores=True, missing_eos_penalty=2.0)
    memory = FIRST_MEMORY._replace(scores=FIRST_MEMORY.scores.push(floats([5.0, 7.0])))
    rollout = with_values_of_0(some_rollout(models))
    assert 0 < rollout.finished.sum() < 8
    batch, (_, moments), metrics = make_batch(config, rollout, memory)
    seen = np.append([5.0, 7.0], rollout.scores)
    expected = (np.asarray(rollout.scores) - seen.mean()) / seen.std()
    expected = expected - 2.0 * (1 - np.asarray(rollout.finished))
    np.testing.assert_allclose(batch.returns[:, len(PROMPT)], expected, rtol=1e-4, atol=1e-5)
    assert moments.count == 10 and moments.mean == pytest.approx(seen.mean(), rel=1e-5)
    # As TRL logs them: the scores that are paid.
    assert metrics["objective/scores"] == pytest.approx(expected.mean(), rel=1e-4)
    assert metrics["objective/raw_scores"] == pytest.approx(float(rollout.scores.mean()), rel=1e-5)


def test_the_rlhf_reward_is_the_score_and_the_penalty_together(models):
    config = plain_config(kl_coef=0.3, normalise_scores=True, missing_eos_penalty=2.0)
    _, _, metrics = make_batch(config, some_rollout(models))
    parts = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(parts), rel=1e-5)


def test_entropy_is_logged_as_trl_estimates_it_and_exactly_per_token(models):
    rollout = some_rollout(models)
    metrics = rollouts.measurements(rollout)
    mask = np.asarray(rollout.mask)
    sampled = -(np.asarray(rollout.old_logprobs) * mask).sum(axis=1)
    assert metrics["objective/entropy"] == pytest.approx(sampled.mean(), rel=1e-5)
    exact = np.asarray(rollout.entropy)[mask > 0].mean()
    assert metrics["objective/token_entropy"] == pytest.approx(exact, rel=1e-5)


def test_whitening_is_over_the_tokens_that_were_sampled(models):
    rollout = some_rollout(models)
    active = np.asarray(rollout.mask) > 0
    batch, _, _ = make_batch(plain_config(whiten_advantages=True), rollout)
    gains = np.asarray(batch.advantages)
    assert gains[active].mean() == pytest.approx(0, abs=1e-6)
    assert gains[active].std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert not gains[~active].any()
    # Rewards keep their mean; with no discount the first return is the sum of the rewards.
    plain, white = (
        make_batch(plain_config(whiten_rewards=on), with_values_of_0(rollout))[0].returns
        for on in (False, True)
    )
    start = len(PROMPT)
    rewards = np.asarray(plain - jnp.pad(plain[:, 1:], ((0, 0), (0, 1))))
    std = rewards[active].std(ddof=1)
    expected = (rewards - rewards[active].mean()) / std + rewards[active].mean()
    expected = np.where(active, expected, 0.0).sum(axis=1)
    np.testing.assert_allclose(white[:, start], expected, rtol=1e-4, atol=1e-5)


def test_the_value_head_starts_at_exactly_0(models):
    for shared in (False, True):
        config = plain_config(shared_critic=shared)
        networks = ppo.networks(config, models["policy"], None)
        said = compile_quickly(online.forward)(config, networks, some_rollout(models))
        assert said.values.shape == said.logprobs.shape and not np.asarray(said.values).any()
        holder = networks["policy" if shared else "critic"]
        assert not np.asarray(holder.weights["score"]["kernel"]).any()
        assert not np.asarray(holder.weights["score"]["bias"]).any()


def test_the_reward_head_starts_normal_with_variance_1_over_d_plus_1():
    width = 4096
    wide = transformer.Model(transformer.Config(d_model=width), {"head": {}, "norm": {}})
    head = heads.init_scorer(wide, jax.random.key(0)).weights["score"]
    assert float(head["kernel"].std()) == pytest.approx((width + 1) ** -0.5, rel=0.05)
    assert abs(float(head["kernel"].mean())) < 0.05 * (width + 1) ** -0.5
    assert head["kernel"].shape == (width, 1) and head["bias"] == 0.0


def test_the_adaptive_factor_moves_by_a_fifth_of_n_over_the_horizon_at_most():
    config = ppo.Config(batch_size=512, kl_target=6.0, kl_horizon=10000.0)
    for kl, factor in [
        (7.2, 1.01024),
        (60.0, 1.01024),
        (6.3, 1.00256),
        (6.0, 1.0),
        (0.0, 0.98976),
        (-3.0, 0.98976),
    ]:
        new = ppo.adapted_kl_factor(config, jnp.float32(0.15), jnp.float32(kl))
        assert new == pytest.approx(0.15 * factor, rel=1e-6)
    # n counts responses, not prompts.
    config = ppo.Config(batch_size=64, samples_per_prompt=8, kl_target=6.0, kl_horizon=10000.0)
    new = ppo.adapted_kl_factor(config, jnp.float32(1.0), jnp.float32(60.0))
    assert new == pytest.approx(1.01024, rel=1e-6)
    assert ppo.adapted_kl_factor(ppo.Config(kl_target=None), 0.15, 100.0) == 0.15


def test_the_coefficient_is_that_of_the_config_times_the_factor_in_memory(models):
    rollout = some_rollout(models)
    for kl_coef, factor in ((0.3, 1.0), (0.2, 1.5)):
        config = plain_config(kl_coef=kl_coef)
        _, memory, metrics = make_batch(config, rollout, FIRST_MEMORY._replace(kl_factor=factor))
        assert metrics["objective/kl_coef"] == pytest.approx(0.3, rel=1e-6)
        assert memory.kl_factor == factor  # no target: nothing is adapted


def test_the_first_minibatch_of_sampled_responses_has_ratio_1_and_nothing_clipped(models):
    sampling = Sampling(max_new_tokens=6, temperature=0.7)
    config = plain_config(batch_size=16, sampling=sampling, whiten_advantages=True, seed=3)
    tokens = ints([[PAD, 1, 2], [3, 0, 1]] * 8)
    attend = ints([[0, 1, 1], [1, 1, 1]] * 8)
    frozen = {"reference": models["policy"], "scorer": models["scorer"]}

    @compile_quickly
    def iteration(state, prompts):
        params = frozen | state.train.trainable
        rollout = online.collect(DRAWING, learned.score, config, params, state.iteration, prompts)
        return rollout, online.update(ppo.make_batch, ppo.loss, config, state, frozen, rollout)[1]

    prompts = Prompts(tokens, attend, jnp.arange(16))
    rollout, metrics = iteration(fresh_state(config, models), prompts)
    assert len(np.unique(np.asarray(rollout.lengths))) > 1
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clipfrac_avg"] == 0 and metrics["val/clipfrac_avg"] == 0
    assert metrics["policy/approxkl_avg"] < 1e-10
    assert metrics["check/logprob_gap"] < 1e-5 and metrics["check/reference_gap"] < 1e-5
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-5)
    # With whitened advantages and ratio 1 the policy loss is minus their mean.
    assert metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-5)
    rows = rollout.tokens, rollout.attend
    expected = plain_logprobs(models["policy"], *rows, 0.7) * rollout.mask
    for said in (rollout.old_logprobs, rollout.forward_logprobs, rollout.ref_logprobs):
        np.testing.assert_allclose(said, expected, rtol=0, atol=1e-5)
    inside = np.asarray(rollout.mask) > 0
    for said, expected in (
        (rollout.values, plain_values(models["critic"], *rows)),
        (rollout.entropy, plain_entropy(models["policy"], *rows, 0.7)),
    ):
        np.testing.assert_allclose(said[inside], expected[inside], rtol=1e-4, atol=1e-5)
    expected = heads.sequence_scores(models["scorer"], *rows)
    np.testing.assert_allclose(rollout.scores, expected, rtol=1e-4, atol=1e-5)


def test_epochs_of_minibatches_use_every_row_once_an_epoch(models):
    config = plain_config(batch_size=8, num_epochs=3, num_minibatches=4)
    state = fresh_state(config, models)
    rollout = some_rollout(models)
    seen = []

    def loss(config, params, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.returns[:, len(PROMPT)])
        return jnp.mean(batch.returns) * sum(jnp.sum(x) for x in jax.tree.leaves(params)), {}

    batch, _, _ = make_batch(config, rollout)
    state, _ = update(loss, config)(state, rollout)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert int(state.train.step) == 12 and len(seen) == 12
    whole = np.sort(batch.returns[:, len(PROMPT)])
    orders = []
    for epoch in range(3):
        rows = np.concatenate(seen[4 * epoch : 4 * epoch + 4])
        np.testing.assert_allclose(np.sort(rows), whole, rtol=1e-6)
        orders.append(tuple(rows))
    assert len(set(orders)) == 3  # dealt anew each epoch


# -------------------------------------------------------------------------------------- invariance


def demonstrations(rng, count=4, width=8):
    tokens = rng.integers(0, 5, (count, width))
    lengths, starts = np.array([8, 3, 6, 5])[:count], np.array([2, 1, 4, 3])[:count]
    steps = np.arange(width)
    attend = steps < lengths[:, None]
    mask = attend & (steps >= starts[:, None])
    return Demonstrations(ints(tokens), ints(attend), floats(mask))


def comparisons(rng, count=4, width=7):
    tokens = rng.integers(0, 5, (count, 3, width))
    attend = np.arange(width) < rng.integers(2, width, (count, 3, 1))
    present = np.ones((count, 3))
    present[1, 2] = 0
    attend[1, 2] = False
    mask = attend & (np.arange(width) >= 1)
    ranks = ints([[0, 1, 2], [1, 0, 0], [0, 0, 1], [1, 1, 1]])
    margin, scores = (
        floats([0, 0.5, 0.1, 1.0]),
        floats([[5, 3, 1], [2, 4, 0], [3, 3, 1], [2, 2, 2]]),
    )
    said = ints(tokens), ints(attend), floats(mask)
    return Comparisons(*said, ranks, floats(present), margin, scores)


def ppo_batch(models):
    """A batch off the policy, so that every part of the loss is at work."""
    rng = np.random.default_rng(4)
    config = plain_config(whiten_advantages=True, score_at="after_eos")
    batch, _, _ = make_batch(config, some_rollout(models))

    def noise(x, scale):
        return x + floats(scale * rng.normal(size=x.shape))

    return config, batch._replace(
        old_logprobs=noise(batch.old_logprobs, 0.3), old_values=noise(batch.old_values, 0.3)
    )


def make_task(name, models):
    rng = np.random.default_rng(5)
    if name == "sft":
        return sft.loss, sft.Config(), {"policy": models["policy"]}, demonstrations(rng)
    scorers = {
        "reward_model": reward_model.loss,
        "plackett_luce": reward_model.plackett_luce_loss,
        "regression": reward_model.regression_loss,
    }
    if name in scorers:
        config = reward_model.Config(centring_coef=0.1)
        return scorers[name], config, {"scorer": models["scorer"]}, comparisons(rng)
    config, batch = ppo_batch(models)
    return ppo.loss, config, {"policy": models["policy"], "critic": models["critic"]}, batch


@pytest.fixture(
    scope="module", params=["sft", "reward_model", "plackett_luce", "regression", "ppo"]
)
def task(request, models):
    """(loss, config, params, batch) of an algorithm."""
    return make_task(request.param, models)


def with_garbage(batch):
    """Other content wherever nothing is said: tokens where attend is 0, numbers where masks are."""
    rng = np.random.default_rng(6)

    def noise(x):
        return floats(50.0 * rng.normal(size=x.shape))

    tokens = jnp.where(batch.attend > 0, batch.tokens, ints(rng.integers(0, 5, batch.tokens.shape)))
    batch = batch._replace(tokens=tokens)
    if isinstance(batch, Comparisons):
        ranks = ints(rng.integers(0, 9, batch.ranks.shape))
        return batch._replace(
            ranks=jnp.where(batch.present > 0, batch.ranks, ranks),
            scores=jnp.where(batch.present > 0, batch.scores, noise(batch.scores)),
        )
    if isinstance(batch, ppo.Batch):
        where = {"old_logprobs": batch.mask, "advantages": batch.mask}
        where |= {"old_values": batch.value_mask, "returns": batch.value_mask}
        dirty = {k: jnp.where(m > 0, getattr(batch, k), noise(m)) for k, m in where.items()}
        return batch._replace(**dirty)
    return batch


def padded(batch, left, right):
    """More columns of padding; numbers per row or response have no columns and stay."""
    width = batch.tokens.shape[-1]

    def wide(x):
        if x.shape[-1] != width:
            return x
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)], constant_values=0)

    return with_garbage(type(batch)(*map(wide, batch)))


def test_what_stands_on_padding_never_changes_a_loss(task):
    loss, config, params, batch = task
    assert not (np.asarray(with_garbage(batch).tokens) == np.asarray(batch.tokens)).all()
    same_loss_and_gradients(loss, params, (config, batch), (config, with_garbage(batch)))


def test_more_padding_on_either_side_never_changes_a_loss(task):
    loss, config, params, batch = task
    wider = config
    if isinstance(config, ppo.Config):  # the response may now be longer
        longer = config.sampling.max_new_tokens + 2
        sampling = dataclasses.replace(config.sampling, max_new_tokens=longer)
        wider = dataclasses.replace(config, sampling=sampling)
    same_loss_and_gradients(loss, params, (config, batch), (wider, padded(batch, 3, 2)))


def test_the_order_of_the_batch_never_changes_a_loss(task):
    loss, config, params, batch = task
    turned = jax.tree.map(lambda x: jnp.roll(x[::-1], 1, axis=0), batch)
    same_loss_and_gradients(loss, params, (config, batch), (config, turned))


def test_micro_batches_change_neither_the_loss_nor_its_gradients_nor_its_metrics(task):
    loss, config, params, batch = task
    cut = [dataclasses.replace(config, micro_batches=n) for n in (1, 2, 4)]
    same_loss_and_gradients(loss, params, *((config, batch) for config in cut))


def test_micro_batches_that_do_not_divide_the_rows_are_refused(models):
    with pytest.raises(ValueError, match="micro_batches=3 does not divide a batch of 4 rows"):
        _, _, params, batch = make_task("sft", models)
        sft.loss(sft.Config(batch_size=33, micro_batches=3), params, batch)


def test_documents_packed_into_one_row_give_the_loss_of_documents_of_their_own(models):
    first, second = [1, 3, 2, 4], [2, 0, 4]
    apart = Demonstrations(
        ints([first, [*second, 0]]),
        ints([[1] * 4, [1, 1, 1, 0]]),
        floats([[0, 1, 1, 1], [0, 1, 1, 0]]),
    )
    together = Demonstrations(
        ints([[*first, *second, 1]]),
        ints([[1, 1, 1, 1, 2, 2, 2, 0]]),
        floats([[0, 1, 1, 1, 0, 1, 1, 0]]),
    )
    params = {"policy": models["policy"]}
    config = sft.Config()
    same_loss_and_gradients(sft.loss, params, (config, apart), (config, together))
    # The same row as one document is another loss: the segment numbers are what separates them.
    joined = together._replace(attend=jnp.minimum(together.attend, 1))
    (one, _), (two, _) = (gradient_of(sft.loss)(config, params, x)[0] for x in (joined, together))
    assert abs(float(one - two)) > 1e-3


# --------------------------------------------------------------- the losses against their formulas


def test_the_sft_loss_is_the_mean_over_all_completion_tokens(models):
    loss, config, params, batch = make_task("sft", models)
    logprobs = np.asarray(plain_logprobs(models["policy"], batch.tokens, batch.attend))
    (value, metrics), _ = gradient_of(loss)(config, params, batch)
    active = np.asarray(batch.mask) > 0
    assert value == pytest.approx(-logprobs[active].mean(), rel=1e-5)
    assert metrics["num_tokens"] == active.sum()


def test_the_reward_model_loss_is_the_mean_over_prompts_of_their_pairs(models):
    loss, config, params, batch = make_task("reward_model", models)
    (value, metrics), _ = gradient_of(loss)(config, params, batch)
    rows, responses, width = batch.tokens.shape
    flat = batch.tokens.reshape(-1, width), batch.attend.reshape(-1, width)
    scores = np.zeros((rows, responses))
    said = plain_values(models["scorer"], *(jnp.pad(x, ((0, 0), (0, 1))) for x in flat))
    for n in range(rows * responses):
        length = int(flat[1][n].sum())
        scores[n // responses, n % responses] = said[n, length]  # after its last real token
    prompts, right, pairs = [], [], 0
    for b in range(rows):
        terms = []
        for i, j in itertools.permutations(range(responses), 2):
            if batch.present[b, i] * batch.present[b, j] and batch.ranks[b, i] < batch.ranks[b, j]:
                gap = scores[b, i] - scores[b, j]
                both = scores[b, i] + scores[b, j]
                rank = math.log1p(math.exp(-(gap - float(batch.margin[b]))))
                terms.append(rank + 0.1 * both**2)
                right.append(gap > 0)
        pairs += len(terms)
        if terms:  # all responses of the last prompt tie: it does not count
            prompts.append(np.mean(terms))
    assert len(prompts) == 3 and pairs == 3 + 1 + 2 == metrics["num_pairs"]
    assert value == pytest.approx(np.mean(prompts), rel=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx(np.mean(right))


def test_with_pairs_the_reward_model_loss_is_that_of_trl(models):
    # Six rows of one token; the embedding is looked up, so a head can be fitted to any six scores.
    wanted = np.array([[1.5, 0.5], [0.2, 0.4], [-0.3, -1.0]])
    shape = dataclasses.replace(SHAPE, vocab_size=6)
    model = compile_quickly(transformer.init, static_argnums=0)(shape, jax.random.key(7))
    model = transformer.without_lm_head(model)
    tokens, ones = ints(np.arange(6).reshape(3, 2, 1)), ints(np.ones((3, 2, 1)))
    rows = tokens.reshape(6, 1), ones.reshape(6, 1)
    hidden = compile_quickly(transformer.hidden_states)(model, *rows)[:, 0]
    kernel = np.linalg.lstsq(np.asarray(hidden, np.float64), wanted.reshape(6, 1), rcond=None)[0]
    weights = {**model.weights, "score": {"kernel": floats(kernel), "bias": jnp.zeros(1)}}
    params = {"scorer": transformer.Model(shape, weights)}
    ranks = ints([[0, 1]] * 3)
    for margin, coefficient, printed in [
        ((0.0, 0.0, 0.0), 0.0, 0.504862),
        ((0.0, 0.1, 0.2), 0.0, 0.547231),
        ((0.0, 0.0, 0.0), 0.01, 0.525029),
    ]:
        batch = Comparisons(tokens, ones, ones * 1.0, ranks, jnp.ones((3, 2)), floats(margin))
        config = reward_model.Config(centring_coef=coefficient)
        (value, _), _ = gradient_of(reward_model.loss)(config, params, batch)
        assert float(value) == pytest.approx(printed, abs=2e-6)


# ------------------------------------------------------------------------ memory of compiled steps


def largest_array(program):
    """Elements of the largest floating-point array in a compiled program, in any layout."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", program.as_text())
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def wide_model():
    shape = transformer.Config(**{**vars(SHAPE), "vocab_size": 8192, "max_length": 512})
    return jax.eval_shape(lambda: transformer.init(shape, jax.random.key(0)))


def described(batch_type, rows, width):
    """Shapes of a record whose fields are all [rows, width]."""
    shapes = {}
    for name in batch_type._fields:
        kind = jnp.int32 if name in ("tokens", "attend") else jnp.float32
        shapes[name] = jax.ShapeDtypeStruct((rows, width), kind)
    return batch_type(**shapes)


def test_the_compiled_sft_step_holds_no_array_of_batch_times_time_times_vocabulary():
    rows, width = 32, 128  # whose logits are 64 MB, four chunks
    config, policy = sft.Config(), wide_model()

    def plain(config, params, batch):
        hidden = transformer.hidden_states(params["policy"], batch.tokens, batch.attend)
        logits = transformer.logits(params["policy"], hidden)
        return losses.masked_mean(-losses.token_logprobs(logits, batch.tokens), batch.mask), {}

    optimizer = training.make_optimizer(config.optimizer, config.num_steps)
    state = jax.eval_shape(lambda p: training.init_state(optimizer, {"policy": p}), policy)
    batch = described(Demonstrations, rows, width)

    def compiled(loss):
        step = compile_quickly(lambda s, b: loop.update(loss, config, s, {}, b))
        program = step.lower(state, batch).compile()
        return largest_array(program), program.memory_analysis().temp_size_in_bytes

    whole = rows * width * 8192
    array, bytes_ = compiled(sft.loss)
    assert array < whole and bytes_ < 4 * whole
    array, bytes_ = compiled(plain)
    assert array >= whole and bytes_ >= 4 * whole


def test_the_compiled_ppo_step_holds_no_array_of_batch_times_time_times_vocabulary():
    rows, prompt, new = 16, 16, 256
    config = ppo.Config(sampling=Sampling(max_new_tokens=new), batch_size=rows)

    def start(policy):
        return online.init_state(config, FIRST_MEMORY, ppo.networks(config, policy, None))

    state = jax.eval_shape(start, wide_model())
    rollout = described(Rollout, rows, prompt + new)
    kinds = {"scores": "float32", "finished": "float32", "lengths": "int32", "index": "int32"}
    vectors = {name: jax.ShapeDtypeStruct((rows,), kind) for name, kind in kinds.items()}
    rollout = rollout._replace(**vectors, given=None, pretraining=None)
    program = update(ppo.loss, config).lower(state, rollout).compile()
    whole = rows * new * 8192
    assert largest_array(program) < whole
    assert program.memory_analysis().temp_size_in_bytes < 4 * whole
