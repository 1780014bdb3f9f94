"""Rows to examples: which layout a row has is seen from its fields, or named by `format=`.

A format is the name of one (`FORMATS`), or any function (row, where) -> Example: those of
`layouts`, `layouts.source_target("en", "de")`, `renamed({...})`, `as_messages(...)`, or the
reader's own. A row that fits no format, or two, is an error that says so.

Whether an example is *worth* training on is not decided here (see `batches`).
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.data import layouts, schema
from rlhf_jax.data.layouts import COMPARISON, DEMONSTRATION, PROMPT, Layout, Row
from rlhf_jax.data.schema import BadRow, Example

Format = str | Layout | None

FORMATS: dict[str, Layout] = {
    "text": layouts.plain_text,
    "prompt": layouts.prompt_only,
    "prompt_completion": layouts.prompt_completion,
    "preference": layouts.preference,
    "responses": layouts.ranked_responses,
    "messages": layouts.conversation,
    "messages_preference": layouts.conversation_preference,
    "labelled": layouts.labelled,
    "alpaca": layouts.alpaca,
    "alpaca_ranked": layouts.alpaca_ranked,
    "hh": layouts.hh_dialogues,
    "gpt4_pair": layouts.gpt4_pair,
    "gpt4_scores": layouts.gpt4_scores,
    "alpaca_eval": layouts.alpaca_eval,
    "pandalm": layouts.pandalm,
    "scored": layouts.scored_response,
    "source_target": layouts.source_target(),
}
_LABELS = {"label", "tag", "kto_tag"}
_SIDES = {"chosen", "rejected"}
_TURNS = {"messages", "conversations"}
_RANKED = {"responses", "ranks", "scores"}


def read(row: Row | str, where: str, format: Format = None) -> Example:
    """The example of a row. Raises BadRow (a ValueError) naming `where`, the field and a remedy.

    A row that is text is the fault that `builders.load(on_bad_row="drop")` found in its place.
    """
    if isinstance(row, str):
        raise BadRow(row)
    if isinstance(format, str):
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not known; use one of {', '.join(FORMATS)}")
        format = FORMATS[format]
    return (format or FORMATS[_recognised(row, where)])(row, where)


def demonstration(row: Row | str, where: str, format: Format = None) -> Example:
    """A row with a response to imitate: any format but answers that are only scored."""
    example = read(row, where, format)
    if not example.responses:
        schema.fail(where, "'completion' is missing", DEMONSTRATION)
    if example.scores and not example.ranks:
        found = "the row is an answer with a score, which may be a bad one to imitate"
        schema.fail(where, found, "train a reward model on it")
    return example


def comparison(row: Row | str, where: str, format: Format = None) -> Example:
    """A row with K >= 2 ranked responses (ties included)."""
    example = read(row, where, format)
    if len(example.responses) < 2 or not example.ranks:
        missing = next((x for x in ("prompt", "chosen", "rejected") if x not in row), "ranks")
        schema.fail(where, f"{missing!r} is missing", COMPARISON)
    return example


def annotation(row: Row | str, where: str, format: Format = None) -> Example:
    """A row with a score for each of its K >= 1 responses; a label is a score of 1 or 0."""
    example = read(row, where, format)
    if not example.scores:
        schema.fail(where, "no response has a score", "regression takes scores or labels")
    return example


def prompt(row: Row | str, where: str, format: Format = None) -> Example:
    """The prompt of any row, as the format of the row has it.

    Of a row that fits none, or is faulty in what else it holds, the field `prompt`.
    """
    try:
        example = read(row, where, format)
    except BadRow:
        if format is not None or isinstance(row, str):
            raise
        if "prompt" not in row and (_fits(row) or _languages(row)):
            raise
        example = layouts.prompt_only(row, where)
    if not example.prompt:
        schema.fail(where, "'prompt' is missing", PROMPT)
    return Example(example.prompt, language=example.language)


def either(row: Row | str, where: str, format: Format = None) -> Example:
    """The example of a row, or, where it is fit for no more, its prompt."""
    try:
        return read(row, where, format)
    except BadRow:
        return prompt(row, where, format)


def renamed(fields: Mapping[str, str], format: Format = None) -> Layout:
    """The format of rows whose fields have other names: our name -> theirs ("a.b" for b in a).

    A dataset of TFDS is read by it: `renamed({"prompt": "article", "completion": "highlights"})`.
    """

    def layout(row: Row, where: str) -> Example:
        ours = {}
        for name, theirs in fields.items():
            value: Any = row
            for part in theirs.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    schema.fail(where, f"{theirs!r} is missing", f"it is to be read as {name!r}")
                value = value[part]
            ours[name] = value
        return read(ours, where, format)

    return layout


def as_messages(
    format: Format = None, parse: Callable[[Any, str, Format], Example] = read
) -> Layout:
    """The format whose plain prompts become a user's turn, for models with a chat template.

    `parse=prompt` reads rows that need hold no more than a prompt.
    """

    def layout(row: Row, where: str) -> Example:
        example = parse(row, where, format)
        if not isinstance(example.prompt, str) or not example.prompt:
            return example
        return example._replace(prompt=schema.user_turn(example.prompt))

    return layout


def located(source: str, format: str = "") -> tuple[str | pathlib.Path, Format]:
    """(file or dataset, its format) of what a command line names; "" recognises each row.

    A source "dataset_info.json:NAME" is an entry of LLaMA-Factory's list, which says the format
    too. A format "en:de" names the fields of source and target. Raises ValueError for a format
    beside an entry.
    """
    file, _, name = source.rpartition(":")
    if pathlib.Path(file).name == "dataset_info.json":
        if format:
            raise ValueError(f"{source}: the entry says its format; leave {format!r} out")
        return dataset_info(pathlib.Path(file).expanduser(), name)
    if ":" in format:
        return source, layouts.source_target(*format.split(":", 1))
    return source, format or None


def dataset_info(path: str | os.PathLike, name: str) -> tuple[pathlib.Path, Layout]:
    """File and format of one entry of a LLaMA-Factory dataset_info.json.

    Raises ValueError for an entry that is missing, has no local file, or asks for what is not read
    here: tools, images and the like, a part of the file, another formatting.
    """
    path = pathlib.Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable dataset_info.json ({error})") from None
    if not isinstance(entries, dict) or not all(isinstance(x, dict) for x in entries.values()):
        raise ValueError(f"{path}: not LLaMA-Factory's; it holds an object of objects")
    if name not in entries:
        raise ValueError(f"{path}: no dataset {name!r}; it has {', '.join(sorted(entries))}")
    entry = entries[name]
    if not isinstance(entry.get("file_name"), str):
        raise ValueError(f"{path}: {name!r} has no 'file_name'; download its file and name it")
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
            "read, and files of other rows by their own name"
        )
    return path.parent / entry["file_name"], _factory_format(entry)


_UNREAD = ("num_samples", "subset", "folder")
_UNREAD_COLUMNS = ("tools", "images", "videos", "audios")
# LLaMA-Factory's names of columns, and the fields of its two layouts by default.
_ALPACA = {"instruction": "prompt", "input": "query", "output": "response", "history": "history"}
_ALPACA |= {"system": "system", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
_SHAREGPT = {"conversations": "messages", "system": "system", "chosen": "chosen"}
_SHAREGPT |= {"rejected": "rejected", "kto_tag": "kto_tag"}
_TAGS = {"human": "user_tag", "gpt": "assistant_tag", "observation": "observation_tag"}
_TAGS |= {"function_call": "function_tag", "system": "system_tag"}


def _factory_format(entry: Mapping[str, Any]) -> Layout:
    """The layout of rows under the columns and tags of one entry of dataset_info.json."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    sharegpt = entry.get("formatting", "alpaca") == "sharegpt"
    names = _SHAREGPT if sharegpt else _ALPACA
    # Columns that are not named have their usual name, but a tag counts only where it is named.
    theirs = {
        ours: columns.get(key, ours) for ours, key in names.items() if key in columns or not columns
    }
    if entry.get("ranking"):
        theirs |= {side: columns.get(side, side) for side in _SIDES}
        layout = layouts.conversation_preference if sharegpt else layouts.alpaca_ranked
    elif "kto_tag" in columns:
        layout = layouts.labelled
    else:
        layout = layouts.conversation if sharegpt else layouts.alpaca
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    roles = {tags.get(tag, ours): ours for ours, tag in _TAGS.items()}

    def turn(value: Any) -> Any:
        if not sharegpt or not isinstance(value, Mapping):
            return value
        role = value.get(role_tag)
        return {"from": roles.get(role, role), "value": value.get(content_tag)}

    def layout_of_entry(row: Row, where: str) -> Example:
        ours = {name: row[column] for name, column in theirs.items() if column in row}
        ours = {name: value for name, value in ours.items() if value is not None}
        for name in _SIDES & set(ours):
            ours[name] = turn(ours[name])
        if isinstance(ours.get("conversations"), list):
            ours["conversations"] = [turn(value) for value in ours["conversations"]]
        return layout(ours, where)

    return layout_of_entry


