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

import functools
import json
import pathlib
from collections import defaultdict
from typing import Annotated, NamedTuple

import jax
import numpy as np
import tyro

from rlhf_jax import storage
from rlhf_jax.data import builders
from rlhf_jax.data import chat as templates
from rlhf_jax.data.schema import Message, user_turn
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.folders import Pretrained
from rlhf_jax.launch import command
from rlhf_jax.models.transformer import Precision
from rlhf_jax.sampling import decode
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
    if output.suffix != ".jsonl" or not output.parent.is_dir():
        raise ValueError(f"--output {output}: name a .jsonl file in a folder that exists")
    if num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"num_samples={num_samples} and batch_size={batch_size} must be at least 1"
        )
    pretrained = chat.load(model, sampling, dtype)
    rows = [
        {"prompt": pages.prompt(row, where)} | {k: row[k] for k in ("group",) if k in row}
        for row, where in builders.load(prompts)
    ]
    ids = [encode(pretrained.tokenizer, row["prompt"], raw_prompts) for row in rows]
    sampled = answers(
        pretrained, sampling, ids, seed=seed, num_samples=num_samples, batch_size=batch_size
    )
    lines = [
        json.dumps(row | {"responses": responses}, ensure_ascii=False)
        for row, responses in zip(rows, sampled)
    ]
    storage.write(output, "".join(line + "\n" for line in lines))
    print(f"{output}: {num_samples} answers per prompt to {len(rows)} prompts")


def encode(tokenizer: Tokenizer, prompt: pages.Prompt, raw_prompts: bool = False) -> list[int]:
    """Token ids of a prompt, rendered as training renders the prompts of the user's own data.

    Raises ValueError for messages where the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        if raw_prompts or tokenizer.chat_template is None:
            return tokenizer.encode_prompt(prompt)
        return templates.prompt(tokenizer, user_turn(prompt))
    return templates.prompt(tokenizer, [Message(m["role"], m["content"]) for m in prompt])


class Request(NamedTuple):
    """One answer to sample. P is the width that the prompt is padded to."""

    index: int  # of the prompt
    sample: int  # number of the answer to this prompt
    tokens: np.ndarray  # [P]
    attend: np.ndarray  # [P]


def answers(
    pretrained: Pretrained,
    sampling: Sampling,
    ids: list[list[int]],
    *,
    seed: int,
    num_samples: int,
    batch_size: int,
) -> list[list[str]]:
    """Samples `num_samples` answers to each of the prompts `ids` and returns their texts.

    Prompts that are padded to the same width share a batch. Raises ValueError for a prompt that is
    too long for the model.
    """
    tokenizer = pretrained.tokenizer
    by_width: dict[int, list[Request]] = defaultdict(list)
    for i, prompt in enumerate(ids):
        tokens, attend = chat.padded(pretrained, sampling, prompt)
        requests = (Request(i, k, tokens[0], attend[0]) for k in range(num_samples))
        by_width[tokens.shape[1]].extend(requests)
    root = jax.random.key(seed)

    @jax.jit
    def sample(model, sampling, batch: Request):
        keys = jax.vmap(functools.partial(_row_key, root))(batch.index, batch.sample)
        prompts = (batch.tokens, batch.attend)
        return decode.sample(model, *prompts, keys, sampling=sampling, ends=tokenizer.ends)

    texts = [[""] * num_samples for _ in ids]
    for requests in by_width.values():
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            # The last batch is filled up, so that all batches of a width share one program.
            filled = batch + batch[:1] * (batch_size - len(batch))
            stacked = Request(*map(np.stack, zip(*filled)))
            drawn = jax.device_get(sample(pretrained.model, sampling, stacked))
            for request, row, mask in zip(batch, drawn.tokens, drawn.mask):
                new = [t for t in row[mask > 0].tolist() if t not in tokenizer.eos_ids]
                pieces = chat.stream_text(tokenizer, ids[request.index], new)
                texts[request.index][request.sample] = "".join(pieces)
    return texts


def _row_key(root: jax.Array, index: jax.Array, sample: jax.Array) -> jax.Array:
    """The key of one row; `decode.row_keys` takes many rows with one and the same sample number."""
    return decode.row_keys(root, index[None], sample)[0]


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-respond`; `argv` defaults to the process's arguments."""
    command(respond, argv, description=__doc__)


if __name__ == "__main__":
    main()
