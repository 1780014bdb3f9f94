"""Experiments of real sizes: their shapes, and the whole of each at toy size on eight devices."""

import ast
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax import folders, launch, sharding
from rlhf_jax.config import Config
from rlhf_jax.data import tokenizers
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.huggingface import configurations
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import own_data, preferences

pytestmark = pytest.mark.usefixtures("caches")
ANIMALS = "cat dog bird fish frog bear duck goat lion wolf deer mole crab swan hare seal".split()
# What stands in the config.json of each model, as far as it shapes the model.
STORED = {
    "qwen3_1b7_rlhf": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama3_8b_rlhf": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}
# As on a TPU for one of the two: layers in a loop, here beside adapters.
COMPUTE = {"qwen3_1b7_rlhf": {}, "llama3_8b_rlhf": {"scan_layers": True}}
MESHES = {"qwen3_1b7_rlhf": "fsdp=8", "llama3_8b_rlhf": "data=1,fsdp=4,tensor=2"}


@pytest.mark.parametrize("name", STORED)
def test_the_shape_is_that_of_the_models_config(experiment, name):
    program = experiment(name)
    stored = configurations.config_from(STORED[name], dtype="bfloat16")
    assert dataclasses.replace(stored, remat="full") == program.SHAPE
    assert program.config.shape == program.SHAPE


def test_a_step_of_the_8b_has_512k_tokens(experiment):
    config = experiment("llama3_8b_rlhf").config
    length = config.max_prompt + config.max_response
    responses = config.ppo.num_responses // config.ppo.num_minibatches
    assert length >= 2048 and config.max_prompt + config.ppo.sampling.max_new_tokens >= 2048
    rows = (config.sft.batch_size, 2 * config.reward_model.batch_size, responses)
    assert min(rows) * length >= 512 * 1024


def toy(program, iterations, **changes):
    """The experiment with a few tiny steps."""
    config = program.config
    return dataclasses.replace(
        config,
        sft=tiny.short(config.sft, num_steps=2, batch_size=8),
        reward_model=tiny.short(config.reward_model, num_steps=2, batch_size=8),
        ppo=tiny.short(
            config.ppo,
            num_iterations=iterations,
            batch_size=16,
            sampling=Sampling(max_new_tokens=8),
            num_epochs=1,
            save_every=1,
        ),
        max_prompt=8,
        max_response=8,
        held_out=0.25,
        best_of=2,
        judge_draws=2,
        **changes,
    )


@pytest.fixture
def start(tmp_path):
    """A folder of an untrained model of the experiment's family, and the user's files."""

    def start(program) -> dict:
        texts = [f"the {x} ran home" for x in ANIMALS]
        tokenizer = tokenizers.train_bpe(texts, 280)
        shape = dataclasses.replace(
            program.SHAPE,
            vocab_size=280,
            num_layers=1,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            d_ff=48,
            max_length=64,
        )
        folders.export(tmp_path / "base", transformer.init(shape, jax.random.key(0)), tokenizer)
        rows = {
            "demonstrations": [{"prompt": f"a {x}", "completion": " ran home"} for x in ANIMALS],
            "preferences": [
                {"prompt": f"the {x}", "chosen": " ran", "rejected": " home"} for x in ANIMALS
            ],
            "pretraining": [{"text": f"the {x} ran"} for x in ANIMALS],
        }
        files = {"model": str(tmp_path / "base")}
        for name, these in rows.items():
            files[name] = str(tmp_path / f"{name}.jsonl")
            with open(files[name], "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in these)
        return files

    return start


@pytest.mark.parametrize(
    ("name", "lora_rank", "mixed"),
    [
        ("qwen3_1b7_rlhf", 0, False),
        pytest.param("llama3_8b_rlhf", 4, True, marks=pytest.mark.slow),
    ],
)
def test_it_imports_trains_resumes_and_exports_on_eight_devices(
    experiment, start, tmp_path, called_programs, name, lora_rank, mixed
):
    program = experiment(name)
    files = start(program) | {"lora_rank": lora_rank}
    if not mixed:
        del files["pretraining"]
    flags = ["--workdir", str(tmp_path / "run"), "--mesh", MESHES[name]]
    for flag, value in COMPUTE[name].items():
        flags += [f"--{flag.replace('_', '-')}", str(value)]

    def launched(iterations) -> dict:
        return launch.launch(own_data.run, toy(program, iterations, **files), flags)

    summary = launched(1)
    assert {"sft", "reward_model", "judge", "ppo", "seconds"} == summary.keys()
    assert np.isfinite(summary["ppo"]["win_rate"])
    # What a plan for these devices compiles is what was run.
    sizes = dict(part.split("=") for part in MESHES[name].split(","))
    mesh = sharding.make_mesh(**{axis: int(size) for axis, size in sizes.items()})
    ran = set(called_programs.called)
    context = tiny.context(mesh, **COMPUTE[name])
    assert called_programs.of(own_data.programs(toy(program, 1, **files), context)) == ran

    first = tmp_path / "run" / "export"
    assert {x.name for x in first.iterdir()} == {"sft", "reward_model", "policy"}
    tuned = huggingface.load(first / "policy")
    # Two more iterations go on from the first; the stages before PPO are restored.
    longer = launched(3)
    assert longer["sft"] == summary["sft"]
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in log]
    assert {name: stages.count(name) for name in ("sft", "judge", "ppo")} == {
        "sft": 2,
        "judge": 2,
        "ppo": 3,
    }
    assert sum("loss/pretraining" in line for line in log) == 3 * mixed
    exported = folders.load(first / "policy").model
    pairs = zip(jax.tree.leaves(exported), jax.tree.leaves(tuned), strict=True)
    assert any(np.any(one != other) for one, other in pairs)
    assert exported.config == huggingface.shape(files["model"])


# What each experiment lists for `--plan`, and where the function is that lists it.
LISTED = {
    "quickstart": (12, None),
    "stories_sentiment": (11, None),
    "arithmetic": (8, None),
    "side_by_side": (53, None),
    "conventions": (24, None),
    "own_data": (16, own_data),
    "grpo_own_reward": (5, None),
    "dpo_own_data": (5, None),
    "sft_alpaca_zh": (3, None),
    "reward_model_harmless": (6, preferences),
    "reward_model_gpt4_comparisons": (9, None),
    "qwen3_1b7_rlhf": (16, own_data),
    "llama3_8b_rlhf": (16, own_data),
}


def test_every_experiment_can_be_planned():
    folder = pathlib.Path(__file__).parents[1] / "experiments"
    sources = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    assert sources.keys() == LISTED.keys()
    for name, tree in sources.items():
        (call,) = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch"
        )
        module = LISTED[name][1]
        owner = f"{module.__name__.split('.')[-1]}." if module else ""
        assert ast.unparse(call).endswith(f"programs={owner}programs)"), name


