"""Reward models from GPT-4's comparisons, in English and Chinese, tested on people's too.

    python experiments/reward_model_gpt4_comparisons.py --data DIR

DIR (or RLHF_JAX_DATA) holds

    preference/comparison_gpt4_en.json, _zh.json   GPT-4-LLM: GPT-4's answer above a weaker model's
    preference/pandalm_testset_v1.json             ranks by people, in English
    preference/oasst_rm_zh.json                    ranks by people, in Chinese
    preference/alpaca_eval_gpt4.jsonl.gz           answers of 16 models, judged by GPT-4
    tokenizers/minimind                            the tokenizer of the small model

Two reward models are trained on the same rows in both languages, one by rank loss and one by
regression on 1 for the better and 0 for the worse answer. Each is measured on held-out pairs from
GPT-4, on pairs ranked by people, and on the AlpacaEval rows. On these rows it is asked how far each
of 16 models scores above text-davinci-003, and whether that orders the models as GPT-4's verdicts
do. A reward model that agrees with GPT-4 but not with people has learned GPT-4's style.

Result with seed 0 on 2 cores of an Intel Xeon, 2026-11-23, in 18 minutes. 1,366 training pairs fit
the length limits. Accuracy on held-out pairs in %, with its 95 % interval:

    whose ranks           pairs  rank loss          regression         longer wins
    GPT-4's, English         87  85.1 [77.6, 92.6]  87.4 [80.4, 94.3]  89.1
    GPT-4's, Chinese        251  89.6 [85.9, 93.4]  91.2 [87.7, 94.7]  89.4
    people's, English       381  64.3 [59.5, 69.1]  63.0 [58.1, 67.8]  67.1
    people's, Chinese       440  68.4 [62.4, 74.5]  69.1 [63.0, 75.2]  70.3

Neither loss is shown to do better than preferring the longer answer ("longer wins") on any test.
The scores follow length: their correlation with it is 0.72 to 0.92 for rank loss and 0.59 to 0.84
for regression. Length is GPT-4's style in these files, and people rank by it less. On the 351
AlpacaEval rows that fit the limits, the order of the models agrees with GPT-4's by a rank
correlation (Spearman) of 0.68 and 0.62.

A full-size model can be trained instead, with `--start`:

    python experiments/reward_model_gpt4_comparisons.py --data DIR --start Qwen/Qwen2.5-0.5B \
        --reward-model.num-steps 130 --reward-model.optimizer.learning-rate 1e-5 --max-prompt 512
"""

from __future__ import annotations

import numpy as np

from rlhf_jax import pipeline
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import Count
from rlhf_jax.data import batches, builders, mixing
from rlhf_jax.data.batches import Loader
from rlhf_jax.launch import Context, launch
from rlhf_jax.tasks import preferences


class Config(preferences.Config):
    """The settings of all reward models on real data, and the size of one test."""

    alpaca_eval_rows: Count = 1600  # AlpacaEval rows used, spread evenly over the file


config = Config()
LOSSES = {"rank": reward_model.loss, "regression": reward_model.regression_loss}
PEOPLE = {"pandalm_en": "pandalm_testset_v1.json", "oasst_zh": "oasst_rm_zh.json"}


def gaps_by_model(config, context, scorer, tokenizer, rows: list[tuple[dict, str]]) -> dict:
    """How far each AlpacaEval model scores above text-davinci-003, and its win rate by GPT-4.

    Returns {"gap", "gpt4_win_rate"}, each a figure by model, {"order"}, Spearman's rank correlation
    of the two over the models, and {"rows"}, how many of the rows fit the length limits.
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
    rows_of = {m: [i for i, row in enumerate(kept) if row["generator_2"] == m] for m in models}
    gap = {m: float(np.mean(scores[rows_of[m], 1] - scores[rows_of[m], 0])) for m in models}
    # A preference is 1 or 2, the number of the better output; 0 or none is a tie.
    wins = {
        m: float(np.mean([(kept[i]["preference"] or 1.5) - 1 for i in rows_of[m]])) for m in models
    }

    def ranks(values: dict[str, float]) -> np.ndarray:
        return np.argsort(np.argsort([values[m] for m in models]))

    order = float(np.corrcoef(ranks(gap), ranks(wins))[0, 1])
    return {"rows": len(kept), "order": order, "gap": gap, "gpt4_win_rate": wins}


def sides(english: list, chinese: list, share: float) -> dict[str, list[list]]:
    """Splits both files into training and held-out rows: {"en", "zh"} to [training, held-out].

    Row i in Chinese is the translation of row i in English, so both must be on the same side. The
    further rows that only the Chinese file has are split by their own prompts.
    """
    places = {where for _, where in mixing.split(english, share)[1]}
    only_chinese = mixing.split(chinese[len(english) :], share)
    is_held_out = [where in places for _, where in english]

    def pick(rows: list, side: bool) -> list:
        return [row for row, held_out in zip(rows, is_held_out) if held_out is side]

    return {
        "en": [pick(english, side) for side in (False, True)],
        "zh": [pick(chinese, side) + only_chinese[side] for side in (False, True)],
    }


def run(config: Config, context: Context) -> dict:
    """Trains both reward models, measures each on every test and returns the summary."""
    tokenizer = preferences.open_tokenizer(config.start, context)
    preferences.check(config, context)
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
    judged = builders.load(folder / "alpaca_eval_gpt4.jsonl.gz")
    count = min(config.alpaca_eval_rows, len(judged))
    judged = [judged[int(i)] for i in np.linspace(0, len(judged) - 1, count)]

    clock, figures = pipeline.Clock(), {}
    with clock("sft"):
        policy, tuned = preferences.starting_model(config, context, tokenizer, *train)
    for name, loss_fn in LOSSES.items():
        with clock(name):
            data = pipeline.Split(comparisons, tests["gpt4_en"])
            scorer, _ = preferences.train_scorer(
                config, context, tokenizer, policy, data, loss_fn=loss_fn, stage=name
            )
        with clock(f"{name}_evaluation"):
            figures[name] = {
                test: preferences.measure(config, context, scorer, examples)
                for test, examples in tests.items()
            }
            figures[name]["alpaca_eval"] = gaps_by_model(config, context, scorer, tokenizer, judged)
    return {"sft": tuned, "reward_model": figures, "seconds": clock.seconds}


def programs(config: Config, context: Context) -> list[Program]:
    """What `run` runs, first for one loss and then for the other: see `abstract`."""
    return preferences.programs(config, context, LOSSES)


if __name__ == "__main__":
    launch(run, config, programs=programs)
