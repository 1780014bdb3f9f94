"""Best of n against listing every subset and every response; RAFT's selection and its runs."""

import dataclasses
import itertools

import enumeration
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.algorithms import best_of_n
from rlhf_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compile_cache")


def by_listing(proxy, gold, n):
    """The mean over all subsets of n draws of the mean gold score of those that tie for best."""
    values = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        values.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return np.mean(values)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_the_estimate_is_the_mean_over_all_subsets_ties_included(n, ties):
    rng = np.random.default_rng(n)
    proxy = rng.integers(0, 3, 7).astype(float) if ties else rng.normal(size=7)
    gold = rng.normal(size=7)
    want = by_listing(proxy, gold, n)
    np.testing.assert_allclose(best_of_n.expected_best(proxy, gold, n), want, rtol=1e-12)
    both = best_of_n.expected_best(np.stack([proxy, -proxy]), np.stack([gold, gold]), n)
    np.testing.assert_allclose(both, [want, by_listing(-proxy, gold, n)], rtol=1e-12)


def test_the_estimate_is_unbiased_for_the_exact_distribution_of_the_best():
    """Five responses of which two tie; each of N = 6 draws is one of them."""
    p = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    proxy, gold = np.array([0.0, 1.0, 1.0, 2.0, 3.0]), np.array([0.3, -1.0, 2.0, 0.5, -4.0])
    n, exact = 3, 0.0
    for value in np.unique(proxy):
        tied, below = proxy == value, p[proxy < value].sum()
        reached = (below + p[tied].sum()) ** n - below**n
        exact += reached * (p[tied] @ gold[tied]) / p[tied].sum()
    rng = np.random.default_rng(0)
    draws = rng.choice(5, size=(40000, 6), p=p)
    found = best_of_n.expected_best(proxy[draws], gold[draws], n)
    assert abs(found.mean() - exact) < 3 * found.std() / np.sqrt(len(found))


def test_of_normal_scores_the_best_is_where_order_statistics_say():
    """E[max] of n standard normal draws: 1.03 for 4, 1.42 for 8."""
    draws = np.random.default_rng(0).normal(size=20000)
    for n, want in ((1, 0.0), (4, 1.0294), (8, 1.4236)):
        assert abs(best_of_n.expected_best(draws, draws, n) - want) < 0.03


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_the_best_never_exceeds_its_bound(n):
    """The exact distribution of the best of n, over all responses of a small policy."""
    p = np.exp(np.asarray(enumeration.logprobs(enumeration.model()).sum(1), np.float64))
    p /= p.sum()
    scores = np.asarray(enumeration.score(None, *enumeration.rows()))
    at_most = np.array([p[scores <= s].sum() for s in scores])
    below = np.array([p[scores < s].sum() for s in scores])
    best = (at_most**n - below**n) * p / (at_most - below)
    np.testing.assert_allclose(best.sum(), 1.0, rtol=1e-9)
    kl = np.sum(best * np.log(best / p))
    assert kl <= best_of_n.kl_bound(n) + 1e-9
    assert kl >= 0.5 * best_of_n.kl_bound(n) - 1e-9


@pytest.mark.parametrize("n, nats", [(2, 0.193), (4, 0.636), (8, 1.204), (64, 3.175)])
def test_values_of_the_bound(n, nats):
    assert abs(best_of_n.kl_bound(n) - nats) < 1e-3


@pytest.mark.parametrize("shape, n", [((3,), 4), ((3,), 0)])
def test_more_than_the_draws_is_refused(shape, n):
    with pytest.raises(ValueError, match=f"best of {n} from"):
        best_of_n.expected_best(np.zeros(shape), np.zeros(shape), n)


# ----------------------------------------------------------------------------------------- RAFT

TINY = best_of_n.Config(
    num_iterations=2,
    batch_size=16,
    samples_per_prompt=2,
    num_minibatches=2,
    sampling=Sampling(max_new_tokens=6),
    policy_optimizer=tiny.ADAM,
)


def run(config=TINY, mesh="1x1x1", **inputs):
    given = {
        "policy": tiny.model(mesh),
        "prompts": tiny.prompts(config.batch_size),
        "tokenizer": tiny.TOKENIZER,
        "score": tiny.share_below_128,
        "runtime": tiny.runtime(mesh),
    }
    return best_of_n.run(config, **(given | inputs))


def test_the_best_response_to_each_prompt_is_kept_and_the_first_of_those_that_tie():
    config = dataclasses.replace(TINY, batch_size=3, num_minibatches=1, samples_per_prompt=4)
    rollout = tiny.some_rollout(12)
    rollout = rollout._replace(
        scores=jnp.array([0.0, 2, 1, 2, 5, 5, 5, 5, -3, -2, -1, -1.5]),
        tokens=jnp.arange(12)[:, None] * jnp.ones((12, 6), jnp.int32),
    )
    batch, memory, metrics = best_of_n.make_batch(config, {}, "kept", rollout)
    assert batch.tokens[:, 0].tolist() == [1, 4, 10] and memory == "kept"
    np.testing.assert_allclose(metrics["objective/best_scores"], 2.0)


def test_imitating_its_only_response_changes_a_policy_not_at_all_on_average():
    """The sum over tokens has expected gradient 0 (the mean differs by the batch's length)."""
    config = best_of_n.Config(batch_size=1, samples_per_prompt=1, sampling=enumeration.SAMPLING)

    def summed(config, params, batch):
        loss, metrics = best_of_n.loss(config, params, batch)
        return loss * batch.mask.sum(), metrics

    found = enumeration.estimates(config, best_of_n.algorithm(loss_fn=summed), 3000)
    zero = np.zeros(found.shape[1])
    assert np.abs(enumeration.z_scores(found, zero)).max() < 3
    better = dataclasses.replace(config, samples_per_prompt=4)
    found = enumeration.estimates(better, best_of_n.algorithm(loss_fn=summed), 3000)
    assert np.abs(enumeration.z_scores(found, zero)).max() > 3


@pytest.mark.slow
def test_a_run_is_the_same_on_a_mesh_of_eight_and_may_filter_its_sampler():
    config = dataclasses.replace(TINY, sampling=Sampling(max_new_tokens=6, top_p=0.9))
    policy, history = run(config)
    other, others = run(config, mesh="2x2x2")
    for key in ("loss", "grad_norm", "objective/best_scores"):
        values = [line[key] for line in history]
        np.testing.assert_allclose([h[key] for h in others], values, rtol=1e-4, atol=1e-6)
    moved = tiny.distance(policy, tiny.model())
    assert moved > 0.1
    assert tiny.distance(other, policy) < 1e-3 * moved
