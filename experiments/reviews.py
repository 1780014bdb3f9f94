"""A made task with a known gold score: short reviews of products and films.

A prompt asks for a review of one item, a response is two to four short sentences from the grammar
below. What a careful reader likes is known exactly: `gold(prompt, response)` in [0, 1] is

    0.12  topic    the first sentence names the item asked for (0.06: a later one does)
    0.28  detail   0.14 for each of two aspects judged by a concrete fact, not by a vague word
    0.22  balance  a strength and a weakness (0.08: only one of the two)
    0.22  verdict  the last sentence recommends clearly (0.11: with a hedge), and only it does
    0.16  plain    two or more useful sentences and no filler (0.08: one filler)

less 0.15 for every sentence outside the grammar, 0.10 for every repeated one, for every one about
another item or of the other domain, and for every sentence beyond the fourth. Only sentences that
parse earn anything, so a heap of keywords scores 0. An example:

    Write a review of the Nova camera.

    1.00  I used the Nova camera six times. The battery lasts nine hours.
          But the manual skips two steps. Buy it for long trips.
    0.19  Wow, I bought it on Monday. The battery is very very nice. It came in a box.
          Maybe try it one day.                  (one-sided praise 0.08, hedge 0.11)

Demonstrations draw every property by chance (gold 0.46 on average, standard deviation 0.19), so
that a policy which imitates them has room to improve: by tilting their distribution, mean gold 0.80
costs 1.5 nats of KL per response, 0.88 2.5, 0.94 3.5, and 1.0 everywhere 5.1 (`ideal_kl`). A
byte-level BPE of 768 entries needs 24 tokens for one on average, 33 at most. Comparisons are pairs
(or rankings of K) of such responses, one in eight corrupted, labelled with Bradley-Terry
(Plackett-Luce) noise: P(a above b) = sigmoid(sharpness * (gold(a) - gold(b))). No reward model can
be expected to agree with those labels more often than `best_reachable` says: 0.76 at the default
sharpness of 6.
"""

import functools
import json
import math
import pathlib
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# The grammar: names, and templates whose slots are {item} and the keys of SLOTS.

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

# The demonstrations: the chance of each free choice.
NAMED = 0.5
PLAIN = 0.5
POINT = {"concrete": 0.30, "vague": 0.28, "chatter": 0.30, "absent": 0.12}
ENDING = {"verdict": 0.34, "hedge": 0.30, "closing": 0.36}
CORRUPTED = 0.12  # share of the responses in comparisons that are damaged
SHARPNESS = 6.0

# The gold score: its points are in `properties`.
COST_BROKEN, COST_REPEATED, COST_OFF_TOPIC, COST_EXCESS = 0.15, 0.10, 0.10, 0.10


class Sentence(NamedTuple):
    """What the recogniser found in one sentence; `text` is the sentence without its filler."""

    text: str
    kind: str  # opening, strength, weakness, verdict, hedge or chatter
    domain: str  # product, film or any
    item: str = ""  # the item that it names
    aspect: str = ""  # what a strength or weakness is about
    concrete: bool = False
    fillers: int = 0


class Comparison(NamedTuple):
    """Responses to one prompt from the most to the least preferred, and their gold scores."""

    prompt: str
    responses: tuple[str, ...]
    golds: tuple[float, ...]


class Task(NamedTuple):
    """The files of the task, its two judges and what can be reached.

    `best_accuracy` is the expected and `realised_accuracy` the actual agreement of the gold score
    with the labels of `comparisons_eval`; `demonstration_gold` is the mean gold of demonstrations.
    """

    demonstrations: pathlib.Path
    comparisons: pathlib.Path
    comparisons_eval: pathlib.Path
    prompts: pathlib.Path
    prompts_eval: pathlib.Path
    gold: Callable[[str, str], float]
    grammatical: Callable[[str], bool]
    best_accuracy: float
    realised_accuracy: float
    demonstration_gold: float


def _any_of(options: Sequence[str]) -> str:
    return "(?:" + "|".join(_pattern(option) for option in options) + ")"


def _names(domain: str) -> str:
    form, first, second = NAMES[domain]
    return form.format(_any_of(first), _any_of(second))


