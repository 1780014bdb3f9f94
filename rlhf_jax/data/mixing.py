"""Datasets made of other datasets: split by prompt, mixed by weight, packed into fuller rows."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.data import formats, records
from rlhf_jax.data.records import (
    Comparisons,
    Counts,
    DemonstrationRow,
    Demonstrations,
    Examples,
)
from rlhf_jax.data.schema import BadRow, Row


def split(
    rows: Iterable, held_out: float, *, seed: int = 0, format: formats.FormatLike = None
) -> tuple[list, list]:
    """(rows to train on, rows held out), as `batches` takes them; no prompt is on both sides.

    About the share `held_out` of all prompts, between 0 and 1, is held out: those with the lowest
    hashes, whatever file or order they come in, so that several files are split alike. Prompts that
    differ only in case, white space or Unicode form are the same prompt. A conversation is assigned
    by the user's first turn, so that all its continuations are on one side, whatever the system
    turn. Plain text is assigned by the whole text, so that a dialogue written out as one text can
    be on another side than the same dialogue as messages. A faulty row stays in the first part,
    where `on_bad_row` decides about it.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1")
    parts: tuple[list, list] = ([], [])
    for row, where in formats.numbered(rows):
        prompt = _prompt_text(row, format)
        if prompt is None:
            parts[0].append((row, where))
            continue
        text = " ".join(unicodedata.normalize("NFKC", prompt).lower().split())
        digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="replace")).digest()
        is_held_out = int.from_bytes(digest[:8], "big") < held_out * 2**64
        parts[is_held_out].append((row, where))
    return parts


def _prompt_text(row: Row | str, format: formats.FormatLike) -> str | None:
    """The text by which a row is assigned; None for a row of which no prompt can be read."""
    try:
        example = formats.either(row, format)
    except BadRow:
        return None
    if isinstance(example.prompt, str):
        return example.prompt or example.completion
    return next((turn.content for turn in example.prompt if turn.role == "user"), "")


def mix(parts: Sequence[tuple[Examples, float | int]], *, seed: int = 0) -> Examples:
    """Mixes datasets of one kind; a weight sets the share of a dataset in the rows of an epoch.

    The epoch is the shortest in which every row comes at least once. The rows of a part that is too
    small for its weight are repeated, each equally often or once more; `seed` draws which ones come
    once more. Raises ValueError for weights or parts that do not go together.
    """
    if not parts or any(not weight > 0 for _, weight in parts):
        raise ValueError("a mixture has one part or more, each with a weight above 0")
    first = parts[0][0]
    kinds = {examples.kind.__name__ for examples, _ in parts}
    lengths = {examples.shape.length for examples, _ in parts}
    if len(kinds) > 1 or len(lengths) > 1:
        raise ValueError(
            f"parts of {' and '.join(sorted(kinds))} of {sorted(lengths)} tokens do not mix; "
            "tokenise them alike, with the same limits"
        )
    total = sum(weight for _, weight in parts)
    epoch = max(len(examples) * total / weight for examples, weight in parts)
    rows, sources, where = [], [], []
    dropped: dict[str, int] = {}
    firsts: dict[str, str] = {}
    for number, (examples, weight) in enumerate(parts):
        count = max(len(examples), round(epoch * weight / total))
        for i in _repeated(len(examples), count, (seed, number)):
            rows.append(examples.rows[i])
            sources.append(examples.sources[i])
            where.append(examples.where[i])
        for reason, many in examples.counts.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + many
            firsts.setdefault(reason, examples.counts.first[reason])
    counts = Counts(len(rows) + sum(dropped.values()), dropped, firsts)
    shape = first.shape
    if first.kind is Comparisons:
        shape = records.comparison_shape(rows, shape.length, shape.pad_id)
    return Examples(rows, sources, where, counts, shape, first.collate)


def _repeated(size: int, count: int, seed: tuple[int, int]) -> list[int]:
    """`count` numbers below `size`; how often any two of them occur differs by 1 at most."""
    whole, more = divmod(count, size)
    drawn = np.random.default_rng(seed).permutation(size)[:more]
    return [*range(size)] * whole + sorted(drawn.tolist())


def pack(examples: Examples) -> Examples:
    """Demonstrations with several documents per row, for SFT: the same loss from fewer rows.

    `attend` numbers the documents of a row: none attends to another, and positions start again in
    each. Documents are placed from the longest to the shortest, each in the first row with room for
    it. A batch of packed rows holds more tokens than one of plain rows. A reward model reads one
    score from each row, so do not centre it on packed rows.
    """
    if examples.kind is not Demonstrations:
        raise ValueError(f"{examples.kind.__name__} cannot be packed; pack demonstrations")
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
            room.append(examples.shape.length)
        packed[place].append(i)
        room[place] -= sizes[i]
    rows = [
        DemonstrationRow(tuple(document for i in row for document in examples.rows[i].documents))
        for row in packed
    ]
    sources = [tuple(examples.sources[i] for i in row) for row in packed]
    where = [", ".join(examples.where[i] for i in row) for row in packed]
    return dataclasses.replace(examples, rows=rows, sources=sources, where=where)


def utilisation(examples: Examples) -> float:
    """The share of the positions of demonstrations that hold a token rather than padding."""
    used = sum(map(_size, examples.rows))
    return used / (len(examples) * examples.shape.length)


def _size(row: DemonstrationRow) -> int:
    return sum(len(document.ids) for document in row.documents)
