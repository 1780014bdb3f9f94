"""One small function for each layout that files come in: (row, where) -> Example.

Fields are read, never guessed: a row that lacks one, or holds the wrong type in it, is an error
that names the row and the remedy. Fields that a layout does not know are left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.data import schema
from rlhf_jax.data.schema import Example, Message

Row = Mapping[str, Any]
Layout = Callable[[Row, str], Example]

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
_PAIR = (0, 1)


def plain_text(row: Row, where: str) -> Example:
    """{text}."""
    for name in ("prompt", "completion"):
        if name in row:
            schema.fail(where, f"both 'text' and {name!r} are given", DEMONSTRATION)
    return Example("", (schema.text(row, "text", where, DEMONSTRATION),), language=_language(row))


def prompt_only(row: Row, where: str) -> Example:
    """{prompt}, text or messages; any other field is left alone."""
    return Example(_prompt(row, where, PROMPT), language=_language(row))


def prompt_completion(row: Row, where: str) -> Example:
    """{prompt, completion}, text or messages."""
    prompt = _prompt(row, where, DEMONSTRATION + "; use 'text' for a row without a prompt")
    prompt, completion = _answer(prompt, row, "completion", where, DEMONSTRATION)
    return Example(prompt, (completion,), language=_language(row))


def preference(row: Row, where: str) -> Example:
    """{prompt, chosen, rejected[, margin, score_chosen, score_rejected]}, text or messages.

    Where both sides are whole conversations, they part at the last assistant turn, and `prompt` is
    absent or only the question as text.
    """
    chosen = row.get("chosen")
    listed = isinstance(chosen, list | tuple) and all(isinstance(x, Mapping) for x in chosen)
    if "prompt" not in row and not listed:
        schema.fail(where, "'prompt' is missing", COMPARISON)
    whole = listed and isinstance(row.get("prompt", ""), str)
    prompt = () if whole else _prompt(row, where, COMPARISON)
    sides = [_answer(prompt, row, name, where, COMPARISON) for name in ("chosen", "rejected")]
    margin = row.get("margin", 0.0)
    margin = schema.number(margin, "margin", where, "leave it out for no margin")
    names = [name for name in ("score_chosen", "score_rejected") if name in row]
    scores = tuple(schema.number(row[name], name, where, _SCORED) for name in names)
    example = _pair(sides, where)._replace(margin=margin, language=_language(row))
    return schema.ranked(example._replace(scores=scores), where)


def ranked_responses(row: Row, where: str) -> Example:
    """{prompt, responses} with {ranks}, {scores} or both."""
    for name in ("chosen", "rejected", "margin"):
        if name in row:
            schema.fail(where, f"{name!r} is given beside 'responses' and 'ranks'", COMPARISON)
    prompt = _prompt(row, where, COMPARISON)
    responses = schema.items(row, "responses", where, COMPARISON)
    scores = schema.items(row, "scores", where, COMPARISON) if "scores" in row else []
    only_scores = scores and "ranks" not in row
    ranks = [] if only_scores else schema.items(row, "ranks", where, COMPARISON)
    if len(responses) < (1 if only_scores else 2):
        schema.fail(where, f"'responses' holds {len(responses)}; it takes 2 or more", COMPARISON)
    if not only_scores and len(ranks) != len(responses):
        found = f"{len(responses)} 'responses' but {len(ranks)} 'ranks'"
        schema.fail(where, found, "give each response its rank, 0 for the best")
    for i, response in enumerate(responses):
        schema.check_text(response, f"responses[{i}]", where, COMPARISON)
    for i, rank in enumerate(ranks):
        # bool is an int to Python; a rank of true is a mistake in the file.
        if type(rank) is not int or not 0 <= rank < 2**31:
            found = f"'ranks[{i}]' must be a whole number from 0, got {schema.shown(rank)}"
            schema.fail(where, found, "0 is best, equal ranks are ties")
    scores = tuple(schema.number(x, f"scores[{i}]", where, _SCORED) for i, x in enumerate(scores))
    example = Example(prompt, tuple(responses), tuple(ranks), scores, language=_language(row))
    return schema.ranked(example, where)


def conversation(row: Row, where: str) -> Example:
    """{messages} or {conversations}: ends with an answer, or with the user in a file of prompts."""
    turns = _turns(row, where)
    if turns[-1].role != "assistant":
        return Example(schema.in_order(turns, where, "user"), language=_language(row))
    schema.in_order(turns, where, "assistant")
    return Example(turns[:-1], (turns[-1].content,), language=_language(row))


def conversation_preference(row: Row, where: str) -> Example:
    """{messages or conversations, chosen, rejected}: each a message or its text."""
    prompt = schema.in_order(_turns(row, where), where, "user")
    sides = []
    for name in ("chosen", "rejected"):
        value = schema.field(row, name, where, COMPARISON)
        if isinstance(value, Mapping):
            answer = schema.message(value, name, where)
            schema.in_order([*prompt, answer], where, "assistant")
            value = answer.content
        sides.append((prompt, schema.check_text(value, name, where, COMPARISON)))
    return _pair(sides, where)._replace(language=_language(row))


def labelled(row: Row, where: str) -> Example:
    """One answer that is good or bad (KTO), under any of the three ways to give it: score 1 or 0.

    {prompt, completion, label}, {messages or conversations, label}, {instruction, output, label};
    `tag` and `kto_tag` are other names of `label`.
    """
    if "instruction" in row:
        example = alpaca(row, where)
    elif "completion" in row:
        example = prompt_completion(row, where)
    else:
        example = conversation(row, where)
    if not example.responses:
        schema.fail(where, "the conversation does not end with an answer", _KTO)
    name = next((name for name in ("label", "kto_tag", "tag") if name in row), "label")
    label = schema.field(row, name, where, _KTO)
    if label not in (True, False):
        schema.fail(where, f"{name!r} must be true or false, got {schema.shown(label)}", _KTO)
    return example._replace(scores=(float(label),))


def alpaca(row: Row, where: str) -> Example:
    """{instruction, output[, input, history, system]}."""
    answer = schema.text(row, "output", where, _ALPACA)
    return Example(_instruction(row, where), (answer,), language=_language(row))


def alpaca_ranked(row: Row, where: str) -> Example:
    """{instruction, output: [best, ..., worst]} or {instruction, chosen, rejected}."""
    prompt = _instruction(row, where)
    if "output" in row and not {"chosen", "rejected"} & set(row):
        answers = schema.items(row, "output", where, _ALPACA + "; a list is best first")
        names = [f"output[{i}]" for i in range(len(answers))]
        if len(answers) < 2:
            schema.fail(where, f"'output' holds {len(answers)}; a ranking takes 2 or more", _ALPACA)
    else:
        names = ["chosen", "rejected"]
        answers = [schema.field(row, name, where, COMPARISON) for name in names]
    for name, answer in zip(names, answers):
        schema.check_text(answer, name, where, _ALPACA)
    ranks = tuple(range(len(answers)))
    return Example(prompt, tuple(answers), ranks, language=_language(row))


def hh_dialogues(row: Row, where: str) -> Example:
    """{chosen, rejected}: whole dialogues as one text each (HH-RLHF)."""
    remedy = "both sides are one dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns"
    sides = []
    for name in ("chosen", "rejected"):
        dialogue = "\n\n" + schema.text(row, name, where, remedy).strip()
        start, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
        if start.strip() or not parts:
            schema.fail(where, f"{name!r} does not start with a turn", remedy)
        turns = [
            {"role": role.lower().replace("human", "user"), "content": content.strip()}
            for role, content in zip(parts[::2], parts[1::2])
        ]
        turns = schema.messages(turns, name, where, remedy)
        schema.in_order(turns, where, "assistant")
        sides.append((turns[:-1], turns[-1].content))
    return _pair(sides, where)


def gpt4_pair(row: Row, where: str) -> Example:
    """{user_input, completion_a, completion_b}: a is the better one (GPT-4-LLM, version 1)."""
    prompt = _user(row, "user_input", where, COMPARISON)
    sides = [schema.text(row, f"completion_{x}", where, COMPARISON) for x in "ab"]
    return Example(prompt, tuple(sides), _PAIR, language=_language(row))


def gpt4_scores(row: Row, where: str) -> Example:
    """{user_input, responses_and_scores: [{response, score}, ...]} (GPT-4-LLM, version 2)."""
    remedy = "'responses_and_scores' lists objects with 'response' and 'score'"
    prompt = _user(row, "user_input", where, remedy)
    answers, scores = [], []
    for i, item in enumerate(schema.items(row, "responses_and_scores", where, remedy)):
        if not isinstance(item, Mapping):
            schema.fail(where, f"'responses_and_scores[{i}]' is {schema.shown(item)}", remedy)
        answers.append(schema.text(item, "response", where, remedy))
        score = schema.field(item, "score", where, remedy)
        scores.append(schema.number(score, "score", where, remedy))
    if not answers:
        schema.fail(where, "'responses_and_scores' is empty", remedy)
    example = Example(prompt, tuple(answers), (), tuple(scores), language=_language(row))
    return schema.ranked(example, where)


def alpaca_eval(row: Row, where: str) -> Example:
    """{instruction, output_1, output_2, preference}; a verdict between 1 and 2 goes to the nearer.

    0, 1.5 and null are ties.
    """
    prompt = _instruction(row, where)
    answers = tuple(schema.text(row, f"output_{x}", where, _JUDGED) for x in "12")
    verdict = schema.field(row, "preference", where, _JUDGED)
    verdict = 0.0 if verdict is None else schema.number(verdict, "preference", where, _JUDGED)
    if verdict != 0 and not 1 <= verdict <= 2:
        schema.fail(where, f"'preference' is {verdict:g}", _JUDGED)
    ranks = (0, 0) if verdict in (0, 1.5) else (0, 1) if verdict < 1.5 else (1, 0)
    return Example(prompt, answers, ranks, language=_language(row))


def pandalm(row: Row, where: str) -> Example:
    """{instruction, response1, response2, annotator1, ...}: what more than half say, or a tie."""
    prompt = _instruction(row, where)
    answers = tuple(schema.text(row, f"response{x}", where, _JUDGED) for x in "12")
    votes = [row[name] for name in row if re.fullmatch(r"annotator\d+", name)]
    if not votes or any(type(vote) is not int or vote not in (0, 1, 2) for vote in votes):
        schema.fail(where, f"the annotators' verdicts are {schema.shown(votes)}", _JUDGED)
    ((winner, count),) = Counter(votes).most_common(1)
    winner = winner if 2 * count > len(votes) else 0
    ranks = {0: (0, 0), 1: (0, 1), 2: (1, 0)}[winner]
    return Example(prompt, answers, ranks, language=_language(row))


def scored_response(row: Row, where: str) -> Example:
    """{prompt, response (or completion), score}."""
    prompt = _prompt(row, where, _SCORED)
    name = "completion" if "completion" in row and "response" not in row else "response"
    prompt, answer = _answer(prompt, row, name, where, _SCORED)
    score = schema.number(schema.field(row, "score", where, _SCORED), "score", where, _SCORED)
    return Example(prompt, (answer,), (), (score,), language=_language(row))


def source_target(source: str = "source", target: str = "target", template: str = "{}\n") -> Layout:
    """The layout of translation and summary rows, under the fields of that name.

    The prompt is `template` with the source for {}; a list of sentences is joined by spaces. The
    target is a text or a list of references, of which demonstrations take the first. The fields
    can lie under 'translation', as Hugging Face's sets have them: `source_target("en", "de")`.
    """
    remedy = f"a row has {source!r} (text or sentences) and {target!r} (text or references)"

    def layout(row: Row, where: str) -> Example:
        inner = row.get("translation")
        inner = inner if isinstance(inner, Mapping) else row

        text = schema.field(inner, source, where, remedy)
        if isinstance(text, list | tuple) and all(isinstance(x, str) for x in text):
            text = " ".join(text)
        prompt = template.replace("{}", schema.check_text(text, source, where, remedy))
        answers = schema.field(inner, target, where, remedy)
        answers = answers if isinstance(answers, list | tuple) and answers else [answers]
        answers = tuple(schema.check_text(x, target, where, remedy) for x in answers)
        language = target if re.fullmatch(r"[a-z]{2,3}", target) else _language(row)
        return Example(prompt, answers, language=language)

    return layout


def _language(row: Row) -> str:
    found = row.get("language", row.get("lang", ""))
    return found if isinstance(found, str) else ""


def _prompt(row: Row, where: str, remedy: str) -> str | tuple[Message, ...]:
    value = schema.field(row, "prompt", where, remedy)
    if not isinstance(value, list | tuple):
        return schema.check_text(value, "prompt", where, remedy)
    turns = schema.messages(value, "prompt", where, remedy)
    return schema.in_order(turns, where, "user")


def _answer(prompt: Any, row: Row, name: str, where: str, remedy: str) -> tuple[Any, str]:
    """(prompt, answer) of one side; messages go on where the prompt's stop."""
    value = schema.field(row, name, where, remedy)
    if isinstance(prompt, str) or not isinstance(value, list | tuple):
        return prompt, schema.check_text(value, name, where, remedy)
    turns = (*prompt, *schema.messages(value, name, where, remedy))
    schema.in_order(turns, where, "assistant")
    return turns[:-1], turns[-1].content


