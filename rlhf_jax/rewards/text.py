"""Metrics of text, from 0 to 1, and what makes a reward of one.

    reward = against(sentence_bleu, field="answer")
    reward = against(functools.partial(rouge, kind="rouge2"))
    reward = without_reference(functools.partial(repetition_penalty, n=3))

A metric is a function `(response, reference) -> float` that also works alone. All of them are
between 0 and 1, also those that their libraries give in per cent: on a scale of 100 a reward that
goes through a sigmoid, or whose KL coefficient was chosen for another one, is the same for every
response. A penalty is between 0 and 1 too, to be given a negative weight (`combine.weighted`).
A metric raises BadRow (a ValueError) for a reference that is empty, and ValueError for what is no
text.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from rlhf_jax.data import schema
from rlhf_jax.data.embeddings import Embeddings
from rlhf_jax.data.schema import Example
from rlhf_jax.rewards import host
from rlhf_jax.rewards.host import Reward

Metric = Callable[[str, str], float]  # (response, reference) -> from 0 to 1
Measure = Callable[[str], float]  # response -> from 0 to 1

Smoothing = Literal["none", "add-1", "floor", "exp"]
Unit = Literal["words", "characters"]


# ------------------------------------------------------------------------- a metric as a reward


def against(metric: Metric, field: str | None = None) -> Reward:
    """The reward that compares each response with the reference that its row holds.

    The reference is the row's field of that name, which holds a text, or a list of texts of which
    the one that the response is closest to counts. Without `field` it is the completion of the
    row; responses without ranks are all references.
    The reward raises BadRow (a ValueError) for a row without the field, with its other fields
    named, and for a reference that is empty, no text, or not one that the metric can use.
    """
    what = "the completion" if field is None else repr(field)
    name = f"{host.name_of(metric)} against {what}"
    return host.named(name, functools.partial(_against, metric, field))


def _against(
    metric: Metric,
    field: str | None,
    prompts: list[str],
    responses: list[str],
    rows: list[Example],
) -> list[float]:
    del prompts  # of messages they are rendered, so that the row says better what it is
    found = []
    for response, row in zip(responses, rows):
        where = f"{host.name_of(metric)}, the row of the prompt {schema.shown(row.prompt)}"
        with schema.at(where):
            found.append(max(metric(response, text) for text in references(row, field)))
    return found


def references(row: Example, field: str | None = None) -> list[str]:
    """The references that a row holds, at least one; see `against`. Raises BadRow."""
    others = f"its other fields are {', '.join(map(repr, row.extra)) or 'none'}"
    if field is None:
        if not row.responses:
            schema.fail("there is no completion", f"name the field of the reference; {others}")
        return [row.completion] if row.ranks else list(row.responses)
    remedy = f"a reference is a text, or a list of texts; {others}"
    value = schema.field(row.extra, field, remedy)
    if not isinstance(value, list | tuple):
        return [schema.check_text(value, field, remedy)]
    if not value:
        schema.fail(f"{field!r} is an empty list", remedy)
    return [schema.check_text(x, f"{field}[{i}]", remedy) for i, x in enumerate(value)]


def without_reference(measure: Measure) -> Reward:
    """The reward that measures each response alone, whatever its row holds."""
    return host.named(host.name_of(measure), functools.partial(_measured, measure))


def _measured(
    measure: Measure, prompts: list[str], responses: list[str], rows: list[Example]
) -> list[float]:
    del prompts, rows
    return [measure(response) for response in responses]


def _check(response: Any, reference: Any) -> None:
    for name, value in (("response", response), ("reference", reference)):
        if not isinstance(value, str):
            raise ValueError(f"the {name} is {schema.shown(value)}; a metric compares two texts")
    if not reference.strip():
        schema.fail("the reference is empty", "a response is compared with what is in it")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


# ----------------------------------------------------------------------------- overlap of n-grams

# Names here -> sacrebleu's, with its value where it takes one (Chen and Cherry, 2014).
_SMOOTHING = {
    "none": ("none", None),
    "add-1": ("add-k", 1),
    "floor": ("floor", 0.1),
    "exp": ("exp", None),
}
_TOKENIZE = ("13a", "intl", "zh", "char", "none")


def sentence_bleu(
    response: str,
    reference: str,
    *,
    smoothing: Smoothing = "exp",
    effective_order: bool = True,
    tokenize: str = "13a",
) -> float:
    """BLEU-4 of one sentence (Papineni et al., 2002), from 0 to 1; sacrebleu counts.

    The precisions of n = 1 to 4, their geometric mean, times exp(1 - |reference| / |response|)
    where the response is shorter. Where no n-gram of some length matches, `smoothing` says what is
    counted instead: "none": 0, which makes the whole 0; "add-1": 1 is added to matches and totals
    for n >= 2 (fairseq's); "floor": 0.1 matches; "exp": 1/2, 1/4, ... matches, halved at each such
    length. A response without a word of the reference has 0 in all four.
    `effective_order` leaves out the lengths for which the response has no n-gram at all. Without
    it a response of fewer than four words has 0, but for "add-1". `tokenize` is sacrebleu's:
    "13a" for European languages, "intl", "zh" and "char" for Chinese, "none" for text that has
    spaces around its tokens.
    """
    _check(response, reference)
    _check_choice("smoothing", smoothing, tuple(_SMOOTHING))
    _check_choice("tokenize", tokenize, _TOKENIZE)
    bleu = _bleu(smoothing, effective_order, tokenize)
    # Of a corpus of one sentence, because `sentence_score` logs a warning without effective order.
    return bleu.corpus_score([response], [[reference]]).score / 100


@functools.cache
def _bleu(smoothing: str, effective_order: bool, tokenize: str) -> Any:
    from sacrebleu.metrics import BLEU

    method, value = _SMOOTHING[smoothing]
    return BLEU(
        tokenize=tokenize,
        smooth_method=method,
        smooth_value=value,
        effective_order=effective_order,
    )


def chrf(response: str, reference: str) -> float:
    """chrF2 (Popović, 2015), from 0 to 1: F-score (beta 2) of character 1- to 6-grams.

    sacrebleu counts, and leaves whitespace out, so that it suits languages without.
    """
    _check(response, reference)
    return _chrf().sentence_score(response, [reference]).score / 100


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def rouge(
    response: str, reference: str, *, kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"
) -> float:
    """ROUGE (Lin, 2004) as F1, from 0 to 1: of words, pairs of words, or their longest subsequence.

    rouge-score counts, without stemming. Its words are runs of a-z and 0-9 after lower-casing, so
    it reads English: raises BadRow for a reference that has none, such as a Chinese one, for
    which `chrf` or BLEU with tokenize="zh" are meant.
    """
    _check(response, reference)
    _check_choice("kind", kind, ("rouge1", "rouge2", "rougeL"))
    if not re.search("[a-z0-9]", reference.lower()):
        found = f"ROUGE finds no word of a-z or 0-9 in the reference {schema.shown(reference)}"
        schema.fail(found, "use chrf, or sentence_bleu with tokenize='zh'")
    return float(_rouge(kind).score(reference, response)[kind].fmeasure)


@functools.cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


# ------------------------------------------------------------------------------------ right or not


def exact_match(response: str, reference: str) -> float:
    """1 if the two are the same but for whitespace at both ends, else 0. Upper case counts."""
    _check(response, reference)
    return float(response.strip() == reference.strip())


def regex_match(response: str, pattern: str) -> float:
    """1 if the regular expression is found anywhere in the response, else 0.

    `(?s)` in front lets a point match line breaks, `^` and `$` hold it to the ends. Raises
    BadRow for a pattern that is none.
    """
    _check(response, pattern)
    try:
        return float(re.search(pattern, response) is not None)
    except re.error as error:
        schema.fail(f"{schema.shown(pattern)} is no regular expression ({error})", "correct it")


_NUMBER = re.compile(
    r"(?P<sign>(?<![A-Za-z0-9_)\]])[-+\u2212])?"
    r"(?<![A-Za-z0-9_])(?<![0-9]\.)"  # not the rest of a word, of a number, or of 1.2.3
    r"(?P<number>[0-9]+/0*[1-9][0-9]*(?!\.?[0-9])"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|\.[0-9]+)"
)
_LONGEST_NUMBER = 1000  # characters; Python refuses to read far longer ones


def numeric_match(response: str, reference: str) -> float:
    """1 if the last number of the response equals the last one of the reference, else 0.

    They are compared exactly, as fractions: 0.5, .50 and 1/2 are equal, 0.33 and 1/3 are not.
    See `last_number` for what a number is. Raises BadRow for a reference without one.
    """
    _check(response, reference)
    expected = last_number(reference)
    if expected is None:
        schema.fail(f"the reference {schema.shown(reference)} holds no number", "give one")
    return float(last_number(response) == expected)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, None if it has none.

    A number is written with the digits 0-9, perhaps with commas before groups of three (1,234),
    perhaps with decimals after a point (0.5, .5); or it is a fraction of two whole numbers without
    commas (3/4, the denominator not 0). A minus sign (- or U+2212) or plus sign directly in front
    belongs to it, unless a Latin letter, digit or closing bracket stands before the sign: 10-3 ends
    in 3, x = -3 in -3. Digits directly after a Latin letter, or after another number and a
    point, are not a number (x2, v1.2.3). Whatever follows is no part of it: 50%, 18kg and 5. are
    50, 18 and 5; exponents, mixed numbers and LaTeX are not read, so that 1e5 is 1, 1 1/2 is 1/2
    and \\frac{1}{2} is 2. A number of more than 1,000 characters is none.
    """
    found = list(_NUMBER.finditer(text))
    if not found or len(found[-1]["number"]) > _LONGEST_NUMBER:
        return None
    last = found[-1]
    value = Fraction(last["number"].replace(",", ""))
    return -value if last["sign"] in ("-", "\u2212") else value


# ----------------------------------------------------------------------------- the response alone


def length_penalty(response: str, *, free: int, longest: int, unit: Unit = "words") -> float:
    """0 up to `free` words or characters, 1 from `longest` on, and a straight line between.

    The "soft overlong punishment" of DAPO (Yu et al., 2025, arXiv:2503.14476, eq. 13) with the
    sign of a penalty; there it is in tokens, which a reward in Python is not shown. Words are
    what whitespace separates. Raises ValueError unless 0 <= free < longest.
    """
    if not 0 <= free < longest:
        raise ValueError(f"free={free} and longest={longest}: 0 <= free < longest must hold")
    length = len(_units(response, unit))
    return min(max((length - free) / (longest - free), 0.0), 1.0)


def repetition_penalty(response: str, *, n: int = 3, unit: Unit = "words") -> float:
    """The share of n-grams that are repetitions: 1 - distinct n-grams / n-grams.

    0 for a response of fewer than n words or characters. It is seq-rep-n of Welleck et al. (2020,
    arXiv:1908.04319), there of tokens. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: an n-gram has at least 1 word")
    units = _units(response, unit)
    ngrams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _units(text: str, unit: Unit) -> list[str]:
    _check_choice("unit", unit, ("words", "characters"))
    return text.split() if unit == "words" else list(text)


_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")  # letters and digits, with apostrophes inside


def lexicon(weights: Mapping[str, float | int]) -> Measure:
    """A measure of sentiment by a list of words: P / (P + N), and 1/2 where none of them occurs.

    P is the sum of the positive weights of the words of a response, N that of the negative ones
    without their sign; a word counts as often as it occurs, in upper or lower case. Words are runs
    of letters and digits: this is for languages that separate them.
    Raises ValueError for an empty list, for an entry that is not one word, and for a weight that is
    0 or not finite.
    """
    if not weights:
        raise ValueError("the lexicon is empty; give words and their weights")
    for word, weight in weights.items():
        if not isinstance(word, str) or not _WORD.fullmatch(word):
            raise ValueError(f"{word!r} in the lexicon is not one word; give single words")
        is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"the weight of {word!r} is {weight!r}; a weight is finite and not 0")
    lowered = {word.lower(): float(weight) for word, weight in weights.items()}
    return host.named("lexicon", functools.partial(_sentiment, lowered))


def _sentiment(weights: dict[str, float], response: str) -> float:
    found = [weights.get(word, 0.0) for word in _WORD.findall(response.lower())]
    total = sum(map(abs, found))
    return 0.5 + 0.5 * sum(found) / total if total else 0.5


# ------------------------------------------------------------------------------------- similarity


def simile(
    response: str, reference: str, *, embeddings: Embeddings, exponent: float = 0.25
) -> float:
    """SimiLe (Wieting et al., ACL 2019): LP^exponent times SIM, from 0 to 1.

    SIM is the cosine of the average embeddings of the two texts, in lower case. LP = exp(1 -
    max(|r|, |h|) / min(|r|, |h|)), where |r| and |h| are their lengths in units (words, or parts of
    words), lowers the score of short and of long responses.
    There the units are SentencePiece's, embedded by a model of paraphrases; here they are those of
    `embeddings` (see `data.embeddings`), and the input embeddings of a language model were not
    trained for this. A negative cosine is 0 here, and so is a text without a known unit; unknown
    units count in the lengths only.
    """
    _check(response, reference)
    units = [embeddings.units(text) for text in (response, reference)]
    first, second = (_average(embeddings.table, ids) for ids in units)
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    if norms == 0:
        return 0.0
    short, long = sorted(map(len, units))
    cosine = min(max(float(first @ second) / norms, 0.0), 1.0)
    return math.exp(1 - long / short) ** exponent * cosine


def _average(table: np.ndarray, ids: list[int]) -> np.ndarray:
    known = [i for i in ids if i >= 0]
    return table[known].mean(axis=0, dtype=np.float64) if known else np.zeros(table.shape[1])
