"""Rows to examples: one function per schema, which recognises its fields.

Fields are read, never guessed: a row that lacks one, or holds the wrong type in it, is an error
that names the row and the remedy. Fields that a schema does not know are left alone, so that one
file of comparisons also serves as prompts. Whether an example is *worth* training on is not
decided here (see `batches`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

DEMONSTRATION = "a demonstration has 'prompt' and 'completion', or 'text' alone"
COMPARISON = (
    "a comparison has 'prompt', 'chosen' and 'rejected' (and perhaps 'margin'), or 'prompt', "
    "'responses' and 'ranks' (0 is best)"
)
PROMPT = "a prompt row has 'prompt'"


class Demonstration(NamedTuple):
    """A completion to imitate. `prompt` is empty for plain text, and only then."""

    prompt: str
    completion: str


class Comparison(NamedTuple):
    """K >= 2 responses to one prompt; rank 0 is best, equal ranks are ties."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    margin: float


class Prompt(NamedTuple):
    """What the policy is asked to continue."""

    prompt: str


def demonstration(row: Mapping[str, Any], where: str) -> Demonstration:
    """{prompt, completion}, or {text} for plain text. Raises ValueError naming `where`."""
    if "text" not in row:
        return Demonstration(
            _text(row, "prompt", where, DEMONSTRATION + "; use 'text' for a row without a prompt"),
            _text(row, "completion", where, DEMONSTRATION),
        )
    for field in ("prompt", "completion"):
        if field in row:
            _fail(where, f"both 'text' and {field!r} are given", DEMONSTRATION)
    return Demonstration("", _text(row, "text", where, DEMONSTRATION))


def comparison(row: Mapping[str, Any], where: str) -> Comparison:
    """{prompt, chosen, rejected[, margin]} or {prompt, responses, ranks}.

    Raises ValueError naming `where`.
    """
    prompt = _text(row, "prompt", where, COMPARISON)
    if "responses" not in row and "ranks" not in row:
        responses = tuple(_text(row, field, where, COMPARISON) for field in ("chosen", "rejected"))
        return Comparison(prompt, responses, (0, 1), _margin(row, where))
    for field in ("chosen", "rejected", "margin"):
        if field in row:
            _fail(where, f"{field!r} is given beside 'responses' and 'ranks'", COMPARISON)
    responses = _list(row, "responses", where)
    ranks = _list(row, "ranks", where)
    if len(responses) < 2:
        _fail(where, f"'responses' holds {len(responses)}; it takes 2 or more", COMPARISON)
    if len(responses) != len(ranks):
        found = f"{len(responses)} 'responses' but {len(ranks)} 'ranks'"
        _fail(where, found, "give each response its rank, 0 for the best")
    for i, response in enumerate(responses):
        _check_text(response, f"responses[{i}]", where, COMPARISON)
    for i, rank in enumerate(ranks):
        # bool is an int to Python; a rank of true is a mistake in the file.
        if type(rank) is not int or not 0 <= rank < 2**31:
            found = f"'ranks[{i}]' must be a whole number from 0, got {_shown(rank)}"
            _fail(where, found, "0 is best, equal ranks are ties")
    return Comparison(prompt, tuple(responses), tuple(ranks), 0.0)


def prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """{prompt}; any other field is left alone. Raises ValueError naming `where`."""
    return Prompt(_text(row, "prompt", where, PROMPT))


def _text(row: Mapping[str, Any], field: str, where: str, remedy: str) -> str:
    if field not in row:
        _fail(where, f"{field!r} is missing", remedy)
    return _check_text(row[field], field, where, remedy)


def _check_text(value: Any, field: str, where: str, remedy: str) -> str:
    if not isinstance(value, str):
        _fail(where, f"{field!r} must be a string, got {_shown(value)}", remedy)
    if not value.strip():
        _fail(where, f"{field!r} is empty", f"fill it in or remove the row; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        _fail(where, f"{field!r} holds half a surrogate pair", "write the text as valid UTF-8")
    return value


def _list(row: Mapping[str, Any], field: str, where: str) -> list:
    if field not in row:
        _fail(where, f"{field!r} is missing", COMPARISON)
    if not isinstance(row[field], list | tuple):
        _fail(where, f"{field!r} must be a list, got {_shown(row[field])}", COMPARISON)
    return list(row[field])


def _margin(row: Mapping[str, Any], where: str) -> float:
    margin = row.get("margin", 0.0)
    if type(margin) not in (int, float) or not math.isfinite(margin):
        found = f"'margin' must be a finite number, got {_shown(margin)}"
        _fail(where, found, "leave it out for no margin")
    return float(margin)


def _shown(value: Any) -> str:
    """A value short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fail(where: str, found: str, remedy: str) -> NoReturn:
    raise ValueError(f"{where}: {found}; {remedy}")
