"""Which of two checkpoints answers better? A blind A/B page, and the win rate of its verdicts.

    rlhf-jax-judge page before.jsonl after.jsonl --output judge.html
    rlhf-jax-judge score judge.verdicts.jsonl --key judge.key.json

The two files answer the same prompts: rows of `prompt`, `responses` and, if win rates are wanted by
group, `group`. The folder of a run in place of both files compares its samples before and after
training. To see whether past failures are fixed, answer one file of them with both checkpoints and
judge the two files of answers:

    rlhf-jax-respond failures.jsonl --model before/ --output before.jsonl
    rlhf-jax-respond failures.jsonl --model after/ --output after.jsonl

The person who judges cannot know which answer is whose. The sides are drawn for each item, and
which side belongs to which checkpoint is not written into the page but into a key file beside it,
so send only the page.

The win rate is that of the second checkpoint: (wins + ties / 2) / judged pairs, with Wilson's 95 %
interval. Two equal answers are not shown but count as a tie; if judging was broken off, only those
before the last judged pair count. Skipped items do not count. A tie is half a win, which varies
less than the coin toss that Wilson's interval assumes, so where ties are many the interval is too
wide rather than too narrow.
"""

from __future__ import annotations

import json
import pathlib
import secrets
from typing import Annotated, NamedTuple

import tyro

from rlhf_jax import storage
from rlhf_jax.data import builders
from rlhf_jax.launch import command
from rlhf_jax.rewards.agreement import wilson
from rlhf_jax.tools import pages

VERDICTS = ("left", "right", "tie")


class Key(NamedTuple):
    """The file beside the page, which says whose answers are on which side."""

    page: str  # the identity of the page that the key belongs to
    sides: list[dict]  # for each item: `second`, the side of the second checkpoint, and `group`
    equal: list[dict]  # for each hidden pair: `before`, the item that it precedes, and `group`


def page(
    answers: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional],
    output: pathlib.Path,
    seed: int | None = None,
) -> None:
    """Writes the page and, beside it, the key that says which side belongs to which checkpoint.

    Args:
        answers: two files of answers to the same prompts, or the folder of one run
        output: the page to write, an .html file; the name of the key follows from it
        seed: determines the sides [default: drawn at random, so that nobody can draw them again]
    """
    if len(answers) not in (1, 2):
        raise ValueError(
            f"{len(answers)} sources of answers are named; name two files, or the folder of one run"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"--seed {seed} must be at least 0")
    pages.check_output(output, *answers)
    key = output.with_suffix(".key.json")
    storage.check_output("--output, beside which the key is,", key, *answers)
    first, second = pages.read(answers[0], ["before"]), pages.read(answers[-1], ["after"])
    sides, items, equal = [], [], []
    seed = secrets.randbits(63) if seed is None else seed
    for prompt, responses, group in paired(first, second, answers):
        if responses[0] == responses[1]:
            equal.append({"before": len(items), "group": group})
            continue
        order = pages.shuffled(seed, len(items), 2)
        sides.append({"second": ("left", "right")[order.index(1)], "group": group})
        items.append({"prompt": prompt, "responses": [responses[i] for i in order]})
    if not items:
        raise ValueError(
            f"all {len(equal)} pairs of answers are equal, so there is nothing to judge; compare "
            "two checkpoints that answer differently"
        )
    name = pages.write(output, "A / B", {"kind": "judge", "scale": None, "items": items})
    storage.write(key, json.dumps(Key(name, sides, equal)._asdict(), indent=1) + "\n")
    print(
        f"{output}: {len(items)} pairs to judge, {len(equal)} equal pairs that count as ties; "
        f"the key is {key}"
    )


def paired(
    first: list[pages.Answers], second: list[pages.Answers], names: tuple[pathlib.Path, ...]
) -> list[pages.Answers]:
    """Pairs the n-th response of the first with the n-th response of the second to each prompt.

    Returns one entry per pair, with two responses each, in the order of the first file. Raises
    ValueError, with the `names` of the files, where the prompts or numbers of responses differ.
    """
    others = {json.dumps(entry.prompt): entry for entry in second}
    unmatched = others.keys() ^ {json.dumps(entry.prompt) for entry in first}
    if unmatched:
        raise ValueError(
            f"{names[0]} and {names[-1]} do not answer the same prompts: {min(unmatched):.60} is "
            "in only one of them; sample both with the same file of prompts"
        )
    pairs = []
    for prompt, responses, group in first:
        against = others[json.dumps(prompt)].responses
        if len(responses) != len(against):
            raise ValueError(
                f"{prompt!r:.60} has {len(responses)} answers in {names[0]} and {len(against)} in "
                f"{names[-1]}; sample the same number of answers for both"
            )
        pairs += [pages.Answers(prompt, list(pair), group) for pair in zip(responses, against)]
    return pairs


