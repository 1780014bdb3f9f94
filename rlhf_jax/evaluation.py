"""Evaluation of a policy: its answers to held-out prompts are scored and compared.

Answers are numbered: answer k to a prompt is a function of (seed, prompt, k), so two policies that
are asked with the same numbers are compared under the same noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import abstract
from rlhf_jax.abstract import Program
from rlhf_jax.data import batches, epoch
from rlhf_jax.data.batches import Loader
from rlhf_jax.data.records import Ends, Prompts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import host, learned
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling import settings
from rlhf_jax.sampling.decode import Guide, Sampling
from rlhf_jax.sampling.rollout import Drawing, Score
from rlhf_jax.training.metrics import Log

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
Gold = Callable[[str, str], float]  # (prompt, response) -> the score that nothing is trained on


class Exam(NamedTuple):
    """Held-out prompts, and how they are answered and scored."""

    prompts: Loader
    tokenizer: Tokenizer
    sampling: Sampling
    reference: Model  # the policy that KL is measured to
    scorer: Any = None  # the parameters of `score`
    score: Score | None = learned.score  # None: there is no such reward, and all scores are 0
    reward: host.Reward | None = None  # in Python; it scores the answers instead of `score`
    gold: Gold | None = None  # None where it is unknown
    micro_batches: int = 1
    seed: int = 0
    mesh: jax.sharding.Mesh | None = None  # None: all devices


class Answers(NamedTuple):
    """One answer to each prompt of an exam, in order; host arrays, log-probabilities in nats."""

    tokens: np.ndarray  # [N, T]
    attend: np.ndarray  # [N, T]
    mask: np.ndarray  # [N, T]
    logprobs: np.ndarray  # [N, T], of the policy
    ref_logprobs: np.ndarray  # [N, T]
    scores: np.ndarray  # [N]
    lengths: np.ndarray  # [N], sampled tokens


class Evaluation(NamedTuple):
    """Answers as texts and figures, [N] each, or [n * N] for n answers to each prompt."""

    prompts: list[str]
    responses: list[str]
    gold: np.ndarray | None  # None where the exam has none
    scores: np.ndarray
    kl: np.ndarray  # of each response to the reference, nats
    reference_nats: np.ndarray  # -log p of each response under the reference
    lengths: np.ndarray  # tokens


class Comparison(NamedTuple):
    """n answers to each held-out prompt before and after, and the best one of those before."""

    before: Evaluation
    after: Evaluation
    best_of_n: Evaluation


def answer(exam: Exam, policy: Model, number: int = 0, *, guide: Guide | None = None) -> Answers:
    """Answer `number` of `policy`, tilted by the guide, to every prompt; the exam's reward scores.

    A reward in Python reads texts, which are made in `assess`: here the scores are then 0.
    """
    settings.check_vocabulary(exam.sampling, policy.config.vocab_size)
    score = None if exam.reward else exam.score
    # A number that no iteration of training has: those count from 0.
    key = jax.random.fold_in(jax.random.key(exam.seed), 2**31 - 1)
    return epoch.rows(
        _answer,
        (Drawing(exam.tokenizer.ends), score, exam.micro_batches),
        (
            exam.sampling,
            {"policy": policy, "reference": exam.reference, "scorer": exam.scorer, "guide": guide},
            key,
            jnp.int32(number),
        ),
        exam.prompts,
        exam.mesh,
    )


def _answer(drawing, score, micro_batches, sampling, params, key, number, prompts) -> Answers:
    guide = params["guide"]
    samples, index = rollouts.sample(
        params["policy"],
        prompts,
        key,
        sampling=sampling,
        drawing=drawing,
        first_sample=number,
        guide=guide,
    )
    judged = rollouts.judge(
        params, samples, index, sampling=sampling, score=score, micro_batches=micro_batches
    )
    # What is not returned (values, entropies) is never computed.
    return Answers(
        judged.tokens,
        judged.attend,
        judged.mask,
        judged.old_logprobs if guide is None else samples.logprobs,
        judged.ref_logprobs,
        judged.scores,
        judged.lengths,
    )


def program(
    policy: Model,
    reference: Model,
    scorer: Any,
    sampling: Sampling,
    batch: Prompts,
    ends: Ends,
    mesh: jax.sharding.Mesh,
    *,
    name: str = "evaluation: answer",
    score: Score | None = learned.score,
    guide: Guide | None = None,
    resident: Any = (),
) -> Program:
    """What `answer` runs on a batch of prompts. All but `sampling` are shapes: see `abstract`.

    `score=None` is for an exam with a reward in Python.
    """
    key, number = abstract.whole(mesh, (jax.random.key(0), jnp.int32(0)))
    params = {"policy": policy, "reference": reference, "scorer": scorer, "guide": guide}
    static = (Drawing(ends), score, 1)
    arguments = (sampling, params, key, number)
    found = abstract.over_rows(name, _answer, static, arguments, batch, mesh, resident)
    return found._replace(max_trips=abstract.max_trips(sampling))


def evaluate(
    exam: Exam, policy: Model, number: int = 0, *, guide: Guide | None = None
) -> Evaluation:
    """Answer `number` of `policy` to every prompt, as texts and figures."""
    return assess(exam, answer(exam, policy, number, guide=guide))


def assess(exam: Exam, answers: Answers) -> Evaluation:
    """Answers as texts and figures."""
    prompts, responses = rollouts.texts(exam.tokenizer, answers)
    gold, scores = None, answers.scores
    if exam.reward is not None:
        examples, numbers = exam.prompts.examples, np.arange(len(prompts))
        scores = host.scores(exam.reward, exam.tokenizer, examples, answers, numbers).scores
    if exam.gold is not None:
        gold = np.array([exam.gold(*pair) for pair in zip(prompts, responses)])
    nats = -np.sum(answers.ref_logprobs * answers.mask, axis=1)
    kl = np.sum(answers.logprobs * answers.mask, axis=1) + nats
    return Evaluation(prompts, responses, gold, scores, kl, nats, answers.lengths)


def sampled(draws: Sequence[Answers], scores: np.ndarray) -> list[batches.Sampled]:
    """Several answers to each prompt, with their scores [N, K], as the token ids that were drawn.

    The best one has rank 0, and of equal ones the first.
    """
    is_prompt = (draws[0].attend > 0) & (draws[0].mask == 0)
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return [
        batches.Sampled(
            draws[0].tokens[i][is_prompt[i]],
            [draw.tokens[i][draw.mask[i] > 0] for draw in draws],
            ranks[i].tolist(),
            scores[i].tolist(),
        )
        for i in range(len(scores))
    ]


def figures(found: Evaluation) -> dict[str, float]:
    """Means over the responses: what a training run reports of a held-out evaluation."""
    gold = {} if found.gold is None else {"gold": float(found.gold.mean())}
    return gold | {
        "score": float(found.scores.mean()),
        "kl": float(found.kl.mean()),
        "length": float(found.lengths.mean()),
    }


def held_out(figures: dict[str, float]) -> dict[str, float]:
    """The figures of an algorithm's `evaluate` under their names in a summary: "eval_..."."""
    return {f"eval_{name}": value for name, value in figures.items()}


