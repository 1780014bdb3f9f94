"""Agreement of scores with rankings, against counting by hand."""

import numpy as np
import pytest

from rlhf_jax.rewards.agreement import agreement, win_rate

RANKS = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 0]])
MASK = np.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 0]])
SCORES = np.array([[2.0, 1, 3], [0, 0, 9], [5, 4, 9]])
LENGTHS = np.array([[9, 1, 2], [3, 4, 99], [2, 7, 99]])


def test_pairs_that_differ_in_rank_are_counted_and_ties_of_scores_are_half():
    found = agreement(SCORES, RANKS, MASK, LENGTHS)
    # Pairs (better, worse): (2, 1) right, (2, 3) wrong; (0, 0) half; (5, 4) right.
    assert found["pairs"] == 4
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    # Longer: 9 > 1, 9 > 2, 4 > 3, and 2 < 7.
    assert found["longer_wins"] == pytest.approx(3 / 4)
    assert found["shorter_wins"] == pytest.approx(1 / 4)


def test_with_two_responses_a_prompt_the_interval_is_the_binomial_one():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 2)) + [0.5, 0]
    shape = np.ones((400, 2))
    found = agreement(scores, np.tile([0, 1], (400, 1)), shape, shape.astype(int))
    p = np.mean(scores[:, 0] > scores[:, 1])
    error = np.sqrt(p * (1 - p) / 400)
    assert found["accuracy_high"] == pytest.approx(p + 1.96 * error)
    assert found["accuracy_low"] == pytest.approx(p - 1.96 * error)


def test_repeating_each_pair_within_its_prompt_does_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    two = rng.normal(size=(300, 2))
    ranks = np.tile([0, 1], (300, 1))
    once = agreement(two, ranks, np.ones((300, 2)), np.ones((300, 2), int))
    twice = agreement(
        np.tile(two, (1, 2)), np.tile(ranks, (1, 2)), np.ones((300, 4)), np.ones((300, 4), int)
    )
    assert twice["pairs"] == 4 * once["pairs"]
    assert twice["accuracy_high"] == pytest.approx(once["accuracy_high"])


def test_correlation_with_length_is_numpys_of_what_differs_within_prompts():
    def differences(values):
        groups = [row[real > 0] for row, real in zip(values, MASK)]
        return np.concatenate([group - group.mean() for group in groups])

    wanted = np.corrcoef(differences(SCORES), differences(LENGTHS))[0, 1]
    assert agreement(SCORES, RANKS, MASK, LENGTHS)["length_correlation"] == pytest.approx(wanted)
    constant = agreement(np.zeros((3, 3)), RANKS, MASK, LENGTHS)
    assert constant["length_correlation"] == 0.0 and constant["accuracy"] == 0.5


def test_nothing_but_ties_is_refused():
    with pytest.raises(ValueError, match="no two responses"):
        agreement(SCORES, np.zeros((3, 3), int), MASK, LENGTHS)


def test_a_win_rate_compares_every_answer_with_every_other_and_counts_prompts():
    before, after = np.array([[1.0, 2], [0, 0]]), np.array([[2.0, 3], [0, 0]])
    found = win_rate(before, after)
    # Prompt 1: 2 > 1, 2 = 2, 3 > 1, 3 > 2; prompt 2: four ties.
    assert found["win_rate"] == pytest.approx((3.5 / 4 + 0.5) / 2)
    won = np.array([3.5 / 4, 0.5])
    assert found["win_rate_high"] == pytest.approx(won.mean() + 1.96 * won.std() / np.sqrt(2))
    assert win_rate(np.tile(before, (1, 3)), np.tile(after, (1, 3))) == pytest.approx(found)
