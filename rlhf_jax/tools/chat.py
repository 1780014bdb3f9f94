"""Talks with a language model in the terminal.

    rlhf-jax-chat --model DIR
    rlhf-jax-chat --model DIR --temperature 0.7 --top-p 0.95 --max-new-tokens 400
    echo "Once upon a time" | rlhf-jax-chat --model DIR --temperature 0

DIR is a Hugging Face folder, for example one that a run has exported. Where its tokenizer has a
chat template, the conversation is rendered by it; where it has none, the model continues the text
so far. `/new` starts a new conversation, Ctrl-C ends an answer and Ctrl-D ends the program.
Temperature 0 always takes the most likely token.

The answer is streamed token by token, and these are the tokens that the sampler of training draws
from the same key. Prompts are padded to powers of two, so that a further turn compiles nothing
until the conversation outgrows the next power of two.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import folders
from rlhf_jax.data import chat as templates
from rlhf_jax.data.schema import Message
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.folders import Pretrained
from rlhf_jax.launch import command
from rlhf_jax.models import decoding, transformer
from rlhf_jax.models.transformer import Compute, Precision
from rlhf_jax.sampling import decode, penalties
from rlhf_jax.sampling.settings import History, Sampling

SAMPLING = Sampling(max_new_tokens=256, temperature=0.8)  # unless flags say otherwise
MIN_WIDTH = 32  # tokens; shorter prompts are padded to this width
CONTEXT = 16  # tokens at the end of the prompt that are decoded together with the answer
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


def load(folder: pathlib.Path, sampling: Sampling, dtype: Precision = "float32") -> Pretrained:
    """Reads a Hugging Face folder to sample from it.

    Raises ValueError for a folder without a language model, and where answers of
    `sampling.max_new_tokens` would leave no position for a prompt.
    """
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: the folder of a run; name the model folder that it exported")
    pretrained = folders.load(folder, compute=Compute(dtype))
    longest = pretrained.model.config.max_length
    if sampling.max_new_tokens >= longest:
        raise ValueError(
            f"max_new_tokens={sampling.max_new_tokens} must be in 1..{longest - 1}: the model has "
            f"max_length={longest}, of which the prompt needs at least one position"
        )
    return pretrained


def encode(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to the point where the model is to answer.

    Without a chat template the texts are joined, and every turn of the user begins a new line.
    """
    if tokenizer.chat_template is not None:
        return templates.prompt(tokenizer, [Message(m["role"], m["content"]) for m in messages])
    lines = [f"\n{m['content']}" if m["role"] == "user" else m["content"] for m in messages]
    return tokenizer.encode_prompt("".join(lines).removeprefix("\n"))


# --------------------------------------------------------------------------------------- sampling


def max_prompt(pretrained: Pretrained, sampling: Sampling) -> int:
    """The longest prompt, in tokens, that leaves room for an answer."""
    return pretrained.model.config.max_length - sampling.max_new_tokens


