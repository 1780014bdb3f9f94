"""The workloads that the benchmarks time: steps of each algorithm on random tokens.

`sft`, `reward_model` and `dpo` (the last two on pairs) are one update. `sampling` and `greedy` draw
responses, prefill included, and `beam` searches them. `ppo` is a whole iteration with a critic of
its own, `ppo_shared` one whose critic is a scalar head on the policy; both make 4 epochs of 1
minibatch. `grpo` is an iteration of one update. Each program is the one that training runs.

Beside each time stand two lower bounds, measured in the same run. `arithmetic` is the time that the
model's FLOPs (`models/flops.py`) would take at the rate of one large matrix product, and `memory`
the time that the bytes which have to move would take at the rate of one large copy.
"""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bounds import (
    Work,
    Workload,
    dpo_work,
    grpo_work,
    ppo_work,
    reward_model_work,
    sampling_work,
    sft_work,
)

from rlhf_jax import chips, online, sharding
from rlhf_jax.algorithms import dpo, grpo, ppo, reward_model, sft
from rlhf_jax.data.batches import Comparisons, Demonstrations, Prompts
from rlhf_jax.data.records import Ends
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.partition import combine
from rlhf_jax.rewards import learned
from rlhf_jax.sampling import Drawing, Sampling, beam, decode
from rlhf_jax.training import loop, speed


class Row(NamedTuple):
    """The figures of one task: medians over the rounds, each of which is the median of its steps.

    A share is lower bound / seconds_per_step, so at most 1. round_seconds and peer_seconds: seconds
    per step in every round, of this program and of the one that it is compared with. compilations:
    of any program after the first step, so 0. compile_seconds: tracing, lowering and compiling.
    program_megabytes: the compiler's arguments + temporaries + outputs - aliased, of the largest
    program. device_megabytes: the most that the device has held at once, the tasks before this one
    included, NaN where it does not tell. process_megabytes: the same of the process.
    """

    task: str
    seconds_per_step: float
    round_seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]
    tokens_per_second: float
    arithmetic_share: float
    memory_share: float
    gigaflops: float
    gigabytes: float
    matmul_gflops: float
    copy_gbytes: float
    compilations: int
    compile_seconds: float
    program_megabytes: float
    device_megabytes: float
    process_megabytes: float


class Task(NamedTuple):
    """`step(state) -> state` runs one step; `programs` are its jitted functions and arguments.

    trained: the models whose gradients a step holds, as shapes.
    """

    state: Any
    step: Callable[[Any], Any]
    programs: tuple[tuple[Any, tuple], ...]
    tokens: int
    work: Work
    trained: Any


# ------------------------------------------------------------------------------------- the tasks


def _random_tokens(config, *shape):
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, shape)
    return tokens.astype(np.int32), np.ones(shape, np.int32)


def _supervised(mesh, config, loss_fn, models, batch, work, frozen=None):
    """The step of an algorithm on data: the program that its `run` calls."""
    state = sharding.initialise(mesh, loop.init_state, config, models)
    frozen = frozen or {}
    program = loop.supervised_program(loss_fn, mesh, state, frozen)
    batch = sharding.put_rows(mesh, batch)
    programs = ((program, (config, state, frozen, batch)),)
    trained = jax.eval_shape(lambda: models)

    def step(state):
        return program(config, state, frozen, batch)[0]

    return Task(state, step, programs, batch.tokens.size, work, trained)


