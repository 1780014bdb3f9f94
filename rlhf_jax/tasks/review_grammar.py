"""The language of the review task: its items, its sentences, and a parser for them.

A sentence is made from a template by filling in an item and the words of SLOTS. The same tables
write the demonstrations of `reviews` and build the parser with which its gold score reads
responses, so that whatever is written can also be read.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

# The names of the items: for each domain a template and the words for its two blanks.
NAMES = {
    "product": (
        "the {} {}",
        "Nova Orion Atlas Delta Vega Lumen Pico Titan".split(),
        "camera radio lamp drill watch torch clock tablet".split(),
    ),
    "film": (
        "The {} {}",
        "Silver Hidden Last Quiet Broken Golden Winter Empty".split(),
        "Harbour Garden River Letter Bridge Island Train Storm".split(),
    ),
}
# What stands in place of the name where a response does not name its item.
UNNAMED = {"product": ("this thing", "it"), "film": ("this one", "it")}
QUESTIONS = ("What do you think of {item}?", "Is {item} any good?")
PROMPTS = {
    "product": ("Write a review of {item}.", "Review {item}.", *QUESTIONS),
    "film": ("Write a review of the film {item}.", "Review the film {item}.", *QUESTIONS),
}
SLOTS = {
    "number": "two three four five six nine".split(),
    "day": "Monday Friday Sunday".split(),
    "use": ("long trips", "daily work"),
    "habit": ("travel", "camp"),
    "company": ("friends", "children"),
    "taste": ("songs", "jokes"),
}
OPENINGS = {
    "product": ("I used {item} {number} times.", "I bought {item} on {day}."),
    "film": ("I saw {item} on {day}.", "I saw {item} with {company}."),
}
FACTS = {  # domain: aspect: (a concrete strength, a concrete weakness)
    "product": {
        "battery": ("lasts {number} hours", "died in {number} hours"),
        "case": ("survived {number} falls", "broke on {day}"),
        "charger": ("fits in a pocket", "runs hot at night"),
        "switch": ("works with gloves", "broke in {number} days"),
        "manual": ("shows each step", "skips {number} steps"),
    },
    "film": {
        "plot": ("hides {number} clues", "stops for {number} hours"),
        "cast": ("learned {number} dances", "mumbles each line"),
        "music": ("has {number} old songs", "hides each voice"),
        "ending": ("answers each question", "leaves {number} questions"),
        "script": ("has {number} good jokes", "repeats {number} jokes"),
    },
}
VAGUE = {
    "strength": ("is good", "is nice", "is fine"),
    "weakness": ("is bad", "is poor", "is weak"),
}
VERDICTS = {
    "product": ("Buy it for {use}.", "Skip it if you {habit}.", "I recommend it for {use}."),
    "film": ("Go with {company}.", "Skip it if you hate {taste}.", "I recommend it to {company}."),
}
HEDGES = ("Maybe try it one day.", "It might be worth a look.", "Some people may like it.")
CHATTER = {
    "product": ("It came in a box.", "My friends have one too.", "The box came on {day}."),
    "film": ("It rained on {day}.", "I sat near the door.", "We had tea and cake."),
}
CLOSINGS = ("That is all for now.", "I can say no more.", "So much for that.")
FILLERS = ("Wow, ", "!!!", "very very ")  # the last one only in a vague judgement


class Sentence(NamedTuple):
    """What the parser found in one sentence."""

    text: str  # the sentence without its filler
    kind: str  # opening, strength, weakness, verdict, hedge or chatter
    domain: str  # product, film, or any where the sentence suits both
    item: str = ""  # the item that it names
    aspect: str = ""  # what a strength or weakness is about, such as the battery
    concrete: bool = False  # whether a strength or weakness is a fact rather than a vague word
    fillers: int = 0  # how many fillers were removed


def items(domain: str) -> list[str]:
    """The names of all items of a domain."""
    form, first, second = NAMES[domain]
    return [form.format(a, b) for a in first for b in second]


def subject(prompt: str) -> tuple[str, str]:
    """Returns the item that a prompt asks about and its domain, "product" or "film".

    Raises ValueError where the prompt names no item.
    """
    for domain in NAMES:
        match = re.search(_names(domain), prompt)
        if match:
            return match.group(), domain
    raise ValueError(
        f"prompt: {prompt!r} names no item; a prompt of this task names a product such as "
        "'the Nova camera' or a film such as 'The Silver Harbour'; take prompts from make()"
    )


def split(response: str) -> list[str]:
    """Splits a response into sentences, each with its final mark.

    Text after the last mark is one more sentence, which no rule of the grammar accepts.
    """
    text = response.strip()
    return re.split(r"(?<=[.!?]) ", text) if text else []


def grammatical(response: str) -> bool:
    """Whether the response is one to five sentences, all of which are in the grammar."""
    sentences = split(response)
    return 1 <= len(sentences) <= 5 and all(parse(sentence) for sentence in sentences)


@functools.lru_cache(maxsize=65536)
def parse(sentence: str) -> Sentence | None:
    """Parses one sentence with its final mark. Returns None where it is not in the grammar."""
    text, fillers = sentence, 0
    if text.endswith("!!!"):
        text, fillers = text[:-3] + ".", fillers + 1
    if text.startswith("Wow, "):
        text, fillers = text[5:], fillers + 1
        if text[:1].isupper() and not text.startswith("I "):
            return None
        text = text[:1].upper() + text[1:]
    text = re.sub(r"^But the ", "The ", text)
    stressed = re.match(r"The \w+ is very very ", text) is not None
    text = text.replace(" very very ", " ", 1) if stressed else text
    for pattern, meaning in _rules():
        match = pattern.fullmatch(text)
        if match:
            item = match.groupdict().get("item") or ""
            return Sentence(text, item=item, fillers=fillers + stressed, **meaning)
    return None


@functools.cache
def _rules() -> list[tuple[re.Pattern[str], dict[str, str | bool]]]:
    """One rule per kind of sentence: a regular expression and the fields of its Sentence."""
    rules = [(_any_of(HEDGES), dict(kind="hedge", domain="any"))]
    rules.append((_any_of(CLOSINGS), dict(kind="chatter", domain="any")))
    for domain, aspects in FACTS.items():
        rules.append((_any_of(VERDICTS[domain]), dict(kind="verdict", domain=domain)))
        rules.append((_any_of(CHATTER[domain]), dict(kind="chatter", domain=domain)))
        item = f"(?:(?P<item>{_names(domain)})|{_any_of(UNNAMED[domain])})"
        for opening in OPENINGS[domain]:  # one rule each: a pattern can hold a named group once
            pattern = _pattern(opening).replace("{item}", item)
            rules.append((pattern, dict(kind="opening", domain=domain)))
        for aspect, facts in aspects.items():
            for kind, fact in zip(("strength", "weakness"), facts):
                for options, concrete in (((fact,), True), (VAGUE[kind], False)):
                    meaning = dict(kind=kind, domain=domain, aspect=aspect, concrete=concrete)
                    rules.append((rf"The {aspect} {_any_of(options)}\.", meaning))
    return [(re.compile(pattern), meaning) for pattern, meaning in rules]


def _any_of(options: Sequence[str]) -> str:
    return "(?:" + "|".join(_pattern(option) for option in options) + ")"


def _names(domain: str) -> str:
    form, first, second = NAMES[domain]
    return form.format(_any_of(first), _any_of(second))


def _pattern(template: str) -> str:
    """The regular expression of a template: {item} stays, other slots become their alternatives."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(
        re.escape(piece) if i % 2 == 0 else "{item}" if piece == "item" else _any_of(SLOTS[piece])
        for i, piece in enumerate(pieces)
    )
