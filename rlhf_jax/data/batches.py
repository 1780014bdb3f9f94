"""Examples to batches: tokenised and counted once, then drawn with Grain.

Lengths. A prompt takes at most `max_prompt` tokens, BOS included; a response at most
`max_response`, EOS included; plain text has the room of both. P = max_prompt and
T = max_prompt + max_response are static. What does not fit is dropped and counted, never cut.

Order. Batch i is a function of (seed, i) alone: every epoch is one reshuffle of the whole dataset,
batches run on across epochs, and hosts read slices of the same global batch. So the position of a
run is one number, whatever the number of hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.data import formats
from rlhf_jax.data.tokenizers import Tokenizer

DUPLICATE = "exact duplicate"
SAME_RESPONSES = "chosen equals rejected"
NO_PAIR = "no two ranks differ"
LONG_PROMPT = "prompt over its limit"
LONG_RESPONSE = "response over its limit"
LONG_TEXT = "text over its limit"

_ROW = Mapping[str, Any] | tuple[Mapping[str, Any], str]


class Demonstrations(NamedTuple):
    """Completions to imitate, padded on the right. mask: 1 on the completion and its EOS."""

    tokens: Int[Array | np.ndarray, "B T"]
    attend: Int[Array | np.ndarray, "B T"]
    mask: Float[Array | np.ndarray, "B T"]


class Comparisons(NamedTuple):
    """Ranked responses of a prompt, padded on the right.

    ranks: 0 is best. mask: 1 where there is a response; elsewhere every entry but `tokens` is 0.
    """

    tokens: Int[Array | np.ndarray, "B K T"]
    attend: Int[Array | np.ndarray, "B K T"]
    ranks: Int[Array | np.ndarray, "B K"]
    mask: Float[Array | np.ndarray, "B K"]
    margin: Float[Array | np.ndarray, " B"]


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
        return type(batch)(*(field[0] for field in batch))

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


def demonstrations(
    rows: Iterable[_ROW], tokenizer: Tokenizer, max_prompt: int, max_response: int
) -> Examples:
    """Tokenises {prompt, completion} and {text} rows; `rows` as `builders.load` or plain dicts.

    Ids: BOS, prompt, completion, EOS; the loss is on completion and EOS, or on all of a plain text
    but the first token, which nothing predicts. Raises ValueError for a faulty row or if no usable
    row is left.
    """
    _check_limits(max_prompt=max_prompt, max_response=max_response)

    def tokenize(example: formats.Demonstration) -> tuple | str:
        prompt = tokenizer.encode_prompt(example.prompt)
        completion = _completion(tokenizer, example.prompt, example.completion)
        if not example.prompt:
            if len(prompt) + len(completion) > max_prompt + max_response:
                return LONG_TEXT
            return _ids(prompt + completion), 1
        if len(prompt) > max_prompt:
            return LONG_PROMPT
        if len(completion) > max_response:
            return LONG_RESPONSE
        return _ids(prompt + completion), len(prompt)

    collate = functools.partial(
        _collate_demonstrations, length=max_prompt + max_response, pad_id=tokenizer.pad_id
    )
    return _examples(rows, formats.demonstration, tokenize, lambda _: collate)


def comparisons(
    rows: Iterable[_ROW], tokenizer: Tokenizer, max_prompt: int, max_response: int
) -> Examples:
    """Tokenises {prompt, chosen, rejected[, margin]} and {prompt, responses, ranks} rows.

    Each response is BOS, prompt, response, EOS. K is the largest number of responses of a row. A
    row with one response over its limit is dropped whole: a ranking without it is another ranking.
    Raises ValueError for a faulty row or if no usable row is left.
    """
    _check_limits(max_prompt=max_prompt, max_response=max_response)

    def tokenize(example: formats.Comparison) -> tuple | str:
        prompt = tokenizer.encode_prompt(example.prompt)
        ids = [tuple(_completion(tokenizer, example.prompt, x)) for x in example.responses]
        ranked = [
            x != y
            for i, (x, rank) in enumerate(zip(ids, example.ranks))
            for y, other in zip(ids[:i], example.ranks)
            if rank != other
        ]
        if not ranked:
            return NO_PAIR if len(set(ids)) > 1 else SAME_RESPONSES
        if not any(ranked):
            return SAME_RESPONSES
        if len(prompt) > max_prompt:
            return LONG_PROMPT
        if max(len(x) for x in ids) > max_response:
            return LONG_RESPONSE
        return [_ids([*prompt, *x]) for x in ids], example.ranks, example.margin

    def collate(kept: list[tuple]) -> Callable:
        return functools.partial(
            _collate_comparisons,
            responses=max(len(ids) for ids, _, _ in kept),
            length=max_prompt + max_response,
            pad_id=tokenizer.pad_id,
        )

    return _examples(rows, formats.comparison, tokenize, collate)


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
            kept.append((list(ids), tuple(ranks), 0.0))
    counts = Counts(len(samples), dropped, dict.fromkeys(dropped, "a sample"))
    if not kept:
        raise ValueError(f"no usable row is left ({describe(counts)}); draw more samples")
    responses = max(len(ids) for ids, _, _ in kept)
    collate = functools.partial(
        _collate_comparisons, responses=responses, length=length, pad_id=tokenizer.pad_id
    )
    return Examples(kept, ["a sample"] * len(kept), counts, collate)


def prompts(rows: Iterable[_ROW], tokenizer: Tokenizer, max_prompt: int) -> Examples:
    """Tokenises the prompts of {prompt} rows (other fields are left alone): BOS, prompt.

    Raises ValueError for a faulty row or if no usable row is left.
    """
    _check_limits(max_prompt=max_prompt)

    def tokenize(example: formats.Prompt) -> tuple | str:
        ids = tokenizer.encode_prompt(example.prompt)
        return LONG_PROMPT if len(ids) > max_prompt else (_ids(ids),)

    collate = functools.partial(_collate_prompts, length=max_prompt, pad_id=tokenizer.pad_id)
    return _examples(rows, formats.prompt, tokenize, lambda _: collate)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of `examples`: an endless order of reshuffled epochs, addressed by number.

    batch_size: rows of the global batch, over all hosts. With shuffle=False every epoch is in the
    order of the dataset. A batch larger than the dataset holds rows of several epochs. Raises
    ValueError without examples, or for a batch size or a seed out of range.
    """

    examples: Examples
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        if len(self.examples) == 0:
            raise ValueError("there are no examples to draw batches from; check the dataset")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")

    def __len__(self) -> int:
        """Number of batches of one epoch, the last partial one included."""
        return -(-len(self.examples) // self.batch_size)

    def batch(self, i: int) -> Demonstrations | Comparisons | Prompts:
        """Global batch i >= 0, a function of (seed, i)."""
        return self.host_batch(i, host=0, hosts=1)

    def host_batch(self, i: int, host: int, hosts: int) -> Demonstrations | Comparisons | Prompts:
        """The rows of global batch i that `host` of `hosts` reads: one contiguous slice.

        Raises ValueError if the batch does not divide over the hosts.
        """
        if i < 0:
            raise ValueError(f"batch number {i} must be 0 or more")
        return self._pipeline(host, hosts)[i]

    def from_position(
        self, i: int, host: int | None = None, hosts: int | None = None
    ) -> Iterator[Demonstrations | Comparisons | Prompts]:
        """Batches i, i + 1, ... without end, prefetched by a background thread.

        `host` of `hosts` reads its slices; this process of jax's processes unless told otherwise.
        """
        import grain

        if i < 0:
            raise ValueError(f"batch number {i} must be 0 or more")
        pipeline = self._pipeline(*_this_host(host, hosts))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(pipeline[i:].to_iter_dataset(options))

    def epoch_batches(
        self, host: int | None = None, hosts: int | None = None
    ) -> list[Demonstrations | Comparisons | Prompts]:
        """Every example once, in the order of the dataset, in batches of one shape.

        The last batch is filled up with padding rows: attend and mask 0, index -1. `real_rows`
        counts the others. Slices by host as in `from_position`.
        """
        host, hosts = _this_host(host, hosts)
        part = self._slice(host, hosts)
        index = np.arange(len(self) * self.batch_size)
        index = np.where(index < len(self.examples), index, -1).reshape(len(self), self.batch_size)
        return [self.examples.gather(rows[part]) for rows in index]

    def _slice(self, host: int, hosts: int) -> slice:
        if self.batch_size % hosts or not 0 <= host < hosts:
            raise ValueError(
                f"batch_size={self.batch_size} rows cannot be split for host {host} of {hosts}; "
                "use a multiple of the number of hosts, which count from 0"
            )
        rows = self.batch_size // hosts
        return slice(host * rows, (host + 1) * rows)

    def _pipeline(self, host: int, hosts: int):
        import grain

        part = self._slice(host, hosts)
        count = len(self.examples)

        def gather(i: int, rows: np.ndarray):
            # 64 bits: positions of a long run pass 2^31.
            epoch = (i * self.batch_size + np.arange(self.batch_size, dtype=np.int64)) // count
            return self.examples.gather((rows + count * (epoch - epoch[0]))[part])

        order = grain.MapDataset.range(count)
        if self.shuffle:
            # Grain shuffles epoch e by seed + e, so seeds 0 and 1 would share all epochs but one:
            # spread the seeds first.
            spread = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
            order = order.shuffle(seed=spread)
        return order.repeat().batch(self.batch_size).map_with_index(gather)


def real_rows(batch: Demonstrations | Comparisons | Prompts) -> int:
    """Number of rows of a batch that are examples, not padding."""
    attend = np.asarray(batch.attend)
    return int(np.any(attend.reshape(len(attend), -1) > 0, axis=1).sum())


def show(example: Demonstrations | Comparisons | Prompts, tokenizer: Tokenizer) -> str:
    """One example (no batch axis) as text, the part that is trained on between ⟦ and ⟧.

    EOS is written out, padding is not. A comparison is one line for each response, best first.
    """
    match example:
        case Demonstrations(tokens, attend, mask):
            return _marked(tokens[attend > 0], mask[attend > 0], tokenizer)
        case Prompts(tokens, attend, _):
            return _marked(tokens[attend > 0], np.zeros(np.sum(attend > 0)), tokenizer)
        case Comparisons(tokens, attend, ranks, mask, margin):
            lines = [f"margin {float(margin):g}"] if margin else []
            for k in np.argsort(np.where(mask > 0, ranks, np.iinfo(np.int32).max), kind="stable"):
                if mask[k] > 0:
                    ids = tokens[k][attend[k] > 0]
                    lines.append(f"rank {ranks[k]}: {_marked(ids, np.zeros(len(ids)), tokenizer)}")
            return "\n".join(lines)


def _marked(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> str:
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    parts = []
    for start, stop in zip(edges, edges[1:]):
        # The difference of two decodings keeps the spaces that decoding a part alone drops.
        text = tokenizer.decode(ids[:stop])[len(tokenizer.decode(ids[:start])) :]
        # As the first token an EOS id is a BOS (they can be the same).
        ends = sum(int(i) in tokenizer.eos_ids for i in ids[max(start, 1) : stop])
        text += "<eos>" * ends
        parts.append(f"⟦{text}⟧" if start < len(ids) and mask[start] > 0 else text)
    return "".join(parts)


def _this_host(host: int | None, hosts: int | None) -> tuple[int, int]:
    if host is None or hosts is None:
        import jax

        return jax.process_index(), jax.process_count()
    return host, hosts


def _check_limits(**limits: int) -> None:
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{name}={limit} must be 1 or more tokens")


def _completion(tokenizer: Tokenizer, prompt: str, completion: str) -> list[int]:
    return tokenizer.encode_continuation(prompt, completion) + [tokenizer.eos_ids[0]]


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _examples(
    rows: Iterable[_ROW],
    parse: Callable[[Mapping[str, Any], str], tuple],
    tokenize: Callable[[Any], tuple | str],
    collate: Callable[[list[tuple]], Callable],
) -> Examples:
    """Parses, checks and tokenises every row; `tokenize` gives token rows or why it drops one."""
    kept, wheres, seen = [], [], set()
    dropped: dict[str, int] = {}
    first: dict[str, str] = {}
    total = 0
    for total, item in enumerate(rows, 1):
        row, where = item if isinstance(item, tuple) else (item, f"row {total}")
        example = parse(row, where)
        # A digest: the texts themselves need not stay in memory.
        digest = hashlib.blake2b(repr(example).encode(), digest_size=16).digest()
        outcome = DUPLICATE if digest in seen else tokenize(example)
        seen.add(digest)
        if isinstance(outcome, str):
            dropped[outcome] = dropped.get(outcome, 0) + 1
            first.setdefault(outcome, where)
        else:
            kept.append(outcome)
            wheres.append(where)
    counts = Counts(total, dropped, first)
    if not kept:
        raise ValueError(
            f"no usable row is left ({describe(counts)}); raise the limits or check the dataset"
        )
    return Examples(kept, wheres, counts, collate(kept))


def _collate_demonstrations(rows, index, *, length: int, pad_id: int) -> Demonstrations:
    del index
    tokens = np.full((len(rows), length), pad_id, np.int32)
    attend = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        if row is not None:
            ids, start = row
            tokens[b, : len(ids)] = ids
            attend[b, : len(ids)] = 1
            mask[b, start : len(ids)] = 1
    return Demonstrations(tokens, attend, mask)


def _collate_comparisons(rows, index, *, responses: int, length: int, pad_id: int) -> Comparisons:
    del index
    tokens = np.full((len(rows), responses, length), pad_id, np.int32)
    attend = np.zeros((len(rows), responses, length), np.int32)
    ranks = np.zeros((len(rows), responses), np.int32)
    mask = np.zeros((len(rows), responses), np.float32)
    margin = np.zeros(len(rows), np.float32)
    for b, row in enumerate(rows):
        if row is not None:
            all_ids, all_ranks, margin[b] = row
            ranks[b, : len(all_ranks)] = all_ranks
            mask[b, : len(all_ids)] = 1
            for k, ids in enumerate(all_ids):
                tokens[b, k, : len(ids)] = ids
                attend[b, k, : len(ids)] = 1
    return Comparisons(tokens, attend, ranks, mask, margin)


def _collate_prompts(rows, index, *, length: int, pad_id: int) -> Prompts:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    attend = np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        if row is not None:
            (ids,) = row
            tokens[b, length - len(ids) :] = ids
            attend[b, length - len(ids) :] = 1
    return Prompts(tokens, attend, index.astype(np.int32))
