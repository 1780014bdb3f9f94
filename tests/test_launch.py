"""The command line: flags, exit codes, and what a workdir allows when it is used again."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import launch as launch_module
from rlhf_jax.config import Config, Source
from rlhf_jax.launch import launch
from rlhf_jax.training.state import TrainingStopped

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


class Policy(Config):
    kl_coef: float = 0.1
    num_iterations: int = 2
    sizes: tuple[int, ...] = (1, 2)


class Experiment(Config):
    seed: int = 0
    num_steps: int = 3
    ppo: Policy = Policy()


class Run:
    """Stands in for training; remembers what it was called with."""

    __module__ = "toy"

    def __init__(self, fail=None, train_first=True):
        self.calls, self.fail, self.train_first = [], fail, train_first

    def __call__(self, config, context):
        self.calls.append((config, context))
        if self.train_first:
            with context.log.stage("ppo", 1) as stage:
                stage.write(0, {"objective/kl": 0.0})
        if self.fail is not None:
            raise self.fail
        return {"gold_after": jnp.float32(0.5), "ppo": {"kl": float("nan")}}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
    # The cache is a setting of the whole process: only a process of its own may switch it on.
    monkeypatch.setattr(launch_module, "_set_up_jax", lambda: None)


def start(*argv, run=None, config=None):
    return launch(run or Run(), config or Experiment(), argv=list(argv))


def refused(capsys, *argv, run=None, code=2):
    """Launches what must fail; returns its stderr, which is one line."""
    with pytest.raises(SystemExit) as exit:
        start(*argv, run=run)
    error = capsys.readouterr().err
    assert exit.value.code == code
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_flags_change_the_configuration_and_fill_the_context(tmp_path):
    run = Run()
    (tmp_path / "data").mkdir()
    flags = "--workdir w --ppo.kl-coef 0.5 --ppo.sizes 3 4 --seed 7 --data data --mesh tensor=2"
    start(*flags.split(), run=run)
    ((config, context),) = run.calls
    assert config == Experiment(seed=7, ppo=Policy(kl_coef=0.5, sizes=(3, 4)))
    assert context.workdir == pathlib.Path("w") and context.data == pathlib.Path("data")
    assert dict(context.mesh.shape) == {"data": 1, "fsdp": jax.device_count() // 2, "tensor": 2}


def test_data_comes_from_the_environment_unless_a_flag_names_it(tmp_path, monkeypatch):
    run = Run()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("RLHF_JAX_DATA", "here")
    start(run=run)
    start("--data", "there", run=run)
    assert [str(context.data) for _, context in run.calls] == ["here", "there"]


def test_a_subclass_with_a_new_field_gets_a_flag():
    class Mine(Experiment):
        alpha: float = 0.5

    run = Run()
    start("--alpha", "2", run=run, config=Mine())
    assert run.calls[0][0].alpha == 2.0


def test_a_configuration_that_hides_a_flag_of_launch_is_a_programming_error():
    class Hides(Config):
        mesh: int = 0

    with pytest.raises(TypeError, match=r"Hides\.mesh: launch has a flag of that name"):
        start(config=Hides())


def test_the_default_workdir_is_new_and_carries_the_name_of_the_experiment():
    run = Run()
    for _ in range(2):
        start(run=run)
    first, second = (context.workdir for _, context in run.calls)
    assert first != second and first.parent == second.parent == pathlib.Path("runs")
    assert first.name.startswith("toy-")


def test_a_run_leaves_config_summary_metrics_and_report(capsys):
    summary = start("--workdir", "w", "--seed", "3")
    workdir = pathlib.Path("w")
    described = json.loads((workdir / "config.json").read_text())
    assert described["experiment"] == "toy"
    assert described["config"] == {
        "seed": 3,
        "num_steps": 3,
        "ppo": {"kl_coef": 0.1, "num_iterations": 2, "sizes": [1, 2]},
    }
    assert described["versions"]["jax"] == jax.__version__
    assert described["device"] and described["mesh"]
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary == {"gold_after": 0.5, "ppo": {"kl": "NaN"}}
    assert (workdir / "metrics.jsonl").exists()
    printed = capsys.readouterr().out
    assert "ppo.kl" in printed and "report: w/report.html" in printed
    assert (workdir / "report.html").exists()


# ------------------------------------------------------------------------------- the same workdir


def test_a_finished_run_returns_its_summary_without_training():
    run = Run()
    first = start("--workdir", "w", run=run)
    again = start("--workdir", "w", run=run)
    assert again == first and len(run.calls) == 1


def test_an_unfinished_run_is_called_again():
    run = Run()
    start("--workdir", "w", run=run)
    pathlib.Path("w/summary.json").unlink()
    start("--workdir", "w", run=run)
    assert len(run.calls) == 2


@pytest.mark.parametrize("flag", ["--ppo.num-iterations"])
def test_more_iterations_continue_a_finished_run(flag):
    class Looks(Run):
        def __call__(self, config, context):
            assert not (context.workdir / "summary.json").exists()
            return super().__call__(config, context)

    run = Looks()
    start("--workdir", "w", run=run)
    start("--workdir", "w", flag, "9", run=run)
    assert len(run.calls) == 2
    assert "9" in pathlib.Path("w/config.json").read_text()
    start("--workdir", "w", flag, "9", run=run)
    assert len(run.calls) == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--ppo.kl-coef 0.5", "ppo.kl_coef=0.1 -> ppo.kl_coef=0.5"),
        ("--seed 1 --ppo.num-iterations 9", "seed=0 -> seed=1"),
        ("--num-steps 2", "num_steps=3 -> num_steps=2"),
        # Later stages were trained on the model that these steps gave.
        ("--num-steps 9", "num_steps=3 -> num_steps=9"),
        ("--ppo.sizes 1", "ppo.sizes=[1, 2] -> ppo.sizes=[1]"),
    ],
)
def test_any_other_change_is_refused_naming_field_values_and_remedy(capsys, flags, named):
    start("--workdir", "w")
    before = pathlib.Path("w/config.json").read_text()
    capsys.readouterr()
    run = Run()
    error = refused(capsys, "--workdir", "w", *flags.split(), run=run)
    assert error.startswith("error: --workdir w holds a run with other settings: ")
    assert named in error and "name a new --workdir or use the old values" in error
    assert ("num_iterations=" in error) is False
    assert run.calls == [] and pathlib.Path("w/config.json").read_text() == before


def test_another_data_folder_is_refused_and_none_at_all_is_not(capsys):
    for name in ("a", "b"):
        pathlib.Path(name).mkdir()
    start("--workdir", "w", "--data", "a")
    start("--workdir", "w")
    start("--workdir", "w", "--data", "./a")
    assert "/b" in refused(capsys, "--workdir", "w", "--data", "b")


def test_files_and_folders_that_changed_since_are_refused_by_field(capsys):
    class Own(Experiment):
        model: Source = "m"
        prompts: Source = "p.jsonl"
        style: str = "m"  # a name that happens to be a folder's too

    pathlib.Path("m/deep").mkdir(parents=True)
    weights, prompts = pathlib.Path("m/deep/weights"), pathlib.Path("p.jsonl")
    for path in (weights, prompts):
        path.write_bytes(b"a" * 200_000)
    own = Own()
    start("--workdir", "w", config=own)
    start("--workdir", "w", config=own)
    for path, field in ((prompts, "prompts"), (weights, "model")):
        path.write_bytes(b"a" * 199_999 + b"b")
        pathlib.Path("w/summary.json").unlink(missing_ok=True)  # interrupted, or finished: alike
        with pytest.raises(SystemExit):
            start("--workdir", "w", config=own)
        assert f"contents of {field}=" in capsys.readouterr().err
        path.write_bytes(b"a" * 200_000)
    prompts.unlink()  # what reads it says so
    start("--workdir", "w", config=own)
    for _ in range(2):
        start("--workdir", "m/run", config=own)  # its own files are no input
    start("--workdir", "m/run", "--ppo.num-iterations", "9", config=own)
    start("--workdir", "x", "--prompts", "~nobody-of-this-name/p.jsonl", config=own)


def test_the_file_of_an_entry_of_a_dataset_info_is_watched_too(capsys):
    class Own(Experiment):
        rows: Source = ""

    pathlib.Path("a.json").write_text("[1]")
    pathlib.Path("dataset_info.json").write_text('{"mine": {"file_name": "a.json"}}')
    flags = ("--workdir", "w", "--rows", "dataset_info.json:mine")
    start(*flags, config=Own())
    start(*flags, config=Own())
    pathlib.Path("a.json").write_text("[2]")
    with pytest.raises(SystemExit):
        start(*flags, config=Own())
    assert "contents of rows=" in capsys.readouterr().err


def test_another_experiment_or_another_field_is_refused(capsys):
    class More(Experiment):
        alpha: float = 0.5

    start("--workdir", "w")
    other = Run()
    other.__module__ = "other"
    capsys.readouterr()
    assert '"toy" -> experiment file="other"' in refused(capsys, "--workdir", "w", run=other)
    with pytest.raises(SystemExit):
        start("--workdir", "w", config=More())
    assert "no alpha -> alpha=0.5" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("precious")
    error = refused(capsys, "--workdir", "w")
    assert "w is not empty and has no config.json" in error and "name another folder" in error
    assert (tmp_path / "w" / "thesis.tex").read_text() == "precious"
    assert "is a file; name a folder" in refused(capsys, "--workdir", "w/thesis.tex")


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("text", ["", '{"a":', "[]"])
def test_a_corrupt_file_is_named(capsys, name, text):
    start("--workdir", "w")
    pathlib.Path("w", name).write_text(text)
    capsys.readouterr()
    assert f"error: w/{name}: " in refused(capsys, "--workdir", "w")


def test_a_config_file_of_something_else_is_refused(capsys):
    start("--workdir", "w")
    pathlib.Path("w/config.json").write_text('{"model": "x"}')
    capsys.readouterr()
    assert "'experiment' or 'config' is missing" in refused(capsys, "--workdir", "w")


# ------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (ValueError("prefs.jsonl:17: 'rejected'\n is missing"), "prefs.jsonl:17: 'rejected' is"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "x.json: No such file"),
    ],
)
@pytest.mark.parametrize("workdir", ["w", "new/deep/w", "empty"])
def test_bad_input_before_training_is_one_line_and_leaves_nothing(
    capsys, tmp_path, workdir, fail, message
):
    (tmp_path / "empty").mkdir()
    error = refused(capsys, "--workdir", workdir, run=Run(fail, train_first=False))
    assert error.startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


def test_bad_input_after_the_first_step_keeps_the_workdir(capsys):
    refused(capsys, "--workdir", "w", run=Run(ValueError("late")))
    assert pathlib.Path("w/config.json").exists()
    assert not pathlib.Path("w/summary.json").exists()


def test_bad_input_to_a_continued_run_leaves_the_finished_one_as_it_was(capsys):
    first = start("--workdir", "w")
    before = {path: path.read_text() for path in pathlib.Path("w").glob("*.json")}
    capsys.readouterr()
    run = Run(ValueError("no such tokenizer"), train_first=False)
    refused(capsys, "--workdir", "w", "--num-steps", "9", run=run)
    assert {path: path.read_text() for path in pathlib.Path("w").glob("*.json")} == before
    assert start("--workdir", "w") == first


def test_an_error_from_elsewhere_says_how_to_see_its_place(capsys):
    error = refused(capsys, run=Run(ValueError("shapes do not match")))
    assert error == "error: shapes do not match (--debug shows where)\n"


def test_an_unexpected_error_keeps_its_traceback_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        start("--workdir", "w", run=Run(ZeroDivisionError(), train_first=False))
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(SystemExit):
        start("--debug", run=Run(ValueError("late")))
    error = capsys.readouterr().err
    assert "Traceback" in error and "error: late" in error


def test_training_that_stops_exits_with_3_and_keeps_the_workdir(capsys):
    run = Run(TrainingStopped("non-finite loss at step 7"), train_first=False)
    error = refused(capsys, "--workdir", "w", run=run, code=3)
    assert "training stopped: non-finite loss at step 7" in error
    assert "last checkpoint in it is intact" in error
    assert pathlib.Path("w/config.json").exists()


def test_an_interrupt_says_how_to_continue(capsys, tmp_path):
    error = refused(capsys, "--workdir", "w", run=Run(KeyboardInterrupt()), code=130)
    assert "the same command with --workdir w continues from the last checkpoint" in error
    early = Run(KeyboardInterrupt(), train_first=False)
    error = refused(capsys, "--workdir", "v", run=early, code=130)
    assert error == "interrupted before the first step; nothing is kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    error = refused(capsys, "--workdir", "w", run=early, code=130)
    assert "continues from the last checkpoint" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mesh data=1,fsd=2", "'fsd=2' is not axis=size"),
        ("--mesh data=x", "'data=x' is not axis=size"),
        ("--mesh data=1,data=1", "each once"),
        ("--mesh data=4096", "--mesh data=4096"),
        ("--data nowhere", "--data nowhere: no such folder"),
        ("--profile -1", "--profile -1"),
    ],
)
def test_bad_launcher_flags_are_one_line(capsys, tmp_path, flags, message):
    run = Run()
    error = refused(capsys, *flags.split(), run=run)
    assert error.startswith("error: ") and message.removeprefix("--mesh ") in error
    assert run.calls == [] and list(tmp_path.iterdir()) == []


PROGRAM = '''"""What the help says first."""
import sys
import jax, jax.numpy as jnp
from rlhf_jax.config import Config
from rlhf_jax.launch import launch

class Toy(Config):
    seed: int = 0
    kl_coef: float = 0.1

def run(config, context):
    with context.log.stage("ppo", 3) as stage:
        for step in range(3):
            stage.write(step, {"objective/kl": jax.jit(jnp.sin)(config.kl_coef)}, tokens=5)
    heavy = [name for name in ("torch", "tensorflow", "transformers") if name in sys.modules]
    return {"heavy": heavy, "cache": jax.config.jax_compilation_cache_dir}

if __name__ == "__main__":
    launch(run, Toy())
'''


def program(tmp_path, *argv, **environment):
    (tmp_path / "toy_task.py").write_text(PROGRAM)
    inherited = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    inherited.pop("JAX_COMPILATION_CACHE_DIR", None)
    paths = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "toy_task.py", *argv],
        cwd=tmp_path,
        env=inherited | paths | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_misspelt_flag_exits_with_2_and_a_suggestion(tmp_path):
    done = program(tmp_path, "--kl-coeff", "3")
    assert done.returncode == 2 and done.stdout == ""
    assert "--kl-coeff" in done.stderr and "--kl-coef FLOAT" in done.stderr
    assert "Perhaps you meant" in done.stderr


def test_help_shows_every_flag_with_its_default(tmp_path):
    done = program(tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("What the help says first.", "--kl-coef FLOAT", "(default: 0.1)", "--seed INT"):
        assert text in done.stdout
    for flag in ("--workdir DIR", "--data DIR", "--mesh SIZES", "--profile STEPS", "--debug"):
        assert flag in done.stdout


def test_a_program_runs_profiles_and_caches_what_it_compiles_under_home(tmp_path):
    done = program(tmp_path, "--workdir", "w", "--profile", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ppo 3/3" in done.stdout
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["cache"] == str(tmp_path / "home" / ".cache" / "rlhf_jax" / "compiled")
    assert summary["heavy"] == []  # with TensorBoard written, which would load torch
    assert json.loads((tmp_path / "w" / "config.json").read_text())["experiment"] == "toy_task"
    assert list((tmp_path / "w" / "profile" / "ppo").rglob("*.xplane.pb"))


def test_a_cache_that_the_environment_names_is_kept(tmp_path):
    done = program(tmp_path, "--workdir", "w", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "c"))
    assert done.returncode == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert summary["cache"] == str(tmp_path / "c")
