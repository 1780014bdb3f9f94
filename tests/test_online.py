"""What every online algorithm shares, and a whole new one in this file: GRPO."""

import dataclasses
import functools
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import advantages, losses, online, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import NonNegative
from rlhf_jax.sampling import Drawing, Sampling
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import Display

pytestmark = pytest.mark.usefixtures("compile_cache")

# ---------------------------------------------------------- a new online algorithm touches one file


class GrpoConfig(online.Config):
    """Settings of GRPO (Shao et al. 2024, arXiv:2402.03300)."""

    clip_eps: NonNegative = 0.2
    kl_coef: NonNegative = 0.04  # weight of the KL estimate in the loss


class Groups(NamedTuple):
    """K responses to each of G prompts; the groups stay together in a minibatch."""

    tokens: jax.Array  # [G, K, T], as are all but the last
    attend: jax.Array
    mask: jax.Array
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    advantages: jax.Array  # [G, K]


def grpo_networks(config, policy, critic):
    if critic is not None:
        raise ValueError("GRPO has no critic; leave critic= out")
    return {"policy": policy}


def grpo_batch(config, params, memory, rollout):
    def grouped(x):
        return x.reshape(config.batch_size, config.samples_per_prompt, *x.shape[1:])

    scores = grouped(rollout.scores)
    rows = (getattr(rollout, name) for name in Groups._fields[:-1])
    batch = Groups(*map(grouped, rows), advantages.group_normalised(scores))
    return batch, memory, {"objective/group_std": jnp.mean(jnp.std(scores, axis=1))}


def grpo_loss(config, params, batch):
    rows = Groups(*(x.reshape(-1, *x.shape[2:]) for x in batch))
    logprobs, _, entropy = online.forward(config, params, rows)
    policy_loss = losses.clipped_policy_loss(
        logprobs=logprobs,
        old_logprobs=rows.old_logprobs,
        advantages=jnp.broadcast_to(rows.advantages[:, None], logprobs.shape),
        clip_eps=config.clip_eps,
    )
    kl = losses.kl_k3(logprobs=logprobs, ref_logprobs=rows.ref_logprobs)
    change = 0.5 * jnp.square(logprobs - rows.old_logprobs)
    metrics = {
        "policy/approxkl_avg": losses.masked_mean(change, rows.mask),
        "policy/entropy_avg": losses.masked_mean(entropy, rows.mask),
    }
    return losses.masked_mean(policy_loss + config.kl_coef * kl, rows.mask), metrics


GRPO = online.Algorithm(
    "grpo",
    Display("GRPO", online.HEADLINE, online.CURVES),
    grpo_networks,
    grpo_batch,
    grpo_loss,
)

# --------------------------------------------------------------------------------- it runs as it is

GROUPED = GrpoConfig(
    num_iterations=2,
    batch_size=8,
    samples_per_prompt=4,
    num_epochs=2,
    num_minibatches=2,
    sampling=Sampling(max_new_tokens=6),
    policy_optimizer=tiny.ADAM,
)


def run_grpo(config=GROUPED, mesh="1x1x1", **inputs):
    """(trained policy, history, rollouts)."""
    seen = []
    params, history = online.run(
        config,
        GRPO,
        policy=tiny.model(mesh),
        prompts=tiny.prompts(config.batch_size),
        tokenizer=tiny.TOKENIZER,
        score=tiny.share_below_128,
        observe=lambda rollout: seen.append(rollout) or {},
        runtime=tiny.runtime(mesh),
        **inputs,
    )
    return params["policy"], history, seen


@pytest.fixture(scope="module")
def grpo():
    return run_grpo()


def test_grpo_trains_and_is_the_same_on_a_mesh_of_eight(grpo):
    policy, history, rollouts = grpo
    other, others, same = run_grpo(mesh="2x2x2")
    for one, two in zip(rollouts, same):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    for name in ("loss", "grad_norm", "objective/kl", "objective/group_std"):
        values = [line[name] for line in history]
        np.testing.assert_allclose([h[name] for h in others], values, rtol=1e-4, atol=1e-6)
    moved = tiny.distance(policy, tiny.model())
    assert moved > 0.1
    assert tiny.distance(other, policy) < 1e-3 * moved
    with pytest.raises(ValueError, match="GRPO has no critic"):
        run_grpo(critic=policy)


