"""What the pages of `label` and `judge` share: reading answers, writing the page, shuffling.

Both tools write the same page, which is filled from page.html, page.css and page.js beside this
file. The page loads nothing from anywhere else, and its content security policy forbids it to. All
texts enter it as JSON and are shown as plain text, so that nothing a model writes can become markup
or a script.
"""

from __future__ import annotations

import hashlib
import html
import importlib.resources
import json
import pathlib
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import storage
from rlhf_jax.data import builders
from rlhf_jax.training import report

Prompt = str | list[dict[str, str]]  # plain text, or messages with 'role' and 'content'
FIELDS = (
    "a row has 'prompt' and 'responses' (a list), or 'prompt' and 'response' or 'completion', or "
    "'prompt', 'before' and 'after'"
)


class Answers(NamedTuple):
    """A prompt with the responses to it."""

    prompt: Prompt
    responses: list[str]
    group: str  # what the prompt is counted under when win rates are reported by group; "" if none


def read(source: pathlib.Path, fields: Sequence[str] = ("before", "after")) -> list[Answers]:
    """Reads answers from a .jsonl or .json file (also .gz) or from the samples of a run's folder.

    Rows with the same prompt are joined into one entry. A run's evaluation writes rows with
    `before` and `after`; of these, the responses named by `fields` are read. Raises ValueError,
    with file and line, for a row without a prompt or without responses.
    """
    if source.is_dir():
        source = source / "samples.jsonl"
    storage.check_file(source)
    if not source.is_file():
        raise ValueError(f"{source}: no such file; name a file of answers or a run's folder")
    joined: dict[str, Answers] = {}
    for row, where in builders.load(source):
        found, named = prompt(row, where), group(row, where).get("group", "")
        entry = joined.setdefault(json.dumps(found), Answers(found, [], named))
        entry.responses.extend(_responses(row, where, fields))
    return list(joined.values())


def prompt(row: dict[str, Any], where: str) -> Prompt:
    """The prompt of a row, text or messages. Raises ValueError, which names `where`, file:line."""
    if "prompt" not in row:
        raise ValueError(f"{where}: 'prompt' is missing; {FIELDS}")
    found = row["prompt"]
    messages = found if isinstance(found, list) else []
    strings = [m.get(k) for m in messages if isinstance(m, dict) for k in ("role", "content")]
    if messages and len(strings) == 2 * len(messages) and all(isinstance(x, str) for x in strings):
        _check_utf8("".join(strings), where)
        return found
    if not isinstance(found, str):
        raise ValueError(
            f"{where}: 'prompt' must be a string or a list of messages, each with 'role' and "
            f"'content', got {found!r:.60}"
        )
    _check_utf8(found, where)
    return found


def group(row: dict[str, Any], where: str) -> dict[str, str]:
    """The field `group` of a row, where it has one. Raises ValueError unless that is text."""
    if "group" not in row:
        return {}
    found = row["group"]
    if not isinstance(found, str):
        raise ValueError(f"{where}: 'group' must be a string, got {found!r:.60}")
    _check_utf8(found, where)
    return {"group": found}


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: a text holds half a surrogate pair; write the text as valid UTF-8"
        ) from None


def _responses(row: dict[str, Any], where: str, fields: Sequence[str]) -> list[str]:
    if "responses" in row:
        found = row["responses"]
    elif "before" in row and "after" in row:
        found = [row[field] for field in fields]
    else:
        found = [row[field] for field in ("response", "completion") if field in row]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}: no answers; {FIELDS}")
    for response in found:
        if not isinstance(response, str):
            raise ValueError(f"{where}: an answer must be a string, got {response!r:.60}")
        _check_utf8(response, where)
    return found


def shuffled(seed: int, position: int, size: int) -> list[int]:
    """A permutation of `range(size)` that depends on the seed and the item's position alone.

    Entry i is the index of the answer that is shown at place i.
    """
    return np.random.default_rng((seed, position)).permutation(size).tolist()


def identity(content: dict[str, Any]) -> str:
    """A hash of everything that the page shows. The browser stores the progress under it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def check_output(path: pathlib.Path, *inputs: pathlib.Path) -> None:
    """Raises ValueError where no page can be written there, or it would replace what is read."""
    if path.suffix != ".html":
        raise ValueError(f"--output {path}: the page is HTML; give it a name that ends in .html")
    storage.check_output("--output", path, *inputs)


def write(path: pathlib.Path, title: str, content: dict[str, Any]) -> str:
    """Writes the page of `content` (kind, scale, items) and returns its identity."""
    name = identity(content)
    kind = "verdicts" if content["kind"] == "judge" else "labels"
    data = content | {"hash": name, "file": f"{path.stem}.{kind}.jsonl"}
    page = string.Template(_file("page.html")).substitute(
        title=html.escape(title),
        style=report.STYLE + _file("page.css"),
        script=_file("page.js"),
        data=embedded(data),
    )
    storage.write(path, page)
    return name


def embedded(data: Any) -> str:
    """JSON that can stand inside a script element of an HTML page.

    It is ASCII and holds no `<`, so that no text in it can end the element early.
    """
    return json.dumps(data).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (importlib.resources.files(__name__) / name).read_text(encoding="utf-8")