def _pair(sides: list[tuple[Any, str]], where: str) -> Example:
    (prompt, better), (other, worse) = sides
    if prompt != other:
        found = "'chosen' and 'rejected' differ before their last assistant turn"
        schema.fail(where, found, "a comparison is of two answers to one prompt")
    return Example(prompt, (better, worse), _PAIR)


def _turns(row: Row, where: str) -> tuple[Message, ...]:
    name = "messages" if "messages" in row else "conversations"
    turns = schema.messages(schema.field(row, name, where, _CHAT), name, where, _CHAT)
    return _system(row) + turns if turns[0].role != "system" else turns


def _system(row: Row) -> tuple[Message, ...]:
    system = row.get("system")
    return (Message("system", system),) if isinstance(system, str) and system.strip() else ()


def _user(row: Row, name: str, where: str, remedy: str) -> tuple[Message, ...]:
    return (Message("user", schema.text(row, name, where, remedy)),)


def _instruction(row: Row, where: str) -> tuple[Message, ...]:
    """System turn, history and the instruction, its input on a line of its own."""
    turns = list(_system(row))
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        schema.fail(where, f"'history' must be a list, got {schema.shown(history)}", _ALPACA)
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            found = f"'history[{i}]' must be [question, answer], got {schema.shown(pair)}"
            schema.fail(where, found, _ALPACA)
        for role, said in zip(("user", "assistant"), pair):
            turns.append(Message(role, schema.check_text(said, f"history[{i}]", where, _ALPACA)))
    asked = schema.text(row, "instruction", where, _ALPACA)
    more = row.get("input") or ""
    if more:
        schema.check_text(more, "input", where, "leave 'input' out where there is none")
        asked = f"{asked}\n{more}"
    return (*turns, Message("user", asked))
