"""What is measured of a policy: its numbered answers, their figures, and two policies compared."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import evaluation
from rlhf_jax.evaluation import Evaluation, Exam
from rlhf_jax.models import heads
from rlhf_jax.sampling import Drawing, Sampling
from rlhf_jax.sampling import rollout as rollouts
from rlhf_jax.training.metrics import Log

pytestmark = pytest.mark.usefixtures("compile_cache")

SAMPLING = Sampling(max_new_tokens=6, temperature=0.8)


def count_vowels(prompt, response):
    return float(sum(c in "aeiou" for c in response))


def make_exam(mesh="1x1x1", batch_size=8, **changes):
    """Twelve prompts, so that the last batch of eight has padding rows."""
    policy = tiny.model(mesh)
    fields = {
        "prompts": tiny.prompts(batch_size),
        "tokenizer": tiny.TOKENIZER,
        "sampling": SAMPLING,
        "reference": policy,
        "scorer": heads.init_scorer(policy, jax.random.key(7)),
        "gold": count_vowels,
        "seed": 5,
        "mesh": tiny.mesh(mesh),
    }
    return Exam(**fields | changes)


@pytest.fixture(scope="module")
def exam():
    return make_exam()


@pytest.fixture(scope="module")
def other():
    """A policy that is not the reference."""
    return tiny.model(seed=1)


@pytest.fixture(scope="module")
def answers(exam, other):
    return [evaluation.answer(exam, other, number) for number in range(3)]


# -------------------------------------------------------------------------------- numbered answers


def test_every_prompt_is_answered_once_in_the_order_of_the_data(exam, answers):
    prompts, responses = rollouts.texts(exam.tokenizer, answers[0])
    assert prompts == tiny.WORDS and len(responses) == 12
    lengths = answers[0].mask.sum(axis=1)
    np.testing.assert_array_equal(answers[0].lengths, lengths)
    assert lengths.min() >= 1 and lengths.max() <= SAMPLING.max_new_tokens


def test_answer_k_is_sample_k_of_the_prompt_and_another_number_is_another_answer(
    exam, other, answers
):
    """The numbers are those of a run with several samples per prompt, under the exam's key."""
    key = jax.random.fold_in(jax.random.key(exam.seed), 2**31 - 1)
    batch = exam.prompts.epoch_batches()[0]
    three = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), batch)
    sample = functools.partial(
        rollouts.sample, sampling=SAMPLING, drawing=Drawing(exam.tokenizer.ends)
    )
    samples, index = jax.jit(sample)(other, three, key)
    np.testing.assert_array_equal(index, np.repeat(np.arange(8), 3))
    for number, found in enumerate(answers):
        np.testing.assert_array_equal(samples.tokens[number::3], found.tokens[:8])
    one, two, three = (found.tokens for found in answers)
    assert (one != two).any(axis=1).sum() >= 10 and (two != three).any(axis=1).sum() >= 10


@pytest.mark.parametrize("batch_size, mesh", [(4, "1x1x1"), (24, "1x1x1"), (8, "2x2x2")])
def test_an_answer_does_not_depend_on_batches_or_devices(answers, batch_size, mesh):
    exam = make_exam(mesh, batch_size)
    found = evaluation.answer(exam, tiny.model(mesh, seed=1), number=1)
    np.testing.assert_array_equal(found.tokens, answers[1].tokens)
    np.testing.assert_allclose(found.scores, answers[1].scores, rtol=1e-4, atol=1e-5)


def test_another_seed_answers_otherwise_and_the_same_seed_the_same(exam, other, answers):
    again = evaluation.answer(exam, other, number=0)
    np.testing.assert_array_equal(again.tokens, answers[0].tokens)
    found = evaluation.answer(exam._replace(seed=6), other, number=0)
    assert (found.tokens != answers[0].tokens).any(axis=1).sum() >= 10


def test_temperature_0_answers_with_one_voice(exam, other):
    greedy = exam._replace(sampling=Sampling(max_new_tokens=6, temperature=0.0))
    one, two = (evaluation.answer(greedy, other, number) for number in (0, 1))
    np.testing.assert_array_equal(one.tokens, two.tokens)


# ------------------------------------------------------------------------------ texts and figures


def test_the_figures_of_answers_are_sums_over_their_tokens(exam, answers):
    found, raw = evaluation.assess(exam, answers[0]), answers[0]
    for i, (prompt, response) in enumerate(zip(found.prompts, found.responses)):
        active = raw.mask[i] > 0
        own, reference = raw.logprobs[i][active].sum(), raw.ref_logprobs[i][active].sum()
        assert found.kl[i] == pytest.approx(own - reference, rel=1e-4, abs=1e-5)
        assert found.reference_nats[i] == pytest.approx(-reference, rel=1e-4)
        assert found.gold[i] == count_vowels(prompt, response)
    assert found.scores is raw.scores and found.kl.max() > 0
    mean = evaluation.figures(found)
    assert mean == {
        "gold": pytest.approx(found.gold.mean()),
        "score": pytest.approx(raw.scores.mean()),
        "kl": pytest.approx(found.kl.mean()),
        "length": pytest.approx(raw.lengths.mean()),
    }


