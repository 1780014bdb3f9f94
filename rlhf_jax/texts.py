"""Text in, text out: what a model answers, and how likely it finds an answer.

    model, tokenizer = folders.load("my-llama")
    asked = ["Why is the sky blue?", "Why is the sea?"]
    answers = texts.generate(model, tokenizer, asked, Sampling(max_new_tokens=64))
    likely = texts.search(model, tokenizer, asked, Beam(beams=4, max_new_tokens=64))
    nats = texts.logprobs(model, tokenizer, asked, answers)

A prompt is a text, or a list of messages with `role` and `content`. Where the tokenizer has a chat
template, a text is rendered as one turn of a user, as training renders the prompts of your own
files; with `raw_prompts` it is fed as it stands. The empty text is no turn: nothing but BOS.

What runs on the device is compiled here. Rows are padded to powers of two and batches filled up, so
that one program for each width serves every call with the same `batch_size`. A model on a mesh
stays there, and the rows of a batch are divided over it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from rlhf_jax import config, sharding, sizes
from rlhf_jax.data import batches, schema
from rlhf_jax.data.schema import Message
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import beam, decode, diverse
from rlhf_jax.sampling.beam import Beam
from rlhf_jax.sampling.decode import Guide
from rlhf_jax.sampling.diverse import DiverseBeam
from rlhf_jax.sampling.settings import Sampling, check_vocabulary
from rlhf_jax.training.metrics import Display, Log

Prompt = str | Sequence[Message | Mapping[str, str]]  # a text, or messages

MIN_WIDTH = 32  # tokens; shorter rows are padded to this width
CONTEXT = 16  # tokens at the end of the prompt that are decoded together with the answer
DEFAULTS = Sampling()


Samples = Annotated[int, config.Range(1, 1_000_000)]  # answers to one prompt


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = DEFAULTS,
    *,
    guide: Guide | None = None,
    seed: int = 0,
    num_samples: int = 1,
    batch_size: int = 16,
    raw_prompts: bool = False,
    progress: bool = True,
) -> list[str]:
    """Samples `num_samples` answers to each prompt; those to one prompt follow each other.

    N prompts -> N * num_samples texts, in which EOS is left out; no prompts give []. Sample k of
    prompt i is a function of (seed, i, k) and of the prompt. The other prompts do not change it,
    and neither does `batch_size`, the number of answers that are drawn together. A `guide` tilts
    the model by action values (see `q_learning`). `progress` shows how many batches are done; the
    first one waits for the compiler.

    Raises ValueError, naming the prompt by its number from 0, where it has no tokens or leaves no
    room for `sampling.max_new_tokens`, for messages without a chat template, where the mesh of the
    model does not divide the batch, and for numbers that are out of range.
    """
    config.check_field("seed", seed, config.Seed)
    config.check_field("num_samples", num_samples, Samples)
    sizes.check_drawn("batch_size", batch_size, sampling.max_new_tokens, model.config)
    check_vocabulary(sampling, model.config.vocab_size)
    ids, asked = _read(model, tokenizer, prompts, sampling, raw_prompts)
    rows = [
        (*one, np.int32(i), np.int32(k)) for i, one in enumerate(asked) for k in range(num_samples)
    ]
    root = jax.random.key(seed)
    program = functools.partial(_answers, model, guide, sampling, root, ends=tokenizer.ends)
    found = _in_batches("answers", program, rows, batch_size, model, progress)
    return [_said(tokenizer, ids[i // num_samples], *one) for i, one in enumerate(found)]


def search(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Beam,
    *,
    batch_size: int = 16,
    raw_prompts: bool = False,
    progress: bool = True,
) -> list[str]:
    """The `settings.num_return` best answers to each prompt that a beam search finds, best first.

    N prompts -> N * num_return texts, as from `generate`; see `sampling.beam`. `batch_size` counts
    prompts. Raises ValueError as `generate` does, and for more beams than tokens.
    """
    ids, rows = _read(model, tokenizer, prompts, settings, raw_prompts)
    program = functools.partial(_hypotheses, model, settings, ends=tokenizer.ends)
    found = _in_batches("searches", program, rows, batch_size, model, progress)
    return [_said(tokenizer, i, *one) for i, several in zip(ids, found) for one in zip(*several)]


def _read(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | Beam,
    raw_prompts: bool,
) -> tuple[list[list[int]], list[Padded]]:
    """The ids of the prompts, as they are and padded."""
    _check_texts(prompts=prompts)
    ids, rows = [], []
    for i, prompt in enumerate(prompts):
        name = _named(i, prompt)
        with schema.at(name):
            ids.append(encode(tokenizer, prompt, raw_prompts))
        rows.append(padded(model, tokenizer, sampling, ids[i], name))
    return ids, rows


def _said(tokenizer: Tokenizer, ids: list[int], tokens: np.ndarray, length: Any) -> str:
    """The text of an answer, without EOS."""
    kept = [x for x in tokens[:length].tolist() if x not in tokenizer.eos_ids]
    return continuation(tokenizer, ids, kept)


def logprobs(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    temperature: float = 1.0,
    batch_size: int = 16,
    raw_prompts: bool = False,
    progress: bool = True,
) -> list[Float[np.ndarray, " _"]]:
    """log p of each token of each response after its prompt, in nats; the last one is EOS's.

    N prompts and N responses -> N arrays [R], R the response's tokens and EOS. The sum of an array
    is the log-probability of answering exactly this, and the mean over all tokens of all arrays is
    the negative of the loss of `sft`, whose tokens these are. Leave EOS out by `[:-1]`. After the
    prompt "" the response is plain text, whose first token counts only where the tokenizer has a
    BOS to put before it. `temperature` divides the logits.

    Raises ValueError, naming the text by its number from 0, where prompt and response are too long
    for the model or the prompt has no tokens, and for lists of different lengths.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: it divides the logits")
    _check_texts(prompts=prompts, responses=responses)
    longest = model.config.max_length
    documents, rows = [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        name = _named(i, prompt)
        with schema.at(name):
            asked = _as_read(tokenizer, prompt, raw_prompts)
            document = batches.document_of(tokenizer, asked, response)
        size = len(document.ids)
        if size > longest:
            raise ValueError(
                f"{name} and its response have {size} tokens, but the model has "
                f"max_length={longest}; shorten one of them"
            )
        padding = (0, _width(size, longest) - size)
        tokens = np.pad(document.ids, padding, constant_values=tokenizer.pad_id)
        rows.append((tokens, np.pad(np.ones(size, np.int32), padding)))
        documents.append(document)
    program = functools.partial(_token_logprobs, model, float(temperature))
    found = _in_batches("log-probabilities", program, rows, batch_size, model, progress)
    return [
        nats[: len(document.ids)][document.trained] for (nats,), document in zip(found, documents)
    ]


# --------------------------------------------------------------------- texts to tokens, and back


def encode(tokenizer: Tokenizer, prompt: Prompt, raw_prompts: bool = False) -> list[int]:
    """Token ids of a prompt, rendered as training renders the prompts of the user's own data.

    Raises ValueError for messages where the tokenizer has no chat template, and for no tokens.
    """
    return batches.prompt_ids(tokenizer, _as_read(tokenizer, prompt, raw_prompts))


def _as_read(tokenizer: Tokenizer, prompt: Prompt, raw_prompts: bool) -> str | tuple[Message, ...]:
    """The prompt as training reads it from a file."""
    if not isinstance(prompt, str):
        turns = [turn._asdict() if isinstance(turn, Message) else turn for turn in prompt]
        return schema.messages(turns, "prompt", "give a text, or messages")
    if raw_prompts or tokenizer.chat_template is None or not prompt:
        return prompt
    return schema.user_turn(prompt)


def continuation(tokenizer: Tokenizer, ids: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` where they follow `ids`.

    They are decoded together with the last of `ids`, because many tokenizers drop a space at the
    start of a text.
    """
    context = list(ids[-CONTEXT:])
    return tokenizer.decode(context + list(tokens))[len(tokenizer.decode(context)) :]


def max_prompt(model: Model, sampling: Sampling | Beam) -> int:
    """The longest prompt, in tokens, that leaves room for an answer.

    Raises ValueError where an answer of `max_new_tokens` would leave no position for a prompt.
    """
    longest = model.config.max_length
    if sampling.max_new_tokens >= longest:
        raise ValueError(
            f"max_new_tokens={sampling.max_new_tokens} must be in 1..{longest - 1}: the model has "
            f"max_length={longest}, of which the prompt needs at least one position"
        )
    return longest - sampling.max_new_tokens


class Padded(NamedTuple):
    """A prompt, padded on the left."""

    tokens: Int[np.ndarray, " P"]
    attend: Int[np.ndarray, " P"]  # 1 on real tokens


def padded(
    model: Model,
    tokenizer: Tokenizer,
    sampling: Sampling | Beam,
    ids: Sequence[int],
    name: str = "the prompt",
) -> Padded:
    """The prompt `ids`, padded to a power of two, or to the longest prompt where that is less.

    Few different widths mean few compilations. Raises ValueError, which calls the prompt `name`, if
    it is too long.
    """
    longest, size = max_prompt(model, sampling), len(ids)
    if size > longest:
        raise ValueError(
            f"{name} has {size} tokens, but with max_new_tokens={sampling.max_new_tokens} "
            f"the model has room for {longest}; shorten one of them"
        )
    padding = _width(size, longest) - size
    tokens = np.array([tokenizer.pad_id] * padding + list(ids), np.int32)
    return Padded(tokens, (np.arange(len(tokens)) >= padding).astype(np.int32))


def _width(size: int, longest: int) -> int:
    """What a row of `size` tokens is padded to: a power of two, at most `longest`."""
    return min(max(MIN_WIDTH, 1 << (size - 1).bit_length()), longest)


def _check_texts(**lists: Sequence) -> None:
    """Raises ValueError for one text instead of a list of them, or lists of different lengths."""
    for name, given in lists.items():
        if isinstance(given, str):
            raise ValueError(f"{name}={schema.shown(given)} is one text; put it into a list")
    sizes = {name: len(given) for name, given in lists.items()}
    if len(set(sizes.values())) > 1:
        counts = " and ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"{counts}: give one response to each prompt")


def _named(i: int, prompt: Prompt) -> str:
    return f"prompts[{i}] ({schema.shown(prompt)})"


# --------------------------------------------------------------------------------- on the device


@functools.partial(jax.jit, static_argnames="ends")
def _answers(model, guide, sampling, root, tokens, attend, index, sample, *, ends):
    """Answers to prompts [B, P]: (tokens [B, R], lengths [B]).

    `index` [B] are the numbers of the prompts and `sample` [B] those of the answers.
    """

    def key(prompt, number):
        # Of one row: `row_keys` of several would number the rows of one prompt anew.
        return decode.row_keys(root, prompt[None], number)[0]

    keys = jax.vmap(key)(index, sample)
    how = {"sampling": sampling, "ends": ends, "guide": guide}
    drawn = decode.sample(model, tokens, attend, keys, **how)
    return drawn.tokens[:, tokens.shape[1] :], drawn.lengths


@functools.partial(jax.jit, static_argnames="ends")
def _hypotheses(model, settings, tokens, attend, *, ends):
    """The best answers to prompts [B, P]: (tokens [B, n, R], lengths [B, n])."""
    search = diverse.search if isinstance(settings, DiverseBeam) else beam.search
    found = search(model, tokens, attend, beam=settings, ends=ends)
    return found.tokens, found.lengths


@jax.jit
def _token_logprobs(model, temperature, tokens, attend):
    """Log-probabilities of all tokens of rows [B, T], in nats: ([B, T],)."""
    hidden = transformer.hidden_states(model, tokens, attend)
    return heads.token_logprobs(model, hidden, tokens, temperature)[:1]


def _in_batches(
    name: str, program: Callable, rows: list[tuple], batch_size: int, model: Model, progress: bool
) -> list[tuple]:
    """What `program(*columns)` returns for each row, in order; rows of one width share batches.

    A row is a tuple of arrays, the first of which is as long as the row is wide. `program` returns
    a tuple of arrays [B, ...], and of these each row gets its own.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    mesh = sharding.mesh_of(model)
    if mesh is not None:
        sharding.check_rows(mesh, batch_size=batch_size)
    if not rows:
        return []
    by_width: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        by_width[len(row[0])].append(place)
    parts = [
        places[start : start + batch_size]
        for places in by_width.values()
        for start in range(0, len(places), batch_size)
    ]
    found: list[tuple] = [()] * len(rows)
    log, on_mesh = Log(quiet=not progress), contextlib.nullcontext()
    if mesh is not None:
        on_mesh = jax.set_mesh(mesh)
    with on_mesh, log.stage(name, len(parts), display=Display(name, (), {})) as stage:
        for step, part in enumerate(parts):
            # The last batch is filled up, so that all batches of a width share one program.
            filled = part + part[:1] * (batch_size - len(part))
            columns = [np.stack(column) for column in zip(*(rows[place] for place in filled))]
            if mesh is not None:
                own = sharding.process_rows(mesh, batch_size)
                columns = sharding.put_rows(mesh, [column[own] for column in columns])
            for place, result in zip(part, zip(*sharding.to_host(program(*columns)))):
                found[place] = result
            stage.write(step, {})
            stage.flush()
    return found
