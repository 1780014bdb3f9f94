"""The one training loop, and what supervised and online algorithms need around it.

A step is a function `step(state, batch) -> (state, Outcome)` that only enqueues work on the device.
The loop reads its metrics one step later, so the host never waits for the step just started.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.config import Count, Seed, Whole
from rlhf_jax.models import flops, partition, stacking
from rlhf_jax.stopping import Stop
from rlhf_jax.together import Member
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints, Clock
from rlhf_jax.training.metrics import Check, Display, Log
from rlhf_jax.training.state import MakeOptimizer, TrainState

SKIPS_WINDOW = 20  # steps that `limit_skips` looks at


class Config(training.StageConfig):
    """Settings of every supervised run."""

    num_steps: Count = 500
    batch_size: Count = 32  # rows of a batch, of all devices together
    micro_batches: Count = 1  # slices of a forward pass, to save memory; the loss is the same
    optimizer: training.OptimizerConfig = training.OptimizerConfig()
    save_every: Count = 500  # steps between checkpoints
    eval_every: Whole = 0  # steps between evaluations; 0 is never
    seed: Seed = 0  # of what a loss draws at random, if it asks for a key

    def check(self) -> None:
        """Raises ValueError for a batch that does not divide, or a metric that is never there."""
        self.check_best(self.eval_every)
        training.check_warmup(self.optimizer, self.num_steps, "optimizer")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batches="
                f"{self.micro_batches}"
            )

    def row_counts(self) -> dict[str, int]:
        """The numbers of rows that must divide over a mesh.

        Micro-batches too: with fewer rows than devices they save no memory and cost more time.
        """
        return {
            "batch_size": self.batch_size,
            "batch_size / micro_batches": self.batch_size // self.micro_batches,
        }


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where a run takes place: its devices, its log, and its checkpoints (None saves nothing).

    stage: what it is called in the log; None: by its algorithm. stop: what may ask it to end early.
    """

    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    log: Log = dataclasses.field(default_factory=Log)
    checkpoints: Checkpoints | None = None
    stage: str | None = None
    stop: Stop = dataclasses.field(default_factory=Stop)
    together: Member | None = None  # of runs whose online stages are computed together


class Outcome(NamedTuple):
    """What one step leaves behind, still on the device.

    metrics: scalars by name. tokens []: those counted in the speed. record: what `observe` reads (a
    rollout), or None.
    """

    metrics: dict[str, jax.Array]
    tokens: jax.Array
    record: Any = None


class Plan(NamedTuple):
    """What a stage is called, how long it is, and when it is evaluated and saved.

    Saving and evaluating also happen after the last step.
    """

    name: str  # in logs and metrics
    display: Display
    num_steps: int  # in all, those of an earlier process included
    save_every: int  # steps between checkpoints
    eval_every: int = 0  # steps between evaluations; 0 is never
    save_seconds: float = math.inf  # see `checkpoint.Config`


def plan_of(config: Any, name: str, display: Display, num_steps: int) -> Plan:
    """The plan of a stage of `num_steps` steps, saved and evaluated as its configuration says."""
    return Plan(name, display, num_steps, config.save_every, config.eval_every, config.save_seconds)


