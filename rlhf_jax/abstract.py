"""The compiled programs of a stage, with shapes where a run has arrays: what `plan` compiles.

    initial = abstract.model(shape, mesh)
    stage = sft.programs(config.sft, initial, length, mesh)
    stage = ppo.programs(config.ppo, policy=stage.result, ...)

The programs are those that `loop.fit`, `online.run` and `epoch` run: the same functions build them,
from shapes that the functions which fill the arrays of a run give. Nothing is computed, so the mesh
may be of devices that are not there. A shape stands for one buffer: where a run shares an array
between models, the same object is in both trees.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.extend.core import Var

from rlhf_jax import online as algorithms
from rlhf_jax import sharding
from rlhf_jax.data import epoch
from rlhf_jax.data.records import Comparisons, Demonstrations, Ends, Prompts, Steps
from rlhf_jax.models import partition, stacking, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import learned
from rlhf_jax.sampling.decode import BLOCK, Sampling
from rlhf_jax.sampling.rollout import Drawing, Score
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.state import MakeOptimizer


class Program(NamedTuple):
    """A compiled program and the shapes that a run calls it with."""

    name: str
    function: Callable | None  # jitted; None where arrays are only held, as in a restore
    arguments: tuple
    resident: Any  # what else is on the devices meanwhile; an argument may be among it
    rows: int  # rows, of all devices together, of one forward pass
    max_trips: int = 1  # of a loop whose end depends on the data
    updates: bool = False  # whether it takes optimizer steps in loops


class Stage(NamedTuple):
    """The programs of a stage, the models that it leaves behind, and what it holds while it runs.

    Both are trees of shapes.
    """

    programs: list[Program]
    result: Any
    held: Any


def model(shape: transformer.Config, mesh: jax.sharding.Mesh) -> Model:
    """A language model of this shape."""
    key = jax.random.key(0)
    return sharding.abstract(mesh, transformer.init, shape, key, static_argnums=0)


def derived(init: Callable, mesh: jax.sharding.Mesh, *args) -> Any:
    """The shapes of `init(*args)`, where `args` are shapes and pytrees of settings.

    An array that `init` returns as it was given is the same object in both trees.
    """
    traced, shapes = jax.make_jaxpr(init, return_shape=True)(*args)
    given = dict(zip(traced.jaxpr.invars, jax.tree.leaves(args)))
    places, structure = jax.tree.flatten(sharding.tree(mesh, shapes))
    leaves = [
        given.get(x) if isinstance(x, Var) and x in given else Shape(y.shape, y.dtype, sharding=z)
        for x, y, z in zip(traced.jaxpr.outvars, jax.tree.leaves(shapes), places)
    ]
    return jax.tree.unflatten(structure, leaves)


def of_stage(name: str, programs: list[Program]) -> list[Program]:
    """The programs under the name of a stage, in place of their algorithm's."""
    return [x._replace(name=f"{name}: {x.name.split(': ', 1)[1]}") for x in programs]


def whole(mesh: jax.sharding.Mesh, arrays: Any) -> Any:
    """The shapes of small arrays, such as keys, which every device holds whole."""
    where = sharding.replicated(mesh)
    return jax.tree.map(lambda x: Shape(x.shape, x.dtype, sharding=where), arrays)


def demonstrations(mesh: jax.sharding.Mesh, batch: int, length: int) -> Demonstrations:
    """A batch of rows of `length` tokens."""
    ints, floats = Shape((batch, length), jnp.int32), Shape((batch, length), jnp.float32)
    return sharding.abstract_rows(mesh, Demonstrations(ints, ints, floats))


def comparisons(
    mesh: jax.sharding.Mesh, batch: int, length: int, responses: int = 2
) -> Comparisons:
    """A batch of prompts with K = `responses` of `length` tokens each, prompt included."""
    size = (batch, responses)
    ints, floats = Shape((*size, length), jnp.int32), Shape((*size, length), jnp.float32)
    each = Shape(size, jnp.float32)
    ranks, margin = Shape(size, jnp.int32), Shape((batch,), jnp.float32)
    found = Comparisons(ints, ints, floats, ranks, present=each, margin=margin, scores=each)
    return sharding.abstract_rows(mesh, found)


def steps(mesh: jax.sharding.Mesh, batch: int, length: int) -> Steps:
    """A batch of rows of `length` tokens whose steps are labelled."""
    ints, floats = Shape((batch, length), jnp.int32), Shape((batch, length), jnp.float32)
    return sharding.abstract_rows(mesh, Steps(ints, ints, floats, floats, ints))


def prompts(mesh: jax.sharding.Mesh, rows: int, length: int, reference: int = 0) -> Prompts:
    """A batch of `rows` prompts, padded to `length` tokens, and references to `reference`."""
    ints, index = Shape((rows, length), jnp.int32), Shape((rows,), jnp.int32)
    found = Prompts(ints, ints, index)
    if reference:
        found = found._replace(
            references=Shape((rows, reference), jnp.int32), reference_lengths=index
        )
    return sharding.abstract_rows(mesh, found)


