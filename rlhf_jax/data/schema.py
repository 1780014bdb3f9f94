"""What every row of a file is read into, and the checks that all formats share.

The checks do not know where a row stands. They raise `BadRow` with what was found and the remedy;
whoever loops over the rows puts the file and the line in front, by `at`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

Row = Mapping[str, Any]

# The names that files use for the roles of a conversation, and ours.
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
    """A row of a file that cannot be used. The fault is the file's, not the program's."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str


class Example(NamedTuple):
    """What a row of a file is read into, whatever its format."""

    # Messages for a chat template, or text that is fed as it stands ("" for plain text).
    prompt: str | tuple[Message, ...]
    # K answers: none in a file of prompts; several that are equally good are references.
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()  # lower is better, equal ranks are ties; () if nothing is ranked
    scores: tuple[float, ...] = ()  # higher is better; () if nothing is scored
    margin: float = 0.0  # how much higher the better of two should score
    language: str = ""  # as the row names it
    # The steps of one answer, in a file that judges them one by one; `responses` are () then.
    steps: tuple[str, ...] = ()
    labels: tuple[float, ...] = ()  # of each step, from 0 (wrong) to 1 (right)
    imitate_all: bool = False  # each response is a demonstration, not the best one alone
    extra: Row = {}  # every field of the row that its format did not use, as it is in the file

    @property
    def completion(self) -> str:
        """The response to imitate: the first of those that are ranked best."""
        return self.responses[self.ranks.index(min(self.ranks)) if self.ranks else 0]


def user_turn(prompt: str) -> tuple[Message, ...]:
    """A plain prompt as a conversation of one turn, for chat templates."""
    return (Message("user", prompt.strip()),)


def fail(found: str, remedy: str) -> NoReturn:
    """Raises BadRow: what was found, and what to do about it."""
    raise BadRow(f"{found}; {remedy}")


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Puts `where` (file and line of a row) in front of a BadRow that is raised inside."""
    try:
        yield
    except BadRow as error:
        raise BadRow(f"{where}: {error}") from None


def shown(value: Any) -> str:
    """The repr of a value, cut to fit into one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def field(row: Row, name: str, remedy: str) -> Any:
    """The value of a field that must be there."""
    if name not in row:
        fail(f"{name!r} is missing", remedy)
    return row[name]


def text(row: Row, name: str, remedy: str) -> str:
    """The value of a field that must hold text."""
    return check_text(field(row, name, remedy), name, remedy)


def check_text(value: Any, name: str, remedy: str) -> str:
    """`value`, which must be a string with something in it."""
    if not isinstance(value, str):
        fail(f"{name!r} must be a string, got {shown(value)}", remedy)
    if not value.strip():
        fail(f"{name!r} is empty", f"fill it in or remove the row; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer accepts.
        fail(f"{name!r} holds half a surrogate pair", "write the text as valid UTF-8")
    return value


def items(row: Row, name: str, remedy: str) -> list:
    """The value of a field that must hold a list."""
    value = field(row, name, remedy)
    if not isinstance(value, list | tuple):
        fail(f"{name!r} must be a list, got {shown(value)}", remedy)
    return list(value)


def number(value: Any, name: str, remedy: str) -> float:
    """`value`, which must be a finite number; true and false are not numbers."""
    if type(value) not in (int, float) or not math.isfinite(value):
        fail(f"{name!r} must be a finite number, got {shown(value)}", remedy)
    return float(value)


def messages(value: Any, name: str, remedy: str) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value} as messages; their order is not checked."""
    if not isinstance(value, list | tuple) or not value:
        fail(f"{name!r} must be a list of messages, got {shown(value)}", remedy)
    return tuple(message(turn, f"{name}[{i}]") for i, turn in enumerate(value))


def message(turn: Any, name: str) -> Message:
    """One {role, content} or {from, value} as a message."""
    remedy = "a message has 'role' and 'content', or 'from' and 'value'"
    if not isinstance(turn, Mapping):
        fail(f"{name!r} must be a message, got {shown(turn)}", remedy)
    role_field, content_field = ("from", "value") if "from" in turn else ("role", "content")
    role = field(turn, role_field, remedy)
    if not isinstance(role, str) or role not in _ROLES:
        fail(f"{name!r} has the role {shown(role)}", f"use one of {', '.join(_ROLES)}")
    content = check_text(turn.get(content_field), f"{name}.{content_field}", remedy)
    return Message(_ROLES[role], content)


def in_order(turns: Sequence[Message], last: str) -> tuple[Message, ...]:
    """`turns`, which must alternate and end with the turn of `last`, "user" or "assistant".

    A tool's turn stands where a user's can, and can follow another tool's.
    """
    before = "the start"
    for turn in turns:
        allowed = {
            "the start": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }[before]
        if turn.role not in allowed:
            fail(f"roles are out of order: {turn.role} after {before}", _ORDER)
        before = turn.role
    if before not in (("user", "tool") if last == "user" else (last,)):
        fail(f"the last turn is of {before}, not of {last}", _ORDER)
    return tuple(turns)


def ranked(example: Example) -> Example:
    """`example` with ranks; missing ranks follow from the scores, and equal scores tie.

    Raises BadRow if there is not one score for each response, or if scores contradict ranks.
    """
    count, ranks, scores = len(example.responses), example.ranks, example.scores
    if scores and len(scores) != count:
        fail(f"{count} 'responses' but {len(scores)} 'scores'", "give each its score")
    if scores and not ranks and count > 1:
        ranks = tuple(sum(other > score for other in scores) for score in scores)
    for i in range(count if ranks and scores else 0):
        for j in range(count):
            if ranks[i] < ranks[j] and scores[i] < scores[j]:
                found = f"'ranks' put response {i} above {j}, 'scores' below it"
                fail(found, "correct one of them (rank 0 and the highest score are best)")
    return example._replace(ranks=ranks)
