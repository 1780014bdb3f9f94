"""Every loss against a formula written another way: worked values, brute force, torch."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages, losses

# Two responses of up to five tokens after a prompt of two: row 0 ends with EOS at its third token,
# row 1 fills all five. The numbers, and everything called "printed" below, are those of a float64
# transcription of TRL, OpenRLHF and verl.
PROMPT = 2
LOGPROBS = [(-1.0, -0.5, -0.2), (-0.7, -0.9, -0.3, -1.1, -0.4)]
REFERENCE = [(-1.2, -0.4, -0.3), (-0.6, -1.0, -0.5, -1.0, -0.9)]
VALUES = [(0.1, 0.2, 0.3, 0.4, 0.5), (0.0, -0.1, 0.2, 0.1, 0.3)]
SCORES = (1.0, -0.5)
CHANGE = [(0.3, -0.1, 0.05), (-0.4, 0.1, 0.0, 0.25, -0.05)]
MASK = [(1, 1, 1), (1, 1, 1, 1, 1)]


def aligned(rows, width=5):
    """Ragged rows of response tokens -> [B, T] aligned to tokens, 0 on the prompt and padding."""
    table = np.zeros((len(rows), PROMPT + width), np.float32)
    for line, row in zip(table, rows):
        line[PROMPT : PROMPT + len(row)] = row
    return jnp.asarray(table)


def printed(actual, expected):
    """Equal to six printed digits."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-6)


def floats(table):
    return jnp.asarray(table, jnp.float32)


def estimates(score_at):
    """(rewards, advantages, returns, mask of the policy, mask of the values) of the two rows."""
    mask = aligned(MASK)
    value_mask = advantages.extend_after_eos(mask) if score_at == "after_eos" else mask
    kl = losses.kl_k1(logprobs=aligned(LOGPROBS), ref_logprobs=aligned(REFERENCE))
    rewards = advantages.shaped_rewards(
        scores=jnp.asarray(SCORES), kl=kl, mask=mask, kl_coef=0.05, score_at=score_at
    )
    advantage, returns = advantages.gae(
        rewards=rewards,
        values=aligned(VALUES),
        mask=value_mask,
        discount=1.0,
        gae_lambda=0.95,
    )
    return rewards, advantage, returns, mask, value_mask


def test_rewards_advantages_and_returns_are_those_of_trl_1():
    rewards, advantage, returns, _, _ = estimates("after_eos")
    second = (-0.410231, -0.331822, -0.659812, -0.57875, -0.825)
    printed(
        rewards,
        aligned([(-0.01, 0.005, -0.005, 1.0, 0.0), (0.005, -0.005, -0.01, 0.005, -0.525)]),
    )
    printed(advantage, aligned([(0.789912, 0.73675, 0.665, 0.6, 0.0), second]))
    printed(
        returns,
        aligned(
            [
                (0.889912, 0.93675, 0.965, 1.0, 0.0),
                (-0.410231, -0.431822, -0.459812, -0.47875, -0.525),
            ]
        ),
    )


def test_advantages_with_the_score_on_the_last_token_are_those_of_trl_0_9_openrlhf_and_verl():
    rewards, advantage, _, _, _ = estimates("last")
    printed(rewards[0], aligned([(-0.01, 0.005, 0.995)])[0])
    printed(advantage[0], aligned([(0.816987, 0.76525, 0.695)])[0])
    printed(advantage[1], estimates("after_eos")[1][1])


def test_whitened_advantages_are_those_of_trl_1():
    _, advantage, _, mask, _ = estimates("after_eos")
    printed(
        losses.masked_whiten(advantage, mask, unbiased=True),
        aligned(
            [
                (1.263919, 1.186388, 1.081749, 0.0, 0.0),
                (-0.486352, -0.372002, -0.850338, -0.732118, -1.091245),
            ]
        ),
    )


def test_whitened_advantages_are_those_of_trl_0_9_and_verl_by_the_unbiased_variance():
    _, advantage, _, mask, _ = estimates("last")
    printed(
        losses.masked_whiten(advantage, mask, unbiased=True),
        aligned(
            [
                (1.261381, 1.187476, 1.087127),
                (-0.491653, -0.379649, -0.848171, -0.732376, -1.084135),
            ]
        ),
    )


def test_whitened_advantages_are_those_of_openrlhf_by_the_population_variance():
    _, advantage, _, mask, _ = estimates("last")
    printed(
        losses.masked_whiten(advantage, mask),
        aligned(
            [
                (1.348473, 1.269465, 1.162187),
                (-0.525599, -0.405862, -0.906733, -0.782943, -1.158989),
            ]
        ),
    )


