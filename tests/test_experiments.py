"""Experiments at toy size: the whole path in one go, its files, its resume, its bad inputs."""

import dataclasses
import gzip
import importlib
import inspect
import json
import pathlib
import re

import numpy as np
import pytest
import tiny

from rlhf_jax import evaluation, flags, launch, sharding
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.config import Config
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import reviews

pytestmark = pytest.mark.usefixtures("caches")
EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
PROGRAMS = sorted(EXPERIMENTS.rglob("*.py"))
ONE_DEVICE = ["--mesh", "data=1,fsdp=1,tensor=1"]


def small(config, iterations=2, online=("ppo",), **changes):
    """The same experiment with a few tiny steps; `online` names its settings of PPO."""
    shape = dataclasses.replace(config.model, num_layers=1, d_model=32, head_dim=8, d_ff=64)
    sizes = {"num_iterations": iterations, "batch_size": 16, "save_every": 1}
    sizes["sampling"] = Sampling(max_new_tokens=24)
    return dataclasses.replace(
        config,
        model=shape,
        sft=tiny.short(config.sft, num_steps=4, batch_size=8, save_every=2),
        reward_model=tiny.short(config.reward_model, num_steps=4, batch_size=4),
        **{name: dataclasses.replace(vars(config)[name], **sizes) for name in online},
        best_of=2,
        **changes,
    )


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_experiment_imports_without_side_effects(experiment, path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert experiment(path.relative_to(EXPERIMENTS).with_suffix("").as_posix()).__doc__
    assert capfd.readouterr() == ("", "")
    assert not any(tmp_path.iterdir())


WITH_FLAGS = [path for path in PROGRAMS if path.parent == EXPERIMENTS]


@pytest.mark.parametrize("path", WITH_FLAGS, ids=lambda path: path.stem)
def test_the_help_of_an_experiment_fits_two_screens_its_own_settings_first(
    experiment, path, monkeypatch
):
    module = experiment(path.stem)
    whole, print_whole = [], flags._page
    monkeypatch.setattr(flags, "_page", lambda x: whole.append(print_whole(x)) or whole[0])
    page = flags.short_help(module.config, inspect.cleandoc(module.__doc__)).splitlines()
    assert len(page) <= 98  # a command of a docstring may take two lines
    assert max(map(len, page[page.index("flags:") :])) <= 100
    own = [name for name, value in vars(module.config).items() if not isinstance(value, Config)]
    shown = [re.match(r"  --([\w.-]+)", line) for line in page]
    names = [match[1] for match in shown if match]
    assert names[0] == "workdir" and len(set(names)) == len(names)
    place = page.index("settings:")
    assert [line.split()[0].rstrip(",") for line in page[place + 1 : place + 1 + len(own)]] == [
        f"--{name.replace('_', '-')}" for name in own
    ]
    # The whole help has a line for every setting, counted here by walking through the fields.
    settings = set(paths(module.config))
    printed = re.findall(r"^\W*--([a-z][\w.-]*)", whole[0], re.MULTILINE)
    assert settings | {"workdir", "from", "sweep-shard", "coordinator", "debug"} <= set(printed)
    assert page[-1] == f"--help-all shows all {len(settings) + 18} flags."


def paths(config, prefix=""):
    """The names of all settings, those inside of others after a dot."""
    for name, value in vars(config).items():
        path = f"{prefix}{name}".replace("_", "-")
        yield from paths(value, f"{path}.") if isinstance(value, Config) else [path]


@pytest.mark.parametrize("columns", ["100", "250"])
def test_both_lengths_of_help_are_printed_and_the_long_one_has_every_flag(
    capsys, columns, monkeypatch
):
    module = importlib.import_module("toy_run")
    monkeypatch.setenv("COLUMNS", columns)  # tyro has several columns where there is room
    printed = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit:
            flags.parse(module.config, [flag])
        assert exit.value.code == 0
        printed.append(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    every = set(re.findall(r"(?:^|[│ ] )--([a-z][\w.-]*)", printed[1], re.MULTILINE))
    assert len(every) == int(re.search(r"all (\d+) flags", printed[0])[1])
    assert {"ppo.sampling.max-new-tokens", "coordinator", "ppo.kl-coef"} <= every
    assert "--ppo.sampling.max-new-tokens" in printed[0] and "coordinator" not in printed[0]


@pytest.fixture
def few_rows(monkeypatch):
    """The task of the quickstart with fewer rows: enough for a few tiny steps."""
    make, counts = reviews.make, {"num_comparisons": 300, "num_eval_comparisons": 64}
    counts |= {"num_demonstrations": 400}
    monkeypatch.setattr(
        reviews, "make", lambda seed, folder, **given: make(seed, folder, **given | counts)
    )


def test_the_quickstart_runs_writes_its_files_and_continues(
    experiment, tmp_path, capsys, called_programs, few_rows
):
    quickstart = experiment("quickstart")
    workdir = ["--workdir", str(tmp_path / "run"), *ONE_DEVICE]
    summary = launch.launch(quickstart.run, small(quickstart.config), workdir)
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    for stage, figures in {
        "sft": ["eval_loss"],
        "reward_model": ["eval_accuracy", "best_reachable_accuracy"],
        "ppo": ["gold_before", "gold_after", "kl", "gold_best_of_n", "grammatical_after"],
        "seconds": ["sft", "reward_model", "ppo", "evaluation"],
    }.items():
        assert all(np.isfinite(summary[stage][name]) for name in figures)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = {name: sum(line["stage"] == name for line in lines) for name in summary}
    assert counts == {"sft": 4, "reward_model": 4, "ppo": 2, "seconds": 0}
    wanted = {"objective/kl", "objective/gold", "policy/clipfrac_avg", "loss/value_avg"}
    assert wanted <= lines[-1].keys()
    page = (run / "report.html").read_text()
    assert "KL to the reference" in page and "http" not in page.replace("http://www.w3.org", "")
    printed = capsys.readouterr().out
    assert "rows, 380 kept, none dropped" in printed and "⟦" in printed
    assert "The same prompts before and after training" in printed

    # What `--plan` compiles is what was run: the same functions, with arguments of the same shapes.
    ran, mesh = set(called_programs.called), sharding.make_mesh(1, 1, 1)
    planned = called_programs.of(quickstart.programs(small(quickstart.config), tiny.context(mesh)))
    assert ran == planned and len(ran) == 9

    # More iterations continue: SFT and the reward model are restored, not trained again.
    longer = launch.launch(quickstart.run, small(quickstart.config, iterations=3), workdir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["stage"] == "ppo" for line in lines) == 3
    assert sum(line["stage"] == "sft" for line in lines) == 4
    assert longer["sft"] == summary["sft"]

    # Anything else is refused by name.
    other = dataclasses.replace(small(quickstart.config, iterations=3), best_of=3)
    with pytest.raises(SystemExit) as stopped:
        launch.launch(quickstart.run, other, workdir)
    assert stopped.value.code == 2
    assert "best_of" in capsys.readouterr().err


def test_presets_go_on_from_one_warm_start_and_are_drawn_on_one_figure(
    experiment, tmp_path, called_programs, few_rows
):
    """One with a batch of its own and one with a loss of its own."""
    conventions, names = experiment("conventions"), ("openrlhf", "verl")
    config = small(conventions.config, online=names, presets=names)
    run = tmp_path / "run"
    summary = launch.launch(conventions.run, config, ["--workdir", str(run), *ONE_DEVICE])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {name: sum(x["stage"] == name for x in lines) for name in names} == dict.fromkeys(
        names, 2
    )
    assert summary["warm_up"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert all(np.isfinite(summary[name]["gold"]) for name in names)
    assert (run / "conventions.png").read_bytes().startswith(b"\x89PNG")
    ran = set(called_programs.called)  # a plan calls some of them too
    planned = conventions.programs(config, tiny.context(sharding.make_mesh(1, 1, 1)))
    assert called_programs.of(planned) == ran


def test_presets_differ_in_their_conventions_and_not_in_samples_or_learning_rates(experiment):
    conventions, quickstart = experiment("conventions"), experiment("quickstart")
    alike = ("batch_size", "num_iterations", "sampling", "policy_optimizer", "critic_optimizer")
    for name, preset in conventions.PRESETS.items():
        settings = vars(vars(conventions.config)[name])
        own = vars(preset.config())
        for field, value in settings.items():
            given = vars(quickstart.config.ppo) if field in alike else own
            assert value == given[field], (name, field)
    with pytest.raises(ValueError, match="name one or several of .'trl', 'openrlhf', 'verl'"):
        dataclasses.replace(conventions.config, presets=("trl", "deepspeed"))
    with pytest.raises(ValueError, match="'instructgpt'., once"):
        dataclasses.replace(conventions.config, presets=("trl", "trl"))
    with pytest.raises(ValueError, match="one is named twice"):
        dataclasses.replace(experiment("side_by_side").config, algorithms=("ppo", "ppo"))


def test_a_batch_that_the_mesh_does_not_divide_is_one_line_and_leaves_nothing(
    experiment, tmp_path, capsys
):
    quickstart = experiment("quickstart")
    config = small(quickstart.config)
    config = dataclasses.replace(
        config,
        sft=tiny.short(config.sft, batch_size=12),
        reward_model=tiny.short(config.reward_model, batch_size=8),
    )
    arguments = ["--workdir", str(tmp_path / "run"), "--mesh", "data=8,fsdp=1,tensor=1"]
    with pytest.raises(SystemExit) as stopped:
        launch.launch(quickstart.run, config, arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "sft.batch_size=12 does not divide over data x fsdp = 8" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ppo.num-minibatches", "3"], "are not a multiple of num_minibatches=3"),
        (["--ppo.micro-batches", "0"], "micro_batches=0 must be at least 1"),
        (
            ["--ppo.sampling.max-new-tokens", "500"],
            "need 512 positions, but the model has max_length=128",
        ),
    ],
)
def test_sizes_of_the_last_stage_are_checked_before_the_first(
    experiment, tmp_path, capsys, flags, message
):
    quickstart = experiment("quickstart")
    arguments = ["--workdir", str(tmp_path / "run"), *ONE_DEVICE, *flags]
    with pytest.raises(SystemExit) as stopped:
        launch.launch(quickstart.run, small(quickstart.config), arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and "sft" not in captured.out
    assert not (tmp_path / "run").exists()


def test_stories_without_data_say_how_to_name_it(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
    stories = experiment("stories_sentiment")
    with pytest.raises(SystemExit) as stopped:
        launch.launch(stories.run, stories.config, ["--workdir", str(tmp_path / "x"), *ONE_DEVICE])
    assert stopped.value.code == 2 and "--data DIR" in capsys.readouterr().err


def test_stories_run_on_real_input_at_toy_size(experiment, tmp_path, real_data):
    stories = experiment("stories_sentiment")
    rows = gzip.open(real_data / "stories" / "tinystories_sample.jsonl.gz", "rt").readlines()[:120]
    folder = tmp_path / "data"
    (folder / "stories").mkdir(parents=True)
    with gzip.open(folder / "stories" / "tinystories_sample.jsonl.gz", "wt") as file:
        file.writelines(rows)
    for name in ("models", "lexicon"):
        (folder / name).symlink_to(real_data / name)
    config = dataclasses.replace(
        stories.config,
        reward_model=tiny.short(stories.config.reward_model, num_steps=2, batch_size=8),
        ppo=tiny.short(
            stories.config.ppo, num_iterations=2, batch_size=16, num_epochs=1, save_every=1
        ),
        best_of=2,
        responses_per_prompt=2,
    )
    arguments = ["--workdir", str(tmp_path / "run"), "--data", str(folder), *ONE_DEVICE]
    summary = launch.launch(stories.run, config, arguments)
    assert 1.0 < summary["ppo"]["cross_entropy_before"] < 3.0  # nats a token: it tells stories
    assert -0.1 < summary["ppo"]["gold_before"] < 1.0


def test_sentiment_is_vaders_normalised_sum(experiment):
    stories = experiment("stories_sentiment")
    lexicon = {"happy": 2.7, "sad": -2.1}
    assert stories.sentiment(lexicon, "Happy, happy and sad!") == pytest.approx(
        3.3 / (3.3**2 + 15) ** 0.5
    )
    assert stories.sentiment(lexicon, "nothing known") == 0.0


def test_distinct_bigrams_counts_word_pairs():
    assert evaluation.distinct_bigrams(["a b a b", "b a"]) == 2 / 4
    assert evaluation.distinct_bigrams([""]) == 0.0
    assert (
        evaluation.distinct_bigrams(["你好你好,ok then"]) == 4 / 5
    )  # 你好 好你 你好 好,ok ,ok·then


@pytest.mark.parametrize("module", [sft, reward_model, ppo])
def test_every_algorithm_is_config_loss_and_run(module):
    assert {"Config", "loss", "run"} <= vars(module).keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_keeps_its_promises(experiment, tmp_path, seed):
    """Gold up by 0.25 at a KL below 15 nats, grammar kept, an accurate reward model."""
    quickstart = experiment("quickstart")
    arguments = ["--workdir", str(tmp_path), "--seed", str(seed), *ONE_DEVICE]
    summary = launch.launch(quickstart.run, quickstart.config, arguments)
    policy, scorer = summary["ppo"], summary["reward_model"]
    assert 0.35 <= policy["gold_before"] <= 0.6
    assert policy["gold_after"] - policy["gold_before"] >= 0.25
    assert policy["kl"] < 15
    assert policy["grammatical_after"] >= 0.95 * policy["grammatical_before"]
    assert scorer["eval_pairs"] >= 2000
    assert scorer["eval_accuracy"] >= scorer["best_reachable_accuracy"] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_happier_stories_stay_stories(experiment, tmp_path, seed, real_data):
    """Gold up by 0.2, cross entropy up by at most 0.3 nats a token, bigrams at least 80 %."""
    stories = experiment("stories_sentiment")
    arguments = ["--workdir", str(tmp_path), "--seed", str(seed), "--data", str(real_data)]
    summary = launch.launch(stories.run, stories.config, [*arguments, *ONE_DEVICE])["ppo"]
    assert summary["gold_after"] - summary["gold_before"] >= 0.2
    assert summary["cross_entropy_after"] - summary["cross_entropy_before"] <= 0.3
    assert summary["distinct_bigrams_after"] >= 0.8 * summary["distinct_bigrams_before"]
