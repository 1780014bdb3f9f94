"""The supervised loop that SFT and reward modelling share: batches in, one compiled step, out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax import sharding
from rlhf_jax.models import lora
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import Log


def fit(
    config: Any,
    init: Callable[[Any], dict],
    policy: Any,
    loss_fn: Callable,
    batches: Any,
    *,
    name: str,
    mesh: jax.sharding.Mesh,
    log: Log,
    checkpoints: Checkpoints | None,
) -> tuple[dict, list[dict[str, Any]]]:
    """Trains `init(policy)` on `batches` for `config.num_steps` updates of `loss_fn`.

    Continues from the newest checkpoint. The state is donated. Batch i is the first of
    `batches.from_position(i)`, so the step count is the whole data position. Metrics reach the host
    one step late; before a checkpoint is written, the step it holds has been checked to be finite.
    Returns the trained models and the metrics of every step that ran here.
    """
    check_batch(config, batches)
    sharding.check_rows(mesh, batch_size=config.batch_size)
    with jax.set_mesh(mesh):
        optimizer = training.make_optimizer(config.optimizer, config.num_steps)
        # The weights are an argument: closed over, they would be constants of the program.
        start_from = lambda policy: training.init_state(optimizer, init(policy))  # noqa: E731
        state = sharding.born(mesh, start_from, policy)
        frozen = sharding.place(mesh, lora.frozen(init(policy)))
        state = (checkpoints.restore(state) if checkpoints else None) or state
        step = compile_step(mesh, training.update, loss_fn, config, state, frozen)
        start = int(state.step)
        with log.stage(name, config.num_steps, start=start, check=training.raise_if_bad) as stage:
            source = batches.from_position(start)
            for i, batch in zip(range(start, config.num_steps), source):
                state, metrics = step(state, sharding.put_rows(mesh, batch))
                stage.write(i, metrics, tokens=batch.tokens.size)
                done = i + 1
                if checkpoints and (done % config.save_every == 0 or done == config.num_steps):
                    stage.flush()  # raises if this step was bad: nothing bad is ever saved
                    checkpoints.save(done, state)
    return lora.join(frozen, state.trainable), stage.history


def check_batch(config: Any, batches: Any) -> None:
    """Raises ValueError unless the loader's batch is the one that the configuration counts on."""
    if batches.batch_size != config.batch_size:
        raise ValueError(
            f"the loader draws batches of {batches.batch_size}, but the configuration says "
            f"batch_size={config.batch_size}; make them equal"
        )


def compile_step(
    mesh: jax.sharding.Mesh,
    update: Callable,
    loss_fn: Callable,
    config: Any,
    state: training.TrainState,
    frozen: dict,
) -> Callable:
    """Compiles `update(loss_fn, config, state, batch)` as `step(state, batch) -> (state, metrics)`.

    The state keeps its shardings and is donated, frozen bases are neither donated nor copied, the
    batch comes split by rows, metrics are whole on every device. The configuration's numbers are
    traced: another value does not recompile.
    """
    shardings, still = sharding.tree(mesh, state), sharding.tree(mesh, frozen)
    whole, rows = sharding.replicated(mesh), sharding.rows(mesh)

    def step(config, state, frozen, batch):
        state, metrics = update(loss_fn, config, state._replace(frozen=frozen), batch)
        return state._replace(frozen={}), metrics

    compiled = jax.jit(
        step,
        in_shardings=(whole, shardings, still, rows),
        out_shardings=(shardings, whole),
        donate_argnums=1,
    )
    return lambda state, batch: compiled(config, state, frozen, batch)
