"""Minimum risk training: the risk and its gradient against formulas, sets, references, runs."""

import dataclasses

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.algorithms import mrt
from rlhf_jax.data import batches
from rlhf_jax.data.records import Prompts
from rlhf_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("compile_cache")

CONFIG = mrt.Config(batch_size=1, samples_per_prompt=4, sampling=enumeration.SAMPLING, alpha=0.3)


def a_set(seed=0, groups=3, count=6):
    rng = np.random.default_rng(seed)
    logps, costs = rng.normal(size=(2, groups, count)).astype(np.float32)
    return jnp.asarray(5 * logps), jnp.asarray(costs), jnp.ones((groups, count))


# ------------------------------------------------------------------------------ the risk of a set


def test_the_gradient_is_the_one_of_the_paper():
    """alpha Q (cost - risk), by numpy in float64."""
    logps, costs, counts = a_set()
    counts = counts.at[0, 2].set(0.0).at[1, :3].set(0.0)
    alpha = 0.7
    found = jax.grad(lambda x: mrt.risk(alpha * x, costs, counts).sum())(logps)
    weights = np.exp(alpha * np.float64(logps)) * np.asarray(counts)
    q = weights / weights.sum(1, keepdims=True)
    risk = (q * np.float64(costs)).sum(1, keepdims=True)
    np.testing.assert_allclose(mrt.risk(alpha * logps, costs, counts), risk[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found, alpha * q * (np.float64(costs) - risk), atol=1e-6)


def test_a_constant_added_to_all_scores_changes_no_gradient():
    logps, costs, counts = a_set()

    def gradient(constant):
        return jax.grad(lambda x: mrt.risk(x, costs + constant, counts).sum())(logps)

    np.testing.assert_allclose(gradient(7.25), gradient(0.0), atol=1e-6)
    np.testing.assert_array_equal(
        jax.grad(lambda x: mrt.risk(x, 0 * costs, counts).sum())(logps), 0
    )


@pytest.mark.parametrize("kept", [0, 1])
def test_a_set_of_one_candidate_or_none_teaches_nothing(kept):
    logps, costs, _ = a_set()
    counts = jnp.zeros(costs.shape).at[:, :kept].set(1.0)
    costs = jnp.where(counts > 0, costs, jnp.nan)
    value, gradient = jax.value_and_grad(lambda x: mrt.risk(x, costs, counts).sum())(logps)
    np.testing.assert_allclose(value, jnp.sum(costs[:, 0]) if kept else 0.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_weights_far_apart_stay_finite():
    logps = jnp.array([[-3000.0, -10.0, 0.0]])
    counts = jnp.array([[1.0, 1.0, 0.0]])
    np.testing.assert_allclose(jnp.exp(mrt.log_weights(logps, counts)), [[0, 1, 0]])


def test_duplicates_are_found_whatever_padding_holds():
    tokens = jnp.array([[[9, 1, 2, 7], [9, 1, 2, 8], [9, 1, 3, 7], [9, 1, 2, 7], [9, 1, 2, 7]]])
    mask = jnp.array([[[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0.0]]])
    # The last is a prefix of the others, and no duplicate.
    assert mrt.is_duplicate(tokens, mask).tolist() == [[False, True, False, False, False]]


# ----------------------------------------------------------------------------------- the loss


def everything(config, references=None):
    """One set with every response that there is."""
    tokens, attend, mask = enumeration.rows()
    one = (x[None] for x in (tokens, attend, mask, enumeration.logprobs(enumeration.model())))
    scores = enumeration.score(None, tokens, attend, mask)[None]
    return mrt.Batch(*one, scores, jnp.ones(scores.shape), references)


def gradient_of(config, batch, loss_fn=mrt.loss):
    return enumeration.exact(lambda policy: loss_fn(config, {"policy": policy}, batch)[0])


def test_with_all_responses_and_alpha_1_the_risk_is_the_expected_cost():
    config = dataclasses.replace(CONFIG, alpha=1.0)

    def expected(policy):
        scores = enumeration.score(None, *enumeration.rows())
        return -jnp.sum(jnp.exp(enumeration.logprobs(policy).sum(1)) * scores)

    batch = everything(config)
    value, metrics = mrt.loss(config, {"policy": enumeration.model()}, batch)
    np.testing.assert_allclose(value, expected(enumeration.model()), rtol=1e-4)
    exact = enumeration.exact(expected)
    np.testing.assert_allclose(
        gradient_of(config, batch), exact, atol=2e-5 * np.abs(exact).max(), rtol=1e-3
    )
    assert metrics["policy/approxkl_avg"] < 1e-10


@pytest.mark.parametrize("averaged", [False, True])
def test_the_gradient_of_the_weights_is_that_of_a_second_derivation(averaged):
    """From the definition: probabilities in float32, no logarithms, no centring."""
    batch = everything(CONFIG)

    def by_definition(policy):
        logprobs, mask = enumeration.logprobs(policy), enumeration.rows()[2]
        mass = jnp.exp(CONFIG.alpha * logprobs.sum(1))
        if averaged:
            mass = jnp.exp(logprobs.sum(1) / mask.sum(1))
        return jnp.sum(mass / mass.sum() * -batch.scores[0])

    exact = enumeration.exact(by_definition)
    found = gradient_of(CONFIG, batch, mrt.length_averaged_loss if averaged else mrt.loss)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())


def test_the_references_are_mixed_in_by_their_cross_entropy():
    config = dataclasses.replace(CONFIG, mle_share=0.25)
    batch = everything(config)
    references = jnp.zeros(batch.scores.shape).at[0, 3].set(1.0)
    mixed = everything(config, references)

    def imitation(policy):
        return -enumeration.logprobs(policy)[3].sum() / enumeration.rows()[2][3].sum()

    wanted = 0.75 * gradient_of(CONFIG, batch) + 0.25 * enumeration.exact(imitation)
    np.testing.assert_allclose(gradient_of(config, mixed), wanted, atol=1e-4 * np.abs(wanted).max())


# --------------------------------------------------------------------------------- references


ROWS = [
    {"prompt": f"count to {i}:", "completion": " one two three four five"[: 4 + i]}
    for i in range(1, 9)
]


def with_references(batch_size, longest=6, rows=ROWS):
    rows = [{**row, "completion": row["completion"][: longest - 2]} for row in rows]
    examples = batches.prompts(rows, tiny.TOKENIZER, 16, max_reference=longest)
    return batches.Loader(examples, batch_size, seed=3)


def test_references_are_read_with_their_eos_and_padded():
    batch = with_references(8).examples.gather(np.array([0, 5, -1]))
    assert isinstance(batch, Prompts)
    for row, length, source in zip(batch.references, batch.reference_lengths, (0, 5)):
        text = tiny.TOKENIZER.decode(row[: length - 1].tolist())
        assert text == ROWS[source]["completion"][:4]
        assert int(row[length - 1]) in tiny.TOKENIZER.eos_ids
        assert (row[length:] == tiny.TOKENIZER.pad_id).all()
    assert batch.reference_lengths[2] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"text": "a"}, "'prompt' is missing"),
    ],
)
def test_a_row_without_a_reference_is_an_error_that_says_so(row, message):
    with pytest.raises(ValueError, match=message):
        batches.prompts([row], tiny.TOKENIZER, 16, max_reference=6)


