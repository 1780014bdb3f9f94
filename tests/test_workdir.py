"""The folder of a run: which later use of it continues the run, and which is refused."""

import json
import pathlib

import pytest

from rlhf_jax import sharding, workdir
from rlhf_jax.config import Config, Source
from rlhf_jax.training.metrics import Log
from rlhf_jax.training.state import TrainingStopped


class Policy(Config):
    kl_coef: float = 0.1
    num_iterations: int = 2
    sizes: tuple[int, ...] = (1, 2)


class Experiment(Config):
    seed: int = 0
    num_steps: int = 3
    ppo: Policy = Policy()


class Own(Experiment):
    model: Source = "m"
    prompts: Source = "p.jsonl"
    style: str = "m"  # a name that happens to be a folder's too


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def described(config, folder="w", experiment="toy", data=None):
    return workdir.describe(experiment, config, data, pathlib.Path(folder))


def compare(config, folder="w", **others):
    return workdir.compare(pathlib.Path(folder), described(config, folder, **others))


def begin(config, folder="w", **others):
    run = described(config, folder, **others)
    workdir.begin(pathlib.Path(folder), run, sharding.make_mesh(fsdp=1))


def finish(config, folder="w", **others):
    begin(config, folder, **others)
    workdir.finish(pathlib.Path(folder), {"gold": 0.5})


def test_a_new_folder_carries_the_name_of_the_experiment_and_exists_nowhere():
    first = workdir.new_folder("toy")
    first.mkdir(parents=True)
    second = workdir.new_folder("toy")
    assert not second.exists() and first.parent == second.parent == pathlib.Path("runs")
    assert second.name.startswith("toy-")


def test_a_run_is_new_then_unfinished_then_finished_then_longer():
    config = Experiment()
    assert compare(config) is None
    begin(config)
    assert compare(config) is None
    workdir.finish(pathlib.Path("w"), {"gold": 0.5})
    assert compare(config) == {"gold": 0.5}
    longer = Experiment(ppo=Policy(num_iterations=9))
    assert compare(longer) is None
    begin(longer)
    assert not pathlib.Path("w/summary.json").exists()
    assert json.loads(pathlib.Path("w/config.json").read_text())["config"]["ppo"] == {
        "kl_coef": 0.1,
        "num_iterations": 9,
        "sizes": [1, 2],
    }


class Another(Experiment):
    alpha: float = 0.5


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Experiment(ppo=Policy(kl_coef=0.5)), "ppo.kl_coef=0.1 -> ppo.kl_coef=0.5"),
        (Experiment(seed=1, ppo=Policy(num_iterations=9)), "seed=0 -> seed=1"),
        (Experiment(ppo=Policy(num_iterations=1)), "ppo.num_iterations=2 -> ppo.num_iterations=1"),
        (Experiment(num_steps=2), "num_steps=3 -> num_steps=2"),
        # Later stages were trained on the model that these steps gave.
        (Experiment(num_steps=9), "num_steps=3 -> num_steps=9"),
        (Experiment(ppo=Policy(sizes=(1,))), "ppo.sizes=[1, 2] -> ppo.sizes=[1]"),
        (Another(), "no alpha -> alpha=0.5"),
    ],
)
def test_any_other_change_is_refused_naming_field_values_and_remedy(config, named):
    finish(Experiment())
    with pytest.raises(ValueError) as refused:
        compare(config)
    error = str(refused.value)
    assert error == (
        f"--workdir w holds a run with other settings: {named} (old -> new); "
        "name a new --workdir or use the old values (only num_iterations may grow)"
    )


class Newer(Experiment):
    """What a later release of the library may declare."""

    cutoff: float | None = None
    banned: tuple[int, ...] = ()
    texts: Source = ""


def test_a_setting_that_the_folder_does_not_have_yet_was_off():
    finish(Experiment())
    assert compare(Newer()) == {"gold": 0.5}
    for changed in (Newer(cutoff=0.0), Newer(banned=(3,)), Newer(texts="a")):
        named = r'(cutoff -> cutoff=0.0|banned -> banned=\[3\]|texts -> texts="a")'
        with pytest.raises(ValueError, match=f"no {named}"):
            compare(changed)
    finish(Newer())
    with pytest.raises(ValueError, match="cutoff=null -> cutoff=0.5"):
        compare(Newer(cutoff=0.5))