def train(
    step: Callable[[Any, Any], tuple[Any, Outcome]],
    state: Any,
    batches: Any,
    plan: Plan,
    runtime: Runtime,
    *,
    check: Check = training.raise_if_bad,
    observe: Callable[[Any], dict[str, float]] | None = None,
    evaluate: Callable[[int, Any], dict[str, float]] | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Runs the steps of a stage that are still to be done: (state, metrics of each step run here).

    Continues from the newest intact checkpoint. Step i reads the first batch of
    `batches.from_position(i)` of a `Loader`, so the number of steps done is the whole position in
    the data.
    `check(i, metrics)` may raise, and so does `limit_skips`; a checkpoint is written only once its
    step has passed them.
    `observe(record)` sees what a step recorded, on the host, and returns metrics of its own.
    `evaluate(steps done, state)` runs after every `eval_every` steps; its figures are reported as
    "eval/...".
    A step that `runtime.stop` interrupts is finished and saved before KeyboardInterrupt or
    `stopping.Terminated` is raised.
    """
    checkpoints, stop = runtime.checkpoints, runtime.stop
    start, state = (checkpoints.restore(state) if checkpoints else None) or (0, state)
    total = plan.num_steps
    log = runtime.log.stage(
        runtime.stage or plan.name,
        total,
        start=start,
        check=limit_skips(check, total),
        display=plan.display,
        devices=list(runtime.mesh.devices.flat),
    )
    clock = Clock(plan.save_seconds, start)
    with log as stage, stop.after_steps():
        for i, batch in zip(range(start, total), batches.from_position(start)):
            state, outcome = step(state, batch)
            done = i + 1
            figures = {}
            if plan.eval_every and (done % plan.eval_every == 0 or done == total):
                figures = {f"eval/{key}": value for key, value in evaluate(done, state).items()}
            # Gathered before the next step is enqueued, so that reading it does not wait for that.
            record = None if observe is None else sharding.gather(outcome.record)
            more = functools.partial(_on_host, observe, record, figures)
            stage.write(i, outcome.metrics, tokens=outcome.tokens, more=more)
            stops = stop.asked()
            regular = done % plan.save_every == 0 or done == total
            if checkpoints and (regular or stops or clock.due(done)):
                stage.flush()  # raises if this step was bad: nothing bad is ever saved
                began = time.monotonic()
                checkpoints.save(done, state, stage.history[-1])
                clock.saved(done, time.monotonic() - began)
            if stops:
                stop.obey()
    return state, stage.history


def limit_skips(check: Check, num_steps: int) -> Check:
    """`check`, and TrainingStopped once more than half of the last updates were left out.

    These are the updates of the last 20 steps, or of the whole run where it is shorter. A run that
    only leaves out updates would otherwise end well, with the parameters that it began with.
    """
    shares = collections.deque(maxlen=min(SKIPS_WINDOW, num_steps))

    def checked(step: int, metrics: dict[str, float]) -> None:
        check(step, metrics)
        shares.append(metrics.get("skipped_updates", 0.0))
        if sum(shares) > shares.maxlen / 2:
            raise training.TrainingStopped(
                f"step {step}: {sum(shares) / len(shares):.0%} of the updates of the last "
                f"{len(shares)} steps were not finite and were left out; lower the learning rate, "
                "or look at the batches"
            )

    return checked


def _on_host(observe: Callable | None, record: Any, figures: dict) -> dict[str, float]:
    """What is reported of a step besides its own metrics."""
    return figures if observe is None else observe(sharding.to_host(record)) | figures


def init_state(
    config: Config, trainable: Any, make_optimizer: MakeOptimizer = training.make_optimizer
) -> TrainState:
    """The state before the first update."""
    optimizer = training.made(make_optimizer, config.optimizer, config.num_steps)
    return training.init_state(optimizer, trainable)


def update(
    loss_fn: Callable,
    config: Config,
    state: TrainState,
    frozen: dict,
    batch: Any,
    make_optimizer: MakeOptimizer = training.make_optimizer,
):
    """One update of `loss_fn(config, params, batch)`: (state, metrics)."""
    optimizer = training.made(make_optimizer, config.optimizer, config.num_steps)
    rate = training.schedule(config.optimizer, config.num_steps)(state.step)
    loss_of = functools.partial(training.keyed(loss_fn, config.seed, state.step), config)
    skip = config.on_bad_update == "skip"
    state, metrics = training.gradient_step(loss_of, optimizer, state, frozen, batch, skip=skip)
    return state, {**metrics, "lr": rate}


def fit(
    config: Config,
    models: dict[str, Any],
    batches: Any,
    *,
    loss_fn: Callable,
    name: str,
    display: Display,
    runtime: Runtime,
    frozen: dict[str, Any] | None = None,
    evaluate: Callable[[int, dict], dict[str, float]] | None = None,
    init: Callable[[Config, Any], TrainState] = init_state,
    update: Callable = update,
    make_optimizer: MakeOptimizer = training.make_optimizer,
) -> tuple[dict, list[dict[str, Any]]]:
    """Trains `models` for `config.num_steps` updates of `loss_fn(config, params, batch)`.

    `frozen` holds models that the loss only reads (DPO's reference); `params` holds these and the
    trained ones. In a model with an adapter only the adapter is trained. `evaluate(done, params)`
    gives held-out figures every `config.eval_every` steps. `init` and `update`, functions like
    those of this module, are for what changes with the networks, such as averages of them. Returns
    the trained models and the metrics of every step that ran here; the caller's arrays are left
    alone.
    Raises ValueError for a batch that does not divide over the mesh or differs from the loader's.
    """
    check_batch_size(config.batch_size, batches)
    check_evaluation(config.eval_every, evaluate)
    sharding.check_rows(runtime.mesh, **config.row_counts())
    batches = batches.reading(sharding.process_rows(runtime.mesh, config.batch_size))
    for name in models.keys() & (frozen or {}).keys():
        raise ValueError(f"{name!r} cannot be trained and frozen at once; rename one of the two")
    with jax.set_mesh(runtime.mesh):
        trainable, bases = sharding.place(runtime.mesh, partition.partition(models))
        given = {**bases, **sharding.place(runtime.mesh, frozen or {})}
        trained, frozen = arranged(runtime.mesh, trainable, given)
        state = sharding.initialise(
            runtime.mesh, init, config, trained, make_optimizer, static_argnums=2
        )
        del trained  # the state holds a copy
        program = supervised_program(loss_fn, runtime.mesh, state, frozen, update, make_optimizer)

        def step(state, batch):
            batch = sharding.put_rows(runtime.mesh, batch)
            state, metrics, tokens = program(config, state, frozen, batch)
            return state, Outcome(metrics, tokens)

        state, history = train(
            step,
            state,
            batches,
            plan_of(config, name, display, config.num_steps),
            runtime,
            evaluate=lambda done, state: evaluate(done, models_of(given, state)),
        )
    return models_of(given, state), history


def arranged(mesh: jax.sharding.Mesh, trainable: dict, frozen: dict) -> tuple[dict, dict]:
    """Models on the mesh, or their shapes, as programs take them: (trainable, frozen).

    Layers are stacked where training wants that. What is trained is float32, whatever it was stored
    in, because updates are often smaller than the spacing of bfloat16. The matrices of frozen
    models have the type of their products, which changes no number: programs read half as much.
    """
    masters = jax.tree.map(training.master, trainable)
    return (
        stacking.stack_all(mesh, masters),
        stacking.stack_all(mesh, partition.in_compute_type(frozen)),
    )


def models_of(given: dict, state: TrainState) -> dict:
    """All models with a name per layer, from the frozen ones as they were given and the state."""
    return partition.combine(given, stacking.unstack_all(state.trainable))


def supervised_program(
    loss_fn: Callable,
    mesh: jax.sharding.Mesh,
    state,
    frozen: dict,
    update: Callable = update,
    make_optimizer: MakeOptimizer = training.make_optimizer,
) -> Callable:
    """The compiled step `(config, state, frozen, batch) -> (state, metrics, tokens)`.

    The state keeps its shardings and is donated; frozen models are neither donated nor copied; the
    batch comes split by rows; metrics are replicated on every device. `state` and `frozen` may
    be trees of shapes.
    """
    state_shardings, frozen_shardings = sharding.tree(mesh, state), sharding.tree(mesh, frozen)
    replicated, rows = sharding.replicated(mesh), sharding.rows(mesh)
    return compiled(
        _step,
        (update, loss_fn, make_optimizer),
        in_shardings=(replicated, state_shardings, frozen_shardings, rows),
        out_shardings=(state_shardings, replicated, replicated),
        donate=(1,),
    )


def _step(
    update, loss_fn, make_optimizer, config: Config, state: TrainState, frozen: dict, batch: Any
):
    """`update`, with the model FLOPs among its metrics, and the real tokens of the batch."""
    work = flops.of_update(state.trainable, frozen, batch.attend)
    state, metrics = update(loss_fn, config, state, frozen, batch, make_optimizer)
    return state, {**metrics, "model_flops": work}, jnp.sum(batch.attend > 0)


def check_batch_size(batch_size: int, batches: Any) -> None:
    """Raises ValueError unless the loader's batches have the size that the configuration says."""
    if batches.batch_size != batch_size:
        raise ValueError(
            f"the loader draws batches of {batches.batch_size}, but the configuration says "
            f"batch_size={batch_size}; make them equal"
        )


def check_evaluation(eval_every: int, evaluate: Callable | None) -> None:
    """Raises ValueError where one of the two is given without the other."""
    if eval_every and evaluate is None:
        raise ValueError(f"eval_every={eval_every}, but there is nothing to evaluate on; give both")
    if evaluate is not None and not eval_every:
        raise ValueError(
            "held-out evaluation is given, but eval_every=0 never runs it; set it above 0"
        )


# ------------------------------------------------------------------------- compiled programs


def compiled(
    fn: Callable,
    static: tuple,
    *,
    in_shardings,
    out_shardings,
    donate: tuple[int, ...] = (),
    options: tuple[tuple[str, Any], ...] = (),
) -> Callable:
    """`jax.jit` of `functools.partial(fn, *static, **options)`, the same for the same arguments.

    jax.jit caches programs by the identity of the function, so a function made anew for every run
    would be compiled again. Therefore `fn` is defined at module level, `static` holds functions and
    other hashable values, and everything else is passed at the call.
    """
    leaves, structure = jax.tree.flatten((in_shardings, out_shardings))
    return _compiled(fn, static, options, structure, tuple(leaves), donate)


@functools.lru_cache(maxsize=64)
def _compiled(fn, static, options, structure, leaves, donate):
    in_shardings, out_shardings = jax.tree.unflatten(structure, leaves)
    return jax.jit(
        functools.partial(fn, *static, **dict(options)),
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=donate,
    )