def make_sft(config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """A step of SFT: cross entropy on the response, with rows that have no padding."""
    tokens, attend = _random_tokens(config, config.batch, config.prompt + config.response)
    mask = np.zeros(tokens.shape, np.float32)
    mask[:, config.prompt :] = 1.0
    batch = Demonstrations(tokens, attend, mask)
    models, work = {"policy": policy}, sft_work(config, policy)
    return _supervised(mesh, sft.Config(), sft.loss, models, batch, work)


def make_reward_model(config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """A step of the reward model."""
    batch = _pairs(config)
    scorer = heads.init_scorer(policy, jax.random.key(1))
    models, work = {"scorer": scorer}, reward_model_work(config, scorer)
    return _supervised(mesh, reward_model.Config(), reward_model.loss, models, batch, work)


def make_dpo(config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """A step of DPO, whose reference is the policy as it was."""
    models, work = {"policy": policy}, dpo_work(config, policy)
    frozen = {"reference": policy}
    return _supervised(mesh, dpo.Config(), dpo.loss, models, _pairs(config), work, frozen)


def _pairs(config):
    """One pair per prompt, so twice the rows of SFT."""
    tokens, attend = _random_tokens(config, config.batch, 2, config.prompt + config.response)
    mask = np.zeros(tokens.shape, np.float32)
    mask[..., config.prompt :] = 1.0
    ranks = np.tile(np.arange(2, dtype=np.int32), (config.batch, 1))
    present, margin = np.ones(ranks.shape, np.float32), np.zeros(config.batch, np.float32)
    return Comparisons(tokens, attend, mask, ranks, present, margin)


def _prompts(config, mesh):
    count = config.batch // config.samples
    tokens, attend = _random_tokens(config, count, config.prompt)
    return sharding.put_rows(mesh, Prompts(tokens, attend, np.arange(count)))


def _ends(config):
    """An EOS that no model emits, so that every response has its full length."""
    return Ends(eos_ids=(config.model.vocab_size,), pad_id=0)


def make_sampling(
    config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model, *, temperature: float
) -> Task:
    """Sampling without filters, prefill included; it counts the sampled tokens."""
    sampling = Sampling(max_new_tokens=config.response, temperature=temperature)

    def draw(policy, prompts, iteration):
        index = jnp.repeat(prompts.index, config.samples)
        keys = decode.row_keys(jax.random.fold_in(jax.random.key(0), iteration), index)
        texts = (prompts.tokens, prompts.attend)
        return decode.sample(policy, *texts, keys, sampling=sampling, ends=_ends(config))

    return _generation(config, mesh, policy, draw)


def make_beam(config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """Beam search with `samples` beams, so that as many rows are decoded as in sampling."""
    settings = beam.Beam(beams=config.samples, max_new_tokens=config.response)

    def search(policy, prompts, _):
        texts = (prompts.tokens, prompts.attend)
        return beam.search(policy, *texts, beam=settings, ends=_ends(config))

    return _generation(config, mesh, policy, search)


def _generation(config, mesh, policy, generate) -> Task:
    rows, whole = sharding.rows(mesh), sharding.replicated(mesh)
    program = jax.jit(
        lambda policy, prompts, i: (generate(policy, prompts, i), i + 1),
        in_shardings=(sharding.tree(mesh, policy), rows, whole),
        out_shardings=(rows, whole),
    )
    prompts = _prompts(config, mesh)
    start = jax.device_put(jnp.int32(0), whole)

    def step(state):
        # The samples are kept in the state so that a step is over when they are there.
        return program(policy, prompts, state[1])

    tokens = config.batch * config.response
    programs = ((program, (policy, prompts, start)),)
    return Task((None, start), step, programs, tokens, sampling_work(config), trained=())


def make_ppo(
    config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model, *, shared: bool
) -> Task:
    """An iteration of PPO on a reward model; prompts and responses count as tokens."""
    settings = ppo.Config(
        batch_size=config.batch // config.samples,
        samples_per_prompt=config.samples,
        sampling=Sampling(max_new_tokens=config.response),
        num_epochs=config.epochs,
        shared_critic=shared,
    )
    scorer = heads.init_scorer(policy, jax.random.key(1))
    networks = ppo.networks(settings, policy, None if shared else scorer)
    work = ppo_work(config, networks["policy"], networks.get("critic"))
    reward = (learned.score, scorer)
    return _online(config, mesh, policy, settings, ppo.algorithm(), networks, reward, work)


def make_grpo(config: Workload, mesh: jax.sharding.Mesh, policy: transformer.Model) -> Task:
    """An iteration of GRPO with one update, on a reward that takes no time."""
    settings = grpo.Config(
        batch_size=config.batch // config.samples,
        samples_per_prompt=config.samples,
        sampling=Sampling(max_new_tokens=config.response),
        kl_coef=0.05,
    )
    networks, work = {"policy": policy}, grpo_work(config, policy)
    reward = (_mean_id, ())
    return _online(config, mesh, policy, settings, grpo.algorithm(), networks, reward, work)


def _mean_id(params, tokens, attend, mask):
    del params, attend
    return jnp.sum(tokens * mask, axis=1) / jnp.sum(mask, axis=1)


def _online(config, mesh, policy, settings, algorithm, networks, reward, work) -> Task:
    """The three programs of an iteration of an online algorithm."""
    score, scorer = reward
    frozen = sharding.place(mesh, {"reference": policy, "scorer": scorer})
    state = sharding.initialise(mesh, online.init_state, settings, algorithm.memory, networks)
    sample, judge, update, _ = online.compile_programs(
        algorithm, Drawing(_ends(config)), score, mesh, state, frozen
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
    return Task(state, iterate, programs, tokens, work, jax.eval_shape(lambda: networks))


MAKERS = {
    "sft": make_sft,
    "reward_model": make_reward_model,
    "dpo": make_dpo,
    "sampling": functools.partial(make_sampling, temperature=1.0),
    "greedy": functools.partial(make_sampling, temperature=0.0),
    "beam": make_beam,
    "ppo": functools.partial(make_ppo, shared=False),
    "ppo_shared": functools.partial(make_ppo, shared=True),
    "grpo": make_grpo,
}


def make(config: Workload, name: str, mesh: jax.sharding.Mesh) -> Task:
    """The task of this name, with a new model. Raises ValueError for a name that there is not."""
    if name not in MAKERS:
        raise ValueError(f"no task is called {name!r}; choose from {', '.join(MAKERS)}")
    policy = sharding.initialise(
        mesh, transformer.init, config.model, jax.random.key(0), static_argnums=0
    )
    return MAKERS[name](config, mesh, policy)


# ------------------------------------------------------------------------------ what is measured


class Compiled(NamedTuple):
    """What the compiler says of the programs of a task."""

    seconds: float  # of tracing, lowering and compiling all of them
    peak: float  # bytes: arguments + temporaries + outputs - aliased, of the largest program
    temporaries: float  # bytes, of the program with the most


def compile_programs(task: Task) -> Compiled:
    """Compiles the programs of a task, which its steps then find compiled."""
    start = time.perf_counter()
    compiled = [program.lower(*arguments).compile() for program, arguments in task.programs]
    seconds = time.perf_counter() - start
    memory = [x.memory_analysis() for x in compiled]
    peaks = [
        m.argument_size_in_bytes
        + m.temp_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        for m in memory
    ]
    return Compiled(seconds, max(peaks), max(m.temp_size_in_bytes for m in memory))


def compilations() -> int:
    """How many programs have been compiled, or read from a cache on disk, since the first call."""
    return len(_compiled_programs())


@functools.cache
def _compiled_programs() -> list[str]:
    """Their events, to which jax adds one whenever a traced program is turned into another one."""
    events = []

    def listen(event: str, seconds: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


class Round(NamedTuple):
    """One round: seconds of each step, and the rates measured beside them."""

    seconds: list[float]
    product: float  # FLOPs per second
    bandwidth: float  # bytes per second
    peer: float | None  # seconds per step of the program that ours is compared with


def measure(
    config: Workload,
    name: str,
    *,
    steps: int,
    matmul: int,
    copy: int,
    rounds: int = 1,
    peer: Callable[[], float] | None = None,
) -> Row:
    """Compiles one task and times `steps` steps of it on one device, in each of the rounds.

    `matmul` is the side of the matrices, and `copy` the megabytes of the array, that the two lower
    bounds are measured with. `peer` times another program, once in every round, and returns its
    seconds per step. Raises RuntimeError if anything was compiled after the first step.
    """
    mesh = sharding.make_mesh(data=1, fsdp=1)
    with jax.set_mesh(mesh):
        task = make(config, name, mesh)
        compiled = compile_programs(task)
        state, compiled_again, taken = task.step(task.state), 0, []
        for _ in range(rounds):
            # Beside each task, because the machine may be faster at one time than at another.
            rates = chips.product_rate(matmul, config.model.dtype), chips.copy_rate(copy)
            before = compilations()
            seconds, state = chips.timed(task.step, state, steps)
            compiled_again += compilations() - before
            taken.append(Round(seconds, *rates, peer() if peer else None))
    if compiled_again:
        raise RuntimeError(f"{name}: {compiled_again} programs were compiled after the first step")
    medians = [statistics.median(one.seconds) for one in taken]
    seconds = statistics.median(medians)
    held = speed.peak_memory(list(mesh.devices.flat))
    floors = [task.work.flops / one.product for one in taken]
    moves = [task.work.bytes / one.bandwidth for one in taken]
    return Row(
        task=name,
        seconds_per_step=seconds,
        round_seconds=tuple(medians),
        peer_seconds=tuple(one.peer for one in taken if one.peer is not None),
        tokens_per_second=task.tokens / seconds,
        arithmetic_share=statistics.median(x / y for x, y in zip(floors, medians)),
        memory_share=statistics.median(x / y for x, y in zip(moves, medians)),
        gigaflops=task.work.flops / 1e9,
        gigabytes=task.work.bytes / 1e9,
        matmul_gflops=statistics.median(one.product for one in taken) / 1e9,
        copy_gbytes=statistics.median(one.bandwidth for one in taken) / 1e9,
        compilations=compiled_again,
        compile_seconds=compiled.seconds,
        program_megabytes=compiled.peak / 1e6,
        device_megabytes=float("nan") if held is None else held / 1e6,
        process_megabytes=_process_megabytes(),
    )


def _process_megabytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes, else kilobytes


def rounded(row: Any) -> dict[str, Any]:
    """A record as JSON shows it: numbers with four digits, None for what is not known."""
    return {name: _rounded(value) for name, value in row._asdict().items()}


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    return [_rounded(x) for x in value] if isinstance(value, list | tuple) else value
