"""The train state and the one place where gradients are taken and optimizers called."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import config, sharding, shards
from rlhf_jax.config import Decay, NonNegative, Positive, Share, Whole
from rlhf_jax.models import partition, stacking
from rlhf_jax.training import checkpoint


class TrainingStopped(RuntimeError):
    """Training cannot go on: a non-finite loss, a failed check, a reward that hangs. One line.

    The last good checkpoint is intact: nothing is saved after the step that is named.
    """


class StageConfig(checkpoint.Config):
    """What every stage is told of its checkpoints, and of updates that are not finite."""

    # "skip": the networks stay as they were, and training goes on; `skipped_updates` is the share
    # of a step's updates. Where most are left out the run stops: see `loop.limit_skips`.
    on_bad_update: Literal["stop", "skip"] = "stop"


class OptimizerConfig(config.Config):
    """AdamW with warm-up, decay and clipping by global norm. Decay spares norms and biases.

    `eps_form`: "torch" adds eps to the bias-corrected sqrt(v) (optax, torch); "tf" adds it before
    the correction, which gives far smaller first steps at large eps (Huang et al. 2023, item 21).
    """

    learning_rate: NonNegative = 3e-4
    warmup_steps: Whole = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # of the decay after warm-up
    final_scale: Share = 0.0  # the learning rate decays to this share of its peak
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8
    eps_form: Literal["torch", "tf"] = "torch"  # where eps is added
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive | None = 1.0  # of all gradients of a network; None does not clip


def check_warmup(optimizer: OptimizerConfig, num_updates: int, name: str) -> None:
    """Raises ValueError for a warm-up that ends after the run; `name` is of the optimizer."""
    if optimizer.warmup_steps > num_updates:
        raise ValueError(
            f"{name}.warmup_steps={optimizer.warmup_steps} is longer than the run of {num_updates} "
            "updates, which would never reach its learning rate; shorten the warm-up"
        )


class TrainState(NamedTuple):
    """What a step changes: the trained part of the models and the optimizer's state.

    step []: updates applied; bad_step []: the first update whose loss or gradient was not finite,
    or -1. From that update on the state no longer changes. average: the exponential average of the
    networks in `trainable` that it names, None where a run keeps none.
    """

    step: Int[Array, ""]
    trainable: Any
    opt_state: Any
    bad_step: Int[Array, ""]
    average: dict[str, Any] | None = None


def schedule(optimizer: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate at an update: linear warm-up, then the decay to `final_scale` of the peak.

    As in transformers: update 0 of a warm-up has rate 0, and the decay would reach its end at
    update `num_steps`, so the last update of a linear one has rate peak / num_steps.
    """
    peak, floor = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_scale
    warmup = optimizer.warmup_steps
    length = max(num_steps - warmup, 1)

    def rate(step):
        done = jnp.clip((step - warmup) / length, 0.0, 1.0)
        if optimizer.schedule == "constant":
            decayed = jnp.float32(peak)
        elif optimizer.schedule == "linear":
            decayed = peak + (floor - peak) * done
        else:
            decayed = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        rising = peak * step / max(warmup, 1)
        return jnp.where(step < warmup, rising, decayed)

    return rate


def _scale_by_adam(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    if optimizer.eps_form == "torch":
        return optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)
    plain = optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2)

    def update(updates, state, params=None):
        _, state = plain.update(updates, state, params)
        t = state.count.astype(jnp.float32)
        rate = jnp.sqrt(1.0 - optimizer.b2**t) / (1.0 - optimizer.b1**t)

        def step(m, v):
            return rate * m / (jnp.sqrt(v) + optimizer.eps)

        return jax.tree.map(step, state.mu, state.nu), state

    return optax.GradientTransformation(plain.init, update)


