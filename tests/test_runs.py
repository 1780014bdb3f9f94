"""Whole runs: the same on every mesh and micro-batch split, and after any interruption."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import distance, equal, run_ppo

from rlhf_jax import on_policy, online
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.models import heads
from rlhf_jax.rewards import learned
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.state import TrainingStopped

pytestmark = pytest.mark.usefixtures("compile_cache")


def at_temperature(config, temperature):
    sampling = dataclasses.replace(config.sampling, temperature=temperature)
    return dataclasses.replace(config, sampling=sampling)


@pytest.fixture(scope="module")
def reference():
    """Two PPO iterations on one device, with what each rollout held: some response ends by EOS."""
    config = dataclasses.replace(tiny.PPO, num_iterations=2, seed=2)
    seen = []
    result = run_ppo(config, observe=lambda rollout: seen.append(rollout) or {})
    assert any(h["val/num_eos_tokens"] for h in result.history)
    return config, result, seen


SLOW = pytest.mark.slow
SOME = [*(pytest.param(x, marks=SLOW) for x in ("8x1x1", "1x8x1")), "2x2x2", "1x2x4"]


@pytest.mark.parametrize("mesh", SOME)
def test_two_ppo_iterations_are_the_same_on_every_mesh(reference, mesh):
    config, expected, rollouts = reference
    seen = []
    result = run_ppo(config, mesh, observe=lambda rollout: seen.append(rollout) or {})
    start = tiny.model()
    for rollout, other in zip(rollouts, seen):
        np.testing.assert_array_equal(rollout.tokens, other.tokens)
    for name in ("loss", "grad_norm", "objective/kl", "loss/value_avg"):
        values = [h[name] for h in expected.history]
        np.testing.assert_allclose([h[name] for h in result.history], values, rtol=1e-4, atol=1e-6)
    moved = distance(expected.policy, start)
    assert moved > 0.1
    assert distance(result.policy, expected.policy) < 1e-3 * moved
    assert distance(result.critic, expected.critic) < 1e-3 * moved


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=SLOW), 4])
def test_micro_batches_do_not_change_a_ppo_run(reference, micro_batches):
    config, expected, rollouts = reference
    config = dataclasses.replace(config, micro_batches=micro_batches)
    seen = []
    result = run_ppo(config, observe=lambda rollout: seen.append(rollout) or {})
    np.testing.assert_array_equal(rollouts[1].tokens, seen[1].tokens)
    moved = distance(expected.policy, tiny.model())
    assert distance(result.policy, expected.policy) < 1e-3 * moved


@pytest.mark.parametrize("mesh", [pytest.param("8x1x1", marks=SLOW), "2x2x2"])
def test_sft_and_reward_model_runs_are_the_same_on_every_mesh(mesh):
    for run, config, data, pick in (
        (sft.run, tiny.SFT, tiny.demonstrations, lambda r: r.policy),
        (reward_model.run, tiny.REWARD_MODEL, tiny.comparisons, lambda r: r.scorer),
    ):
        alone = run(config, tiny.model(), data(), runtime=tiny.runtime())
        split = run(config, tiny.model(mesh), data(), runtime=tiny.runtime(mesh))
        np.testing.assert_allclose(
            [h["loss"] for h in split.history], [h["loss"] for h in alone.history], rtol=1e-5
        )
        assert distance(pick(split), pick(alone)) < 1e-3 * len(jax.tree.leaves(pick(alone)))


def test_the_critic_and_the_policy_are_different_networks_after_one_iteration():
    """N+ details, item 28: equal at first, apart after the first update."""
    config = dataclasses.replace(tiny.PPO, num_iterations=1)
    policy = tiny.model()
    scorer = heads.init_scorer(policy, jax.random.key(7))
    result = run_ppo(config, scorer=scorer, critic=scorer)
    assert not equal(result.critic.weights["layer_0"], scorer.weights["layer_0"])
    assert not equal(result.critic.weights["layer_0"], result.policy.weights["layer_0"])


def test_a_shared_critic_is_a_head_on_the_policy_and_starts_at_zero():
    config = dataclasses.replace(tiny.PPO, num_iterations=1, shared_critic=True)
    trained = ppo.networks(config, tiny.model(), None)
    assert list(trained) == ["policy"]
    assert float(jnp.abs(trained["policy"].weights["score"]["kernel"]).max()) == 0
    result = run_ppo(config, critic=None)
    assert result.critic is None
    assert float(jnp.abs(result.policy.weights["score"]["kernel"]).max()) > 0


@pytest.mark.parametrize(
    "field", ["score_at", "whiten_rewards", "normalise_scores", "kl_target", "missing_eos_penalty"]
)
def test_every_choice_changes_the_run_and_keeps_it_finite(reference, field):
    other = {
        "score_at": "after_eos",
        "whiten_rewards": True,
        "normalise_scores": True,
        "kl_target": 0.001,
        "missing_eos_penalty": 1.0,
    }
    config, expected, _ = reference
    result = run_ppo(dataclasses.replace(config, **{field: other[field]}))
    assert all(np.isfinite(h["loss"]) for h in result.history)
    assert distance(result.policy, expected.policy) + distance(result.critic, expected.critic) > 0
    if field == "kl_target":
        # KL 0 in iteration 0 is below any target: the clipped error is -0.2.
        first, second = (h["objective/kl_coef"] for h in result.history)
        np.testing.assert_allclose(second, first * (1 - 0.2 * 16 / 10000), rtol=1e-6)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_a_run_interrupted_anywhere_ends_with_the_same_bits(stage, tmp_path):
    """Every iteration: the checkpoints of an uninterrupted run are cut back to it and continued."""

    def run(folder):
        with Checkpoints(folder, keep=10) as checkpoints:
            if stage == "ppo":
                config = dataclasses.replace(tiny.PPO, normalise_scores=True, kl_target=0.01)
                result = run_ppo(config, checkpoints=checkpoints)
                return result.policy, result.critic, result.history
            if stage == "sft":
                result = sft.run(
                    dataclasses.replace(tiny.SFT, save_every=1),
                    tiny.model(),
                    tiny.demonstrations(),
                    runtime=tiny.runtime(checkpoints=checkpoints),
                )
                return result.policy, None, result.history
            result = reward_model.run(
                dataclasses.replace(tiny.REWARD_MODEL, save_every=1),
                tiny.model(),
                tiny.comparisons(),
                runtime=tiny.runtime(checkpoints=checkpoints),
            )
            return result.scorer, None, result.history

    whole, critic, history = run(tmp_path / "whole")
    steps = len(history)
    assert steps in (4, 6)
    for cut in (1, steps // 2, steps - 1, steps):
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut{cut}")
        for later in range(cut + 1, steps + 1):
            shutil.rmtree(tmp_path / f"cut{cut}" / str(later))
        again, other_critic, rest = run(tmp_path / f"cut{cut}")
        assert len(rest) == steps - cut
        assert equal(again, whole) and equal(other_critic, critic)
        for line, expected in zip(rest, history[cut:]):
            assert tiny.untimed(line) == tiny.untimed(expected)


def test_a_reward_that_turns_nan_stops_at_its_iteration_and_keeps_the_last_good_checkpoint(
    tmp_path,
):
    def turns_nan(params, tokens, attend, mask):
        # Parameters of the reward are data, so the fault can be switched on between runs.
        return tiny.share_below_128(params, tokens, attend, mask) + params["poison"]

    with Checkpoints(tmp_path) as checkpoints:
        config = dataclasses.replace(tiny.PPO, num_iterations=2)
        run_ppo(
            config,
            score=turns_nan,
            scorer={"poison": jnp.zeros(())},
            critic=None,
            checkpoints=checkpoints,
        )
        with pytest.raises(TrainingStopped, match="iteration 2: 16 scores of the reward are NaN"):
            run_ppo(
                tiny.PPO,
                score=turns_nan,
                scorer={"poison": jnp.array(jnp.nan)},
                critic=None,
                checkpoints=checkpoints,
            )
        assert checkpoints.latest() == 2


def test_a_reference_that_is_not_the_policy_stops_the_run():
    metrics = {
        "bad_step": -1.0,
        "check/bad_scores": 0.0,
        "check/logprob_gap": 1e-6,
        "check/sampler_gap": 0.0,
        "check/reference_gap": 0.3,
    }
    with pytest.raises(TrainingStopped, match="iteration 0: the policy is not the reference"):
        on_policy.check(tiny.PPO, "float32", 0, metrics)
    on_policy.check(tiny.PPO, "float32", 1, metrics)


def test_a_sampler_that_disagrees_with_the_loss_stops_the_run(monkeypatch):
    """Sampling at another temperature than the loss scores at is the field's commonest fault."""
    real = online.sample

    def hotter(drawing, config, *rest):
        return real(drawing, at_temperature(config, 1.5), *rest)

    monkeypatch.setattr(online, "sample", hotter)
    with pytest.raises(TrainingStopped, match="iteration 0: sampler and loss disagree"):
        run_ppo()


