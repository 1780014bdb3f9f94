"""REINFORCE: its gradient against the exact one, and what each baseline does to it."""

import collections
import dataclasses
import functools

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.algorithms import reinforce
from rlhf_jax.sampling import Drawing, Sampling, decode

pytestmark = pytest.mark.usefixtures("compile_cache")

CONFIG = reinforce.Config(
    batch_size=2, samples_per_prompt=2, sampling=enumeration.SAMPLING, kl_coef=0.3
)
COUNT = 3000


def expected_reward(policy):
    """Minus the sum over all responses of p(y) (score - kl_coef * log p / p_reference)."""
    logprobs = enumeration.logprobs(policy).sum(1)
    ratio = logprobs - enumeration.logprobs(enumeration.model(1)).sum(1)
    scores = enumeration.score(None, *enumeration.rows())
    rewards = scores - CONFIG.kl_coef * jax.lax.stop_gradient(ratio)
    return -jnp.sum(jnp.exp(logprobs) * rewards)


@functools.cache
def exact():
    return enumeration.exact(expected_reward)


def estimated(baseline, config=CONFIG, loss_fn=reinforce.loss, **given):
    return enumeration.estimates(
        config,
        reinforce.algorithm(config, baseline, loss_fn),
        COUNT,
        reference=enumeration.model(1),
        **given,
    )


def test_the_list_of_responses_is_complete():
    total = jnp.exp(enumeration.logprobs(enumeration.model()).sum(1)).sum()
    assert abs(float(total) - 1) < 1e-5


@pytest.mark.parametrize("name", ["nothing", "leave_one_out", "moving_average"])
def test_a_baseline_that_does_not_see_the_response_leaves_the_gradient_unbiased(name):
    given = {}
    baseline = getattr(reinforce, name)
    if name == "moving_average":
        baseline, given = reinforce.moving_average(), {"memory": reinforce.Average(0.7, 1.0)}
    found = estimated(baseline, **given)
    assert np.abs(enumeration.z_scores(found, exact())).max() < 3


def test_the_first_update_of_the_clipped_loss_has_the_same_gradient():
    plain = estimated(reinforce.leave_one_out)
    clipped = estimated(reinforce.leave_one_out, loss_fn=reinforce.clipped_loss)
    np.testing.assert_allclose(clipped, plain, atol=1e-5 * np.abs(plain).max())


def test_self_critical_training_is_unbiased_and_never_trains_on_the_greedy_response():
    choose = reinforce.greedy_first(2)
    drawing = Drawing(enumeration.ENDS, choose)
    found = estimated(reinforce.greedy, drawing=drawing)
    assert np.abs(enumeration.z_scores(found, exact())).max() < 3


@pytest.mark.parametrize("name", ["batch_mean", "queue"])
def test_a_mean_that_contains_the_response_scales_the_gradient(name):
    """By (N - 1) / N, where N = 4 rewards are averaged."""
    baseline = reinforce.batch_mean if name == "batch_mean" else reinforce.queue(16)
    found = estimated(baseline)
    assert np.abs(enumeration.z_scores(found, 0.75 * exact())).max() < 3
    assert np.abs(enumeration.z_scores(found, exact())).max() > 3


def test_leave_one_out_takes_away_the_variance_of_what_all_rewards_have_in_common(monkeypatch):
    """With K = 2 it doubles that of a reward of mean 0, so here the mean is 5."""
    score, config = enumeration.score, dataclasses.replace(CONFIG, kl_coef=0.0)
    monkeypatch.setattr(enumeration, "score", lambda *arrays: 5.0 + score(*arrays))
    spread = {
        name: estimated(getattr(reinforce, name), config).var(0).sum()
        for name in ("nothing", "leave_one_out")
    }
    assert spread["leave_one_out"] < 0.5 * spread["nothing"]


def banned_twice(logits, history):
    """A penalty that leaves every token possible: token 2 is half as likely."""
    del history
    return logits.at[:, 2].add(-0.7)


def test_importance_weights_make_a_penalised_sampler_unbiased():
    drawing = Drawing(enumeration.ENDS, processors=(banned_twice,))
    config = dataclasses.replace(CONFIG, off_policy="weight", max_weight=1e6)
    found = estimated(reinforce.nothing, config, drawing=drawing)
    assert np.abs(enumeration.z_scores(found, exact())).max() < 3
    ignored = dataclasses.replace(CONFIG, off_policy="ignore")
    found = estimated(reinforce.nothing, ignored, drawing=drawing)
    assert np.abs(enumeration.z_scores(found, exact())).max() > 3


def test_importance_weights_leave_a_filter_the_gradient_over_the_tokens_that_it_keeps():
    config = dataclasses.replace(
        CONFIG,
        off_policy="weight",
        max_weight=1e6,
        sampling=Sampling(max_new_tokens=enumeration.LONGEST, top_k=3),
    )

    def kept_reward(policy):
        tokens, attend, mask = enumeration.rows()
        hidden = enumeration.transformer.hidden_states(policy, tokens, attend)
        logits = enumeration.transformer.logits(policy, hidden)
        third = jnp.sort(logits, axis=-1)[..., -3]
        own = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        is_kept = jnp.all((own >= third[:, :-1]) | (mask[:, 1:] == 0), axis=1)
        logprobs = enumeration.logprobs(policy).sum(1)
        ratio = logprobs - enumeration.logprobs(enumeration.model(1)).sum(1)
        scores = enumeration.score(None, tokens, attend, mask)
        rewards = scores - CONFIG.kl_coef * jax.lax.stop_gradient(ratio)
        return -jnp.sum(jnp.where(is_kept, jnp.exp(logprobs) * rewards, 0.0))

    found = estimated(reinforce.nothing, config)
    assert np.abs(enumeration.z_scores(found, enumeration.exact(kept_reward))).max() < 3


