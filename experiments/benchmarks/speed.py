"""Measures how fast one device runs each algorithm, against what its arithmetic and memory allow.

    python experiments/benchmarks/speed.py --steps 6 --json speed.jsonl

It times a step of SFT, a step of the reward model (on pairs), sampling, and a whole iteration of
PPO (with its own critic, 4 epochs of 1 minibatch) on random tokens. By default the model has 4
layers of width 256 and 4096 token ids, the batch has 32 rows with a prompt and a response of 64
tokens each, and everything is float32. Each program is the one that training runs.

Two lower bounds on the time are measured in the same run. `arithmetic` is the time that the model's
FLOPs would take at the rate of one large matrix product, and `memory` the time that the bytes which
have to move would take at the rate of one large copy. The table shows each bound as a share of the
measured time. On a machine with other load, compare the ratios of runs taken in turn, not seconds.

On Linux CPUs the memory of a program's temporaries is kept from call to call, as `launch` does for
every experiment (`rlhf_jax.allocator`).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rlhf_jax import allocator, online, sharding
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data.batches import Comparisons, Demonstrations, Prompts
from rlhf_jax.data.records import Ends
from rlhf_jax.models import transformer
from rlhf_jax.models.partition import combine
from rlhf_jax.rewards import learned
from rlhf_jax.sampling import Drawing, Sampling, decode
from rlhf_jax.training import loop

FLOAT = 4  # bytes: parameters, gradients and moments are float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is timed, and at which sizes."""

    steps: int = 6  # timed repetitions, of which the median is reported
    tasks: tuple[str, ...] = ("sft", "reward_model", "sampling", "ppo")
    batch: int = 32
    prompt: int = 64
    response: int = 64
    model: transformer.Config = transformer.Config(vocab_size=4096)
    epochs: int = 4
    matmul: int = 2048  # side of the square matrices that the arithmetic bound is measured with
    copy: int = 256  # megabytes of the array that the memory bound is measured with
    json: Path | None = None


class Row(NamedTuple):
    """The figures of one task. A share is lower bound / seconds_per_step, so at most 1.

    compile_seconds: tracing, lowering and compiling; program_megabytes: the compiler's arguments +
    temporaries + outputs - aliased, of the largest program; process_megabytes: the highest resident
    size of the process so far, the tasks before this one included.
    """

    task: str
    seconds_per_step: float
    tokens_per_second: float
    arithmetic_share: float
    memory_share: float
    gigaflops: float
    gigabytes: float
    matmul_gflops: float
    copy_gbytes: float
    compile_seconds: float
    program_megabytes: float
    process_megabytes: float


class Work(NamedTuple):
    """What any program for a step must do at least: the FLOPs of the model, and bytes to move."""

    flops: float
    bytes: float


class Task(NamedTuple):
    """`step(state) -> state` runs one step; `programs` are its jitted functions and arguments."""

    state: Any
    step: Callable[[Any], Any]
    programs: tuple[tuple[Any, tuple], ...]
    tokens: int
    work: Work


def trunk_weights(c: transformer.Config) -> int:
    """Entries of the matrices that every token is multiplied with; no embedding, head or norms."""
    attention = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.d_model * c.d_ff)


def forward_flops(c: transformer.Config, rows: int, first: int, last: int, heads: int) -> float:
    """A forward pass over positions [first, last) of `rows` rows, the rest being cached.

    Counted are 2 FLOPs per multiplication and addition for every weight matrix, causal attention
    (where position t reads t + 1 keys and values), and the vocabulary product at `heads` positions
    per row. Not counted are norms, rotary angles, softmax, the embedding lookup and the masked half
    of the attention matrix.
    """
    length = last - first
    pairs = (last * (last + 1) - first * (first + 1)) // 2
    products = trunk_weights(c) * length + c.d_model * c.vocab_size * heads
    return 2.0 * rows * (products + 2 * pairs * c.num_heads * c.head_dim * c.num_layers)


