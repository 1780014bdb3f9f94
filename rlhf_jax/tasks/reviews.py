"""A synthetic task whose gold score is known: short reviews of products and films.

A prompt asks for a review of one item, and a response is two to four short sentences from the
grammar of `review_grammar`. Because the task is synthetic, its true objective is known exactly.
It is the gold score, `gold(prompt, response)` in [0, 1], the sum of

    0.12  topic    the first sentence names the item asked for (0.06: a later one does)
    0.28  detail   0.14 for each of two aspects judged by a concrete fact, not by a vague word
    0.22  balance  a strength and a weakness (0.08: only one of the two)
    0.22  verdict  the last sentence recommends clearly (0.11: with a hedge), and only it does
    0.16  plain    two or more useful sentences and no filler (0.08: one filler)

less 0.15 for every sentence outside the grammar, and less 0.10 for every repeated sentence, for
every sentence about another item or of the other domain, and for every sentence beyond the fourth.
Only sentences in the grammar earn anything, so a heap of keywords scores 0. An example:

    Write a review of the Nova camera.

    1.00  I used the Nova camera six times. The battery lasts nine hours.
          But the manual skips two steps. Buy it for long trips.
    0.19  Wow, I bought it on Monday. The battery is very very nice. It came in a box.
          Maybe try it one day.                  (one-sided praise 0.08, hedge 0.11)

Demonstrations draw every property at random: their gold score is 0.46 on average with a standard
deviation of 0.19. A policy that imitates them therefore has room to improve, and how much it must
change is known: reweighting their distribution to a mean gold score of 0.80 costs 1.5 nats of KL
per response, 0.88 costs 2.5, 0.94 costs 3.5, and 1.0 for every response costs 5.1 (`ideal_kl`).
With a byte-level BPE of 768 entries a demonstration has 24 tokens on average and 33 at most.

Comparisons are pairs (or rankings of K) of such responses, of which about one in eight is damaged.
Their labels are noisy, by the Bradley-Terry model (for rankings Plackett-Luce):
P(a above b) = sigmoid(sharpness * (gold(a) - gold(b))). No reward model can be expected to agree
with these labels more often than `best_reachable` says, which is 0.76 at the default sharpness of
6.
"""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf_jax import processes, storage
from rlhf_jax.tasks import review_grammar as grammar

# How demonstrations are drawn.
NAMED = 0.5  # chance that the opening names the item
PLAIN = 0.5  # chance that there is no filler
# What a review says of a strength, and of a weakness; "absent" leaves the sentence out.
POINT = {"concrete": 0.30, "vague": 0.28, "chatter": 0.30, "absent": 0.12}
ENDING = {"verdict": 0.34, "hedge": 0.30, "closing": 0.36}

CORRUPTED = 0.12  # share of the responses in comparisons that are damaged
SHARPNESS = 6.0  # nats of preference per unit of the gold score

# What the gold score takes off per sentence. What it adds is in `properties`.
COST_BROKEN, COST_REPEATED, COST_OFF_TOPIC, COST_EXCESS = 0.15, 0.10, 0.10, 0.10


class Comparison(NamedTuple):
    """Ranked responses to one prompt."""

    prompt: str
    responses: tuple[str, ...]  # from the most to the least preferred
    golds: tuple[float, ...]  # their gold scores, which the noisy ranking need not follow


class Task(NamedTuple):
    """The files of the task, how responses are judged, and what can be reached."""

    demonstrations: storage.Path
    comparisons: storage.Path
    comparisons_eval: storage.Path
    prompts: storage.Path
    prompts_eval: storage.Path
    gold: Callable[[str, str], float]  # (prompt, response) -> the gold score
    grammatical: Callable[[str], bool]  # whether all sentences of a response are in the grammar
    best_accuracy: float  # expected agreement of the gold score with `comparisons_eval`
    realised_accuracy: float  # its agreement with the labels that were drawn
    demonstration_gold: float  # mean gold score of the demonstrations


# --------------------------------------------------------------------------------- the gold score


def properties(prompt: str, response: str) -> dict[str, float]:
    """The points (positive) and costs (negative) of a response; `gold` is their clipped sum."""
    item, domain = grammar.subject(prompt)
    sentences = [grammar.parse(sentence) for sentence in grammar.split(response)]
    useful: list[grammar.Sentence] = []
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
    named_first = named and sentences[0] is not None and sentences[0].item == item
    details = {sentence.aspect for sentence in useful if sentence.concrete}
    sides = {sentence.kind for sentence in useful} & {"strength", "weakness"}
    verdicts = [sentence for sentence in useful if sentence.kind in ("verdict", "hedge")]
    ends_in_verdict = len(verdicts) == 1 and verdicts[0] == sentences[-1]
    verdict = 0.0
    if ends_in_verdict:
        verdict = 0.22 if verdicts[0].kind == "verdict" else 0.11
    fillers = sum(sentence.fillers for sentence in sentences if sentence is not None)
    return {
        "topic": 0.12 if named_first else 0.06 if named else 0.0,
        "detail": 0.14 * min(2, len(details)),
        "balance": (0.0, 0.08, 0.22)[len(sides)],
        "verdict": verdict,
        "plain": 0.08 * max(0, 2 - fillers) if len(useful) >= 2 else 0.0,
        **cost,
        "excess": -COST_EXCESS * max(0, len(sentences) - 4),
    }


