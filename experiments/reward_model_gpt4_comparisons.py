"""Reward models from GPT-4's comparisons, English and Chinese: ranks or scores, and whose taste?

    python experiments/reward_model_gpt4_comparisons.py --data DIR

DIR (or RLHF_JAX_DATA) holds `preference/comparison_gpt4_en.json` and `_zh.json` (GPT-4-LLM: GPT-4's
answer above a weaker model's), `preference/pandalm_testset_v1.json` and `oasst_rm_zh.json` (ranks
by people), `preference/alpaca_eval_gpt4.jsonl.gz` (16 models judged by GPT-4) and
`tokenizers/minimind`. Two scorers are trained on the same rows in both languages: by rank loss, and
by regression on 1 for the better and 0 for the worse answer. Each is measured on held-out pairs of
its own kind, on human labels, and on the AlpacaEval rows: how far it puts each model above
text-davinci-003, and whether that orders the 16 models as GPT-4's verdicts do. A scorer that is
right about GPT-4 and not about people has learned GPT-4's style.

Result, seed 0, 2 cores of an Intel Xeon, 2026-11-23, 18 minutes; 1,366 training pairs fit the
limits. Accuracy on held-out pairs, %, with its interval:

    whose ranks           pairs  rank loss          regression         longer wins
    GPT-4's, English         87  85.1 [77.6, 92.6]  87.4 [80.4, 94.3]  89.1
    GPT-4's, Chinese        251  89.6 [85.9, 93.4]  91.2 [87.7, 94.7]  89.4
    people's, English       381  64.3 [59.5, 69.1]  63.0 [58.1, 67.8]  67.1
    people's, Chinese       440  68.4 [62.4, 74.5]  69.1 [63.0, 75.2]  70.3

Neither loss is shown to be above "longer wins" anywhere: the scores follow length (correlation 0.72
to 0.92 by rank loss, 0.59 to 0.84 by regression), which is GPT-4's style here and less what people
rank by. On the 351 AlpacaEval rows that fit, the gaps order the models as GPT-4 does by 0.68 and
0.62 (Spearman).
`start` takes a full-size model:

    python experiments/reward_model_gpt4_comparisons.py --data DIR --start Qwen/Qwen2.5-0.5B \
        --reward-model.num-steps 130 --reward-model.optimizer.learning-rate 1e-5 --max-prompt 512
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

from rlhf_jax import pipeline
from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import batches, builders, mixing
from rlhf_jax.data.batches import Loader
from rlhf_jax.launch import Context, launch

sys.path.append(str(pathlib.Path(__file__).parent))
import preferences


class Config(preferences.Config):
    """As the other reward models, and the size of one test."""

    alpaca_eval_rows: int = 1600  # of the AlpacaEval rows, spread evenly over the file


config = Config()
LOSSES = {"rank": reward_model.loss, "regression": reward_model.regression_loss}
PEOPLE = {"pandalm_en": "pandalm_testset_v1.json", "oasst_zh": "oasst_rm_zh.json"}


def gaps_by_model(config, context, scorer, tokenizer, rows: list[tuple[dict, str]]) -> dict:
    """How far each AlpacaEval model scores above text-davinci-003, beside GPT-4's win rate for it.

    order: Spearman's correlation of the two over the models.
    """
    sizes = (tokenizer, config.max_prompt, config.max_response)
    plain = [
        (
            {
                "instruction": r["instruction"],
                "input": "",
                "output": [r["output_1"], r["output_2"]],
            },
            where,
        )
        for r, where in rows
    ]
    examples = batches.comparisons(plain, *sizes, on_bad_row="drop")
    source = {where: row for row, where in rows}
    kept = [source[where] for where in examples.where]
    loader = Loader(examples, config.reward_model.batch_size, config.seed)
    scores = reward_model.score_all(scorer, loader, mesh=context.mesh)["scores"]
    models = sorted({row["generator_2"] for row in kept})
    of = {m: [i for i, row in enumerate(kept) if row["generator_2"] == m] for m in models}
    gap = {m: float(np.mean(scores[of[m], 1] - scores[of[m], 0])) for m in models}
    wins = {m: float(np.mean([(kept[i]["preference"] or 1.5) - 1 for i in of[m]])) for m in models}
    place = lambda values: np.argsort(np.argsort([values[m] for m in models]))  # noqa: E731
    order = float(np.corrcoef(place(gap), place(wins))[0, 1])
    return {"rows": len(kept), "order": order, "gap": gap, "gpt4_win_rate": wins}


def sides(english: list, chinese: list, share: float) -> dict[str, list[list]]:
    """{"en", "zh"}: [training rows, held-out rows].

    Row i in Chinese is the translation of row i in English, so both go to the same side; the rows
    that only the Chinese file has follow their own prompts.
    """
    out = {where for _, where in mixing.split(english, share)[1]}
    more = mixing.split(chinese[len(english) :], share)
    held_out = [where in out for _, where in english]
    pick = lambda rows, side: [r for r, o in zip(rows, held_out) if o is side]  # noqa: E731
    return {
        "en": [pick(english, side) for side in (False, True)],
        "zh": [pick(chinese, side) + more[side] for side in (False, True)],
    }


def run(config: Config, context: Context) -> dict:
    """Trains both scorers, measures both on everything; returns the summary."""
    if config.alpaca_eval_rows < 1:
        raise ValueError(f"alpaca_eval_rows={config.alpaca_eval_rows} must be at least 1")
    tokenizer = preferences.open_tokenizer(config.start, context)
    folder = context.data / "preference"
    sizes = (tokenizer, config.max_prompt, config.max_response)

    def read(rows):
        return batches.comparisons(rows, *sizes, on_bad_row="drop")  # some answers are empty

    english, chinese = (
        list(builders.load(folder / f"comparison_gpt4_{language}.json"))
        for language in ("en", "zh")
    )
    parts = sides(english, chinese, config.held_out)
    train = [en + zh for en, zh in zip(*parts.values())]
    tests = {f"gpt4_{language}": read(held_out) for language, (_, held_out) in parts.items()}
    tests |= {name: read(builders.load(folder / file)) for name, file in PEOPLE.items()}
    comparisons = read(train[0])
    pipeline.introduce(context, "comparisons", comparisons, tests["gpt4_en"], tokenizer)
    judged = builders.load(folder / "alpaca_eval_gpt4.jsonl.gz")
    count = min(config.alpaca_eval_rows, len(judged))
    judged = [judged[int(i)] for i in np.linspace(0, len(judged) - 1, count)]

    clock, figures = pipeline.Clock(), {}
    with clock("sft"):
        policy, tuned = preferences.starting_model(config, context, tokenizer, *train)
    for name, loss_fn in LOSSES.items():
        with clock(name):
            scorer = pipeline.fit_scorer(config, context, policy, comparisons, loss_fn, name)
        with clock(f"{name}_evaluation"):
            figures[name] = {
                test: preferences.measure(config, context, scorer, examples)
                for test, examples in tests.items()
            }
            figures[name]["alpaca_eval"] = gaps_by_model(config, context, scorer, tokenizer, judged)
    return {"sft": tuned, "reward_model": figures, "seconds": clock.seconds}


if __name__ == "__main__":
    launch(run, config)