def compare(
    exam: Exam, before: Model, after: Model, best_of: int, *, guide: Guide | None = None
) -> Comparison:
    """Both policies, and best-of-n of the first, on the same prompts with the same noise.

    Each policy answers every prompt n = `best_of` times, and all answers count. Best-of-n is the
    answer of the first policy to a prompt that has the highest score. A guide tilts the second one.
    """
    drawn_before, drawn_after = (
        [evaluate(exam, policy, i, guide=by) for i in range(best_of)]
        for policy, by in ((before, None), (after, guide))
    )
    best = np.argmax(np.stack([drawn.scores for drawn in drawn_before]), axis=0)
    picked = [_row(drawn_before[k], i) for i, k in enumerate(best)]
    return Comparison(_join(drawn_before), _join(drawn_after), _join(picked))


def _row(found: Evaluation, i: int) -> Evaluation:
    return Evaluation(*(None if field is None else field[i : i + 1] for field in found))


def _join(evaluations: list[Evaluation]) -> Evaluation:
    """The rows of all evaluations, those of the first one first."""

    def along(field):
        if field[0] is None:
            return None
        return sum(field, []) if isinstance(field[0], list) else np.concatenate(field)

    return Evaluation(*map(along, zip(*evaluations)))


def show(log: Log, comparison: Comparison, num_shown: int) -> None:
    """Prints the first answers before and after, and keeps them for the report."""
    before, after, best = comparison
    name = "score" if before.gold is None else "gold"

    def judged(found: Evaluation, i: int) -> float:
        return round(float((found.scores if found.gold is None else found.gold)[i]), 2)

    rows = [
        {
            "prompt": before.prompts[i],
            "before": before.responses[i],
            "after": after.responses[i],
            f"{name} before": judged(before, i),
            f"{name} after": judged(after, i),
        }
        for i in range(min(num_shown, len(best.prompts)))
    ]
    log.table("The same prompts before and after training", rows)
    log.samples("evaluation", 0, rows)


def summarise(comparison: Comparison) -> dict[str, float | int]:
    """The figures that every task has. The KL is to `before`, in nats per response."""
    before, after, best = comparison
    # The share of distinct bigrams falls with the amount of text: take one answer per prompt.
    once = len(best.responses)
    gold = {"gold_before": before, "gold_after": after, "gold_best_of_n": best}
    gold = {} if best.gold is None else {k: float(x.gold.mean()) for k, x in gold.items()}
    return {
        **gold,
        "best_of": len(before.responses) // once,
        "score_before": float(before.scores.mean()),
        "score_after": float(after.scores.mean()),
        "score_best_of_n": float(best.scores.mean()),
        "kl": float(after.kl.mean()),
        "distinct_bigrams_before": distinct_bigrams(before.responses[:once]),
        "distinct_bigrams_after": distinct_bigrams(after.responses[:once]),
        "length_before": float(before.lengths.mean()),
        "length_after": float(after.lengths.mean()),
    }


def distinct_bigrams(responses: Sequence[str]) -> float:
    """Distinct word pairs as a share of all word pairs of the responses; 0 without any.

    Words are separated by whitespace; each Chinese character or kana is a word.
    """
    pairs = [pair for words in map(_WORDS.findall, responses) for pair in zip(words, words[1:])]
    return len(set(pairs)) / max(len(pairs), 1)
