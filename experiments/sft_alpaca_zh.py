"""A small Chinese assistant from nothing but 783 answers: supervised fine-tuning, and what of it.

    python experiments/sft_alpaca_zh.py --data DIR

DIR (or RLHF_JAX_DATA) holds `sft/alpaca_zh_demo.json` (GPT-4's answers to Alpaca prompts in
Chinese), `sft/oasst_sft_zh.json` (OpenAssistant, with history) and `tokenizers/minimind` (6,400
entries, ChatML template). A model of 3 million parameters starts from noise, so it learns what the
answers look like, not what they say; the figure to read is its held-out cross entropy beside that
of the best memoryless model, the tokens' own frequencies. Documents are packed.

Result, seed 0, 2 cores of an Intel Xeon, 2026-11-23: of 1,173 training rows 783 fit the limits, in
274 packed rows of which 99 % is used (35 % unpacked). Held-out cross entropy 6.51 nats a token
against 7.27 for frequencies alone (training 5.2), in 4.5 minutes: so few answers teach which
characters go together, not sentences.

A full-size model starts from its folder instead, with all other settings on the command line:

    python experiments/sft_alpaca_zh.py --data DIR --start Qwen/Qwen2.5-0.5B --sft.num-steps 300 \
        --sft.optimizer.learning-rate 1e-5 --max-prompt 512 --max-response 512

`export/` in the workdir is a folder that transformers and `own_data.py --model` read.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

from rlhf_jax import config as configuration
from rlhf_jax import pipeline
from rlhf_jax.algorithms import sft
from rlhf_jax.data import batches, builders, mixing
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.training.state import OptimizerConfig

sys.path.append(str(pathlib.Path(__file__).parent))
import preferences


class Config(configuration.Config):
    """What is tuned, and how."""

    seed: int = 0
    # A language model (folder or org/name); "": `model` from noise.
    start: configuration.Source = ""
    max_prompt: int = 128  # tokens; what is longer is dropped and counted
    max_response: int = 256  # tokens, EOS included
    held_out: float = 0.1  # share of the prompts
    model: transformer.Config = preferences.SMALL
    sft: sft.Config = sft.Config(
        num_steps=300,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, schedule="cosine"),
    )


config = Config()


def frequency_loss(train: batches.Examples, held_out: batches.Examples, vocab_size: int) -> float:
    """Cross entropy of held-out answers under the training answers' token frequencies, nats.

    Frequencies start from one half, so that a token never seen costs something finite.
    """

    def answers(examples):
        return np.concatenate([ids[said > 0] for row in examples.rows for ids, said in row])

    counts = np.bincount(answers(train), minlength=vocab_size) + 0.5
    return float(-np.mean(np.log(counts / counts.sum())[answers(held_out)]))


def run(config: Config, context: Context) -> dict:
    """Trains, exports, returns the summary."""
    start = str(huggingface.fetch(config.start)) if config.start else ""
    tokenizer = preferences.open_tokenizer(start, context)
    sides = ([], [])
    for name in ("alpaca_zh_demo.json", "oasst_sft_zh.json"):
        parts = mixing.split(builders.load(context.data / "sft" / name), config.held_out)
        for side, rows in zip(sides, parts):
            side.extend(rows)
    sizes = (tokenizer, config.max_prompt, config.max_response)
    train, held_out = (batches.demonstrations(rows, *sizes) for rows in sides)
    packed = mixing.pack(train)
    context.log.print(
        f"packed: {len(train)} answers in {len(packed)} rows, {mixing.utilisation(packed):.0%} of "
        f"the positions used (unpacked {mixing.utilisation(train):.0%})"
    )
    clock = pipeline.Clock()
    with clock("sft"):
        if start:
            initial = preferences.language_model(start, tokenizer, context)
        else:
            initial = pipeline.new_model(config.model, context, config.seed)
        policy, summary = pipeline.fine_tune(config, context, initial, tokenizer, packed, held_out)
    preferences.export(context.workdir / "export", policy, tokenizer, start or None)
    vocab_size = policy.config.vocab_size
    return {
        "sft": summary | {"frequency_loss": frequency_loss(train, held_out, vocab_size)},
        "utilisation": {"packed": mixing.utilisation(packed), "plain": mixing.utilisation(train)},
        "seconds": clock.seconds,
    }


if __name__ == "__main__":
    launch(run, config)