def test_policy_and_value_losses_are_those_of_trl_1():
    _, advantage, returns, mask, value_mask = estimates("after_eos")
    old = aligned(LOGPROBS)
    old_values = aligned(VALUES) * value_mask
    policy = losses.masked_mean(
        losses.clipped_policy_loss(
            logprobs=old + aligned(CHANGE),
            old_logprobs=old,
            advantages=losses.masked_whiten(advantage, mask, unbiased=True),
            clip_eps=0.2,
        ),
        mask,
    )
    value = losses.masked_mean(
        losses.clipped_value_loss(
            values=old_values + 0.3, old_values=old_values, returns=returns, clip_eps=0.2
        ),
        value_mask,
    )
    printed(policy, -0.012347)
    printed(value, 0.270834)
    printed(policy + 0.1 * value, 0.014737)


def test_k3_is_that_of_trl():
    k3 = losses.kl_k3(logprobs=aligned(LOGPROBS), ref_logprobs=aligned(REFERENCE))
    printed(k3[0], aligned([(0.018731, 0.005171, 0.004837)])[0])


def test_reward_model_losses_are_those_of_trl():
    pair = {"chosen": jnp.array([1.5, 0.2, -0.3]), "rejected": jnp.array([0.5, 0.4, -1.0])}
    plain = jnp.mean(losses.rank_loss(**pair))
    printed(plain, 0.504862)
    printed(jnp.mean(losses.rank_loss(**pair, margin=jnp.array([0.0, 0.1, 0.2]))), 0.547231)
    printed(plain + 0.01 * jnp.mean(losses.centring_penalty(**pair)), 0.525029)


