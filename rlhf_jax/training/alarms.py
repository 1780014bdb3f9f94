"""Alarms: figures that say that something is wrong with a run, though it goes on.

Each is a function of the metrics that a stage has written so far, one dictionary per step. It
reads means over the last `WINDOW` steps, and compares them with those over the first ones, so that
neither noise nor the size of a task decides. The first alarm can be given after `WINDOW` steps.
What makes numbers wrong, such as a ratio that is not 1 before the first update, is no alarm: it
stops the run (`on_policy.check`).

Each rule says how close the good runs came to its threshold. These are 60 online stages of the
quickstart's task, of the arithmetic task, of four conventions of PPO and of a user's files
(2026-11-27), none of which gives an alarm. `docs/robustness.md` says which runs gave one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = 10  # steps


class Alarm(NamedTuple):
    """What is wrong, in a name that is given once per stage and a sentence."""

    name: str
    text: str


Lines = Sequence[Mapping[str, Any]]


def of_training(lines: Lines) -> list[Alarm]:
    """The alarms that the steps of a stage so far give; the last line is the newest step."""
    if len(lines) < WINDOW:
        return []
    found = [rule(lines) for rule in RULES]
    return [alarm for alarm in found if alarm is not None]


CHANCE = "chance"  # the name of the only alarm of `of_accuracy`


def of_accuracy(figures: Mapping[str, Any]) -> list[Alarm]:
    """The alarm of held-out figures of a reward model or judge that may as well be chance."""
    rate, low, high = (figures.get(f"eval_accuracy{end}") for end in ("", "_low", "_high"))
    if low is None or low > 0.5:
        return []
    than = "cannot be told from" if high >= 0.5 else "is worse than"
    return [
        Alarm(
            CHANCE,
            f"its held-out accuracy of {rate:.1%} (95 % interval {low:.1%} to {high:.1%}) {than} "
            "chance: a reward, win rate or choice that rests on it shows nothing",
        )
    ]


# --------------------------------------------------------------------------------------- the rules


def negative_kl(lines: Lines) -> Alarm | None:
    """A mean KL below 0 by 0.1 nats and by three standard errors: some log-probability is wrong.

    The estimate is a mean of log ratios, which noise alone takes below 0 where the KL is small. The
    lowest mean of the good runs was 0.001 nats.
    """
    values = _values(lines[-WINDOW:], "objective/kl")
    if len(values) < WINDOW:
        return None
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    if mean >= -max(0.1, 3.0 * spread / math.sqrt(len(values))):
        return None
    return Alarm(
        "negative KL",
        f"the KL to the reference is {mean:.3g} nats per response, below 0: policy and reference "
        "are not scored alike (temperature, mask, template)",
    )


def far_from_reference(lines: Lines) -> Alarm | None:
    """More than 1 nat per token and 20 in all: the reference would never write what is written.

    A short answer may be far away by the token: where the reference answers rightly in one of ten
    cases, answering rightly always is 2.3 nats. But 20 nats are those of the best of e^21 = 10^9
    answers. The good runs came to 0.89 nats per token, which were 10 in all.
    """
    kl, length = (_mean(lines[-WINDOW:], f"objective/{name}") for name in ("kl", "length"))
    if kl is None or not length or kl <= max(length, 20.0):
        return None
    return Alarm(
        "far from the reference",
        f"the KL to the reference is {kl:.3g} nats per response, {kl / length:.2g} per token: "
        "nothing holds the policy near what it was; raise kl_coef, or make fewer updates",
    )


def constant_scores(lines: Lines) -> Alarm | None:
    """All responses have had the same score in every one of the last steps.

    In float32 the standard deviation of equal numbers is up to 7e-7 of their size (measured for up
    to 16,384 of them). The lowest of the good runs was 0.1.
    """
    values = _values(lines[-WINDOW:], "objective/scores_std")
    score = _mean(lines[-WINDOW:], "objective/scores") or 0.0
    if len(values) < WINDOW or max(values) > 1e-5 * abs(score):
        return None
    return Alarm(
        "constant reward",
        f"the standard deviation of the reward has been 0 for {WINDOW} iterations, its mean is "
        f"{score:.3g}: nothing more can be learned from it",
    )


def shorter_responses(lines: Lines) -> Alarm | None:
    """The responses are a quarter as long as they were.

    A reward may ask for shorter ones: those of harmless answers went from 33 tokens to 14, and
    those of the other good runs stayed above 0.9 of their length.
    """
    return _fallen(
        lines,
        "objective/length",
        0.25,
        "length collapsed",
        "responses had {before:.3g} tokens and now have {now:.3g}: look at what is written",
    )


def fewer_ends(lines: Lines) -> Alarm | None:
    """Less than half as many responses end by themselves, of at least one in five.

    A policy that has not learned to end gives no alarm. In the good runs the share stayed above
    0.96 of what it was.
    """
    before = _mean(_ends(lines)[0], "objective/eos_share")
    if before is None or before < 0.2:
        return None
    return _fallen(
        lines,
        "objective/eos_share",
        0.5,
        "EOS vanished",
        "{before:.0%} of the responses ended with EOS and now {now:.0%} do: the rest is cut off",
    )


def repetitive(lines: Lines) -> Alarm | None:
    """A third of the share of distinct pairs of tokens, and not only because there are more tokens.

    The more tokens a text has, the more of its pairs it repeats, so their number must have fallen
    as well. The quickstart's share goes from 0.145 to 0.125.
    """
    first, last = _ends(lines)
    pairs = [
        (_mean(part, "objective/distinct_bigrams") or 0.0)
        * (_mean(part, "objective/length") or 1.0)
        for part in (first, last)
    ]
    if pairs[1] >= pairs[0]:
        return None
    return _fallen(
        lines,
        "objective/distinct_bigrams",
        1 / 3,
        "responses alike",
        "distinct pairs of neighbouring tokens were {before:.1%} of all and now are {now:.1%}: "
        "responses repeat themselves or each other",
    )


def certain(lines: Lines) -> Alarm | None:
    """A twentieth of the entropy is left. In the good runs a fifth or more was."""
    return _fallen(
        lines,
        "objective/token_entropy",
        0.05,
        "entropy gone",
        "the entropy was {before:.3g} nats per token and is {now:.3g}: nothing is explored any "
        "more",
    )


def large_ratio(lines: Lines) -> Alarm | None:
    """The mean ratio of new to old probability is far from 1 over all updates of an iteration.

    Under the policy that sampled its expectation is 1. The good runs stayed in 0.997 to 1.009.
    """
    now = _mean(lines[-WINDOW:], "val/ratio")
    if now is None or 0.5 <= now <= 2.0:
        return None
    return Alarm(
        "ratio far from 1",
        f"the mean ratio of new to old probability is {now:.3g} over the updates of an iteration; "
        "lower the learning rate or make fewer updates of the same responses",
    )


def overfitted(lines: Lines) -> Alarm | None:
    """The held-out loss is a tenth above its lowest while the loss in training went on falling.

    A rise below 0.01 does not count, because a loss near 0 may double by rounding. In the
    quickstart the held-out losses never were 0.01 above their lowest.
    """
    if not _is_number(lines[-1].get("eval/loss")):
        return None
    evaluated = [i for i, line in enumerate(lines) if _is_number(line.get("eval/loss"))]
    if len(evaluated) < 3:
        return None
    best = min(evaluated, key=lambda i: lines[i]["eval/loss"])
    lowest, now = (lines[i]["eval/loss"] for i in (best, evaluated[-1]))
    at_best, trained = (
        _mean(lines[max(0, i + 1 - WINDOW) : i + 1], "loss") for i in (best, evaluated[-1])
    )
    rise = now - lowest
    if at_best is None or trained is None or trained >= at_best:
        return None
    if rise <= max(0.1 * abs(lowest), 0.01):
        return None
    return Alarm(
        "overfitted",
        f"the held-out loss has risen from {lowest:.4g} to {now:.4g} while the loss in training "
        f"fell from {at_best:.4g} to {trained:.4g}: train for fewer steps, or on more data",
    )


def skipped(lines: Lines) -> Alarm | None:
    """A tenth of the last updates were not finite and were left out."""
    now = _mean(lines[-WINDOW:], "skipped_updates")
    if not now or now < 0.1:
        return None
    text = (
        f"{now:.0%} of the last updates were not finite and were left out; lower the learning rate"
    )
    return Alarm("updates skipped", text)


RULES: tuple[Callable[[Lines], Alarm | None], ...] = (
    negative_kl,
    far_from_reference,
    constant_scores,
    shorter_responses,
    fewer_ends,
    repetitive,
    certain,
    large_ratio,
    overfitted,
    skipped,
)


def _fallen(lines: Lines, metric: str, share: float, name: str, text: str) -> Alarm | None:
    """An alarm if the mean of a metric is below this share of what it was in the first steps."""
    before, now = (_mean(part, metric) for part in _ends(lines))
    if before is None or now is None or before <= 0.0 or now >= share * before:
        return None
    return Alarm(name, text.format(before=before, now=now))


def _ends(lines: Lines) -> tuple[Lines, Lines]:
    """The first steps and the last ones, which are `WINDOW` each as soon as there are enough."""
    count = min(WINDOW, len(lines) // 2)
    return lines[:count], lines[-count:]


def _values(lines: Lines, metric: str) -> list[float]:
    return [line[metric] for line in lines if _is_number(line.get(metric))]


def _mean(lines: Lines, metric: str) -> float | None:
    values = _values(lines, metric)
    return sum(values) / len(values) if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
