"""Tokenised datasets, the batches that training reads of them, and how rows are laid out in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int


class Demonstrations(NamedTuple):
    """Completions to imitate, padded on the right. mask: 1 on the completion and its EOS.

    attend: 1, 2, ... counts the documents packed into a row, 0 on padding.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    attend: Int[Array | np.ndarray, "B T"]
    mask: Float[Array | np.ndarray, "B T"]


class Comparisons(NamedTuple):
    """Ranked responses of a prompt, padded on the right.

    ranks: 0 is best. mask: 1 where there is a response; elsewhere every entry but `tokens` is 0.
    scores: as the rows give them, or else 1 for the best rank down to 0 for the worst; None where
    only some rows of the dataset give any, which no regression can be trained on.
    """

    tokens: Int[Array | np.ndarray, "B K T"]
    attend: Int[Array | np.ndarray, "B K T"]
    ranks: Int[Array | np.ndarray, "B K"]
    mask: Float[Array | np.ndarray, "B K"]
    margin: Float[Array | np.ndarray, " B"]
    scores: Float[Array | np.ndarray, "B K"] | None = None


class Prompts(NamedTuple):
    """What to continue, padded on the left.

    index: the prompt's number in the dataset, -1 on padding rows. A batch that runs into the next
    epoch adds the dataset's length there (twice in the one after), so that a prompt drawn twice in
    a batch has two numbers; `index % len(examples)` is its row always.
    """

    tokens: Int[Array | np.ndarray, "B P"]
    attend: Int[Array | np.ndarray, "B P"]
    index: Int[Array | np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the rows. dropped: reason -> how many; first: reason -> the first of them."""

    rows: int
    dropped: dict[str, int]
    first: dict[str, str]

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())


@dataclasses.dataclass(frozen=True)
class Examples:
    """A tokenised dataset. `examples[i]` is one record without its batch axis.

    rows: token ids (and ranks) of each example; where: file and line of each; collate: rows and
    their numbers to one batch, with None for a padding row.
    """

    rows: list[tuple] = dataclasses.field(repr=False)
    where: list[str] = dataclasses.field(repr=False)
    counts: Counts
    collate: Callable = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Demonstrations | Comparisons | Prompts:
        position = range(len(self.rows))[i]
        batch = self.gather(np.array([position]))
        return type(batch)(*(None if field is None else field[0] for field in batch))

    def gather(self, index: Int[np.ndarray, " B"]) -> Demonstrations | Comparisons | Prompts:
        """The batch of rows `index` [B], modulo the number of examples; -1 is a padding row."""
        rows = [None if i < 0 else self.rows[i % len(self.rows)] for i in index.tolist()]
        return self.collate(rows, index)


def describe(counts: Counts) -> str:
    """One line for people: how many rows were read, kept and dropped, and why."""
    reasons = ", ".join(
        f"{count} {reason} (first: {counts.first[reason]})"
        for reason, count in sorted(counts.dropped.items())
    )
    dropped = f", {counts.rows - counts.kept} dropped: {reasons}" if reasons else ", none dropped"
    return f"{counts.rows} rows, {counts.kept} kept{dropped}"


def collate_demonstrations(rows, index, *, length: int, pad_id: int) -> Demonstrations:
    """Rows are tuples of documents (ids, trained), numbered from 1 in `attend`; None is padding."""
    del index
    tokens = np.full((len(rows), length), pad_id, np.int32)
    attend = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, trained) in enumerate(row or (), 1):
            part = slice(start, start + len(ids))
            tokens[b, part], attend[b, part], mask[b, part] = ids, number, trained
            start += len(ids)
    return Demonstrations(tokens, attend, mask)


def collate_comparisons(
    rows, index, *, responses: int, length: int, pad_id: int, scored: bool
) -> Comparisons:
    """Rows are (ids of each response, ranks, margin, scores or None); None is padding."""
    del index
    tokens = np.full((len(rows), responses, length), pad_id, np.int32)
    attend = np.zeros((len(rows), responses, length), np.int32)
    ranks = np.zeros((len(rows), responses), np.int32)
    mask = np.zeros((len(rows), responses), np.float32)
    margin = np.zeros(len(rows), np.float32)
    scores = np.zeros((len(rows), responses), np.float32)
    for b, row in enumerate(rows):
        if row is not None:
            all_ids, all_ranks, margin[b], all_scores = row
            ranks[b, : len(all_ranks)] = all_ranks
            mask[b, : len(all_ids)] = 1
            if all_scores is None:
                all_scores = 1 - np.asarray(all_ranks) / max(all_ranks)
            scores[b, : len(all_scores)] = all_scores
            for k, ids in enumerate(all_ids):
                tokens[b, k, : len(ids)] = ids
                attend[b, k, : len(ids)] = 1
    return Comparisons(tokens, attend, ranks, mask, margin, scores if scored else None)


def collate_prompts(rows, index, *, length: int, pad_id: int) -> Prompts:
    """Rows are (ids,); None is padding."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    attend = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        if row is not None:
            (ids,) = row
            tokens[b, length - len(ids) :] = ids
            attend[b, length - len(ids) :] = 1
    return Prompts(tokens, attend, index.astype(np.int32))
