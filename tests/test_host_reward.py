"""A reward written in Python: when it runs, what it is given, and how its mistakes are reported."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_rewards

from rlhf_jax import online, sharding
from rlhf_jax.data import batches
from rlhf_jax.data.schema import Example
from rlhf_jax.rewards import combine, host, text
from rlhf_jax.rewards.host import Scored
from rlhf_jax.training.state import TrainingStopped

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
        times = {name: two.pop(name) for name in ("reward/seconds", "reward/waited")}
        assert all(value >= 0 for value in times.values())
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


def test_a_reward_that_fails_in_the_middle_stops_the_run_with_its_name_and_its_own_words():
    calls = []

    def fragile(prompts, responses, rows):
        calls.append(len(responses))
        if len(calls) == 2:
            raise KeyError("no answer for this prompt")
        return [0.0] * len(responses)

    message = (
        r"fragile raised KeyError: 'no answer for this prompt' \(test_host_reward.py:\d+\) on 16 "
        r"responses, the first of them .* to the prompt '\w+'$"
    )
    with pytest.raises(host.RewardFailed, match=re.compile(message, re.DOTALL)) as error:
        run(reward=fragile)
    assert calls == [16, 16]
    assert isinstance(error.value.__cause__, KeyError)


# --------------------------------------------------------------------------- its mistakes, in words


class Texts(NamedTuple):
    """All that a reward in Python is shown of samples."""

    tokens: np.ndarray
    attend: np.ndarray
    mask: np.ndarray


WORDS = ("yes", "no", "perhaps")


def judged(reward, **limit):
    """The scores of three responses to one prompt."""
    return host.scores(reward, tiny.TOKENIZER, EXAMPLES, *samples(), **limit).scores


def samples():
    """(samples, numbers of their prompts): three responses to one prompt."""
    rows = [[ord(c) for c in f"p{word:8}"] for word in WORDS]
    mask = np.array([[0] + [1] * len(word) + [0] * (8 - len(word)) for word in WORDS])
    attend = np.maximum(mask, np.arange(9) == 0)
    return Texts(np.array(rows), attend, mask), np.array([0, 1, 2])


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
        (
            [1.0, float("nan"), 0.0],
            r"exact_match gave nan to response 1 of the batch, 'no' \(row 1\); a rew",
        ),
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


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"short": [1.0]}, r"exact_match, part 'short', returned shape \[1\], but"),
        ({"short": ["a"] * 3}, r"exact_match, part 'short', returned \['a', 'a', 'a'\]; a reward"),
        (
            {"short": [0.0, 0.0, np.inf]},
            "exact_match, part 'short', gave inf to response 2 of the b",
        ),
        ({"waited": [0.0] * 3}, "a part of a reward is named 'waited', but .*; rename it"),
        ({1: [0.0] * 3}, "a part of a reward is named 1, but a name is a text"),
    ],
)
def test_a_part_is_one_finite_number_per_response_too(parts, message):
    with pytest.raises(ValueError, match=message):
        judged(returns(Scored([0.0] * 3, parts)))


def test_a_row_without_the_field_of_the_reference_stops_the_run_in_one_sentence():
    rows = [{"prompt": word, "gold": word} for word in tiny.WORDS]
    examples = batches.prompts(rows, tiny.TOKENIZER, 4)
    reward = combine.weighted({"right": (1.0, text.against(text.exact_match, "answer"))})
    message = r"^exact_match, the row of the prompt '\w+': 'answer' is missing; .* are 'gold'$"
    with pytest.raises(ValueError, match=message):
        run(reward=reward, prompts=batches.Loader(examples, 16))


# -------------------------------------------------------------------------------- sums of rewards


def length(prompts, responses, rows):
    return [len(response) for response in responses]


def says_no(prompts, responses, rows):
    return [response == "no" for response in responses]


def test_a_weighted_sum_reports_its_parts_without_their_weights():
    inner = combine.weighted({"no": (2.0, says_no), "length": (1, length)})
    reward = combine.weighted({"long": (-0.5, length), "inner": (10.0, inner)})
    found = host.scores(reward, tiny.TOKENIZER, EXAMPLES, *samples())
    assert found.scores.tolist() == [-1.5 + 30, -1 + 40, -3.5 + 70]
    assert {name: values.tolist() for name, values in found.parts.items()} == {
        "long": [3, 2, 7],
        "inner": [3, 4, 7],
        "inner/no": [0, 1, 0],
        "inner/length": [3, 2, 7],
    }
    assert host.name_of(reward) == "weighted(long, inner)"


def test_a_run_reports_the_mean_of_every_part():
    seen = []

    def share_of_ascii(prompts, responses, rows):
        seen.append([sum(c.isascii() for c in response) / LONGEST for response in responses])
        return seen[-1]

    parts = {"ascii": (2.0, share_of_ascii), "one": (-1.0, lambda *texts: np.ones(16))}
    history = run(reward=combine.weighted(parts)).history
    for line, scores in zip(history, seen, strict=True):
        assert line["reward/ascii"] == pytest.approx(np.mean(scores), rel=1e-6)
        assert line["reward/one"] == 1
        assert line["objective/scores"] == pytest.approx(2 * np.mean(scores) - 1, abs=1e-6)
        assert 0 <= line["reward/waited"] <= line["reward/seconds"] + 1e-6


def test_parts_that_are_split_over_devices_are_averaged_and_of_times_the_longest_is_told():
    mesh = tiny.mesh("2x2x2")
    parts = {"short": np.arange(8, dtype=np.float32), "seconds": np.arange(8, dtype=np.float32)}
    placed = {name: sharding.put_own_rows(mesh, x, 8) for name, x in parts.items()}
    found = host.report(mesh, placed)
    assert {name: float(x) for name, x in found.items()} == {
        "reward/short": 3.5,
        "reward/seconds": 7,
    }


def test_parts_that_change_between_iterations_are_refused():
    names = iter("aab")

    def reward(prompts, responses, rows):
        return Scored([0.0] * 3, {next(names): [0.0] * 3})

    score = host.for_run(reward, tiny.TOKENIZER, EXAMPLES, None)
    for _ in range(2):
        assert set(score(*samples(), jnp.zeros(1)).parts) == {"a", "seconds", "waited"}
    with pytest.raises(ValueError, match=r"reward reported \['a'\] before, and now \['b'\]"):
        score(*samples(), jnp.zeros(1))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "parts, message",
    [
        ({}, "has no parts; give at least one"),
        ({"a": (float("nan"), length)}, "part 'a' has the weight nan; a weight is finite"),
        ({"a": (float("inf"), length)}, "part 'a' has the weight inf; a weight is finite"),
        ({"a": ("1", length)}, "part 'a' has the weight '1'; a weight is finite"),
        ({"a": length}, r"part 'a' is <function length .*, but a part is \(weight, reward\)"),
        ({"a": (1.0, len)}, r"len is called as len\(prompts, responses, rows\), but"),
        (
            {"seconds": (1.0, length)},
            "named 'seconds', but a name is a text, and seconds and waited",
        ),
        ({"": (1.0, length)}, "a part of a reward is named '', but a name is a text"),
    ],
)
def test_a_sum_that_cannot_be_one_is_refused_when_it_is_made(parts, message):
    with pytest.raises(ValueError, match=message):
        combine.weighted(parts)


# ---------------------------------------------------------------------------------- how long it is


def slow_product(steps):
    """An array that the device needs seconds for; the call only enqueues it."""
    square = jnp.eye(300)
    return jax.jit(lambda x: jax.lax.fori_loop(0, steps, lambda _, y: square @ y, x))(square)


def test_the_device_has_waited_for_what_the_reward_took_after_judge_was_done():
    def reward(prompts, responses, rows):
        time.sleep(0.3)
        return [0.0] * 3

    score = host.for_run(reward, tiny.TOKENIZER, EXAMPLES, None)
    done = jax.block_until_ready(jnp.zeros(1))
    times = {name: x.max() for name, x in score(*samples(), done).parts.items()}
    assert 0.3 <= times["seconds"] and times["seconds"] - 0.1 < times["waited"] <= times["seconds"]

    quick = host.for_run(length, tiny.TOKENIZER, EXAMPLES, None)
    judged = slow_product(1500)
    waited = quick(*samples(), judged).parts["waited"]
    assert not judged.is_ready()  # nothing has waited for it
    assert waited.tolist() == [0, 0, 0]
    judged.block_until_ready()


def test_a_reward_that_hangs_stops_the_run_with_its_name_and_the_limit():
    end = threading.Event()

    def hangs(prompts, responses, rows):
        end.wait(60)

    config = dataclasses.replace(TWO, reward_timeout=0.2)
    message = r"^hangs took longer than reward_timeout=0.2 seconds to score 16 responses; make it f"
    with pytest.raises(TrainingStopped, match=message):
        run(config, reward=hangs)
    end.set()


def test_a_time_limit_changes_nothing_for_a_reward_that_keeps_it():
    assert judged(length, timeout=60.0).tolist() == [3, 2, 7]
    with pytest.raises(ValueError, match="exact_match returned None; a reward returns numbers"):
        judged(returns(None), timeout=60.0)

    def late(prompts, responses, rows):
        raise TimeoutError("no answer from the server")

    with pytest.raises(ValueError, match="late raised TimeoutError: no answer from the server"):
        judged(late, timeout=60.0)


def test_a_limit_that_is_no_time_is_refused():
    for limit in (0, -1.0):
        with pytest.raises(ValueError, match="reward_timeout"):
            dataclasses.replace(TWO, reward_timeout=limit)
    with pytest.raises(ValueError, match="timeout=0.0 must be above 0 seconds"):
        judged(length, timeout=0.0)


# ----------------------------------------------------------------------------------------- a cache


def row(number):
    return Example("p", extra={"id": number})


def test_a_pair_that_was_scored_is_not_scored_again():
    asked = []

    def reward(prompts, responses, rows):
        asked.extend(responses)
        lengths = [len(response) for response in responses]
        return Scored([x + r.extra["id"] for x, r in zip(lengths, rows)], {"length": lengths})

    once = combine.cached(reward)
    one, two = row(100), row(200)
    found = host.call(once, ["p"] * 4, ["a", "bb", "a", "a"], [one, one, one, two])
    assert found.scores.tolist() == [101, 102, 101, 201]  # the second row has the same prompt
    assert found.parts["length"].tolist() == [1, 2, 1, 1]
    assert asked == ["a", "bb", "a"]
    found = host.call(once, ["p", "q", "p"], ["bb", "bb", "ccc"], [one, one, one])
    assert found.scores.tolist() == [102, 102, 103]
    assert asked == ["a", "bb", "a", "bb", "ccc"]  # to another prompt, and a new one
    assert host.name_of(once) == "reward"


def test_a_cache_forgets_what_was_not_used_for_longest():
    asked = []

    def reward(prompts, responses, rows):
        asked.append("".join(responses))
        return [0.0] * len(responses)

    once, one = combine.cached(reward, size=2), row(1)
    for response in ("a", "b", "a", "c", "a", "b"):
        once(["p"], [response], [one])
    assert asked == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="size=0: a cache keeps at least 1 score"):
        combine.cached(reward, size=0)


# ------------------------------------------------------------------------------- several processes


def shared_out(reward, responses):
    return host.call(reward, ["p"] * len(responses), responses, [row(1)] * len(responses))


def test_several_processes_score_what_one_does_in_the_same_order():
    parts = {"length": (1.0, toy_rewards.length), "yes": (5.0, toy_rewards.says_yes)}
    reward = combine.weighted(parts)
    responses = ["yes", *("x" * n for n in range(20)), "yes"]
    shared = combine.in_processes(reward, 2)
    for _ in range(2):
        found, alone = shared_out(shared, responses), shared_out(reward, responses)
        assert found.scores.tolist() == alone.scores.tolist()
        assert found.scores[[0, 3, 21]].tolist() == [3 + 5, 2, 3 + 5]
        assert found.parts["yes"].tolist() == alone.parts["yes"].tolist()

    # A mistake in one of them names the part of the batch, and fresh ones score the next batch.
    with pytest.raises(host.RewardFailed) as error:
        shared_out(shared, [*responses, "raise"])
    message = (
        r"length raised KeyError: 'no answer' \(toy_rewards.py:\d+\) on 2 responses, the first of "
        r"them 'yes' to the prompt 'p'; in another process, responses 21 to 22 of 23$"
    )
    assert re.search(message, str(error.value))
    assert "in length" in str(error.value.__cause__)  # the traceback of the other process
    assert shared_out(shared, ["yes"]).scores.tolist() == [8]


def test_a_process_that_dies_is_said_to_have_died():
    reward = combine.in_processes(toy_rewards.length, 1)
    message = "length: the process that was to score responses 1 to 1 of 2 ended with code 7; what"
    with pytest.raises(host.RewardFailed, match=message):
        shared_out(reward, ["fine", "exit"])


def test_a_program_ends_although_its_reward_hangs_in_another_process():
    """In one call of compiled code, which holds the interpreter of that process."""
    begin = time.perf_counter()
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run(
        [sys.executable, here / "toy_rewards.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == (
        "length took longer than reward_timeout=1 seconds to score 3 responses; make it faster, or "
        "raise the limit\n"
    )
    assert time.perf_counter() - begin < 100


def test_what_cannot_be_sent_to_another_process_is_refused_when_it_is_made():
    message = (
        r"<lambda> cannot be sent to another process \(.*\); define it at the top level of a m"
    )
    with pytest.raises(ValueError, match=message):
        combine.in_processes(lambda prompts, responses, rows: [0.0], 2)
    with pytest.raises(ValueError, match=r"length cannot be sent .* put cached\(\) around"):
        combine.in_processes(combine.cached(length), 2)
    with pytest.raises(ValueError, match="processes=0: at least 1 has to score"):
        combine.in_processes(length, 0)