class Rate(NamedTuple):
    """How often the second checkpoint was better."""

    wins: int
    ties: int
    losses: int
    rate: float  # (wins + ties / 2) / (wins + ties + losses)
    low: float  # its 95 % interval
    high: float


def score(
    verdicts: Annotated[pathlib.Path, tyro.conf.Positional], key: pathlib.Path
) -> dict[str, Rate]:
    """Prints the win rate of the second checkpoint, over all prompts and by group.

    Args:
        verdicts: the file that the page's download button wrote
        key: the file that was written beside the page
    """
    opened = read_key(key)
    judged = read_verdicts(verdicts, key, opened)
    outcomes: list[tuple[str, str]] = []  # (win, tie or loss; group)
    for index, verdict in judged.items():
        side = opened.sides[index]
        won = "win" if verdict == side["second"] else "loss"
        outcomes.append(("tie" if verdict == "tie" else won, side["group"]))
    # Equal pairs after the last judged item were not reached by the person who judged.
    reached = [pair for pair in opened.equal if pair["before"] <= max(judged) + 1]
    outcomes += [("tie", pair["group"]) for pair in reached]
    groups = sorted({group for _, group in outcomes})
    rates = {"all": rate([outcome for outcome, _ in outcomes])}
    if len(groups) > 1:
        rates |= {g or "(none)": rate([o for o, group in outcomes if group == g]) for g in groups}
    print(
        f"{len(judged)} of {len(opened.sides)} pairs judged; "
        f"{len(reached)} equal pairs count as ties"
    )
    for name, (wins, ties, losses, share, low, high) in rates.items():
        print(
            f"{name}: the second wins {share:.1%} [{low:.1%}, {high:.1%}] "
            f"({wins} won, {ties} tied, {losses} lost)"
        )
    return rates


def read_verdicts(verdicts: pathlib.Path, name: pathlib.Path, key: Key) -> dict[int, str]:
    """The verdict on each judged item. `name` is the file of the key, for messages.

    Raises ValueError for a verdict on another page, on an item that the page does not have or that
    was judged already, and for one that is not in VERDICTS.
    """
    found: dict[int, str] = {}
    places: dict[int, str] = {}
    for row, where in builders.load(verdicts):
        if row.get("page") != key.page:
            raise ValueError(
                f"{where}: the verdict is on another page than the one that {name} belongs to; "
                "name the key that was written with the judged page"
            )
        index, verdict = row.get("item"), row.get("verdict")
        if type(index) is not int or not 0 <= index < len(key.sides) or verdict not in VERDICTS:
            raise ValueError(
                f"{where}: item {index!r} with verdict {verdict!r:.60}, but the page has items 0 "
                f"to {len(key.sides) - 1} and verdicts {', '.join(VERDICTS)}; use the file as the "
                "page wrote it"
            )
        if index in places:
            raise ValueError(
                f"{where}: item {index} is judged at {places[index]} already; keep one of the two"
            )
        places[index], found[index] = where, verdict
    return found


def read_key(path: pathlib.Path) -> Key:
    """Reads the key of a page. Raises ValueError for a file that is not a key."""
    try:
        read = storage.read_json(path)
        key = Key(**{name: read[name] for name in Key._fields})
        kinds = {(type(side["group"]), side["second"] in VERDICTS[:2]) for side in key.sides}
        kinds |= {(type(pair["group"]), type(pair["before"]) is int) for pair in key.equal}
        is_key = type(key.page) is str and kinds <= {(str, True)}
    except (ValueError, TypeError, KeyError):
        is_key = False
    if not is_key:
        raise ValueError(f"{path}: not a key file; name the one written beside the page")
    return key


def rate(outcomes: list[str]) -> Rate:
    """The win rate of at least one outcome, each "win", "tie" or "loss"; a tie is half a win."""
    wins, ties, losses = (outcomes.count(name) for name in ("win", "tie", "loss"))
    share = (wins + ties / 2) / len(outcomes)
    return Rate(wins, ties, losses, share, *wilson(share, len(outcomes)))


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-judge`; `argv` defaults to the process's arguments."""
    command({"page": page, "score": score}, argv, description=__doc__)


if __name__ == "__main__":
    main()
