"""Numbers that make no run, sizes that no machine holds, and outputs that cannot be written."""

import dataclasses
import json
import math
import os
import pathlib
import pkgutil

import jax
import pytest
import tiny

import rlhf_jax
from rlhf_jax import chips, config, launch, pipeline, sizes, storage, texts, workdir
from rlhf_jax.models import lora, transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.tools import chat, judge, label, plot, respond
from rlhf_jax.training.state import OptimizerConfig

NO_NUMBERS = (math.nan, math.inf, -math.inf, 1e39, 2**128, 10**400, True, "1")
NO_COUNTS = (-1, 2**31, 2**70, 10**30, 10**5000, 1.0, math.nan, True, "1")
EVEN_NEGATIVE = {"presence_penalty", "frequency_penalty", "length_penalty"}


def every_config():
    """All classes of configurations that the library has, by name."""
    for module in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax."):
        __import__(module.name)
    found, queue = {}, [config.Config]
    for cls in queue:
        queue += cls.__subclasses__()
    for cls in queue[1:]:
        if cls.__module__.startswith("rlhf_jax."):
            found[f"{cls.__module__}.{cls.__name__}"] = cls
    return found


def refuses(cls, name, value):
    """Whether no configuration can have the value, whatever its other fields are."""
    hint = config._hints(cls)[name]
    try:
        config.check_field(name, value, hint)
    except ValueError as error:
        return str(error).startswith(f"{name}=") and "\n" not in str(error)
    return False


@pytest.mark.parametrize("name", sorted(every_config()))
def test_no_number_of_any_configuration_is_nan_infinite_or_negative_without_a_reason(name):
    cls = every_config()[name]
    for field, hint in config._hints(cls).items():
        kinds = {o if o in (int, float) else getattr(o, "__origin__", None) for o in _members(hint)}
        assert kinds.isdisjoint({int, float}) or len(kinds & {int, float}) == 1
        if float in kinds:
            assert all(refuses(cls, field, value) for value in NO_NUMBERS), field
            assert refuses(cls, field, -1) or field in EVEN_NEGATIVE, field
        if int in kinds:
            assert all(refuses(cls, field, value) for value in NO_COUNTS), field


def _members(hint):
    return config._options(hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b1": 1.0}, "b1=1.0 must be in [0, 1)"),
        ({"b2": 0.999999999999}, "b2=0.999999999999 must be in [0, 1), as float32 holds it"),
        ({"eps": 1e-300}, "eps=1e-300 must be above 0, as float32 holds it"),
        ({"final_scale": 1.5}, "final_scale=1.5 must be in [0, 1]"),
        ({"learning_rate": 10**400}, "learning_rate=a huge whole number must be finite"),
    ],
)
def test_what_adam_would_divide_by_zero_with_is_refused(changes, message):
    with pytest.raises(ValueError) as raised:
        OptimizerConfig(**changes)
    assert str(raised.value) == message


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40, 10**30])
def test_a_seed_out_of_32_bits_is_refused_wherever_one_is_taken(seed):
    with pytest.raises(ValueError, match="seed="):
        dataclasses.replace(tiny.PPO, seed=seed)
    shape = dataclasses.replace(tiny.SHAPE, num_layers=1)
    model = transformer.Model(shape, {})
    with pytest.raises(ValueError, match="seed="):
        texts.generate(model, tiny.TOKENIZER, ["a"], seed=seed)
    for main, arguments in ((chat.main, []), (respond.main, ["p", "--output", "o.jsonl"])):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--model", "nowhere", "--seed", str(seed)])
        assert stopped.value.code == 2


# ------------------------------------------------------------------------------------------- sizes

HUGE = {
    "vocab_size": 2**31 - 1,
    "d_model": 10**9,
    "d_ff": 2**31 - 1,
    "num_heads": 10**9,
    "head_dim": 10**9,
}


@pytest.fixture
def little_memory(monkeypatch):
    """The memory of a small machine, on whatever machine the tests run."""
    monkeypatch.setattr(chips, "memory", lambda devices: 16.0 * chips.GIB)


