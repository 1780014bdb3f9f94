"""Tokenised datasets, and the batches of arrays that training reads of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.data.schema import Example


class Ends(NamedTuple):
    """How a response ends: any of `eos_ids` stops it, and `pad_id` (no EOS) fills the row after it.

    Comes from the tokenizer: `tokenizer.ends`.
    """

    eos_ids: tuple[int, ...]
    pad_id: int


# Batches.


class Demonstrations(NamedTuple):
    """Completions to imitate, each after its prompt, padded on the right."""

    tokens: Int[Array | np.ndarray, "B T"]
    attend: Int[Array | np.ndarray, "B T"]  # 1, 2, ... numbers the documents of a row; 0 on padding
    mask: Float[Array | np.ndarray, "B T"]  # 1 on the completion's tokens and its EOS


class Comparisons(NamedTuple):
    """Prompts with K ranked responses each; a response follows its prompt in a row of T tokens.

    Rows are padded on the right. A prompt with fewer than K responses has absent ones: `present` is
    0 there, `tokens` is all padding, and every other entry is 0.
    """

    tokens: Int[Array | np.ndarray, "B K T"]
    attend: Int[Array | np.ndarray, "B K T"]  # 1 on every real token, prompt and response
    mask: Float[Array | np.ndarray, "B K T"]  # 1 on the response's own tokens and its EOS
    ranks: Int[Array | np.ndarray, "B K"]  # lower is better; equal ranks are ties
    present: Float[Array | np.ndarray, "B K"]  # 1 where there is a response
    margin: Float[Array | np.ndarray, " B"]  # how much higher the better of two should score
    # As the rows give them, or else from 1 for the best rank down to 0 for the worst. None where
    # only some rows of the dataset give any: no regression can be trained on these.
    scores: Float[Array | np.ndarray, "B K"] | None = None


class Prompts(NamedTuple):
    """What is to be continued, padded on the left."""

    tokens: Int[Array | np.ndarray, "B P"]
    attend: Int[Array | np.ndarray, "B P"]  # 1 on every real token
    # The prompt's number in the dataset, -1 on padding rows. In a batch that runs into the next
    # epoch, that epoch's numbers have the dataset's length added (twice in the one after), so that
    # a prompt drawn twice has two numbers. Its source is always
    # `examples.sources[index % len(examples)]`.
    index: Int[Array | np.ndarray, " B"]
    # A right answer to each prompt, EOS included, padded on the right; None where none was read.
    references: Int[Array | np.ndarray, "B R"] | None = None
    reference_lengths: Int[Array | np.ndarray, " B"] | None = None  # 0 on padding rows
    heat: Float[Array, " B"] | None = None  # what the temperature is multiplied by; None: nothing


class Steps(NamedTuple):
    """Responses whose steps are labelled, each after its prompt, padded on the right."""

    tokens: Int[Array | np.ndarray, "B T"]
    attend: Int[Array | np.ndarray, "B T"]  # 1 on every real token
    marks: Float[Array | np.ndarray, "B T"]  # 1 on the last token of each step
    labels: Float[Array | np.ndarray, "B T"]  # at the marks, from 0 (wrong) to 1 (right); else 0
    parts: Int[Array | np.ndarray, "B T"]  # 1, 2, ... on the tokens of each step; else 0


Batch = Demonstrations | Comparisons | Prompts | Steps


def real_rows(batch: Batch) -> int:
    """Number of rows of a batch on the host that are examples, not padding."""
    attend = np.asarray(batch.attend)
    return int(np.any(attend.reshape(len(attend), -1) > 0, axis=1).sum())


def real_tokens(batch: Batch) -> int:
    """Number of tokens of a batch on the host that are not padding: prompts and responses."""
    return int(np.count_nonzero(np.asarray(batch.attend) > 0))


# Tokenised rows, before they are padded to a batch.


class Document(NamedTuple):
    """One text as tokens: a prompt and what follows it, or plain text."""

    ids: Int[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]  # tokens that the loss is on: the `mask` of a batch


class DemonstrationRow(NamedTuple):
    """One document, or several that `mixing.pack` put into one row."""

    documents: tuple[Document, ...]


class ComparisonRow(NamedTuple):
    """The responses to one prompt, each a document with the prompt in front."""

    documents: tuple[Document, ...]
    ranks: tuple[int, ...]
    margin: float = 0.0
    scores: tuple[float, ...] | None = None  # None where the row gives none


class PromptRow(NamedTuple):
    """A prompt as tokens, and an answer to it with EOS."""

    ids: Int[np.ndarray, " P"]
    reference: Int[np.ndarray, " R"] | None = None


class StepRow(NamedTuple):
    """A prompt and the steps that follow it, as tokens."""

    ids: Int[np.ndarray, " T"]
    start: int  # where the first step begins
    ends: Int[np.ndarray, " N"]  # where the last token of each step is
    labels: tuple[float, ...]  # of each step


TokenRow = DemonstrationRow | ComparisonRow | PromptRow | StepRow


class Shape(NamedTuple):
    """What all batches of a dataset have in common."""

    length: int  # T of demonstrations, comparisons and steps, P of prompts
    pad_id: int
    responses: int = 1  # K of comparisons
    scored: bool = False  # whether comparisons have scores
    reference: int = 0  # R, the longest reference of a prompt; 0 where there are none


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many rows were read, and how many were dropped for which reason."""

    rows: int
    dropped: dict[str, int]  # reason -> number of rows
    first: dict[str, str]  # reason -> where the first of them stands, or its fault

    @property
    def kept(self) -> int:
        """How many rows are left."""
        return self.rows - sum(self.dropped.values())


