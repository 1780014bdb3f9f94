"""A format in one line of text, for a file whose fields have names of their own.

    prompt=input,responses=output_1+output_2,best=label
    prompt=dialogue,response=summary1+summary2+summary3
    prompt=data.question,chosen=good,rejected=bad

Each part is OURS=THEIRS. OURS is a field of the formats in `docs/formats.md`; the row is then read
as the format that has these fields. THEIRS is a field of the file, a field inside of one ("a.b"),
or several joined by "+", which make a list. `best` and `best0` say which of the responses is the
better one: by its number, counted from 1 or from 0, or by the name of its field.
"""

from __future__ import annotations

import collections
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import schema
from rlhf_jax.data.known_formats import DEMONSTRATION, Reader
from rlhf_jax.data.schema import Example, Row

VERDICTS = {"best": 1, "best0": 0}  # where the number of the better response is counted from
# Fields of ours that may hold a list, and so several fields of the file.
LISTS = (
    *("completion", "response", "responses", "ranks", "scores", "messages", "conversations"),
    *("output", "history", "completions", "labels", "source", "target"),
)
OURS = (
    *("prompt", "text", "system", "chosen", "rejected", "margin", "score_chosen", "score_rejected"),
    *("score", "label", "tag", "kto_tag", "instruction", "input", "language"),
    *("output_1", "output_2", "preference"),
    *LISTS,
    *VERDICTS,
)
JUDGEMENTS = {"score", "label", "tag", "kto_tag"}  # of a single response
# Two ways to say the same.
EXCLUSIVE = (("best", "best0"), ("best", "ranks"), ("best0", "ranks"), ("response", "completion"))
NAMED = 20  # unlisted fields that are named at most, of a file


def is_map(text: str) -> bool:
    """Whether a text is meant to be a field map, and not the name of a format."""
    return "=" in text or "," in text


def of(text: str, read: Reader) -> Reader:
    """The format that a field map describes; `read` recognises the format of the fields it makes.

    Fields of a row that the map does not name stay in the example's `extra`, and each is named once
    in a warning. Raises ValueError for a map that is empty, names no field of ours, or a field
    twice, and BadRow for a row that lacks a field.
    """
    fields = _parsed(text)
    told: set[str] = set()

    def read_mapped(row: Row) -> Example:
        ours = {name: _value(row, name, theirs) for name, theirs in fields.items()}
        _tell(row, fields, told)
        verdict = next((name for name in VERDICTS if name in ours), None)
        if verdict is not None:
            ours["ranks"] = _ranks(ours, verdict, fields)
            del ours[verdict]
        if "response" in ours and not JUDGEMENTS & ours.keys():
            ours["completion"] = ours.pop("response")
        references = ours.get("responses")
        if isinstance(references, list) and not {"ranks", "scores"} & ours.keys():
            example = _several(ours, "responses", read)
        elif _are_texts(ours.get("completion")) and not JUDGEMENTS & ours.keys():
            example = _several(ours, "completion", read)._replace(imitate_all=True)
        else:
            example = read(ours)
        # The other entries of a field that was looked into.
        outer = {name: row[name] for name in _looked_into(row, fields)}
        return example._replace(extra={**outer, **example.extra})

    return read_mapped


def _parsed(text: str) -> dict[str, list[str]]:
    """The fields of the file for each of ours."""
    fields: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, theirs = (x.strip() for x in part.partition("="))
        names = [x.strip() for x in theirs.split("+")]
        if not equals or not name or "" in names:
            remedy = "write for example prompt=question,chosen=good,rejected=bad"
            _refuse(text, f"{schema.shown(part)} is not OURS=THEIRS; {remedy}")
        if name not in OURS:
            near = difflib.get_close_matches(name, OURS, 1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(OURS)}"
            _refuse(text, f"{schema.shown(name)} is no field of a format; {hint}")
        if name in fields:
            _refuse(text, f"{name!r} is named twice; name it once")
        if len(names) > 1 and name not in LISTS:
            lists = ", ".join(LISTS)
            _refuse(text, f"{name!r} is one field; those that join several are {lists}")
        fields[name] = names
    _check(text, fields)
    return fields