def test_temperature_is_the_same_for_sampler_policy_and_reference():
    """At temperature 0.7 the KL of iteration 0 is 0 and the ratio 1, as at 1."""
    config = at_temperature(dataclasses.replace(tiny.PPO, num_iterations=1), 0.7)
    (line,) = run_ppo(config).history
    assert abs(line["objective/kl"]) < 1e-4 and line["check/logprob_gap"] < 1e-5


def test_bfloat16_takes_old_logprobs_from_the_scorer_and_bounds_the_sampler_gap():
    shape = dataclasses.replace(tiny.SHAPE, dtype="bfloat16")
    policy = dataclasses.replace(tiny.model(), config=shape)
    scorer = heads.init_scorer(policy, jax.random.key(7))
    result = ppo.run(
        dataclasses.replace(tiny.PPO, num_iterations=2),
        policy=policy,
        score=learned.score,
        scorer=scorer,
        prompts=tiny.prompts(16),
        tokenizer=tiny.TOKENIZER,
        runtime=tiny.runtime(),
    )
    for line in result.history:
        assert line["check/sampler_gap"] < 0.05
        assert line["check/logprob_gap"] < 0.05
    figures = {name: float(value) for name, value in result.history[1].items()}
    for fault in ({"check/sampler_gap": 0.06}, {"check/logprob_gap": 0.6}):
        with pytest.raises(TrainingStopped, match="sampler and loss disagree"):
            on_policy.check(tiny.PPO, "bfloat16", 3, figures | fault)


