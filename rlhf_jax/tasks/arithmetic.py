"""A verifiable task: sums in words, of graded difficulty, whose answers a program checks.

A prompt tells of an amount and of one or two changes to it, and asks for what is left:

    level  changes  digits  a prompt, and its demonstration
      1       1       1     Tom has 3 apples and buys 4 more. How many apples?
                            3+4=7
      2       2       1     Ann owns 9 coins, sells 5 and finds 8 more. How many coins now?
                            9-5=4 4+8=12
      3       1       2     Eva starts with 57 pens and loses 18. How many pens?
                            57-18=39
      4       2       2     Ben has 46 books, gets 75 more and gives away 90. How many books?
                            46+75=121 121-90=31

`digits` are those of each number in the prompt. No more is ever taken away than there is, so every
answer is a whole number of at least 0. A prompt ends in a newline, which the response follows
directly. With `data.tokenizers.byte_tokenizer`, which splits numbers into digits, a prompt takes at
most 81 tokens and a demonstration at most 21, its EOS included.

One sum in five is held out, by a hash of its numbers and signs: it occurs in no training prompt of
any seed, in whatever words. (The working of a training prompt of two changes may hold a held-out
sum of one change, and 4+3 may be trained on where 3+4 is held out.)
"""

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.schema import Example

NAMES = "Ann Ben Eva Max Mia Sam Tom Zoe".split()
THINGS = "apple book coin egg pen shell stone toy".split()
OPENINGS = ("{name} has {amount}", "{name} owns {amount}", "{name} starts with {amount}")
GAINS = ("buys {number} more", "finds {number} more", "gets {number} more")
LOSSES = ("gives away {number}", "loses {number}", "sells {number}")
QUESTIONS = ("How many {things}?", "How many {things} now?")

HELD_OUT = 5  # one sum in so many is held out
# Prompts per level that every level has in both parts of the split. The fewest are held out at
# level 1: 26 of its 126 sums, each in 1,152 wordings.
MOST = 20_000


class Level(NamedTuple):
    """How hard a sum is."""

    changes: int  # to the first amount
    digits: int  # of every number in the prompt


LEVELS = {1: Level(1, 1), 2: Level(2, 1), 3: Level(1, 2), 4: Level(2, 2)}


class Problem(NamedTuple):
    """A sum in words."""

    prompt: str
    numbers: tuple[int, ...]  # the first amount and its changes; what is taken away is negative
    level: int

    @property
    def answer(self) -> int:
        """What is left."""
        return sum(self.numbers)


# ------------------------------------------------------------------------------ drawing problems


def expression(numbers: Sequence[int]) -> str:
    """The sum in digits and signs: (13, 24, -5) is "13+24-5"."""
    first, *changes = numbers
    return f"{first}" + "".join(f"{change:+d}" for change in changes)


def working(numbers: Sequence[int], slip: int = 0) -> str:
    """The sum, step by step, as demonstrations write it: "13+24=37 37-5=32".

    `slip` is added to the last result, which is then wrong: with 1, "13+24=37 37-5=33".
    """
    total, *changes = numbers
    steps = []
    for change in changes:
        steps.append(f"{total}{change:+d}={total + change}")
        total += change
    if slip:
        steps[-1] = f"{steps[-1].rpartition('=')[0]}={total + slip}"
    return " ".join(steps)


