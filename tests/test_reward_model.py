"""The losses a reward model is trained with, on scores that are given: each against its formula."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import batches, mixing
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.models import heads, transformer

BYTES = byte_tokenizer()
CONFIG = reward_model.Config()
SCORES = jnp.asarray([[0.3, -0.2, 0.9], [1.0, 0.4, 0.0]])
ROWS = [
    {"prompt": "p", "responses": ["a", "b", "c"], "scores": [4, 8, 6]},
    {"prompt": "q", "responses": ["d", "e"], "scores": [2, 1]},
]


def one_batch(examples):
    (batch,) = Loader(examples, len(examples), shuffle=False).epoch_batches()
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture
def given(monkeypatch):
    """The scorer says SCORES, whatever it reads."""
    monkeypatch.setattr(
        reward_model, "score_batch", lambda scorer, batch, *_: SCORES[:, : batch.present.shape[1]]
    )
    return {"scorer": None}


def ranked(rows=ROWS):
    return one_batch(batches.comparisons(rows, BYTES, 4, 4))


def nll(gap: float) -> float:
    return math.log1p(math.exp(-gap))


def test_scores_of_the_data_reach_the_batch_with_the_ranks_that_follow():
    batch = ranked()
    assert batch.scores.tolist() == [[4, 8, 6], [2, 1, 0]]
    assert batch.ranks.tolist() == [[2, 0, 1], [0, 1, 0]]
    assert batch.present.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_ranks_stand_in_for_scores_that_no_row_gives():
    rows = [{"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [0, 3, 1, 3]}]
    np.testing.assert_allclose(ranked(rows).scores, [[1, 0, 2 / 3, 0]])
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert ranked([pair]).scores.tolist() == [[1, 0]]
    assert ranked([pair, ROWS[0]]).scores is None  # some rows give scores, some do not


def test_the_margin_of_a_pair_is_the_gap_of_its_ratings(given):
    value, metrics = reward_model.rating_gap_loss(CONFIG, given, ranked())
    s = SCORES[0]
    first = [nll(s[1] - s[2] - 2), nll(s[1] - s[0] - 4), nll(s[2] - s[0] - 2)]
    assert float(value) == pytest.approx((np.mean(first) + nll(0.6 - 1)) / 2, rel=1e-5)
    assert float(metrics["num_pairs"]) == 4
    plain, _ = reward_model.loss(CONFIG, given, ranked())
    assert float(plain) < float(value)


def test_plackett_luce_is_the_likelihood_of_the_ranking(given):
    value, _ = reward_model.plackett_luce_loss(CONFIG, given, ranked())
    e = np.exp(np.asarray(SCORES[0], np.float64))
    chance = e[1] / e.sum() * e[2] / (e[2] + e[0])
    assert float(value) == pytest.approx((-math.log(chance) + nll(0.6)) / 2, rel=1e-5)


def test_regression_is_the_mean_square_over_responses_and_reports_the_same_metrics(given):
    value, metrics = reward_model.regression_loss(CONFIG, given, ranked())
    squares = [(0.3 - 4) ** 2, (-0.2 - 8) ** 2, (0.9 - 6) ** 2, (1 - 2) ** 2, (0.4 - 1) ** 2]
    assert float(value) == pytest.approx(np.mean(squares), rel=1e-5)
    _, of_ranks = reward_model.loss(CONFIG, given, ranked())
    assert metrics.keys() == of_ranks.keys()
    assert float(metrics["rewards/accuracies"]) == pytest.approx(0.5)


def test_single_labelled_answers_and_ties_serve_as_targets_but_make_no_pair(given):
    rows = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
    ]
    examples = batches.scored(rows, BYTES, 4, 4)
    assert one_batch(examples).scores.tolist() == [[1], [0]]
    value, metrics = reward_model.regression_loss(CONFIG, given, one_batch(examples))
    assert float(value) == pytest.approx(((0.3 - 1) ** 2 + 1.0) / 2, rel=1e-5)
    assert float(metrics["num_pairs"]) == 0
    tied = [{"prompt": "p", "responses": ["a", "b"], "scores": [5, 5]}, ROWS[1]]
    assert len(batches.scored(tied, BYTES, 4, 4)) == 2
    dropped = batches.comparisons(tied, BYTES, 4, 4).counts.dropped
    assert dropped == {batches.NO_PAIR: 1}


def test_ratings_that_only_some_rows_give_are_refused(given):
    mixed = ranked([{"prompt": "p", "chosen": "a", "rejected": "b"}, ROWS[0]])
    for loss in (reward_model.regression_loss, reward_model.rating_gap_loss):
        with pytest.raises(ValueError, match="which only some rows of the dataset have; give ev"):
            loss(CONFIG, given, mixed)
    reward_model.loss(CONFIG, given, mixed)


def test_the_held_out_loss_is_the_plain_rank_loss_whatever_trained_the_scorer():
    scorer = heads.init_scorer(tiny.model(), jax.random.key(7))

    def held_out(centring_coef, **margin):
        pairs = [{"prompt": w, "chosen": w[::-1], "rejected": w, **margin} for w in tiny.WORDS]
        loader = Loader(batches.comparisons(pairs, BYTES, 4, 4), 8)
        config = reward_model.Config(centring_coef=centring_coef)
        scores = reward_model.score_all(scorer, loader, mesh=tiny.mesh())["scores"]
        return reward_model.evaluate(config, scorer, loader, mesh=tiny.mesh()), scores

    figures, scores = held_out(centring_coef=5.0, margin=3.0)
    losses = [nll(float(chosen - rejected)) for chosen, rejected in scores]
    assert len(losses) == 12  # of two batches, the second one padded
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(np.mean(scores[:, 0] > scores[:, 1]))
    assert held_out(centring_coef=0.0)[0] == figures


def test_training_a_scorer_again_goes_on_with_its_head():
    scorer = heads.init_scorer(tiny.model(), jax.random.key(7))
    bias = {**scorer.weights["score"], "bias": jnp.array([0.25])}
    scorer = transformer.Model(scorer.config, {**scorer.weights, "score": bias})
    slow = dataclasses.replace(tiny.ADAM, learning_rate=1e-12)
    config = dataclasses.replace(tiny.REWARD_MODEL, num_steps=1, optimizer=slow, seed=3)
    again = reward_model.run(config, scorer, tiny.comparisons(), runtime=tiny.runtime()).scorer
    same = functools.partial(np.testing.assert_allclose, atol=1e-9)
    jax.tree.map(same, again, scorer)
    both_heads = transformer.Model(scorer.config, {**tiny.model().weights, "score": bias})
    kept = heads.init_scorer(both_heads, jax.random.key(0))
    assert kept.weights["score"] is bias and "head" not in kept.weights


def test_packed_rows_are_refused_where_each_document_is_to_have_a_score():
    rows = [{"prompt": "p", "completion": x} for x in "abc"]
    packed = mixing.pack(batches.demonstrations(rows, BYTES, 4, 8))
    with pytest.raises(ValueError, match="packed rows hold several documents; centre on the demo"):
        reward_model.centre(transformer.Model(tiny.SHAPE, {}), Loader(packed, 1))