class Stage(Config):
    rate: float = 1.0


class NewStage(Stage):
    seed: int = 0
    on_bad_update: str = "stop"


class Staged(Config):
    sft: Stage = Stage()


class NewStaged(Config):
    sft: NewStage = NewStage()


def test_a_run_of_before_stages_had_a_seed_and_bad_updates_a_setting_goes_on():
    finish(Staged())
    assert compare(NewStaged()) == {"gold": 0.5}
    for changed in (NewStage(seed=1), NewStage(on_bad_update="skip")):
        with pytest.raises(ValueError, match=r"no sft\.\w+ -> sft\.\w+="):
            compare(NewStaged(sft=changed))


def test_another_experiment_or_data_folder_is_refused_and_no_data_is_not(tmp_path):
    finish(Experiment(), data=tmp_path / "a")
    assert compare(Experiment()) and compare(Experiment(), data=pathlib.Path("a"))
    with pytest.raises(ValueError, match='experiment file="toy" -> experiment file="other"'):
        compare(Experiment(), experiment="other")
    with pytest.raises(ValueError, match="/a.* -> data=.*/b"):
        compare(Experiment(), data=tmp_path / "b")


def test_files_and_folders_that_changed_since_are_refused_by_field():
    pathlib.Path("m/deep").mkdir(parents=True)
    weights, prompts = pathlib.Path("m/deep/weights"), pathlib.Path("p.jsonl")
    for path in (weights, prompts):
        path.write_bytes(b"a" * 200_000)
    finish(Own())
    assert compare(Own())
    for path, field in ((prompts, "prompts"), (weights, "model")):
        path.write_bytes(b"a" * 199_999 + b"b")
        pathlib.Path("w/summary.json").unlink(missing_ok=True)  # interrupted, or finished: alike
        with pytest.raises(ValueError, match=f"contents of {field}="):
            compare(Own())
        path.write_bytes(b"a" * 200_000)
    prompts.unlink()  # what reads it says so
    assert compare(Own()) is None


def test_the_files_of_the_run_itself_are_no_input():
    pathlib.Path("m").mkdir()
    finish(Own(), "m/run")
    pathlib.Path("m/run/checkpoint").write_text("new")
    assert compare(Own(), "m/run")


def test_a_source_that_names_no_file_has_no_fingerprint():
    nowhere = Own(model="", prompts="~nobody-of-this-name/p.jsonl")
    assert described(nowhere)["contents"] == {}


def test_the_file_of_an_entry_of_a_dataset_info_is_watched_too():
    pathlib.Path("a.json").write_text("[1]")
    pathlib.Path("dataset_info.json").write_text('{"mine": {"file_name": "a.json"}}')
    config = Own(prompts="dataset_info.json:mine")
    finish(config)
    assert compare(config)
    pathlib.Path("a.json").write_text("[2]")
    with pytest.raises(ValueError, match="contents of prompts="):
        compare(config)


def test_of_a_large_file_its_ends_and_some_places_between_are_read(monkeypatch):
    monkeypatch.setattr(workdir, "_READ_WHOLE", 2**20)
    file, size = pathlib.Path("p.jsonl"), 2**23
    content = bytearray(size)
    fingerprints = set()
    for changed in (None, 0, size - 1):
        if changed is not None:
            content[changed] = 1
        file.write_bytes(content)
        fingerprints.add(described(Own())["contents"]["prompts"])
    file.write_bytes(content + b"0")
    assert len(fingerprints | {described(Own())["contents"]["prompts"]}) == 4


