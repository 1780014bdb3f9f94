"""The command line: flags, exit codes, and what a workdir allows when it is used again."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.config import Config
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


def test_another_configuration_is_refused_and_the_run_left_alone(capsys):
    start("--workdir", "w")
    before = pathlib.Path("w/config.json").read_text()
    capsys.readouterr()
    run = Run()
    error = refused(capsys, "--workdir", "w", "--ppo.kl-coef", "0.5", run=run)
    assert error.startswith("error: --workdir w holds a run with other settings: ppo.kl_coef=0.1 ")
    assert run.calls == [] and pathlib.Path("w/config.json").read_text() == before


def test_another_experiment_in_the_same_folder_is_refused(capsys):
    start("--workdir", "w")
    other = Run()
    other.__module__ = "other"
    capsys.readouterr()
    assert '"toy" -> experiment file="other"' in refused(capsys, "--workdir", "w", run=other)


def test_another_data_folder_is_refused_and_none_at_all_is_not(capsys):
    for name in ("a", "b"):
        pathlib.Path(name).mkdir()
    start("--workdir", "w", "--data", "a")
    start("--workdir", "w")
    start("--workdir", "w", "--data", "./a")
    assert "/b" in refused(capsys, "--workdir", "w", "--data", "b")


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
    assert "; the same command with --workdir w begins ppo anew, of which no checkpoint" in error
    early = Run(KeyboardInterrupt(), train_first=False)
    error = refused(capsys, "--workdir", "v", run=early, code=130)
    assert error == "interrupted before the first step; nothing is kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    error = refused(capsys, "--workdir", "w", run=early, code=130)
    assert error == "interrupted; the same command with --workdir w goes on\n"


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
from rlhf_jax.config import Config, Count, Share
from rlhf_jax.launch import launch

class Inner(Config):
    """Of the toy."""
    share: Share = 0.5

class Toy(Config):
    seed: int = 0
    steps: Count = 3  # how many
    kl_coef: float = 0.1
    inner: Inner = Inner()

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


def test_a_value_outside_its_range_is_refused_on_the_command_line(tmp_path):
    for flags, named in (
        ("--steps 0", "steps=0 must be"),
        ("--inner.share 2", "share=2.0 must be"),
    ):
        done = program(tmp_path, *flags.split())
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert named in done.stderr


def test_help_shows_every_flag_with_its_default(tmp_path):
    done = program(tmp_path, "--help-all", COLUMNS="100")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("What the help says first.", "--kl-coef FLOAT", "(default: 0.1)", "--seed INT"):
        assert text in done.stdout
    for text in ("--steps INT ", "how many (default: 3)", "--inner.share FLOAT", "Of the toy."):
        assert text in done.stdout
    for flag in ("--workdir DIR", "--data DIR", "--mesh SIZES", "--profile STEPS", "--debug"):
        assert flag in done.stdout


def test_the_short_help_has_what_most_runs_need_on_any_terminal(tmp_path):
    done = program(tmp_path, "--help", COLUMNS="250")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("What the help says first.", "--workdir DIR", "--kl-coef FLOAT", "(default: 0.1)"):
        assert text in done.stdout
    assert "--profile" not in done.stdout and "Of the toy." not in done.stdout
    assert done.stdout.endswith("\n--help-all shows all 22 flags.\n")
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


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


def imported(tmp_path, code, **environment):
    """What `code` prints in a process of its own whose home is `tmp_path/home`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    own = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=inherited | own | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


FOLDER = "print(jax.config.jax_compilation_cache_dir)\n"


def test_importing_the_package_keeps_compiled_programs_under_home_and_starts_no_backend(tmp_path):
    compiled = tmp_path / "home" / ".cache" / "rlhf_jax" / "compiled"
    backends = "from jax._src import xla_bridge\nprint(xla_bridge.backends_are_initialized())\n"
    code = f"import rlhf_jax, jax\n{FOLDER}{backends}jax.jit(lambda x: x + 1)(1)\n"
    eager = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert imported(tmp_path, code, **eager) == [str(compiled), "False"]
    assert any(path.name.startswith("jit__lambda") for path in compiled.iterdir())


def test_a_folder_for_compiled_programs_that_the_user_named_is_kept(tmp_path):
    before = "import jax\njax.config.update('jax_compilation_cache_dir', 'mine')\nimport rlhf_jax\n"
    assert imported(tmp_path, before + FOLDER) == ["mine"]
    plain = "import rlhf_jax, jax\n" + FOLDER
    assert imported(tmp_path, plain, JAX_COMPILATION_CACHE_DIR="named") == ["named"]
    after = "import rlhf_jax, jax\njax.config.update('jax_compilation_cache_dir', None)\n"
    assert imported(tmp_path, after + FOLDER) == ["None"]
