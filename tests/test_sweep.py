"""Ablations: which runs a sweep consists of, what they share, and what is made of them."""

import dataclasses
import json
import math

import jax
import pytest
import tiny

from rlhf_jax import pipeline, sweep
from rlhf_jax.algorithms import ppo, sft
from rlhf_jax.config import Config, Whole
from rlhf_jax.data import batches
from rlhf_jax.launch import launch


class Policy(Config):
    kl_coef: float = 0.1
    num_epochs: int = 2


class Experiment(Config):
    seed: Whole = 0
    switch: bool = False
    ppo: Policy = Policy()


class Seedless(Config):
    ppo: Policy = Policy()


# -------------------------------------------------------------------------------------- the points


def test_points_are_the_grid_for_every_seed_and_those_of_a_seed_are_neighbours():
    found = sweep.points(Experiment(seed=3), ["ppo.kl-coef=0.1,0.2", "ppo.num_epochs=1,4"], 2)
    assert [(p.name, p.seed, p.config.ppo.kl_coef, p.config.ppo.num_epochs) for p in found] == [
        (f"ppo.kl_coef={kl},ppo.num_epochs={epochs}", seed, kl, epochs)
        for seed in (3, 4)
        for kl in (0.1, 0.2)
        for epochs in (1, 4)
    ]
    assert all(point.config.seed == point.seed for point in found)
    assert found[0].folder == "points/ppo.kl_coef=0.1,ppo.num_epochs=1/seed3"
    assert [(p.name, p.seed) for p in sweep.points(Experiment(), [], 2)] == [("all", 0), ("all", 1)]


@pytest.mark.parametrize(
    "swept, seeds, said",
    [
        (["ppo.kl_coeff=1"], 1, r"no setting 'ppo.kl_coeff'; did you mean ppo.kl_coef\?"),
        (["ppo=1"], 1, r"no setting 'ppo'; did you mean ppo.kl_coef\?"),
        (["ppo.kl_coef="], 1, "a value is missing; write for example --sweep ppo.kl_coef=1,2"),
        (["ppo.kl_coef"], 1, "a value is missing"),
        (["ppo.kl_coef=1,,2"], 1, "a value is missing"),
        (["ppo.kl_coef=1,1"], 1, "named twice"),
        (["ppo.kl_coef=1", "ppo.kl_coef=2"], 1, "is swept already"),
        (["ppo.kl_coef=many"], 1, "ppo.kl_coef=many is not what this setting is made of"),
        (["seed=1,2"], 3, "no 'seed' that is free to be counted up"),
        ([], 0, "--seeds 0 must be at least 1"),
        ([], 10**11, "ask for 100000000000 runs; 10000 is the most"),
        (["ppo.kl_coef=1,1.0"], 1, "ppo.kl_coef=1 and ppo.kl_coef=1.0 are the same settings"),
        (["seed=-1"], 1, "seed=-1 is not what .*: .*seed=-1 must be"),
        (["switch=maybe"], 1, "switch=maybe is not what"),
    ],
)
def test_a_sweep_over_what_does_not_exist_is_refused(swept, seeds, said, capsys):
    with pytest.raises(ValueError, match=said):
        sweep.points(Experiment(), swept, seeds)
    assert capsys.readouterr() == ("", "")