def _check(text: str, fields: dict[str, list[str]]) -> None:
    """Raises ValueError for parts that do not go together."""
    counts = collections.Counter(name for theirs in fields.values() for name in theirs)
    name, count = counts.most_common(1)[0]
    if count > 1:
        _refuse(text, f"the field {schema.shown(name)} of the file is named twice; name it once")
    for one, other in EXCLUSIVE:
        if one in fields and other in fields:
            _refuse(text, f"{one!r} and {other!r} say the same; keep one of them")
    verdict = next((name for name in VERDICTS if name in fields), None)
    if verdict and "responses" not in fields:
        remedy = "write for example responses=output_1+output_2,best=label"
        _refuse(text, f"{verdict!r} is the number of one of the responses; {remedy}")
    judgement = next((name for name in JUDGEMENTS & fields.keys()), None)
    joined = next((x for x in ("response", "completion") if len(fields.get(x, ())) > 1), None)
    if judgement and joined:
        remedy = "write for example responses=a+b,scores=score_a+score_b"
        _refuse(text, f"{judgement!r} is of one response, but there are several; {remedy}")


def _refuse(text: str, why: str) -> None:
    raise ValueError(f"format={schema.shown(text)}: {why}")


def _value(row: Row, name: str, theirs: list[str]) -> Any:
    values = [_inside(row, name, field) for field in theirs]
    return values if len(values) > 1 else values[0]


def _inside(row: Row, name: str, field: str) -> Any:
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            near = difflib.get_close_matches(field, map(str, row), 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            has = schema.shown(list(row))
            found = f"{schema.shown(field)} is missing{hint}"
            schema.fail(found, f"it is to be read as {name!r}; the row has {has}")
        value = value[part]
    return value


def _ranks(ours: dict[str, Any], verdict: str, fields: dict[str, list[str]]) -> list[int]:
    """0 for the better response and 1 for the others."""
    value, first, names = ours[verdict], VERDICTS[verdict], fields["responses"]
    # Of one field, which holds a list, the responses have no names of their own.
    names = names if len(names) > 1 else []
    count = len(names) or len(schema.items(ours, "responses", "'responses' are a list of texts"))
    if isinstance(value, str) and value in names:
        best = names.index(value)
    elif isinstance(value, str):
        best = int(value) - first if value.isdecimal() and len(value) < 10 else -1
    else:  # a table writes 1 as 1.0 where another row of the column is empty
        whole = type(value) in (int, float) and value in range(first, count + first)
        best = int(value) - first if whole else -1
    if not 0 <= best < count:
        other = next(name for name in VERDICTS if name != verdict)
        of_field = " or the name of a field" if names else ""
        remedy = f"{verdict!r} is {first} to {count - 1 + first}{of_field}"
        schema.fail(
            f"{fields[verdict][0]!r} is {schema.shown(value)}",
            f"{remedy}; {other!r} counts from {VERDICTS[other]}",
        )
    return [int(i != best) for i in range(count)]


def _are_texts(value: Any) -> bool:
    """Whether this is a list of texts, and not one text or a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _several(ours: dict[str, Any], name: str, read: Reader) -> Example:
    """A prompt with several responses that are equally good."""
    responses: Sequence = ours[name]
    if not responses:
        schema.fail(f"{name!r} is an empty list", "give it a text, or remove the row")
    for i, response in enumerate(responses):
        schema.check_text(response, f"{name}[{i}]", "each of the responses is a text")
    rest = {key: value for key, value in ours.items() if key != name}
    if not rest:
        schema.fail("'prompt' is missing", DEMONSTRATION)
    if "instruction" in rest:
        rest["output"] = responses[0]
    return read(rest)._replace(responses=tuple(responses))


def _looked_into(row: Row, fields: dict[str, list[str]]) -> set[str]:
    """The fields of a row of which the map names a part."""
    return {_outer(x) for theirs in fields.values() for x in theirs if x not in row}


def _tell(row: Row, fields: dict[str, list[str]], told: set[str]) -> None:
    """Names the fields of a row that the map leaves out, if they were not `told` before."""
    used = {field for theirs in fields.values() for field in theirs}
    outer = _looked_into(row, fields)
    paths = [name for name in map(str, row) if name not in outer]
    paths += [f"{name}.{part}" for name in sorted(outer) for part in row[name]]
    unread = [
        x for x in paths if x not in told and not any(u == x or u.startswith(f"{x}.") for u in used)
    ]
    room = NAMED - len(told)
    if not unread or room <= 0:
        return
    told.update(unread)
    more = ", and more" if len(unread) > room else ""
    logging.getLogger(__name__).warning(
        "fields that the map does not name are kept beside the examples, as `extra`: %s",
        ", ".join(unread[:room]) + more,
    )


def _outer(field: str) -> str:
    return field.split(".")[0]