@pytest.mark.parametrize("field", sorted(HUGE))
@pytest.mark.usefixtures("little_memory")
def test_a_model_that_no_memory_holds_is_refused_before_anything_is_traced(field, monkeypatch):
    shape = dataclasses.replace(tiny.SHAPE, **{field: HUGE[field]})
    monkeypatch.setattr(transformer, "init", lambda *_: pytest.fail("traced"))
    context = tiny.context(tiny.mesh())
    for attempt in (
        lambda: pipeline.new_model(shape, context, 0),
        lambda: pipeline.check(context, shape, 12, sft=tiny.SFT),
    ):
        with pytest.raises(ValueError, match=f"{field}={HUGE[field]}.* GiB at the very least"):
            attempt()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"sft": dataclasses.replace(tiny.SFT, batch_size=10**9)}, "sft.batch_size=1000000000"),
        ({"ppo": dataclasses.replace(tiny.PPO, batch_size=10**9)}, "ppo.batch_size"),
        ({"ppo": dataclasses.replace(tiny.PPO, samples_per_prompt=10**8)}, "ppo.batch_size"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_a_batch_that_no_memory_holds_is_refused_by_the_stage_and_its_size(stage, message):
    with pytest.raises(ValueError, match=f"{message}.* GiB at the very least, but the devices"):
        pipeline.check(tiny.context(tiny.mesh()), tiny.SHAPE, 12, **stage)


def test_layers_beyond_all_measure_and_ranks_above_the_kernels_are_refused():
    with pytest.raises(ValueError, match=r"num_layers=1000000000 must be in \[1, 10000\]"):
        dataclasses.replace(tiny.SHAPE, num_layers=10**9)
    kernels = {"query": {"kernel": jax.numpy.zeros((4, 6))}}
    model = transformer.Model(tiny.SHAPE, {"layer_0": kernels})
    assert lora.attach(model, lora.Config(rank=4), jax.random.key(0))
    with pytest.raises(ValueError, match="rank=100000 is above 4, the highest"):
        lora.attach(model, lora.Config(rank=100000), jax.random.key(0))


def test_the_bound_counts_the_matrices_of_a_model_and_refuses_none_that_fits():
    shapes = jax.eval_shape(lambda key: transformer.init(tiny.SHAPE, key), jax.random.key(0))
    matrices = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 1)
    assert sizes.num_weights(tiny.SHAPE) == matrices
    memory = chips.memory(jax.devices())
    assert memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes.check_model(tiny.SHAPE, tiny.mesh(), sizes.TRAINED)
    sizes.check_drawn("batch_size", 16, 128, tiny.SHAPE)
    with pytest.raises(ValueError, match="batch_size=1000000000000 answers of 128 tokens"):
        sizes.check_drawn("batch_size", 10**12, 128, tiny.SHAPE)


def test_no_million_answers_to_each_prompt():
    model = transformer.Model(tiny.SHAPE, {})
    for number in (0, -1, 10**12):
        with pytest.raises(ValueError, match="num_samples="):
            texts.generate(model, tiny.TOKENIZER, ["a"], Sampling(), num_samples=number)


# ---------------------------------------------------------------------------------- files and flags


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, main, *arguments):
    """Runs what must fail; returns its one line on stderr."""
    before = sorted(pathlib.Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(pathlib.Path().rglob("*")) == before  # nothing is left behind
    return error


def run_at(*flags):
    class Nothing(config.Config):
        seed: config.Whole = 0

    return launch.launch(lambda config, context: {}, Nothing(), list(flags))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"text"', "holds a str, not an object"),
        ('{"experiment": "x", "config": "text"}', "'experiment' or 'config' is missing, or not"),
        ('{"experiment": 3, "config": {}}', "'experiment' or 'config' is missing, or not"),
        ('{"experiment": "x", "config": {}, "contents": 3}', "'contents' is no object"),
        ("[" * 200000, "not valid JSON"),
    ],
)
def test_a_config_json_that_no_run_has_written_is_refused(capsys, content, message):
    pathlib.Path("w").mkdir()
    pathlib.Path("w/config.json").write_text(content)
    assert message in refused(capsys, lambda flags: run_at(*flags), "--workdir", "w")


def test_a_workdir_is_no_empty_text_pipe_folder_or_endless_name(capsys):
    def main(flags):
        return run_at(*flags)

    assert "--workdir is the empty text" in refused(capsys, main, "--workdir", "")
    assert "File name too long" in refused(capsys, main, "--workdir", "n" * 300)
    pathlib.Path("folder/config.json").mkdir(parents=True)
    assert "Is a directory" in refused(capsys, main, "--workdir", "folder")
    pathlib.Path("pipe").mkdir()
    os.mkfifo("pipe/config.json")
    assert "a pipe or a device" in refused(capsys, main, "--workdir", "pipe")


def test_a_byte_order_mark_before_config_json_is_none_of_its_settings():
    described = {"experiment": "x", "config": {"seed": 0}}
    pathlib.Path("w").mkdir()
    pathlib.Path("w/config.json").write_text(json.dumps(described), encoding="utf-8-sig")
    assert workdir.compare(pathlib.Path("w"), described) is None  # the same run, unfinished


OUTPUTS = {
    "label": (label.main, ["in.jsonl", "--output"], "o.html"),
    "judge": (judge.main, ["page", "in.jsonl", "in.jsonl", "--output"], "o.html"),
    "respond": (respond.main, ["in.jsonl", "--model", "nowhere", "--output"], "o.jsonl"),
}


