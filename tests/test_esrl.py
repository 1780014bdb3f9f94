"""ESRL: both stages, capability, the rules for samples and temperature, elimination, the queue."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import losses, online
from rlhf_jax.algorithms import esrl
from rlhf_jax.data import batches
from rlhf_jax.models import transformer
from rlhf_jax.sampling import Drawing, Sampling
from rlhf_jax.training import state as training

pytestmark = pytest.mark.usefixtures("compile_cache")

TINY = esrl.Config(
    num_iterations=3,
    batch_size=8,
    samples_per_prompt=4,
    queue_size=64,
    sampling=Sampling(max_new_tokens=6),
    policy_optimizer=dataclasses.replace(tiny.ADAM, learning_rate=1e-2, eps=1e-4),
)
PROMPTS = len(tiny.WORDS)


def run(config=TINY, mesh="1x1x1", **inputs):
    given = {
        "policy": tiny.model(mesh),
        "prompts": tiny.prompts(config.batch_size),
        "tokenizer": tiny.TOKENIZER,
        "score": tiny.share_below_128,
        "runtime": tiny.runtime(mesh),
    }
    return esrl.run(config, **(given | inputs))


def rollout(seed=0, count=8, each=4):
    rng = np.random.default_rng(seed)
    found = tiny.some_rollout(count * each)
    return found._replace(
        scores=jnp.asarray(rng.normal(size=count * each), jnp.float32),
        entropy=jnp.asarray(rng.uniform(0, 5, size=found.mask.shape), jnp.float32),
        old_logprobs=-jnp.asarray(rng.uniform(0, 5, size=found.mask.shape), jnp.float32),
        index=jnp.repeat(jnp.arange(count), each),
    )


def batch_of(config, memory=None, given=None, **functions):
    made = esrl.algorithm(config, PROMPTS, **functions)
    params = {"policy": tiny.model()}
    return made.make_batch(config, params, memory or made.memory, given or rollout())


# -------------------------------------------------------------------------------- both stages


def plain(policy, tokens, attend):
    logits = transformer.logits(policy, transformer.hidden_states(policy, tokens, attend))
    return losses.token_logprobs(logits, tokens, 0.8)


@pytest.mark.parametrize("padding", [0, 2])
def test_decoding_with_a_gradient_gives_the_gradient_of_one_pass(padding):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, 200, (3, 10)))
    attend = jnp.ones((3, 10), jnp.int32).at[0, :padding].set(0)
    weights = jnp.asarray(rng.normal(size=(3, 10)), jnp.float32).at[:, :4].set(0.0)

    def naive(policy):
        found = esrl.decoded_logprobs(policy, tokens, attend, max_new_tokens=6, temperature=0.8)
        return jnp.sum(weights * found)

    def parallel(policy):
        return jnp.sum(weights * plain(policy, tokens, attend))

    policy = tiny.model()
    found, wanted = (jax.jit(jax.value_and_grad(f))(policy) for f in (naive, parallel))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for one, two in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1])):
        np.testing.assert_allclose(one, two, atol=3e-5)


def temporaries(length):
    """Compiled bytes of a gradient: (through the decoding, of one pass after it)."""
    shape = dataclasses.replace(tiny.SHAPE, num_layers=2, max_length=256)
    policy = jax.eval_shape(lambda: transformer.init(shape, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((4, 8 + length), jnp.int32)

    def naive(policy, tokens, attend):
        return jnp.sum(esrl.decoded_logprobs(policy, tokens, attend, max_new_tokens=length))

    def parallel(policy, tokens, attend):
        params, config = {"policy": policy}, esrl.Config(sampling=Sampling(max_new_tokens=length))
        batch = esrl.Batch(tokens, attend, *[None] * 5)
        return jnp.sum(online.forward(config, params, batch).logprobs)

    return [
        jax.jit(jax.grad(f)).lower(policy, ids, ids).compile().memory_analysis().temp_size_in_bytes
        for f in (naive, parallel)
    ]


@pytest.mark.slow
def test_the_memory_of_one_pass_grows_with_the_length_and_that_of_decoding_faster(
    no_shape_checks,
):
    decoding, one_pass = zip(*(temporaries(length) for length in (16, 32, 64, 128)))
    print(f"\nbytes at 16, 32, 64 and 128 tokens: decoding {decoding}, one pass {one_pass}")
    # From 128 tokens on attention is computed in blocks, whose size is the same for all lengths.
    assert one_pass[2] < 2.4 * one_pass[1] < 2.4**2 * one_pass[0]
    assert decoding[3] > 3.2 * decoding[2] > 3 * 3.2 * decoding[1]
    assert decoding[3] > 2 * one_pass[3] and decoding[2] > 3 * one_pass[2]


# ---------------------------------------------------------------------------------- capability


def test_capability_is_1_for_a_certain_policy_and_0_for_a_uniform_one():
    vocabulary = 264
    for entropy, wanted in ((0.0, 1.0), (np.log(vocabulary), 0.0)):
        given = rollout()._replace(entropy=jnp.full((32, 6), entropy, jnp.float32))
        found = esrl.entropy_capability(vocabulary, given)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_capability_of_rewards_lies_between_their_percentiles():
    given = rollout()._replace(scores=jnp.arange(32.0))
    found = esrl.reward_capability(264, given)
    low, high = np.percentile(np.arange(32.0), [5, 95])
    wanted = np.clip((np.arange(32.0) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_padding_does_not_count_in_the_capability():
    given = rollout()
    mask = given.mask.at[:, 4:].set(0.0)
    one = esrl.entropy_capability(264, given._replace(mask=mask))
    entropy = given.entropy.at[:, 4:].set(100.0)
    two = esrl.entropy_capability(264, given._replace(mask=mask, entropy=entropy))
    np.testing.assert_array_equal(one, two)


def test_a_prompt_gets_samples_by_its_last_capability_and_the_new_one_is_remembered():
    config = dataclasses.replace(TINY, min_samples=1)
    known = jnp.zeros(PROMPTS).at[:4].set(jnp.array([1.0, 0.5, 0.34, 0.0]))
    memory = esrl.algorithm(config, PROMPTS).memory._replace(capability=known)
    batch, after, metrics = batch_of(config, memory)
    counts = batch.is_trained.reshape(8, 4)
    # 1 + round(3 (1 - C)); prompts without a visit get all.
    assert counts.sum(1).tolist() == [1, 3, 3, 4, 4, 4, 4, 4]
    assert (np.diff(counts, axis=1) <= 0).all()
    assert metrics["esrl/consumed"] == 27
    wanted = esrl.entropy_capability(264, rollout()).reshape(8, 4).mean(1)
    np.testing.assert_allclose(after.capability[:8], wanted, rtol=1e-5)
    assert (after.capability[8:] == 0).all()


def test_what_a_prompt_does_not_get_contributes_nothing_whatever_it_holds():
    config = dataclasses.replace(TINY, min_samples=2)
    memory = esrl.algorithm(config, PROMPTS).memory._replace(capability=jnp.ones(PROMPTS))
    params = {"policy": tiny.model()}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (32, 10)))
    wide = rollout()._replace(tokens=tokens, attend=jnp.ones((32, 10), jnp.int32))
    wide = wide._replace(
        **{
            name: jnp.pad(getattr(wide, name), ((0, 0), (4, 0)))
            for name in ("mask", "old_logprobs", "ref_logprobs", "entropy")
        }
    )

    def gradient(given):
        batch, _, _ = batch_of(config, memory, given)
        batch = batch._replace(advantages=jnp.where(batch.is_trained > 0, 1.5, batch.advantages))
        loss = jax.jit(jax.grad(lambda policy: esrl.loss(config, {"policy": policy}, batch)[0]))
        return loss(params["policy"])

    unused = np.arange(32) % 4 >= 2
    other = wide._replace(tokens=wide.tokens.at[unused].set(7))
    for one, two in zip(jax.tree.leaves(gradient(wide)), jax.tree.leaves(gradient(other))):
        np.testing.assert_array_equal(one, two)


# --------------------------------------------------------------------------------- elimination


def test_the_least_capable_are_kept():
    config = dataclasses.replace(TINY, train_responses=24)
    batch, _, metrics = batch_of(config)
    given = rollout()
    capability = np.asarray(esrl.entropy_capability(264, given))
    kept = np.sort(np.argsort(capability)[:24])
    np.testing.assert_array_equal(
        np.sort(np.asarray(batch.old_logprobs.sum(1))),
        np.sort(np.asarray(given.old_logprobs.sum(1))[kept]),
    )
    assert metrics["esrl/consumed"] == 24


def test_samples_that_a_prompt_does_not_get_are_the_first_to_go():
    config = dataclasses.replace(TINY, min_samples=3, train_responses=24)
    memory = esrl.algorithm(config, PROMPTS).memory._replace(capability=jnp.ones(PROMPTS))
    batch, _, _ = batch_of(config, memory, priority=esrl.at_random)
    assert (batch.is_trained == 1).all()


def test_elimination_at_random_does_not_look_at_the_capability():
    given = rollout()
    one, two = (esrl.at_random(jnp.asarray(x), given) for x in (np.zeros(32), np.arange(32.0)))
    np.testing.assert_array_equal(one, two)
    assert len(set(np.asarray(one).tolist())) == 32
    capability = esrl.entropy_capability(264, given)
    assert abs(np.corrcoef(np.asarray(one), np.asarray(capability))[0, 1]) < 0.5


# ------------------------------------------------------------------------------------- the queue


def test_rewards_are_z_scores_of_a_deque_over_more_than_two_turns():
    config = dataclasses.replace(TINY, queue_size=40, kl_coef=0.0)
    made = esrl.algorithm(config, PROMPTS)
    memory, deque = made.memory, collections.deque(maxlen=40)
    for seed in range(4):
        given = rollout(seed)
        batch, memory, _ = batch_of(config, memory, given)
        deque.extend(np.asarray(given.scores).tolist())
        wanted = (np.asarray(given.scores) - np.mean(deque)) / np.std(deque)
        np.testing.assert_allclose(batch.advantages, wanted, atol=1e-5)


def test_references_are_not_pushed():
    drawn = (jnp.arange(8) % 4 > 0).astype(jnp.float32)
    queue = training.Queue.empty(5)
    deque = collections.deque(maxlen=5)
    for start in (0.0, 100.0):
        rewards = start + jnp.arange(8.0)
        queue = queue.push(rewards, drawn)
        deque.extend(np.asarray(rewards)[np.asarray(drawn) > 0].tolist())
        assert int(queue.count) == (6 if start == 0 else 7)  # 12, less what 5 divides
        kept = np.sort(np.asarray(queue.values))
        np.testing.assert_array_equal(kept, np.sort(deque))


def test_a_constant_reward_gives_no_gradient():
    config = dataclasses.replace(TINY, kl_coef=0.0)
    batch, _, _ = batch_of(config, given=rollout()._replace(scores=jnp.full(32, 100.3)))
    np.testing.assert_allclose(batch.advantages, 0.0, atol=1e-5)


# ------------------------------------------------------------------------------------------ heat


def test_heat_multiplies_the_temperature_of_each_prompts_responses():
    sampling = Sampling(max_new_tokens=6)
    prompts = jax.tree.map(jnp.asarray, tiny.prompts(8).batch(0))
    drawing, heat = Drawing(tiny.TOKENIZER.ends), jnp.array([0.5] * 4 + [1.0] * 4)
    config = dataclasses.replace(TINY, samples_per_prompt=2, sampling=sampling)

    def drawn(config, prompts):
        params = {"policy": tiny.model()}
        return online.sample(drawing, config, params, jnp.int32(0), prompts)[0]

    warm = drawn(config, prompts)
    hot = drawn(config, prompts._replace(heat=heat))
    cold = drawn(
        dataclasses.replace(config, sampling=dataclasses.replace(sampling, temperature=0.5)),
        prompts,
    )
    np.testing.assert_array_equal(hot.tokens[:8], cold.tokens[:8])
    np.testing.assert_array_equal(hot.tokens[8:], warm.tokens[8:])
    np.testing.assert_allclose(hot.filtered_logprobs[:8], cold.logprobs[:8], atol=1e-5)
    np.testing.assert_allclose(hot.filtered_logprobs[8:], warm.logprobs[8:], atol=1e-5)
    # The policy's own are at the run's temperature.
    assert not np.allclose(hot.logprobs[:8], hot.filtered_logprobs[:8], atol=1e-2)


def test_a_certain_prompt_is_sampled_at_the_least_heat():
    config = dataclasses.replace(TINY, min_heat=0.6, off_policy="weight")
    memory = esrl.algorithm(config, PROMPTS).memory
    memory = memory._replace(capability=memory.capability.at[2].set(1.0).at[3].set(0.5))
    prompts = tiny.prompts(8).batch(0)._replace(index=jnp.arange(8))
    heat = esrl.prepare(config, memory, prompts).heat
    np.testing.assert_allclose(heat, [1, 1, 0.6, 0.8, 1, 1, 1, 1], rtol=1e-6)


def test_heat_without_a_word_about_the_sampler_is_refused():
    with pytest.raises(ValueError, match="min_heat=0.6 makes the sampler another distribution"):
        esrl.Config(min_heat=0.6)


# --------------------------------------------------------------------------------------- runs


def test_without_elimination_it_is_plain_training_bit_for_bit():
    """All samples, all responses: the settings that adapt change nothing."""
    plain = run(TINY)
    full = run(dataclasses.replace(TINY, train_responses=32), priority=_in_order)
    for one, two in zip(plain.history, full.history):
        assert one["loss"] == two["loss"] and one["objective/scores"] == two["objective/scores"]
    assert tiny.equal(plain.policy.weights, full.policy.weights)


def _in_order(capability, rollout):
    return -jnp.arange(capability.shape[0], dtype=jnp.float32)


def test_a_run_is_the_same_on_a_mesh_of_eight_and_nothing_is_compiled_twice(caplog):
    config = dataclasses.replace(
        TINY,
        min_samples=1,
        train_responses=16,
        min_heat=0.7,
        off_policy="weight",
    )
    with jax.log_compiles():
        policy, history = run(config)
    named = [x.getMessage() for x in caplog.records if "Compiling" in x.getMessage()]
    for name in ("sample", "judge", "update"):
        assert sum(f"jit({name})" in message for message in named) <= 1
    _, other = run(config, "2x2x2")
    for one, two in zip(history, other):
        for name in ("loss", "objective/scores", "esrl/consumed", "esrl/capability"):
            np.testing.assert_allclose(one[name], two[name], rtol=2e-3, err_msg=name, atol=1e-5)


@pytest.mark.slow
def test_references_are_mixed_in():
    rows = [{"prompt": word, "completion": word[::-1]} for word in tiny.WORDS]
    examples = batches.prompts(rows, tiny.TOKENIZER, 4, max_reference=6)
    config = dataclasses.replace(TINY, mle_share=0.5, num_iterations=12)
    _, history = run(config, prompts=batches.Loader(examples, 8))
    assert history[-1]["loss/mle"] < history[0]["loss/mle"] - 0.5
    with pytest.raises(ValueError, match="mle_share=0.5 is the weight of the references"):
        run(config)


@pytest.mark.slow
def test_the_score_rises():
    config = dataclasses.replace(TINY, num_iterations=30, min_samples=2, train_responses=24)
    _, history = run(config)
    scores = [line["objective/scores"] for line in history]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.1


def test_references_that_would_take_every_place_are_refused():
    rows = [{"prompt": word, "completion": word[::-1]} for word in tiny.WORDS]
    loader = batches.Loader(batches.prompts(rows, tiny.TOKENIZER, 4, max_reference=6), 8)
    with pytest.raises(ValueError, match="mle_share=0.0 is the weight .* the prompts have some"):
        run(prompts=loader)
    config = dataclasses.replace(TINY, mle_share=0.5, train_responses=8)
    with pytest.raises(ValueError, match="train_responses=8 must be above the 8 references"):
        run(config, prompts=loader)
    with pytest.raises(ValueError, match="esrl.run takes a Loader of prompts, got list"):
        run(prompts=[1, 2])


def test_a_prompt_that_occurs_twice_has_the_mean_of_both_visits():
    found = esrl._remembered(jnp.full(4, 0.5), jnp.array([2, 0, 2]), jnp.array([1.0, 0.3, 0.0]))
    np.testing.assert_allclose(found, [0.3, 0.5, 0.5, 0.5])


def test_one_response_to_a_prompt_is_enough():
    _, history = run(dataclasses.replace(TINY, batch_size=32, samples_per_prompt=1))
    assert history[-1]["esrl/consumed"] == 32


def test_settings_that_do_not_fit_are_refused():
    make = functools.partial(esrl.Config, batch_size=8, samples_per_prompt=4)
    with pytest.raises(ValueError, match="min_samples=5 must be at most samples_per_prompt=4"):
        make(min_samples=5)
    with pytest.raises(ValueError, match="train_responses=33 must be at most the 32"):
        make(train_responses=33)
    with pytest.raises(ValueError, match="= 4 updates per iteration, .* use one update"):
        make(num_epochs=4)
    with pytest.raises(ValueError, match="train_responses=30 are not a multiple"):
        make(train_responses=30, micro_batches=4)
