"""TAMER: ratings of responses and of their parts, explained by what each token earns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import texts
from rlhf_jax.algorithms import tamer
from rlhf_jax.data import batches
from rlhf_jax.data.records import Comparisons
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import Sampling
from rlhf_jax.sampling.decode import Guide

pytestmark = pytest.mark.usefixtures("compile_cache")
RUN = tamer.Config(num_steps=4, batch_size=8, optimizer=tiny.ADAM, save_every=1)


def given(parts, ends, ratings):
    parts, ends, ratings = (jnp.asarray(x) for x in (parts, ends, ratings))
    zeros = jnp.zeros(parts.shape, jnp.int32)
    return tamer.Feedback(
        zeros, zeros, parts, ends.astype(jnp.float32), ratings.astype(jnp.float32)
    )


PARTS = given([[0, 1, 1, 1, 2, 2, 0]], [[0, 0, 0, 1, 0, 1, 0]], [[0, 0, 0, 5, 0, 7, 0]])


def test_the_credit_of_a_part_adds_up_to_one():
    even = tamer.uniform(RUN, PARTS)
    np.testing.assert_allclose(even[0], [0, 1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 0], rtol=1e-6)
    config = dataclasses.replace(RUN, credit_decay=0.5)
    late = tamer.recent(config, PARTS)
    np.testing.assert_allclose(late[0], [0, 1 / 7, 2 / 7, 4 / 7, 1 / 3, 2 / 3, 0], rtol=1e-6)
    latest = tamer.recent(dataclasses.replace(RUN, credit_decay=0.0), PARTS)
    np.testing.assert_array_equal(latest[0], [0, 0, 0, 1, 0, 1, 0])


def test_a_whole_response_is_one_part():
    batch = jax.tree.map(jnp.asarray, ratings().batch(0))
    found = tamer.feedback(batch)
    np.testing.assert_array_equal(found.parts, batch.mask.reshape(found.parts.shape))
    np.testing.assert_array_equal(np.sum(found.ends, axis=1), 1)
    np.testing.assert_array_equal(np.sum(found.ratings, axis=1), batch.scores.reshape(-1))


def test_every_step_is_a_part_with_its_label():
    rows = [{"prompt": "ab", "completions": ["cd", "efg"], "labels": [1.0, 0.0]}]
    examples = batches.steps(rows, tiny.TOKENIZER, 4, 10)
    (batch,) = batches.Loader(examples, 1).epoch_batches()
    found = tamer.feedback(jax.tree.map(jnp.asarray, batch))
    start = int(np.argmax(found.parts[0] > 0))
    # Each step has its separator.
    np.testing.assert_array_equal(found.parts[0, start : start + 7], [1, 1, 1, 2, 2, 2, 2])
    assert not np.any(found.parts[0, :start]) and not np.any(found.parts[0, start + 7 :])
    np.testing.assert_array_equal(tamer.per_part(found.ends, found.parts)[0, :3], [0, 1, 1])
    np.testing.assert_array_equal(tamer.per_part(found.ratings, found.parts)[0, :3], [0, 1, 0])


# ------------------------------------------------------------------------ a linear model of ratings


@pytest.fixture
def features(monkeypatch):
    """(what gives a network with known features [N, T, D], its responses, its true weights)."""
    rng = np.random.default_rng(0)
    count, length, width, vocabulary = 256, 6, 4, 3
    hidden = jnp.asarray(rng.normal(size=(count, length, width)), jnp.float32)
    monkeypatch.setattr(transformer, "hidden_states", lambda model, tokens, attend: hidden)
    tokens = jnp.asarray(rng.integers(0, vocabulary, (count, 1, length)), jnp.int32)
    mask = jnp.ones(tokens.shape).at[..., 0].set(0.0)
    truth = jnp.asarray(rng.normal(size=(width, vocabulary)), jnp.float32)
    # H of token t comes from the features of the token before it.
    earned = jnp.einsum("ntd,dv->ntv", hidden, truth)[:, :-1]
    earned = jnp.take_along_axis(earned, tokens[:, 0, 1:, None], axis=-1)[..., 0]
    scores = jnp.mean(earned, axis=1)
    ones = jnp.ones((count, 1))
    batch = Comparisons(
        tokens, jnp.ones_like(tokens), mask, ones.astype(int), ones, ones[:, 0], scores[:, None]
    )
    shape = dataclasses.replace(tiny.SHAPE, vocab_size=vocabulary, d_model=width)
    return shape, batch, truth


def test_known_weights_are_recovered_from_ratings_of_whole_responses(features, no_shape_checks):
    shape, batch, truth = features

    def loss(kernel):
        network = Model(shape, {"q": {"kernel": kernel}})
        return tamer.loss(RUN, {"network": network}, batch)[0]

    # The loss is a quadratic function of the weights, so one step of Newton's method ends at its
    # least value.
    start = jnp.zeros(truth.shape)
    curvature = jax.hessian(loss)(start).reshape(truth.size, truth.size)
    step = np.linalg.solve(curvature, -np.ravel(jax.grad(loss)(start)))
    np.testing.assert_allclose(step.reshape(truth.shape), truth, atol=1e-3)
    assert loss(truth) < 1e-10


def test_a_rating_teaches_the_tokens_of_its_part_alone(no_shape_checks):
    """The discount is 0: what comes after a part has no share in its error, nor what was before."""

    def predicted(earned):
        credited = jnp.where(PARTS.parts > 0, earned * tamer.uniform(RUN, PARTS), 0.0)
        return tamer.per_part(credited, PARTS.parts)[0]

    gradients = jax.jacobian(predicted)(jnp.ones((1, 7)))[:, 0]
    np.testing.assert_array_equal(gradients[1] > 0, [0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(gradients[2] > 0, [0, 0, 0, 0, 1, 1, 0])
    assert not np.any(gradients[3:])


# ---------------------------------------------------------------------------------------- runs


def ratings(batch_size=8):
    rows = [
        {"prompt": word, "responses": [word + letter * 2 for letter in "xz"], "scores": [1.0, 0.0]}
        for word in tiny.WORDS
    ]
    return batches.Loader(batches.scored(rows, tiny.TOKENIZER, 4, 6), batch_size)


def run(config=RUN, mesh="1x1x1", data=None, **options):
    data = data or ratings(config.batch_size)
    return tamer.run(config, tiny.model(mesh), data, runtime=tiny.runtime(mesh), **options)


def steps(batch_size=8):
    rows = [{"prompt": w, "completions": [w + "xx", "zz"], "labels": [1, 0]} for w in tiny.WORDS]
    return batches.Loader(batches.steps(rows, tiny.TOKENIZER, 4, 10), batch_size)


def test_steps_that_were_rated_well_earn_more():
    result = run(dataclasses.replace(RUN, num_steps=60), data=steps())
    assert result.history[-1]["ratings/error"] < 0.1 < result.history[0]["ratings/error"]


@pytest.mark.parametrize("loss_fn", [tamer.loss, tamer.recent_loss], ids=["uniform", "recent"])
def test_what_was_rated_well_is_written_more_often(loss_fn):
    config = dataclasses.replace(RUN, num_steps=80)
    result = run(config, loss_fn=loss_fn)
    assert result.history[-1]["ratings/error"] < 0.15 < result.history[0]["ratings/error"]
    how = {"sampling": Sampling(max_new_tokens=5), "progress": False, "num_samples": 16}
    guide = Guide(result.network, 20.0)
    found = "".join(texts.generate(tiny.model(), tiny.TOKENIZER, tiny.WORDS, guide=guide, **how))
    assert found.count("x") > 2 * found.count("z")


def test_a_run_is_the_same_on_eight_devices():
    config = dataclasses.replace(RUN, optimizer=dataclasses.replace(tiny.ADAM, eps=1e-3))
    alone, split = run(config), run(config, mesh="2x2x2")
    for name in ("loss", "ratings/error"):
        values = [line[name] for line in alone.history]
        np.testing.assert_allclose([line[name] for line in split.history], values, rtol=1e-4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"tamer\.run"):
        run(data=tiny.demonstrations())
    with pytest.raises(ValueError, match="credit_decay"):
        tamer.Config(credit_decay=1.5)
