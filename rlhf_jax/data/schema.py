"""The one schema that every format is read into, and the checks that all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

# What other tools call the roles.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_ORDER = "user and assistant take turns, after one system turn at most"


class BadRow(ValueError):
    """A row that cannot be used: the dataset's fault, not the program's."""


class Message(NamedTuple):
    """One turn. role: system, user, assistant or tool."""

    role: str
    content: str


class Example(NamedTuple):
    """What every row is read into.

    prompt: messages for a chat template, or text that is fed as it stands ("" for plain text).
    responses: K answers; none in a file of prompts, several equally good ones for references.
    ranks: 0 is best, equal ranks are ties, () where nothing is ranked. scores: higher is better, ()
    where nothing is scored. margin: what the better of a pair shall lead by. language: as the row
    names it, else "".
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    margin: float = 0.0
    language: str = ""

    @property
    def completion(self) -> str:
        """The response to imitate: the first of those that none is ranked above."""
        return self.responses[self.ranks.index(min(self.ranks)) if self.ranks else 0]


def user_turn(prompt: str) -> tuple[Message, ...]:
    """A plain prompt as a conversation of one turn, for chat templates."""
    return (Message("user", prompt.strip()),)


def fail(where: str, found: str, remedy: str) -> NoReturn:
    """Raises BadRow: where, what was found, and what to do about it."""
    raise BadRow(f"{where}: {found}; {remedy}")


def shown(value: Any) -> str:
    """A value short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def field(row: Mapping[str, Any], name: str, where: str, remedy: str) -> Any:
    """The value of a field that must be there."""
    if name not in row:
        fail(where, f"{name!r} is missing", remedy)
    return row[name]


def text(row: Mapping[str, Any], name: str, where: str, remedy: str) -> str:
    """A field that must hold text."""
    return check_text(field(row, name, where, remedy), name, where, remedy)


def check_text(value: Any, name: str, where: str, remedy: str) -> str:
    """`value`, which must be a string with something in it."""
    if not isinstance(value, str):
        fail(where, f"{name!r} must be a string, got {shown(value)}", remedy)
    if not value.strip():
        fail(where, f"{name!r} is empty", f"fill it in or remove the row; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        fail(where, f"{name!r} holds half a surrogate pair", "write the text as valid UTF-8")
    return value


def items(row: Mapping[str, Any], name: str, where: str, remedy: str) -> list:
    """A field that must hold a list."""
    value = field(row, name, where, remedy)
    if not isinstance(value, list | tuple):
        fail(where, f"{name!r} must be a list, got {shown(value)}", remedy)
    return list(value)


def number(value: Any, name: str, where: str, remedy: str) -> float:
    """`value`, which must be a finite number; true and false are none."""
    if type(value) not in (int, float) or not math.isfinite(value):
        fail(where, f"{name!r} must be a finite number, got {shown(value)}", remedy)
    return float(value)


def messages(value: Any, name: str, where: str, remedy: str) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value} as messages; their order is not checked."""
    if not isinstance(value, list | tuple) or not value:
        fail(where, f"{name!r} must be a list of messages, got {shown(value)}", remedy)
    return tuple(message(turn, f"{name}[{i}]", where) for i, turn in enumerate(value))


def message(turn: Any, name: str, where: str) -> Message:
    """One {role, content} or {from, value}."""
    remedy = "a message has 'role' and 'content', or 'from' and 'value'"
    if not isinstance(turn, Mapping):
        fail(where, f"{name!r} must be a message, got {shown(turn)}", remedy)
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    said = field(turn, role, where, remedy)
    if not isinstance(said, str) or said not in _ROLES:
        fail(where, f"{name!r} has the role {shown(said)}", f"use one of {', '.join(_ROLES)}")
    body = check_text(turn.get(content), f"{name}.{content}", where, remedy)
    return Message(_ROLES[said], body)


def in_order(turns: Sequence[Message], where: str, last: str) -> tuple[Message, ...]:
    """`turns` if they alternate and end with the user's (`last="user"`) or the assistant's turn."""
    before = "the start"
    for turn in turns:
        asks = turn.role in ("user", "tool")
        fits = {
            "the start": turn.role in ("system", "user"),
            "system": turn.role == "user",
            "user": turn.role == "assistant",
            "assistant": asks,
            "tool": turn.role in ("tool", "assistant"),
        }[before]
        if not fits:
            fail(where, f"roles are out of order: {turn.role} after {before}", _ORDER)
        before = turn.role
    if before not in (("user", "tool") if last == "user" else (last,)):
        fail(where, f"the last turn is of {before}, not of {last}", _ORDER)
    return tuple(turns)


def ranked(example: Example, where: str) -> Example:
    """`example`, checked; ranks that are missing follow from the scores, equal scores being ties.

    Raises BadRow for scores that are not one for each response or contradict the ranks.
    """
    count, ranks, scores = len(example.responses), example.ranks, example.scores
    if scores and len(scores) != count:
        fail(where, f"{count} 'responses' but {len(scores)} 'scores'", "give each its score")
    if scores and not ranks and count > 1:
        ranks = tuple(sum(other > score for other in scores) for score in scores)
    for i in range(count if ranks and scores else 0):
        for j in range(count):
            if ranks[i] < ranks[j] and scores[i] < scores[j]:
                found = f"'ranks' put response {i} above {j}, 'scores' below it"
                fail(where, found, "correct one of them (rank 0 is best, the highest score is)")
    return example._replace(ranks=ranks)