def gold(prompt: str, response: str) -> float:
    """The gold score of any text as a response to a prompt of this task, in [0, 1]; garbage is 0.

    Raises ValueError for a prompt that names no item of the task.
    """
    total = sum(properties(prompt, response).values())
    return round(min(1.0, max(0.0, total)), 6)  # rounded, so that equal reviews score equal


# -------------------------------------------------------------------------- drawing demonstrations


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    # By random() alone, whose sequence Python promises to keep from version to version.
    return options[int(rng.random() * len(options))]


def _fill(rng: random.Random, template: str, item: str = "") -> str:
    slots = [slot for slot in grammar.SLOTS if "{" + slot + "}" in template]
    return template.format(item=item, **{slot: _pick(rng, grammar.SLOTS[slot]) for slot in slots})


def _with_filler(rng: random.Random, sentence: str) -> str:
    meaning = grammar.parse(sentence)
    vague = meaning.aspect and not meaning.concrete
    filler = _pick(rng, grammar.FILLERS if vague else grammar.FILLERS[:2])
    if filler == "!!!":
        return sentence[:-1] + filler
    if filler == "Wow, ":
        first = sentence[0] if sentence.startswith("I ") else sentence[0].lower()
        return filler + first + sentence[1:]
    return sentence.replace(" is ", f" is {filler}")


def review(rng: random.Random, item: str) -> list[str]:
    """Draws one demonstration about an item and returns its sentences."""
    _, domain = grammar.subject(item)
    name = item if rng.random() < NAMED else _pick(rng, grammar.UNNAMED[domain])
    points = _points(rng, domain)
    endings = {
        "verdict": grammar.VERDICTS[domain],
        "hedge": grammar.HEDGES,
        "closing": grammar.CLOSINGS,
    }
    opening = _fill(rng, _pick(rng, grammar.OPENINGS[domain]), name)
    ending = endings[rng.choices(list(ENDING), list(ENDING.values()))[0]]
    sentences = [opening, *points, _fill(rng, _pick(rng, ending))]
    if rng.random() >= PLAIN:
        unchanged = list(range(len(sentences)))
        for _ in range(1 + (rng.random() < 0.5)):
            i = unchanged.pop(int(rng.random() * len(unchanged)))
            sentences[i] = _with_filler(rng, sentences[i])
    return sentences


def _points(rng: random.Random, domain: str) -> list[str]:
    """What a review says between its opening and its ending: up to two sentences."""
    chatter, points = list(grammar.CHATTER[domain]), []
    facts = grammar.FACTS[domain]
    for side, kind in enumerate(("strength", "weakness")):
        outcome = rng.choices(list(POINT), list(POINT.values()))[0]
        aspect = _pick(rng, list(facts))
        judgement = {"concrete": facts[aspect][side], "vague": _pick(rng, grammar.VAGUE[kind])}
        if outcome in judgement:
            points.append(_fill(rng, f"The {aspect} {judgement[outcome]}."))
        elif outcome == "chatter":
            points.append(_fill(rng, chatter.pop(int(rng.random() * len(chatter)))))
    if rng.random() < 0.5:
        points.reverse()
    both = len(points) == 2 and all(grammar.parse(point).aspect for point in points)
    if both and rng.random() < 0.5:
        points[1] = "But the" + points[1].removeprefix("The")
    return points


def ideal_kl() -> float:
    """The smallest KL from the demonstrations, in nats per response, at which gold is always 1.

    Conditioning a distribution p on an event A costs KL(p(. | A) || p) = -log p(A). Here A is that
    the item is named, strength and weakness are concrete and of two aspects, the ending is a
    verdict, and nothing is filler. No policy that always scores 1 is closer to the demonstrations.
    """
    points = POINT["concrete"] ** 2 * (1 - 1 / len(grammar.FACTS["product"]))
    return -math.log(NAMED * points * ENDING["verdict"] * PLAIN)


def corrupt(rng: random.Random, item: str, sentences: list[str]) -> str:
    """Damages a review in one of five ways, drawn at random, and returns its text.

    A word is dropped, two words are swapped, a sentence is repeated, the end is cut off, or the
    opening names another item.
    """
    damage = _pick(rng, ("drop", "swap", "repeat", "cut", "rename"))
    if damage == "rename":
        _, domain = grammar.subject(item)
        other = _pick(rng, [name for name in grammar.items(domain) if name != item])
        return " ".join([_fill(rng, _pick(rng, grammar.OPENINGS[domain]), other), *sentences[1:]])
    if damage == "repeat":
        i = int(rng.random() * (len(sentences) - 1))
        return " ".join([*sentences[: i + 1], sentences[i], *sentences[i + 2 :]])
    words = " ".join(sentences).split(" ")
    i = int(rng.random() * (len(words) - 1))
    if damage == "drop":
        del words[i]
    elif damage == "swap":
        words[i : i + 2] = words[i + 1], words[i]
    else:
        words = words[: max(1, len(words) - 1 - int(rng.random() * len(words) / 2))]
        words[-1] = words[-1].rstrip(".!")
    return " ".join(words)


