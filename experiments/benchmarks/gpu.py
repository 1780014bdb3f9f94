"""Measures how well one accelerator is used: fine-tuning, sampling and PPO of a 1B Llama in bf16.

    python experiments/benchmarks/gpu.py --json gpu.jsonl
    python experiments/benchmarks/gpu.py --sft.batch 16 --ppo.batch 8 --steps 3

The model has the shape of Llama 3.2 1B and random weights; computations are in bfloat16, trained
parameters and their moments in float32. Fine-tuning has rows of 2,048 tokens, and its share is its
model-FLOPs utilisation: of the rate of one large bfloat16 product, measured in the same run, and of
the peak in the device's data sheet (`rlhf_jax/chips.py`). Sampling is compared with the time in
which one large copy, measured too, would move the weights and the cache, and with `generate` of
transformers where torch has the device. PPO is one whole iteration. The aims are half of the
product rate in fine-tuning and half of the bandwidth in sampling.

On one H100 sampling reached 67 % of the bandwidth and fine-tuning 28 % of the product rate, because
of the head (`docs/measurements.md`); PPO and `generate` have not been timed there. The test runs
this program at toy size on a CPU. On a GPU jax reserves three quarters of the memory, so that
little is left for torch; larger batches need XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 and
`--no-generate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
import workloads
from rich.console import Console
from rich.table import Table

from rlhf_jax import chips
from rlhf_jax.models import transformer

LLAMA_1B = transformer.Config(
    vocab_size=128256,
    num_layers=16,
    d_model=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    d_ff=8192,
    max_length=4096,
    rope_base=500000.0,
    tied=True,
    dtype="bfloat16",
)
AIM = 0.5  # of the measured rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows of a step, and their tokens."""

    batch: int
    prompt: int
    response: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed, and at which sizes."""

    model: transformer.Config = LLAMA_1B
    sft: Sizes = Sizes(batch=8, prompt=1024, response=1024)
    sampling: Sizes = Sizes(batch=64, prompt=512, response=512)
    ppo: Sizes = Sizes(batch=16, prompt=512, response=512)
    epochs: int = 4  # of the iteration of PPO
    shared_critic: bool = False  # a scalar head on the policy, which saves a second network
    steps: int = 5  # timed repetitions, of which the median is reported
    matmul: int = 8192  # side of the square matrices that the product rate is measured with
    copy: int = 2048  # megabytes of the array that the bandwidth is measured with
    generate: bool = True  # also time `generate` of transformers
    torch_device: str = "cuda"
    json: Path | None = None


class Row(NamedTuple):
    """The figures of one task: `measured`, and what only this program knows.

    peak_share: FLOPs / seconds / the peak of the device's data sheet, NaN where that is not known;
    generate_seconds: those of `generate` for the same sampling, NaN where it was not run.
    """

    measured: workloads.Row
    peak_share: float
    generate_seconds: float


def run(config: Config) -> Iterator[Row]:
    """Measures fine-tuning, sampling and PPO, one after the other."""
    chip = chips.find(jax.devices()[0].device_kind)
    ppo = "ppo_shared" if config.shared_critic else "ppo"
    for name, sizes in (("sft", config.sft), ("sampling", config.sampling), (ppo, config.ppo)):
        row = workloads.measure(
            workloads.Workload(model=config.model, epochs=config.epochs, **vars(sizes)),
            name,
            steps=config.steps,
            matmul=config.matmul,
            copy=config.copy,
        )
        rate = row.gigaflops * 1e9 / row.seconds_per_step
        theirs = seconds_of_generate(config) if name == "sampling" and config.generate else None
        yield Row(
            row,
            float("nan") if chip is None else rate / chip.flops,
            float("nan") if theirs is None else theirs,
        )


def seconds_of_generate(config: Config) -> float | None:
    """The median time of `generate` for the same model and sizes; None where torch cannot run it.

    Like ours it samples at temperature 1 without filters, and no row ends early.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device(config.torch_device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    c, sizes = config.model, config.sampling
    shape = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.max_length,
        tie_word_embeddings=c.tied,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(shape).to(device, getattr(torch, c.dtype)).eval()
    tokens = torch.randint(3, c.vocab_size, (sizes.batch, sizes.prompt), device=device)

    def seconds():
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                min_new_tokens=sizes.response,
                max_new_tokens=sizes.response,
            )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds()  # does not count
    return statistics.median(seconds() for _ in range(config.steps))


def show(rows: list[Row], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table(title=f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    table.add_column("task")
    heads = ("s/step", "tokens/s", "of product rate", "of data sheet", "of bandwidth", "aim")
    for head in (*heads, "generate, s", "generate's / ours", "program GB", "peak GB"):
        table.add_column(head, justify="right")
    for row in rows:
        r = row.measured
        reached = {"sft": r.arithmetic_share, "sampling": r.memory_share}.get(r.task)
        table.add_row(
            r.task,
            f"{r.seconds_per_step:.4g}",
            f"{r.tokens_per_second:,.0f}",
            f"{r.arithmetic_share:.1%}",
            _known(row.peak_share, ".1%"),
            f"{r.memory_share:.1%}",
            "" if reached is None else f"{AIM:.0%}: {'met' if reached >= AIM else 'missed'}",
            _known(row.generate_seconds, ".4g"),
            _known(row.generate_seconds / r.seconds_per_step, ".2f"),
            f"{r.program_megabytes / 1e3:.3g}",
            _known(r.device_megabytes / 1e3, ".3g"),
        )
    console.print(table)


def _known(value: float, form: str) -> str:
    return format(value, form) if value == value else "unknown"


def main(config: Config) -> None:
    """Prints one line of JSON per task, to stdout or to `config.json`, and then the table."""
    device, rows = jax.devices()[0].device_kind, []
    with contextlib.nullcontext() if config.json is None else config.json.open("w") as file:
        for row in run(config):  # written at once, because a later task may not fit
            rows.append(row)
            line = workloads.rounded(row.measured) | workloads.rounded(row)
            del line["measured"]
            print(json.dumps({"device": device, **line}), file=file, flush=True)
    show(rows, Console())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