# ------------------------------------------------------------------------------------ baselines


def test_rewards_that_are_all_alike_give_no_gradient():
    rewards = jnp.full((3, 2), 0.4)
    for baseline in (reinforce.leave_one_out, reinforce.batch_mean, reinforce.greedy):
        values, _ = baseline.of(baseline.memory, rewards)
        np.testing.assert_allclose(rewards - values, 0.0, atol=1e-7)


def test_with_two_samples_leave_one_out_is_plus_and_minus_the_difference():
    rewards = jnp.array([[1.0, 4.0], [0.5, 0.25]])
    values, _ = reinforce.leave_one_out.of((), rewards)
    np.testing.assert_allclose(rewards - values, [[-3, 3], [0.25, -0.25]], atol=1e-6)


@pytest.mark.parametrize("pushed", [3, 8, 10, 25])
def test_the_queue_is_a_deque_of_the_last_rewards(pushed):
    baseline, rng = reinforce.queue(10), np.random.default_rng(0)
    memory, deque = baseline.memory, collections.deque(maxlen=10)
    for _ in range(6):
        rewards = rng.normal(size=(pushed, 1)).astype(np.float32)
        values, memory = baseline.of(memory, jnp.asarray(rewards))
        deque.extend(rewards.ravel())
        np.testing.assert_allclose(values, np.mean(deque), atol=1e-6)


def test_the_moving_average_lags_by_one_iteration():
    baseline = reinforce.moving_average(0.5)
    values, memory = baseline.of(baseline.memory, jnp.array([[4.0, 6.0]]))
    assert (values == 0).all()
    values, memory = baseline.of(memory, jnp.array([[9.0, 9.0]]))
    np.testing.assert_allclose(values, 5.0)
    values, _ = baseline.of(memory, jnp.array([[0.0, 0.0]]))
    np.testing.assert_allclose(values, (0.5 * 5.0 + 9.0) / 1.5)


# ----------------------------------------------------------------------------------------- runs

TINY = reinforce.Config(
    num_iterations=2,
    batch_size=8,
    samples_per_prompt=4,
    sampling=Sampling(max_new_tokens=6),
    # With a large eps the first step is no sign of the gradient, whose last digits differ by mesh.
    policy_optimizer=dataclasses.replace(tiny.ADAM, learning_rate=1e-2, eps=1e-4),
)


def run(config=TINY, mesh="1x1x1", **inputs):
    given = {
        "policy": tiny.model(mesh),
        "prompts": tiny.prompts(config.batch_size),
        "tokenizer": tiny.TOKENIZER,
        "score": tiny.share_below_128,
        "runtime": tiny.runtime(mesh),
    }
    return reinforce.run(config, **(given | inputs))


@pytest.mark.parametrize(
    "baseline",
    [pytest.param(reinforce.greedy, marks=pytest.mark.slow), reinforce.queue()],
    ids=["greedy", "queue"],
)
def test_a_run_is_the_same_on_a_mesh_of_eight(baseline):
    policy, history = run(baseline=baseline)
    other, others = run(mesh="2x2x2", baseline=baseline)
    for key in ("loss", "grad_norm", "objective/kl", "objective/baseline"):
        values = [line[key] for line in history]
        np.testing.assert_allclose([h[key] for h in others], values, rtol=1e-4, atol=1e-5)
    moved = tiny.distance(policy, tiny.model())
    assert moved > 0.1
    assert tiny.distance(other, policy) < 1e-3 * moved


@pytest.mark.parametrize(
    "changes, inputs, message",
    [
        ({"num_epochs": 2}, {}, "2 updates per iteration, but `loss` is the policy gradient"),
        ({}, {"choose": decode.greedy}, "learns from responses that are drawn at random"),
        ({"samples_per_prompt": 1}, {}, "samples_per_prompt=1 must be at least 2"),
        ({}, {"critic": tiny.model()}, "this algorithm has no critic"),
        (
            {"sampling": Sampling(max_new_tokens=6, top_p=0.9)},
            {},
            r"reinforce assumes that responses are drawn from the policy, but sampling.top_p=0.9",
        ),
        ({}, {"processors": (banned_twice,)}, "but processors makes the sampler another"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **changes), **inputs)


def test_a_queue_of_no_rewards_is_refused():
    with pytest.raises(ValueError, match=r"queue\(size=0\) must hold at least one reward"):
        reinforce.queue(0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match="must be in \\[0, 1\\)"):
        reinforce.moving_average(decay)


def test_greedy_responses_are_not_among_the_figures_of_what_is_trained_on():
    rollout = tiny.some_rollout(6)._replace(old_logprobs=jnp.arange(36.0).reshape(6, 6))
    config = dataclasses.replace(CONFIG, samples_per_prompt=3)
    _, _, metrics = reinforce.make_batch(reinforce.greedy, config, {}, (), rollout)
    drawn = jnp.array([1, 2, 4, 5])
    assert metrics["objective/scores"] == rollout.scores[drawn].mean()
    assert metrics["objective/kl"] == rollout.old_logprobs[drawn].sum(1).mean()
    assert metrics["objective/length"] == 6
