"""Examples to token ids, counted once: what `Loader` draws batches from.

Lengths. A prompt takes at most `max_prompt` tokens, BOS included; a response at most
`max_response`, EOS included; plain text has the room of both. P = max_prompt and
T = max_prompt + max_response are static. What does not fit is dropped and counted, never cut.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.data import chat, formats, records, schema
from rlhf_jax.data.loader import Loader as Loader
from rlhf_jax.data.loader import real_rows as real_rows
from rlhf_jax.data.records import Comparisons, Counts, Demonstrations, Examples, Prompts, describe
from rlhf_jax.data.schema import Example
from rlhf_jax.data.tokenizers import Tokenizer

DUPLICATE = "exact duplicate"
SAME_RESPONSES = "chosen equals rejected"
NO_PAIR = "no two ranks differ"
LONG_PROMPT = "prompt over its limit"
LONG_RESPONSE = "response over its limit"
LONG_TEXT = "text over its limit"
FAULTY = "faulty row"

OnBadRow = Literal["error", "drop"]
_ROW = Mapping[str, Any] | tuple[Mapping[str, Any] | str, str]


def demonstrations(
    rows: Iterable[_ROW],
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    format: formats.Format = None,
    on_bad_row: OnBadRow = "error",
    turns: chat.Turns = "last",
) -> Examples:
    """Tokenises rows with a response to imitate; `rows` as `builders.load` or plain dicts.

    Ids: BOS, prompt, completion, EOS; the loss is on completion and EOS, or on all of a plain text
    but the first token, which nothing predicts. Messages are rendered by the tokenizer's chat
    template; `turns="all"` trains every answer of a conversation, which then has the room of both
    limits. Raises ValueError for a faulty row (or drops and counts it) or if no usable row is left.
    """
    _check_limits(max_prompt=max_prompt, max_response=max_response)

    def tokenize(example: Example) -> tuple | str:
        ids, trained = _document(tokenizer, example.prompt, example.completion, turns)
        if not example.prompt or turns == "all" and not isinstance(example.prompt, str):
            long = LONG_TEXT if len(ids) > max_prompt + max_response else None
        else:
            long = _long(trained.index(True), len(ids), max_prompt, max_response)
        return long or ((_ids(ids), np.asarray(trained)),)

    collate = functools.partial(
        records.collate_demonstrations,
        length=max_prompt + max_response,
        pad_id=tokenizer.pad_id,
    )
    reader = _Reader(formats.demonstration, format, on_bad_row, max_prompt + max_response)
    return _examples(rows, tokenizer, reader, tokenize, lambda _: collate)


def comparisons(
    rows: Iterable[_ROW],
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    format: formats.Format = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises rows with K >= 2 ranked or scored responses, of which two must differ in rank.

    A row that ranks a response above an equal one is dropped, for it contradicts itself.
    Each response is BOS, prompt, response, EOS, or a rendered conversation. K is the largest number
    of responses of a row. A row with one response over its limit is dropped whole: a ranking
    without it is another ranking. Raises ValueError for a faulty row (or drops and counts it) or if
    no usable row is left.
    """

    def use(example: Example, ids: list[tuple]) -> str | None:
        ranked = [
            x != y
            for i, (x, rank) in enumerate(zip(ids, example.ranks))
            for y, other in zip(ids[:i], example.ranks)
            if rank != other
        ]
        if not ranked:
            return NO_PAIR if len(set(ids)) > 1 else SAME_RESPONSES
        return None if all(ranked) else SAME_RESPONSES

    reader = _Reader(formats.comparison, format, on_bad_row, max_prompt + max_response)
    return _responses(rows, tokenizer, max_prompt, max_response, reader, use)


