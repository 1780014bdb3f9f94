"""A2C: its gradient is PPO's in the first update, its entropy bonus, what it refuses."""

import dataclasses

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import losses, online
from rlhf_jax.algorithms import actor_critic, ppo
from rlhf_jax.models import heads, transformer
from rlhf_jax.sampling import Drawing

pytestmark = pytest.mark.usefixtures("compile_cache")

SETTINGS = {
    "num_iterations": 2,
    "batch_size": 16,
    "num_epochs": 1,
    "sampling": tiny.PPO.sampling,
    "policy_optimizer": tiny.ADAM,
    "critic_optimizer": tiny.ADAM,
    "whiten_advantages": False,
}


def a_batch(config):
    """What both losses read, of a policy and critic that are not related."""
    policy = tiny.model()
    critic = heads.init_scorer(policy, jax.random.key(7))
    params = {"policy": policy, "reference": policy, "critic": critic, "scorer": None}
    prompts = jax.tree.map(jnp.asarray, tiny.prompts(16).batch(0))

    def score(params, tokens, attend, mask):
        return tiny.share_below_128(params, tokens, attend, mask)

    rollout = online.collect(
        Drawing(tiny.TOKENIZER.ends), score, config, params, jnp.int32(0), prompts
    )
    batch, _, _ = ppo.make_batch(config, params, ppo.algorithm().memory, rollout)
    return params, batch


def gradient(loss, config, params, batch):
    trained = {name: params[name] for name in ("policy", "critic")}
    return jax.jit(jax.grad(lambda trained: loss(config, {**params, **trained}, batch)[0]))(trained)


def test_the_first_update_has_the_gradient_of_ppo():
    params, batch = a_batch(actor_critic.Config(**SETTINGS))
    found = gradient(actor_critic.loss, actor_critic.Config(**SETTINGS), params, batch)
    wanted = gradient(ppo.loss, ppo.Config(**SETTINGS), params, batch)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, two, atol=2e-6)
    assert sum(np.abs(x).max() for x in jax.tree.leaves(wanted["critic"])) > 1e-3


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 4)], ids=str)
def test_the_entropy_has_the_gradient_of_its_definition(softcap, sizes):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 5, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 24, (8, 5)))
    weights = jnp.asarray(rng.normal(size=(2, 8, 5)), jnp.float32)
    shape = dataclasses.replace(tiny.SHAPE, vocab_size=24, d_model=8, logit_softcap=softcap)

    def plain(hidden, head, temperature):
        logits = hidden[:, :-1] @ head
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        logprobs = jax.nn.log_softmax(logits / temperature)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(weights[0, :, 1:] * entropy + weights[1, :, 1:] * chosen)

    def ours(hidden, head, temperature):
        model = transformer.Model(shape, {"head": {"kernel": head}})
        logprobs, entropy = heads.token_logprobs(
            model, hidden, tokens, temperature, entropy_gradient=True
        )
        return jnp.sum(weights[0] * entropy + weights[1] * logprobs)

    given = (hidden, head, jnp.float32(0.7))
    wanted = jax.grad(plain, argnums=(0, 1, 2))(*given)
    with jax.set_mesh(tiny.sharding.make_mesh(*(sizes or (1, 1, 1)))):
        found = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*given)
    for one, two in zip(found, wanted):
        # That of the temperature is -57, in which 2e-5 would be five units in the last place.
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=2e-5)


def test_the_entropy_bonus_is_subtracted_from_the_loss_and_moves_the_policy():
    config = actor_critic.Config(**SETTINGS)
    params, batch = a_batch(config)
    plain, metrics = actor_critic.loss(config, params, batch)
    config = dataclasses.replace(config, entropy_coef=0.5)
    value, _ = actor_critic.loss(config, params, batch)
    np.testing.assert_allclose(plain - value, 0.5 * metrics["policy/entropy_avg"], rtol=1e-4)
    raised = dataclasses.replace(config, entropy_coef=3.0, num_iterations=8)
    histories = [
        actor_critic.run(
            one,
            policy=tiny.model(),
            prompts=tiny.prompts(16),
            tokenizer=tiny.TOKENIZER,
            score=tiny.share_below_128,
            runtime=tiny.runtime(),
        ).history
        for one in (raised, dataclasses.replace(raised, entropy_coef=0.0))
    ]
    last = [history[-1]["policy/entropy_avg"] for history in histories]
    assert last[0] > last[1] + 0.1


def test_without_a_bonus_the_entropy_is_a_measurement():
    """Its gradient is computed only where it is asked for."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    head, tokens = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), jnp.zeros((2, 3), jnp.int32)
    found = jax.grad(lambda x: losses.chunked_token_logprobs(x, head, tokens)[1].sum())(hidden)
    np.testing.assert_array_equal(found, 0)


def test_the_policy_gradient_is_unbiased_without_a_critic():
    """Values of a fresh critic are 0, so with discount and lambda 1 the loss is REINFORCE."""
    config = actor_critic.Config(
        batch_size=4,
        sampling=enumeration.SAMPLING,
        gae_lambda=1.0,
        kl_coef=0.0,
        value_coef=0.0,
    )

    def sum_over_tokens(config, params, batch):
        # `loss` divides by the tokens of the minibatch, whose number is random.
        value, metrics = actor_critic.loss(config, params, batch)
        return value * jnp.sum(batch.mask) / config.batch_size, metrics

    def networks(config, policy, critic):
        return ppo.networks(config, policy, critic)

    algorithm = actor_critic.algorithm(
        make_batch=lambda config, params, memory, rollout: ppo.make_batch(
            config, params, memory, rollout._replace(values=jnp.zeros(rollout.mask.shape))
        ),
        loss_fn=lambda config, params, batch: sum_over_tokens(
            config,
            {**params, "critic": transformer.with_score_head(params["policy"], None)},
            batch,
        ),
    )
    found = enumeration.estimates(config, algorithm, 3000)

    def expected(policy):
        scores = enumeration.score(None, *enumeration.rows())
        return -jnp.sum(jnp.exp(enumeration.logprobs(policy).sum(1)) * scores)

    assert np.abs(enumeration.z_scores(found, enumeration.exact(expected))).max() < 3


def test_several_updates_are_refused_unless_they_are_asked_for():
    with pytest.raises(ValueError, match="= 4 updates per iteration, .* set reuse_responses=True"):
        actor_critic.Config(num_epochs=2, num_minibatches=2)
    assert actor_critic.Config(num_epochs=2, reuse_responses=True).num_epochs == 2


def test_a_run_is_the_same_on_a_mesh_of_eight():
    optimizer = dataclasses.replace(tiny.ADAM, eps=1e-4)
    config = actor_critic.Config(
        **(SETTINGS | {"policy_optimizer": optimizer, "critic_optimizer": optimizer}),
        entropy_coef=0.1,
    )
    histories = []
    for mesh in ("1x1x1", "2x2x2"):
        policy = tiny.model(mesh)
        scorer = heads.init_scorer(policy, jax.random.key(7))
        histories.append(
            actor_critic.run(
                config,
                policy=policy,
                critic=scorer,
                scorer=scorer,
                prompts=tiny.prompts(16),
                tokenizer=tiny.TOKENIZER,
                runtime=tiny.runtime(mesh),
            ).history
        )
    for one, two in zip(*histories):
        for name in ("loss", "objective/scores", "loss/value_avg", "policy/entropy_avg"):
            np.testing.assert_allclose(one[name], two[name], rtol=5e-4, atol=1e-5, err_msg=name)
