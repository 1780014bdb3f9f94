"""The formats that rows of files come in: one entry of `FORMATS` for each, and how it is read.

A format says by the fields of a row whether the row is one of its own (`fits`), and makes an
`Example` of it (`read`). Fields are read, never guessed: a row that lacks one, or holds the wrong
type in it, raises `BadRow` with the field and the remedy. A new format is one function and one
entry at the end of this file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf_jax.data import schema
from rlhf_jax.data.recognise import (
    LABELS,
    has,
    has_any,
    has_prompt,
    has_sides,
    has_turns,
    has_unranked_prompt,
    is_dialogue,
    is_instruction,
    is_labelled,
    is_preference,
    is_scored,
    is_stepwise,
    is_unranked_instruction,
    lists_responses,
)
from rlhf_jax.data.schema import Example, Message, Row

Reader = Callable[[Row], Example]


class Format(NamedTuple):
    """How the rows of one format are recognised and read."""

    name: str
    fits: Callable[[Row], bool]  # whether a row is of this format, by its fields
    read: Reader  # makes an Example of a row; `formats.read` adds language and unused fields


DEMONSTRATION = "a demonstration has 'prompt' and 'completion', or 'text' alone"
COMPARISON = (
    "a comparison has 'prompt', 'chosen' and 'rejected' (and perhaps 'margin'), or 'prompt', "
    "'responses' and 'ranks' (0 is best) or 'scores'"
)
PROMPT = "a prompt row has 'prompt'"
_CHAT = "a conversation has 'messages' or 'conversations', turn by turn"
_KTO = "a labelled answer has 'label' (or 'tag', 'kto_tag') true or false"
_ALPACA = "an Alpaca row has 'instruction' and 'output' (and perhaps 'input', 'history', 'system')"
_JUDGED = "a judged pair has both answers and a verdict: 1, 2, or 0 for a tie"
_SCORED = "an annotation has 'prompt', 'response' and 'score', a number"
STEPS = (
    "a row of steps has 'prompt', 'completions' (the steps of one response) and 'labels', each "
    "true, false or a number from 0 (wrong) to 1 (right)"
)
_PAIR_RANKS = (0, 1)


# How each format is read.


def plain_text(row: Row) -> Example:
    """{text}."""
    for name in ("prompt", "completion"):
        if name in row:
            schema.fail(f"both 'text' and {name!r} are given", DEMONSTRATION)
    return Example("", (schema.text(row, "text", DEMONSTRATION),))


def prompt_only(row: Row) -> Example:
    """{prompt}, text or messages."""
    return Example(_prompt(row, PROMPT))


def prompt_completion(row: Row) -> Example:
    """{prompt, completion}, text or messages."""
    prompt = _prompt(row, DEMONSTRATION + "; use 'text' for a row without a prompt")
    prompt, completion = _answer(prompt, row, "completion", DEMONSTRATION)
    return Example(prompt, (completion,))


def preference(row: Row) -> Example:
    """{prompt, chosen, rejected[, margin, score_chosen, score_rejected]}, text or messages.

    Where both sides are whole conversations, they differ only in the last assistant turn, and
    `prompt` is absent or repeats the question as text.
    """
    chosen = row.get("chosen")
    listed = isinstance(chosen, list | tuple) and all(isinstance(x, Mapping) for x in chosen)
    if "prompt" not in row and not listed:
        schema.fail("'prompt' is missing", COMPARISON)
    whole = listed and isinstance(row.get("prompt", ""), str)
    prompt = () if whole else _prompt(row, COMPARISON)
    example = _pair([_answer(prompt, row, name, COMPARISON) for name in ("chosen", "rejected")])
    margin = schema.number(row.get("margin", 0.0), "margin", "leave it out for no margin")
    names = [name for name in ("score_chosen", "score_rejected") if name in row]
    scores = tuple(schema.number(row[name], name, _SCORED) for name in names)
    return schema.ranked(example._replace(margin=margin, scores=scores))


def ranked_responses(row: Row) -> Example:
    """{prompt, responses} with {ranks}, {scores} or both."""
    for name in ("chosen", "rejected", "margin"):
        if name in row:
            schema.fail(f"{name!r} is given beside 'responses' and 'ranks'", COMPARISON)
    prompt = _prompt(row, COMPARISON)
    responses = schema.items(row, "responses", COMPARISON)
    scores = schema.items(row, "scores", COMPARISON) if "scores" in row else []
    only_scores = scores and "ranks" not in row
    ranks = [] if only_scores else schema.items(row, "ranks", COMPARISON)
    if len(responses) < (1 if only_scores else 2):
        schema.fail(f"'responses' holds {len(responses)}; it takes 2 or more", COMPARISON)
    if not only_scores and len(ranks) != len(responses):
        found = f"{len(responses)} 'responses' but {len(ranks)} 'ranks'"
        schema.fail(found, "give each response its rank, 0 for the best")
    for i, response in enumerate(responses):
        schema.check_text(response, f"responses[{i}]", COMPARISON)
    for i, rank in enumerate(ranks):
        # bool is an int to Python, but a rank of true is a mistake in the file.
        if type(rank) is not int or not 0 <= rank < 2**31:
            found = f"'ranks[{i}]' must be a whole number from 0, got {schema.shown(rank)}"
            schema.fail(found, "0 is best, equal ranks are ties")
    scores = tuple(schema.number(x, f"scores[{i}]", _SCORED) for i, x in enumerate(scores))
    return schema.ranked(Example(prompt, tuple(responses), tuple(ranks), scores))


def conversation(row: Row) -> Example:
    """{messages} or {conversations}: ends with an answer, or with the user in a file of prompts."""
    turns = _turns(row)
    if turns[-1].role != "assistant":
        return Example(schema.in_order(turns, "user"))
    schema.in_order(turns, "assistant")
    return Example(turns[:-1], (turns[-1].content,))


def conversation_preference(row: Row) -> Example:
    """{messages or conversations, chosen, rejected}: each a message or its text."""
    prompt = schema.in_order(_turns(row), "user")
    sides = []
    for name in ("chosen", "rejected"):
        value = schema.field(row, name, COMPARISON)
        if isinstance(value, Mapping):
            answer = schema.message(value, name)
            schema.in_order([*prompt, answer], "assistant")
            value = answer.content
        sides.append((prompt, schema.check_text(value, name, COMPARISON)))
    return _pair(sides)


def labelled(row: Row) -> Example:
    """One answer that is good or bad (as for KTO), whose label becomes a score of 1 or 0.

    {prompt, completion, label}, {messages or conversations, label}, {instruction, output, label};
    `tag` and `kto_tag` are other names of `label`.
    """
    if "instruction" in row:
        example = alpaca(row)
    elif "completion" in row:
        example = prompt_completion(row)
    else:
        example = conversation(row)
    if not example.responses:
        schema.fail("the conversation does not end with an answer", _KTO)
    name = next((name for name in LABELS if name in row), "label")
    label = schema.field(row, name, _KTO)
    if label not in (True, False):
        schema.fail(f"{name!r} must be true or false, got {schema.shown(label)}", _KTO)
    return example._replace(scores=(float(label),))


def alpaca(row: Row) -> Example:
    """{instruction, output[, input, history, system]}."""
    answer = schema.text(row, "output", _ALPACA)
    return Example(_instruction(row), (answer,))


def alpaca_ranked(row: Row) -> Example:
    """{instruction, output: [best, ..., worst]} or {instruction, chosen, rejected}."""
    prompt = _instruction(row)
    if "output" in row and not has_any(row, "chosen", "rejected"):
        answers = schema.items(row, "output", _ALPACA + "; a list is best first")
        names = [f"output[{i}]" for i in range(len(answers))]
        if len(answers) < 2:
            schema.fail(f"'output' holds {len(answers)}; a ranking takes 2 or more", _ALPACA)
    else:
        names = ["chosen", "rejected"]
        answers = [schema.field(row, name, COMPARISON) for name in names]
    for name, answer in zip(names, answers):
        schema.check_text(answer, name, _ALPACA)
    return Example(prompt, tuple(answers), tuple(range(len(answers))))


def hh_dialogues(row: Row) -> Example:
    """{chosen, rejected}: whole dialogues, each as one text (HH-RLHF)."""
    remedy = "both sides are one dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns"
    sides = []
    for name in ("chosen", "rejected"):
        dialogue = "\n\n" + schema.text(row, name, remedy).strip()
        start, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
        if start.strip() or not parts:
            schema.fail(f"{name!r} does not start with a turn", remedy)
        turns = [
            {"role": role.lower(), "content": content.strip()}
            for role, content in zip(parts[::2], parts[1::2])
        ]
        turns = schema.in_order(schema.messages(turns, name, remedy), "assistant")
        sides.append((turns[:-1], turns[-1].content))
    return _pair(sides)


def gpt4_pair(row: Row) -> Example:
    """{user_input, completion_a, completion_b}: a is the better one (GPT-4-LLM, version 1)."""
    prompt = _user(row, "user_input", COMPARISON)
    sides = [schema.text(row, f"completion_{x}", COMPARISON) for x in "ab"]
    return Example(prompt, tuple(sides), _PAIR_RANKS)


def gpt4_scores(row: Row) -> Example:
    """{user_input, responses_and_scores: [{response, score}, ...]} (GPT-4-LLM, version 2)."""
    remedy = "'responses_and_scores' lists objects with 'response' and 'score'"
    prompt = _user(row, "user_input", remedy)
    answers, scores = [], []
    for i, item in enumerate(schema.items(row, "responses_and_scores", remedy)):
        if not isinstance(item, Mapping):
            schema.fail(f"'responses_and_scores[{i}]' is {schema.shown(item)}", remedy)
        answers.append(schema.text(item, "response", remedy))
        scores.append(schema.number(schema.field(item, "score", remedy), "score", remedy))
    if not answers:
        schema.fail("'responses_and_scores' is empty", remedy)
    return schema.ranked(Example(prompt, tuple(answers), (), tuple(scores)))


def alpaca_eval(row: Row) -> Example:
    """{instruction, output_1, output_2, preference}: the verdict is 1, 2, or a number between.

    A number between 1 and 2 counts as the nearer of them; 0, 1.5 and null are ties.
    """
    prompt = _instruction(row)
    answers = tuple(schema.text(row, f"output_{x}", _JUDGED) for x in "12")
    verdict = schema.field(row, "preference", _JUDGED)
    verdict = 0.0 if verdict is None else schema.number(verdict, "preference", _JUDGED)
    if verdict != 0 and not 1 <= verdict <= 2:
        schema.fail(f"'preference' is {verdict:g}", _JUDGED)
    ranks = (0, 0) if verdict in (0, 1.5) else (0, 1) if verdict < 1.5 else (1, 0)
    return Example(prompt, answers, ranks)


def pandalm(row: Row) -> Example:
    """{instruction, response1, response2, annotator1, ...}: the answer that more than half prefer.

    Where neither has a majority of the annotators, it is a tie.
    """
    prompt = _instruction(row)
    answers = tuple(schema.text(row, f"response{x}", _JUDGED) for x in "12")
    votes = [row[name] for name in row if re.fullmatch(r"annotator\d+", name)]
    if not votes or any(type(vote) is not int or vote not in (0, 1, 2) for vote in votes):
        schema.fail(f"the annotators' verdicts are {schema.shown(votes)}", _JUDGED)
    ((winner, count),) = Counter(votes).most_common(1)
    winner = winner if 2 * count > len(votes) else 0
    return Example(prompt, answers, {0: (0, 0), 1: (0, 1), 2: (1, 0)}[winner])


def scored_response(row: Row) -> Example:
    """{prompt, response (or completion), score}."""
    prompt = _prompt(row, _SCORED)
    name = "completion" if "completion" in row and "response" not in row else "response"
    prompt, answer = _answer(prompt, row, name, _SCORED)
    score = schema.number(schema.field(row, "score", _SCORED), "score", _SCORED)
    return Example(prompt, (answer,), (), (score,))


def stepwise(row: Row) -> Example:
    """{prompt, completions, labels}: the steps of one response, each right or wrong (TRL's PRM)."""
    prompt = _prompt(row, STEPS)
    steps, labels = (schema.items(row, name, STEPS) for name in ("completions", "labels"))
    if not steps:
        schema.fail("'completions' holds no step", STEPS)
    if len(steps) != len(labels):
        found = f"{len(steps)} 'completions' but {len(labels)} 'labels'"
        schema.fail(found, "give each step its label")
    for i, step in enumerate(steps):
        schema.check_text(step, f"completions[{i}]", STEPS)
    shares = tuple(_label(label, f"labels[{i}]") for i, label in enumerate(labels))
    return Example(prompt, steps=tuple(steps), labels=shares)


def source_target(source: str = "source", target: str = "target", template: str = "{}\n") -> Reader:
    """How translations and summaries are read from rows with the fields `source` and `target`.

    The prompt is `template` with the source in place of {}; a list of sentences is joined by
    spaces. The target is a text or a list of references, of which demonstrations take the first.
    They can lie under 'translation', as in Hugging Face's datasets: `source_target("en", "de")`.
    """
    remedy = f"a row has {source!r} (text or sentences) and {target!r} (text or references)"

    def read(row: Row) -> Example:
        nested = isinstance(row.get("translation"), Mapping)
        fields = row["translation"] if nested else row
        text = schema.field(fields, source, remedy)
        if isinstance(text, list | tuple) and all(isinstance(x, str) for x in text):
            text = " ".join(text)
        prompt = template.replace("{}", schema.check_text(text, source, remedy))
        answers = schema.field(fields, target, remedy)
        answers = answers if isinstance(answers, list | tuple) and answers else [answers]
        answers = tuple(schema.check_text(x, target, remedy) for x in answers)
        language = target if re.fullmatch(r"[a-z]{2,3}", target) else ""
        # Only a part of 'translation' was read, so the other languages in it are kept.
        extra = {"translation": fields} if nested else {}
        return Example(prompt, answers, language=language, extra=extra)

    return read


def _prompt(row: Row, remedy: str) -> str | tuple[Message, ...]:
    value = schema.field(row, "prompt", remedy)
    if not isinstance(value, list | tuple):
        return schema.check_text(value, "prompt", remedy)
    return schema.in_order(schema.messages(value, "prompt", remedy), "user")


def _answer(prompt: Any, row: Row, name: str, remedy: str) -> tuple[Any, str]:
    """(prompt, answer) of one side; its messages continue those of the prompt."""
    value = schema.field(row, name, remedy)
    if isinstance(prompt, str) or not isinstance(value, list | tuple):
        return prompt, schema.check_text(value, name, remedy)
    turns = (*prompt, *schema.messages(value, name, remedy))
    schema.in_order(turns, "assistant")
    return turns[:-1], turns[-1].content


def _label(value: Any, name: str) -> float:
    """The label of a step: true is 1, false is 0, and a number between them is a soft label."""
    share = float(value) if isinstance(value, bool) else schema.number(value, name, STEPS)
    if not 0 <= share <= 1:
        schema.fail(f"{name!r} must lie between 0 and 1, got {schema.shown(value)}", STEPS)
    return share


def _pair(sides: list[tuple[Any, str]]) -> Example:
    (prompt, better), (other, worse) = sides
    if prompt != other:
        found = "'chosen' and 'rejected' differ before their last assistant turn"
        schema.fail(found, "a comparison is of two answers to one prompt")
    return Example(prompt, (better, worse), _PAIR_RANKS)


def _turns(row: Row) -> tuple[Message, ...]:
    name = "messages" if "messages" in row else "conversations"
    turns = schema.messages(schema.field(row, name, _CHAT), name, _CHAT)
    return _system(row) + turns if turns[0].role != "system" else turns


def _system(row: Row) -> tuple[Message, ...]:
    system = row.get("system")
    return (Message("system", system),) if isinstance(system, str) and system.strip() else ()


def _user(row: Row, name: str, remedy: str) -> tuple[Message, ...]:
    return (Message("user", schema.text(row, name, remedy)),)


def _instruction(row: Row) -> tuple[Message, ...]:
    """System turn, history, and the instruction with its input on a line of its own."""
    turns = list(_system(row))
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        schema.fail(f"'history' must be a list, got {schema.shown(history)}", _ALPACA)
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            found = f"'history[{i}]' must be [question, answer], got {schema.shown(pair)}"
            schema.fail(found, _ALPACA)
        for role, said in zip(("user", "assistant"), pair):
            turns.append(Message(role, schema.check_text(said, f"history[{i}]", _ALPACA)))
    asked = schema.text(row, "instruction", _ALPACA)
    more = row.get("input") or ""
    if more:
        schema.check_text(more, "input", "leave 'input' out where there is none")
        asked = f"{asked}\n{more}"
    return (*turns, Message("user", asked))


FORMATS = (
    Format("text", lambda row: "text" in row and not has_prompt(row), plain_text),
    Format(
        "prompt",
        lambda row: (
            has_unranked_prompt(row)
            and not has_any(row, "completion", "text")
            and not is_scored(row)
            and not is_stepwise(row)
        ),
        prompt_only,
    ),
    Format(
        "prompt_completion",
        lambda row: has_unranked_prompt(row) and "completion" in row and not is_labelled(row),
        prompt_completion,
    ),
    Format("preference", is_preference, preference),
    Format("responses", lists_responses, ranked_responses),
    Format(
        "messages",
        lambda row: has_turns(row) and not has_sides(row) and not has_any(row, *LABELS),
        conversation,
    ),
    Format(
        "messages_preference",
        lambda row: has_turns(row) and has_sides(row),
        conversation_preference,
    ),
    Format("labelled", is_labelled, labelled),
    Format(
        "alpaca",
        lambda row: is_unranked_instruction(row) and "output" in row and not has_any(row, *LABELS),
        alpaca,
    ),
    Format(
        "alpaca_ranked",
        lambda row: is_instruction(row) and not is_unranked_instruction(row),
        alpaca_ranked,
    ),
    Format("hh", is_dialogue, hh_dialogues),
    Format(
        "gpt4_pair", lambda row: has(row, "user_input", "completion_a", "completion_b"), gpt4_pair
    ),
    Format("gpt4_scores", lambda row: has(row, "user_input", "responses_and_scores"), gpt4_scores),
    Format(
        "alpaca_eval",
        lambda row: has(row, "output_1", "output_2") and not has(row, "response1", "response2"),
        alpaca_eval,
    ),
    Format("pandalm", lambda row: has(row, "instruction", "response1", "response2"), pandalm),
    Format("scored", is_scored, scored_response),
    Format("stepwise", is_stepwise, stepwise),
    Format(
        "source_target",
        lambda row: (
            has(row, "source", "target") and not has_prompt(row) and not is_instruction(row)
        ),
        source_target(),
    ),
)