def scored(
    rows: Iterable[_ROW],
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    format: formats.Format = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises rows whose K >= 1 responses have scores or labels, as targets of a regression.

    `Comparisons` like those of `comparisons`, but single answers and ties stay in.
    """
    reader = _Reader(formats.annotation, format, on_bad_row, max_prompt + max_response)
    return _responses(rows, tokenizer, max_prompt, max_response, reader, lambda *_: None)


def sampled_comparisons(
    samples: Sequence[tuple[Sequence[np.ndarray], Sequence[int]]], tokenizer: Tokenizer, length: int
) -> Examples:
    """Comparisons of responses that are tokens already: a policy's own samples and their ranks.

    Each sample is (ids of prompt and response for each response, ranks; 0 is best). Nothing is
    appended: a response that was cut off before its EOS stays cut off. Raises ValueError for rows
    longer than `length` or if no usable row is left.
    """
    kept, dropped = [], {}
    for number, (ids, ranks) in enumerate(samples, 1):
        longest = max(len(x) for x in ids)
        if longest > length:
            raise ValueError(f"sample {number} has {longest} tokens, more than length={length}")
        if len({tuple(x.tolist()) for x in ids}) == 1:
            dropped[SAME_RESPONSES] = dropped.get(SAME_RESPONSES, 0) + 1
        elif len(set(ranks)) == 1:
            dropped[NO_PAIR] = dropped.get(NO_PAIR, 0) + 1
        else:
            kept.append((list(ids), tuple(ranks), 0.0, None))
    counts = Counts(len(samples), dropped, dict.fromkeys(dropped, "a sample"))
    if not kept:
        raise ValueError(f"no usable row is left ({describe(counts)}); draw more samples")
    collate = _collate_responses(kept, length, tokenizer)
    return Examples(kept, ["a sample"] * len(kept), counts, collate)


def prompts(
    rows: Iterable[_ROW],
    tokenizer: Tokenizer,
    max_prompt: int,
    *,
    format: formats.Format = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises the prompts of rows: BOS, prompt, or messages up to where the assistant answers.

    What else a {prompt} row holds is left alone. Raises ValueError for a faulty row (or drops and
    counts it) or if no usable row is left.
    """
    _check_limits(max_prompt=max_prompt)

    def tokenize(example: Example) -> tuple | str:
        if isinstance(example.prompt, str):
            ids = tokenizer.encode_prompt(example.prompt)
        else:
            ids = chat.prompt(tokenizer, example.prompt)
        return LONG_PROMPT if len(ids) > max_prompt else (_ids(ids),)

    collate = functools.partial(records.collate_prompts, length=max_prompt, pad_id=tokenizer.pad_id)
    reader = _Reader(formats.prompt, format, on_bad_row, max_prompt)
    return _examples(rows, tokenizer, reader, tokenize, lambda _: collate)


def show(example: Demonstrations | Comparisons | Prompts, tokenizer: Tokenizer) -> str:
    """One example (no batch axis) as text, the part that is trained on between ⟦ and ⟧.

    EOS is written out, padding is not. A comparison is one line for each response, best first.
    """
    match example:
        case Demonstrations(tokens, attend, mask):
            return _marked(tokens[attend > 0], mask[attend > 0], tokenizer)
        case Prompts(tokens, attend, _):
            return _marked(tokens[attend > 0], np.zeros(np.sum(attend > 0)), tokenizer)
        case Comparisons(tokens, attend, ranks, mask, margin, _):
            lines = [f"margin {float(margin):g}"] if margin else []
            for k in np.argsort(np.where(mask > 0, ranks, np.iinfo(np.int32).max), kind="stable"):
                if mask[k] > 0:
                    ids = tokens[k][attend[k] > 0]
                    lines.append(f"rank {ranks[k]}: {_marked(ids, np.zeros(len(ids)), tokenizer)}")
            return "\n".join(lines)


def _marked(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> str:
    # As the first token an EOS id is a BOS (they can be the same).
    ends = [i for i in range(1, len(ids)) if int(ids[i]) in tokenizer.eos_ids]
    turns = (np.flatnonzero(np.diff(mask)) + 1).tolist()
    edges = sorted({0, len(ids), *turns, *ends, *(i + 1 for i in ends)})
    parts, before, inside = [], "", False
    for start, stop in zip(edges, edges[1:]):
        if (mask[start] > 0) != inside:
            parts.append("⟧" if inside else "⟦")
            inside = not inside
        # The difference of two decodings keeps the spaces that decoding a part alone drops.
        text = tokenizer.decode(ids[:stop])
        parts.append("<eos>" if start in ends else text[len(before) :])
        before = text
    return "".join(parts) + "⟧" * inside


def _check_limits(**limits: int) -> None:
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{name}={limit} must be 1 or more tokens")


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _document(
    tokenizer: Tokenizer, prompt: str | tuple, answer: str, turns: chat.Turns = "last"
) -> tuple[list[int], list[bool]]:
    """Ids of prompt, answer and EOS, and which of them are trained."""
    if not isinstance(prompt, str):
        said = schema.Message("assistant", answer)
        return chat.conversation(tokenizer, [*prompt, said], turns)
    ids = tokenizer.encode_prompt(prompt)
    start = len(ids) if prompt else 1
    ids = ids + tokenizer.encode_continuation(prompt, answer) + [tokenizer.eos_ids[0]]
    return ids, [i >= start for i in range(len(ids))]


def _long(start: int, end: int, max_prompt: int, max_response: int) -> str | None:
    if start > max_prompt:
        return LONG_PROMPT
    return LONG_RESPONSE if end - start > max_response else None


def _responses(
    rows: Iterable[_ROW],
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    reader: _Reader,
    use: Callable[[Example, list[tuple]], str | None],
) -> Examples:
    """Rows of K responses; `use` says why one of them is not to be used."""
    _check_limits(max_prompt=max_prompt, max_response=max_response)

    def tokenize(example: Example) -> tuple | str:
        documents = [_document(tokenizer, example.prompt, x) for x in example.responses]
        found = use(example, [tuple(ids) for ids, _ in documents])
        for ids, trained in documents:
            found = found or _long(trained.index(True), len(ids), max_prompt, max_response)
        ranks = example.ranks or (0,) * len(documents)
        kept = [_ids(ids) for ids, _ in documents]
        return found or (kept, ranks, example.margin, example.scores or None)

    def collate(kept: list[tuple]) -> Callable:
        return _collate_responses(kept, max_prompt + max_response, tokenizer)

    return _examples(rows, tokenizer, reader, tokenize, collate)


def _collate_responses(kept: list[tuple], length: int, tokenizer: Tokenizer) -> Callable:
    return functools.partial(
        records.collate_comparisons,
        responses=max(len(ids) for ids, *_ in kept),
        length=length,
        pad_id=tokenizer.pad_id,
        scored=len({scores is None for *_, scores in kept}) == 1,
    )


class _Reader(NamedTuple):
    """How rows become examples. room: the tokens that the longest document may have."""

    parse: Callable[[Any, str, formats.Format], Example]
    format: formats.Format
    on_bad_row: OnBadRow
    room: int


def _examples(
    rows: Iterable[_ROW],
    tokenizer: Tokenizer,
    reader: _Reader,
    tokenize: Callable[[Example], tuple | str],
    collate: Callable[[list[tuple]], Callable],
) -> Examples:
    """Parses, checks and tokenises every row; `tokenize` gives token rows or why it drops one."""
    if reader.on_bad_row not in ("error", "drop"):
        raise ValueError(f"on_bad_row={reader.on_bad_row!r} must be 'error' or 'drop'")
    # More text than this cannot fit whatever its tokens are: megabytes are not tokenised in vain.
    most = 4 * reader.room * max(map(len, tokenizer.backend.get_vocab()))
    kept, wheres, seen = [], [], set()
    dropped: dict[str, int] = {}
    first: dict[str, str] = {}
    total = 0
    for total, item in enumerate(rows, 1):
        row, where = item if isinstance(item, tuple) else (item, f"row {total}")
        note = where
        try:
            example = reader.parse(row, where, reader.format)
            # A digest: the texts themselves need not stay in memory.
            digest = hashlib.blake2b(repr(example).encode(), digest_size=16).digest()
            outcome = DUPLICATE if digest in seen else _oversized(example, most)
            outcome = outcome or tokenize(example)
            seen.add(digest)
        except schema.BadRow as error:
            note = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if reader.on_bad_row == "error":
                raise ValueError(note) from None
            outcome = FAULTY
        if isinstance(outcome, str):
            dropped[outcome] = dropped.get(outcome, 0) + 1
            first.setdefault(outcome, note)
        else:
            kept.append(outcome)
            wheres.append(where)
    counts = Counts(total, dropped, first)
    if not kept:
        raise ValueError(
            f"no usable row is left ({describe(counts)}); raise the limits or check the dataset"
        )
    return Examples(kept, wheres, counts, collate(kept))


def _oversized(example: Example, most: int) -> str | None:
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = "".join(turn.content for turn in prompt)
    if len(prompt) > most:
        return LONG_PROMPT
    if max(map(len, example.responses), default=0) > most:
        return LONG_RESPONSE if prompt else LONG_TEXT
    return None