def weight_bytes(c: transformer.Config, head: bool) -> float:
    """The matrices a forward pass reads; of the embedding only the rows looked up, ignored here."""
    return FLOAT * (trunk_weights(c) + (c.d_model * c.vocab_size if head else 0))


def update_bytes(parameters: Any) -> float:
    """An update moves ten floats a parameter: read forward and backward, its gradient written and
    read, itself and both moments of Adam read and written. Activations are not counted."""
    return 10.0 * FLOAT * sum(x.size for x in jax.tree.leaves(parameters))


def sft_work(config: Config, policy: transformer.Model) -> Work:
    """One update: forward and twice that backward, logits at every position, no recomputation."""
    length = config.prompt + config.response
    forward = forward_flops(config.model, config.batch, 0, length, heads=length)
    return Work(3 * forward, update_bytes(policy))


def reward_model_work(config: Config, scorer: transformer.Model) -> Work:
    """One update on twice the rows, without a vocabulary product."""
    length = config.prompt + config.response
    return Work(
        3 * forward_flops(config.model, 2 * config.batch, 0, length, heads=0), update_bytes(scorer)
    )


def sampling_work(config: Config) -> Work:
    """Prefill with one row of logits, then R - 1 decoding steps (the last token is never read).

    Bytes: the weights once a step, prefill being one; every step reads the cache up to its
    position. Logits and the writes to the cache (1 / length of its reads) are not counted.
    """
    c, last = config.model, config.prompt + config.response - 1
    flops = forward_flops(c, config.batch, 0, last, heads=config.response)
    columns = (last * (last + 1) - config.prompt * (config.prompt + 1)) // 2
    cache = 2 * FLOAT * c.num_layers * c.num_kv_heads * c.head_dim * columns * config.batch
    return Work(flops, config.response * weight_bytes(c, head=True) + cache)


def ppo_work(config: Config, policy: transformer.Model, critic: transformer.Model) -> Work:
    """Sampling; one forward pass of reference, scorer, policy and critic; then the epochs.

    Two of the four passes need logits, at the response only. An epoch is three forward passes of
    policy (with logits) and critic.
    """
    c, length = config.model, config.prompt + config.response
    sampling = sampling_work(config)
    speaks = forward_flops(c, config.batch, 0, length, heads=config.response)
    scores = forward_flops(c, config.batch, 0, length, heads=0)
    return Work(
        sampling.flops + (2 + 3 * config.epochs) * (speaks + scores),
        sampling.bytes
        + 2 * (weight_bytes(c, head=True) + weight_bytes(c, head=False))
        + config.epochs * update_bytes((policy, critic)),
    )


def _random_tokens(config, *shape):
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, shape)
    return tokens.astype(np.int32), np.ones(shape, np.int32)


def _supervised(mesh, config, loss_fn, models, batch, tokens, work):
    """The step of SFT and reward modelling: the program that their `run` calls."""
    state = sharding.initialise(mesh, loop.init_state, config, models)
    step = loop.supervised_program(loss_fn, mesh, state, {})
    batch = sharding.put_rows(mesh, batch)
    programs = ((step, (config, state, {}, batch)),)
    return Task(state, lambda state: step(config, state, {}, batch)[0], programs, tokens, work)