@pytest.mark.parametrize("tool", OUTPUTS)
def test_an_output_that_cannot_be_written_is_found_before_any_work(tool, capsys, monkeypatch):
    main, arguments, name = OUTPUTS[tool]
    monkeypatch.setattr(chat, "load", lambda *_: pytest.fail("the model is read"))
    pathlib.Path("in.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"]}\n')
    pathlib.Path(name).mkdir()
    assert f"{name}: a folder; name a file in it" in refused(capsys, main, *arguments, name)
    pathlib.Path(name).rmdir()
    os.mkfifo(name)
    assert "a pipe or a device" in refused(capsys, main, *arguments, name)
    os.unlink(name)
    os.symlink("in.jsonl", name)
    assert "would replace what is read" in refused(capsys, main, *arguments, name)
    assert "File name too long" in refused(capsys, main, *arguments, "n" * 300 + name)
    assert "not a folder" in refused(capsys, main, *arguments, f"nowhere/{name}")


def test_a_file_that_cannot_be_replaced_leaves_no_part_of_itself():
    pathlib.Path("taken").mkdir()
    with pytest.raises(OSError):
        storage.write(pathlib.Path("taken"), "text")
    assert [x.name for x in pathlib.Path().iterdir()] == ["taken"]


SIDE, KEY = {"second": "left", "group": ""}, {"page": "p", "sides": [], "equal": []}


@pytest.mark.parametrize(
    "key",
    [
        "[1]",
        "[" * 200000,
        json.dumps(KEY | {"page": 1}),
        json.dumps(KEY | {"sides": 3}),
        json.dumps(KEY | {"sides": [1]}),
        json.dumps(KEY | {"sides": [{"group": ""}]}),
        json.dumps(KEY | {"sides": [SIDE | {"group": 1}]}),
        json.dumps(KEY | {"sides": [SIDE | {"second": "up"}]}),
        json.dumps(KEY | {"sides": [SIDE | {"second": ["left"]}]}),
        json.dumps(KEY | {"sides": [SIDE], "equal": [3]}),
        json.dumps(KEY | {"sides": [SIDE], "equal": [{"before": "x", "group": ""}]}),
        json.dumps(KEY | {"sides": [SIDE], "equal": [{"before": 0, "group": None}]}),
    ],
)
def test_a_key_of_wrong_types_is_no_key(capsys, key):
    pathlib.Path("k.json").write_text(key)
    pathlib.Path("v.jsonl").write_text('{"page": "p", "item": 0, "verdict": "left"}\n')
    error = refused(capsys, judge.main, "score", "v.jsonl", "--key", "k.json")
    assert error == "error: k.json: not a key file; name the one written beside the page\n"


@pytest.mark.parametrize("item", ["0", True, None, 1.0, [0], -1, 10**30])
def test_a_verdict_of_wrong_types_is_refused_by_its_line(capsys, item):
    pathlib.Path("k.json").write_text(json.dumps(KEY | {"sides": [SIDE, SIDE]}))
    row = {"page": "p", "item": item, "verdict": "left"}
    pathlib.Path("v.jsonl").write_text(json.dumps(row) + "\n")
    error = refused(capsys, judge.main, "score", "v.jsonl", "--key", "k.json")
    assert error.startswith("error: v.jsonl:1: item ")


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (None, [], "run: no run; name the folder of one"),
        ('{"stage": "a", "step": 0, "loss": "x"}', ["--metrics", "loss"], "'x', and no number"),
        ('{"stage": "a", "step": 0, "loss": null}', ["--metrics", "loss"], "None, and no number"),
        ('{"stage": "a", "step": 0}', ["--metrics", "stage"], "'a', and no number"),
        ('{"stage": "a", "step": 0}', ["--metrics", "loss"], "no line with loss"),
        ('{"stage": "a", "step": 0}', ["--metrics"], "--metrics names none"),
        ("hello", ["--metrics", "loss"], "metrics.jsonl:1: not JSON"),
    ],
)
def test_a_figure_of_what_is_no_curve_is_refused(capsys, lines, arguments, message):
    pathlib.Path("run").mkdir()
    if lines is not None:
        pathlib.Path("run/metrics.jsonl").write_text(lines + "\n")
    assert message in refused(capsys, plot.main, "a.png", "run", *arguments)


def test_a_figure_is_no_folder_and_its_runs_are_no_pipes(capsys):
    pathlib.Path("run").mkdir()
    os.mkfifo("run/metrics.jsonl")
    flags = ["run", "--metrics", "loss"]
    assert "a pipe or a device" in refused(capsys, plot.main, "a.png", *flags)
    pathlib.Path("a.png").mkdir()
    assert "a.png: a folder; name a file" in refused(capsys, plot.main, "a.png", *flags)