def is_held_out(numbers: Sequence[int]) -> bool:
    """Whether a sum is kept for evaluation: a function of its numbers and signs alone."""
    digest = hashlib.blake2b(expression(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def _below(rng: random.Random, size: int) -> int:
    # By random() alone, whose sequence Python promises to keep from version to version.
    return int(rng.random() * size)


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    return options[_below(rng, len(options))]


def _draw(rng: random.Random, level: Level) -> tuple[int, ...]:
    """The numbers of a sum: every change is a gain or a loss with even chances where it may be."""
    low, high = 10 ** (level.digits - 1), 10**level.digits - 1
    numbers = [low + _below(rng, high - low + 1)]
    for _ in range(level.changes):
        left = sum(numbers)
        if rng.random() < 0.5 and left >= low:
            numbers.append(-low - _below(rng, min(high, left) - low + 1))
        else:
            numbers.append(low + _below(rng, high - low + 1))
    return tuple(numbers)


def _in_words(rng: random.Random, numbers: Sequence[int]) -> str:
    """A story about the sum, its question and a newline."""
    first, *changes = numbers
    thing = _pick(rng, THINGS)
    amount = f"{first} {thing}" if first == 1 else f"{first} {thing}s"
    parts = [_pick(rng, OPENINGS).format(name=_pick(rng, NAMES), amount=amount)]
    for change in changes:
        template = _pick(rng, GAINS if change > 0 else LOSSES)
        parts.append(template.format(number=abs(change)))
    question = _pick(rng, QUESTIONS).format(things=f"{thing}s")
    return f"{', '.join(parts[:-1])} and {parts[-1]}. {question}\n"


def problems(
    stream: str, per_level: int, levels: Sequence[int] = tuple(LEVELS), held_out: bool = False
) -> list[Problem]:
    """Draws `per_level` different prompts of each level, the levels by turns.

    The same `stream`, which seeds the drawing, gives the same problems, and a larger `per_level`
    only adds some at the end. Raises ValueError for a level that there is not, the same one twice,
    or `per_level` out of 1..MOST.
    """
    if not levels or len(set(levels)) < len(levels) or not set(levels) <= LEVELS.keys():
        raise ValueError(f"levels={tuple(levels)}: name some of {tuple(LEVELS)}, each once")
    if not 1 <= per_level <= MOST:
        raise ValueError(f"per_level={per_level} is not in 1..{MOST}; choose a count within it")
    columns = []
    for level in levels:
        rng = random.Random(f"{stream}/{level}")
        found: dict[str, Problem] = {}
        while len(found) < per_level:
            numbers = _draw(rng, LEVELS[level])
            if is_held_out(numbers) == held_out:
                prompt = _in_words(rng, numbers)
                found.setdefault(prompt, Problem(prompt, numbers, level))
        columns.append(found.values())
    return [problem for row in zip(*columns) for problem in row]


def prompts(
    seed: int, per_level: int, levels: Sequence[int] = tuple(LEVELS), *, held_out: bool = False
) -> list[dict[str, Any]]:
    """Rows of `prompt`, `answer` and `level` for `data.batches.prompts`; see `problems`."""
    part = "held out" if held_out else "train"
    drawn = problems(f"{seed}/prompts/{part}", per_level, levels, held_out)
    return [{"prompt": x.prompt, "answer": x.answer, "level": x.level} for x in drawn]


def demonstrations(
    seed: int,
    per_level: int,
    levels: Sequence[int] = tuple(LEVELS),
    *,
    held_out: bool = False,
    wrong: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of `prompt` and `completion` (the working) for `data.batches.demonstrations`.

    They are drawn as `prompts` are, but from a stream of their own. The last result of a share
    `wrong` of them is off by 1 to 3. Raises ValueError as `problems` does, or for a share out of
    0..1.
    """
    if not 0.0 <= wrong <= 1.0:
        raise ValueError(f"wrong={wrong} is a share of the demonstrations, from 0 to 1")
    part = "held out" if held_out else "train"
    drawn = problems(f"{seed}/demonstrations/{part}", per_level, levels, held_out)
    rng = random.Random(f"{seed}/slips/{part}")

    def slip(problem: Problem) -> int:
        if rng.random() >= wrong:
            return 0
        size = 1 + _below(rng, 3)
        return size if rng.random() < 0.5 or size > problem.answer else -size

    return [{"prompt": x.prompt, "completion": working(x.numbers, slip(x))} for x in drawn]


# ---------------------------------------------------------------------------------- the checker

# At most nine digits: Python refuses to read numbers of thousands, which a policy may write.
_ANSWER = re.compile(r"(?:.*=)?\s*(0|[1-9][0-9]{0,8})\s*", re.DOTALL)


def answer(response: str) -> int | None:
    """The number that a response gives, or None.

    It is what follows the last "=", or the whole response where there is none. That must be a whole
    number in ASCII digits without sign or leading zeros; white space around it does not count. So
    "7", " 7\\n" and "3+4=7" give 7, and "07", "+7", "7.", "7 apples", "3+4=" and "" give None. What
    comes before the last "=" is not checked, and neither is whether the response ended with EOS.
    """
    found = _ANSWER.fullmatch(response)
    return int(found[1]) if found else None


def reward(prompts: list[str], responses: list[str], rows: list[Example]) -> list[float]:
    """1.0 for each response that gives the answer of its row (see `answer`), else 0.0.

    `rows` are the rows of `prompts`, as `data.batches.prompts` has read them.
    """
    del prompts
    return [float(answer(x) == row.extra["answer"]) for x, row in zip(responses, rows)]


def accuracy(responses: Sequence[str], rows: Sequence[Example]) -> dict[str, float]:
    """The share of right responses: "accuracy" of all, "accuracy_level_1" and so on of each level.

    `rows` are as in `reward`. Raises ValueError unless there is a row for each response.
    """
    if len(responses) != len(rows) or not responses:
        raise ValueError(
            f"{len(responses)} responses to {len(rows)} rows; give one response to each row"
        )
    rights: dict[str, list[bool]] = {"accuracy": []}
    for response, row in sorted(zip(responses, rows), key=lambda pair: pair[1].extra["level"]):
        right = answer(response) == row.extra["answer"]
        rights["accuracy"].append(right)
        rights.setdefault(f"accuracy_level_{row.extra['level']}", []).append(right)
    return {name: sum(found) / len(found) for name, found in rights.items()}
