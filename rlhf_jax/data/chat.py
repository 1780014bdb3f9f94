"""Conversations to token ids by chat templates, which `templates` renders.

The ids are those of the rendered text with its special tokens. Which tokens are trained on follows
from the positions of the answers in that text and the tokens' offsets in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Literal

from rlhf_jax.data import templates
from rlhf_jax.data.schema import BadRow, Message
from rlhf_jax.data.tokenizers import Tokenizer

Turns = Literal["last", "all"]

# Put in place of an answer to find where the template writes it. Plain letters and digits, so that
# no template has a reason to change it.
_MARK = "answer7f3a9c1e5b8d2046"


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool = False) -> str:
    """The text of `messages` under the tokenizer's template.

    With `ask` the text ends with the generation prompt, which opens the assistant's turn. Raises
    ValueError without a template or with one that is unfit (see `templates.render`), BadRow for
    messages that the template refuses.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            "the rows are messages, but the tokenizer has no chat template; use the tokenizer of a "
            "chat model, or tokenizer.with_template(tokenizers.PLAIN_TEMPLATE)"
        )
    variables = {
        "messages": [message._asdict() for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": ask,
        **tokenizer.special_tokens,
    }
    try:
        return templates.render(template, variables)
    except templates.Unfit as error:
        raise ValueError(f"the chat template {error}; correct it or use another") from None
    except templates.Refused as error:
        raise BadRow(
            f"the chat template refuses the messages ({error}); change them or the template"
        ) from None


def prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation and the generation prompt: what the sampler is fed."""
    return tokenizer.encode(render(tokenizer, messages, ask=True))


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], turns: Turns = "last"
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that ends with an answer, and which of them the assistant said.

    The text starts with what the sampler is fed, and the answer follows it. An answer ends with its
    first EOS; where the template writes none, one is appended to the last answer. Ids after the
    last answer's EOS are cut, because the sampler stops there. `turns="all"` trains on every
    answer: the template must then end each with an EOS, and write earlier turns like the last one.
    A token that holds the end of the prompt and the start of an answer belongs to the answer.

    Raises BadRow for an answer that the template leaves empty, or that cannot be found in the text;
    ValueError for a template that does not write answers unchanged, or is unfit for `turns="all"`.
    """
    text, start = _last_answer(tokenizer, messages)
    spans = [(start, len(text))]
    if turns == "all":
        answers = [i for i, turn in enumerate(messages[:-1]) if turn.role == "assistant"]
        spans = [_earlier_answer(tokenizer, messages, i, text) for i in answers] + spans
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    said = [False] * len(ids)
    for span in spans:
        last = span is spans[-1]
        inside = [i for i, offsets in enumerate(encoding.offsets) if _within(offsets, span)]
        eos = next((i for i in inside if ids[i] in tokenizer.eos_ids), None)
        kept = [i for i in inside if eos is None or i <= eos]
        answer = [ids[i] for i in kept if ids[i] not in tokenizer.eos_ids]
        if not tokenizer.decode(answer).strip():
            raise BadRow("an answer is empty after templating; fill it in or remove the row")
        if eos is None and not last:
            raise ValueError(
                "the chat template does not end every answer with an EOS, so that nothing would "
                "teach the model to stop there; use turns='last' or another template"
            )
        for i in kept:
            said[i] = True
        if last and eos is None:
            ids, said = ids + [tokenizer.eos_ids[0]], said + [True]
        elif last:
            ids, said = ids[: eos + 1], said[: eos + 1]
    return ids, said


def ending_at_eos(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a template that ends a finished conversation where `conversation` does.

    A reward model is trained at the EOS of the last answer, but transformers reads a classifier's
    score at the last token of the text. So what the template writes after that EOS (in ChatML a
    line break) is left out, and an EOS that it does not write is added. A template that ends so
    already, or that leaves out or changes answers, is kept as it is.

    Logs a warning if the text of a finished conversation is then still another one than that of
    `conversation`, as where the template opens the answer that is asked for in its own way.
    """
    question, answer = Message("user", "A question?"), Message("assistant", "An answer.")
    try:
        after = _after_eos(tokenizer, [question, answer])
        if after is None:
            eos = json.dumps(tokenizer.backend.id_to_token(tokenizer.eos_ids[0]))
            tokenizer = tokenizer.with_ending(f"conversation_text.rstrip() ~ {eos}")
        elif after:
            # A string of jinja has the escapes of Python and needs none beyond ASCII.
            text = json.dumps(after, ensure_ascii=False)
            tokenizer = tokenizer.with_ending(f"conversation_text.removesuffix({text})")
        rendered = tokenizer.encode(render(tokenizer, [question, answer]))
        same = rendered == conversation(tokenizer, [question, answer])[0]
    except ValueError:  # the template refuses even these two messages
        same = False
    if not same:
        logging.getLogger(__name__).warning(
            "under this chat template a finished conversation is another text than the one that an "
            "answer is trained and scored in, so transformers gives it another score; score it by "
            "the token ids of the question as asked, the answer and EOS"
        )
    return tokenizer


def ids_after_eos(tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """Ids of what the template writes after the EOS of an answer; None if it writes no EOS there.

    Raises ValueError without a template, and for one that does not write answers unchanged.
    """
    messages = [Message("user", "A question?"), Message("assistant", "An answer.")]
    after = _after_eos(tokenizer, messages)
    if after is None:
        return None
    # Encoded with the whole text, because a tokenizer can put a space in front of a text.
    whole = tokenizer.encode(render(tokenizer, messages))
    kept = tokenizer.encode(render(tokenizer, messages).removesuffix(after))
    return tuple(whole[len(kept) :])


def _after_eos(tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    """What the template writes after the EOS of the last answer; None if it writes no EOS there."""
    text = render(tokenizer, messages)
    start = _start_of_answer(tokenizer, messages, text)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ends = (
        end
        for token, (_, end) in zip(encoding.ids, encoding.offsets)
        if token in tokenizer.eos_ids and end > start
    )
    end = next(ends, None)
    return None if end is None else text[end:]


def _within(offsets: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token has a character in the span; a token of white space can have width 0."""
    first, end = offsets
    if first == end:
        return span[0] < end <= span[1]
    return first < span[1] and end > span[0]


def _last_answer(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, int]:
    """The text of a conversation and the position in it at which its last answer starts.

    Some templates open the assistant's turn differently from a finished one: for example, they ask
    for thoughts, which a finished turn lacks. The answer, and all that the template writes after
    it, is then appended to the text that the sampler is fed.
    """
    asked = render(tokenizer, messages[:-1], ask=True)
    whole = render(tokenizer, messages)
    if not whole.startswith(asked):
        whole = asked + whole[_start_of_answer(tokenizer, messages, whole) :]
    # White space after the turn belongs to the next one. `conversation` appends a missing EOS.
    return whole.rstrip(), len(asked)


def _start_of_answer(tokenizer: Tokenizer, messages: Sequence[Message], whole: str) -> int:
    """Where the last answer starts in `whole`, the text of `messages`.

    The answer itself cannot be searched for: "c" is also a part of "<|end_of_sentence|>", and a
    template may trim the answer. So a mark is rendered in its place. The text around the mark must
    be the text around the answer, and what stands between is the answer as the template writes it.
    """
    mark = _MARK
    while mark in whole:
        mark += "0"
    marked = render(tokenizer, [*messages[:-1], messages[-1]._replace(content=mark)])
    before, found, after = marked.partition(mark)
    if not found or mark in after:
        raise ValueError(
            "the chat template does not write an answer as it is, once, so that what is to be "
            "trained cannot be found; use another template"
        )
    end = len(whole) - len(after)
    if not (whole.startswith(before) and whole.endswith(after) and len(before) <= end):
        raise BadRow(
            "the chat template writes this answer into another text than other answers, so that it "
            "cannot be found there; change the answer or the template"
        )
    if not whole[len(before) : end].strip():
        raise BadRow("an answer is empty after templating; fill it in or remove the row")
    return len(before)


def _earlier_answer(
    tokenizer: Tokenizer, messages: Sequence[Message], i: int, text: str
) -> tuple[int, int]:
    """The span of an earlier answer, message i, in the text of the conversation."""
    asked = render(tokenizer, messages[:i], ask=True)
    ended = render(tokenizer, messages[: i + 1])
    if not (ended.startswith(asked) and text.startswith(ended)):
        raise ValueError(
            "the chat template writes earlier turns in another way than the last one, so that they "
            "are not what the model would say; use turns='last'"
        )
    return len(asked), len(ended)
