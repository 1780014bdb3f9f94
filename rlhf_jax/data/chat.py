"""Conversations to ids: the one renderer of chat templates, for training and for sampling.

A template is rendered as transformers does it (jinja's sandbox, the same settings, filters and
names), and the ids are those of the rendered text with its special tokens. What is trained is found
by the offsets of the tokens in that text.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from rlhf_jax.data.schema import BadRow, Message
from rlhf_jax.data.tokenizers import Tokenizer

Turns = Literal["last", "all"]


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool = False) -> str:
    """The text of `messages` under the tokenizer's template; `ask` opens the assistant's turn.

    Raises ValueError without a template, BadRow for messages that the template refuses.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            "the rows are messages, but the tokenizer has no chat template; use the tokenizer of a "
            "chat model, or tokenizer.with_template(tokenizers.PLAIN_TEMPLATE)"
        )
    try:
        return _compiled(template).render(
            messages=[message._asdict() for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=ask,
            **tokenizer.special_tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise BadRow(
            f"the chat template refuses the messages ({error}); change them or the template"
        ) from None


def prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant is to answer: what the sampler is fed."""
    return tokenizer.encode(render(tokenizer, messages, ask=True))


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], turns: Turns = "last"
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that ends with an answer, and which of them the assistant said.

    An answer ends with its first EOS; where the template writes none, one is appended to the last
    answer. Ids after the last answer's EOS are cut, for the sampler stops there. `turns="all"`
    takes in every answer, which asks for a template that ends each with an EOS and does not write
    earlier turns in another way. A token across a boundary counts as the assistant's.

    Raises BadRow for an answer of which nothing is left, ValueError for a template that cannot.
    """
    text, start = _last_answer(tokenizer, messages)
    spans = [(start, len(text))]
    if turns == "all":
        answers = [i for i, turn in enumerate(messages[:-1]) if turn.role == "assistant"]
        spans = [_answer(tokenizer, messages, i, text) for i in answers] + spans
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    said = [False] * len(ids)
    for span in spans:
        last = span is spans[-1]
        inside = [i for i, offsets in enumerate(encoding.offsets) if _within(offsets, span)]
        ends = next((i for i in inside if ids[i] in tokenizer.eos_ids), None)
        kept = [i for i in inside if ends is None or i <= ends]
        answer = [ids[i] for i in kept if ids[i] not in tokenizer.eos_ids]
        if not tokenizer.decode(answer).strip():
            raise BadRow("an answer is empty after templating; fill it in or remove the row")
        if ends is None and not last:
            raise ValueError(
                "the chat template does not end every answer with an EOS, so that nothing would "
                "teach the model to stop there; use turns='last' or another template"
            )
        for i in kept:
            said[i] = True
        if last and ends is None:
            ids, said = ids + [tokenizer.eos_ids[0]], said + [True]
        elif last:
            ids, said = ids[: ends + 1], said[: ends + 1]
    return ids, said


def _within(offsets: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token has a character in the span. White space can have offsets of no width."""
    first, end = offsets
    if first == end:
        return span[0] < end <= span[1]
    return first < span[1] and end > span[0]


def _last_answer(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, int]:
    """The text of a conversation and where its last answer starts.

    The text goes on from what the sampler is fed, also under a template that writes a finished
    turn in another way than it opens one (such as without the thoughts it asks for).
    """
    asked, whole = (
        render(tokenizer, messages[:-1], ask=True),
        render(tokenizer, messages),
    )
    if not whole.startswith(asked):
        content = messages[-1].content.strip()
        _, found, tail = whole.rpartition(content)
        if not found:
            raise BadRow("an answer is empty after templating; fill it in or remove the row")
        whole = asked + content + tail
    # White space after the turn is for the next one; without an EOS one is put in its place.
    return whole.rstrip(), len(asked)


def _answer(
    tokenizer: Tokenizer, messages: Sequence[Message], i: int, text: str
) -> tuple[int, int]:
    """Where the answer that is message i stands in the text of the conversation."""
    asked = render(tokenizer, messages[:i], ask=True)
    ended = render(tokenizer, messages[: i + 1])
    if not (ended.startswith(asked) and text.startswith(ended)):
        raise ValueError(
            "the chat template writes earlier turns in another way than the last one, so that they "
            "are not what the model would say; use turns='last'"
        )
    return len(asked), len(ended)


class _Generation(jinja2.ext.Extension):
    """{% generation %} and its end, which mark what the assistant says, are read over."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Without the HTML escapes of jinja's own.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is no jinja template ({error}); correct it") from None