@dataclasses.dataclass(frozen=True)
class Examples:
    """A tokenised dataset. `examples[i]` is a batch of row i alone, without its batch axis."""

    rows: list[TokenRow] = dataclasses.field(repr=False)
    # What each row was read from; of a packed row, a tuple of what its documents were read from.
    sources: list[Example | tuple[Example, ...]] = dataclasses.field(repr=False)
    where: list[str] = dataclasses.field(repr=False)  # file and line of each row
    counts: Counts
    shape: Shape
    # (rows, None standing for a padding row; their numbers [B]; shape) -> batch
    collate: Callable[..., Batch] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Batch:
        position = range(len(self.rows))[i]
        batch = self.gather(np.array([position]))
        return type(batch)(*(None if field is None else field[0] for field in batch))

    @property
    def kind(self) -> type:
        """The type of the batches: Demonstrations, Comparisons, Prompts or Steps."""
        return type(self[0])

    def fingerprint(self) -> str:
        """A hash of all rows and of their shape, to tell whether two hosts have the same data."""
        digest = hashlib.blake2b(repr(self.shape).encode(), digest_size=8)
        for row in self.rows:
            # An array's own text leaves out the middle of long ones.
            arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(row)]
            digest.update(repr(arrays).encode())
        return digest.hexdigest()

    def first(self, count: int | None) -> Examples:
        """The first so many rows, or all of them."""
        parts = {name: vars(self)[name][:count] for name in ("rows", "sources", "where")}
        return dataclasses.replace(self, **parts)

    def gather(self, index: Int[np.ndarray, " B"]) -> Batch:
        """The batch of rows `index` [B], modulo the number of rows; -1 is a padding row."""
        rows = [None if i < 0 else self.rows[i % len(self.rows)] for i in index.tolist()]
        return self.collate(rows, index, self.shape)


def describe(counts: Counts) -> str:
    """One line for people: how many rows were read, kept and dropped, and why."""
    reasons = ", ".join(
        f"{count} {reason} (first: {counts.first[reason]})"
        for reason, count in sorted(counts.dropped.items())
    )
    dropped = f", {counts.rows - counts.kept} dropped: {reasons}" if reasons else ", none dropped"
    return f"{counts.rows} rows, {counts.kept} kept{dropped}"


# Tokenised rows to a batch. None stands for a row of padding.


