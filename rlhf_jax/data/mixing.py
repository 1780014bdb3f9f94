"""Datasets to datasets: split by prompt, mixed by weight, packed into full rows."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.data import formats
from rlhf_jax.data.records import Comparisons, Counts, Demonstrations, Examples
from rlhf_jax.data.schema import BadRow


def split(
    rows: Iterable, held_out: float, *, seed: int = 0, format: formats.Format = None
) -> tuple[list, list]:
    """(rows to train on, rows held out), as `batches` take them; no prompt is on both sides.

    About `held_out` of all prompts, 0 to 1, are held out: those whose hash is lowest, whatever file
    or order they come in, so that several files are split alike. Case, white space and Unicode
    forms do not make another prompt. A conversation goes where the user's first turn says: with
    all that it branches into, whatever the system turn. Of plain text all of it counts, so that a
    dialogue written out in one text is another prompt than the same in messages. A faulty row stays
    in the first part, where `on_bad_row` meets it.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1")
    parts: tuple[list, list] = ([], [])
    for number, item in enumerate(rows, 1):
        row, where = item if isinstance(item, tuple) else (item, f"row {number}")
        prompt = _prompt_text(row, where, format)
        if prompt is None:
            parts[0].append((row, where))
            continue
        text = " ".join(unicodedata.normalize("NFKC", prompt).lower().split())
        digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="replace")).digest()
        parts[int.from_bytes(digest[:8], "big") < held_out * 2**64].append((row, where))
    return parts


def _prompt_text(row, where: str, format: formats.Format) -> str | None:
    """What tells prompts apart; None for a row that holds none, however it is read."""
    try:
        example = formats.either(row, where, format)
    except BadRow:
        return None
    if isinstance(example.prompt, str):
        return example.prompt or example.completion
    return next((turn.content for turn in example.prompt if turn.role == "user"), "")


def mix(parts: Sequence[tuple[Examples, float | int]]) -> Examples:
    """One dataset of several of a kind, each with its weight: its share of the rows of an epoch.

    The epoch is the shortest in which every row comes at least once: the rows of a part that is too
    small for its weight come again. Raises ValueError for weights or kinds that do not go together.
    """
    if not parts or any(not weight > 0 for _, weight in parts):
        raise ValueError("a mixture has one part or more, each with a weight above 0")
    kinds = {type(examples[0]).__name__ for examples, _ in parts}
    lengths = {examples[0].tokens.shape[-1] for examples, _ in parts}
    if len(kinds) > 1 or len(lengths) > 1:
        raise ValueError(
            f"parts of {' and '.join(sorted(kinds))} of {sorted(lengths)} tokens do not mix; "
            "tokenise them alike, with the same limits"
        )
    total = sum(weight for _, weight in parts)
    epoch = max(len(examples) * total / weight for examples, weight in parts)
    rows, where, dropped, first = [], [], {}, {}
    for examples, weight in parts:
        count = max(len(examples), round(epoch * weight / total))
        rows += [examples.rows[i % len(examples)] for i in range(count)]
        where += [examples.where[i % len(examples)] for i in range(count)]
        for reason, many in examples.counts.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + many
            first.setdefault(reason, examples.counts.first[reason])
    counts = Counts(len(rows) + sum(dropped.values()), dropped, first)
    collate = parts[0][0].collate
    if isinstance(parts[0][0][0], Comparisons):
        settings = [examples.collate.keywords for examples, _ in parts]
        given = {row[3] is not None for row in rows}
        most = max(one["responses"] for one in settings)
        collate = functools.partial(collate, responses=most, scored=len(given) == 1)
    return Examples(rows, where, counts, collate)


def pack(examples: Examples) -> Examples:
    """Demonstrations with several documents a row, for SFT: the same loss from fewer rows.

    `attend` numbers the documents of a row: none sees another, and positions start again in each.
    First fit, the longest first. A batch of packed rows holds more tokens than one of plain rows;
    scores are read off rows of their own, so a reward model is not centred on packed ones.
    """
    if not isinstance(examples[0], Demonstrations):
        raise ValueError(f"{type(examples[0]).__name__} cannot be packed; pack demonstrations")
    length = len(examples[0].tokens)
    sizes = [_size(row) for row in examples.rows]
    packed: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = np.flatnonzero(np.asarray(room) >= sizes[i])
        if len(fits):
            place = int(fits[0])
        else:
            place = len(packed)
            packed.append([])
            room.append(length)
        packed[place].append(i)
        room[place] -= sizes[i]
    rows = [sum((examples.rows[i] for i in row), ()) for row in packed]
    where = [", ".join(examples.where[i] for i in row) for row in packed]
    return Examples(rows, where, examples.counts, examples.collate)


def utilisation(examples: Examples) -> float:
    """The share of the positions of demonstrations that hold a token, not padding."""
    used = sum(map(_size, examples.rows))
    return used / (len(examples) * len(examples[0].tokens))


def _size(row: tuple) -> int:
    return sum(len(ids) for ids, _ in row)
