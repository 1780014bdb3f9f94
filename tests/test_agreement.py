"""Agreement of scores with rankings, against counting by hand."""

import numpy as np
import pytest

from rlhf_jax.rewards.agreement import agreement, win_rate

RANKS = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 0]])
PRESENT = np.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 0]])
SCORES = np.array([[2.0, 1, 3], [0, 0, 9], [5, 4, 9]])
LENGTHS = np.array([[9, 1, 2], [3, 4, 99], [2, 7, 99]])


def test_pairs_that_differ_in_rank_are_counted_and_ties_of_scores_are_half():
    found = agreement(SCORES, RANKS, PRESENT, LENGTHS)
    # Pairs (better, worse): (2, 1) right, (2, 3) wrong; (0, 0) half; (5, 4) right.
    assert found["pairs"] == 4
    assert found["accuracy"] == pytest.approx(2.5 / 4)
    # Longer: 9 > 1, 9 > 2, 4 > 3, and 2 < 7.
    assert found["longer_wins"] == pytest.approx(3 / 4)
    assert found["shorter_wins"] == pytest.approx(1 / 4)


def score_test(share: float, end: float, count: float) -> float:
    """How many standard errors the share lies from `end`, if `end` is the true one."""
    return (share - end) / np.sqrt(end * (1 - end) / count)


def test_with_two_responses_a_prompt_the_interval_is_wilsons():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 2)) + [0.5, 0]
    shape = np.ones((400, 2))
    found = agreement(scores, np.tile([0, 1], (400, 1)), shape, shape.astype(int))
    p = np.mean(scores[:, 0] > scores[:, 1])
    assert score_test(p, found["accuracy_low"], 400) == pytest.approx(1.959964, abs=1e-5)
    assert score_test(p, found["accuracy_high"], 400) == pytest.approx(-1.959964, abs=1e-5)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_an_interval_stays_within_zero_and_one_and_says_something_where_all_prompts_agree(side):
    scores = np.tile([side, 0.0], (5, 1))
    ranks = np.tile([0, 1], (5, 1))
    found = agreement(scores, ranks, np.ones((5, 2)), np.ones((5, 2), int))
    low, high = found["accuracy_low"], found["accuracy_high"]
    assert 0 <= low <= found["accuracy"] <= high <= 1
    # Five of five: 5 / (5 + z^2), as the formula is where the share is 1.
    assert high - low == pytest.approx(1 - 5 / (5 + 1.959964**2), abs=1e-6)
    rare = win_rate(np.ones((9, 1)), np.array([[2.0], *[[0.0]] * 8]))
    assert 0 < rare["win_rate_low"] < 1 / 9 < rare["win_rate_high"] < 1


def test_the_interval_holds_the_true_accuracy_as_often_as_it_says_whatever_the_pairs_of_a_prompt():
    """4 responses a prompt, of which one is mistaken for better or worse than all others."""
    rng = np.random.default_rng(2)
    shape, held = (60, 4), 0
    for _ in range(400):
        quality = rng.normal(size=shape) * 0.5 + rng.normal(size=(60, 1)) * np.arange(4)
        found = agreement(
            quality, np.tile(np.arange(4), (60, 1)), np.ones(shape), np.ones(shape, int)
        )
        held += found["accuracy_low"] <= 0.5 <= found["accuracy_high"]
    assert 0.91 < held / 400 < 0.985  # 95 %, give or take three standard errors


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
        groups = [row[real > 0] for row, real in zip(values, PRESENT)]
        return np.concatenate([group - group.mean() for group in groups])

    wanted = np.corrcoef(differences(SCORES), differences(LENGTHS))[0, 1]
    assert agreement(SCORES, RANKS, PRESENT, LENGTHS)["length_correlation"] == pytest.approx(wanted)
    constant = agreement(np.zeros((3, 3)), RANKS, PRESENT, LENGTHS)
    assert constant["length_correlation"] == 0.0 and constant["accuracy"] == 0.5


def test_nothing_but_ties_is_refused():
    with pytest.raises(ValueError, match="no two responses"):
        agreement(SCORES, np.zeros((3, 3), int), PRESENT, LENGTHS)


def test_a_win_rate_compares_every_answer_with_every_other_and_counts_prompts():
    before, after = np.array([[1.0, 2], [0, 0]]), np.array([[2.0, 3], [0, 0]])
    found = win_rate(before, after)
    # Prompt 1: 2 > 1, 2 = 2, 3 > 1, 3 > 2; prompt 2: four ties.
    assert found["win_rate"] == pytest.approx((3.5 / 4 + 0.5) / 2)
    # The prompts' shares are 3.5 / 4 and 0.5: the standard error of their mean is half their
    # distance over sqrt(2), and that many trials would have the same one.
    p, error = 5.5 / 8, (3 / 8) / 2 / np.sqrt(2)
    trials = p * (1 - p) / error**2
    assert score_test(p, found["win_rate_low"], trials) == pytest.approx(1.959964, abs=1e-5)
    assert win_rate(np.tile(before, (1, 3)), np.tile(after, (1, 3))) == pytest.approx(found)