# ------------------------------------------------------------------------ prompts and comparisons


def split_prompts(seed: int) -> tuple[list[str], list[str]]:
    """Returns 384 training prompts and 128 held-out prompts of other items, in random order.

    Two items of every row and column of each table of names are held out. A held-out item is thus
    a new combination of two words that both occur in training.
    """
    rng = random.Random(f"{seed}/prompts")
    train, held_out = [], []
    for domain, (_, first, second) in grammar.NAMES.items():
        size = len(second)
        rows = sorted(range(len(first)), key=lambda _: rng.random())
        columns = sorted(range(size), key=lambda _: rng.random())
        for i, item in enumerate(grammar.items(domain)):
            is_held_out = (rows[i // size] + columns[i % size]) % size < 2
            part = held_out if is_held_out else train
            part.extend(form.format(item=item) + "\n" for form in grammar.PROMPTS[domain])
    for part in (train, held_out):
        part.sort(key=lambda _: rng.random())
    return train, held_out


def compare(
    rng: random.Random, prompts: Sequence[str], count: int, responses: int, sharpness: float
) -> list[Comparison]:
    """Draws `count` comparisons, each of `responses` different responses to a random prompt.

    The ranking is drawn from the Plackett-Luce model with weights exp(sharpness * gold), which for
    two responses is the Bradley-Terry model.
    """
    rows = []
    for _ in range(count):
        prompt = _pick(rng, prompts)
        item, _ = grammar.subject(prompt)
        golds: dict[str, float] = {}
        while len(golds) < responses:  # an identical text is drawn again
            sentences = review(rng, item)
            damaged = rng.random() < CORRUPTED
            text = corrupt(rng, item, sentences) if damaged else " ".join(sentences)
            golds[text] = gold(prompt, text)
        # Sorting by score + Gumbel noise draws a Plackett-Luce ranking.
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
    """The expected agreement of the gold score with noisy labels of these pairs.

    It is the mean of sigmoid(sharpness * |gap|), over the gaps in gold score of all pairs.
    """
    chances = [1.0 / (1.0 + math.exp(-sharpness * abs(gap))) for gap in _gaps(comparisons)]
    return sum(chances) / len(chances)


def agreement(comparisons: Sequence[Comparison]) -> float:
    """The share of pairs whose preferred response has the higher gold score; a tie counts 1/2."""
    hits = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in _gaps(comparisons)]
    return sum(hits) / len(hits)


# -------------------------------------------------------------------------------------- the files


def _row(comparison: Comparison) -> dict[str, str | list[str] | list[int]]:
    prompt, responses, _ = comparison
    if len(responses) == 2:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    return {"prompt": prompt, "responses": list(responses), "ranks": list(range(len(responses)))}


def _write(folder: storage.Path, files: dict[str, Sequence[dict]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        storage.write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make(
    seed: int,
    folder: str | os.PathLike,
    *,
    num_demonstrations: int = 4000,
    num_comparisons: int = 6000,
    num_eval_comparisons: int = 2500,
    num_prompts: int = 384,
    responses_per_prompt: int = 2,
    sharpness: float = SHARPNESS,
) -> Task:
    """Writes the five jsonl files of the task into `folder`, which is created where it is absent.

    `demonstrations` and `comparisons` are about training prompts, of which `num_prompts` are in
    `prompts`; `comparisons_eval` is about the 128 held-out prompts, which are all in
    `prompts_eval`. Prompts end in a newline, which the completion follows directly. A comparison
    is {prompt, chosen, rejected}, or {prompt, responses, ranks} for `responses_per_prompt` > 2.

    The same seed writes the same bytes. Each file has its own random stream, so that the length of
    one file changes no other. Raises ValueError for a count that is out of its range.
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
    written = [" ".join(review(rng, grammar.subject(prompt)[0])) for prompt in asked]
    shape = (responses_per_prompt, sharpness)
    comparisons = compare(stream("comparisons"), train, num_comparisons, *shape)
    eval_comparisons = compare(stream("comparisons_eval"), held_out, num_eval_comparisons, *shape)
    files = {
        "demonstrations": [{"prompt": p, "completion": text} for p, text in zip(asked, written)],
        "comparisons": [_row(comparison) for comparison in comparisons],
        "comparisons_eval": [_row(comparison) for comparison in eval_comparisons],
        "prompts": [{"prompt": p} for p in train[:num_prompts]],
        "prompts_eval": [{"prompt": p} for p in held_out],
    }
    folder = storage.path(folder)
    processes.first(lambda: _write(folder, files))
    return Task(
        **{name: folder / f"{name}.jsonl" for name in files},
        gold=gold,
        grammatical=grammar.grammatical,
        best_accuracy=best_reachable(eval_comparisons, sharpness),
        realised_accuracy=agreement(eval_comparisons),
        demonstration_gold=sum(map(gold, asked, written)) / len(written),
    )