def make_optimizer(optimizer: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The transformation of one network: clip, Adam, decoupled decay, schedule.

    Build it inside the compiled step: its numbers are traced leaves of the configuration.
    """
    clip = optimizer.max_grad_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        _scale_by_adam(optimizer),
        optax.add_decayed_weights(
            optimizer.weight_decay, mask=lambda p: jax.tree.map_with_path(_is_matrix, p)
        ),
        optax.scale_by_learning_rate(schedule(optimizer, num_steps)),
    )


# (settings, updates of the whole run) -> the transformation of one network.
MakeOptimizer = Callable[[OptimizerConfig, int], optax.GradientTransformation]


def made(
    make: MakeOptimizer, optimizer: OptimizerConfig, num_updates: int
) -> optax.GradientTransformation:
    """What `make` makes of the settings. Raises ValueError if it cannot be such a function."""
    name = getattr(make, "__name__", type(make).__name__)
    # optax's own functions take a learning rate first, and would take the settings for one.
    if not callable(make) or "learning_rate" in inspect.signature(make).parameters:
        found = f"{name} is none"
    else:
        transformation = make(optimizer, num_updates)
        if isinstance(transformation, optax.GradientTransformation):
            return transformation
        found = f"{name} returned {type(transformation).__name__}"
    raise ValueError(
        "make_optimizer is a function of (OptimizerConfig, number of updates) that returns an "
        f"optax.GradientTransformation, but {found}; write for example def lion(optimizer, "
        "num_updates): return optax.lion(training.state.schedule(optimizer, num_updates))"
    )


def keyed(loss_fn: Callable, seed: int | Array, step: int | Array) -> Callable:
    """The loss, with a key for its parameter of that name if it has one, say for dropout.

    The key is a function of (seed, step) alone, so that a run that was interrupted draws the same.
    """
    if "key" not in inspect.signature(loss_fn).parameters:
        return loss_fn
    # A number that no iteration has, whose keys draw responses and order minibatches.
    own = jax.random.fold_in(jax.random.key(seed), 2**31 - 2)
    return functools.partial(loss_fn, key=jax.random.fold_in(own, step))


def _is_matrix(path: tuple, array: Array) -> bool:
    """Whether a parameter is a matrix in each layer, and so decays; norms and biases are not."""
    return jnp.ndim(array) - stacking.is_stacked(path) > 1


def master(x: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
    """A trained array (or its shape) in float32, and any array of whole numbers as it is."""
    return sharding.cast(x, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def init_state(optimizer: optax.GradientTransformation, trainable: Any) -> TrainState:
    """A fresh state around a copy of `trainable` (steps donate their state)."""
    trainable = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), jnp.int32(-1))


def averaging(state: TrainState, *names: str) -> TrainState:
    """The state with averages of these networks, which start as copies of them."""
    copies = {name: jax.tree.map(jnp.copy, state.trainable[name]) for name in names}
    return state._replace(average=copies)


def averaged(state: TrainState, decay: float | Array | None) -> TrainState:
    """The state whose averages a are decay * a + (1 - decay) * the network as it is now.

    A state without averages is returned as it is.
    """
    if state.average is None:
        return state
    now = {name: state.trainable[name] for name in state.average}
    moved = jax.tree.map(lambda a, x: x + decay * (a - x), state.average, now)
    return state._replace(average=_keep(state.bad_step < 0, moved, state.average))


def gradient_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: dict,
    batch: Any,
    *,
    skip: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer update. `loss_fn(params, batch) -> (loss [], metrics)`.

    `params` is `frozen` and `state.trainable` together, and only the latter is differentiated. A
    loss, a gradient or updated parameters that are not finite leave the state as it was and mark
    the step; the host finds it in the metrics (`raise_if_bad`). With `skip` it is not marked, and
    "skipped_updates" is 1. Raises ValueError for a loss that returns anything else.
    """

    def on_trainable(trainable):
        with config.explained_tracing():
            found = loss_fn(partition.combine(frozen, trainable), batch)
        return _check_loss(loss_fn, found)

    (loss, metrics), grads = jax.value_and_grad(on_trainable, has_aux=True)(state.trainable)
    grads = shards.constrain(grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    # A sum of squares would overflow before its terms do, so it may be too strict and never lax.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(trainable))
    good = finite & (state.bad_step < 0)
    bad = (state.bad_step < 0) & ~finite & (not skip)
    bad_step = jnp.where(bad, state.step, state.bad_step)
    trainable, opt_state = _keep(good, (trainable, opt_state), (state.trainable, state.opt_state))
    step = state.step + good.astype(jnp.int32)
    norms = {"grad_norm": norm}
    if len(grads) > 1:  # each network is clipped by its own norm
        norms |= {f"grad_norm/{name}": optax.tree.norm(part) for name, part in grads.items()}
    metrics = {"loss": loss, **norms, **metrics, "bad_step": bad_step}
    if skip:
        metrics["skipped_updates"] = (~finite).astype(jnp.float32)
    return TrainState(step, trainable, opt_state, bad_step, state.average), metrics


def _check_loss(loss_fn: Callable, found: Any) -> tuple[Array, dict[str, Array]]:
    """What a loss returned; raises ValueError unless it is a scalar and a dictionary of metrics."""
    is_pair = isinstance(found, tuple) and len(found) == 2
    if is_pair and jnp.shape(found[0]) == () and isinstance(found[1], dict):
        return found
    parts = found if isinstance(found, tuple) else (found,)
    shown = ", ".join(
        f"an array of shape {list(part.shape)}" if hasattr(part, "shape") else type(part).__name__
        for part in parts
    )
    name = getattr(getattr(loss_fn, "func", loss_fn), "__name__", "the loss")  # func: of a partial
    raise ValueError(
        f"a loss returns (scalar, metrics), but {name} returned {shown}; "
        "return the mean and a dictionary of scalars, {} if there are none"
    )


def _keep(good: Bool[Array, ""], new, old):
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def raise_if_bad(step: int, metrics: dict[str, float]) -> None:
    """Raises TrainingStopped, naming the update, if its loss, gradient or result was not finite."""
    bad = metrics["bad_step"]
    if bad >= 0:
        loss, norm = (math.isfinite(metrics.get(name, 0.0)) for name in ("loss", "grad_norm"))
        what = "loss" if not loss else "gradient" if not norm else "change of the parameters"
        raise TrainingStopped(
            f"non-finite {what} at update {int(bad)}: the parameters were left as they "
            "were before it and nothing was saved since; lower the learning rate, or look at the "
            'batch of that update (on_bad_update="skip" leaves such updates out)'
        )


class Queue(NamedTuple):
    """The last Q numbers, in a ring."""

    values: Float[Array, " Q"]
    # Numbers pushed so far; from 2 Q on the one in Q..2 Q - 1 with the same remainder by Q.
    count: Int[Array, ""]

    @classmethod
    def empty(cls, size: int) -> Queue:
        return cls(jnp.zeros(size), jnp.int32(0))

    def push(self, x: Float[Array, " B"], kept: Float[Array, " B"] | None = None) -> Queue:
        """The queue with the numbers at its end, in their order; only those where `kept` is 1."""
        size = self.values.shape[0]
        kept = jnp.ones(x.shape) if kept is None else kept
        kept = (kept > 0).astype(jnp.int32)
        number, total = jnp.cumsum(kept) - 1, jnp.sum(kept)  # of each among those that are kept
        is_new = (kept > 0) & (number >= total - size)
        places = jnp.where(is_new, (self.count + number) % size, size)
        values = self.values.at[places].set(x, mode="drop")
        count = self.count + total
        return Queue(values, jnp.where(count < 2 * size, count, size + count % size))

    @property
    def held(self) -> Float[Array, " Q"]:
        """1 where there is a number."""
        return (jnp.arange(self.values.shape[0]) < self.count).astype(jnp.float32)


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations of all scores so far (Welford, Chan et al.)."""

    count: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]

    @classmethod
    def empty(cls) -> RunningMoments:
        return cls(jnp.float32(0), jnp.float32(0), jnp.float32(0))

    def push(self, x: Float[Array, " B"]) -> RunningMoments:
        """The moments with a batch added."""
        count = self.count + x.size
        delta = jnp.mean(x) - self.mean
        mean = self.mean + delta * x.size / count
        squares = jnp.sum(jnp.square(x - jnp.mean(x)))
        squares = self.squares + squares + jnp.square(delta) * self.count * x.size / count
        return RunningMoments(count, mean, squares)

    @property
    def std(self) -> Float[Array, ""]:
        """Population standard deviation; 0 while empty."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1.0))
