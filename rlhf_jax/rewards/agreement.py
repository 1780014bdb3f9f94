"""How well scores agree with rankings, compared with length alone. Arrays on the host.

Every interval is Wilson's 95 % interval (1927), which stays within [0, 1], for the number of
independent trials that would give the same standard error. The standard error takes prompts as the
independent units, because the pairs of one prompt are correlated.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int


def agreement(
    scores: Float[np.ndarray, "N K"],
    ranks: Int[np.ndarray, "N K"],
    present: Float[np.ndarray, "N K"],
    lengths: Int[np.ndarray, "N K"],
) -> dict[str, float | int]:
    """Accuracy over pairs whose ranks differ (a lower rank is better), and that of length alone.

    Returns:
      accuracy: share of the pairs whose better response has the higher score; a tie counts half.
      accuracy_low, accuracy_high: its 95 % interval.
      longer_wins, shorter_wins: the accuracy of preferring the longer, or the shorter, response.
      length_correlation: Pearson's correlation of score and length, each minus its mean over the
        responses to a prompt; 0 if one of them is constant.
      pairs: how many pairs there are.

    Raises ValueError where no two ranks of a prompt differ.
    """
    both = present[:, :, None] * present[:, None, :] > 0
    better = (ranks[:, :, None] < ranks[:, None, :]) & both
    if not better.any():
        raise ValueError("no two responses of a prompt differ in rank: there is nothing to measure")

    def correct(values):
        gap = values[:, :, None] - values[:, None, :]
        return (((gap > 0) + 0.5 * (gap == 0)) * better).sum(axis=(1, 2))

    pairs = better.sum(axis=(1, 2))
    accuracy, low, high = interval(correct(scores), pairs)
    longer = correct(lengths).sum() / pairs.sum()

    def centred(values):
        mean = (values * present).sum(axis=1, keepdims=True) / present.sum(axis=1, keepdims=True)
        return (values - mean) * present

    score, length = centred(scores), centred(lengths)
    spread = np.sqrt(np.square(score).sum() * np.square(length).sum())
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "longer_wins": float(longer),
        "shorter_wins": float(1.0 - longer),
        "length_correlation": float((score * length).sum() / spread) if spread > 0 else 0.0,
        "pairs": int(pairs.sum()),
    }


def win_rate(before: Float[np.ndarray, "N S"], after: Float[np.ndarray, "N S"]) -> dict[str, float]:
    """How often an answer of `after` scores above one of `before` to the same prompt.

    N prompts, S answers each. Every answer after is compared with every one before; a tie counts
    half. win_rate_low and win_rate_high are the 95 % interval.
    """
    gap = after[:, :, None] - before[:, None, :]
    won = ((gap > 0) + 0.5 * (gap == 0)).mean(axis=(1, 2))
    rate, low, high = interval(won, np.ones_like(won))
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}


def interval(
    successes: Float[np.ndarray, " N"], trials: Int[np.ndarray, " N"] | Float[np.ndarray, " N"]
) -> tuple[float, float, float]:
    """(share, low, high): the share of successes in all trials, and its 95 % interval.

    Entry i is one independent unit, such as a prompt, with any number of correlated trials, at
    least one in all. The interval is Wilson's for n = p (1 - p) / e^2 trials, where p is the share
    and e the standard error of the ratio of sums, sqrt(sum (successes - p trials)^2) / sum trials.
    Where e is 0, n is the number of units.
    """
    total = trials.sum()
    share = float(successes.sum() / total)
    error = float(np.sqrt(np.square(successes - share * trials).sum()) / total)
    # Where all units agree, rounding can leave an error of 1e-17 instead of 0.
    count = share * (1 - share) / error**2 if error > 1e-9 else int((trials > 0).sum())
    return share, *wilson(share, count)


def wilson(share: float, count: float | int) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` independent trials (Wilson 1927)."""
    z = 1.959963984540054
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low = (centre - spread) / (1 + z**2 / count)
    high = (centre + spread) / (1 + z**2 / count)
    return max(low, 0.0), min(high, 1.0)
