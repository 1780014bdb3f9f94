"""Rewards per token, GAE and group baselines against their definitions as sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages

RNG = np.random.default_rng(0)
# Left padding and prompt, ragged responses, one full row, one row without any token.
MASK = np.zeros((5, 8))
for row, (start, stop) in zip(MASK, [(2, 8), (3, 6), (0, 8), (5, 6), (4, 4)]):
    row[start:stop] = 1
REWARDS, VALUES = RNG.normal(size=(2, 5, 8))


def floats(table):
    return jnp.asarray(table, jnp.float32)


def gae(mask=MASK, rewards=REWARDS, values=VALUES, discount=0.9, gae_lambda=0.7):
    return advantages.gae(
        rewards=floats(rewards),
        values=floats(values),
        mask=floats(mask),
        discount=discount,
        gae_lambda=gae_lambda,
    )


def double_sum(rewards, values, discount, gae_lambda):
    """A_t = sum_l (discount * lambda)^l * (r_{t+l} + discount * V_{t+l+1} - V_{t+l}), one row."""
    after = [*values[1:], 0.0]
    return [
        sum(
            (discount * gae_lambda) ** (k - t) * (rewards[k] + discount * after[k] - values[k])
            for k in range(t, len(rewards))
        )
        for t in range(len(rewards))
    ]


def by_double_sum(mask, discount, gae_lambda):
    out = np.zeros(mask.shape)
    for b, active in enumerate(mask > 0):
        out[b, active] = double_sum(REWARDS[b, active], VALUES[b, active], discount, gae_lambda)
    return out


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_gae_is_the_double_sum_of_schulman_et_al(discount, gae_lambda):
    advantage, returns = gae(discount=discount, gae_lambda=gae_lambda)
    expected = by_double_sum(MASK, discount, gae_lambda)
    np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, (expected + VALUES) * MASK, rtol=1e-5, atol=1e-6)


def test_gae_is_the_weighted_mean_of_the_k_step_estimates():
    # (1 - lambda) * sum_k lambda^(k-1) A^(k), the definition (Schulman et al. 2016, eq. 16), on
    # the full row, where the estimates of more steps than are left all equal the last one.
    discount, lam, length = 0.9, 0.7, 8
    rewards, values = REWARDS[2], np.append(VALUES[2], np.zeros(400))
    padded = np.append(rewards, np.zeros(400))
    for t in range(length):
        estimates = [
            sum(discount**i * padded[t + i] for i in range(k))
            + discount**k * values[t + k]
            - values[t]
            for k in range(1, 300)
        ]
        expected = (1 - lam) * sum(lam**k * a for k, a in enumerate(estimates))
        np.testing.assert_allclose(gae()[0][2, t], expected, rtol=1e-4, atol=1e-5)


def test_with_lambda_and_discount_1_the_advantage_is_the_rewards_to_come_minus_the_value():
    advantage, returns = gae(discount=1.0, gae_lambda=1.0)
    to_come = np.cumsum((REWARDS * MASK)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(advantage, (to_come - VALUES) * MASK, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, to_come * MASK, rtol=1e-5, atol=1e-6)


def test_with_lambda_0_the_advantage_is_the_error_of_one_step():
    advantage, _ = gae(gae_lambda=0.0, discount=0.5)
    # The row of one token has no next value; the row of three ends after its third.
    np.testing.assert_allclose(advantage[3, 5], REWARDS[3, 5] - VALUES[3, 5], rtol=1e-5)
    error = REWARDS[1, 4] + 0.5 * VALUES[1, 5] - VALUES[1, 4]
    np.testing.assert_allclose(advantage[1, 4], error, rtol=1e-5)
    np.testing.assert_allclose(advantage[1, 5], REWARDS[1, 5] - VALUES[1, 5], rtol=1e-5)


def test_inactive_positions_between_active_ones_are_stepped_over():
    mask = MASK.copy()
    mask[0, 4:6] = 0
    advantage, returns = gae(mask=mask)
    np.testing.assert_allclose(advantage, by_double_sum(mask, 0.9, 0.7), rtol=1e-5, atol=1e-6)
    assert (np.asarray(returns)[mask == 0] == 0).all()


def test_a_kl_that_is_not_finite_on_padding_does_not_reach_the_gradient_of_the_coefficient():
    dirty = np.where(MASK > 0, VALUES, np.nan)
    grad = jax.grad(lambda coef: shaped("last", coef, dirty).sum())(0.1)
    np.testing.assert_allclose(grad, -(VALUES * MASK).sum(), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_stands_on_padding_reaches_neither_advantages_nor_their_gradients(bad):
    dirty = [np.where(MASK > 0, x, bad) for x in (REWARDS, VALUES)]
    for clean, other in zip(gae(), gae(rewards=dirty[0], values=dirty[1])):
        np.testing.assert_array_equal(clean, other)
    weights = floats(RNG.normal(size=MASK.shape))

    def weighted(rewards, values):
        advantage, returns = advantages.gae(
            rewards=rewards, values=values, mask=floats(MASK), discount=0.9, gae_lambda=0.7
        )
        return jnp.sum(weights * (advantage + 2 * returns))

    clean = jax.grad(weighted, (0, 1))(floats(REWARDS), floats(VALUES))
    other = jax.grad(weighted, (0, 1))(*map(floats, dirty))
    for a, b in zip(clean, other):
        np.testing.assert_array_equal(a, b)


def test_more_padding_on_either_side_changes_no_advantage():
    wide = [np.pad(x, ((0, 0), (3, 2)), constant_values=7.0) for x in (REWARDS, VALUES)]
    mask = np.pad(MASK, ((0, 0), (3, 2)))
    for narrow, padded in zip(gae(), gae(mask=mask, rewards=wide[0], values=wide[1])):
        np.testing.assert_allclose(padded[:, 3:-2], narrow, rtol=1e-6)
        assert (np.asarray(padded)[mask == 0] == 0).all()


# ------------------------------------------------------------------------------------- the rewards


def shaped(score_at, kl_coef=0.1, kl=VALUES):
    return advantages.shaped_rewards(
        scores=floats([1.0, 2.0, 3.0, 4.0, 5.0]),
        kl=floats(kl),
        mask=floats(MASK),
        kl_coef=kl_coef,
        score_at=score_at,
    )


def test_a_policy_that_likes_its_token_more_than_the_reference_does_is_punished():
    logprobs, ref_logprobs = floats([[0.0, -1.0, -2.0]]), floats([[0.0, -3.0, -1.5]])
    rewards = advantages.shaped_rewards(
        scores=floats([0.0]),
        kl=logprobs - ref_logprobs,
        mask=floats([[0, 1, 1]]),
        kl_coef=0.5,
    )
    np.testing.assert_allclose(rewards, [[0.0, -0.5 * 2.0, 0.5 * 0.5]])


def test_the_score_is_paid_once_on_the_last_token_or_just_after_it():
    last, after = np.zeros((2, *MASK.shape))
    for b, t in enumerate([7, 5, 7, 5]):
        last[b, t] = after[b, min(t + 1, 7)] = b + 1  # no place after a full row
    penalty = -0.1 * VALUES * MASK
    np.testing.assert_allclose(shaped("last"), last + penalty, rtol=1e-6)
    np.testing.assert_allclose(shaped("after_eos"), after + penalty, rtol=1e-6)
    # The row without tokens gets nothing, wherever the score would go.
    assert not np.asarray(shaped("last"))[4].any() and not np.asarray(shaped("after_eos"))[4].any()


def test_the_rewards_of_a_row_sum_to_its_score_minus_the_penalty():
    expected = np.array([1.0, 2.0, 3.0, 4.0, 0.0]) - 0.1 * (VALUES * MASK).sum(axis=1)
    for score_at in ("last", "after_eos"):
        np.testing.assert_allclose(shaped(score_at).sum(axis=1), expected, rtol=1e-5)


def test_a_kl_that_is_not_finite_on_padding_does_not_reach_the_rewards():
    dirty = np.where(MASK > 0, VALUES, np.nan)
    np.testing.assert_array_equal(shaped("after_eos", kl=dirty), shaped("after_eos"))


@pytest.mark.parametrize("score_at, place", [("last", 5), ("after_eos", 6)])
def test_the_score_is_paid_once_at_the_last_token_of_a_row_whose_mask_has_gaps(score_at, place):
    mask = floats([[1, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0]])
    rewards = advantages.shaped_rewards(
        scores=jnp.array([1.0, -2.0]),
        kl=jnp.zeros((2, 7)),
        mask=mask,
        kl_coef=0.1,
        score_at=score_at,
    )
    expected = np.zeros((2, 7))
    expected[0, place], expected[1, place - 2] = 1.0, -2.0
    np.testing.assert_array_equal(rewards, expected)


def test_the_extended_mask_of_a_row_with_gaps_grows_only_after_its_last_token():
    mask = floats([[1, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(
        advantages.extend_after_eos(mask),
        [[1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]],
    )


def test_rewards_and_advantages_of_bfloat16_arrays_are_computed_in_float32():
    scores, kl, values = (
        jnp.asarray(RNG.normal(size=shape), jnp.bfloat16) for shape in (5, (5, 8), (5, 8))
    )

    def both(dtype):
        mask = jnp.asarray(MASK, dtype)
        rewards = advantages.shaped_rewards(
            scores=scores.astype(dtype), kl=kl.astype(dtype), mask=mask, kl_coef=0.1
        )
        rest = advantages.gae(
            rewards=rewards, values=values.astype(dtype), mask=mask, discount=0.9, gae_lambda=0.7
        )
        groups = values.astype(dtype)
        return rewards, *rest, advantages.leave_one_out(groups), advantages.group_normalised(groups)

    for actual, expected in zip(both(jnp.bfloat16), both(jnp.float32)):
        assert actual.dtype == expected.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)


def test_the_extended_mask_has_one_more_position_where_there_is_room():
    lengths = np.asarray(advantages.extend_after_eos(floats(MASK))).sum(axis=1)
    np.testing.assert_array_equal(lengths, [6, 4, 8, 2, 0])
    np.testing.assert_array_equal(
        advantages.last_token(floats(MASK)).argmax(axis=1)[:4], [7, 5, 7, 5]
    )


# ------------------------------------------------------------------------------------- the groups

GROUPS = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 0.5, 0.5, 1.0]], np.float32)


def test_group_normalised_advantages_are_those_of_trl():
    expected = [[0.865875, -0.865875, -0.865875, 0.865875], [1.414014, -0.707007, -0.707007, 0.0]]
    np.testing.assert_allclose(advantages.group_normalised(floats(GROUPS)), expected, atol=1e-6)


def test_group_normalised_advantages_with_a_small_epsilon_are_those_of_verl():
    expected = [[0.866024, -0.866024, -0.866024, 0.866024], [1.414212, -0.707106, -0.707106, 0.0]]
    actual = advantages.group_normalised(floats(GROUPS), eps=1e-6)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_leave_one_out_advantages_are_those_of_rloo():
    expected = [[0.666667, -0.666667, -0.666667, 0.666667], [1.333333, -0.666667, -0.666667, 0.0]]
    np.testing.assert_allclose(advantages.leave_one_out(floats(GROUPS)), expected, atol=1e-6)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    scores = RNG.normal(size=(3, 5))
    expected = [[row[k] - np.delete(row, k).mean() for k in range(5)] for row in scores]
    np.testing.assert_allclose(advantages.leave_one_out(floats(scores)), expected, rtol=1e-4)


def test_group_normalised_equals_torch():
    torch = pytest.importorskip("torch", reason="needs torch, an optional extra, as an oracle")
    scores = torch.tensor(RNG.normal(size=(3, 5)))
    expected = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    actual = advantages.group_normalised(floats(scores.tolist()))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_group_whose_scores_are_all_equal_gives_0():
    assert not np.asarray(advantages.group_normalised(jnp.full((2, 4), 3.0))).any()
    assert not np.asarray(advantages.leave_one_out(jnp.full((2, 4), 3.0))).any()


@pytest.mark.parametrize("baseline", [advantages.leave_one_out, advantages.group_normalised])
def test_a_group_of_one_is_refused(baseline):
    with pytest.raises(ValueError, match=r"K >= 2 samples of each prompt, got K=1"):
        baseline(jnp.ones((3, 1)))


@pytest.mark.parametrize("baseline", [advantages.leave_one_out, advantages.group_normalised])
def test_scores_that_are_not_grouped_by_prompt_are_refused_with_the_remedy(
    baseline, no_shape_checks
):
    with pytest.raises(ValueError, match=r"scores \(8,\) must be \[B, K\].*reshape\(-1, K\)"):
        baseline(jnp.ones(8))


def test_rewards_of_different_shapes_are_refused(no_shape_checks):
    table = jnp.ones((3, 4))
    for scores, kl in ((jnp.ones(1), table), (jnp.ones((3, 1)), table), (jnp.ones(3), table[:1])):
        with pytest.raises(
            ValueError, match=r"scores \(.*mask \(3, 4\)|kl \(1, 4\), mask \(3, 4\)"
        ):
            advantages.shaped_rewards(scores=scores, kl=kl, mask=table, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"rewards \(3, 4\), values \(3, 1\), mask \(3, 4\)"):
        advantages.gae(rewards=table, values=table[:, :1], mask=table, discount=1.0, gae_lambda=1.0)
