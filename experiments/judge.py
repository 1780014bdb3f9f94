"""Which of two checkpoints answers better? A blind A/B page, and the win rate of its verdicts.

    python experiments/judge.py page before.jsonl after.jsonl --output judge.html
    python experiments/judge.py score judge.verdicts.jsonl --key judge.key.json

The two files answer the same prompts (rows of `prompt`, `responses`, and perhaps `group`); one
run's folder instead of both compares its samples before and after. To see whether past failures are
mended, answer one file of them with both checkpoints and judge that:

    python experiments/respond.py failures.jsonl --model before/ --output before.jsonl
    python experiments/respond.py failures.jsonl --model after/ --output after.jsonl

Claim: the judge cannot know which is which. Sides are drawn for each item; which side was whose is
not in the page but in the key file beside it, so send only the page. Equal answers are not shown
and count as ties, up to the last pair that was judged. The win rate is that of the second,
(wins + ties / 2) / judged, with Wilson's 95 % interval at that rate: where ties, half a win each,
are many, the interval is too wide rather than too narrow. Skipped items do not count.
"""

from __future__ import annotations

import json
import math
import pathlib
import secrets
import sys
from typing import Annotated, NamedTuple

import tyro

from rlhf_jax.data import builders
from rlhf_jax.launch import command
from rlhf_jax.training.metrics import write_atomically

sys.path.append(str(pathlib.Path(__file__).parent))
import pages

VERDICTS = ("left", "right", "tie")


def page(
    answers: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional],
    output: pathlib.Path,
    seed: int | None = None,
) -> None:
    """Writes the page and, beside it, the key: which side is whose.

    Args:
        answers: two files of answers to the same prompts, or the folder of one run
        output: the page, an .html file; the key's name follows from it
        seed: of the sides [default: drawn anew, so that nobody can redo them]
    """
    if len(answers) not in (1, 2):
        raise ValueError(
            f"{len(answers)} sources of answers; name two files, or the folder of one run"
        )
    first, second = pages.read(answers[0], ["before"]), pages.read(answers[-1], ["after"])
    pairs = paired(first, second, answers)
    sides, shown, equal = [], [], []
    seed = secrets.randbits(63) if seed is None else seed
    for prompt, texts, group in pairs:
        if texts[0] == texts[1]:
            equal.append({"before": len(shown), "group": group})
            continue
        order = pages.shuffled(seed, len(shown), 2)
        sides.append({"second": ("left", "right")[order.index(1)], "group": group})
        shown.append({"prompt": prompt, "responses": [texts[i] for i in order]})
    if not shown:
        raise ValueError(f"all {len(equal)} pairs of answers are equal; there is nothing to judge")
    key = output.with_suffix(".key.json")
    name = pages.write(output, "A / B", {"kind": "judge", "scale": None, "items": shown})
    record = {"page": name, "sides": sides, "equal": equal}
    write_atomically(key, json.dumps(record, indent=1) + "\n")
    print(f"{output}: {len(shown)} pairs; {len(equal)} equal ones count as ties; key: {key}")


def paired(first: list[pages.Answers], second: list[pages.Answers], names) -> list[pages.Answers]:
    """The n-th answer of each to every prompt, two by two, in the order of the first file."""
    others = {json.dumps(entry.prompt): entry for entry in second}
    missing = others.keys() ^ {json.dumps(entry.prompt) for entry in first}
    if missing:
        raise ValueError(
            f"{names[0]} and {names[-1]} do not answer the same prompts: {min(missing):.60} is in "
            "one of them only; sample both with the same file of prompts"
        )
    pairs = []
    for prompt, responses, group in first:
        against = others[json.dumps(prompt)].responses
        if len(responses) != len(against):
            raise ValueError(
                f"{prompt!r:.60} has {len(responses)} answers in {names[0]} and {len(against)} in "
                f"{names[-1]}; sample both as often"
            )
        pairs += [pages.Answers(prompt, list(two), group) for two in zip(responses, against)]
    return pairs


class Rate(NamedTuple):
    """How often the second was better, over the judged pairs, with its 95 % interval."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


def score(
    verdicts: Annotated[pathlib.Path, tyro.conf.Positional], key: pathlib.Path
) -> dict[str, Rate]:
    """Prints the win rate of the second checkpoint, of all prompts and by group.

    Args:
        verdicts: what the page's download button wrote
        key: the file that was written beside the page
    """
    page, sides, equal = read_key(key)
    outcomes: list[tuple[str, str]] = []
    seen: dict[int, str] = {}
    for row, where in builders.load(verdicts):
        if row.get("page") != page:
            raise ValueError(f"{where}: a verdict on another page than that of {key}")
        index, verdict = row.get("item"), row.get("verdict")
        if type(index) is not int or not 0 <= index < len(sides) or verdict not in VERDICTS:
            raise ValueError(f"{where}: 'item' must be one of the page's, 'verdict' of {VERDICTS}")
        if index in seen:
            raise ValueError(f"{where}: item {index} is judged at {seen[index]} already; keep one")
        seen[index] = where
        side = sides[index]
        won = "win" if verdict == side["second"] else "loss"
        outcomes.append(("tie" if verdict == "tie" else won, side["group"]))
    # Where judging broke off, the equal pairs beyond were not reached either.
    reached = [pair for pair in equal if pair["before"] <= max(seen) + 1]
    outcomes += [("tie", pair["group"]) for pair in reached]
    groups = sorted({group for _, group in outcomes})
    rates = {"all": rate([outcome for outcome, _ in outcomes])}
    if len(groups) > 1:
        rates |= {g or "(none)": rate([o for o, of in outcomes if of == g]) for g in groups}
    print(f"{len(seen)} of {len(sides)} pairs judged; {len(reached)} equal ones count as ties")
    for name, (wins, ties, losses, share, low, high) in rates.items():
        print(
            f"{name}: the second wins {share:.1%} [{low:.1%}, {high:.1%}] "
            f"({wins} won, {ties} tied, {losses} lost)"
        )
    return rates


def read_key(path: pathlib.Path) -> tuple[str, list[dict], list[dict]]:
    """(page, sides, equal pairs with the item that each comes before) of a key file."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        return key["page"], key["sides"], key["equal"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not a key file; name the one written beside the page") from None


def rate(outcomes: list[str]) -> Rate:
    """Rate of outcomes "win", "tie" and "loss", a tie as half a win. At least one outcome."""
    wins, ties, losses = (outcomes.count(name) for name in ("win", "tie", "loss"))
    share = (wins + ties / 2) / len(outcomes)
    return Rate(wins, ties, losses, share, *wilson(share, len(outcomes)))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` trials (Wilson 1927)."""
    z = 1.959963984540054
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (centre - spread) / (1 + z**2 / count), (centre + spread) / (1 + z**2 / count)


if __name__ == "__main__":
    command({"page": page, "score": score})
