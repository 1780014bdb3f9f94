"""Measures how fast one device runs each algorithm, against its lower bounds and another program.

    python experiments/benchmarks/speed.py --steps 6 --json speed.jsonl
    python experiments/benchmarks/speed.py --batch 8 --prompt 512 --response 512
    python experiments/benchmarks/speed.py --prompt 512 --samples 8 --tasks sampling
    python experiments/benchmarks/speed.py --rounds 3 --peer 'sft=python their_sft.py'

The tasks, and the two lower bounds on their time, are described in `workloads.py`. By default the
model has 4 layers of width 256 and 4,096 token ids, the batch has 32 rows with a prompt and a
response of 64 tokens each, and everything is float32. The table shows each bound as a share of the
measured time. It is an error if any program is compiled after the first step.

On a machine with other load, compare the ratios of runs taken in turn, not seconds. `--peer` takes
such turns: each `TASK=COMMAND` (or `TASK,TASK=COMMAND`) is run once after our steps in every round.
The command prints a line of JSON with `seconds_per_step`; the last one counts.

On Linux CPUs the memory of a program's temporaries is kept from call to call, as `launch` does for
every experiment (`rlhf_jax.allocator`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shlex
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import tyro
import workloads
from rich.console import Console
from rich.table import Table

from rlhf_jax import allocator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(workloads.Workload):
    """What is timed, and at which sizes."""

    steps: int = 6  # timed repetitions in a round, of which the median is reported
    rounds: int = 1
    tasks: tuple[str, ...] = ("sft", "reward_model", "sampling", "ppo", "ppo_shared")
    peer: tuple[str, ...] = ()  # TASK=COMMAND, run in turn with our steps
    matmul: int = 2048  # side of the square matrices that the arithmetic bound is measured with
    copy: int = 256  # megabytes of the array that the memory bound is measured with
    json: Path | None = None


def peers(config: Config) -> dict[str, list[str]]:
    """The command of each task that has one. Raises ValueError for an entry of another form."""
    commands = {}
    for entry in config.peer:
        names, equals, command = entry.partition("=")
        for name in names.split(","):
            if not equals or name not in config.tasks:
                raise ValueError(
                    f"--peer {entry!r}: write TASK=COMMAND, with tasks from "
                    f"{', '.join(config.tasks)}"
                )
            commands[name] = shlex.split(command)
    return commands


def seconds_of_peer(command: list[str]) -> float:
    """Runs another program and returns the seconds per step that it prints.

    Raises RuntimeError, with the end of what it wrote, if it fails or prints no such line.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "seconds_per_step" in line]
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise RuntimeError(
            f"{shlex.join(command)}: exit code {done.returncode}, "
            f"{len(found)} lines with seconds_per_step; it ended with\n{said}"
        )
    return float(json.loads(found[-1])["seconds_per_step"])


def run(config: Config) -> Iterator[workloads.Row]:
    """Measures every task on one device, one after the other."""
    commands = peers(config)
    for name in config.tasks:
        peer = functools.partial(seconds_of_peer, commands[name]) if name in commands else None
        yield workloads.measure(
            config,
            name,
            steps=config.steps,
            matmul=config.matmul,
            copy=config.copy,
            rounds=config.rounds,
            peer=peer,
        )


def show(config: Config, rows: list[workloads.Row], console: Console) -> None:
    """Prints the rows as a table."""
    sizes = f"batch {config.batch}, {config.prompt} + {config.response} tokens"
    shape = f"{config.model.vocab_size:,} token ids, {config.model.dtype}"
    device = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
    table = Table(title=f"{sizes}, {shape}; {device}")
    table.add_column("task")
    heads = ("s/step", "peer's", "peer's / ours", "tokens/s", "arithmetic", "memory")
    for head in (*heads, "compilations", "compile s", "program MB", "process MB"):
        table.add_column(head, justify="right")
    for r in rows:
        ratios = [theirs / ours for ours, theirs in zip(r.round_seconds, r.peer_seconds)]
        table.add_row(
            r.task,
            ", ".join(f"{x:.3f}" for x in r.round_seconds),
            ", ".join(f"{x:.3f}" for x in r.peer_seconds),
            f"{statistics.median(ratios):.2f}" if ratios else "",
            f"{r.tokens_per_second:,.0f}",
            f"{r.arithmetic_share:.0%}",
            f"{r.memory_share:.0%}",
            f"{r.compilations}",
            f"{r.compile_seconds:.1f}",
            f"{r.program_megabytes:,.0f}",
            f"{r.process_megabytes:,.0f}",
        )
    console.print(table)


def main(config: Config) -> None:
    """Prints one line of JSON per task, to stdout or to `config.json`, and then the table."""
    sizes = {"batch": config.batch, "prompt": config.prompt, "response": config.response}
    sizes["vocab_size"] = config.model.vocab_size
    rows = []
    with contextlib.nullcontext() if config.json is None else config.json.open("w") as file:
        for row in run(config):  # written at once, because a later task may fail
            rows.append(row)
            print(json.dumps({**sizes, **workloads.rounded(row)}), file=file, flush=True)
    show(config, rows, Console())


if __name__ == "__main__":
    allocator.keep_freed_memory()
    main(tyro.cli(Config, description=__doc__))
