"""What the pages for people share: reading answers, one self-contained HTML file, the shuffle.

`label.py` and `judge.py` write the same page (page.html, page.css and page.js beside this file).
It asks for nothing from elsewhere, and its content policy forbids it to; texts enter it as JSON and
are shown as text, so that nothing a model says can become markup.
"""

from __future__ import annotations

import hashlib
import html
import json
import pathlib
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import builders
from rlhf_jax.training import report
from rlhf_jax.training.metrics import write_atomically

HERE = pathlib.Path(__file__).parent
Prompt = str | list[dict[str, str]]  # plain text, or messages with 'role' and 'content'
FIELDS = (
    "a row has 'prompt' and 'responses' (a list), or 'prompt' and 'response' or 'completion', or "
    "'prompt', 'before' and 'after'"
)


class Answers(NamedTuple):
    """What was answered to one prompt, and the group that the prompt belongs to ("" for none)."""

    prompt: Prompt
    responses: list[str]
    group: str


def read(source: pathlib.Path, fields: Sequence[str] = ("before", "after")) -> list[Answers]:
    """Answers of a .jsonl or .json file (or .gz), or of a run's folder, one entry a prompt.

    Rows of the same prompt are joined. Of a row with `before` and `after`, as a run's evaluation
    writes them, the named ones are read. Raises ValueError with file and line.
    """
    if source.is_dir():
        source = source / "samples.jsonl"
    if not source.is_file():
        raise ValueError(f"{source}: no such file; name a file of answers or a run's folder")
    joined: dict[str, Answers] = {}
    for row, where in builders.load(source):
        asked, group = prompt(row, where), row.get("group", "")
        if not isinstance(group, str):
            raise ValueError(f"{where}: 'group' must be a string, got {group!r:.60}")
        entry = joined.setdefault(json.dumps(asked), Answers(asked, [], group))
        entry.responses.extend(_responses(row, where, fields))
    return list(joined.values())


def prompt(row: dict[str, Any], where: str) -> Prompt:
    """The prompt of a row, text or messages. Raises ValueError naming `where`."""
    if "prompt" not in row:
        raise ValueError(f"{where}: 'prompt' is missing; {FIELDS}")
    found = row["prompt"]
    messages = found if isinstance(found, list) else []
    strings = [m.get(k) for m in messages if isinstance(m, dict) for k in ("role", "content")]
    if messages and len(strings) == 2 * len(messages) and all(isinstance(x, str) for x in strings):
        return found
    if not isinstance(found, str):
        raise ValueError(
            f"{where}: 'prompt' must be a string or a list of messages, each with 'role' and "
            f"'content', got {found!r:.60}"
        )
    return found


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
    return found


def shuffled(seed: int, position: int, size: int) -> list[int]:
    """Which answer is shown first, second, ..: a function of the seed and the item's position."""
    return np.random.default_rng((seed, position)).permutation(size).tolist()


def identity(content: dict[str, Any]) -> str:
    """What the page's progress is kept under: a hash of all that it shows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def write(path: pathlib.Path, title: str, content: dict[str, Any]) -> str:
    """Writes the page of `content` (kind, scale, items) and returns its identity.

    Raises ValueError where the folder is missing or the name is not that of an HTML page.
    """
    if path.suffix != ".html":
        raise ValueError(f"--output {path}: the page is HTML; give it a name that ends in .html")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: {path.parent} is no folder; make it first")
    name = identity(content)
    stem = "verdicts" if content["kind"] == "judge" else "labels"
    data = content | {"hash": name, "file": f"{path.stem}.{stem}.jsonl"}
    style = report.STYLE + (HERE / "page.css").read_text(encoding="utf-8")
    page = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    filled = page.substitute(
        title=html.escape(title), style=style, script=_file("page.js"), data=embedded(data)
    )
    write_atomically(path, filled)
    return name


def embedded(data: Any) -> str:
    """JSON that no HTML parser can end early: ASCII, and without `<`, which ends a script."""
    return json.dumps(data).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
