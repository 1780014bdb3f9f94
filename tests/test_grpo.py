"""GRPO: its expected gradient by listing all pairs of responses, its variants, and runs."""

import dataclasses

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import on_policy
from rlhf_jax.algorithms import grpo
from rlhf_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compile_cache")

CONFIG = grpo.Config(batch_size=2, samples_per_prompt=2, sampling=enumeration.SAMPLING, kl_coef=0.0)
COUNT = 3000


def expected(policy, advantage, reduce):
    """The surrogate's expectation over all pairs of responses, at ratio 1 in value."""
    logprobs = enumeration.logprobs(policy)
    p = jax.lax.stop_gradient(jnp.exp(logprobs.sum(1)))
    scores = enumeration.score(None, *enumeration.rows())
    gains = advantage(jnp.stack(jnp.broadcast_arrays(scores[:, None], scores), axis=-1))
    mask = enumeration.rows()[2]
    each = reduce(logprobs, mask)
    pairs = 0.5 * (gains[..., 0] * each[:, None] + gains[..., 1] * each)
    return -jnp.sum(p[:, None] * p * pairs)


def normalised(pairs):
    """(r - mean) / (std + 1e-4) of two rewards."""
    half = 0.5 * (pairs[..., 0] - pairs[..., 1])
    gain = half / (np.sqrt(2) * jnp.abs(half) + 1e-4)
    return jnp.stack([gain, -gain], axis=-1)


def centred(pairs):
    half = 0.5 * (pairs[..., 0] - pairs[..., 1])
    return jnp.stack([half, -half], axis=-1)


@pytest.mark.parametrize(
    "make_batch, loss_fn, advantage, reduce",
    [
        (grpo.make_batch, grpo.loss, normalised, lambda x, m: x.sum(1) / m.sum(1)),
        (
            grpo.centred_batch,
            grpo.dr_grpo_loss,
            centred,
            lambda x, m: x.sum(1) / enumeration.LONGEST,
        ),
        (grpo.make_batch, grpo.gspo_loss, normalised, lambda x, m: x.sum(1) / m.sum(1)),
    ],
    ids=["grpo", "dr_grpo", "gspo"],
)
def test_the_first_gradient_has_the_expectation_that_listing_all_pairs_gives(
    make_batch, loss_fn, advantage, reduce
):
    found = enumeration.estimates(CONFIG, grpo.algorithm(make_batch, loss_fn), COUNT)
    exact = enumeration.exact(lambda policy: expected(policy, advantage, reduce))
    assert np.abs(enumeration.z_scores(found, exact)).max() < 3


def test_dividing_by_the_deviation_and_the_length_is_a_bias_and_centring_is_a_scale():
    """Dr. GRPO's expectation is the policy gradient times (K - 1) / K / longest."""

    def reward(policy):
        p = jnp.exp(enumeration.logprobs(policy).sum(1))
        return -jnp.sum(p * enumeration.score(None, *enumeration.rows()))

    true = enumeration.exact(reward)
    dr = enumeration.exact(
        lambda policy: expected(policy, centred, lambda x, m: x.sum(1) / enumeration.LONGEST)
    )
    np.testing.assert_allclose(dr, true / 2 / enumeration.LONGEST, rtol=1e-5, atol=1e-4)
    plain = enumeration.exact(
        lambda policy: expected(policy, normalised, lambda x, m: x.sum(1) / m.sum(1))
    )
    cosine = plain @ true / np.linalg.norm(plain) / np.linalg.norm(true)
    assert 0 < cosine < 0.999


# ------------------------------------------------------------------------- the loss, by hand


def batch_of(logprob_change, mask, scores):
    """A batch of one group whose policy differs from the sampler by `logprob_change`."""
    mask = jnp.asarray(mask, jnp.float32)[None]
    zeros = jnp.zeros(mask.shape)
    return grpo.Batch(
        tokens=zeros.astype(jnp.int32),
        attend=zeros.astype(jnp.int32),
        mask=mask,
        old_logprobs=-jnp.asarray(logprob_change)[None],
        ref_logprobs=zeros,
        weights=jnp.ones(mask.shape),
        advantages=jnp.asarray(scores)[None],
    )


@pytest.fixture
def silent(monkeypatch):
    """`online.forward` gives log-probability 0 to every token, so the change is in the batch."""

    def forward(config, params, batch):
        zeros = jnp.zeros(batch.tokens.shape)
        return zeros, None, zeros

    monkeypatch.setattr(grpo.online, "forward", forward)


CHANGE = [[0.5, -0.1, 0.0], [-0.4, 0.0, 0.0]]
MASK = [[1, 1, 0], [1, 0, 0]]
# Row 0, advantage 1: ratios e^0.5 = 1.649, clipped to 1.2, and e^-0.1 = 0.905. Row 1, advantage
# -2: ratio e^-0.4 = 0.670, clipped to 0.8.
TOKENS = [-1.2, -np.exp(-0.1)], [2 * 0.8]


