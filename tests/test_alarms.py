"""Alarms: each is given by figures that are wrong, and by none that are right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sampling import rollout
from rlhf_jax.training import alarms, report
from rlhf_jax.training.metrics import Display, Log, read_lines

GOOD = {
    "loss": 1.0,
    "objective/kl": 3.0,
    "objective/scores": 0.7,
    "objective/scores_std": 1.0,
    "objective/length": 20.0,
    "objective/eos_share": 0.9,
    "objective/distinct_bigrams": 0.3,
    "objective/token_entropy": 2.0,
    "val/ratio": 1.01,
}


def lines(count=30, **changes):
    """Steps of a run that is well, with a metric that goes from one value to another."""
    found = []
    for i in range(count):
        line = dict(GOOD)
        for name, (first, last) in changes.items():
            line[name.replace("__", "/")] = first if i < count / 2 else last
        found.append(line)
    return found


@pytest.mark.parametrize(
    "name, metric, good, bad",
    [
        ("negative KL", "objective__kl", -0.09, -0.11),
        ("far from the reference", "objective__kl", 19.0, 21.0),
        ("constant reward", "objective__scores_std", 1e-4, 0.0),
        ("length collapsed", "objective__length", 5.1, 4.9),
        ("EOS vanished", "objective__eos_share", 0.46, 0.44),
        ("responses alike", "objective__distinct_bigrams", 0.101, 0.099),
        ("entropy gone", "objective__token_entropy", 0.101, 0.099),
        ("ratio far from 1", "val__ratio", 1.9, 2.1),
        ("ratio far from 1", "val__ratio", 0.51, 0.49),
    ],
)
def test_an_alarm_is_given_on_one_side_of_its_bound_only(name, metric, good, bad):
    first = GOOD[metric.replace("__", "/")]
    assert alarms.of_training(lines()) == []
    assert alarms.of_training(lines(**{metric: (first, good)})) == []
    assert name in [alarm.name for alarm in alarms.of_training(lines(**{metric: (first, bad)}))]


def test_noise_around_zero_is_no_negative_kl():
    found = lines()
    for i, line in enumerate(found):
        line["objective/kl"] = -0.2 + (3.0 if i % 2 else -3.0)
    assert alarms.of_training(found) == []


@pytest.mark.parametrize("score", [0.7, 13.37, -10000 / 3])
@pytest.mark.parametrize("count", [24, 128, 1000])
def test_equal_scores_are_a_constant_reward_though_rounding_gives_them_a_spread(score, count):
    scores = jnp.full(count, score, jnp.float32)
    std = float(jnp.std(scores))
    found = lines(objective__scores=(score, score), objective__scores_std=(std, std))
    (alarm,) = alarms.of_training(found)
    assert alarm.name == "constant reward" and f"its mean is {score:.3g}" in alarm.text
    almost = float(jnp.std(scores.at[0].multiply(1.01)))
    assert alarms.of_training(lines(objective__scores_std=(almost, almost))) == []


def test_a_short_answer_may_be_far_from_the_reference_by_the_token():
    short = {"objective__length": (2.0, 2.0)}
    assert alarms.of_training(lines(**short, objective__kl=(1.0, 19.0))) == []
    (alarm,) = alarms.of_training(lines(**short, objective__kl=(1.0, 21.0)))
    assert alarm.name == "far from the reference"


def test_longer_texts_share_more_pairs_of_tokens_without_being_alike():
    # 6 distinct pairs per response, then 8; then 2, of responses just as long.
    fewer = {"objective__distinct_bigrams": (0.3, 0.08)}
    assert alarms.of_training(lines(**fewer, objective__length=(20.0, 100.0))) == []
    (alarm,) = alarms.of_training(lines(**fewer, objective__length=(20.0, 25.0)))
    assert alarm.name == "responses alike"


def test_the_first_alarm_can_be_given_after_ten_steps():
    collapsing = lines(10, objective__length=(20.0, 1.0), objective__kl=(0.1, 0.1))
    assert alarms.of_training(collapsing[:9]) == []
    assert [alarm.name for alarm in alarms.of_training(collapsing)] == ["length collapsed"]


def test_an_alarm_costs_no_more_in_a_long_run():
    class Counted(list):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            read.append(len(found) if isinstance(index, slice) else 1)
            return found

        def __iter__(self):
            raise AssertionError("all lines are read")

    reads = {}
    for count in (100, 3000):
        read = []
        alarms.of_training(Counted(lines(count)))
        reads[count] = sum(read)
    assert reads[100] == reads[3000]


def test_few_responses_that_ended_at_first_give_no_alarm_of_ends():
    assert alarms.of_training(lines(objective__eos_share=(0.1, 0.0))) == []


@pytest.mark.parametrize("held_out, expected", [(1.09, []), (1.11, ["overfitted"])])
def test_a_held_out_loss_that_rises_while_the_other_falls_is_overfitting(held_out, expected):
    found = lines(loss=(1.0, 0.5))
    for i, value in ((9, 1.2), (14, 1.0), (29, held_out)):
        found[i]["eval/loss"] = value
    assert [alarm.name for alarm in alarms.of_training(found)] == expected
    assert alarms.of_training(found[:-1]) == []  # only where it was just evaluated


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.36, 0.92, "cannot be told from chance"),
        (0.1, 0.4, "worse than chance"),
        (0.51, 0.9, None),
    ],
)
def test_a_reward_model_that_may_be_chance_gives_an_alarm(low, high, said):
    figures = {"eval_accuracy": 0.714, "eval_accuracy_low": low, "eval_accuracy_high": high}
    found = alarms.of_accuracy(figures)
    assert [said in alarm.text for alarm in found] == ([True] if said else [])
    assert alarms.of_accuracy({"eval_loss": 1.0}) == []


def test_an_alarm_is_given_once_on_the_console_in_its_file_and_first_in_the_report(
    tmp_path, capsys
):
    display = Display("Policy", ("loss",), {})
    collapsing = lines(40, objective__length=(20.0, 1.0), objective__kl=(0.1, 0.1))
    for start, end in ((0, 35), (32, 40)):  # the second process repeats three steps
        with Log(tmp_path).stage("ppo", 40, start=start, display=display) as stage:
            for i in range(start, end):
                stage.write(i, collapsing[i])
    out = capsys.readouterr().out
    assert out.count("ALARM  ppo, step 28: length collapsed: responses had 20 tokens") == 1
    assert out.count("ALARM") == 1
    counts = [line.get("alarms") for line in read_lines(tmp_path / "metrics.jsonl")]
    assert counts == [None] * 27 + [1.0] * 13
    Log(tmp_path).repeat_alarms()
    assert capsys.readouterr().out.startswith("ALARM  ppo, step 28: length collapsed: responses")
    (line,) = map(json.loads, (tmp_path / "alarms.jsonl").read_text().splitlines())
    assert (line["stage"], line["step"], line["name"]) == ("ppo", 27, "length collapsed")
    page = report.write(tmp_path).read_text()
    card = page.index("<h3>Alarms</h3>")
    assert "responses had 20 tokens" in page[card:] and 'class="card"' not in page[:card]


def test_a_repeated_step_gives_its_alarm_again(tmp_path, capsys):
    collapsing = lines(40, objective__length=(20.0, 1.0), objective__kl=(0.1, 0.1))
    for start in (0, 20):
        with Log(tmp_path).stage("ppo", 40, start=start) as stage:
            for i in range(start, 40):
                stage.write(i, collapsing[i])
    assert capsys.readouterr().out.count("ALARM") == 2
    assert len((tmp_path / "alarms.jsonl").read_text().splitlines()) == 1


def test_an_alarm_of_held_out_figures_is_given_anew_by_each_process_and_withdrawn(tmp_path):
    chance = {"eval_accuracy": 0.7, "eval_accuracy_low": 0.4, "eval_accuracy_high": 0.9}
    better = chance | {"eval_accuracy_low": 0.51}
    for figures, expected in ((chance, ["chance"]), (chance, ["chance"]), (better, [])):
        log = Log(tmp_path)  # of a process that goes on after the stage
        log.withdraw("judge", alarms.CHANCE)
        for alarm in alarms.of_accuracy(figures):
            log.alarm("judge", 119, alarm)
        assert [line["name"] for line in read_lines(tmp_path / "alarms.jsonl")] == expected


@pytest.mark.parametrize("vocabulary", [3, 40, 30000])
def test_distinct_pairs_of_tokens_are_counted_within_responses(vocabulary):
    rng = np.random.default_rng(vocabulary)
    tokens = rng.integers(0, vocabulary, (16, 30))
    lengths = rng.integers(1, 25, 16)
    mask = (np.arange(30) >= 5) & (np.arange(30) < 5 + lengths[:, None])
    pairs = [
        (int(row[t]), int(row[t + 1]))
        for row, kept in zip(tokens, mask)
        for t in range(29)
        if kept[t] and kept[t + 1]
    ]
    found = rollout.distinct_bigrams(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, jnp.float32))
    np.testing.assert_allclose(found, len(set(pairs)) / len(pairs), rtol=0.02)


def test_without_a_pair_the_share_of_distinct_ones_is_0():
    mask = jnp.zeros((2, 4)).at[:, 2].set(1.0)
    assert float(jax.jit(rollout.distinct_bigrams)(jnp.ones((2, 4), jnp.int32), mask)) == 0.0
