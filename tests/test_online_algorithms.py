"""What must hold for every online algorithm alike: rewards, adapters, meshes, and bad input."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.algorithms import best_of_n, esrl, grpo, mrt, online_dpo, reinforce
from rlhf_jax.models import heads, lora
from rlhf_jax.sampling import Sampling
from rlhf_jax.training.state import TrainingStopped

pytestmark = pytest.mark.usefixtures("compile_cache")

MODULES = (best_of_n, esrl, grpo, mrt, online_dpo, reinforce)
every_algorithm = pytest.mark.parametrize("module", MODULES, ids=lambda x: x.__name__[20:])


def run(module, mesh="1x1x1", changes=None, **inputs):
    """(params, history) of two iterations on a reward on the device."""
    config = module.Config(
        num_iterations=2,
        batch_size=8,
        samples_per_prompt=4,
        sampling=Sampling(max_new_tokens=6),
        policy_optimizer=tiny.ADAM,
    )
    config = dataclasses.replace(config, **(changes or {}))
    given = {
        "policy": tiny.model(mesh),
        "prompts": tiny.prompts(config.batch_size),
        "tokenizer": tiny.TOKENIZER,
        "runtime": tiny.runtime(mesh),
    }
    if not inputs.keys() & {"score", "scorer", "reward"}:
        inputs["score"] = tiny.share_below_128
    return module.run(config, **(given | inputs))


def ascii_on_the_device(params, tokens, attend, mask):
    del params, attend
    return jnp.sum((tokens < 128) * mask, axis=1)


def ascii_in_python(prompts, responses, rows):
    return [sum(ord(character) < 128 for character in text) for text in responses]


def assert_same(history, others, keys=("loss", "grad_norm", "objective/kl", "objective/scores")):
    for key in keys:
        values = [line[key] for line in history]
        np.testing.assert_allclose([h[key] for h in others], values, rtol=1e-4, atol=1e-6)


@every_algorithm
def test_a_reward_in_python_trains_as_the_same_reward_on_the_device(module):
    policy, history = run(module, score=ascii_on_the_device)
    other, others = run(module, reward=ascii_in_python)
    assert_same(history, others)
    moved = tiny.distance(policy, tiny.model())
    assert moved > 0.1 and tiny.distance(other, policy) < 1e-4 * moved


@every_algorithm
def test_of_an_adapted_policy_the_adapter_is_trained_on_a_learned_reward(module):
    base = tiny.model()
    adapted = lora.attach(base, lora.Config(rank=2), jax.random.key(1))
    scorer = heads.init_scorer(base, jax.random.key(7))
    policy, _ = run(module, policy=adapted, scorer=scorer)
    changed = {
        jax.tree_util.keystr(path)
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(adapted), jax.tree.leaves(policy)
        )
        if not np.array_equal(np.asarray(before), np.asarray(after))
    }
    matrices = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(adapted)
        if path[-1].key in ("lora_a", "lora_b")
    }
    assert changed == matrices


@every_algorithm
def test_a_score_that_is_not_a_number_stops_the_run(module):
    def undefined(params, tokens, attend, mask):
        return jnp.where(jnp.arange(tokens.shape[0]) == 3, jnp.nan, mask.sum(1))

    with pytest.raises(TrainingStopped, match="iteration 0: 1 scores of the reward are NaN"):
        run(module, score=undefined)


@every_algorithm
def test_groups_that_teach_nothing_are_told_once_in_a_run(module, caplog):
    def constant(params, tokens, attend, mask):
        return jnp.ones(tokens.shape[0])

    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rlhf_jax.on_policy"):
            _, history = run(module, score=constant)
        (record,) = (x for x in caplog.records if x.name == "rlhf_jax.on_policy")
        assert "in 100 % of the groups all responses have the same score" in record.getMessage()
        assert [line["groups/informative"] for line in history] == [0.0, 0.0]


@pytest.mark.parametrize("module", [best_of_n, grpo, online_dpo])
def test_make_batch_must_return_three_things(module):
    with pytest.raises(ValueError, match=r"must return \(batch, memory, metrics\).*returned dict"):
        run(module, make_batch=lambda config, params, memory, rollout: {})


@pytest.mark.parametrize("module", [best_of_n, mrt, online_dpo])
def test_weights_are_refused_where_nothing_would_use_them(module):
    with pytest.raises(ValueError, match="is right for any sampler and has no weights"):
        run(module, changes={"off_policy": "weight"})


@pytest.mark.parametrize("module", [esrl, grpo, reinforce])
def test_weights_of_a_filtered_sampler_are_reported(module):
    filtered = Sampling(max_new_tokens=6, top_p=0.5)
    with pytest.raises(ValueError, match="sampling.top_p=0.5 makes the sampler another"):
        run(module, changes={"sampling": filtered})
    _, history = run(module, changes={"sampling": filtered, "off_policy": "weight"})
    assert all(0 < line["sampler/weight_avg"] < 1 for line in history)


@every_algorithm
def test_more_tokens_to_draw_from_than_there_are_is_refused(module):
    with pytest.raises(ValueError, match="top_k=265 must be at most the number of tokens .* 264"):
        run(module, changes={"sampling": Sampling(max_new_tokens=6, top_k=265)})


@pytest.mark.parametrize("module", [grpo, reinforce])
def test_settings_that_change_nothing_are_no_other_sampler(module):
    neutral = Sampling(
        max_new_tokens=6, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0
    )
    _, history = run(module, changes={"sampling": neutral})
    assert_same(run(module)[1], history)
