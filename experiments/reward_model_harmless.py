"""A reward model of harmlessness: rank loss on human preferences (Anthropic HH, harmless-base).

    python experiments/reward_model_harmless.py --data DIR

DIR (or RLHF_JAX_DATA) holds `preference/hh_harmless_base_test.jsonl.gz` (1,701 dialogues; some of
its text is offensive) and `tokenizers/minimind`. A fifth of the prompts is held out. Accuracy is
reported together with that of always preferring the longer, or the shorter, answer, because a
reward model that does no better than these has only learned length.

Result with seed 0 on 2 cores of an Intel Xeon, 2026-11-23, in 10 minutes. 715 training pairs and
210 held-out pairs fit the length limits.

    held-out accuracy                    58.6 %, 95 % interval 51.9 to 65.2
    accuracy on the training pairs       92.4 %
    always preferring the shorter        56.0 %
    always preferring the longer         44.0 %
    correlation of score and length      -0.33

This is above chance, but not shown to be more than a preference for short answers. More cannot be
expected of 3 million randomly initialised parameters and 715 pairs: Bai et al. 2022
(arXiv:2204.05862) report 64 to 72 % with models of 13 M to 52 B parameters and a hundred times the
data.

A full-size model can be trained instead, with `--start`:

    python experiments/reward_model_harmless.py --data DIR --start Qwen/Qwen2.5-0.5B \
        --reward-model.num-steps 85 --reward-model.optimizer.learning-rate 1e-5 --max-prompt 512
"""

from __future__ import annotations

from rlhf_jax import pipeline
from rlhf_jax.data import batches, builders, mixing
from rlhf_jax.launch import Context, launch
from rlhf_jax.tasks import preferences

config = preferences.Config()


def run(config: preferences.Config, context: Context) -> dict:
    """Trains the reward model, measures it and returns the summary."""
    tokenizer = preferences.open_tokenizer(config.start, context)
    preferences.check(config, context)
    file = context.data / "preference" / "hh_harmless_base_test.jsonl.gz"
    rows, held_out = mixing.split(builders.load(file), config.held_out)
    sizes = (tokenizer, config.max_prompt, config.max_response)
    ranked = pipeline.Split(
        *(
            batches.comparisons(part, *sizes, on_bad_row="drop")  # some turns are empty
            for part in (rows, held_out)
        )
    )
    clock = pipeline.Clock()
    with clock("sft"):
        policy, tuned = preferences.starting_model(config, context, tokenizer, rows, held_out)
    with clock("reward_model"):
        scorer, figures = preferences.train_scorer(config, context, tokenizer, policy, ranked)
    with clock("evaluation"):
        known = preferences.measure(config, context, scorer, ranked.train)
        figures["train_accuracy"] = known["eval_accuracy"]
    return {"sft": tuned, "reward_model": figures, "seconds": clock.seconds}


if __name__ == "__main__":
    launch(run, config, programs=preferences.programs)