def _recognised(row: Row, where: str) -> str:
    """The name of the one format that a row fits."""
    fits = _fits(row)
    if len(fits) == 1:
        return fits[0]
    if fits:
        found = f"the fields fit the formats {' and '.join(map(repr, fits))}"
        schema.fail(where, found, "name one by format=")
    if _languages(row):
        remedy = "name it by format=, such as layouts.source_target('en', 'de')"
        schema.fail(where, "the row is a translation without a direction", remedy)
    remedy = f"{DEMONSTRATION}; {COMPARISON}; other formats are named by format="
    schema.fail(where, f"no known format has the fields {schema.shown(list(row))}", remedy)


def _languages(row: Row) -> bool:
    return "translation" in row or sum(len(name) == 2 for name in row) > 1


def _fits(row: Row) -> list[str]:
    has = set(row)
    turns, sides, labels = has & _TURNS, has & _SIDES, has & _LABELS
    pandalm = {"response1", "response2"} <= has
    judged = pandalm or {"output_1", "output_2"} <= has
    asked = "instruction" in has and not judged
    listed = sides or isinstance(row.get("output"), list | tuple)
    prompted = "prompt" in has and not turns and not asked
    ranked = prompted and bool(has & _RANKED)
    plain = prompted and not ranked and not sides
    label = plain and "completion" in has and "label" in has
    score = plain and "score" in has and has & {"response", "completion"}
    whole = sides and not turns and not asked and not prompted
    dialogue = whole and str(row.get("chosen")).lstrip().startswith("Human:")
    factory = asked and not listed
    tests = {
        "text": "text" in has and not prompted,
        "messages": turns and not sides and not labels,
        "messages_preference": turns and sides,
        "labelled": label or turns and not sides and labels or factory and labels,
        "responses": ranked,
        "preference": sides and "prompt" in has and not (asked or ranked) or whole and not dialogue,
        "hh": dialogue,
        "prompt_completion": plain and "completion" in has and not label,
        "scored": score,
        "prompt": plain and "completion" not in has and not score and "text" not in has,
        "alpaca": factory and "output" in has and not labels,
        "alpaca_ranked": asked and listed,
        "alpaca_eval": judged and not pandalm,
        "pandalm": pandalm and "instruction" in has,
        "gpt4_pair": {"user_input", "completion_a", "completion_b"} <= has,
        "gpt4_scores": {"user_input", "responses_and_scores"} <= has,
        "source_target": {"source", "target"} <= has and not prompted and not asked,
    }
    fits = [name for name, fit in tests.items() if fit]
    return fits or (["text"] if "text" in has else [])
