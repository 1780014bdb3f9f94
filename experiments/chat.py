"""Talk to a language model in the terminal.

    python experiments/chat.py --model DIR
    python experiments/chat.py --model DIR --temperature 0.7 --top-p 0.95 --max-new-tokens 400
    echo "Once upon a time" | python experiments/chat.py --model DIR --temperature 0

DIR is a Hugging Face folder, such as a run exports. Where its tokenizer has a chat template, turns
are rendered by it; where it has none, the model continues the text so far. `/new` starts over,
Ctrl-C stops an answer, Ctrl-D ends. Temperature 0 always takes the likeliest token.

Claim: what is streamed token by token is what the sampler of training draws from the same key. A
turn compiles nothing new until the conversation outgrows the next power of two.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.data import chat as templates
from rlhf_jax.data import tokenizers
from rlhf_jax.data.schema import Message
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.launch import command
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.sampling import decode
from rlhf_jax.sampling import filters as filtering
from rlhf_jax.sampling.filters import Filters

MIN_WIDTH = 32  # tokens; prompts are padded to a power of two of at least this
CONTEXT = 16  # tokens before an answer that are decoded with it
HALF = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose last bytes are still to come


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 0.8
    """0 takes the likeliest token"""
    max_new_tokens: int = 256
    seed: int = 0
    filters: Annotated[Filters, tyro.conf.arg(name="")] = Filters()

    def check(self, longest: int) -> None:
        """Raises ValueError for a number outside its range; `longest` is the model's."""
        self.filters.check()
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")
        if not 1 <= self.max_new_tokens < longest:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} must be in 1..{longest - 1}: the model has "
                f"max_length={longest}, and the prompt takes a place"
            )

    def arguments(self) -> dict[str, Any]:
        """As `decode` takes them; `choose` is static."""
        greedy = self.temperature == 0
        return {
            "temperature": 1.0 if greedy else self.temperature,
            "filters": self.filters,
            "choose": decode.greedy if greedy else decode.categorical,
        }


class Speaker(NamedTuple):
    """A model with its tokenizer."""

    model: transformer.Model
    tokenizer: Tokenizer


def load(folder: pathlib.Path, sampling: Sampling) -> Speaker:
    """The speaker of a Hugging Face folder. Raises ValueError, also for what it cannot sample."""
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: the folder of a run; name the model folder that it exported")
    folder = huggingface.fetch(folder)
    model, tokenizer = huggingface.load(folder), tokenizers.from_folder(folder)
    if "score" in model.weights:
        raise ValueError(f"{folder}: a reward model, which writes nothing; name a language model")
    tokenizers.check_vocab(tokenizer, model.config.vocab_size)
    sampling.check(model.config.max_length)
    return Speaker(model, tokenizer)


