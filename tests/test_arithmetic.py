"""Sums in words: what levels, splits and the checker promise, and the experiment on them."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny

from rlhf_jax import launch, sharding
from rlhf_jax.data import batches
from rlhf_jax.data.schema import Example
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import arithmetic

ONE_DEVICE = ["--mesh", "data=1,fsdp=1,tensor=1"]
ALL = (1, 2, 3, 4)
ONE_DIGIT = [(a, b) for a in range(1, 10) for b in range(-a, 10) if b]  # level 1, all of it


def read(prompt):
    """The signed numbers of a prompt, by the words before and after them."""
    story, question = prompt.split(". ")
    assert question.startswith("How many ") and question.endswith("?\n")
    numbers = []
    for clause in re.split(r", | and ", story):
        (number,) = re.findall(r"\d+", clause)
        verb = clause.split(number)[0].strip().split(" ")[-1]
        sign = {"away": -1, "loses": -1, "sells": -1, "buys": 1, "finds": 1, "gets": 1}
        assert numbers or verb in ("has", "owns", "with")
        assert not numbers or clause.endswith(" more") == (sign[verb] > 0)
        numbers.append(int(number) * (sign[verb] if numbers else 1))
    return numbers


@pytest.fixture(scope="module")
def rows():
    """Four hundred prompts of each level in each part, as (part, prompt, answer, level)."""
    return [
        (held_out, row["prompt"], row["answer"], row["level"])
        for held_out in (False, True)
        for row in arithmetic.prompts(3, 400, held_out=held_out)
    ]


# ------------------------------------------------------------------------------------- the problems


def test_every_answer_is_what_the_words_say(rows):
    assert len(rows) == 2 * 4 * 400
    for _, prompt, answer, _ in rows:
        assert sum(read(prompt)) == answer


def test_every_demonstration_calculates_step_by_step_from_the_words():
    found = arithmetic.demonstrations(3, 400)
    for prompt, completion in ((row["prompt"], row["completion"]) for row in found):
        first, *changes = read(prompt)
        steps = completion.split(" ")
        assert len(steps) == len(changes)
        for step, change in zip(steps, changes):
            assert re.fullmatch(r"\d+[+-]\d+=\d+", step)
            left, right = step.split("=")
            a, b = re.fullmatch(r"(\d+)([+-]\d+)", left).groups()
            assert (int(a), int(b)) == (first, change) and int(a) + int(b) == int(right)
            first = int(right)
        assert arithmetic.answer(completion) == first


def test_levels_have_the_changes_and_digits_that_they_promise_and_never_go_below_zero(rows):
    promised = {1: (1, 1), 2: (2, 1), 3: (1, 2), 4: (2, 2)}
    assert [row[3] for row in rows] == [1, 2, 3, 4] * 800
    losses = dict.fromkeys(ALL, 0)
    for _, prompt, _, level in rows:
        numbers = read(prompt)
        changes, digits = promised[level]
        assert len(numbers) == 1 + changes
        assert {len(str(abs(number))) for number in numbers} == {digits}
        assert np.all(np.cumsum(numbers) >= 0)
        losses[level] += sum(number < 0 for number in numbers)
    for level, count in losses.items():  # gains and losses are about as likely
        assert 0.4 < count / (800 * promised[level][0]) <= 0.55


def test_the_docstring_shows_what_the_task_makes():
    shown = [line.strip() for line in arithmetic.__doc__.splitlines()]
    examples = [line for line in shown if "How many" in line]
    assert len(examples) == 4
    for level, line in enumerate(examples, 1):
        changes, digits = arithmetic.LEVELS[level]
        table, prompt = re.match(r"([\d ]+)\s{2}(\D.*)", line).groups()
        assert table.split() == [str(level), str(changes), str(digits)]
        assert shown[shown.index(line) + 1] == arithmetic.working(read(prompt + "\n"))


def test_texts_take_as_many_bytes_as_the_docstring_says():
    longest = "Max starts with 99 shells, gives away 44 and gives away 55. How many shells now?\n"
    assert read(longest) == [99, -44, -55] and len(longest) == 81
    assert len(arithmetic.working((99, 99, 99)) + "E") == 21
    for row in arithmetic.demonstrations(0, 2000, (2, 4)):
        assert len(row["prompt"].encode()) <= 81 and len(row["completion"]) <= 20
    words = " ".join(arithmetic.__doc__.split())
    assert "at most 81 tokens" in words and "at most 21, its EOS included" in words


# ---------------------------------------------------------------------------------------- the split


def test_a_held_out_sum_is_in_no_training_prompt_of_any_seed(rows):
    parts = {False: set(), True: set()}
    for held_out, prompt, _, _ in rows:
        parts[held_out].add(tuple(read(prompt)))
    for seed in (0, 1):
        for row in arithmetic.demonstrations(seed, 200) + arithmetic.prompts(seed, 200):
            parts[False].add(tuple(read(row["prompt"])))
        for row in arithmetic.demonstrations(seed, 200, held_out=True):
            parts[True].add(tuple(read(row["prompt"])))
    assert not parts[False] & parts[True]
    assert min(map(len, parts.values())) > 1000


def test_one_sum_in_five_is_held_out():
    assert len(ONE_DIGIT) == 126  # 81 gains and 45 losses
    assert sum(map(arithmetic.is_held_out, ONE_DIGIT)) == 26
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert 0.19 < np.mean([arithmetic.is_held_out(pair) for pair in pairs]) < 0.21


def test_as_many_prompts_as_may_be_asked_for_are_there():
    """Of 26 sums in 8 * 8 * 3 * 3 * 2 wordings each, where there are fewest."""
    assert 26 * 1152 > arithmetic.MOST
    found = arithmetic.prompts(0, arithmetic.MOST, (1,), held_out=True)
    assert len({row["prompt"] for row in found}) == arithmetic.MOST


def test_a_seed_fixes_every_row_and_more_rows_only_add_some():
    few = arithmetic.prompts(1, 20)
    assert few == arithmetic.prompts(1, 30)[: len(few)] and len(few) == 80
    assert len({row["prompt"] for row in few}) == 80
    second = arithmetic.prompts(1, 20, (2,))
    assert second == [row for row in few if row["level"] == 2]
    assert not {row["prompt"] for row in few} <= {
        row["prompt"] for row in arithmetic.prompts(2, 20)
    }
    asked = {row["prompt"] for row in arithmetic.demonstrations(1, 20)}
    assert len(asked & {row["prompt"] for row in few}) < 20  # a stream of their own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), r"per_level=0 is not in 1\.\.20000"),
        ((0, 20001), r"per_level=20001 is not in 1\.\.20000"),
        ((0, 5, ()), r"levels=\(\): name some of \(1, 2, 3, 4\), each once"),
        ((0, 5, (1, 5)), r"levels=\(1, 5\): name some of"),
        ((0, 5, (2, 2)), r"levels=\(2, 2\): name some of"),
    ],
)
def test_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.prompts(*arguments)


# -------------------------------------------------------------------------------------- the checker


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7", True),
        ("3+4=7", True),
        (" 7\n", True),
        ("3+4= 7", True),
        ("1+1=3 2+2=7", True),  # the working is not checked
        ("=7", True),
        ("3+4\n=7", True),
        ("8", False),
        ("17", False),
        ("70", False),
        ("3+4=8", False),
        ("7=8", False),
        ("3+4=7=", False),
        ("3+4", False),
        ("3+4=7.", False),
        ("7 apples", False),
        ("The answer is 7", False),
        ("07", False),
        ("+7", False),
        ("-7", False),
        ("7.0", False),
        ("7 7", False),
        ("\uff17", False),  # a full-width digit
        ("7" * 5000, False),
        ("", False),
        ("=", False),
    ],
)
def test_what_counts_as_the_answer_7(response, right):
    row = Example("p", extra={"answer": 7, "level": 1})
    assert arithmetic.reward(["p"], [response], [row]) == [float(right)]


def test_nothing_left_is_answered_by_a_nought():
    assert arithmetic.answer("5-5=0") == 0 and arithmetic.answer("5-5=00") is None
    row = Example("p", extra={"answer": 0, "level": 1})
    assert arithmetic.reward(["p"] * 2, ["0", ""], [row] * 2) == [1.0, 0.0]


def test_the_reward_reads_the_rows_of_the_tokenised_prompts():
    examples = batches.prompts(arithmetic.prompts(0, 50), tiny.TOKENIZER, 81)
    assert len(examples) == 200 and not examples.counts.dropped
    said = [arithmetic.working(read(row.prompt)) for row in examples.sources]
    prompts = [row.prompt for row in examples.sources]
    assert arithmetic.reward(prompts, said, examples.sources) == [1.0] * 200
    said[:50] = said[1:51]
    assert sum(arithmetic.reward(prompts, said, examples.sources)) < 160
    shown = batches.demonstrations(arithmetic.demonstrations(0, 50), tiny.TOKENIZER, 81, 21)
    assert len(shown) == 200


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_demonstrations_are_wrong_in_their_last_result_alone(share):
    rows = arithmetic.demonstrations(3, 400, wrong=share)
    clean = arithmetic.demonstrations(3, 400)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in clean]
    differ = 0
    for row, right in zip(rows, clean):
        (head, _, said), (same, _, answer) = (x["completion"].rpartition("=") for x in (row, right))
        assert head == same and int(said) >= 0
        differ += said != answer
        assert abs(int(said) - int(answer)) <= 3
    assert abs(differ / len(rows) - share) < 0.04
    assert rows == arithmetic.demonstrations(3, 400, wrong=share)
    with pytest.raises(ValueError, match="wrong=1.5 is a share"):
        arithmetic.demonstrations(3, 4, wrong=1.5)


def test_accuracy_is_counted_by_level():
    rows = [Example("p", extra={"answer": i, "level": level}) for i, level in enumerate((3, 1, 1))]
    found = arithmetic.accuracy(["0", "1+0=1", "no"], rows)
    assert found == {"accuracy": 2 / 3, "accuracy_level_1": 1 / 2, "accuracy_level_3": 1.0}
    assert list(found) == ["accuracy", "accuracy_level_1", "accuracy_level_3"]
    with pytest.raises(ValueError, match="2 responses to 3 rows"):
        arithmetic.accuracy(["0", "1"], rows)


# ----------------------------------------------------------------------------------- the experiment


def test_the_experiment_runs_at_toy_size_and_lists_what_it_runs(
    experiment, tmp_path, called_programs
):
    program = experiment("arithmetic")
    config = program.config
    config = dataclasses.replace(
        config,
        levels=(1, 3),
        demonstrations=40,
        prompts=20,
        prompts_eval=8,
        model=dataclasses.replace(config.model, num_layers=1, d_model=32, head_dim=8, d_ff=64),
        sft=tiny.short(config.sft, num_steps=2, batch_size=8),
        algorithm="rloo",
        rloo=tiny.short(
            config.rloo,
            num_iterations=2,
            batch_size=4,
            samples_per_prompt=2,
            num_epochs=1,
            num_minibatches=1,
            sampling=Sampling(max_new_tokens=4),
            eval_every=2,
        ),
        best_of=2,
    )
    arguments = ["--workdir", str(tmp_path / "run"), *ONE_DEVICE]
    summary = launch.launch(program.run, config, arguments)
    found = summary["rloo"]
    for when in ("before", "after"):
        assert found[f"score_{when}"] == pytest.approx(found[f"sampled_{when}"]["accuracy"])
        assert list(found[f"greedy_{when}"]) == ["accuracy", "accuracy_level_1", "accuracy_level_3"]
    ran, mesh = set(called_programs.called), sharding.make_mesh(1, 1, 1)
    planned = called_programs.of(program.programs(config, tiny.context(mesh)))
    # What else ran puts the times of the reward together, if there are several processes.
    assert planned <= ran and len(planned) == 6


def test_action_values_are_learned_from_answers_of_the_warm_start(experiment, tmp_path):
    program = experiment("arithmetic")
    config = program.config
    config = dataclasses.replace(
        config,
        demonstrations=200,
        prompts=64,
        prompts_eval=8,
        sft=tiny.short(config.sft, num_steps=5),  # so that it writes letters
        grpo=tiny.short(config.grpo, batch_size=8),
        algorithm="ilql",
        ilql=tiny.short(config.ilql, num_steps=2, batch_size=8, prompts=50),
    )
    arguments = ["--workdir", str(tmp_path / "run"), *ONE_DEVICE]
    summary = launch.launch(program.run, config, arguments)
    assert "score_after" in summary["ilql"]
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in log].count("ilql") == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_reward_that_only_checks_answers_teaches_to_calculate(experiment, tmp_path, seed):
    """At most half right after the warm start, and a quarter more of all after GRPO."""
    program = experiment("arithmetic")
    arguments = ["--workdir", str(tmp_path), "--seed", str(seed), *ONE_DEVICE]
    summary = launch.launch(program.run, program.config, arguments)["grpo"]
    assert summary["score_before"] <= 0.5
    assert summary["score_after"] - summary["score_before"] >= 0.25