def supervised(
    config: loop.Config,
    models: dict[str, Any],
    batch: Any,
    mesh: jax.sharding.Mesh,
    *,
    loss_fn: Callable,
    name: str,
    frozen: dict[str, Any] | None = None,
    init: Callable = loop.init_state,
    update: Callable = loop.update,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `loop.fit` runs with these arguments; `result` are the models by name.

    `resident` is what the experiment holds besides them.
    """
    sharding.check_rows(mesh, **config.row_counts())
    trainable, bases = partition.partition(models)
    given = {**bases, **(frozen or {})}
    trained, frozen = loop.arranged(mesh, trainable, given)
    with jax.set_mesh(mesh):
        first = (config, trained, make_optimizer)
        state, restored = (
            sharding.abstract(mesh, init, *first, static_argnums=2) for _ in range(2)
        )
        step = loop.supervised_program(loss_fn, mesh, state, frozen, update, make_optimizer)
    held = (models, given, frozen, resident)
    rows = _rows(batch) // config.micro_batches
    programs = [
        Program(f"{name}: step", step, (config, state, frozen, batch), held, rows),
        Program(f"{name}: restore", None, (), (held, state, restored), rows),
    ]
    return Stage(programs, loop.models_of(given, state), (held, state))


def over_rows(
    name: str,
    fn: Callable,
    static: tuple,
    args: tuple,
    batch: Any,
    mesh: jax.sharding.Mesh,
    resident: Any = (),
) -> Program:
    """What `epoch.sums` and `epoch.rows` run on every batch."""
    arguments = (*stacking.stack_all(mesh, args), batch)
    return Program(name, epoch.program(fn, static), arguments, (resident, args), _rows(batch))


def _rows(batch: Any) -> int:
    tokens = batch.tokens.shape
    return tokens[0] * (tokens[1] if len(tokens) == 3 else 1)


class Inputs(TypedDict, total=False):
    """What `online` takes besides a configuration and an algorithm; models are trees of shapes.

    `policy`, `max_prompt`, `ends` and `mesh` are required.
    """

    policy: Model
    max_prompt: int  # tokens that prompts are padded to
    max_reference: int  # ... and references, 0 where prompts have none
    ends: Ends  # the tokenizer's
    mesh: jax.sharding.Mesh
    scorer: Any
    critic: Model | None
    pretraining: Demonstrations | None  # a batch of the text that is mixed in
    score: Score | None  # None for a reward in Python
    make_optimizer: MakeOptimizer  # as `run` is given it
    resident: Any  # what the experiment holds besides


def online(
    config: algorithms.Config,
    algorithm: algorithms.Algorithm,
    *,
    policy: Model,
    max_prompt: int,
    ends: Ends,
    mesh: jax.sharding.Mesh,
    max_reference: int = 0,
    scorer: Any = None,
    critic: Model | None = None,
    pretraining: Demonstrations | None = None,
    score: Score | None = learned.score,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    resident: Any = (),
) -> Stage:
    """What `online.run` runs with these arguments; `result` is the trained policy."""
    sharding.check_rows(mesh, **config.row_counts())
    name, responses = algorithm.name, config.num_responses
    networks = derived(algorithm.networks, mesh, config, policy, critic)
    trainable, bases = partition.partition(networks)
    given = {"reference": policy, "scorer": scorer, **bases}
    trained, frozen = loop.arranged(mesh, trainable, given)
    batch = prompts(mesh, algorithms.prompt_rows(config, mesh), max_prompt, max_reference)
    algorithm = algorithm._replace(make_optimizer=make_optimizer)
    with jax.set_mesh(mesh):
        first = (algorithms.init_state, config, algorithm.memory, trained, make_optimizer)
        state, restored = (sharding.abstract(mesh, *first, static_argnums=3) for _ in range(2))
        programs = algorithms.compile_programs(algorithm, Drawing(ends), score, mesh, state, frozen)
        params = partition.combine(frozen, state.train.trainable)
        if programs.prepare is not None:
            prepared = jax.eval_shape(programs.prepare, config, state.memory, batch)
            batch = sharding.abstract_rows(mesh, prepared)
        drawing = (config, params, state.iteration, batch)
        drawn = sharding.abstract_rows(mesh, jax.eval_shape(programs.sample, *drawing))
        judging = (config, params, *drawn)
        rollout = sharding.abstract_rows(mesh, jax.eval_shape(programs.judge, *judging))
        rollout = rollout._replace(pretraining=pretraining)
        batch, _, _ = jax.eval_shape(
            functools.partial(algorithm.make_batch, config),
            params,
            *algorithms.batch_inputs(state, rollout),
        )
    held = (policy, scorer, critic, frozen, resident, state)
    slices, updating = config.micro_batches, (config, state, frozen, rollout)
    rows = getattr(batch, "tokens", rollout.tokens).shape[:-1]
    minibatch = math.prod(rows) // config.num_minibatches // slices
    trips = max_trips(config.sampling)
    return Stage(
        [
            Program(f"{name}: sample", programs.sample, drawing, held, responses, trips),
            Program(f"{name}: judge", programs.judge, judging, held, responses // slices),
            Program(f"{name}: update", programs.update, updating, held, minibatch, updates=True),
            Program(f"{name}: restore", None, (), (held, restored), responses),
        ],
        loop.models_of(given, algorithms.returned(state))["policy"],
        held,
    )


def max_trips(sampling: Sampling) -> int:
    """How often sampling asks, at most, whether every row has ended."""
    return -(-(sampling.max_new_tokens - 1) // BLOCK)