def render(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation up to where the model speaks.

    By the tokenizer's chat template, or else the plain texts, a line for each turn of the user.
    """
    if tokenizer.chat_template is not None:
        return templates.prompt(tokenizer, [Message(m["role"], m["content"]) for m in messages])
    lines = [f"\n{m['content']}" if m["role"] == "user" else m["content"] for m in messages]
    return tokenizer.encode_prompt("".join(lines).removeprefix("\n"))


# --------------------------------------------------------------------------------------- sampling


def room(speaker: Speaker, sampling: Sampling) -> int:
    """How many tokens a prompt may have."""
    return speaker.model.config.max_length - sampling.max_new_tokens


def padded(speaker: Speaker, sampling: Sampling, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A prompt as one left-padded row, a power of two wide (or all the room there is).

    Returns tokens and attend [1, P]. Raises ValueError for a prompt that is too long.
    """
    most = room(speaker, sampling)
    if len(ids) > most:
        raise ValueError(
            f"a prompt of {len(ids)} tokens, but with max_new_tokens={sampling.max_new_tokens} the "
            f"model has room for {most}; shorten one of them"
        )
    width = min(max(MIN_WIDTH, 1 << (len(ids) - 1).bit_length()), most)
    pad = width - len(ids)
    tokens = np.array([speaker.tokenizer.pad_id] * pad + ids, np.int32)
    return tokens[None], (np.arange(width) >= pad).astype(np.int32)[None]


@functools.partial(jax.jit, static_argnames=("choose", "size"))
def _start(model, tokens, attend, key, temperature, filters, *, choose, size):
    """Reads the prompt; the first token and the cache."""
    hidden, cache = transformer.prefill(model, tokens, attend, size)
    return _draw(model, hidden, key, 0, temperature, filters, choose), cache


@functools.partial(jax.jit, static_argnames=("choose",), donate_argnames=("cache",))
def _go_on(model, cache, token, key, position, temperature, filters, *, choose):
    """Appends a token; the one after it and the cache."""
    hidden, cache = transformer.decode(model, cache, token)
    return _draw(model, hidden, key, position, temperature, filters, choose), cache


def _draw(model, hidden, key, position, temperature, filters, choose):
    logits = transformer.logits(model, hidden).astype(jnp.float32) / temperature
    noise = jax.vmap(jax.random.fold_in, (0, None))(key, position)
    return choose(filtering.apply(logits, filters), noise)


def stream(speaker: Speaker, sampling: Sampling, ids: list[int], key: jax.Array) -> Iterator[int]:
    """Tokens of the answer as they are drawn, without EOS; those `decode.sample` draws with `key`.

    `key` is that of the row, [1].
    """
    tokens, attend = padded(speaker, sampling, ids)
    settings = sampling.arguments()
    size = tokens.shape[1] + sampling.max_new_tokens
    token, cache = _start(speaker.model, tokens, attend, key, size=size, **settings)
    for position in range(1, sampling.max_new_tokens + 1):
        # Sent off before the token is looked at, so that the device does not wait for the printing.
        following = _go_on(speaker.model, cache, token, key, jnp.int32(position), **settings)
        drawn = int(token[0])
        if drawn in speaker.tokenizer.eos_ids:
            return
        yield drawn
        token, cache = following


def spell(tokenizer: Tokenizer, ids: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Text of the answer to the prompt `ids`, piece by piece, each of whole characters.

    Decoded together with the end of the prompt: alone, many tokenizers drop a leading space.
    """
    known = list(ids[-CONTEXT:])
    text = tokenizer.decode(known)
    said = len(text)
    for token in tokens:
        known.append(token)
        text = tokenizer.decode(known)
        if not text.endswith(HALF):
            yield text[said:]
            said = len(text)
    yield text[said:]


# ------------------------------------------------------------------------------------ the terminal


def fit(speaker: Speaker, sampling: Sampling, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the conversation; what was said first is forgotten where it outgrows the model."""
    first = int(messages[0]["role"] == "system")
    while len(ids := render(speaker.tokenizer, messages)) > room(speaker, sampling):
        if len(messages) <= first + 1:
            break  # a single message too long: `padded` says so
        del messages[first : first + 2]
        print("(the first turn no longer fits and is forgotten)", file=sys.stderr)
    return ids


def answer(speaker: Speaker, sampling: Sampling, messages: list[dict[str, str]], turn: int) -> str:
    """Prints the answer as it comes and returns it; Ctrl-C cuts it short."""
    ids = fit(speaker, sampling, messages)
    key = decode.row_keys(jax.random.key(sampling.seed), jnp.array([turn]))
    said = ""
    try:
        for piece in spell(speaker.tokenizer, ids, stream(speaker, sampling, ids, key)):
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        pass  # what was said until then stays said
    print()
    return said


def chat(
    model: pathlib.Path,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),
    system: str = "",
) -> None:
    """Reads turns from the terminal, or lines from a pipe, and answers each.

    Args:
        model: Hugging Face folder
        system: what the model is told before the first turn
    """
    speaker = load(model, sampling)
    opening = [{"role": "system", "content": system}] if system else []
    messages, turn, terminal = list(opening), 0, sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 (arrow keys and history in `input`)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            print("\n" * terminal, end="")
            return
        if line.strip() == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        try:
            said = answer(speaker, sampling, messages, turn)
        except ValueError as error:
            if not terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})
        turn += 1


if __name__ == "__main__":
    command(chat)
