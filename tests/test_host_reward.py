"""A reward written in Python: when it runs, what it is given, and how its mistakes are reported."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import online
from rlhf_jax.data import batches
from rlhf_jax.rewards import host

pytestmark = pytest.mark.usefixtures("compile_cache")

TWO = dataclasses.replace(tiny.PPO, num_iterations=2, num_epochs=1, num_minibatches=1)
LONGEST = TWO.sampling.max_new_tokens
EXAMPLES = batches.prompts([{"prompt": "p", "answer": "yes"}], tiny.TOKENIZER, 4)


def run(config=TWO, **reward):
    return tiny.run_ppo(config, critic=None, **{"score": None, "scorer": None} | reward)


# --------------------------------------------------------------------------------- while it runs


def test_the_reward_starts_before_the_reference_is_waited_for(monkeypatch):
    """The reference is made to take seconds, and is still being computed when the reward starts."""
    judge, compile_programs = online.judge, online.compile_programs
    judged, events = [], []

    def slow_judge(*args):
        rollout = judge(*args)
        square = jnp.eye(300)
        product = jax.lax.fori_loop(0, 1500, lambda _, x: square @ x, square * rollout.scores[0])
        return rollout._replace(ref_logprobs=rollout.ref_logprobs + product[0, 1])

    def watched_programs(*args):
        programs = compile_programs(*args)

        def watched(*args):
            judged.append(programs.judge(*args))
            return judged[-1]

        return programs._replace(judge=watched)

    def reward(prompts, responses, rows):
        events.append("ready" if judged[-1].ref_logprobs.is_ready() else "still computed")
        return [0.0] * len(responses)

    monkeypatch.setattr(online, "judge", slow_judge)
    monkeypatch.setattr(online, "compile_programs", watched_programs)
    run(reward=reward)
    assert events == ["still computed"] * 2


def test_the_same_reward_on_the_device_and_in_python_gives_the_same_run():
    def on_device(params, tokens, attend, mask):
        return jnp.sum((tokens < 128) * mask, axis=1) / LONGEST

    def in_python(prompts, responses, rows):
        # Bytes of 128 and more make no ASCII character, whatever stands around them.
        return [sum(c.isascii() for c in response) / LONGEST for response in responses]

    device, python = run(score=on_device), run(reward=in_python)
    assert tiny.equal((device.policy, device.critic), (python.policy, python.critic))
    for one, two in zip(device.history, python.history):
        # The model FLOPs too: a reward that is no model has none.
        assert tiny.untimed(one) == tiny.untimed(two)
    assert 0 < device.history[1]["objective/scores"] < 1


def test_the_reward_reads_texts_beside_the_rows_of_the_file_that_they_answer():
    rows = [{"prompt": word, "answer": word.upper(), "id": i} for i, word in enumerate(tiny.WORDS)]
    examples = batches.prompts(rows, tiny.TOKENIZER, 4)
    seen = []

    def reward(prompts, responses, rows):
        seen.append((prompts, responses, rows))
        return np.zeros(len(responses))

    run(reward=reward, prompts=batches.Loader(examples, 16))
    assert len(seen) == 2
    for prompts, responses, found in seen:
        assert len(prompts) == len(responses) == len(found) == 16
        assert all(isinstance(response, str) for response in responses)
        for prompt, row in zip(prompts, found):
            # There are twelve prompts, so that a batch of sixteen holds some of two epochs.
            assert row.prompt == prompt
            assert row.extra == {"answer": prompt.upper(), "id": tiny.WORDS.index(prompt)}
    assert {prompt for prompts, _, _ in seen for prompt in prompts} == set(tiny.WORDS)


def test_a_reward_that_fails_in_the_middle_stops_the_run_with_its_own_words():
    calls = []

    def fragile(prompts, responses, rows):
        calls.append(len(responses))
        if len(calls) == 2:
            raise KeyError("no answer for this prompt")
        return [0.0] * len(responses)

    with pytest.raises(KeyError, match="no answer for this prompt"):
        run(reward=fragile)
    assert calls == [16, 16]


# --------------------------------------------------------------------------- its mistakes, in words


class Texts(NamedTuple):
    """All that a reward in Python is shown of samples."""

    tokens: np.ndarray
    attend: np.ndarray
    mask: np.ndarray


WORDS = ("yes", "no", "perhaps")


def judged(reward):
    """The scores of three responses to one prompt."""
    rows = [[ord(c) for c in f"p{word:8}"] for word in WORDS]
    mask = np.array([[0] + [1] * len(word) + [0] * (8 - len(word)) for word in WORDS])
    attend = np.maximum(mask, np.arange(9) == 0)
    samples = Texts(np.array(rows), attend, mask)
    return host.scores(reward, tiny.TOKENIZER, EXAMPLES, samples, np.array([0, 1, 2]))


def test_any_sequence_of_numbers_is_a_reward():
    def length(prompts, responses, rows):
        assert prompts == ["p"] * 3 and tuple(responses) == WORDS
        assert [row.extra["answer"] for row in rows] == ["yes"] * 3
        return [len(response) for response in responses]

    for found in (list, tuple, np.array, jnp.array):
        scores = judged(lambda *texts, found=found: found(length(*texts)))
        assert scores.dtype == np.float32 and scores.tolist() == [3, 2, 7]
    assert judged(lambda p, r, rows: [x == "no" for x in r]).tolist() == [0, 1, 0]


def returns(found):
    def exact_match(prompts, responses, rows):
        return found

    return exact_match


@pytest.mark.parametrize(
    "found, message",
    [
        ([1.0, 2.0], r"exact_match returned shape \[2\], but .* one number per response.*= \[3\]"),
        ([[1.0], [2.0], [3.0]], r"exact_match returned shape \[3, 1\], but"),
        (2.5, r"exact_match returned shape \[\], but"),
        ([1.0, float("nan"), 0.0], "exact_match gave nan to response 1 of the batch, 'no'; a rew"),
        ([1.0, 0.0, float("inf")], "exact_match gave inf to response 2 of the batch, 'perhaps'"),
        (["good", "bad", "good"], r"exact_match returned \['good', 'bad', 'good'\]; a reward re"),
        (["1", "2", "3"], r"exact_match returned \['1', '2', '3'\]; a reward returns numbers"),
        ([1.0, None, 0.0], r"exact_match returned \[1.0, None, 0.0\]; a reward returns numbers"),
        ([[1.0], [1.0, 2.0], []], "exact_match returned .*; a reward returns numbers"),
        (None, "exact_match returned None; a reward returns numbers"),
    ],
)
def test_a_reward_that_gives_no_number_per_response_is_named(found, message):
    with pytest.raises(ValueError, match=message):
        judged(returns(found))


def test_a_long_wrong_answer_is_shown_by_its_beginning():
    with pytest.raises(ValueError) as error:
        judged(returns(["word"] * 1000))
    assert len(str(error.value)) < 200


def test_a_function_of_other_arguments_is_refused_before_anything_is_compiled():
    def of_two(prompts, responses):
        return [0.0] * len(responses)

    def of_four(prompts, responses, rows, scale):
        return [0.0] * len(responses)

    message = r"of_two is called as of_two\(prompts, responses, rows\), but too many positional"
    with pytest.raises(ValueError, match=message):
        run(reward=of_two)
    with pytest.raises(ValueError, match="of_four is called as .* missing a required arg.*'scale'"):
        run(reward=of_four)
    host.check_arguments(lambda *texts: texts, "prompts", "responses", "rows")


@pytest.mark.parametrize("other", ["score", "scorer"])
def test_two_rewards_at_once_are_refused(other):
    with pytest.raises(ValueError, match="a reward in Python, or a score on the device"):
        run(reward=returns([0.0]), **{other: tiny.share_below_128})