def make_sft(config: Config, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """A step of SFT: cross entropy on the response, with rows that have no padding."""
    tokens, attend = _random_tokens(config, config.batch, config.prompt + config.response)
    mask = np.zeros(tokens.shape, np.float32)
    mask[:, config.prompt :] = 1.0
    batch = Demonstrations(tokens, attend, mask)
    models, work = {"policy": policy}, sft_work(config, policy)
    return _supervised(mesh, sft.Config(), sft.loss, models, batch, tokens.size, work)


def make_reward_model(config: Config, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """A step of the reward model: one pair per prompt, so twice the rows of SFT."""
    tokens, attend = _random_tokens(config, config.batch, 2, config.prompt + config.response)
    ranks = np.tile(np.arange(2, dtype=np.int32), (config.batch, 1))
    margin = np.zeros(config.batch, np.float32)
    mask, present = np.ones(tokens.shape, np.float32), np.ones(ranks.shape, np.float32)
    batch = Comparisons(tokens, attend, mask, ranks, present, margin)
    scorer = reward_model.init_scorer(policy, jax.random.key(1))
    models, work = {"scorer": scorer}, reward_model_work(config, scorer)
    loss = reward_model.loss
    return _supervised(mesh, reward_model.Config(), loss, models, batch, tokens.size, work)


def _prompts(config, mesh):
    tokens, attend = _random_tokens(config, config.batch, config.prompt)
    return sharding.put_rows(mesh, Prompts(tokens, attend, np.arange(config.batch)))


def _ends(config):
    """An EOS that no model emits, so that every response has its full length."""
    return Ends(eos_ids=(config.model.vocab_size,), pad_id=0)


def make_sampling(config: Config, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """Sampling at temperature 1 without filters, prefill included; it counts the sampled tokens."""
    rows, whole = sharding.rows(mesh), sharding.replicated(mesh)

    def sample(policy, prompts, iteration):
        keys = decode.row_keys(jax.random.fold_in(jax.random.key(0), iteration), prompts.index)
        drawn = decode.sample(
            policy,
            prompts.tokens,
            prompts.attend,
            keys,
            sampling=Sampling(max_new_tokens=config.response),
            ends=_ends(config),
        )
        return drawn, iteration + 1

    sample = jax.jit(
        sample,
        in_shardings=(sharding.tree(mesh, policy), rows, whole),
        out_shardings=(rows, whole),
    )
    prompts = _prompts(config, mesh)
    start = jax.device_put(jnp.int32(0), whole)

    def step(state):
        # The samples are kept in the state so that a step is over when they are there.
        return sample(policy, prompts, state[1])

    tokens = config.batch * config.response
    programs = ((sample, (policy, prompts, start)),)
    return Task((None, start), step, programs, tokens, sampling_work(config))


def make_ppo(config: Config, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """The three programs of an iteration of `ppo.run`; prompts and responses count as tokens."""
    settings = ppo.Config(
        batch_size=config.batch,
        sampling=Sampling(max_new_tokens=config.response),
        num_epochs=config.epochs,
    )
    scorer = reward_model.init_scorer(policy, jax.random.key(1))
    networks = ppo.networks(settings, policy, scorer)
    frozen = sharding.place(mesh, {"reference": policy, "scorer": scorer})
    algorithm = ppo.algorithm()
    state = sharding.initialise(mesh, online.init_state, settings, algorithm.memory, networks)
    sample, judge, update = online.compile_programs(
        algorithm, Drawing(_ends(config)), learned.score, mesh, state, frozen
    )
    prompts = _prompts(config, mesh)

    def iterate(state):
        params = combine(frozen, state.train.trainable)
        rollout = judge(settings, params, *sample(settings, params, state.iteration, prompts))
        return update(settings, state, frozen, rollout)[0]

    params = combine(frozen, state.train.trainable)
    drawn = jax.eval_shape(sample, settings, params, state.iteration, prompts)
    rollout = jax.eval_shape(judge, settings, params, *drawn)
    programs = (
        (sample, (settings, params, state.iteration, prompts)),
        (judge, (settings, params, *drawn)),
        (update, (settings, state, frozen, rollout)),
    )
    tokens = config.batch * (config.prompt + config.response)
    return Task(state, iterate, programs, tokens, ppo_work(config, policy, scorer))


MAKERS = {
    "sft": make_sft,
    "reward_model": make_reward_model,
    "sampling": make_sampling,
    "ppo": make_ppo,
}


def _seconds(step, state, repeats):
    """Seconds of each of `repeats` runs of state -> state, after one that does not count."""
    state = jax.block_until_ready(step(state))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_rate(size: int) -> float:
    """FLOPs per second of a float32 [size, size] product, the best of five."""
    other = jnp.ones((size, size), jnp.float32) / size
    return 2.0 * size**3 / min(_seconds(jax.jit(lambda x: x @ other), other, 5))


def copy_rate(megabytes: int) -> float:
    """Bytes per second, read and written, of x + 1 in place, the best of five."""
    x = jnp.zeros(megabytes * 2**20 // FLOAT, jnp.float32)
    return 2.0 * x.nbytes / min(_seconds(jax.jit(lambda x: x + 1, donate_argnums=0), x, 5))


def measure(config: Config, name: str, task: Task) -> Row:
    """Compiles and times one task. Raises RuntimeError if the loop compiled anything again."""
    start = time.perf_counter()
    compiled = [program.lower(*arguments).compile() for program, arguments in task.programs]
    compile_seconds = time.perf_counter() - start
    memory = [x.memory_analysis() for x in compiled]
    peaks = [
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        for m in memory
    ]
    # Beside each task, because the machine may be faster at one time than at another.
    flops, bandwidth = matmul_rate(config.matmul), copy_rate(config.copy)
    seconds = statistics.median(_seconds(task.step, task.state, config.steps))
    sizes = [program._cache_size() for program, _ in task.programs]
    if max(sizes) > 1:
        raise RuntimeError(f"{name}: the loop compiled again, cache sizes {sizes} instead of 1")
    return Row(
        task=name,
        seconds_per_step=seconds,
        tokens_per_second=task.tokens / seconds,
        arithmetic_share=task.work.flops / flops / seconds,
        memory_share=task.work.bytes / bandwidth / seconds,
        gigaflops=task.work.flops / 1e9,
        gigabytes=task.work.bytes / 1e9,
        matmul_gflops=flops / 1e9,
        copy_gbytes=bandwidth / 1e9,
        compile_seconds=compile_seconds,
        program_megabytes=max(peaks) / 1e6,
        process_megabytes=_process_megabytes(),
    )


def _process_megabytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes, else kilobytes


def run(config: Config) -> list[Row]:
    """Measures every task on one device. Returns one row per task."""
    mesh = sharding.make_mesh(data=1, fsdp=1)
    with jax.set_mesh(mesh):
        rows = []
        for name in config.tasks:
            policy = sharding.initialise(
                mesh, transformer.init, config.model, jax.random.key(0), static_argnums=0
            )
            rows.append(measure(config, name, MAKERS[name](config, mesh, policy)))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table(title=f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    table.add_column("task")
    heads = ("s/step", "tokens/s", "arithmetic", "memory", "compile s", "program MB", "process MB")
    for head in heads:
        table.add_column(head, justify="right")
    for r in rows:
        table.add_row(
            r.task,
            f"{r.seconds_per_step:.3f}",
            f"{r.tokens_per_second:,.0f}",
            f"{r.arithmetic_share:.0%}",
            f"{r.memory_share:.0%}",
            f"{r.compile_seconds:.1f}",
            f"{r.program_megabytes:,.0f}",
            f"{r.process_megabytes:,.0f}",
        )
    console.print(table)


def _rounded(row):
    return {k: v if k == "task" else float(f"{v:.4g}") for k, v in row._asdict().items()}


def main(config: Config) -> None:
    """Prints the table, and one line of JSON per task to stdout or to `config.json`."""
    rows = run(config)
    show(rows, Console())
    lines = "".join(json.dumps(_rounded(row)) + "\n" for row in rows)
    if config.json:
        config.json.write_text(lines)
    else:
        print(lines, end="")


if __name__ == "__main__":
    allocator.keep_freed_memory()
    main(tyro.cli(Config, description=__doc__))