def test_a_folder_that_is_no_run_is_refused():
    pathlib.Path("w").mkdir()
    assert compare(Experiment()) is None
    pathlib.Path("w/thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="w is not empty and has no config.json.*; name another"):
        compare(Experiment())
    with pytest.raises(ValueError, match="is a file; name a folder"):
        compare(Experiment(), "w/thesis.tex")


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("text", ["", '{"a":', "[]"])
def test_a_corrupt_file_is_named(name, text):
    finish(Experiment())
    pathlib.Path("w", name).write_text(text)
    with pytest.raises(ValueError, match=f"w/{name}: "):
        compare(Experiment())


def test_a_config_file_of_something_else_is_refused():
    pathlib.Path("w").mkdir()
    pathlib.Path("w/config.json").write_text('{"model": "x"}')
    with pytest.raises(ValueError, match="'experiment' or 'config' is missing"):
        compare(Experiment())


# -------------------------------------------------------------------------------- after a failure


def fail(error, folder, train_first=False):
    """A run that begins and fails, before its first step or after."""
    folder = pathlib.Path(folder)
    log = Log(folder, quiet=True)
    with pytest.raises(type(error)):
        with workdir.taken(folder, log):
            begin(Experiment(seed=7), folder)
            if train_first:
                with log.stage("sft", 1) as stage:
                    stage.write(0, {"loss": 0.0})
            raise error


@pytest.mark.parametrize("folder", ["w", "new/deep/w", "empty"])
@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failure_before_the_first_step_leaves_the_disk_as_it_was(tmp_path, folder, error):
    (tmp_path / "empty").mkdir()
    fail(error, folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


def test_a_failure_before_the_first_step_leaves_a_finished_run_finished():
    finish(Experiment())
    before = {path: path.read_text() for path in pathlib.Path("w").iterdir()}
    fail(ValueError("bad row"), "w")
    assert {path: path.read_text() for path in pathlib.Path("w").iterdir()} == before


def test_a_folder_in_which_another_run_has_begun_meanwhile_stays(tmp_path):
    pathlib.Path("runs/other").mkdir(parents=True)
    fail(ValueError("bad row"), "runs/mine")
    assert [path.name for path in pathlib.Path("runs").iterdir()] == ["other"]


def test_after_the_first_step_and_where_training_stopped_everything_is_kept():
    fail(ValueError("late"), "trained", train_first=True)
    fail(TrainingStopped("not finite"), "stopped")
    for folder in ("trained", "stopped"):
        assert json.loads(pathlib.Path(folder, "config.json").read_text())["config"]["seed"] == 7
        assert not pathlib.Path(folder, "summary.json").exists()


# ------------------------------------------------------------------------ starting from another run


class Start(Config):
    model: Source = ""
    scorer: Source = ""


class OwnModel(Config):
    size: int = 1


def export(folder, *names):
    folder.mkdir()
    (folder / "config.json").write_text('{"experiment": "toy", "config": {}}')
    for name in names:
        (folder / "export" / name).mkdir(parents=True, exist_ok=True)
        (folder / "export" / name / "config.json").write_text("{}")


@pytest.mark.parametrize(
    "names, model, scorer",
    [
        (["policy", "reward_model", "sft"], "policy", "reward_model"),
        (["sft", "reward_model"], "sft", "reward_model"),
        ([""], "", ""),
    ],
)
def test_a_run_starts_from_the_models_that_another_has_exported(names, model, scorer, tmp_path):
    export(tmp_path / "run", *names)
    found = workdir.started_from(Start(), str(tmp_path / "run"))
    base = tmp_path / "run" / "export"
    assert found.model == str(base / model)
    assert found.scorer == (str(base / scorer) if scorer else "")
    named = workdir.started_from(Start(scorer="mine"), str(tmp_path / "run"))
    assert (named.model, named.scorer) == (found.model, "mine")


def test_what_no_run_can_start_from_is_refused(tmp_path):
    export(tmp_path / "run", "policy")
    export(tmp_path / "unfinished")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for config, name, said in (
        (Start(), "none", "no run; name the workdir of one"),
        (Start(), "model", "no run, but perhaps a model; name a model's folder by --model"),
        (Start(), "unfinished", "it holds no exported model .*let that run finish"),
        (Start(model="other"), "run", "is named by --model already"),
        (OwnModel(), "run", "is made by this experiment"),
    ):
        with pytest.raises(ValueError, match=f"--from .*{name}: .*{said}"):
            workdir.started_from(config, str(tmp_path / name))
