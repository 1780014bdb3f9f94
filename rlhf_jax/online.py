"""What every online algorithm shares: sample, judge, turn into a batch, update.

    prompts -> sample -> judge -> make_batch -> epochs of minibatches of the loss -> networks

An online algorithm is three pure functions, each of which a notebook can swap:

    networks(config, policy, critic) -> {"policy": Model, ...}          what is trained
    make_batch(config, params, memory, rollout) -> (batch, memory, metrics)
    loss(config, params, batch) -> (scalar, metrics)

`params` is every model by name: the trained ones, "reference" (the policy as it was given) and
"scorer" (the reward's parameters). `memory` is what an algorithm carries from one iteration to the
next besides its networks, () if nothing. The arrays of a batch share their leading axis, of which
each minibatch is a random part: rows, or groups [B, K, ...] that stay together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from rlhf_jax import on_policy, processes, sharding, shards
from rlhf_jax.config import explained_tracing
from rlhf_jax.data import loader
from rlhf_jax.data.batches import Demonstrations, Loader, Prompts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import flops, partition
from rlhf_jax.models.transformer import Model
from rlhf_jax.online_config import Config as Config
from rlhf_jax.online_config import GroupConfig as GroupConfig
from rlhf_jax.online_config import prompt_rows as prompt_rows
from rlhf_jax.rewards import host, learned
from rlhf_jax.sampling import decode, settings
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.sampling.decode import Choose, Processor, Samples
from rlhf_jax.sampling.rollout import Drawing, Outputs, Rollout, Score
from rlhf_jax.training import loop
from rlhf_jax.training import state as training
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Display
from rlhf_jax.training.state import MakeOptimizer

# The metrics that every online algorithm displays, for its `Display`.
HEADLINE = ("objective/scores", "objective/kl")
CURVES = {
    "objective/scores": "Reward (scores)",
    "objective/gold": "Gold score",
    "objective/kl": "KL to the reference, nats per response",
    "policy/entropy_avg": "Entropy, nats per token",
    "objective/length": "Response length, tokens",
}


class State(NamedTuple):
    """Everything that an iteration changes."""

    train: training.TrainState
    iteration: Int[Array, ""]
    memory: Any


class Algorithm(NamedTuple):
    """The functions of an online algorithm, as this module's docstring says, and its display.

    memory: what `make_batch` is given in the first iteration. any_sampler: the update is right for
    responses from any distribution, and not only for those of the policy. references: whether it
    learns from prompts with references, each of which then stands for the first of the K responses.
    prepare: (config, memory, prompts) -> prompts, before they are sampled from; it may set `heat`.
    `run` sets `make_optimizer`.
    """

    name: str
    display: Display
    networks: Callable[[Any, Model, Model | None], dict[str, Model]]
    make_batch: Callable
    loss: Callable
    memory: Any = ()
    any_sampler: bool = False
    references: bool = False
    prepare: Callable[[Any, Any, Prompts], Prompts] | None = None
    make_optimizer: MakeOptimizer = training.make_optimizer  # of each network


class Result(NamedTuple):
    """The trained policy and the metrics of each iteration run here."""

    policy: Model
    history: list[dict[str, Any]]


class Inputs(TypedDict, total=False):
    """What `run` of every online algorithm takes besides its Config.

    `policy`, `prompts`, `tokenizer` and a reward are required. The reward is a `scorer`, a `score`
    (with its parameters as `scorer`, if it has any), or a `reward`.
    """

    policy: Model  # where training starts; also the reference that KL is measured to
    prompts: Loader
    tokenizer: Tokenizer  # knows which tokens end a response, and decodes it
    scorer: Any  # the parameters of `score`: a reward model, unless `score` says otherwise
    score: Score  # a reward on the device; the default is `rewards.learned.score`
    reward: host.Reward  # a reward in Python, (prompts, responses, rows) -> scores
    pretraining: Loader  # text; `make_batch` gets the batch of each iteration as one argument more
    critic: Model  # starts the value network of an algorithm that has one
    choose: Choose  # how a token is drawn from its logits, with the probabilities of their softmax
    processors: tuple[Processor, ...]  # change the logits before a token is drawn
    observe: Callable[[Rollout], dict[str, float]]  # sees every rollout on the host
    # (iterations done, policy) -> figures, every `eval_every` iterations. The policy's arrays are
    # the run's own and gone after the call.
    evaluate: Callable[[int, Model], dict[str, float]]
    make_optimizer: MakeOptimizer  # the default is `training.state.make_optimizer`
    runtime: Runtime


# ------------------------------------------------------------------------ the pure functions


def policy_alone(config: Config, policy: Model, critic: Model | None) -> dict[str, Model]:
    """`networks` of an algorithm that trains nothing else. Raises ValueError for a critic."""
    if critic is not None:
        raise ValueError("this algorithm has no critic; leave critic= out, or use ppo.run")
    return {"policy": policy}


def iteration_key(config: Config, iteration, purpose: int):
    """Keys come from (seed, iteration, purpose) alone, so nothing random is ever saved."""
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return jax.random.split(key, 2)[purpose]


def sample(
    drawing: Drawing, config: Config, params: dict, iteration: Int[Array, ""], prompts: Prompts
) -> tuple[Samples, Array]:
    """The responses of an iteration: (samples [B, T], the prompts' numbers [B]).

    Those to a prompt follow each other, so [B] reshapes to [prompts, K]. `prompts` has each prompt
    in one row or in several (`prompt_rows`), among which its K samples are divided. Where prompts
    have references, these stand for the first of the K.
    """
    samples, index = rollouts.sample(
        params["policy"],
        prompts,
        iteration_key(config, iteration, 0),
        sampling=config.sampling,
        drawing=drawing,
        rows=config.num_responses // prompts.index.shape[0],
    )
    if prompts.references is not None:
        every = config.samples_per_prompt
        samples = rollouts.with_references(samples, prompts, drawing.ends, every)
    return samples, index


def judge(score: Score | None, config: Config, params: dict, samples: Samples, index) -> Rollout:
    """`rollout.judge` with the settings of a run."""
    return rollouts.judge(
        params,
        samples,
        index,
        sampling=config.sampling,
        score=score,
        micro_batches=config.micro_batches,
    )


def collect(
    drawing: Drawing, score: Score, config: Config, params: dict, iteration, prompts: Prompts
) -> Rollout:
    """`sample` and `judge` at once."""
    return judge(score, config, params, *sample(drawing, config, params, iteration, prompts))


def forward(config: Config, params: dict, batch: Any, *, entropy_gradient: bool = False) -> Outputs:
    """(logprobs, values, entropy) of the response tokens [B, T] under the networks as they are now.

    `batch` needs `tokens` and `attend`. The temperature is the one that sampled. Entropies have a
    gradient only with `entropy_gradient`.
    """
    return rollouts.forward(
        params,
        batch.tokens,
        batch.attend,
        sampling=config.sampling,
        micro_batches=config.micro_batches,
        entropy_gradient=entropy_gradient,
    )


def make_optimizer(
    config: Config, make: MakeOptimizer = training.make_optimizer
) -> optax.GradientTransformation:
    """One transformation per network, each with its own clipping; built inside compiled steps."""
    settings, count = config.optimizers().items(), config.num_updates
    parts = {name: training.made(make, optimizer, count) for name, optimizer in settings}
    return optax.partition(parts, lambda params: jax.tree.map_with_path(_network, params))


def _network(path, _):
    """The name of the network that a parameter belongs to."""
    return path[0].key


def _checked(config: Config, made: Any) -> tuple[Any, Any, dict[str, Array]]:
    """What `make_batch` returned.

    Raises ValueError unless it is (batch, memory, metrics) and minibatches divide the batch.
    """
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[2], dict)):
        raise ValueError(
            "make_batch must return (batch, memory, metrics), memory () if it has none and metrics "
            f"a dict, but it returned {type(made).__name__}"
        )
    size = jax.tree.leaves(made[0])[0].shape[0]
    if size % config.num_minibatches:
        raise ValueError(
            f"make_batch returned {size} rows or groups, which num_minibatches="
            f"{config.num_minibatches} does not divide"
        )
    return made


def init_state(
    config: Config, memory: Any, trainable: dict, make: MakeOptimizer = training.make_optimizer
) -> State:
    """State before the first iteration."""
    memory = jax.tree.map(jnp.copy, memory)
    train = training.init_state(make_optimizer(config, make), trainable)
    if config.ema_decay is not None:
        train = training.averaging(train, "policy")
    return State(train, jnp.int32(0), memory)


def update(
    make_batch: Callable,
    loss_fn: Callable,
    config: Config,
    state: State,
    frozen: dict,
    rollout: Rollout,
    make: MakeOptimizer = training.make_optimizer,
) -> tuple[State, dict[str, Array]]:
    """All epochs of one iteration as one program: (state, metrics).

    Scans over epochs, and in each over minibatches, with `gradient_step`; rows are shuffled anew
    for each epoch. Metrics of the loss are means over the updates. A non-finite update changes
    nothing.
    """
    params = partition.combine(frozen, state.train.trainable)
    with explained_tracing():
        made = make_batch(config, params, *batch_inputs(state, rollout))
    batch, memory, metrics = _checked(config, made)
    optimizer, size = make_optimizer(config, make), jax.tree.leaves(batch)[0].shape[0]

    def update_once(train, rows):
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        minibatch = shards.constrain_rows(minibatch, name="rows or groups per minibatch")
        loss_of = functools.partial(training.keyed(loss_fn, config.seed, train.step), config)
        skip = config.on_bad_update == "skip"
        return training.gradient_step(loss_of, optimizer, train, frozen, minibatch, skip=skip)

    def epoch(train, key):
        order = jax.random.permutation(key, size).reshape(config.num_minibatches, -1)
        return jax.lax.scan(update_once, train, order)

    keys = jax.random.split(iteration_key(config, state.iteration, 1), config.num_epochs)
    rate = training.schedule(config.policy_optimizer, config.num_updates)(state.train.step)
    train, steps = jax.lax.scan(epoch, state.train, keys)
    metrics = on_policy.measurements(config, rollout) | metrics
    metrics |= {name: jnp.mean(values) for name, values in steps.items()}
    if "policy/approxkl_avg" in steps:
        metrics["check/first_approxkl"] = steps["policy/approxkl_avg"][0, 0]
    metrics |= {
        "bad_step": train.bad_step,
        "lr": rate,
        "episode": (state.iteration + 1) * rollout.tokens.shape[0],
        "model_flops": flops.of_iteration(
            state.train.trainable,
            frozen,
            sampled=rollout.attend,
            trained=getattr(batch, "attend", rollout.attend),
            start=rollout.tokens.shape[1] - config.sampling.max_new_tokens,
            samples=config.samples_per_prompt,
            num_epochs=config.num_epochs,
        ),
    }
    new = State(training.averaged(train, config.ema_decay), state.iteration + 1, memory)
    old = state._replace(train=train)  # gradient_step has kept the last good parameters
    good = train.bad_step < 0
    return jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old), metrics


def batch_inputs(state: State, rollout: Rollout) -> tuple:
    """What `make_batch` is given after the parameters: memory, rollout, text if there is any."""
    text = () if rollout.pretraining is None else (rollout.pretraining,)
    return state.memory, rollout._replace(pretraining=None), *text


def returned(state: State) -> training.TrainState:
    """The train state with the policy that a run returns: see `Config.ema_decay`."""
    return state.train._replace(trainable=state.train.trainable | (state.train.average or {}))


# --------------------------------------------------------------------------------------- the run


class Programs(NamedTuple):
    """The compiled programs of an iteration; each takes the configuration first.

    sample(config, params, iteration, prompts), judge(config, params, samples, index),
    update(config, state, frozen, rollout), which donates the state, and
    prepare(config, memory, prompts), None where an algorithm has none.
    """

    sample: Callable
    judge: Callable
    update: Callable
    prepare: Callable | None


def compile_programs(
    algorithm: Algorithm, drawing: Drawing, score: Score | None, mesh, state, frozen
) -> Programs:
    """`sample`, `judge` and `update`, sharded over the mesh.

    `state` and `frozen` may be shapes. The frozen models are never copied.
    """
    states, constants = sharding.tree(mesh, state), sharding.tree(mesh, frozen)
    params = partition.combine(constants, states.train.trainable)
    rows, replicated = sharding.rows(mesh), sharding.replicated(mesh)
    prepare = algorithm.prepare and loop.compiled(
        algorithm.prepare, (), in_shardings=(replicated, replicated, rows), out_shardings=rows
    )
    return Programs(
        prepare=prepare,
        sample=loop.compiled(
            sample,
            (drawing,),
            in_shardings=(replicated, params, replicated, rows),
            out_shardings=rows,
        ),
        judge=loop.compiled(
            judge, (score,), in_shardings=(replicated, params, rows, rows), out_shardings=rows
        ),
        update=loop.compiled(
            update,
            (algorithm.make_batch, algorithm.loss),
            options=(("make", algorithm.make_optimizer),),
            in_shardings=(replicated, states, constants, rows),
            out_shardings=(states, replicated),
            donate=(1,),
        ),
    )


def run(
    config: Config,
    algorithm: Algorithm,
    *,
    policy: Model,
    prompts: Loader,
    tokenizer: Tokenizer,
    scorer: Any = None,
    score: Score | None = None,
    reward: host.Reward | None = None,
    pretraining: Loader | None = None,
    critic: Model | None = None,
    choose: Choose = decode.categorical,
    processors: tuple[Processor, ...] = (),
    observe: Callable[[Rollout], dict[str, float]] | None = None,
    evaluate: Callable[[int, Model], dict[str, float]] | None = None,
    make_optimizer: MakeOptimizer = training.make_optimizer,
    runtime: Runtime | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains the algorithm's networks on the reward of what the policy writes: (params, history).

    `Inputs` says what the arguments are. Continues from the newest checkpoint. Raises ValueError
    for inputs that do not fit, TrainingStopped for a failed check.
    """
    mesh = (runtime := runtime or Runtime()).mesh
    score = _check_inputs(algorithm, config, mesh, policy, prompts, scorer, score, reward)
    on_policy.check_sampler(algorithm.name, config, processors, choose, algorithm.any_sampler)
    loop.check_evaluation(config.eval_every, evaluate)
    drawing = Drawing(tokenizer.ends, choose, processors)
    batches = _in_rows(algorithm, config, mesh, prompts, pretraining)
    algorithm = algorithm._replace(make_optimizer=make_optimizer)
    with jax.set_mesh(mesh):
        trainable, bases = partition.partition(algorithm.networks(config, policy, critic))
        given = sharding.place(mesh, {"reference": policy, "scorer": scorer, **bases})
        trained, frozen = loop.arranged(mesh, sharding.place(mesh, trainable), given)
        first = (config, algorithm.memory, trained, make_optimizer)
        state = sharding.initialise(mesh, init_state, *first, static_argnums=3)
        del trained, first  # the state holds a copy
        programs = compile_programs(algorithm, drawing, score, mesh, state, frozen)
        if runtime.together is not None:
            programs = Programs(*(x and runtime.together.of(x) for x in programs))
        host_scores = reward and host.for_run(
            reward, tokenizer, prompts.examples, config.reward_timeout
        )

        def figures(done: int, state: State) -> dict[str, float]:
            return evaluate(done, loop.models_of(given, returned(state))["policy"])

        state, history = loop.train(
            functools.partial(_iterate, config, programs, mesh, frozen, host_scores),
            state,
            batches,
            loop.plan_of(config, algorithm.name, algorithm.display, config.num_iterations),
            runtime,
            check=on_policy.checks(config, policy.config.dtype),
            observe=observe,
            evaluate=figures,
        )
    return loop.models_of(given, returned(state)), history


def _check_inputs(algorithm, config, mesh, policy, prompts, scorer, score, reward) -> Score | None:
    """The reward on the device, None if it is in Python. Raises ValueError if inputs do not fit."""
    loader.expect(prompts, f"{algorithm.name}.run", Prompts)
    longest, reference = config.sampling.max_new_tokens, prompts.examples.shape.reference
    if reference and not algorithm.references:
        raise ValueError(
            f"{algorithm.name} has no use for references; read the prompts without max_reference="
        )
    if reference > longest:
        raise ValueError(
            f"references of {reference} tokens are longer than max_new_tokens={longest}; read the "
            f"prompts with max_reference={longest}"
        )
    settings.check_vocabulary(config.sampling, policy.config.vocab_size)
    loop.check_batch_size(config.batch_size, prompts)
    sharding.check_rows(mesh, **config.row_counts())
    if reward is None:
        if score is None:
            learned.check(scorer)
            score = learned.score
        host.check_arguments(score, "params", "tokens", "attend", "mask")
        return score
    if score is not None or scorer is not None:
        raise ValueError("give a reward in Python, or a score on the device with its scorer")
    host.check_arguments(reward, "prompts", "responses", "rows")
    return None


def _check_text(make_batch: Callable, mesh, text: Loader) -> None:
    """Raises ValueError for text that is none, that nothing would read, or that hosts differ in."""
    loader.expect(text, "pretraining=", Demonstrations)
    names = ("config", "params", "memory", "rollout", "pretraining")
    host.check_arguments(make_batch, *names)
    sharding.check_rows(mesh, pretraining=text.batch_size)
    processes.agree("the text (pretraining=)", text.examples.fingerprint)


def _in_rows(algorithm, config, mesh, prompts: Loader, text: Loader | None) -> loader.Together:
    """The rows of prompts and text that this process reads; see `prompt_rows`."""
    count = prompt_rows(config, mesh)
    places = np.arange(count) // (count // config.batch_size)
    prompts = prompts.reading(places[sharding.process_rows(mesh, count)])
    if text is not None:
        _check_text(algorithm.make_batch, mesh, text)
        text = text.reading(sharding.process_rows(mesh, text.batch_size))
    return loader.Together((prompts, text))


def _iterate(
    config: Config,
    programs: Programs,
    mesh: jax.sharding.Mesh,
    frozen: dict,
    host_scores: Callable | None,
    state: State,
    batch: tuple[Prompts, Demonstrations | None],
) -> tuple[State, loop.Outcome]:
    """One iteration: enqueues its three programs, and runs a reward in Python between them."""
    params = partition.combine(frozen, state.train.trainable)
    prompts, text = sharding.put_rows(mesh, batch)
    if programs.prepare is not None:
        prompts = programs.prepare(config, state.memory, prompts)
    samples, index = programs.sample(config, params, state.iteration, prompts)
    rollout = programs.judge(config, params, samples, index)._replace(pretraining=text)
    parts = {}
    if host_scores is not None:  # while the device runs `judge`
        scores, parts = jax.tree.map(
            lambda x: sharding.put_own_rows(mesh, x, config.num_responses),
            host_scores(samples, index, rollout.ref_logprobs),
        )
        rollout = rollout._replace(scores=scores)
    state, metrics = programs.update(config, state, frozen, rollout)
    if parts:
        metrics |= host.report(mesh, parts)
    return state, loop.Outcome(metrics, metrics["num_tokens"], rollout)
