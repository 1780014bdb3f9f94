"""Rows to examples: the format of a row is recognised from its fields, or named by `format=`.

`format=` takes a name in `known_formats.FORMATS`, a map of fields such as
"prompt=input,chosen=good,rejected=bad" (`field_map`), the fields of a translation such as "en:de",
or any function from a row to an Example: `known_formats.source_target("en", "de")`, `renamed(...)`,
`as_messages(...)`, or your own. A row that fits no format, or several, is an error that says so.

Whether an example is worth training on is not decided here but in `batches`.
"""

from __future__ import annotations

import difflib
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rlhf_jax import storage
from rlhf_jax.data import field_map, known_formats, schema
from rlhf_jax.data.known_formats import (
    COMPARISON,
    DEMONSTRATION,
    FORMATS,
    PROMPT,
    STEPS,
    Reader,
)
from rlhf_jax.data.schema import BadRow, Example, Row

FormatLike = str | Reader | None  # a format's name, a function, or None: recognised by the fields
_BY_NAME = {format.name: format for format in FORMATS}


def read(row: Row | str, format: FormatLike = None) -> Example:
    """The example of a row, with its language and every field that the format did not use.

    Raises BadRow (a ValueError) with the field and the remedy; `schema.at` adds where the row
    stands. A row that is a string is the error text of `builders.load(on_bad_row="drop")`.
    """
    if isinstance(row, str):
        raise BadRow(row)
    if isinstance(format, str):
        format = _named(format)
    fields = _Fields(row)
    example = (format or _recognised(row))(fields)
    unused = {name: value for name, value in row.items() if name not in fields.read}
    language = example.language
    for name in ("language", "lang"):
        if not language and isinstance(unused.get(name), str):
            language = unused.pop(name)
    return example._replace(language=language, extra={**unused, **example.extra})


@functools.lru_cache(maxsize=64)
def _named(text: str) -> Reader:
    """The reader of a format in a text. Raises ValueError where it is none."""
    if field_map.is_map(text):
        return field_map.of(text, read)
    source, colon, target = text.partition(":")
    if source and target:
        return known_formats.source_target(source, target)
    if text not in _BY_NAME or colon:
        near = difflib.get_close_matches(text, _BY_NAME, 1)
        hint = f"did you mean {near[0]!r}? Or " if near else ""
        raise ValueError(
            f"format={schema.shown(text)} is not known; {hint}use one of {', '.join(_BY_NAME)}, or "
            "name the fields, such as 'prompt=question,chosen=good,rejected=bad'"
        )
    return _BY_NAME[text].read


