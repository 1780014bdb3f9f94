"""Alarms: figures that say that something is wrong with a run, though it goes on.

Each is a function of the metrics that a stage has written so far, one dictionary per step. It
compares the mean over the last `WINDOW` steps with that over the first ones, so that neither noise
nor the size of a task decides. What makes numbers wrong, such as a ratio that is not 1 before the
first update, is no alarm: it stops the run (`on_policy.check`).

The thresholds were tried on the 97 stages of 36 runs of the quickstart's task, of the arithmetic
task and of four conventions of PPO (2026-11-26). One gave an alarm: minimum risk training with four
passes, which ended 126 nats from its reference with a gold score of 0, was named at the first step
that can be, 20 of 30.
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
    if len(lines) < 2 * WINDOW:
        return []
    found = [rule(lines) for rule in RULES]
    return [alarm for alarm in found if alarm is not None]


def of_accuracy(figures: Mapping[str, Any]) -> list[Alarm]:
    """The alarm of held-out figures of a reward model or judge that may as well be chance."""
    rate, low, high = (figures.get(f"eval_accuracy{end}") for end in ("", "_low", "_high"))
    if low is None or low > 0.5:
        return []
    than = "is no better than" if high >= 0.5 else "is worse than"
    return [
        Alarm(
            "chance",
            f"its held-out accuracy of {rate:.1%} (95 % interval {low:.1%} to {high:.1%}) {than} "
            "chance: no reward, win rate or choice that rests on it means anything",
        )
    ]


# --------------------------------------------------------------------------------------- the rules


def negative_kl(lines: Lines) -> Alarm | None:
    """A mean KL below 0 by more than the noise of its estimate: some log-probability is wrong."""
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
    """More than 1 nat per token: the policy writes what the reference would never write."""
    kl, length = (_mean(lines[-WINDOW:], f"objective/{name}") for name in ("kl", "length"))
    if kl is None or not length or kl / length <= 1.0:
        return None
    return Alarm(
        "far from the reference",
        f"the KL to the reference is {kl:.3g} nats per response, {kl / length:.2g} per token: "
        "nothing holds the policy near what it was; raise kl_coef, or make fewer updates",
    )


def constant_scores(lines: Lines) -> Alarm | None:
    """All responses have had the same score in every one of the last steps."""
    values = _values(lines[-WINDOW:], "objective/scores_std")
    if len(values) < WINDOW or max(values) > 0.0:
        return None
    return Alarm(
        "constant reward",
        f"the standard deviation of the reward has been 0 for {WINDOW} iterations: nothing can be "
        "learned from it",
    )


def shorter_responses(lines: Lines) -> Alarm | None:
    """The responses are a quarter as long as they were."""
    return _fallen(
        lines,
        "objective/length",
        0.25,
        "length collapsed",
        "responses had {before:.3g} tokens and now have {now:.3g}: look at what is written",
    )


def fewer_ends(lines: Lines) -> Alarm | None:
    """Less than a quarter as many responses end by themselves, of at least one in five."""
    before = _mean(lines[:WINDOW], "objective/eos_share")
    if before is None or before < 0.2:
        return None
    return _fallen(
        lines,
        "objective/eos_share",
        0.25,
        "EOS vanished",
        "{before:.0%} of the responses ended with EOS and now {now:.0%} do: the rest is cut off",
    )


def repetitive(lines: Lines) -> Alarm | None:
    """A third as many distinct pairs of tokens as there were."""
    return _fallen(
        lines,
        "objective/distinct_bigrams",
        1 / 3,
        "responses alike",
        "distinct pairs of neighbouring tokens were {before:.1%} of all and now are {now:.1%}: "
        "responses repeat themselves or each other",
    )


def certain(lines: Lines) -> Alarm | None:
    """A twentieth of the entropy is left."""
    return _fallen(
        lines,
        "objective/token_entropy",
        0.05,
        "entropy gone",
        "the entropy was {before:.3g} nats per token and is {now:.3g}: nothing is explored any "
        "more",
    )


def large_ratio(lines: Lines) -> Alarm | None:
    """The mean ratio of new to old probability is far from 1 over all updates of an iteration."""
    now = _mean(lines[-WINDOW:], "val/ratio")
    if now is None or 0.5 <= now <= 2.0:
        return None
    return Alarm(
        "ratio far from 1",
        f"the mean ratio of new to old probability is {now:.3g} over the updates of an iteration; "
        "lower the learning rate or make fewer updates of the same responses",
    )


def overfitted(lines: Lines) -> Alarm | None:
    """The held-out loss is a tenth above its lowest while the loss in training went on falling."""
    evaluated = [i for i, line in enumerate(lines) if _is_number(line.get("eval/loss"))]
    if len(evaluated) < 3 or evaluated[-1] != len(lines) - 1:
        return None
    best = min(evaluated, key=lambda i: lines[i]["eval/loss"])
    lowest, now = (lines[i]["eval/loss"] for i in (best, evaluated[-1]))
    at_best, trained = (
        _mean(lines[max(0, i + 1 - WINDOW) : i + 1], "loss") for i in (best, evaluated[-1])
    )
    if at_best is None or trained is None or not (now > 1.1 * lowest > 0 and trained < at_best):
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
    before, now = _mean(lines[:WINDOW], metric), _mean(lines[-WINDOW:], metric)
    if before is None or now is None or before <= 0.0 or now >= share * before:
        return None
    return Alarm(name, text.format(before=before, now=now))


def _values(lines: Lines, metric: str) -> list[float]:
    return [line[metric] for line in lines if _is_number(line.get(metric))]


def _mean(lines: Lines, metric: str) -> float | None:
    values = _values(lines, metric)
    return sum(values) / len(values) if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
