"""Answers of a checkpoint to a file of prompts, for people to label or judge.

    python experiments/respond.py prompts.jsonl --model DIR --output answers.jsonl --num-samples 4

Rows hold `prompt`, text or messages, and perhaps `group`; the output adds `responses`. Where the
tokenizer has a chat template, text is a user's turn in it, unless `--raw-prompts` has it continued
as it stands. A file of past failures, answered by the checkpoints
before and after training with the same seed, is judged blind by `judge.py`.

Claim: an answer depends on seed, prompt's place and sample number alone, not on the batch.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections import defaultdict
from typing import Annotated

import jax
import numpy as np
import tyro

from rlhf_jax.data import builders
from rlhf_jax.data import chat as templates
from rlhf_jax.data.schema import Message, user_turn
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.launch import command
from rlhf_jax.sampling import decode
from rlhf_jax.training.metrics import write_atomically

sys.path.append(str(pathlib.Path(__file__).parent))
import chat
import pages


def respond(
    prompts: Annotated[pathlib.Path, tyro.conf.Positional],
    model: pathlib.Path,
    output: pathlib.Path,
    sampling: Annotated[chat.Sampling, tyro.conf.arg(name="")] = chat.Sampling(),  # noqa: B008
    num_samples: int = 1,
    batch_size: int = 16,
    raw_prompts: bool = False,
) -> None:
    """Writes a row of answers for every row of prompts.

    Args:
        prompts: file of prompts
        model: Hugging Face folder
        output: the file of answers, .jsonl
        num_samples: answers to each prompt
        batch_size: answers that are sampled together
        raw_prompts: text is continued as it stands, despite a chat template
    """
    if output.suffix != ".jsonl" or not output.parent.is_dir():
        raise ValueError(f"--output {output}: name a .jsonl file in a folder that exists")
    if num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"num_samples={num_samples} and batch_size={batch_size} must be at least 1"
        )
    speaker = chat.load(model, sampling)
    rows = [
        {"prompt": pages.prompt(row, where)} | {k: row[k] for k in ("group",) if k in row}
        for row, where in builders.load(prompts)
    ]
    asked = [tokens_of(speaker.tokenizer, row["prompt"], raw_prompts) for row in rows]
    said = answers(speaker, sampling, asked, num_samples, batch_size)
    lines = [json.dumps(row | {"responses": r}, ensure_ascii=False) for row, r in zip(rows, said)]
    write_atomically(output, "".join(line + "\n" for line in lines))
    print(f"{output}: {num_samples} answers to each of {len(rows)} prompts")


def tokens_of(tokenizer: Tokenizer, prompt: pages.Prompt, raw_prompts: bool = False) -> list[int]:
    """Ids of a prompt, asked as `own_data.py` has taught it."""
    if isinstance(prompt, str):
        if raw_prompts or tokenizer.chat_template is None:
            return tokenizer.encode_prompt(prompt)
        return templates.prompt(tokenizer, user_turn(prompt))
    return templates.prompt(tokenizer, [Message(m["role"], m["content"]) for m in prompt])


def answers(
    speaker: chat.Speaker,
    sampling: chat.Sampling,
    ids: list[list[int]],
    num_samples: int,
    batch_size: int,
) -> list[list[str]]:
    """`num_samples` answers to each prompt, in batches of prompts of like length."""
    tokenizer = speaker.tokenizer
    alike = defaultdict(list)
    for i in range(len(ids)):
        tokens, attend = chat.padded(speaker, sampling, ids[i])
        alike[tokens.shape[1]] += [(i, k, tokens[0], attend[0]) for k in range(num_samples)]
    sample = jax.jit(
        functools.partial(
            decode.sample,
            max_new_tokens=sampling.max_new_tokens,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            **sampling.arguments(),
        )
    )
    keys = jax.jit(
        jax.vmap(lambda i, k: decode.row_keys(jax.random.key(sampling.seed), i[None], k)[0])
    )
    said = [[""] * num_samples for _ in ids]
    for rows in alike.values():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            full = batch + batch[:1] * (batch_size - len(batch))  # one program for every batch
            index, number, tokens, attend = map(np.stack, zip(*full))
            drawn = jax.device_get(sample(speaker.model, tokens, attend, keys(index, number)))
            for (i, k, *_), row, mask in zip(batch, drawn.tokens, drawn.mask):
                new = [t for t in row[mask > 0].tolist() if t not in tokenizer.eos_ids]
                said[i][k] = "".join(chat.spell(tokenizer, ids[i], new))
    return said


if __name__ == "__main__":
    command(respond)