def test_different_seeds_differ_and_equal_seeds_are_equal():
    config = dataclasses.replace(tiny.PPO, num_iterations=1)
    first, again, other = (
        run_ppo(dataclasses.replace(config, seed=seed)).policy for seed in (0, 0, 1)
    )
    assert equal(first, again) and not equal(first, other)


def test_sizes_that_do_not_divide_are_refused_by_name():
    for changes, message in (
        ({"num_minibatches": 3}, "16 responses .* are not a multiple of num_minibatches=3"),
        ({"micro_batches": 3}, "a minibatch of 8 .* is not a multiple of micro_batches=3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_ppo(dataclasses.replace(tiny.PPO, **changes))
    with pytest.raises(ValueError, match="batch_size=12 does not divide over data x fsdp = 8"):
        config = dataclasses.replace(tiny.SFT, batch_size=12)
        sft.run(config, tiny.model("8x1x1"), tiny.demonstrations(12), runtime=tiny.runtime("8x1x1"))
    with pytest.raises(ValueError, match="the loader draws batches of 12, but .* batch_size=8"):
        sft.run(tiny.SFT, tiny.model(), tiny.demonstrations(12), runtime=tiny.runtime())


def test_a_loss_that_scores_at_another_temperature_stops_the_run():
    """The first minibatch of the reader's own loss must start at ratio 1 too."""

    def colder(config, params, batch):
        return ppo.loss(at_temperature(config, 0.7), params, batch)

    with pytest.raises(TrainingStopped, match="iteration 0: the loss starts at approxkl"):
        run_ppo(loss_fn=colder)


def test_the_state_is_donated_and_the_callers_policy_is_not():
    policy = tiny.model()
    sft.run(tiny.SFT, policy, tiny.demonstrations(), runtime=tiny.runtime())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(policy))


def test_centring_makes_the_demonstrations_score_zero_on_average_and_keeps_the_order():
    scorer = heads.init_scorer(tiny.model(), jax.random.key(3))
    centred = reward_model.centre(scorer, tiny.demonstrations(), mesh=tiny.mesh())
    batch = tiny.demonstrations(len(tiny.WORDS)).epoch_batches()[0]
    batch = jax.tree.map(jnp.asarray, batch)
    before = learned.score(scorer, batch.tokens, batch.attend, batch.mask)
    after = learned.score(centred, batch.tokens, batch.attend, batch.mask)
    assert abs(float(after.mean())) < 1e-6 < abs(float(before.mean()))
    np.testing.assert_allclose(after - before, -before.mean(), rtol=1e-4)


def test_weights_are_arguments_of_the_first_program_not_constants_in_it():
    """Closed over, they would be stored in the program, whole on every host."""
    policy = tiny.model()
    with jax.set_mesh(tiny.mesh()):
        trained = ppo.networks(tiny.PPO, policy, None)
        text = jax.jit(online.init_state).lower(tiny.PPO, (), trained).as_text()
    assert max(map(len, text.splitlines())) < 20_000
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(policy)) > 80_000