def test_the_samples_of_a_prompt_lie_side_by_side_and_differ(grpo):
    _, _, seen = grpo
    start = seen[0].tokens.shape[1] - GROUPED.sampling.max_new_tokens
    for rollout in seen:
        index = rollout.index.reshape(8, 4)
        assert (index == index[:, :1]).all() and len(set(index[:, 0].tolist())) == 8
        for group in rollout.tokens.reshape(8, 4, -1):
            assert (group[:, :start] == group[0, :start]).all()
            assert len({tuple(row[start:].tolist()) for row in group}) == 4


def test_sample_k_of_a_prompt_is_the_one_that_is_drawn_alone_under_its_number(grpo):
    _, _, (first, _) = grpo
    prompts = tiny.prompts(8).batch(0)
    drawing = Drawing(tiny.TOKENIZER.ends)

    @jax.jit
    def alone(policy, prompts, key, number):
        return rollouts.sample(
            policy,
            prompts,
            key,
            sampling=GROUPED.sampling,
            drawing=drawing,
            first_sample=number,
        )

    key = online.iteration_key(GROUPED, 0, 0)
    for k in range(4):
        samples, index = alone(tiny.model(), prompts, key, k)
        np.testing.assert_array_equal(index, prompts.index)
        np.testing.assert_array_equal(samples.tokens, first.tokens[k::4])


@pytest.mark.parametrize(
    "mesh, prompts, samples, rows",
    [
        ("1x1x1", 3, 4, 3),  # each prompt is read once for all of its samples
        ("2x2x2", 4, 6, 4),
        ("2x2x2", 2, 6, 4),  # twice, so that four shards have one row each
        ("2x2x2", 3, 4, 12),
        ("8x1x1", 6, 4, 24),
    ],
)
def test_a_prompt_takes_as_few_rows_as_the_mesh_divides(mesh, prompts, samples, rows):
    config = online.Config(batch_size=prompts, samples_per_prompt=samples)
    assert online.prompt_rows(config, tiny.mesh(mesh)) == rows


def test_responses_have_to_divide_over_the_mesh_and_prompts_need_not():
    few = dataclasses.replace(GROUPED, batch_size=2, num_minibatches=1)
    # Eight responses are sampled and judged on four shards; the two groups cannot be split so.
    message = "rows or groups per minibatch=2 does not divide over data x fsdp = 4"
    with pytest.raises(ValueError, match=message):
        run_grpo(few, mesh="2x2x2")
    message = r"batch_size \* samples_per_prompt=6 does not divide over data x fsdp = 4"
    with pytest.raises(ValueError, match=message):
        run_grpo(dataclasses.replace(few, samples_per_prompt=3), mesh="2x2x2")


