"""Tokenises rows of files into datasets, from which `Loader` draws batches. Every row is counted.

A prompt takes at most `max_prompt` tokens, BOS included; a response at most `max_response`, EOS
included; plain text at most the sum of both. The sizes of the arrays, P = max_prompt and
T = max_prompt + max_response, do not depend on the rows. A row that does not fit is dropped and
counted, never cut.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.data import chat, formats, records, schema
from rlhf_jax.data.loader import Loader as Loader
from rlhf_jax.data.loader import expect as expect
from rlhf_jax.data.records import Comparisons as Comparisons
from rlhf_jax.data.records import Counts, Document, Examples, Shape, describe
from rlhf_jax.data.records import Demonstrations as Demonstrations
from rlhf_jax.data.records import Prompts as Prompts
from rlhf_jax.data.records import Steps as Steps
from rlhf_jax.data.records import real_rows as real_rows
from rlhf_jax.data.records import real_tokens as real_tokens
from rlhf_jax.data.schema import Example
from rlhf_jax.data.showing import show as show
from rlhf_jax.data.tokenizers import Tokenizer

# Why a row is dropped.
DUPLICATE = "exact duplicate"
SAME_RESPONSES = "chosen equals rejected"
NO_PAIR = "no two ranks differ"
LONG_PROMPT = "prompt over its limit"
LONG_RESPONSE = "response over its limit"
LONG_TEXT = "text over its limit"
FAULTY = "faulty row"

OnBadRow = Literal["error", "drop"]
_Rows = Iterable[Mapping[str, Any] | tuple[Mapping[str, Any] | str, str]]


def demonstrations(
    rows: _Rows,
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    format: formats.FormatLike = None,
    on_bad_row: OnBadRow = "error",
    turns: chat.Turns = "last",
) -> Examples:
    """Tokenises rows with a response to imitate; `rows` are those of `builders.load`, or dicts.

    A row whose format says that all of its responses are to be imitated counts as one row for each.
    The tokens are BOS, prompt, completion, EOS, and the loss is on completion and EOS. For plain
    text the loss is on all tokens but the first, which nothing predicts. Messages are rendered by
    the tokenizer's chat template; `turns="all"` trains on every answer of a conversation, which may
    then have max_prompt + max_response tokens. Raises ValueError for a faulty row (or drops and
    counts it) or if no usable row is left.
    """
    _check_limits(max_prompt=max_prompt, max_response=max_response)
    length = max_prompt + max_response

    def tokenize(example: Example) -> records.DemonstrationRow | str:
        document = document_of(tokenizer, example.prompt, example.completion, turns)
        if not example.prompt or turns == "all" and not isinstance(example.prompt, str):
            reason = LONG_TEXT if len(document.ids) > length else None
        else:
            reason = _over_limit(document, max_prompt, max_response)
        return reason or records.DemonstrationRow((document,))

    reading = _Reading(formats.demonstration, _without_extra, format, on_bad_row, length)
    reading = reading._replace(parts=formats.demonstrations)
    kept = _tokenised(rows, tokenizer, reading, tokenize)
    return Examples(*kept, Shape(length, tokenizer.pad_id), records.collate_demonstrations)


def comparisons(
    rows: _Rows,
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    format: formats.FormatLike = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises rows with K >= 2 ranked or scored responses, of which two must differ in rank.

    The tokens of each response are BOS, prompt, response, EOS, or a rendered conversation. K is the
    largest number of responses of a row. A row is dropped if it ranks a response above an identical
    one, or if one of its responses is over the limit, because a ranking without that response would
    be a different one. Raises ValueError for a faulty row (or drops and counts it) or if no usable
    row is left.
    """

    def unusable(example: Example, documents: Sequence[Document]) -> str | None:
        ids = [tuple(document.ids.tolist()) for document in documents]
        differ = [
            one != other
            for i, (one, rank) in enumerate(zip(ids, example.ranks))
            for other, other_rank in zip(ids[:i], example.ranks)
            if rank != other_rank
        ]
        if not differ:
            return NO_PAIR if len(set(ids)) > 1 else SAME_RESPONSES
        return None if all(differ) else SAME_RESPONSES

    room = max_prompt + max_response
    reading = _Reading(formats.comparison, _without_extra, format, on_bad_row, room)
    return _responses(rows, tokenizer, max_prompt, max_response, reading, unusable)


