"""A reward model of harmlessness: rank loss on human preferences (Anthropic HH, harmless-base).

    python experiments/reward_model_harmless.py --data DIR

DIR (or RLHF_JAX_DATA) holds `preference/hh_harmless_base_test.jsonl.gz` (1,701 dialogues; some of
its text is offensive) and `tokenizers/minimind`. A fifth of the prompts is held out. The accuracy
stands beside that of preferring the longer, or the shorter, answer: whoever is not above those has
learned length.

Result, seed 0, 2 cores of an Intel Xeon, 2026-11-23: 715 training pairs and 210 held-out ones fit
the limits. Held-out accuracy 58.6 %, interval 51.9 to 65.2 (training pairs 92.4); shorter wins
56.0 %, longer wins 44.0 %; correlation of score and length -0.33; 10 minutes. Above chance, but
not shown to be more than a liking for short answers: this is what 3 million parameters from noise
and 715 pairs give. Bai et al. 2022 (arXiv:2204.05862) report 64 to 72 % with models of 13 M to 52 B
parameters and a hundred times the data.

From a full-size model:

    python experiments/reward_model_harmless.py --data DIR --start Qwen/Qwen2.5-0.5B \
        --reward-model.num-steps 85 --reward-model.optimizer.learning-rate 1e-5 --max-prompt 512
"""

from __future__ import annotations

import pathlib
import sys

from rlhf_jax import pipeline
from rlhf_jax.data import batches, builders, mixing
from rlhf_jax.launch import Context, launch

sys.path.append(str(pathlib.Path(__file__).parent))
import preferences

config = preferences.Config()


def run(config: preferences.Config, context: Context) -> dict:
    """Trains, measures; returns the summary."""
    tokenizer = preferences.open_tokenizer(config.start, context)
    file = context.data / "preference" / "hh_harmless_base_test.jsonl.gz"
    rows, held_out = mixing.split(builders.load(file), config.held_out)
    sizes = (tokenizer, config.max_prompt, config.max_response)
    train, test = (
        batches.comparisons(part, *sizes, on_bad_row="drop")  # some turns are empty
        for part in (rows, held_out)
    )
    pipeline.introduce(context, "comparisons", train, test, tokenizer)
    clock = pipeline.Clock()
    with clock("sft"):
        policy, tuned = preferences.starting_model(config, context, tokenizer, rows, held_out)
    with clock("reward_model"):
        scorer = pipeline.fit_scorer(config, context, policy, train)
    with clock("evaluation"):
        figures = preferences.measure(config, context, scorer, test)
        known = preferences.measure(config, context, scorer, train)
        figures["train_accuracy"] = known["eval_accuracy"]
    return {"sft": tuned, "reward_model": figures, "seconds": clock.seconds}


if __name__ == "__main__":
    launch(run, config)