def _pattern(template: str) -> str:
    """Template -> regular expression; {item} stays, every other slot becomes its alternatives."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(
        re.escape(piece) if i % 2 == 0 else "{item}" if piece == "item" else _any_of(SLOTS[piece])
        for i, piece in enumerate(pieces)
    )


@functools.cache
def _rules() -> list[tuple[re.Pattern[str], dict[str, str | bool]]]:
    """(regular expression of a whole sentence, what such a sentence means), for every sort."""
    rules = [(_any_of(HEDGES), dict(kind="hedge", domain="any"))]
    rules.append((_any_of(CLOSINGS), dict(kind="chatter", domain="any")))
    for domain, aspects in FACTS.items():
        rules.append((_any_of(VERDICTS[domain]), dict(kind="verdict", domain=domain)))
        rules.append((_any_of(CHATTER[domain]), dict(kind="chatter", domain=domain)))
        item = f"(?:(?P<item>{_names(domain)})|{_any_of(UNNAMED[domain])})"
        for opening in OPENINGS[domain]:  # one rule each: a group may occur only once in a rule
            pattern = _pattern(opening).replace("{item}", item)
            rules.append((pattern, dict(kind="opening", domain=domain)))
        for aspect, facts in aspects.items():
            for kind, fact in zip(("strength", "weakness"), facts):
                for options, concrete in (((fact,), True), (VAGUE[kind], False)):
                    meaning = dict(kind=kind, domain=domain, aspect=aspect, concrete=concrete)
                    rules.append((rf"The {aspect} {_any_of(options)}\.", meaning))
    return [(re.compile(pattern), meaning) for pattern, meaning in rules]


@functools.lru_cache(maxsize=65536)
def parse(sentence: str) -> Sentence | None:
    """One sentence with its final mark -> its meaning, or None where it is not in the grammar."""
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


def split(response: str) -> list[str]:
    """Response -> its sentences with their marks; an unfinished ending is a sentence as well."""
    text = response.strip()
    return re.split(r"(?<=[.!?]) ", text) if text else []


def grammatical(response: str) -> bool:
    """Whether the response is one to five sentences, every one of them in the grammar."""
    sentences = split(response)
    return 1 <= len(sentences) <= 5 and all(parse(sentence) for sentence in sentences)


def subject(prompt: str) -> tuple[str, str]:
    """Prompt -> (the item it asks about, "product" or "film"); ValueError where it names none."""
    for domain in NAMES:
        match = re.search(_names(domain), prompt)
        if match:
            return match.group(), domain
    raise ValueError(
        f"prompt: {prompt!r} names no item; a prompt of this task names a product such as "
        "'the Nova camera' or a film such as 'The Silver Harbour'; take prompts from make()"
    )


def properties(prompt: str, response: str) -> dict[str, float]:
    """The points (positive) and costs (negative) of a response; `gold` is their clipped sum."""
    item, domain = subject(prompt)
    sentences = [parse(sentence) for sentence in split(response)]
    useful: list[Sentence] = []
    cost = dict(broken=0.0, repeated=0.0, off_topic=0.0)
    for sentence in sentences:
        if sentence is None:
            cost["broken"] -= COST_BROKEN
        elif any(sentence.text == earlier.text for earlier in useful):
            cost["repeated"] -= COST_REPEATED
        elif sentence.domain not in (domain, "any") or sentence.item not in (item, ""):
            cost["off_topic"] -= COST_OFF_TOPIC
        else:
            useful.append(sentence)
    named = any(sentence.item == item for sentence in useful)
    first = named and sentences[0] is not None and sentences[0].item == item
    details = {sentence.aspect for sentence in useful if sentence.concrete}
    sides = {sentence.kind for sentence in useful} & {"strength", "weakness"}
    verdicts = [sentence for sentence in useful if sentence.kind in ("verdict", "hedge")]
    ends = len(verdicts) == 1 and verdicts[0] == sentences[-1]
    fillers = sum(sentence.fillers for sentence in sentences if sentence is not None)
    return {
        "topic": 0.12 if first else 0.06 if named else 0.0,
        "detail": 0.14 * min(2, len(details)),
        "balance": (0.0, 0.08, 0.22)[len(sides)],
        "verdict": (0.22 if verdicts[0].kind == "verdict" else 0.11) if ends else 0.0,
        "plain": 0.08 * max(0, 2 - fillers) if len(useful) >= 2 else 0.0,
        **cost,
        "excess": -COST_EXCESS * max(0, len(sentences) - 4),
    }


def gold(prompt: str, response: str) -> float:
    """The gold score in [0, 1] of any text as a response to a prompt of this task; garbage is 0."""
    total = sum(properties(prompt, response).values())
    return round(min(1.0, max(0.0, total)), 6)  # rounded, so that equal reviews score equal


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    # random() alone: the sequence that Python promises to keep from version to version
    return options[int(rng.random() * len(options))]


def _fill(rng: random.Random, template: str, item: str = "") -> str:
    words = {slot: _pick(rng, SLOTS[slot]) for slot in SLOTS if "{" + slot + "}" in template}
    return template.format(item=item, **words)


def _with_filler(rng: random.Random, sentence: str) -> str:
    meaning = parse(sentence)
    vague = meaning.aspect and not meaning.concrete
    filler = _pick(rng, FILLERS if vague else FILLERS[:2])
    if filler == "!!!":
        return sentence[:-1] + filler
    if filler == "Wow, ":
        first = sentence[0] if sentence.startswith("I ") else sentence[0].lower()
        return filler + first + sentence[1:]
    return sentence.replace(" is ", f" is {filler}")


def review(rng: random.Random, item: str) -> list[str]:
    """The sentences of one demonstration about an item, every free choice drawn by its chance."""
    _, domain = subject(item)
    name = item if rng.random() < NAMED else _pick(rng, UNNAMED[domain])
    chatter = list(CHATTER[domain])
    points = []
    for side, kind in enumerate(("strength", "weakness")):
        outcome = rng.choices(list(POINT), list(POINT.values()))[0]
        aspect = _pick(rng, list(FACTS[domain]))
        judgement = {"concrete": FACTS[domain][aspect][side], "vague": _pick(rng, VAGUE[kind])}
        if outcome in judgement:
            points.append(_fill(rng, f"The {aspect} {judgement[outcome]}."))
        elif outcome == "chatter":
            points.append(_fill(rng, chatter.pop(int(rng.random() * len(chatter)))))
    if rng.random() < 0.5:
        points.reverse()
    if len(points) == 2 and all(parse(point).aspect for point in points) and rng.random() < 0.5:
        points[1] = "But the" + points[1].removeprefix("The")
    endings = {"verdict": VERDICTS[domain], "hedge": HEDGES, "closing": CLOSINGS}
    opening = _fill(rng, _pick(rng, OPENINGS[domain]), name)
    ending = endings[rng.choices(list(ENDING), list(ENDING.values()))[0]]
    sentences = [opening, *points, _fill(rng, _pick(rng, ending))]
    if rng.random() >= PLAIN:
        places = list(range(len(sentences)))
        for _ in range(1 + (rng.random() < 0.5)):
            place = places.pop(int(rng.random() * len(places)))
            sentences[place] = _with_filler(rng, sentences[place])
    return sentences


def ideal_kl() -> float:
    """KL (nats per response) from the demonstrations of those demonstrations whose gold is 1.

    Conditioning a distribution p on an event A costs KL(p(. | A) || p) = -log p(A). Here A is: the
    item is named, strength and weakness are concrete and of two aspects, the ending is a verdict,
    and nothing is filler. No policy that always scores 1 is closer to the demonstrations.
    """
    points = POINT["concrete"] ** 2 * (1 - 1 / len(FACTS["product"]))
    return -math.log(NAMED * points * ENDING["verdict"] * PLAIN)


def corrupt(rng: random.Random, item: str, sentences: list[str]) -> str:
    """One damage: a word dropped, two swapped, a sentence repeated, the end cut, a wrong item."""
    damage = _pick(rng, ("drop", "swap", "repeat", "cut", "rename"))
    if damage == "rename":
        _, domain = subject(item)
        other = _pick(rng, [name for name in items(domain) if name != item])
        return " ".join([_fill(rng, _pick(rng, OPENINGS[domain]), other), *sentences[1:]])
    if damage == "repeat":
        place = int(rng.random() * (len(sentences) - 1))
        return " ".join([*sentences[: place + 1], sentences[place], *sentences[place + 2 :]])
    words = " ".join(sentences).split(" ")
    place = int(rng.random() * (len(words) - 1))
    if damage == "drop":
        del words[place]
    elif damage == "swap":
        words[place : place + 2] = words[place + 1], words[place]
    else:
        words = words[: max(1, len(words) - 1 - int(rng.random() * len(words) / 2))]
        words[-1] = words[-1].rstrip(".!")
    return " ".join(words)


def items(domain: str) -> list[str]:
    """Every item of a domain, by name."""
    form, first, second = NAMES[domain]
    return [form.format(a, b) for a in first for b in second]


def split_prompts(seed: int) -> tuple[list[str], list[str]]:
    """-> (training prompts, held-out prompts): 384 and 128, of different items, in random order.

    Held out are two items of every row and column of each table of names: a held-out item is a new
    combination of two words that both occur in training.
    """
    rng = random.Random(f"{seed}/prompts")
    parts: tuple[list[str], list[str]] = ([], [])
    for domain, (_, first, second) in NAMES.items():
        size = len(second)
        rows = sorted(range(len(first)), key=lambda _: rng.random())
        columns = sorted(range(size), key=lambda _: rng.random())
        for i, item in enumerate(items(domain)):
            held_out = (rows[i // size] + columns[i % size]) % size < 2
            parts[held_out].extend(form.format(item=item) + "\n" for form in PROMPTS[domain])
    for part in parts:
        part.sort(key=lambda _: rng.random())
    return parts


def compare(
    rng: random.Random, prompts: Sequence[str], count: int, responses: int, sharpness: float
) -> list[Comparison]:
    """Draws comparisons: prompts uniformly, different responses, a noisy Plackett-Luce ranking."""
    rows = []
    for _ in range(count):
        prompt = _pick(rng, prompts)
        item, _ = subject(prompt)
        golds: dict[str, float] = {}
        while len(golds) < responses:  # an identical text is drawn again
            sentences = review(rng, item)
            broken = rng.random() < CORRUPTED
            text = corrupt(rng, item, sentences) if broken else " ".join(sentences)
            golds[text] = gold(prompt, text)
        # the order of score + Gumbel noise is a Plackett-Luce ranking; of two, Bradley-Terry
        noisy = {
            text: sharpness * score - math.log(-math.log(rng.random() or 0.5))
            for text, score in golds.items()
        }
        order = sorted(golds, key=noisy.__getitem__, reverse=True)
        rows.append(Comparison(prompt, tuple(order), tuple(golds[text] for text in order)))
    return rows


def _gaps(comparisons: Sequence[Comparison]) -> list[float]:
    """gold(preferred) - gold(other) of every pair of every comparison."""
    return [a - b for c in comparisons for i, a in enumerate(c.golds) for b in c.golds[i + 1 :]]


def best_reachable(comparisons: Sequence[Comparison], sharpness: float = SHARPNESS) -> float:
    """Expected accuracy of the gold score on noisy pairs: the mean of sigmoid(sharpness |gap|)."""
    chances = [1.0 / (1.0 + math.exp(-sharpness * abs(gap))) for gap in _gaps(comparisons)]
    return sum(chances) / len(chances)


def agreement(comparisons: Sequence[Comparison]) -> float:
    """The share of pairs whose preferred response has the higher gold score; a tie counts 1/2."""
    hits = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in _gaps(comparisons)]
    return sum(hits) / len(hits)


def _row(comparison: Comparison) -> dict[str, str | list[str] | list[int]]:
    prompt, responses, _ = comparison
    if len(responses) == 2:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    return {"prompt": prompt, "responses": list(responses), "ranks": list(range(len(responses)))}


def _write(path: pathlib.Path, rows: Sequence[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def make(
    seed: int,
    folder: str | pathlib.Path,
    *,
    num_demonstrations: int = 4000,
    num_comparisons: int = 6000,
    num_eval_comparisons: int = 2500,
    num_prompts: int = 384,
    responses_per_prompt: int = 2,
    sharpness: float = SHARPNESS,
) -> Task:
    """Writes the five jsonl files into `folder` (made if absent) and returns the Task.

    Prompts end in a newline and completions follow directly. `num_prompts` distinct training
    prompts go to `prompts`, all 128 held-out ones to `prompts_eval`. The same seed writes the same
    bytes; each file has its own random stream, so the length of one changes no other. A comparison
    is {prompt, chosen, rejected}, or {prompt, responses, ranks} for `responses_per_prompt` > 2.
    Raises ValueError for a count out of its range.
    """
    train, held_out = split_prompts(seed)
    for name, value, low, high in (
        ("num_demonstrations", num_demonstrations, 1, math.inf),
        ("num_comparisons", num_comparisons, 1, math.inf),
        ("num_eval_comparisons", num_eval_comparisons, 1, math.inf),
        ("num_prompts", num_prompts, 1, len(train)),
        ("responses_per_prompt", responses_per_prompt, 2, 9),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: {value} is not in {low}..{high}; choose a count within it")

    def stream(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}")

    rng = stream("demonstrations")
    asked = [_pick(rng, train) for _ in range(num_demonstrations)]
    told = [" ".join(review(rng, subject(prompt)[0])) for prompt in asked]
    shape = (responses_per_prompt, sharpness)
    comparisons = compare(stream("comparisons"), train, num_comparisons, *shape)
    judged = compare(stream("comparisons_eval"), held_out, num_eval_comparisons, *shape)
    files = {
        "demonstrations": [{"prompt": p, "completion": text} for p, text in zip(asked, told)],
        "comparisons": [_row(comparison) for comparison in comparisons],
        "comparisons_eval": [_row(comparison) for comparison in judged],
        "prompts": [{"prompt": p} for p in train[:num_prompts]],
        "prompts_eval": [{"prompt": p} for p in held_out],
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return Task(
        **{name: _write(folder / f"{name}.jsonl", rows) for name, rows in files.items()},
        gold=gold,
        grammatical=grammatical,
        best_accuracy=best_reachable(judged, sharpness),
        realised_accuracy=agreement(judged),
        demonstration_gold=sum(map(gold, asked, told)) / len(told),
    )