def shallow(config: Config) -> Config:
    """The same with two layers, which are quicker to trace."""
    found = {name: shape for name, shape in vars(config).items() if name in ("shape", "model")}
    layers = {
        name: dataclasses.replace(shape, num_layers=2)
        for name, shape in found.items()
        if isinstance(shape, transformer.Config)
    }
    return dataclasses.replace(config, **layers)


@pytest.mark.parametrize("name", LISTED)
def test_an_experiment_is_planned_without_model_data_or_tokenizer(
    experiment, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
    program, (count, module) = experiment(name), LISTED[name]
    listed = (module or program).programs(
        shallow(program.config), tiny.context(sharding.make_mesh())
    )
    assert len(listed) == count == len({x.name for x in listed})
    assert not list(tmp_path.iterdir())


def test_the_shapes_in_the_stories_file_are_those_of_its_model(experiment, real_data):
    stories = experiment("stories_sentiment")
    folder = real_data / "models" / "stories260K"
    assert huggingface.shape(folder) == stories.SHAPE
    assert tokenizers.from_folder(folder).ends == stories.ENDS


def test_a_named_model_is_planned_from_its_config_alone(tmp_path, experiment):
    (tmp_path / "config.json").write_text(
        json.dumps(STORED["qwen3_1b7_rlhf"] | {"num_hidden_layers": 1})
    )
    config = dataclasses.replace(experiment("own_data").config, model=str(tmp_path))
    step = own_data.programs(config, tiny.context(sharding.make_mesh()))[0]
    policy = step.arguments[1].trainable["policy"]
    assert policy.weights["embed"]["embedding"].shape == (151936, 2048)