def test_answers_become_samples_of_the_ids_that_were_drawn(answers):
    draws = answers[:2]
    count = len(draws[0].tokens)
    scores = np.stack([np.arange(count), np.full(count, 2.0)], axis=1)
    for i, sample in enumerate(evaluation.sampled(draws, scores)):
        for draw, response in zip(draws, sample.responses):
            together = [*sample.prompt, *response]
            assert together == draw.tokens[i][draw.attend[i] > 0].tolist()
            assert len(response) == draw.lengths[i]
        assert sample.scores == [i, 2.0]
        assert sample.ranks == ([0, 1] if i >= 2 else [1, 0])


def test_a_policy_has_no_kl_to_itself(exam):
    found = evaluation.evaluate(exam, exam.reference)
    np.testing.assert_allclose(found.kl, 0, atol=1e-4)


def test_without_gold_none_is_reported(exam, other):
    found = evaluation.evaluate(exam._replace(gold=None), other)
    assert found.gold is None and "gold" not in evaluation.figures(found)
    summary = evaluation.summarise(evaluation.Comparison(found, found, found))
    assert not [name for name in summary if "gold" in name]


def test_an_exam_may_be_scored_by_any_function_on_the_device(exam, other):
    found = evaluation.answer(exam._replace(score=tiny.share_below_128, scorer=None), other)
    expected = ((found.tokens < 128) * found.mask).sum(1) / found.mask.sum(1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)


def test_an_exam_may_be_scored_by_a_function_in_python(exam, other, answers):
    def vowels(prompts, responses, rows):
        assert prompts == tiny.WORDS == [row.prompt for row in rows]
        return [count_vowels(*pair) for pair in zip(prompts, responses)]

    found = evaluation.evaluate(exam._replace(reward=vowels, scorer=None, gold=None), other)
    again = evaluation.assess(exam, answers[0])
    assert found.responses == again.responses
    np.testing.assert_array_equal(found.scores, again.gold)
    np.testing.assert_allclose(found.kl, again.kl, atol=1e-5)


# ------------------------------------------------------------------------------- two policies


@pytest.fixture(scope="module")
def comparison(exam, other):
    return evaluation.compare(exam, exam.reference, other, best_of=3)


def test_both_policies_are_asked_the_same_and_all_answers_count(exam, other, comparison):
    before, after, best = comparison
    assert before.prompts == after.prompts == tiny.WORDS * 3 and best.prompts == tiny.WORDS
    for number in range(3):
        rows = slice(12 * number, 12 * number + 12)
        alone = evaluation.evaluate(exam, other, number)
        assert after.responses[rows] == alone.responses
        np.testing.assert_array_equal(after.kl[rows], alone.kl)


def test_best_of_n_is_the_answer_that_the_reward_likes_most(comparison):
    before, _, best = comparison
    scores = before.scores.reshape(3, 12)
    np.testing.assert_array_equal(best.scores, scores.max(axis=0))
    for i, (score, response) in enumerate(zip(best.scores, best.responses)):
        k = scores[:, i].tolist().index(score)
        assert response == before.responses[12 * k + i]
        assert best.gold[i] == before.gold[12 * k + i]


def test_a_summary_holds_the_means_before_and_after(comparison):
    before, after, best = comparison
    found = evaluation.summarise(comparison)
    assert found["best_of"] == 3
    for name, part in (("before", before), ("after", after), ("best_of_n", best)):
        assert found[f"gold_{name}"] == pytest.approx(part.gold.mean())
        assert found[f"score_{name}"] == pytest.approx(part.scores.mean())
    assert found["kl"] == pytest.approx(after.kl.mean())
    assert found["length_after"] == pytest.approx(after.lengths.mean())
    # Words of one answer to each prompt, so that more answers do not lower the share.
    once = evaluation.distinct_bigrams(after.responses[:12])
    assert found["distinct_bigrams_after"] == once


def test_samples_are_shown_side_by_side_with_the_figure_that_nobody_trained_on(tmp_path):
    def one(name, value):
        numbers = np.array([value])
        return Evaluation(["p"], [name], numbers, numbers + 1, numbers, numbers, numbers)

    log, parts = Log(tmp_path, quiet=True), [one("a", 0.5), one("b", 1.25), one("a", 0.5)]
    evaluation.show(log, evaluation.Comparison(*parts), num_shown=9)
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    shown = {"prompt": "p", "before": "a", "after": "b", "gold before": 0.5, "gold after": 1.25}
    assert json.loads(line) == {"stage": "evaluation", "step": 0, **shown}


def test_figures_of_a_stage_are_named_as_held_out():
    assert evaluation.held_out({"loss": 1.0}) == {"eval_loss": 1.0}


def test_nothing_is_compiled_for_another_number_policy_or_temperature(exam, other, caplog):
    evaluation.answer(exam, other)
    changed = exam._replace(sampling=Sampling(max_new_tokens=6, temperature=1.1))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        evaluation.answer(changed, tiny.model(seed=2), number=9)
    lines = [record.getMessage() for record in caplog.records]
    assert not [line for line in lines if "Finished XLA compilation of jit(_answer)" in line]
    assert jnp.isfinite(evaluation.answer(changed, other).scores).all()