@pytest.mark.parametrize(
    "loss_fn, want",
    [
        (grpo.loss, (np.mean(TOKENS[0]) + TOKENS[1][0]) / 2),
        (grpo.dapo_loss, (sum(TOKENS[0]) + TOKENS[1][0]) / 3),
        (grpo.dr_grpo_loss, (sum(TOKENS[0]) + TOKENS[1][0]) / (2 * 3)),
        # Geometric means of the ratios: e^0.2, clipped to 1.2, and 0.670, clipped to 0.8.
        (grpo.gspo_loss, (-1.2 + 2 * 0.8) / 2),
    ],
)
def test_losses_by_hand(silent, loss_fn, want):
    config = dataclasses.replace(CONFIG, sampling=Sampling(max_new_tokens=3))
    value, metrics = loss_fn(config, {}, batch_of(CHANGE, MASK, [1.0, -2.0]))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    clipped = 1.0 if loss_fn is grpo.gspo_loss else 2 / 3
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], clipped, rtol=1e-6)


def test_the_upper_clip_may_be_looser(silent):
    config = dataclasses.replace(CONFIG, clip_eps_high=0.5)
    value, _ = grpo.loss(config, {}, batch_of(CHANGE, MASK, [1.0, -2.0]))
    np.testing.assert_allclose(value, ((-1.5 - np.exp(-0.1)) / 2 + 1.6) / 2, rtol=1e-6)


def test_the_kl_of_each_token_is_weighted_into_the_loss(silent):
    batch = batch_of(CHANGE, MASK, [0.0, 0.0])
    batch = batch._replace(ref_logprobs=jnp.asarray([[[0.3, 0.0, 9.0], [-0.2, 9.0, 9.0]]]))
    value, metrics = grpo.loss(dataclasses.replace(CONFIG, kl_coef=0.5), {}, batch)
    k3 = [np.exp(x) - x - 1 for x in (0.3, 0.0, -0.2)]
    np.testing.assert_allclose(value, 0.5 * (np.mean(k3[:2]) + k3[2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/kl_avg"], np.mean(k3), rtol=1e-5)


# ------------------------------------------------------------------------------ groups and runs

TINY = grpo.Config(
    num_iterations=2,
    batch_size=8,
    samples_per_prompt=4,
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
    return grpo.run(config, **(given | inputs))


def test_a_run_is_the_same_on_a_mesh_of_eight():
    policy, history = run()
    other, others = run(mesh="2x2x2")
    for key in ("loss", "grad_norm", "objective/kl", "groups/scores_std"):
        values = [line[key] for line in history]
        np.testing.assert_allclose([h[key] for h in others], values, rtol=1e-4, atol=1e-6)
    moved = tiny.distance(policy, tiny.model())
    assert moved > 0.1
    assert tiny.distance(other, policy) < 1e-3 * moved


def test_a_run_may_train_on_some_of_its_groups():
    config = dataclasses.replace(TINY, num_iterations=1, num_minibatches=1)
    _, history = run(dataclasses.replace(config, train_groups=4), loss_fn=grpo.dapo_loss)
    _, whole = run(config, loss_fn=grpo.dapo_loss)
    assert 0 < history[0]["groups/informative"] <= 1
    assert history[0]["model_flops"] < 0.8 * whole[0]["model_flops"]


def some_scores(index):
    """Groups of even number have scores that differ."""
    return jnp.where(index % 2 == 0, jnp.arange(index.shape[0]) % 4, 1.0)


def test_only_groups_whose_scores_differ_are_trained_on():
    config = dataclasses.replace(TINY, num_minibatches=1, train_groups=6, samples_per_prompt=4)
    rollout = tiny.some_rollout(32)
    rollout = rollout._replace(index=jnp.arange(32) // 4, scores=some_scores(jnp.arange(32) // 4))
    batch, _, _ = grpo.make_batch(config, {}, (), rollout)
    assert on_policy.groups_that_differ(config, rollout).tolist() == [1, 0] * 4
    assert batch.mask.shape[:2] == (6, 4)
    # Four groups differ; the two others that fill the batch count for nothing.
    np.testing.assert_array_equal(batch.mask.max((1, 2)), [1, 1, 1, 1, 0, 0])
    assert (np.abs(batch.advantages[:4]).max(1) > 0).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt=1 must be at least 2"),
        ({"train_groups": 9}, "train_groups=9 must be at most batch_size=8"),
        ({"train_groups": 5}, "5 groups per iteration, which stay together, are not a multiple of"),
        (
            {"train_groups": 2, "micro_batches": 8, "samples_per_prompt": 4},
            "a minibatch of 4 responses is not a multiple of micro_batches=8",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_when_the_configuration_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
