"""A format in one line of text, for a file whose fields have names of their own.

    prompt=input,responses=output_1+output_2,best=label
    prompt=dialogue,responses=summary1+summary2+summary3
    prompt=data.question,chosen=good,rejected=bad

Each part is OURS=THEIRS. OURS is a field of the formats in `docs/formats.md`; the row is then read
as the format that has these fields. THEIRS is a field of the file, a field inside of one ("a.b"),
or several joined by "+", which make a list. `best` and `best0` say which of the responses is the
better one: by its number, counted from 1 or from 0, or by the name of its field.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data import schema
from rlhf_jax.data.known_formats import Reader
from rlhf_jax.data.schema import Example, Row

VERDICTS = {"best": 1, "best0": 0}  # where the number of the better response is counted from
OURS = (
    *("prompt", "completion", "response", "text", "messages", "conversations", "system"),
    *("chosen", "rejected", "margin", "score_chosen", "score_rejected"),
    *("responses", "ranks", "scores", "score", "label", "tag", "kto_tag"),
    *("instruction", "input", "output", "history", "completions", "labels", "language"),
    *("output_1", "output_2", "preference", "source", "target"),
    *VERDICTS,
)

JUDGEMENTS = {"score", "label", "tag", "kto_tag"}  # of a single response


def is_map(text: str) -> bool:
    """Whether a text is meant to be a field map, and not the name of a format."""
    return "=" in text or "," in text


def of(text: str, read: Reader) -> Reader:
    """The format that a field map describes; `read` recognises the format of the fields it makes.

    Fields of a row that the map does not name stay in the example's `extra`, and are named once in
    a warning. Raises ValueError for a map that is empty, names no field of ours, or one twice, and
    BadRow for a row that lacks a field.
    """
    fields = _parsed(text)
    told = False

    def read_mapped(row: Row) -> Example:
        nonlocal told
        ours = {name: _value(row, name, theirs) for name, theirs in fields.items()}
        if not told:
            told = True
            _tell(row, fields)
        verdict = next((name for name in VERDICTS if name in ours), None)
        if verdict is not None:
            ours["ranks"] = _ranks(ours, verdict, fields)
            del ours[verdict]
        if "response" in ours and not JUDGEMENTS & ours.keys():
            ours["completion"] = ours.pop("response")
        responses = ours.get("responses")
        if isinstance(responses, list) and not {"ranks", "scores"} & ours.keys():
            return _references(ours, read)
        return read(ours)

    return read_mapped


def _parsed(text: str) -> dict[str, list[str]]:
    """The fields of the file for each of ours."""
    fields: dict[str, list[str]] = {}
    example = "write for example prompt=question,chosen=good,rejected=bad"
    for part in text.split(","):
        name, equals, theirs = (x.strip() for x in part.partition("="))
        names = [x.strip() for x in theirs.split("+")]
        if not equals or not name or "" in names:
            raise ValueError(f"the field map {text!r} has the part {part!r}; {example}")
        if name not in OURS:
            near = difflib.get_close_matches(name, OURS, 1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(OURS)}"
            raise ValueError(f"the field map {text!r}: {name!r} is no field of a format; {hint}")
        if name in fields:
            raise ValueError(f"the field map {text!r} names {name!r} twice; name it once")
        fields[name] = names
    found = [name for name in VERDICTS if name in fields]
    if len(found) > 1 or (found and len(fields.get("responses", ())) < 2):
        raise ValueError(
            f"the field map {text!r}: {' and '.join(found)} is one number of one of the responses; "
            "write for example responses=output_1+output_2,best=label"
        )
    return fields


def _value(row: Row, name: str, theirs: list[str]) -> Any:
    values = [_inside(row, name, field) for field in theirs]
    return values if len(values) > 1 else values[0]


def _inside(row: Row, name: str, field: str) -> Any:
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            near = difflib.get_close_matches(field, map(str, row), 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            has = ", ".join(map(repr, row))
            schema.fail(
                f"{field!r} is missing{hint}", f"it is to be read as {name!r}; the row has {has}"
            )
        value = value[part]
    return value


def _ranks(ours: dict[str, Any], verdict: str, fields: dict[str, list[str]]) -> list[int]:
    """0 for the better response and 1 for the others."""
    value, names, first = ours[verdict], fields["responses"], VERDICTS[verdict]
    if isinstance(value, str) and value in names:
        best = names.index(value)
    else:
        number = value if isinstance(value, str) else str(value)
        best = int(number) - first if number.isdecimal() else -1
    if not 0 <= best < len(names):
        last = len(names) - 1 + first
        other = next(name for name in VERDICTS if name != verdict)
        schema.fail(
            f"{fields[verdict][0]!r} is {schema.shown(value)}",
            f"{verdict!r} is {first} to {last} or the name of a field; {other!r} counts from "
            f"{VERDICTS[other]}",
        )
    return [int(i != best) for i in range(len(names))]


def _references(ours: dict[str, Any], read: Reader) -> Example:
    """A prompt with several responses that are equally good: the first is the one to imitate."""
    remedy = "each of the responses is a text"
    for i, response in enumerate(ours["responses"]):
        schema.check_text(response, f"responses[{i}]", remedy)
    rest = {name: value for name, value in ours.items() if name != "responses"}
    example = read(rest)
    return example._replace(responses=tuple(ours["responses"]))


def _tell(row: Row, fields: dict[str, list[str]]) -> None:
    used = {
        name for theirs in fields.values() for field in theirs for name in (field, _outer(field))
    }
    unread = [name for name in map(str, row) if name not in used]
    if unread:
        logging.getLogger(__name__).warning(
            "fields that the map does not name are kept beside the examples, as `extra`: %s",
            ", ".join(unread),
        )


def _outer(field: str) -> str:
    return field.split(".")[0]