def test_references_that_are_too_long_are_dropped_and_counted():
    examples = batches.prompts(ROWS, tiny.TOKENIZER, 16, max_reference=7)
    assert examples.counts.dropped == {"response over its limit": 6}


# --------------------------------------------------------------------------------------- runs

TINY = mrt.Config(
    num_iterations=2,
    batch_size=4,
    samples_per_prompt=4,
    sampling=Sampling(max_new_tokens=6),
    alpha=1.0,
    policy_optimizer=dataclasses.replace(tiny.ADAM, learning_rate=1e-2, eps=1e-4),
)


def run(config=TINY, mesh="1x1x1", loader=None, **inputs):
    given = {
        "policy": tiny.model(mesh),
        "prompts": loader or with_references(config.batch_size),
        "tokenizer": tiny.TOKENIZER,
        "score": tiny.share_below_128,
        "runtime": tiny.runtime(mesh),
    }
    return mrt.run(config, **(given | inputs))


def test_the_first_candidate_is_the_reference_and_the_others_are_samples():
    seen = []
    run(observe=lambda rollout: seen.append(rollout) or {}, config=TINY)
    plain = []
    examples = batches.prompts(ROWS, tiny.TOKENIZER, 16)
    run(
        loader=batches.Loader(examples, 4, seed=3),
        observe=lambda rollout: plain.append(rollout) or {},
    )
    rollout, other = seen[0], plain[0]
    given = np.arange(16) % 4 == 0
    np.testing.assert_array_equal(rollout.given, given)
    np.testing.assert_array_equal(rollout.tokens[~given], other.tokens[~given])
    np.testing.assert_array_equal(rollout.index, other.index)
    source = with_references(4).examples
    for tokens, mask, index in zip(
        rollout.tokens[given], rollout.mask[given], rollout.index[given]
    ):
        wanted = source.rows[index % len(source)].reference
        np.testing.assert_array_equal(tokens[mask > 0], wanted)
    # What the model thinks of a reference is a pass over the whole row's.
    np.testing.assert_array_equal(rollout.old_logprobs[given], rollout.forward_logprobs[given])
    assert (rollout.old_logprobs[given].sum(1) < 0).all() and other.given is None


@pytest.mark.slow
def test_a_run_is_the_same_on_a_mesh_of_eight():
    config = dataclasses.replace(TINY, batch_size=8, mle_share=0.3)
    policy, history = run(config)
    other, other_history = run(config, "2x2x2")
    for one, two in zip(history, other_history):
        for name in ("loss", "objective/scores", "loss/mle", "candidates/distinct"):
            np.testing.assert_allclose(one[name], two[name], rtol=2e-4, err_msg=name)


@pytest.mark.slow
def test_the_score_rises():
    config = dataclasses.replace(TINY, num_iterations=30, batch_size=8, samples_per_prompt=8)
    _, history = run(config)
    scores = [line["objective/scores"] for line in history]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.15


def test_the_weight_of_references_that_are_not_there_is_refused():
    examples = batches.prompts(ROWS, tiny.TOKENIZER, 16)
    config = dataclasses.replace(TINY, mle_share=0.5)
    with pytest.raises(ValueError, match="mle_share=0.5 is the weight of the references"):
        run(config, loader=batches.Loader(examples, 4))


def test_settings_that_leave_no_set_are_refused():
    with pytest.raises(ValueError, match="samples_per_prompt=1 must be at least 2"):
        mrt.Config(samples_per_prompt=1)
    with pytest.raises(ValueError, match="6 groups per iteration"):
        mrt.Config(batch_size=6, num_minibatches=4)


def test_references_longer_than_responses_are_refused():
    config = dataclasses.replace(TINY, sampling=Sampling(max_new_tokens=4))
    with pytest.raises(ValueError, match="references of 6 tokens are longer than max_new_tokens=4"):
        run(config)