def collate_demonstrations(
    rows: Sequence[DemonstrationRow | None], index: Int[np.ndarray, " B"], shape: Shape
) -> Demonstrations:
    """Lays the documents of each row one after the other and numbers them from 1 in `attend`."""
    del index
    size = (len(rows), shape.length)
    tokens = np.full(size, shape.pad_id, np.int32)
    attend, mask = np.zeros(size, np.int32), np.zeros(size, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, trained) in enumerate(row.documents if row else (), 1):
            part = slice(start, start + len(ids))
            tokens[b, part], attend[b, part], mask[b, part] = ids, number, trained
            start += len(ids)
    return Demonstrations(tokens, attend, mask)


def collate_comparisons(
    rows: Sequence[ComparisonRow | None], index: Int[np.ndarray, " B"], shape: Shape
) -> Comparisons:
    """Pads every row to K responses of T tokens; ranks stand in for scores that rows lack."""
    del index
    size = (len(rows), shape.responses)
    tokens = np.full((*size, shape.length), shape.pad_id, np.int32)
    attend, mask = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
    ranks, present = np.zeros(size, np.int32), np.zeros(size, np.float32)
    margin, scores = np.zeros(len(rows), np.float32), np.zeros(size, np.float32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        count = len(row.documents)
        ranks[b, :count], present[b, :count], margin[b] = row.ranks, 1, row.margin
        scores[b, :count] = rating(row.ranks) if row.scores is None else row.scores
        for k, (ids, trained) in enumerate(row.documents):
            part = slice(0, len(ids))
            tokens[b, k, part], attend[b, k, part], mask[b, k, part] = ids, 1, trained
    return Comparisons(
        tokens, attend, mask, ranks, present, margin, scores if shape.scored else None
    )


def rating(ranks: Sequence[int]) -> Float[np.ndarray, " K"]:
    """Ranks as scores between 1 for the best and 0 for the worst: (max - rank) / (max - min).

    Where all ranks are equal, every response gets 1.
    """
    ranks = np.asarray(ranks, np.float64)
    spread = ranks.max() - ranks.min()
    return (ranks.max() - ranks) / spread if spread else np.ones_like(ranks)


def comparison_shape(rows: Sequence[ComparisonRow], length: int, pad_id: int) -> Shape:
    """K is the most responses of any row; scored if all rows give scores, or none does."""
    responses = max(len(row.documents) for row in rows)
    scored = len({row.scores is None for row in rows}) == 1
    return Shape(length, pad_id, responses, scored)


def collate_prompts(
    rows: Sequence[PromptRow | None], index: Int[np.ndarray, " B"], shape: Shape
) -> Prompts:
    """Pads prompts on the left and references on the right, and keeps the prompts' numbers."""
    tokens = np.full((len(rows), shape.length), shape.pad_id, np.int32)
    attend = np.zeros((len(rows), shape.length), np.int32)
    references = np.full((len(rows), shape.reference), shape.pad_id, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        start = shape.length - len(row.ids)
        tokens[b, start:], attend[b, start:] = row.ids, 1
        if shape.reference:
            lengths[b] = len(row.reference)
            references[b, : lengths[b]] = row.reference
    found = Prompts(tokens, attend, index.astype(np.int32))
    return (
        found._replace(references=references, reference_lengths=lengths)
        if shape.reference
        else found
    )


def collate_steps(
    rows: Sequence[StepRow | None], index: Int[np.ndarray, " B"], shape: Shape
) -> Steps:
    """Pads rows on the right, and puts the label of each step on its last token."""
    del index
    size = (len(rows), shape.length)
    tokens = np.full(size, shape.pad_id, np.int32)
    attend, parts = np.zeros((2, *size), np.int32)
    marks, labels = np.zeros((2, *size), np.float32)
    for b, row in enumerate(rows):
        if row is not None:
            whole = slice(0, len(row.ids))
            tokens[b, whole], attend[b, whole] = row.ids, 1
            marks[b, row.ends], labels[b, row.ends] = 1, row.labels
            lengths = np.diff(row.ends, prepend=row.start - 1)
            parts[b, row.start : len(row.ids)] = np.repeat(1 + np.arange(len(lengths)), lengths)
    return Steps(tokens, attend, marks, labels, parts)