class _Fields(Mapping):
    """A row that remembers which of its fields were read; `name in row` is not a reading."""

    def __init__(self, row: Row):
        self._row = row
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._row[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def numbered(rows: Iterable) -> Iterator[tuple[Row | str, str]]:
    """(row, where it stands) of every item: pairs as `builders.load` gives them, or rows alone.

    A row alone is named by its number. Raises ValueError for a row that is not a mapping.
    """
    remedy = "open a file by builders.load(path), or write rows as {'prompt': ..., ...}"
    if isinstance(rows, str | os.PathLike):
        raise ValueError(f"rows={str(rows)!r} is one text, not rows; {remedy}")
    for number, item in enumerate(rows, 1):
        row, where = item if isinstance(item, tuple) else (item, f"row {number}")
        if not isinstance(row, Mapping) and not (isinstance(item, tuple) and isinstance(row, str)):
            raise ValueError(f"{where} is {schema.shown(row)}, not an object of fields; {remedy}")
        yield row, where


# What each kind of dataset asks of a row. All raise BadRow, as `read` does.


def demonstration(row: Row | str, format: FormatLike = None) -> Example:
    """A row with a response to imitate: any format but answers that only have a score."""
    example = read(row, format)
    if not example.responses:
        schema.fail("'completion' is missing", DEMONSTRATION)
    if example.scores and not example.ranks:
        found = "the row is an answer with a score, which may be a bad one to imitate"
        schema.fail(found, "train a reward model on it")
    return example


def demonstrations(example: Example) -> tuple[Example, ...]:
    """The demonstrations of a row: its best response, or each where all are to be imitated."""
    if not example.imitate_all:
        return (example,)
    return tuple(example._replace(responses=(x,), imitate_all=False) for x in example.responses)


def answered(row: Row | str, format: FormatLike = None) -> Example:
    """A row with a prompt and a response to imitate."""
    example = demonstration(row, format)
    if not example.prompt:
        schema.fail("'prompt' is missing", DEMONSTRATION)
    return example


def comparison(row: Row | str, format: FormatLike = None) -> Example:
    """A row with K >= 2 ranked responses (ties included)."""
    example = read(row, format)
    if len(example.responses) < 2 or not example.ranks:
        missing = "ranks" if len(example.responses) > 1 else "chosen"
        schema.fail(f"{missing if example.prompt else 'prompt'!r} is missing", COMPARISON)
    return example


def annotation(row: Row | str, format: FormatLike = None) -> Example:
    """A row with a score for each of its K >= 1 responses; a label is a score of 1 or 0."""
    example = read(row, format)
    if not example.scores:
        schema.fail("no response has a score", "regression takes scores or labels")
    return example


def judged_steps(row: Row | str, format: FormatLike = None) -> Example:
    """A row with the steps of a response and the label of each."""
    example = read(row, format)
    if not example.steps:
        fields = ("prompt", "completions", "labels")
        missing = next((x for x in fields if x not in row), "completions")
        schema.fail(f"{missing!r} is missing", STEPS)
    return example


def prompt(row: Row | str, format: FormatLike = None) -> Example:
    """A row with a prompt, whatever else it holds: the rest is read too where it can be.

    If the row fits no format, or its other fields are faulty, only the field `prompt` is read, and
    all others are in `extra`.
    """
    try:
        example = read(row, format)
    except BadRow:
        if format is not None or isinstance(row, str):
            raise
        if "prompt" not in row and (_names_of_fitting(row) or _is_translation(row)):
            raise
        example = read(row, "prompt")
    if not example.prompt:
        schema.fail("'prompt' is missing", PROMPT)
    return example


def either(row: Row | str, format: FormatLike = None) -> Example:
    """The example of a row, or of its prompt alone where nothing more can be read."""
    try:
        return read(row, format)
    except BadRow:
        return prompt(row, format)


# Formats made of other formats.


def renamed(fields: Mapping[str, str], format: FormatLike = None) -> Reader:
    """Reads rows whose fields have other names: our name -> theirs; "a.b" is field b of field a.

    For a TFDS dataset, for example: `renamed({"prompt": "article", "completion": "highlights"})`.
    """

    def read_renamed(row: Row) -> Example:
        ours, whole = {}, {}
        for name, theirs in fields.items():
            first, *inner = theirs.split(".")
            value: Any = row
            for part in (first, *inner):
                if not isinstance(value, Mapping) or part not in value:
                    schema.fail(f"{theirs!r} is missing", f"it is to be read as {name!r}")
                value = value[part]
            ours[name] = value
            if inner:  # keep the other entries of the outer field too
                whole[first] = row[first]
        example = read(ours, format)
        return example._replace(extra={**whole, **example.extra})

    return read_renamed


def as_messages(
    format: FormatLike = None, parse: Callable[[Any, FormatLike], Example] = read
) -> Reader:
    """A format that makes a plain prompt the user's turn, for models with a chat template.

    With `parse=prompt`, rows need not hold more than a prompt.
    """

    def read_as_messages(row: Row) -> Example:
        example = parse(row, format)
        if not isinstance(example.prompt, str) or not example.prompt:
            return example
        return example._replace(prompt=schema.user_turn(example.prompt))

    return read_as_messages


def located(source: str, format: str = "") -> tuple[str | pathlib.Path, FormatLike]:
    """(file or dataset, its format) as a command line names them; "" stands for no format.

    A source "dataset_info.json:NAME" is an entry of LLaMA-Factory's list of datasets, which says
    the format too. Raises ValueError for a format that is given beside an entry, and for one that
    is none.
    """
    file, _, name = source.rpartition(":")
    if pathlib.Path(file).name == "dataset_info.json":
        if format:
            raise ValueError(f"{source}: the entry says its format; leave {format!r} out")
        return dataset_info(pathlib.Path(file).expanduser(), name)
    return source, _named(format) if format else None


def dataset_info(path: str | os.PathLike, name: str) -> tuple[pathlib.Path, Reader]:
    """File and format of one entry of a LLaMA-Factory dataset_info.json.

    Raises ValueError for an entry that is missing, has no local file, or asks for what is not read
    here: tools, images and the like, a part of the file, another formatting.
    """
    path = pathlib.Path(path)
    entries = storage.read_json(path)
    if not all(isinstance(x, dict) for x in entries.values()):
        raise ValueError(f"{path}: not LLaMA-Factory's; it holds an object of objects")
    if name not in entries:
        raise ValueError(f"{path}: no dataset {name!r}; it has {', '.join(sorted(entries))}")
    entry = entries[name]
    if not isinstance(entry.get("file_name"), str):
        raise ValueError(f"{path}: {name!r} has no 'file_name'; download its file and name it")
    if not storage.names_inside(entry["file_name"]):
        raise ValueError(
            f"{path}: {name!r} names the file {entry['file_name']!r:.60}, which is outside this "
            "folder; name that file itself in place of the entry, or move it here"
        )
    columns, tags = (entry.get(x) or {} for x in ("columns", "tags"))
    if not isinstance(columns, dict) or not isinstance(tags, dict):
        raise ValueError(f"{path}: 'columns' and 'tags' of {name!r} must be objects")
    unread = [x for x in _UNREAD if entry.get(x)] + [x for x in _UNREAD_COLUMNS if columns.get(x)]
    if unread:
        raise ValueError(
            f"{path}: {name!r} has {unread[0]!r}, which is not read; write the rows out without it"
        )
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        raise ValueError(
            f"{path}: {name!r} has the formatting {entry['formatting']!r}; alpaca and sharegpt are "
            "read here, and other files by naming the file itself"
        )
    return path.parent / entry["file_name"], _llama_factory_format(entry)


_UNREAD = ("num_samples", "subset", "folder")
_UNREAD_COLUMNS = ("tools", "images", "videos", "audios")
# Our fields and LLaMA-Factory's names of the columns that hold them, under each of its formattings.
_ALPACA = {"instruction": "prompt", "input": "query", "output": "response", "history": "history"}
_ALPACA |= {"system": "system", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
_SHAREGPT = {"conversations": "messages", "system": "system", "chosen": "chosen"}
_SHAREGPT |= {"rejected": "rejected", "kto_tag": "kto_tag"}
# Roles, and LLaMA-Factory's names of the tags that stand for them.
_TAGS = {"human": "user_tag", "gpt": "assistant_tag", "observation": "observation_tag"}
_TAGS |= {"function_call": "function_tag", "system": "system_tag"}


def _llama_factory_format(entry: Mapping[str, Any]) -> Reader:
    """The format of rows under the columns and tags of one entry of dataset_info.json."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    sharegpt = entry.get("formatting", "alpaca") == "sharegpt"
    names = _SHAREGPT if sharegpt else _ALPACA
    # Without 'columns' the fields have their usual names; a label must be named to be read.
    theirs = {
        ours: columns.get(key, ours) for ours, key in names.items() if key in columns or not columns
    }
    if entry.get("ranking"):
        theirs |= {side: columns.get(side, side) for side in ("chosen", "rejected")}
        read_ours = (
            known_formats.conversation_preference if sharegpt else known_formats.alpaca_ranked
        )
    elif "kto_tag" in columns:
        read_ours = known_formats.labelled
    else:
        read_ours = known_formats.conversation if sharegpt else known_formats.alpaca
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    roles = {tags.get(tag, role): role for role, tag in _TAGS.items()}

    def turn(value: Any) -> Any:
        if not sharegpt or not isinstance(value, Mapping):
            return value
        role = value.get(role_tag)
        return {"from": roles.get(role, role), "value": value.get(content_tag)}

    def read_entry(row: Row) -> Example:
        ours = {name: row[column] for name, column in theirs.items() if column in row}
        ours = {name: value for name, value in ours.items() if value is not None}
        for name in {"chosen", "rejected"} & set(ours):
            ours[name] = turn(ours[name])
        if isinstance(ours.get("conversations"), list):
            ours["conversations"] = [turn(value) for value in ours["conversations"]]
        return read_ours(ours)

    return read_entry


def _recognised(row: Row) -> Reader:
    """The reader of the one format that fits a row; an error if none or several do."""
    fitting = _names_of_fitting(row)
    if len(fitting) == 1:
        return _BY_NAME[fitting[0]].read
    if fitting:
        found = f"the fields fit the formats {' and '.join(map(repr, fitting))}"
        schema.fail(found, "name one by format=")
    if _is_translation(row):
        remedy = "name it by format='en:de', for example"
        schema.fail("the row is a translation without a direction", remedy)
    remedy = f"{DEMONSTRATION}; {COMPARISON}; other formats are named by format="
    schema.fail(f"no known format has the fields {schema.shown(list(row))}", remedy)


def _names_of_fitting(row: Row) -> list[str]:
    fitting = [format.name for format in FORMATS if format.fits(row)]
    # A row with 'text' and fields of no format is read as text; that reader may refuse it.
    return fitting or (["text"] if "text" in row else [])


def _is_translation(row: Row) -> bool:
    return "translation" in row or sum(len(name) == 2 for name in row) > 1