def padded(
    pretrained: Pretrained, sampling: Sampling, ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pads a prompt on the left. Returns `tokens` and `attend`, both [1, P].

    P is a power of two, or the longest prompt where that is less: few different widths mean few
    compilations. Raises ValueError for a prompt that is too long.
    """
    longest = max_prompt(pretrained, sampling)
    if len(ids) > longest:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but with max_new_tokens={sampling.max_new_tokens} "
            f"the model has room for {longest}; shorten one of them"
        )
    width = min(max(MIN_WIDTH, 1 << (len(ids) - 1).bit_length()), longest)
    padding = width - len(ids)
    tokens = np.array([pretrained.tokenizer.pad_id] * padding + ids, np.int32)
    return tokens[None], (np.arange(width) >= padding).astype(np.int32)[None]


@functools.partial(jax.jit, static_argnames=("size", "ends"))
def _first_token(model, tokens, attend, key, sampling, *, size, ends):
    """Reads the prompt into a key-value cache of `size` positions and draws the first token."""
    hidden, cache = decoding.prefill(model, tokens, attend, size)
    drawn = jnp.full((1, sampling.max_new_tokens), ends.pad_id, jnp.int32)
    history = History(tokens, attend, drawn, jnp.int32(0))
    return _draw(model, hidden, key, history, sampling, ends), cache, history


@functools.partial(jax.jit, static_argnames=("ends",), donate_argnames=("cache",))
def _next_token(model, cache, token, key, history, sampling, *, ends):
    """Appends a token to cache and history and draws the one after it."""
    hidden, cache = decoding.decode(model, cache, token)
    drawn = jax.lax.dynamic_update_slice(history.tokens, token[:, None], (0, history.count))
    history = history._replace(tokens=drawn, count=history.count + 1)
    return _draw(model, hidden, key, history, sampling, ends), cache, history


def _draw(model, hidden, key, history, sampling, ends):
    token, *_ = decode.draw(
        transformer.logits(model, hidden),
        key,
        history.count,
        sampling,
        penalise=lambda logits: penalties.apply(sampling, ends, logits, history),
    )
    return token


def stream_tokens(
    pretrained: Pretrained, sampling: Sampling, ids: list[int], key: jax.Array
) -> Iterator[int]:
    """Yields the tokens of an answer as they are drawn, without the EOS.

    `ids` is the prompt and `key` its row key, [1]. The tokens are those that `decode.sample` draws
    for the same prompt and key.
    """
    model, tokenizer = pretrained
    tokens, attend = padded(pretrained, sampling, ids)
    size = tokens.shape[1] + sampling.max_new_tokens
    ends = tokenizer.ends
    token, cache, history = _first_token(model, tokens, attend, key, sampling, size=size, ends=ends)
    for _ in range(sampling.max_new_tokens):
        # The next step is started before its input is looked at, so that the device computes while
        # the host prints. The step after the last token is wasted.
        following = _next_token(model, cache, token, key, history, sampling, ends=ends)
        drawn = int(token[0])
        if drawn in tokenizer.eos_ids:
            return
        yield drawn
        token, cache, history = following


def stream_text(tokenizer: Tokenizer, ids: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of the answer `tokens` to the prompt `ids` in pieces of whole characters.

    The answer is decoded together with the end of the prompt, because many tokenizers drop a space
    at the start of a text. A character of several tokens is held back until the last of them.
    """
    known = list(ids[-CONTEXT:])
    text = tokenizer.decode(known)
    length = len(text)
    for token in tokens:
        known.append(token)
        text = tokenizer.decode(known)
        if not text.endswith(INCOMPLETE):
            yield text[length:]
            length = len(text)
    yield text[length:]


# ------------------------------------------------------------------------------------ the terminal


def shorten(
    pretrained: Pretrained, sampling: Sampling, messages: list[dict[str, str]]
) -> list[int]:
    """Removes the oldest turns from `messages` until they fit the model. Returns their token ids.

    The system message is kept, and so is the last turn: if that alone is too long, `padded`
    says so.
    """
    first = int(messages[0]["role"] == "system")
    longest = max_prompt(pretrained, sampling)
    while len(ids := encode(pretrained.tokenizer, messages)) > longest:
        if len(messages) <= first + 1:
            break
        del messages[first : first + 2]
        print("(the first turn no longer fits and is forgotten)", file=sys.stderr)
    return ids


def answer(
    pretrained: Pretrained, sampling: Sampling, messages: list[dict[str, str]], key: jax.Array
) -> str:
    """Prints the answer as it is drawn and returns it. Ctrl-C ends it early."""
    ids = shorten(pretrained, sampling, messages)
    tokens = stream_tokens(pretrained, sampling, ids, key)
    said = ""
    try:
        for piece in stream_text(pretrained.tokenizer, ids, tokens):
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        pass  # what was said until then is part of the conversation
    print()
    return said


def chat(
    model: pathlib.Path,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = SAMPLING,
    seed: int = 0,
    system: str = "",
    dtype: Precision = "float32",
) -> None:
    """Reads turns from the terminal, or lines from a pipe, and answers each of them.

    Args:
        model: Hugging Face folder
        seed: random seed; the same seed and the same turns give the same answers
        system: system message, placed before the first turn
        dtype: type of matrix products
    """
    pretrained = load(model, sampling, dtype)
    opening = [{"role": "system", "content": system}] if system else []
    messages, turn, terminal = list(opening), 0, sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 (gives `input` arrow keys and a history)
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
        # Turns are numbered as prompts are elsewhere: each has one sample, with number 0.
        key = decode.row_keys(jax.random.key(seed), jnp.array([turn]))
        try:
            said = answer(pretrained, sampling, messages, key)
        except ValueError as error:
            if not terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})
        turn += 1


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-chat`; `argv` defaults to the process's arguments."""
    command(chat, argv, description=__doc__)


if __name__ == "__main__":
    main()
