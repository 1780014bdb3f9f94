"""An optimizer is a function to pass, and a loss may ask for a key."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from rlhf_jax import abstract, algorithms, online
from rlhf_jax.algorithms import grpo, sft
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints

GRPO = grpo.Config(
    num_iterations=2, batch_size=4, samples_per_prompt=2, sampling=Sampling(max_new_tokens=4)
)


def lion(optimizer, num_updates):
    """optax.lion with the library's schedule."""
    return optax.lion(training.schedule(optimizer, num_updates), weight_decay=0.1)


def signed(optimizer, num_updates):
    """Steps of one size, so that what was done can be read off the parameters."""
    return optax.chain(
        optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates)), optax.scale(-0.5)
    )


def test_a_supervised_run_takes_the_steps_of_the_optimizer_that_it_is_given():
    config = dataclasses.replace(tiny.SFT, num_steps=1)
    before = tiny.model()
    after = sft.run(
        config, before, tiny.demonstrations(), make_optimizer=signed, runtime=tiny.runtime()
    ).policy
    steps = jax.tree.map(lambda a, b: jnp.abs(a - b), after.weights, before.weights)
    for step in jax.tree.leaves(steps):
        assert set(jnp.unique(jnp.round(step, 5)).tolist()) <= {0.0, 0.5}
    assert float(jnp.max(jax.tree.leaves(steps)[0])) == 0.5


def half(key):
    """The share of eight numbers that are kept, each with probability 1/2."""
    return jnp.mean(jax.random.bernoulli(key, 0.5, (8,)).astype(jnp.float32))


def dropped(config, params, batch, key):
    """`sft.loss`, of which a part is left out at random."""
    value, metrics = sft.loss(config, params, batch)
    return value * half(key), metrics | {"kept": half(key)}


def dropped_grpo(config, params, batch, key):
    """`grpo.loss`, of which a part is left out at random."""
    value, metrics = grpo.loss(config, params, batch)
    return value * half(key), metrics | {"kept": half(key)}


def run_sft(folder, seed):
    config = dataclasses.replace(tiny.SFT, num_steps=4, save_every=2, seed=seed)
    with Checkpoints(folder) as checkpoints:
        return sft.run(
            config,
            tiny.model(),
            tiny.demonstrations(),
            loss_fn=dropped,
            make_optimizer=lion,
            runtime=tiny.runtime(checkpoints=checkpoints),
        )


def run_grpo(folder, seed):
    config = dataclasses.replace(
        GRPO, num_iterations=4, save_every=2, seed=seed, policy_optimizer=tiny.ADAM
    )
    with Checkpoints(folder) as checkpoints:
        return grpo.run(
            config,
            loss_fn=dropped_grpo,
            make_optimizer=lion,
            policy=tiny.model(),
            prompts=tiny.prompts(config.batch_size),
            tokenizer=tiny.TOKENIZER,
            score=tiny.share_below_128,
            runtime=tiny.runtime(checkpoints=checkpoints),
        )


@pytest.mark.parametrize("run", [run_sft, run_grpo])
def test_a_run_with_lion_and_a_loss_with_a_key_resumes_with_the_same_bits(run, tmp_path):
    whole = run(tmp_path / "whole", seed=0)
    kept = [line["kept"] for line in whole.history]
    assert len(set(kept)) > 1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "4")  # as if it had been interrupted after the second step
    again = run(tmp_path / "cut", seed=0)
    assert [line["kept"] for line in again.history] == kept[2:]
    assert tiny.equal(again.policy, whole.policy)
    assert tiny.distance(whole.policy, tiny.model()) > 0
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(whole.policy))
    with Checkpoints(tmp_path / "whole") as checkpoints:
        names = checkpoints.names()
    assert any(".mu." in name for name in names) and not any(".nu." in name for name in names)
    other = run(tmp_path / "other", seed=1)
    assert [line["kept"] for line in other.history] != kept


def test_a_second_run_with_an_optimizer_compiles_nothing(caplog):
    def run(rate):
        adam = dataclasses.replace(tiny.ADAM, learning_rate=rate)
        config = dataclasses.replace(tiny.SFT, num_steps=2, optimizer=adam)
        functions = {"make_optimizer": lion, "loss_fn": dropped}
        with jax.log_compiles(), caplog.at_level("WARNING"):
            caplog.clear()
            found = sft.run(
                config, tiny.model(), tiny.demonstrations(), **functions, runtime=tiny.runtime()
            )
        assert [line["lr"] for line in found.history] == [pytest.approx(rate)] * 2
        return [x.getMessage() for x in caplog.records if x.getMessage().startswith("Compiling")]

    assert any("_step" in line for line in run(1e-3))
    assert run(2e-3) == []


def test_a_plan_has_the_state_of_the_optimizer_that_it_is_given():
    mesh = tiny.mesh()
    policy = abstract.model(tiny.SHAPE, mesh)

    def moments(stage):
        paths = [
            jax.tree_util.keystr(x) for x, _ in jax.tree_util.tree_leaves_with_path(stage.held)
        ]
        return {name for name in (".mu", ".nu") for path in paths if name in path}

    tuned = functools.partial(sft.programs, tiny.SFT, policy, 9, mesh)
    assert moments(tuned()) == {".mu", ".nu"}
    assert moments(tuned(make_optimizer=lion)) == {".mu"}
    aligned = functools.partial(grpo.programs, GRPO, policy=policy, max_prompt=4, mesh=mesh)
    aligned = functools.partial(aligned, ends=tiny.TOKENIZER.ends, score=None)
    assert moments(aligned()) == {".mu", ".nu"}
    assert moments(aligned(make_optimizer=lion)) == {".mu"}


@pytest.mark.parametrize(
    "function, found",
    [
        (optax.lion, "lion is none"),
        (optax.sgd(0.1), "GradientTransformationExtraArgs is none"),
        (lambda optimizer, num_updates: optimizer, "<lambda> returned OptimizerConfig"),
    ],
)
def test_what_makes_no_optimizer_is_refused_in_one_line(function, found, no_shape_checks):
    with pytest.raises(ValueError, match=f"^make_optimizer is a function .* {found}; w.*") as error:
        sft.run(
            tiny.SFT,
            tiny.model(),
            tiny.demonstrations(),
            make_optimizer=function,
            runtime=tiny.runtime(),
        )
    assert "\n" not in str(error.value)


def test_every_run_and_its_programs_take_an_optimizer():
    found = set()
    for module in pkgutil.iter_modules(algorithms.__path__):
        functions = vars(importlib.import_module(f"{algorithms.__name__}.{module.name}"))
        for name, shared in (("run", online.Inputs), ("programs", abstract.Inputs)):
            if name in functions:
                parameters = inspect.signature(functions[name]).parameters
                given = parameters.keys() | (
                    shared.__annotations__.keys()
                    if {"inputs", "shapes"} & parameters.keys()
                    else ()
                )
                assert "make_optimizer" in given, f"{module.name}.{name}"
                found.add(module.name)
    assert {"sft", "reward_model", "dpo", "ppo", "grpo", "q_learning"} <= found


def test_a_key_is_only_given_to_a_loss_that_asks_for_one():
    def plain(config, params, batch):
        return 0.0, {}

    assert training.keyed(plain, 0, 1) is plain
    one, same, other = (
        training.keyed(functools.partial(dropped), seed, step).keywords["key"]
        for seed, step in ((0, 1), (0, jnp.int32(1)), (0, 2))
    )
    assert (jax.random.key_data(one) == jax.random.key_data(same)).all()
    assert (jax.random.key_data(one) != jax.random.key_data(other)).any()