def test_rows_of_few_prompts_are_trained_on_a_mesh_that_the_responses_divide_over():
    config = dataclasses.replace(
        tiny.PPO, num_iterations=1, batch_size=2, samples_per_prompt=4, num_minibatches=1
    )
    (line,) = tiny.run_ppo(config, "2x2x2", critic=None).history
    assert line["episode"] == 8 and np.isfinite(line["loss"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_minibatches": 5}, "32 responses .* not a multiple of num_minibatches=5"),
        ({"micro_batches": 3}, "a minibatch of 16 responses is not a multiple of micro_batches=3"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be"),
        ({"sampling": Sampling(temperature=0.0)}, "sampling.temperature=0 is greedy"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_when_the_configuration_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUPED, **changes)


# ------------------------------------------------------------------------------------ the update


UPDATE = online.Config(batch_size=8, samples_per_prompt=3, num_epochs=2, num_minibatches=4)
WEIGHTS = {"policy": {"w": np.ones((2, 2), np.float32)}}


def groups_of_three(config, params, memory, rollout):
    return {"index": rollout.index.reshape(-1, 3)}, memory, {}


def small_loss(config, params, batch):
    return jnp.sum(params["policy"]["w"]), {}


def traced(make_batch=groups_of_three, loss=small_loss, config=UPDATE, memory=()):
    """Traces an update without compiling it: what a run of these functions would raise."""
    state = online.init_state(config, memory, WEIGHTS)
    program = functools.partial(online.update, make_batch, loss)
    return jax.eval_shape(program, config, state, {}, tiny.some_rollout(24))


def test_minibatches_are_dealt_over_groups_which_stay_together():
    seen = []

    def loss(config, params, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["index"])
        return small_loss(config, params, batch)

    program = jax.jit(functools.partial(online.update, groups_of_three, loss))
    state = online.init_state(UPDATE, (), WEIGHTS)
    state, _ = program(UPDATE, state, {}, tiny.some_rollout(24))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(seen) == 8 and int(state.train.step) == 8
    for minibatch in seen:
        assert minibatch.shape == (2, 3) and (minibatch == minibatch[:, :1]).all()
    for epoch in (seen[:4], seen[4:]):
        assert sorted(np.concatenate(epoch)[:, 0].tolist()) == list(range(8))
    assert not np.array_equal(seen[:4], seen[4:])


def test_groups_that_do_not_deal_out_are_refused():
    config = dataclasses.replace(UPDATE, num_minibatches=3)  # 24 responses would do, 8 groups not
    with pytest.raises(ValueError, match="make_batch returned 8 rows or groups, which num_mini"):
        traced(config=config)


def test_what_an_algorithm_remembers_may_be_arrays_and_is_whole_on_every_device():
    mesh = tiny.mesh("2x2x2")
    memory = {"queue": jnp.arange(5.0), "counts": {"seen": jnp.int32(3)}}
    weights = {"policy": {"up": {"kernel": jnp.ones((8, 8))}}}
    state = sharding.initialise(mesh, online.init_state, UPDATE, memory, weights)
    assert state.memory["queue"].sharding.is_fully_replicated
    assert not state.train.trainable["policy"]["up"]["kernel"].sharding.is_fully_replicated
    assert tiny.equal(state.memory, memory)


def test_a_score_on_the_device_may_have_parameters_of_its_own():
    placed = sharding.place(tiny.mesh("2x2x2"), {"scorer": {"of_token": jnp.arange(264.0)}})
    assert placed["scorer"]["of_token"].sharding.is_fully_replicated


# ----------------------------------------------------------------- compiled programs, across runs

OURS = ("jit(sample)", "jit(judge)", "jit(update)", "jit(init_state)")


def compiled(caplog, run, names=OURS):
    """(what `run()` returns, how often it compiled each of our programs)."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        result = run()
    lines = [record.getMessage() for record in caplog.records]
    lines = [line for line in lines if "Finished XLA compilation" in line]
    return result, {name: sum(name in line for line in lines) for name in names}


@pytest.fixture(scope="module")
def kept():
    """A configuration that is this test's alone, so that nothing is compiled for it yet."""
    return dataclasses.replace(tiny.PPO, num_iterations=3, sampling=Sampling(max_new_tokens=7))


def test_a_run_compiles_each_of_its_programs_once_and_the_next_run_none(kept, caplog):
    result, counts = compiled(caplog, lambda: tiny.run_ppo(kept))
    assert counts == dict.fromkeys(OURS, 1)
    # Other coefficients, rates and temperature; a fresh tokenizer, loader, policy and runtime.
    rates = dataclasses.replace(tiny.ADAM, learning_rate=1e-3)
    sampling = dataclasses.replace(kept.sampling, temperature=0.9)
    other = dataclasses.replace(kept, kl_coef=1, policy_optimizer=rates, sampling=sampling)
    changed, counts = compiled(caplog, lambda: tiny.run_ppo(other))
    assert counts == dict.fromkeys(OURS, 0)
    assert not tiny.equal(changed.policy, result.policy)


# --------------------------------------------------------------------- resuming with other numbers


@pytest.mark.parametrize("kl_target", [None, 0.001])
def test_a_resumed_run_uses_the_kl_coefficient_it_is_given_at_once(kept, kl_target, tmp_path):
    def run(**changes):
        config = dataclasses.replace(kept, kl_target=kl_target, **changes)
        with Checkpoints(tmp_path, keep=10) as checkpoints:
            history = tiny.run_ppo(config, checkpoints=checkpoints).history
        return [line["objective/kl_coef"] for line in history]

    before = run(kl_coef=0.05)
    shutil.rmtree(tmp_path / "3")
    (after,) = run(kl_coef=0.5)
    # An adapted factor is remembered and multiplies the new coefficient.
    np.testing.assert_allclose(after, 10 * before[-1], rtol=1e-6)
    assert (before[-1] == before[0]) is (kl_target is None)


# -------------------------------------------------------------------------------- misuse, in words


def wrong_shape(shape):
    def three_numbers(params, tokens, attend, mask):
        return jnp.zeros(shape)

    return three_numbers


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"scorer": None, "score": None}, "a learned reward needs scorer=, a model with a scalar"),
        ({"score": wrong_shape((3,))}, r"three_numbers returned shape \[3\], but .*\[B\] = \[16\]"),
        ({"score": wrong_shape((1,))}, r"three_numbers returned shape \[1\], but .*\[B\] = \[16\]"),
        ({"score": wrong_shape(())}, r"three_numbers returned shape \[\], but .*\[B\] = \[16\]"),
        ({"score": lambda p, tokens: tokens}, r"called as <lambda>\(params, tokens, attend, mask"),
        ({"reward": len}, "give a reward in Python, or a score on the device with its scorer"),
    ],
)
def test_a_reward_that_cannot_be_one_is_refused_in_words(kept, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny.run_ppo(kept, **inputs)


def test_a_critic_that_a_shared_one_leaves_unused_is_refused():
    config = dataclasses.replace(tiny.PPO, shared_critic=True)
    with pytest.raises(ValueError, match="critic= does nothing with shared_critic=True"):
        tiny.run_ppo(config)


def test_an_if_on_a_number_of_the_configuration_is_explained_in_a_loss_and_in_make_batch():
    class Task(online.Config):
        alpha: float = 0.5

    def make_batch(config, params, memory, rollout):
        return groups_of_three(config, params, memory, rollout if config.alpha > 0 else None)

    def loss(config, params, batch):
        return small_loss(config, params, batch) if config.alpha > 0 else None, {}

    config = Task(batch_size=8, samples_per_prompt=3)
    for wrong in ({"make_batch": make_batch}, {"loss": loss}):
        with pytest.raises(ValueError, match=r"test_online.py.*config.alpha > 0.* use jnp.where"):
            traced(config=config, **wrong)


def test_a_loss_without_metrics_is_named():
    def forgetful(config, params, batch):
        return jnp.sum(params["policy"]["w"])

    message = r"a loss returns \(scalar, metrics\), but forgetful returned an array of shape \[\]"
    with pytest.raises(ValueError, match=message):
        traced(loss=forgetful)


# -------------------------------------------------------------------------------------- evaluation


def test_a_policy_is_evaluated_every_so_often_and_after_the_last_iteration(kept):
    asked = []

    def evaluate(done, policy):
        asked.append((done, jax.device_get(policy)))  # the next iteration donates its arrays
        return {"length": 10.0 * done}

    config = dataclasses.replace(kept, eval_every=2)
    result = tiny.run_ppo(config, evaluate=evaluate)
    assert [line.get("eval/length") for line in result.history] == [None, 20.0, 30.0]
    assert [done for done, _ in asked] == [2, 3]
    assert tiny.equal(asked[-1][1], result.policy) and not tiny.equal(asked[0][1], result.policy)


def test_an_evaluation_that_would_never_run_is_refused_and_one_that_is_missing_too():
    with pytest.raises(ValueError, match="eval_every=0 never runs it"):
        tiny.run_ppo(evaluate=lambda done, policy: {})
    with pytest.raises(ValueError, match="eval_every=2, but there is nothing to evaluate on"):
        tiny.run_ppo(dataclasses.replace(tiny.PPO, eval_every=2))


def test_the_algorithm_of_ppo_is_a_record_that_online_runs(kept):
    inputs = {
        "policy": tiny.model(),
        "prompts": tiny.prompts(kept.batch_size),
        "tokenizer": tiny.TOKENIZER,
        "score": tiny.share_below_128,
        "runtime": tiny.runtime(),
    }
    params, history = online.run(kept, ppo.algorithm(), **inputs)
    result = ppo.run(kept, **inputs)
    assert tiny.equal((params["policy"], params["critic"]), (result.policy, result.critic))
    assert [h["loss"] for h in history] == [h["loss"] for h in result.history]
