"""How well scores agree with rankings, beside what length alone would say. Host arrays."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def agreement(
    scores: Float[np.ndarray, "N K"],
    ranks: Int[np.ndarray, "N K"],
    mask: Float[np.ndarray, "N K"],
    lengths: Int[np.ndarray, "N K"],
) -> dict[str, float | int]:
    """Accuracy over the pairs whose ranks differ (0 is best), with what length would have reached.

    accuracy: share of pairs whose better response scores higher, a tie counting half; low and high:
    its 95 % interval, 1.96 standard errors that allow for the pairs of one prompt being alike.
    longer_wins, shorter_wins: the accuracy of preferring the longer, or the shorter, response.
    length_correlation: Pearson's, of score and length, each less its mean over the responses to the
    prompt (0 if one is constant).
    Raises ValueError where no two ranks differ.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & (mask[:, :, None] * mask[:, None, :] > 0)
    if not better.any():
        raise ValueError("no two responses of a prompt differ in rank: there is nothing to measure")

    def share(values):
        gap = values[:, :, None] - values[:, None, :]
        return ((gap > 0) + 0.5 * (gap == 0)) * better

    pairs, right = better.sum(axis=(1, 2)), share(scores).sum(axis=(1, 2))
    accuracy = right.sum() / pairs.sum()
    error = np.sqrt(np.square(right - accuracy * pairs).sum()) / pairs.sum()
    longer = share(lengths).sum() / pairs.sum()

    def centred(values):
        mean = (values * mask).sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
        return (values - mean) * mask

    score, length = centred(scores), centred(lengths)
    spread = np.sqrt(np.square(score).sum() * np.square(length).sum())
    return {
        "accuracy": float(accuracy),
        "accuracy_low": float(accuracy - 1.96 * error),
        "accuracy_high": float(accuracy + 1.96 * error),
        "longer_wins": float(longer),
        "shorter_wins": float(1.0 - longer),
        "length_correlation": float((score * length).sum() / spread) if spread > 0 else 0.0,
        "pairs": int(pairs.sum()),
    }


def win_rate(before: Float[np.ndarray, "N S"], after: Float[np.ndarray, "N S"]) -> dict[str, float]:
    """How often an answer of `after` scores above one of `before` to the same prompt.

    N prompts, S answers each, every answer against every other, a tie counting half. low and high:
    the 95 % interval, 1.96 standard errors over prompts.
    """
    gap = after[:, :, None] - before[:, None, :]
    won = ((gap > 0) + 0.5 * (gap == 0)).mean(axis=(1, 2))
    error = won.std() / np.sqrt(len(won))
    rate = float(won.mean())
    return {
        "win_rate": rate,
        "win_rate_low": float(rate - 1.96 * error),
        "win_rate_high": float(rate + 1.96 * error),
    }
