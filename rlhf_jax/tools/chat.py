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
import tyro

from rlhf_jax import config, folders, texts
from rlhf_jax.data import chat as templates
from rlhf_jax.data.schema import Message
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.folders import Pretrained
from rlhf_jax.launch import command
from rlhf_jax.models import decoding, transformer
from rlhf_jax.models.transformer import Compute, Precision
from rlhf_jax.sampling import decode, penalties
from rlhf_jax.sampling.settings import History, Sampling, check_vocabulary

SAMPLING = Sampling(max_new_tokens=256, temperature=0.8)  # unless flags say otherwise
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


def load(folder: pathlib.Path, sampling: Sampling, dtype: Precision = "float32") -> Pretrained:
    """Reads a Hugging Face folder to sample from it.

    Raises ValueError for a folder without a language model, where answers of
    `sampling.max_new_tokens` would leave no position for a prompt, and for a `top_k` above its
    number of tokens.
    """
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: the folder of a run; name the model folder that it exported")
    pretrained = folders.load(folder, compute=Compute(dtype))
    texts.max_prompt(pretrained.model, sampling)
    check_vocabulary(sampling, pretrained.model.config.vocab_size)
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
    tokens, attend = texts.padded(model, tokenizer, sampling, ids)
    size, ends = len(tokens) + sampling.max_new_tokens, tokenizer.ends
    token, cache, history = _first_token(
        model, tokens[None], attend[None], key, sampling, size=size, ends=ends
    )
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

    A character of several tokens is held back until the last of them.
    """
    known, text, length = [], "", 0
    for token in tokens:
        known.append(token)
        text = texts.continuation(tokenizer, ids, known)
        if not text.endswith(INCOMPLETE):
            yield text[length:]
            length = len(text)
    yield text[length:]


# ------------------------------------------------------------------------------------ the terminal


def shorten(
    pretrained: Pretrained, sampling: Sampling, messages: list[dict[str, str]]
) -> list[int]:
    """Removes the oldest turns from `messages` until they fit the model. Returns their token ids.

    The system message is kept, and so is the last turn: if that alone is too long,
    `texts.padded` says so.
    """
    first = int(messages[0]["role"] == "system")
    longest = texts.max_prompt(pretrained.model, sampling)
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
    config.check_field("seed", seed, config.Seed)
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