def test_the_clipped_losses_and_their_gradients_equal_torch():
    torch = pytest.importorskip("torch", reason="needs torch, an optional extra, as an oracle")
    rng = np.random.default_rng(0)
    x = {k: floats(rng.normal(size=(4, 6))) for k in ("new", "old", "gain", "target")}
    mask = floats(rng.random((4, 6)) < 0.7)

    def ours(new, high):
        policy = losses.clipped_policy_loss(
            logprobs=new,
            old_logprobs=x["old"],
            advantages=x["gain"],
            clip_eps=0.2,
            clip_eps_high=high,
        )
        value = losses.clipped_value_loss(
            values=new, old_values=x["old"], returns=x["target"], clip_eps=0.3
        )
        return losses.masked_mean(policy, mask) + 0.1 * losses.masked_mean(value, mask)

    for high in (None, 0.28):
        new, old, gain, target, on = (
            torch.tensor(v.tolist(), dtype=torch.float64) for v in (*x.values(), mask)
        )
        new.requires_grad_()
        ratio = (new - old).exp()
        bounded = ratio.clamp(0.8, 1.2 if high is None else 1.28)
        policy = torch.maximum(-gain * ratio, -gain * bounded)
        near = torch.minimum(torch.maximum(new, old - 0.3), old + 0.3)
        value = 0.5 * torch.maximum((new - target) ** 2, (near - target) ** 2)
        total = ((policy + 0.1 * value) * on).sum() / on.sum()
        total.backward()
        loss, grads = jax.value_and_grad(ours)(x["new"], high)
        np.testing.assert_allclose(loss, total.item(), rtol=1e-5)
        np.testing.assert_allclose(grads, new.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_whitening_and_the_rank_loss_equal_torch():
    torch = pytest.importorskip("torch", reason="needs torch, an optional extra, as an oracle")
    rng = np.random.default_rng(1)
    x, y = floats(rng.normal(size=(2, 3, 5)))
    mask = floats([[0, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
    active = torch.tensor(x[mask > 0].tolist(), dtype=torch.float64)
    for unbiased in (True, False):
        var, mean = torch.var_mean(active, unbiased=unbiased)
        expected = (active - mean) * torch.rsqrt(var + 1e-8)
        white = losses.masked_whiten(x, mask, unbiased=unbiased)
        np.testing.assert_allclose(white[mask > 0], expected, rtol=1e-5, atol=1e-6)
        kept = losses.masked_whiten(x, mask, shift_mean=False, unbiased=unbiased)
        np.testing.assert_allclose(kept[mask > 0], expected + mean, rtol=1e-5, atol=1e-6)
    a, b = torch.tensor(x[0].tolist()), torch.tensor(y[0].tolist())
    np.testing.assert_allclose(
        losses.rank_loss(chosen=x[0], rejected=y[0], margin=0.3),
        -torch.nn.functional.logsigmoid(a - b - 0.3),
        rtol=1e-5,
    )


def test_whitening_without_mean_shift_gives_the_vector_of_huang_et_al():
    rewards = jnp.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    white = losses.masked_whiten(rewards, jnp.ones((3, 3)), shift_mean=False)
    np.testing.assert_allclose(white, expected, rtol=0, atol=5e-5 + 1e-6)


def test_whitening_gives_mean_0_and_variance_1_over_the_mask_and_0_outside_it():
    rng = np.random.default_rng(2)
    x = jnp.asarray(3.0 + 2.0 * rng.normal(size=(5, 7)), jnp.float32)
    mask = rng.random((5, 7)) < 0.6
    white = np.asarray(losses.masked_whiten(x, jnp.asarray(mask, jnp.float32)))
    assert abs(white[mask].mean()) < 1e-6
    assert abs(white[mask].var() - 1.0) < 1e-5
    assert (white[~mask] == 0).all()
    again = losses.masked_whiten(x, jnp.asarray(mask, jnp.float32), unbiased=True)
    assert abs(np.asarray(again)[mask].var(ddof=1) - 1.0) < 1e-5


# --------------------------------------------------------------------------------- ranking losses


def brute_force_rank_loss(scores, ranks, present, margin):
    """Mean over the pairs of one prompt whose ranks differ, or 0."""
    pairs = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if present[i] and present[j] and ranks[i] < ranks[j]:
            pairs.append(math.log1p(math.exp(-(scores[i] - scores[j] - margin))))
    return sum(pairs) / len(pairs) if pairs else 0.0


def brute_force_plackett_luce(scores, ranks, present):
    """-log of the product, over responses that beat another, of exp(s) / (exp(s) + worse ones)."""
    product = 1.0
    for i in range(len(scores)):
        worse = [
            math.exp(scores[j])
            for j in range(len(scores))
            if present[i] and present[j] and ranks[j] > ranks[i]
        ]
        if worse:
            product *= math.exp(scores[i]) / (math.exp(scores[i]) + sum(worse))
    return -math.log(product)


SCORED = jnp.asarray(np.random.default_rng(3).normal(size=(5, 4)), jnp.float32)
RANKS = jnp.array([[0, 1, 2, 3], [3, 0, 0, 1], [1, 1, 1, 1], [2, 0, 1, 0], [0, 1, 0, 0]])
PRESENT = jnp.array(
    [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], jnp.float32
)


TABLES = [x.tolist() for x in (SCORED, RANKS, PRESENT)]


def test_kwise_rank_loss_is_the_mean_over_the_pairs_that_differ():
    margins = jnp.array([0.0, 0.5, 0.2, 1.0, 0.3])
    for margin in (0.0, jnp.broadcast_to(margins[:, None, None], (5, 4, 4)), margins):
        expected = [
            brute_force_rank_loss(*row)
            for row in zip(
                *TABLES, np.broadcast_to(0.0 if isinstance(margin, float) else margins, 5).tolist()
            )
        ]
        actual = losses.kwise_rank_loss(SCORED, RANKS, PRESENT, margin)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual[2] == 0.0 and actual[4] == 0.0  # all tied; one response


def test_plackett_luce_is_the_product_of_choices_among_the_worse():
    expected = [brute_force_plackett_luce(*row) for row in zip(*TABLES)]
    actual = losses.plackett_luce_loss(SCORED, RANKS, PRESENT)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual[2] == 0.0 and actual[4] == 0.0


def test_plackett_luce_sums_to_1_over_all_orders():
    scores = jnp.tile(jnp.array([[0.3, -1.0, 0.8, 0.1]]), (24, 1))
    orders = jnp.asarray(list(itertools.permutations(range(4))), jnp.int32)
    total = jnp.sum(jnp.exp(-losses.plackett_luce_loss(scores, orders, jnp.ones((24, 4)))))
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_with_two_responses_both_ranking_losses_are_bradley_terry():
    scores = SCORED[:, :2]
    ranks = jnp.tile(jnp.array([[1, 0]], jnp.int32), (5, 1))
    expected = losses.rank_loss(chosen=scores[:, 1], rejected=scores[:, 0])
    ones = jnp.ones((5, 2))
    np.testing.assert_allclose(losses.kwise_rank_loss(scores, ranks, ones), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce_loss(scores, ranks, ones), expected, rtol=1e-5)


def test_ranking_losses_do_not_depend_on_the_order_of_the_responses():
    order = np.array([2, 0, 3, 1])
    for loss in (losses.kwise_rank_loss, losses.plackett_luce_loss):
        np.testing.assert_allclose(
            loss(SCORED[:, order], RANKS[:, order], PRESENT[:, order]),
            loss(SCORED, RANKS, PRESENT),
            rtol=1e-5,
        )


def test_ranking_losses_stay_finite_for_scores_far_apart():
    scores = jnp.array([[-300.0, 300.0, 0.0]])
    ranks = jnp.array([[0, 1, 2]], jnp.int32)
    ones = jnp.ones((1, 3))
    # Pairs (best, second), (best, third), (second, third): 600, 300 and about 0.
    np.testing.assert_allclose(losses.kwise_rank_loss(scores, ranks, ones), [300.0], rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce_loss(scores, ranks, ones), [600.0], rtol=1e-6)


def test_score_regression_is_the_squared_error():
    actual = losses.score_regression_loss(
        scores=jnp.array([1.0, -2.0]), targets=jnp.array([3, 0.5])
    )
    np.testing.assert_allclose(actual, [4.0, 6.25])


def test_the_centring_penalty_of_every_pair_is_that_of_its_two_scores():
    every = losses.centring_penalty(chosen=SCORED[:, :, None], rejected=SCORED[:, None, :])
    for i, j in itertools.product(range(4), repeat=2):
        pair = losses.centring_penalty(chosen=SCORED[:, i], rejected=SCORED[:, j])
        np.testing.assert_allclose(every[:, i, j], pair, rtol=1e-6)


# ------------------------------------------------------------------------- shapes, types, extremes

ONE, COLUMN, TABLE = jnp.ones(4), jnp.ones((4, 1)), jnp.ones((4, 3))
COUNTED = jnp.ones((4, 3), jnp.int32)
WRONG = {
    "rank_loss": (
        lambda: losses.rank_loss(chosen=ONE, rejected=COLUMN),
        r"chosen \(4,\), rejected \(4, 1\)",
    ),
    "rank_loss, margin": (
        lambda: losses.rank_loss(chosen=ONE, rejected=ONE, margin=COLUMN),
        r"margin \(4, 1\)",
    ),
    "centring_penalty": (
        lambda: losses.centring_penalty(chosen=ONE, rejected=COLUMN),
        r"chosen \(4,\) and rejected \(4, 1\) must have the same number of axes",
    ),
    "ranked_pairs": (
        lambda: losses.ranked_pairs(COUNTED[:1], TABLE),
        r"ranks \(1, 3\), present \(4, 3\)",
    ),
    "kwise_rank_loss": (
        lambda: losses.kwise_rank_loss(TABLE[:, :1], COUNTED, TABLE),
        r"scores \(4, 1\), ranks \(4, 3\), present \(4, 3\)",
    ),
    "kwise_rank_loss, margin": (
        lambda: losses.kwise_rank_loss(TABLE, COUNTED, TABLE, COLUMN),
        r"margin \(4, 1\) must be a number, one per prompt \(4,\) or one per pair",
    ),
    "plackett_luce_loss": (
        lambda: losses.plackett_luce_loss(TABLE, COUNTED, TABLE[:1]),
        r"scores \(4, 3\), ranks \(4, 3\), present \(1, 3\)",
    ),
    "score_regression_loss": (
        lambda: losses.score_regression_loss(scores=COLUMN, targets=ONE),
        r"scores \(4, 1\), targets \(4,\)",
    ),
    "clipped_policy_loss": (
        lambda: losses.clipped_policy_loss(
            logprobs=TABLE, old_logprobs=TABLE, advantages=COLUMN, clip_eps=0.2
        ),
        r"logprobs \(4, 3\), old_logprobs \(4, 3\), advantages \(4, 1\)",
    ),
    "clipped_value_loss": (
        lambda: losses.clipped_value_loss(
            values=TABLE, old_values=TABLE, returns=COLUMN, clip_eps=0.2
        ),
        r"values \(4, 3\), old_values \(4, 3\), returns \(4, 1\)",
    ),
    "kl_k1": (lambda: losses.kl_k1(logprobs=TABLE, ref_logprobs=COLUMN), r"ref_logprobs \(4, 1\)"),
    "kl_k2": (lambda: losses.kl_k2(logprobs=TABLE, ref_logprobs=COLUMN), r"ref_logprobs \(4, 1\)"),
    "kl_k3": (lambda: losses.kl_k3(logprobs=TABLE, ref_logprobs=COLUMN), r"ref_logprobs \(4, 1\)"),
    "masked_mean": (lambda: losses.masked_mean(TABLE, COLUMN), r"x \(4, 3\), mask \(4, 1\)"),
    "masked_sum": (lambda: losses.masked_sum(TABLE, TABLE[0]), r"x \(4, 3\), mask \(3,\)"),
    "masked_whiten": (lambda: losses.masked_whiten(COLUMN, ONE), r"x \(4, 1\), mask \(4,\)"),
    "token_logprobs": (
        lambda: losses.token_logprobs(jnp.ones((4, 3, 5)), COUNTED[:1]),
        r"tokens \(1, 3\) and logits \(4, 3, 5\) differ",
    ),
    "chunked_token_logprobs": (
        lambda: losses.chunked_token_logprobs(
            jnp.ones((4, 3, 2)), jnp.ones((2, 5)), COUNTED[:, :1]
        ),
        r"tokens \(4, 1\) and hidden \(4, 3, 2\) differ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_different_shapes_are_refused_by_name_instead_of_broadcast(
    name, no_shape_checks
):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message):  # also when traced
        jax.eval_shape(call)


def halves(*shape, seed=0):
    """Numbers that bfloat16 holds exactly, so that only the arithmetic can differ."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


IN_BFLOAT16 = {
    "rank_loss": lambda x: losses.rank_loss(chosen=x[0, 0], rejected=x[1, 0], margin=x[2, 0]),
    "centring_penalty": lambda x: losses.centring_penalty(chosen=x[0], rejected=x[1]),
    "kwise_rank_loss": lambda x: losses.kwise_rank_loss(x[0], RANKS, jnp.ones_like(x[0])),
    "plackett_luce_loss": lambda x: losses.plackett_luce_loss(x[0], RANKS, jnp.ones_like(x[0])),
    "score_regression_loss": lambda x: losses.score_regression_loss(scores=x[0], targets=x[1]),
    "clipped_policy_loss": lambda x: losses.clipped_policy_loss(
        logprobs=x[0], old_logprobs=x[1], advantages=x[2], clip_eps=0.2
    ),
    "clipped_value_loss": lambda x: losses.clipped_value_loss(
        values=x[0], old_values=x[1], returns=x[2], clip_eps=0.2
    ),
    "kl_k1": lambda x: losses.kl_k1(logprobs=x[0], ref_logprobs=x[1]),
    "kl_k2": lambda x: losses.kl_k2(logprobs=x[0], ref_logprobs=x[1]),
    "kl_k3": lambda x: losses.kl_k3(logprobs=x[0], ref_logprobs=x[1]),
    "masked_whiten": lambda x: losses.masked_whiten(x[0], jnp.ones_like(x[0])),
}


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_losses_of_bfloat16_arrays_are_computed_in_float32(name):
    x = halves(3, 5, 4)
    actual, expected = IN_BFLOAT16[name](x), IN_BFLOAT16[name](x.astype(jnp.float32))
    assert actual.dtype == expected.dtype == jnp.float32
    np.testing.assert_array_equal(actual, expected)


def test_a_log_ratio_of_90_is_clamped_at_20():
    logprobs = jnp.array([[90.0, -90.0, 90.0, 19.5]])

    def loss(logprobs, advantage):
        return losses.clipped_policy_loss(
            logprobs=logprobs,
            old_logprobs=jnp.zeros((1, 4)),
            advantages=jnp.full((1, 4), advantage),
            clip_eps=0.2,
        )

    np.testing.assert_array_equal(loss(logprobs, 0.0), np.zeros((1, 4)))
    expected = [[math.exp(20), 0.8, math.exp(20), math.exp(19.5)]]
    np.testing.assert_allclose(loss(logprobs, -1.0), expected, rtol=1e-5)
    grad = jax.grad(lambda x: loss(x, -1.0).sum())(logprobs)
    np.testing.assert_allclose(grad, [[0.0, 0.0, 0.0, math.exp(19.5)]], rtol=1e-5)


# ------------------------------------------------------------------------------------- divergences


def test_k1_and_k3_have_the_kl_as_their_mean_and_the_gradient_of_k2_is_the_kl_gradient():
    logits, other = np.random.default_rng(4).normal(size=(2, 6)).astype(np.float32)
    log_q = jax.nn.log_softmax(other)

    def expectation(estimator, logits, weights):
        # One "token" per vocabulary entry, weighted by its probability.
        terms = estimator(logprobs=jax.nn.log_softmax(logits)[None], ref_logprobs=log_q[None])
        return jnp.sum(weights * terms[0])

    def exact(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    p = jax.nn.softmax(logits)
    for estimator in (losses.kl_k1, losses.kl_k3):
        np.testing.assert_allclose(expectation(estimator, logits, p), exact(logits), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: expectation(losses.kl_k2, x, p))(logits),
        jax.grad(exact)(logits),
        rtol=1e-4,
        atol=1e-6,
    )


def test_k3_is_never_negative_and_precise_near_0():
    gap = jnp.array([[1e-3, -1e-3, 1e-4, 0.0, 3.0, -3.0]])
    k3 = losses.kl_k3(logprobs=gap, ref_logprobs=jnp.zeros((1, 6)))
    expected = [math.expm1(-g) + g for g in np.asarray(gap, np.float64)[0]]
    assert (np.asarray(k3) >= 0).all()
    np.testing.assert_allclose(k3[0], expected, rtol=1e-3, atol=1e-10)


# ------------------------------------------------------------------------------- log-probabilities


def loop_logprobs(logits, tokens, temperature):
    """log p(token t | before), one position at a time, in float64."""
    out = np.zeros(tokens.shape)
    for b, t in np.ndindex(*tokens.shape):
        if t > 0:
            row = np.asarray(logits[b, t - 1], np.float64) / temperature
            out[b, t] = row[tokens[b, t]] - math.log(np.exp(row).sum())
    return out


def test_token_logprobs_are_about_the_token_at_their_own_position():
    rng = np.random.default_rng(5)
    logits = floats(rng.normal(size=(2, 5, 7)))
    tokens = jnp.asarray(rng.integers(0, 7, (2, 5)))
    for temperature in (1.0, 0.7):
        actual = losses.token_logprobs(logits, tokens, temperature)
        np.testing.assert_allclose(actual, loop_logprobs(logits, tokens, temperature), atol=2e-6)
        assert (np.asarray(actual)[:, 0] == 0).all()


def test_token_logprobs_equal_torch_cross_entropy():
    torch = pytest.importorskip("torch", reason="needs torch, an optional extra, as an oracle")
    rng = np.random.default_rng(6)
    logits = floats(rng.normal(size=(2, 5, 7)))
    tokens = jnp.asarray(rng.integers(0, 7, (2, 5)))
    expected = -torch.nn.functional.cross_entropy(
        torch.tensor(logits.tolist())[:, :-1].reshape(-1, 7) / 0.7,
        torch.tensor(tokens.tolist())[:, 1:].reshape(-1),
        reduction="none",
    ).reshape(2, 4)
    actual = losses.token_logprobs(logits, tokens, 0.7)
    np.testing.assert_allclose(actual[:, 1:], expected, rtol=1e-5, atol=1e-6)


def hidden_batch(batch, length, width, vocabulary):
    rng = np.random.default_rng(7)
    hidden = floats(rng.normal(size=(batch, length, width)))
    kernel = floats(2.0 * rng.normal(size=(width, vocabulary)))
    return hidden, kernel, jnp.asarray(rng.integers(0, vocabulary, (batch, length)))


def plain_logits(hidden, kernel, softcap):
    logits = hidden @ kernel
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def compiled_gradient(loss, arguments):
    """((loss, what else it gives), gradients by every argument)."""
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)


@pytest.mark.parametrize("chunk, softcap", [(1, None), (3, None), (3, 3.0), (7, None), (32, 3.0)])
def test_chunked_logprobs_their_gradients_and_the_entropy_equal_the_plain_ones(chunk, softcap):
    hidden, kernel, tokens = hidden_batch(2, 7, 5, 11)
    weights = jnp.asarray(np.random.default_rng(8).normal(size=(2, 7)), jnp.float32)

    def plain(hidden, kernel, temperature):
        logits = plain_logits(hidden, kernel, softcap)
        return losses.token_logprobs(logits, tokens, temperature)

    def chunked(hidden, kernel, temperature):
        chunk_bytes = 4 * 2 * 11 * chunk  # the logits of this many positions of both rows
        return losses.chunked_token_logprobs(
            hidden, kernel, tokens, temperature, softcap, chunk_bytes=chunk_bytes
        )

    arguments = (hidden, kernel, jnp.float32(0.7))

    def weighted(pair):
        # The weight of entry 0 counts for nothing: its output is 0 whatever the parameters are.
        return jnp.sum(weights * pair[0]), pair

    (_, (want, _)), want_grads = compiled_gradient(lambda *x: weighted((plain(*x), 0)), arguments)
    (_, (logprobs, entropy)), grads = compiled_gradient(lambda *x: weighted(chunked(*x)), arguments)
    np.testing.assert_allclose(logprobs, want, rtol=1e-5, atol=1e-5)
    p = np.asarray(jax.nn.softmax(plain_logits(hidden, kernel, softcap) / 0.7), np.float64)
    expected = -(p * np.log(p)).sum(-1)[:, :-1]
    np.testing.assert_allclose(entropy[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert (np.asarray(entropy)[:, 0] == 0).all() and (np.asarray(logprobs)[:, 0] == 0).all()
    for a, b in zip(grads, want_grads):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_entropy_carries_no_gradient():
    hidden, kernel, tokens = hidden_batch(2, 7, 5, 11)

    def entropy(hidden, kernel):
        return losses.chunked_token_logprobs(hidden, kernel, tokens, chunk_bytes=264)[1].sum()

    for grad in jax.jit(jax.grad(entropy, (0, 1)))(hidden, kernel):
        assert (np.asarray(grad) == 0).all()


def largest_array(compiled):
    """Elements of the largest array that the optimised program mentions, in any layout."""
    shapes = re.findall(r"\b(?:f32|bf16|f16|pred|s32)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def test_chunking_keeps_the_vocabulary_out_of_memory_forward_and_backward():
    batch, length, vocabulary = 2, 64, 4096
    hidden, kernel, tokens = hidden_batch(batch, length, 8, vocabulary)
    whole = batch * length * vocabulary

    def compiled(loss):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel).compile()
        return program.memory_analysis().temp_size_in_bytes, largest_array(program)

    plain_bytes, plain_array = compiled(lambda h, k: losses.token_logprobs(h @ k, tokens).sum())
    bytes_, array = compiled(
        lambda h, k: losses.chunked_token_logprobs(h, k, tokens, chunk_bytes=2**18)[0].sum()
    )
    assert array < whole and bytes_ < 4 * whole
    # The same measurement does see the array where there is one.
    assert plain_array >= whole and plain_bytes >= 4 * whole


def test_bfloat16_inputs_give_float32_logprobs():
    hidden, kernel, tokens = hidden_batch(2, 7, 5, 11)
    small = hidden.astype(jnp.bfloat16)
    logprobs, entropy = losses.chunked_token_logprobs(small, kernel, tokens, chunk_bytes=264)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    logits = (small @ kernel.astype(jnp.bfloat16)).astype(jnp.bfloat16)
    assert losses.token_logprobs(logits, tokens).dtype == jnp.float32
    # Probabilities of all tokens sum to 1 to float32 precision, which bfloat16 sums would not.
    every = jnp.stack(
        [losses.token_logprobs(logits, jnp.full((2, 7), v, jnp.int32)) for v in range(11)]
    )
    np.testing.assert_allclose(jnp.exp(every).sum(0)[:, 1:], 1.0, rtol=1e-5)


def test_align_moves_every_kind_of_output_one_token_to_the_right():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    moved = losses.align(x)
    assert moved.shape == x.shape
    for t in range(4):
        expected = np.zeros((2, 3)) if t == 0 else x[:, t - 1]
        np.testing.assert_array_equal(moved[:, t], expected)
    np.testing.assert_array_equal(losses.align(x[..., 0]), moved[..., 0])


# --------------------------------------------------------------------------------------- the masks


def test_masked_mean_is_the_mean_of_the_active_entries_and_0_of_none():
    x = floats(np.random.default_rng(9).normal(size=(3, 4)))
    mask = floats([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_allclose(losses.masked_mean(x, mask), x[mask > 0].mean(), rtol=1e-6)
    rows = [(x[0, 0] + x[0, 2] + x[0, 3]) / 3, 0.0, x[2, 1]]
    np.testing.assert_allclose(losses.masked_mean(x, mask, axis=1), rows, rtol=1e-6)
    assert losses.masked_mean(x, jnp.zeros_like(mask)) == 0.0
    grad = jax.grad(lambda x: losses.masked_mean(x, jnp.zeros_like(mask)))(x)
    assert (np.asarray(grad) == 0).all()


def test_masked_mean_of_bfloat16_is_summed_in_float32():
    x = jnp.ones((1, 1000), jnp.bfloat16)
    mean = losses.masked_mean(x, jnp.ones((1, 1000), jnp.bfloat16))
    assert mean.dtype == jnp.float32 and mean == 1.0


MASKED = {
    "masked_mean": lambda x, m: losses.masked_mean(x, m) ** 2,
    "masked_whiten": lambda x, m: jnp.sum(
        jnp.arange(12.0).reshape(3, 4) * losses.masked_whiten(x, m)
    ),
    "masked_whiten keeping the mean": lambda x, m: jnp.sum(
        jnp.arange(12.0).reshape(3, 4) * losses.masked_whiten(x, m, shift_mean=False, unbiased=True)
    ),
    "kwise_rank_loss": lambda x, m: losses.kwise_rank_loss(x, RANKS[:3], m).sum(),
    "kwise_rank_loss, its margin": lambda x, m: losses.kwise_rank_loss(
        SCORED[:3] + 0 * jnp.where(m > 0, x, 0.0), RANKS[:3], m, x[:, :, None] - x[:, None, :]
    ).sum(),
    "plackett_luce_loss": lambda x, m: losses.plackett_luce_loss(x, RANKS[:3], m).sum(),
    "clipped_policy_loss, logprobs": lambda x, m: policy_loss(m, logprobs=x),
    "clipped_policy_loss, old_logprobs": lambda x, m: policy_loss(m, old_logprobs=x),
    "clipped_policy_loss, advantages": lambda x, m: policy_loss(m, advantages=x),
    "clipped_value_loss": lambda x, m: losses.masked_mean(
        losses.clipped_value_loss(values=SCORED[:3], old_values=x, returns=2 * x, clip_eps=0.2), m
    ),
    "kl_k1": lambda x, m: losses.masked_mean(losses.kl_k1(logprobs=x, ref_logprobs=-x), m),
    "kl_k2": lambda x, m: losses.masked_mean(losses.kl_k2(logprobs=x, ref_logprobs=-x), m),
    "kl_k3": lambda x, m: losses.masked_mean(losses.kl_k3(logprobs=x, ref_logprobs=-x), m),
    "score_regression_loss": lambda x, m: losses.masked_mean(
        losses.score_regression_loss(scores=x, targets=SCORED[:3]), m
    ),
    "rank_loss": lambda x, m: losses.masked_mean(
        losses.rank_loss(chosen=x[:, 0], rejected=x[:, 1]), m[:, 0] * m[:, 1]
    ),
}


def policy_loss(mask, **changes):
    """Mean of the clipped policy loss over the mask, some of its arguments replaced."""
    arrays = {"logprobs": SCORED[:3], "old_logprobs": SCORED[1:4], "advantages": SCORED[2:5]}
    return losses.masked_mean(losses.clipped_policy_loss(**arrays | changes, clip_eps=0.2), mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", MASKED)
def test_what_stands_outside_the_mask_reaches_neither_the_value_nor_any_gradient(name, bad):
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, 0]], jnp.float32)
    clean = jnp.where(mask > 0, SCORED[:3], 0.0)
    dirty = jnp.where(mask > 0, clean, bad)
    gradient = jax.jit(jax.value_and_grad(MASKED[name]))
    value, grad = gradient(clean, mask)
    bad_value, bad_grad = gradient(dirty, mask)
    np.testing.assert_allclose(bad_value, value, rtol=1e-6)
    expected = jnp.where(mask > 0, grad, 0.0)
    np.testing.assert_allclose(bad_grad, expected, rtol=1e-5, atol=1e-7)


def test_nan_under_the_mask_of_old_logprobs_does_not_reach_the_policy_s_gradient():
    mask = jnp.asarray([[1, 1, 0, 1]], jnp.float32)
    old = jnp.where(mask > 0, SCORED[1:2], jnp.nan)
    grad = jax.grad(
        lambda x: losses.masked_mean(
            losses.clipped_policy_loss(
                logprobs=x, old_logprobs=old, advantages=SCORED[2:3], clip_eps=0.2
            ),
            mask,
        )
    )(SCORED[:1])
    assert np.isfinite(grad).all() and grad[0, 2] == 0.0


def test_nan_inside_the_mask_is_not_hidden():
    loss = losses.clipped_policy_loss(
        logprobs=jnp.array([[0.0, jnp.nan]]),
        old_logprobs=jnp.zeros((1, 2)),
        advantages=jnp.ones((1, 2)),
        clip_eps=0.2,
    )
    np.testing.assert_array_equal(loss, [[-1.0, np.nan]])