def scored(
    rows: _Rows,
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    format: formats.FormatLike = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises rows whose K >= 1 responses have scores or labels, as targets of a regression.

    Gives `Comparisons` as `comparisons` does, but keeps single answers and ties.
    """
    room = max_prompt + max_response
    reading = _Reading(formats.annotation, _without_extra, format, on_bad_row, room)
    return _responses(rows, tokenizer, max_prompt, max_response, reading, _always_usable)


class Sampled(NamedTuple):
    """Responses that a policy drew for one prompt, as token ids, and how good they are."""

    prompt: Sequence[int] | np.ndarray  # without padding
    responses: Sequence[Sequence[int] | np.ndarray]  # each ends with its EOS, unless cut off
    ranks: Sequence[int]  # 0 is best
    scores: Sequence[float] | None = None  # higher is better


def sampled_comparisons(samples: Sequence[Sampled], tokenizer: Tokenizer, length: int) -> Examples:
    """Comparisons of responses that are token ids already: a policy's own samples.

    `length` is T, prompt and response together. Nothing is appended: a response that was cut off
    before its EOS stays cut off. Raises ValueError for a sample without a prompt or longer than
    `length`, or if no usable sample is left.
    """

    def unusable(sample: Sampled) -> str | None:
        if len({tuple(map(int, response)) for response in sample.responses}) == 1:
            return SAME_RESPONSES
        return NO_PAIR if len(set(sample.ranks)) == 1 else None

    return _sampled(samples, tokenizer, length, unusable)


def sampled_scored(samples: Sequence[Sampled], tokenizer: Tokenizer, length: int) -> Examples:
    """What `scored` gives, of responses that are token ids already, as `sampled_comparisons`."""
    return _sampled(samples, tokenizer, length, lambda sample: None)


def _sampled(
    samples: Sequence[Sampled],
    tokenizer: Tokenizer,
    length: int,
    unusable: Callable[[Sampled], str | None],
) -> Examples:
    rows, sources, dropped = [], [], {}
    for number, sample in enumerate(samples, 1):
        prompt, responses = sample.prompt, sample.responses
        longest = len(prompt) + max(len(response) for response in responses)
        if longest > length:
            raise ValueError(f"sample {number} has {longest} tokens, more than length={length}")
        if not len(prompt):
            raise ValueError(f"sample {number} has a prompt of no tokens; {_NO_TOKENS}")
        reason = unusable(sample)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        documents = [
            _document_of_ids(np.concatenate([prompt, response]), len(prompt))
            for response in responses
        ]
        scores = None if sample.scores is None else tuple(sample.scores)
        ranks = tuple(sample.ranks)
        rows.append(records.ComparisonRow(tuple(documents), ranks, scores=scores))
        texts = map(tokenizer.decode, responses)
        sources.append(Example(tokenizer.decode(prompt), tuple(texts), ranks))
    counts = Counts(len(samples), dropped, dict.fromkeys(dropped, "a sample"))
    if not rows:
        raise ValueError(f"no usable row is left ({describe(counts)}); draw more samples")
    shape = records.comparison_shape(rows, length, tokenizer.pad_id)
    where = ["a sample"] * len(rows)
    return Examples(rows, sources, where, counts, shape, records.collate_comparisons)


def prompts(
    rows: _Rows,
    tokenizer: Tokenizer,
    max_prompt: int,
    *,
    max_reference: int | None = None,
    format: formats.FormatLike = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises the prompts of rows: BOS, prompt, or messages up to where the assistant answers.

    With `max_reference` the best response of each row is read too, as `demonstrations` reads it: a
    reference of at most so many tokens, EOS included. The other fields of a row are not tokenised,
    but a reward function can read them: `sources` has the responses, references and other fields of
    each row. Rows are duplicates if their prompts are equal. Raises ValueError for a faulty row (or
    drops and counts it), also one without the reference that is asked for, or if no usable row is
    left.
    """
    _check_limits(max_prompt=max_prompt)
    if max_reference is not None:
        _check_limits(max_reference=max_reference)

    def tokenize(example: Example) -> records.PromptRow | str:
        ids = prompt_ids(tokenizer, example.prompt)
        if len(ids) > max_prompt:
            return LONG_PROMPT
        if max_reference is None:
            return records.PromptRow(_int32(ids))
        reference = _reference(tokenizer, example)
        if len(reference) > max_reference:
            return LONG_RESPONSE
        return records.PromptRow(_int32(ids), reference)

    def used(example: Example) -> Example:
        read = {} if max_reference is None else {"responses": (example.completion,)}
        return Example(example.prompt, language=example.language, **read)

    parse = formats.prompt if max_reference is None else formats.answered
    room = max_prompt + (max_reference or 0)
    reading = _Reading(parse, used, format, on_bad_row, room)
    kept = _tokenised(rows, tokenizer, reading, tokenize)
    shape = Shape(max_prompt, tokenizer.pad_id, reference=max_reference or 0)
    return Examples(*kept, shape, records.collate_prompts)


def steps(
    rows: _Rows,
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    *,
    separator: str = "\n",
    format: formats.FormatLike = None,
    on_bad_row: OnBadRow = "error",
) -> Examples:
    """Tokenises rows that label every step of a response, for a process reward model.

    The tokens are BOS and prompt, and then each step, encoded by itself, with `separator` after it;
    the step's mark is on the last of these. There is no EOS. A response has at most `max_response`
    tokens, separators included. The ids are those of TRL's PRMTrainer, but that a BOS comes only
    where the tokenizer prepends one itself, as it does to what the sampler is fed. Raises
    ValueError for a faulty row (or drops and counts it) or if no usable row is left.
    """
    _check_limits(max_prompt=max_prompt, max_response=max_response)
    between = tokenizer.encode(separator)
    if separator and not between:
        raise ValueError(
            f"separator={separator!r} has no tokens; use another one, none at all (''), or a "
            "tokenizer that knows its characters"
        )

    def tokenize(example: Example) -> records.StepRow | str:
        ids = prompt_ids(tokenizer, example.prompt)
        if len(ids) > max_prompt:
            return LONG_PROMPT
        pieces = [tokenizer.encode(step) for step in example.steps]
        if not all(pieces):
            found = f"'completions[{pieces.index([])}]' has no tokens"
            schema.fail(found, "remove the step, or use a tokenizer that knows its characters")
        pieces = [piece + between for piece in pieces]
        start = len(ids)
        ends = start + np.cumsum([len(piece) for piece in pieces])
        if ends[-1] - start > max_response:
            return LONG_RESPONSE
        ids = _int32([*ids, *itertools.chain(*pieces)])
        return records.StepRow(ids, start, _int32(ends - 1), example.labels)

    length = max_prompt + max_response
    reading = _Reading(formats.judged_steps, _without_extra, format, on_bad_row, length)
    kept = _tokenised(rows, tokenizer, reading, tokenize)
    return Examples(*kept, Shape(length, tokenizer.pad_id), records.collate_steps)


def _reference(tokenizer: Tokenizer, example: Example) -> np.ndarray:
    """The tokens of the best response and its EOS. Raises BadRow where they are EOS alone."""
    document = document_of(tokenizer, example.prompt, example.completion)
    ids = document.ids[document.trained]
    if all(int(x) in tokenizer.eos_ids for x in ids):
        schema.fail("the reference has no tokens but EOS", "give it some text or remove the row")
    return ids


_NO_TOKENS = (
    "a response follows one token or more: give the prompt some text, or use a tokenizer that "
    "starts prompts with a BOS"
)


def _check_limits(**limits: int) -> None:
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{name}={limit} must be 1 or more tokens")


def _check_prompt(size: int) -> None:
    if not size:
        schema.fail("the prompt has no tokens", _NO_TOKENS)


def _int32(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _document_of_ids(ids: Sequence[int] | np.ndarray, start: int) -> Document:
    """A document that is trained from position `start` on."""
    return Document(_int32(ids), np.arange(len(ids)) >= start)


def prompt_ids(tokenizer: Tokenizer, prompt: str | tuple[schema.Message, ...]) -> list[int]:
    """What the sampler is fed: BOS and a text, or messages as the chat template renders them.

    Raises BadRow, a ValueError, where these are no tokens at all.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode_prompt(prompt)
    else:
        ids = chat.prompt(tokenizer, prompt)
    _check_prompt(len(ids))
    return ids


def document_of(
    tokenizer: Tokenizer,
    prompt: str | tuple[schema.Message, ...],
    answer: str,
    turns: chat.Turns = "last",
) -> Document:
    """The tokens of prompt, answer and EOS. Without a prompt the loss is on all but the first.

    Raises BadRow, a ValueError, for a prompt without tokens, and for an answer that the chat
    template leaves empty.
    """
    if not isinstance(prompt, str):
        said = schema.Message("assistant", answer)
        ids, trained = chat.conversation(tokenizer, [*prompt, said], turns)
        document = Document(_int32(ids), np.asarray(trained))
        _check_prompt(int(np.argmax(document.trained)))
        return document
    ids = tokenizer.encode_prompt(prompt)
    start = len(ids) if prompt else 1
    _check_prompt(start)
    ids = ids + tokenizer.encode_continuation(prompt, answer) + [tokenizer.eos_ids[0]]
    return _document_of_ids(ids, start)


def _over_limit(document: Document, max_prompt: int, max_response: int) -> str | None:
    start = int(np.argmax(document.trained))
    if start > max_prompt:
        return LONG_PROMPT
    return LONG_RESPONSE if len(document.ids) - start > max_response else None


def _alone(example: Example) -> tuple[Example, ...]:
    return (example,)


class _Reading(NamedTuple):
    """How the rows of a file become examples."""

    parse: Callable[[Any, formats.FormatLike], Example]
    used: Callable[
        [Example], Example
    ]  # the part that is tokenised; rows equal in it are duplicates
    format: formats.FormatLike
    on_bad_row: OnBadRow
    room: int  # tokens that the longest document may have
    parts: Callable[[Example], tuple[Example, ...]] = _alone  # the examples of a row


def _always_usable(example: Example, documents: Sequence[Document]) -> None:
    del example, documents


def _without_extra(example: Example) -> Example:
    return example._replace(extra={})


def _responses(
    rows: _Rows,
    tokenizer: Tokenizer,
    max_prompt: int,
    max_response: int,
    reading: _Reading,
    unusable: Callable[[Example, Sequence[Document]], str | None],
) -> Examples:
    """Tokenises rows of K responses; `unusable` says why a row is dropped, or None."""
    _check_limits(max_prompt=max_prompt, max_response=max_response)

    def tokenize(example: Example) -> records.ComparisonRow | str:
        documents = [document_of(tokenizer, example.prompt, x) for x in example.responses]
        reason = unusable(example, documents)
        for document in documents:
            reason = reason or _over_limit(document, max_prompt, max_response)
        ranks = example.ranks or (0,) * len(documents)
        return reason or records.ComparisonRow(
            tuple(documents), ranks, example.margin, example.scores or None
        )

    kept = _tokenised(rows, tokenizer, reading, tokenize)
    shape = records.comparison_shape(kept.rows, max_prompt + max_response, tokenizer.pad_id)
    return Examples(*kept, shape, records.collate_comparisons)


class _Kept(NamedTuple):
    """What is left of the rows of a file: the first fields of `Examples`."""

    rows: list[records.TokenRow]
    sources: list[Example]
    where: list[str]
    counts: Counts


def _tokenised(
    rows: _Rows,
    tokenizer: Tokenizer,
    reading: _Reading,
    tokenize: Callable[[Example], records.TokenRow | str],
) -> _Kept:
    """Reads, checks and tokenises every row; `tokenize` gives its tokens or why it is dropped."""
    if reading.on_bad_row not in ("error", "drop"):
        raise ValueError(f"on_bad_row={reading.on_bad_row!r} must be 'error' or 'drop'")
    # A text of more characters cannot fit, whatever its tokens, so it is not tokenised at all.
    max_characters = 4 * reading.room * max(map(len, tokenizer.backend.get_vocab()))
    kept_rows, sources, wheres, seen = [], [], [], set()
    dropped: dict[str, int] = {}
    first: dict[str, str] = {}
    total = 0

    def outcome_of(example: Example) -> records.TokenRow | str:
        used = reading.used(example)
        digest = hashlib.blake2b(repr(used).encode(), digest_size=16).digest()
        outcome = DUPLICATE if digest in seen else _oversized(used, max_characters)
        outcome = outcome or tokenize(used)
        seen.add(digest)
        return outcome

    for row, where in formats.numbered(rows):
        note = where
        try:
            with schema.at(where):
                parts = reading.parts(reading.parse(row, reading.format))
                outcomes = [(part, outcome_of(part)) for part in parts]
        except schema.BadRow as error:
            if reading.on_bad_row == "error":
                raise schema.BadRow(str(error)) from None
            note, outcomes = str(error), [(None, FAULTY)]
        total += len(outcomes)
        for example, outcome in outcomes:
            if isinstance(outcome, str):
                dropped[outcome] = dropped.get(outcome, 0) + 1
                first.setdefault(outcome, note)
            else:
                kept_rows.append(outcome)
                sources.append(example)
                wheres.append(where)
    counts = Counts(total, dropped, first)
    if not kept_rows:
        raise ValueError(
            f"no usable row is left ({describe(counts)}); raise the limits or check the dataset"
        )
    return _Kept(kept_rows, sources, wheres, counts)


def _oversized(example: Example, max_characters: int) -> str | None:
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = "".join(turn.content for turn in prompt)
    if len(prompt) > max_characters:
        return LONG_PROMPT
    if max(map(len, example.responses + example.steps), default=0) > max_characters:
        return LONG_RESPONSE if prompt else LONG_TEXT
    return None
