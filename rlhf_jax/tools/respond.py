"""Samples the answers of a checkpoint to a file of prompts, for people to label or judge.

    rlhf-jax-respond prompts.jsonl --model DIR --output answers.jsonl --num-samples 4

Each row of the input holds a `prompt`, which is text or a list of messages, and may hold a `group`.
The output has the same rows with `responses` added. Where the tokenizer has a chat template, a text
is rendered as one turn of a user, unless `--raw-prompts` asks for it to be continued as it stands.

To see whether training has fixed past failures, answer a file of them with the checkpoints from
before and after training, with the same seed, and let a person judge the two files blind with
`rlhf-jax-judge`.

An answer depends only on the seed, the position of the prompt in the file and the number of the
sample. It does not depend on the batch size.
"""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import tyro

from rlhf_jax import config, storage, texts
from rlhf_jax.data import builders
from rlhf_jax.launch import command
from rlhf_jax.models.transformer import Precision
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.tools import chat, pages


def respond(
    prompts: Annotated[pathlib.Path, tyro.conf.Positional],
    model: pathlib.Path,
    output: pathlib.Path,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = chat.SAMPLING,
    seed: int = 0,
    num_samples: int = 1,
    batch_size: int = 16,
    dtype: Precision = "float32",
    raw_prompts: bool = False,
) -> None:
    """Writes one row of answers for every row of prompts.

    Args:
        prompts: file of prompts
        model: Hugging Face folder
        output: the file of answers to write, .jsonl
        seed: random seed of the sampling
        num_samples: answers per prompt
        batch_size: answers that are sampled together
        dtype: type of matrix products
        raw_prompts: continue texts as they stand, even if the tokenizer has a chat template
    """
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: answers are lines of JSON; name a .jsonl file")
    storage.check_output("--output", output, prompts)
    config.check_field("seed", seed, config.Seed)
    pretrained = chat.load(model, sampling, dtype)
    rows = [
        {"prompt": pages.prompt(row, where)} | pages.group(row, where)
        for row, where in builders.load(prompts)
    ]
    answers = texts.generate(
        *pretrained,
        [row["prompt"] for row in rows],
        sampling,
        seed=seed,
        num_samples=num_samples,
        batch_size=batch_size,
        raw_prompts=raw_prompts,
    )
    responses = [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]
    lines = [
        json.dumps(row | {"responses": those}, ensure_ascii=False)
        for row, those in zip(rows, responses)
    ]
    storage.write(output, "".join(line + "\n" for line in lines))
    print(f"{output}: {num_samples} answers per prompt to {len(rows)} prompts")


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-respond`; `argv` defaults to the process's arguments."""
    command(respond, argv, description=__doc__)


if __name__ == "__main__":
    main()
