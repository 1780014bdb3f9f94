"""An optimizer is a function to pass, and a loss may ask for a key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from rlhf_jax.algorithms import sft
from rlhf_jax.training import state as training
from rlhf_jax.training.checkpoint import Checkpoints


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


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_run_with_lion_resumes_with_the_same_bits(algorithm, tmp_path):
    def run(steps, folder):
        with Checkpoints(folder) as checkpoints:
            if algorithm == "sft":
                config = dataclasses.replace(tiny.SFT, num_steps=steps, save_every=2)
                return sft.run(
                    config,
                    tiny.model(),
                    tiny.demonstrations(),
                    make_optimizer=lion,
                    runtime=tiny.runtime(checkpoints=checkpoints),
                )
            # The schedule must not depend on the length.
            flat = dataclasses.replace(tiny.ADAM, learning_rate=1e-3)
            config = dataclasses.replace(
                tiny.PPO, num_iterations=steps, policy_optimizer=flat, critic_optimizer=flat
            )
            return tiny.run_ppo(config, checkpoints=checkpoints, make_optimizer=lion)

    whole = run(4, tmp_path / "a")
    run(2, tmp_path / "b")
    again = run(4, tmp_path / "b")
    assert tiny.equal(again.policy, whole.policy)
    moments = jax.tree.leaves(whole.policy)
    assert all(bool(jnp.isfinite(x).all()) for x in moments)
    with Checkpoints(tmp_path / "a") as checkpoints:
        names = checkpoints.names()
    assert any(".mu." in name for name in names) and not any(".nu." in name for name in names)


def dropped(config, params, batch, key):
    """`sft.loss`, of which a part is left out at random."""
    value, metrics = sft.loss(config, params, batch)
    kept = jax.random.bernoulli(key, 0.5, (8,))
    return value * jnp.mean(kept), metrics | {"kept": jnp.mean(kept.astype(jnp.float32))}


def test_a_loss_gets_a_key_of_the_seed_and_the_update_and_resumes_with_the_same_bits(tmp_path):
    def run(steps, folder, seed=0):
        config = dataclasses.replace(tiny.SFT, num_steps=steps, save_every=2, seed=seed)
        with Checkpoints(folder) as checkpoints:
            return sft.run(
                config,
                tiny.model(),
                tiny.demonstrations(),
                loss_fn=dropped,
                runtime=tiny.runtime(checkpoints=checkpoints),
            )

    whole = run(4, tmp_path / "a")
    kept = [line["kept"] for line in whole.history]
    assert len(set(kept)) > 1
    run(2, tmp_path / "b")
    again = run(4, tmp_path / "b")
    assert [line["kept"] for line in again.history] == kept[2:]
    assert tiny.equal(again.policy, whole.policy)
    assert [line["kept"] for line in run(4, tmp_path / "c", seed=1).history] != kept


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
