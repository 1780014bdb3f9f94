"""PPO's presets on the worked numbers of the programs they follow; KL in the loss; mixes; EMA."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import losses, online
from rlhf_jax.algorithms import ppo, ppo_presets, ppo_variants, sft
from rlhf_jax.data import batches
from rlhf_jax.models import heads, transformer
from rlhf_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compile_cache")

# A transliteration of the advantages of TRL 1.10, OpenRLHF 0.11 and verl 0.10 in numpy, float64.
LOGPROBS = [(-1.0, -0.5, -0.2), (-0.7, -0.9, -0.3, -1.1, -0.4)]
REFERENCE = [(-1.2, -0.4, -0.3), (-0.6, -1.0, -0.5, -1.0, -0.9)]
VALUES = [(0.1, 0.2, 0.3, 0.4, 0.5), (0.0, -0.1, 0.2, 0.1, 0.3)]
AFTER_EOS = [
    (1.263919, 1.186388, 1.081749),
    (-0.486352, -0.372002, -0.850338, -0.732118, -1.091245),
]
AT_EOS = [
    (1.261381, 1.187476, 1.087127),
    (-0.491653, -0.379649, -0.848171, -0.732376, -1.084135),
]
BIASED = [
    (1.348473, 1.269465, 1.162187),
    (-0.525599, -0.405862, -0.906733, -0.782943, -1.158989),
]


def padded(rows, length=5):
    return jnp.asarray([[*row, *[0.0] * (length - len(row))] for row in rows], jnp.float32)


def worked(scores=(1.0, -0.5)):
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], jnp.float32)
    return tiny.some_rollout(2, 5)._replace(
        mask=mask,
        old_logprobs=padded(LOGPROBS),
        ref_logprobs=padded(REFERENCE),
        values=padded(VALUES),
        scores=jnp.asarray(scores, jnp.float32),
    )


def advantages_of(preset, rollout, **settings):
    config = preset.config(kl_coef=0.05, gae_lambda=0.95, **settings)
    batch, _, _ = preset.make_batch(config, {}, ppo.algorithm().memory, rollout)
    return batch


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        (ppo_presets.trl, AFTER_EOS),
        (ppo_presets.verl, AT_EOS),
        (ppo_presets.instructgpt, AT_EOS),
        (ppo_presets.openrlhf, BIASED),
    ],
    ids=["trl", "verl", "instructgpt", "openrlhf"],
)
def test_the_advantages_of_a_preset_are_the_printed_ones(preset, wanted):
    settings = {"batch_size": 8} if preset is ppo_presets.instructgpt else {}
    batch = advantages_of(preset, worked(), **settings)
    np.testing.assert_allclose(batch.advantages, padded(wanted), atol=2e-6)


def test_openrlhf_bounds_scores_and_the_kl_of_a_token():
    far = worked(scores=(1000.0, -0.5))
    near = worked(scores=(10.0, -0.5))
    one, two = (advantages_of(ppo_presets.openrlhf, x).advantages for x in (far, near))
    np.testing.assert_allclose(one, two, atol=1e-6)
    far = worked()._replace(ref_logprobs=padded(REFERENCE).at[0, 1].set(-500.0))
    near = worked()._replace(ref_logprobs=padded(REFERENCE).at[0, 1].set(-10.5))
    one, two = (advantages_of(ppo_presets.openrlhf, x).returns for x in (far, near))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_the_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    change = jnp.log(jnp.array([0.5, 1.1, 2.0, 5.0, 50.0]))
    plain, dual = (
        [
            losses.clipped_policy_loss(
                logprobs=change,
                old_logprobs=jnp.zeros(5),
                advantages=jnp.full(5, sign),
                clip_eps=0.2,
                dual_clip=bound,
            )
            for sign in (1.0, -1.0)
        ]
        for bound in (None, 3.0)
    )
    np.testing.assert_array_equal(dual[0], plain[0])
    np.testing.assert_allclose(plain[1], [0.8, 1.1, 2.0, 5.0, 50.0], rtol=1e-6)
    np.testing.assert_allclose(dual[1], [0.8, 1.1, 2.0, 3.0, 3.0], rtol=1e-6)
    with pytest.raises(ValueError, match="dual_clip=1.0 must be above 1"):
        ppo_presets.VerlConfig(dual_clip=1.0)


TINY = dict(
    num_iterations=2,
    batch_size=16,
    sampling=Sampling(max_new_tokens=8),
    policy_optimizer=tiny.ADAM,
    critic_optimizer=tiny.ADAM,
)


@pytest.mark.parametrize("name", [pytest.param("openrlhf", marks=pytest.mark.slow), "verl"])
def test_a_preset_runs(name):
    preset = getattr(ppo_presets, name)
    given = {**preset.functions}
    history = tiny.run_ppo(preset.config(**TINY), **given).history
    assert len(history) == 2 and all(np.isfinite(line["loss"]) for line in history)
    # The first update of an iteration starts at ratio 1, whatever is clipped.
    assert history[0]["check/first_approxkl"] < 1e-9


# ------------------------------------------------------------------------------- KL in the loss


@pytest.mark.parametrize("estimate", [losses.kl_k1, losses.kl_k2, losses.kl_k3])
def test_the_kl_is_added_to_the_loss(estimate):
    """At equal models it is 0; with the old log-probabilities off by known numbers it is known."""
    config = ppo_variants.KlConfig(**TINY, loss_kl_coef=0.5)
    policy = tiny.model()
    params = {"policy": policy, "critic": ppo.networks(config, policy, None)["critic"]}
    rows = tiny.prompts(16).batch(0)
    mask = jnp.zeros((16, 12)).at[:, 4:9].set(1.0)
    tokens = jnp.concatenate([rows.tokens, jnp.full((16, 8), 70)], axis=1)
    attend = jnp.concatenate([rows.attend, jnp.ones((16, 8), jnp.int32)], axis=1)
    logprobs = online.forward(config, params, ppo.Batch(tokens, attend, *[mask] * 6)).logprobs
    zeros = jnp.zeros(mask.shape)
    plain = ppo.Batch(tokens, attend, mask, mask, logprobs * mask, zeros, zeros, zeros)
    gap = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32) * mask
    batch = ppo_variants.ReferenceBatch(plain, (logprobs - gap) * mask)
    value, metrics = ppo_variants.kl_loss(config, params, batch, estimate=estimate)
    base, _ = ppo.loss(config, params, plain)
    kl = losses.masked_mean(estimate(logprobs=gap, ref_logprobs=zeros), mask)
    np.testing.assert_allclose(metrics["loss/kl_avg"], kl, rtol=1e-4)
    np.testing.assert_allclose(value, base + 0.5 * kl, rtol=1e-4)


@pytest.mark.slow
def test_a_heavy_kl_in_the_loss_keeps_the_policy_near_its_reference():
    slow = dataclasses.replace(tiny.ADAM, learning_rate=1e-3)

    def kl(coef):
        config = ppo_variants.KlConfig(
            **(TINY | {"num_iterations": 12, "policy_optimizer": slow}),
            kl_coef=0.0,
            loss_kl_coef=coef,
            num_epochs=2,
        )
        functions = {
            "make_batch": ppo_variants.reference_batch,
            "loss_fn": ppo_variants.kl_loss,
        }
        history = tiny.run_ppo(config, **functions).history
        return np.mean([line["objective/kl"] for line in history[-3:]])

    assert kl(5.0) < 0.5 * kl(0.0)


@pytest.mark.parametrize("estimate", [losses.kl_k2, losses.kl_k3])
def test_the_kl_of_the_reward_may_be_another_estimate(estimate):
    config = ppo.Config(kl_coef=0.05, whiten_advantages=False)
    rollout = worked()
    batch, _, metrics = ppo.make_batch(
        config, {}, ppo.algorithm().memory, rollout, kl_estimate=estimate
    )
    kl = estimate(logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs) * rollout.mask
    np.testing.assert_allclose(
        metrics["objective/non_score_reward"], -0.05 * kl.sum(1).mean(), rtol=1e-5
    )
    assert np.isfinite(batch.advantages).all()


# ---------------------------------------------------------------------------- a pretraining mix


def text(batch_size):
    rows = [{"text": f"{word} and {word[::-1]}."} for word in tiny.WORDS]
    examples = batches.demonstrations(rows, tiny.TOKENIZER, 12, 12)
    return batches.Loader(examples, batch_size, seed=1)


def mixed(config, loader, mesh="1x1x1"):
    functions = {"make_batch": ppo_variants.mixed_batch, "loss_fn": ppo_variants.mixed_loss}
    return tiny.run_ppo(config, mesh, **functions, pretraining=loader)


def test_the_mix_adds_the_cross_entropy_of_each_iterations_text():
    frozen = dataclasses.replace(tiny.ADAM, learning_rate=0.0)
    config = ppo_variants.PretrainingConfig(
        **(TINY | {"policy_optimizer": frozen, "critic_optimizer": frozen}),
        num_epochs=1,
        pretraining_coef=2.0,
    )
    plain = tiny.run_ppo(config).history
    found = mixed(config, text(32)).history
    loader = text(32)
    for i, (one, two) in enumerate(zip(plain, found)):
        batch = jax.tree.map(jnp.asarray, loader.batch(i))
        nats, _ = sft.loss(sft.Config(), {"policy": tiny.model()}, batch)
        np.testing.assert_allclose(two["loss/pretraining"], nats, rtol=1e-4)
        np.testing.assert_allclose(two["loss"], one["loss"] + 2.0 * nats, rtol=1e-4)


@pytest.mark.slow
def test_the_mix_lowers_the_cross_entropy_of_text_and_is_the_same_on_a_mesh():
    optimizer = dataclasses.replace(tiny.ADAM, eps=1e-4)
    config = ppo_variants.PretrainingConfig(
        **(TINY | {"num_iterations": 8, "policy_optimizer": optimizer})
    )
    history = mixed(config, text(16)).history
    assert history[-1]["loss/pretraining"] < history[0]["loss/pretraining"] - 0.3
    config = dataclasses.replace(config, num_iterations=1)
    other = mixed(config, text(16), "2x2x2").history
    np.testing.assert_allclose(other[0]["loss/pretraining"], history[0]["loss/pretraining"], 1e-2)


def test_a_mix_without_text_or_of_an_odd_size_is_refused():
    config = ppo_variants.PretrainingConfig(**TINY)
    with pytest.raises(ValueError, match="there is no text to mix in"):
        mixed(config, None)
    with pytest.raises(ValueError, match="24 rows of text per iteration are no multiple of its 16"):
        mixed(config, text(24))
    with pytest.raises(ValueError, match=r"make_batch is called as .*rollout, pretraining\), but"):
        tiny.run_ppo(ppo.Config(**TINY), pretraining=text(16))
    with pytest.raises(ValueError, match="pretraining= takes demonstrations"):
        mixed(config, tiny.prompts(16))


# ------------------------------------------------------------------------------------- averages


def test_the_averaged_policy_is_the_average_and_is_resumed(tmp_path):
    from rlhf_jax.training.checkpoint import Checkpoints

    config = ppo.Config(**(TINY | {"num_iterations": 3}), num_epochs=1, save_every=1)
    seen = []

    def policies(config, **how):
        seen.clear()
        found = tiny.run_ppo(
            dataclasses.replace(config, eval_every=1),
            evaluate=lambda done, policy: seen.append(jax.device_get(policy.weights)) or {},
            **how,
        )
        return [*seen], found

    plain, _ = policies(config)
    averaged, result = policies(dataclasses.replace(config, ema_decay=0.75))
    average = jax.device_get(tiny.model().weights)
    for one, two in zip(plain, averaged):
        average = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, average, one)
        for wanted, found in zip(jax.tree.leaves(average), jax.tree.leaves(two)):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert tiny.equal(result.policy.weights, averaged[-1])

    config = dataclasses.replace(config, ema_decay=0.75)
    with Checkpoints(tmp_path / "a") as checkpoints:
        tiny.run_ppo(dataclasses.replace(config, num_iterations=3), checkpoints=checkpoints)
    with Checkpoints(tmp_path / "a") as checkpoints:
        again = tiny.run_ppo(config, checkpoints=checkpoints)
    assert tiny.equal(again.policy.weights, averaged[-1])


# ------------------------------------------------------------------------------------ the exact KL


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2", "1x2x4"])
def test_the_exact_kl_and_its_gradient_are_those_of_the_definition(mesh):
    policy, reference = tiny.model(mesh, 0), tiny.model(mesh, 1)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 200, (8, 9)))
    attend, weights = jnp.ones((8, 9), jnp.int32), jnp.asarray(rng.normal(size=(8, 9)), jnp.float32)

    def logprobs(model):
        hidden = transformer.hidden_states(model, tokens, attend)
        return jax.nn.log_softmax(transformer.logits(model, hidden)[:, 2:-1] / 0.7)

    def plain(policy):
        own, other = logprobs(policy), logprobs(reference)
        return jnp.sum(weights[:, 3:] * jnp.sum(jnp.exp(own) * (own - other), axis=-1))

    def ours(policy):
        hiddens = tuple(transformer.hidden_states(x, tokens, attend) for x in (policy, reference))
        kl = heads.token_kl(policy, reference, hiddens, tokens, 0.7, 3)
        return jnp.sum(weights * kl), kl

    with jax.set_mesh(tiny.mesh(mesh)):
        (value, kl), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(policy)
    wanted, exact = jax.jit(jax.value_and_grad(plain))(tiny.model())
    np.testing.assert_allclose(value, wanted, rtol=1e-4)
    assert (kl[:, :3] == 0).all() and (kl[:, 3:] > 0).all()
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact)):
        np.testing.assert_allclose(one, two, atol=1e-4 * float(jnp.abs(two).max()) + 1e-6)


@pytest.mark.slow
def test_the_exact_kl_keeps_the_policy_near_its_reference():
    config = ppo_variants.KlConfig(
        **(TINY | {"num_iterations": 3}), kl_coef=0.0, loss_kl_coef=0.5, num_epochs=2
    )
    functions = {
        "make_batch": ppo_variants.reference_batch,
        "loss_fn": ppo_variants.exact_kl_loss,
    }
    history = tiny.run_ppo(config, **functions).history
    assert history[0]["loss/kl_avg"] >= 0 and history[-1]["loss/kl_avg"] > 0


def test_the_exact_kl_exchanges_heads_once_and_not_for_every_chunk(monkeypatch):
    """Four chunks, and no collective as large as a head in their loops."""
    chunking = losses.chunking
    monkeypatch.setattr(losses, "chunking", lambda *size: chunking(*size, 4 * 264 * 2))
    policy, reference = tiny.model("1x8x1", 0), tiny.model("1x8x1", 1)
    hidden = jnp.ones((8, 8, 32))

    def kl(policy):
        return jnp.sum(heads.token_kl(policy, reference, (hidden, hidden), jnp.ones((8, 8), int)))

    with jax.set_mesh(tiny.mesh("1x8x1")):
        module = jax.jit(jax.grad(kl)).lower(policy).compile().as_text()
    loops = re.findall(r"body=%([\w.-]+)", module)
    assert loops
    for name in loops:
        body = module[module.index(f"%{name} (") :].split("\n}")[0]
        assert not re.search(r"(all-gather|all-reduce|reduce-scatter|all-to-all)\(", body), body