def test_switches_are_swept_and_long_names_get_short_folders():
    found = sweep.points(Experiment(), ["switch=True,False", "ppo.kl_coef=1"], 1)
    assert [point.config.switch for point in found] == [True, False]
    names = ["a/b", "a_b", "x" * 300, "x" * 299]
    folders = [sweep.folder_of(name, 0) for name in names]
    assert len(set(folders)) == 4 and folders[1] == "points/a_b/seed0"
    assert all(len(part) < 150 for folder in folders for part in folder.split("/"))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--sweep"], "--sweep names no setting"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--sweep-shard", "1/4"], "--sweep-shard is of several runs"),
        (["--together"], "--together is of several runs"),
        (["--seeds", "2", "--sweep-shard", "1/4"], "there are 2 runs to share out"),
        (["--seeds", "2", "--plan", "v5e:4x4"], "--plan is of one run"),
    ],
)
def test_flags_of_a_sweep_that_is_none_are_refused_and_leave_nothing(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as exit:
        launch(pretend, Experiment(), ["--workdir", str(tmp_path / "w"), *flags])
    assert exit.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_flag_that_is_given_twice_counts_twice(tmp_path):
    flags = ["--sweep", "ppo.kl_coef=1,2", "--sweep", "ppo.num_epochs=1,3"]
    assert len(launch(pretend, Experiment(), ["--workdir", str(tmp_path / "w"), *flags])) == 4


def test_a_sweep_takes_no_folder_of_something_else(tmp_path, capsys):
    launch(pretend, Experiment(), ["--workdir", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("my own")
    (tmp_path / "file").write_text("x")
    for name, said in (
        ("run", "holds a single run"),
        ("mine", "is not empty and has no points/"),
        ("file", "is a file"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            launch(pretend, Experiment(), ["--workdir", str(tmp_path / name), "--seeds", "2"])
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert (tmp_path / "run" / "report.html").read_text() == page
    assert (tmp_path / "mine" / "report.html").read_text() == "my own"


def test_only_runs_with_these_settings_count(tmp_path):
    start = ["--workdir", str(tmp_path / "w"), "--sweep"]
    launch(pretend, Experiment(), [*start, "ppo.kl_coef=1,2"])
    found = launch(pretend, Experiment(), [*start, "ppo.kl_coef=1,2,3", "--switch"])
    assert found["ppo.kl_coef=1"] == found["ppo.kl_coef=2"] == {}
    assert found["ppo.kl_coef=3"]["ppo.kl"]["mean"] == 3.0


def fails_otherwise(config, context):
    """An error of another kind, and runs of other lengths."""
    if config.ppo.num_epochs == 13:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    with context.log.stage("ppo", 9) as stage:
        for step in range(1 + config.seed):
            stage.write(step, {"objective/kl": 0.5})
    return {"ppo": {"kl": 0.5}}


def test_no_error_of_a_point_ends_a_sweep_nor_does_a_figure_that_cannot_be_drawn(tmp_path, capsys):
    flags = ["--sweep", "ppo.num_epochs=13,1", "--seeds", "2"]
    found = launch(fails_otherwise, Experiment(), ["--workdir", str(tmp_path / "w"), *flags])
    assert found["ppo.num_epochs=1"]["ppo.kl"]["mean"] == 0.5
    said = capsys.readouterr().out
    assert "seed 0 and 1 more: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in said
    assert (tmp_path / "w" / "sweep.json").exists() and (tmp_path / "w" / "report.html").exists()


def test_seeds_need_a_seed():
    with pytest.raises(ValueError, match="no 'seed'"):
        sweep.points(Seedless(), [], 2)


def test_shards_are_a_partition_that_keeps_seeds_together():
    every = sweep.points(Experiment(), ["ppo.kl_coef=1,2,3"], 4)
    parts = [sweep.shard(every, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sum(parts, []) == every == sweep.shard(every, "")
    assert [{point.seed for point in part} for part in parts] == [{0}, {1}, {2}, {3}]
    for wrong in ("3/2", "0/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(ValueError, match="is not i/n with i from 1 to n"):
            sweep.shard(every, wrong)


# --------------------------------------------------------------------------------------- the table


def pretend(config, context):
    """A run whose figures are known; it fails where the switch is set."""
    with context.log.stage("ppo", 1) as stage:
        stage.write(0, {"objective/kl": config.ppo.kl_coef})
    if config.ppo.num_epochs == 13:
        raise ValueError("thirteen epochs\nbring bad luck")
    return {"ppo": {"kl": config.ppo.kl_coef + config.seed, "note": "x"}, "seconds": {"ppo": 1.0}}


def test_the_table_has_means_and_intervals_and_a_failed_point_is_not_fatal(tmp_path, capsys):
    flags = ["--sweep", "ppo.kl_coef=0.5,1.5", "ppo.num_epochs=1,13", "--seeds", "3"]
    found = launch(pretend, Experiment(), ["--workdir", str(tmp_path / "w"), *flags])
    kl = found["ppo.kl_coef=0.5,ppo.num_epochs=1"]["ppo.kl"]
    assert kl["values"] == {"0": 0.5, "1": 1.5, "2": 2.5} and kl["mean"] == 1.5
    # Student's t for two degrees of freedom, from a table.
    assert kl["interval"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert list(found["ppo.kl_coef=0.5,ppo.num_epochs=1"]) == ["ppo.kl"]
    assert found["ppo.kl_coef=0.5,ppo.num_epochs=13"] == {}
    written = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert written["points"] == found and len(written["failed"]) == 6
    lines = (tmp_path / "w" / "sweep.md").read_text().splitlines()
    assert lines[2].split(" | ")[1] == "1.5 ± 2.5 (3)"
    page = (tmp_path / "w" / "report.html").read_text()
    assert "1.5 ± 2.5 (3)" in page and "thirteen epochs bring bad luck" in page
    out = capsys.readouterr().out
    assert "6 of 12 points failed" in out and "point 12 of 12" in out


def test_a_sweep_goes_on_where_it_ended_and_grows(tmp_path):
    calls = []

    def run(config, context):
        calls.append((config.ppo.kl_coef, config.seed))
        return pretend(config, context)

    start = ["--workdir", str(tmp_path / "w"), "--seeds", "2", "--sweep"]
    launch(run, Experiment(), [*start, "ppo.kl_coef=1,2", "--sweep-shard", "1/2"])
    assert calls == [(1.0, 0), (2.0, 0)]
    found = launch(run, Experiment(), [*start, "ppo.kl_coef=1,2,3"])
    assert calls[2:] == [(3.0, 0), (1.0, 1), (2.0, 1), (3.0, 1)]
    assert [figures["ppo.kl"]["mean"] for figures in found.values()] == [1.5, 2.5, 3.5]


def test_where_every_point_fails_the_sweep_fails(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        flags = ["--workdir", str(tmp_path / "w"), "--sweep", "ppo.num_epochs=13"]
        launch(pretend, Experiment(), flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert "all 1 points failed; ppo.num_epochs=13, seed 0: thirteen epochs" in error
    assert not (tmp_path / "w" / "sweep.json").exists()


# -------------------------------------------------------------------------------------- real stages


class Two(Config):
    seed: Whole = 0
    sft: sft.Config
    ppo: ppo.Config


TWO = Two(
    sft=dataclasses.replace(tiny.SFT, num_steps=2),
    # Four updates in each iteration.
    ppo=dataclasses.replace(tiny.PPO, num_iterations=5, save_every=2),
)
ANSWERED = {}  # the responses of each iteration, by (kl_coef, seed)


def two_stages(config, context):
    answered = ANSWERED.setdefault((config.ppo.kl_coef, config.seed), [])

    def reward(prompts, responses, rows):
        answered.append(responses)
        return [float(len(text)) for text in responses]

    told = [{"prompt": word, "completion": word[::-1]} for word in tiny.WORDS]
    both = batches.demonstrations(told, tiny.TOKENIZER, 4, 5)
    asked = batches.prompts(told, tiny.TOKENIZER, 4)
    task = pipeline.Task(tiny.TOKENIZER, pipeline.Split(asked, asked))
    policy = pipeline.new_model(tiny.SHAPE, context, config.seed)
    policy, found = pipeline.supervised(
        sft.run,
        sft.evaluate,
        config.sft,
        context,
        tiny.TOKENIZER,
        policy,
        pipeline.Split(both, both),
        stage="sft",
        seed=config.seed,
    )
    result = pipeline.online(
        ppo.run,
        config.ppo,
        context,
        task,
        policy,
        None,
        stage="ppo",
        seed=config.seed,
        reward=reward,
    )
    last = result.history[-1]
    return {"sft": found, "ppo": {"kl": last["objective/kl"], "loss": last["loss"]}}


def test_unchanged_stages_run_once_and_runs_equal_single_ones_also_together(
    tmp_path, caplog, capsys
):
    common = ["--mesh", "data=1,fsdp=1,tensor=1", "--workdir"]
    flags = ["--sweep", "ppo.kl_coef=0.01,0.5", "--seeds", "2"]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = launch(two_stages, TWO, [*common, str(tmp_path / "w"), *flags])
    lines = [record.getMessage() for record in caplog.records]
    for program in ("_step", "update"):  # of supervised stages, and of online ones
        assert len([x for x in lines if f"Finished XLA compilation of jit({program})" in x]) == 1
    stages = sorted(path.name.split("-")[0] for path in (tmp_path / "w" / "stages").iterdir())
    assert stages == ["ppo"] * 4 + ["sft"] * 2
    trained = [
        {json.loads(line)["stage"] for line in file.read_text().splitlines()}
        for file in sorted((tmp_path / "w" / "points").rglob("metrics.jsonl"))
    ]
    assert sorted(map(len, trained)) == [1, 1, 2, 2]  # with SFT only the first of each seed
    single = launch(
        two_stages, TWO, [*common, str(tmp_path / "s"), "--seed", "1", "--ppo.kl-coef", "0.5"]
    )
    for stage, figures in single.items():
        for name, value in figures.items():
            assert found["ppo.kl_coef=0.5"][f"{stage}.{name}"]["values"]["1"] == value
    assert (tmp_path / "w" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # And computed together: the first responses, and the losses of 20 updates.
    capsys.readouterr()
    alone = {run: each[:5] for run, each in ANSWERED.items()}
    ANSWERED.clear()
    launch(two_stages, TWO, [*common, str(tmp_path / "t"), *flags, "--together"])
    # Three programs in each of five iterations.
    assert "15 programs were run for 4 runs together" in capsys.readouterr().out
    assert len(alone) == 4 and {run: each[0] for run, each in ANSWERED.items()} == {
        run: each[0] for run, each in alone.items()
    }
    files = sorted(path.relative_to(tmp_path / "w") for path in (tmp_path / "w").rglob("m*.jsonl"))
    assert len(files) == 4
    for file in files:
        one, other = ((tmp_path / x / file).read_text().splitlines() for x in "wt")
        online = [
            [x for x in map(json.loads, text) if x["stage"] == "ppo"] for text in (one, other)
        ]
        assert len(online[0]) == len(online[1]) == 5
        for a, b in zip(*online):
            assert (
                a["num_tokens"] == b["num_tokens"]
                and a["objective/scores"] == b["objective/scores"]
            )
            for name in ("loss", "objective/kl", "grad_norm/policy"):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6)


def test_runs_that_differ_go_on_alone_and_say_so(tmp_path, capsys):
    common = ["--mesh", "data=1,fsdp=1,tensor=1", "--workdir", str(tmp_path / "w"), "--together"]
    found = launch(two_stages, TWO, [*common, "--sweep", "ppo.num_epochs=1,2"])
    assert all(len(figures) > 2 for figures in found.values())
    out = capsys.readouterr().out
    assert "the runs go on one by one: their programs have different settings" in out


def test_a_run_that_fails_does_not_keep_the_others_waiting(tmp_path, capsys):
    def fails(config, context):
        if config.ppo.kl_coef > 1:
            raise ValueError("too much")
        return two_stages(config, context)

    common = ["--mesh", "data=1,fsdp=1,tensor=1", "--workdir", str(tmp_path / "w"), "--together"]
    found = launch(fails, TWO, [*common, "--sweep", "ppo.kl_coef=2,0.1"])
    assert found["ppo.kl_coef=2"] == {} and found["ppo.kl_coef=0.1"]
    assert "failed: ppo.kl_coef=2, seed 0: too much" in capsys.readouterr().out
