"""The experiments on real preferences and answers, at toy size."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import tiny

from rlhf_jax import launch

pytestmark = pytest.mark.usefixtures("caches")
ONE_DEVICE = ["--mesh", "data=1,fsdp=1,tensor=1"]


@pytest.fixture
def few(tmp_path, real_data):
    """The folder of real data with a few rows of each file, spread over it."""
    folder = tmp_path / "data"
    for name, count in (
        ("preference/hh_harmless_base_test.jsonl.gz", 90),
        ("preference/comparison_gpt4_en.json", 60),
        ("preference/comparison_gpt4_zh.json", 60),
        ("preference/pandalm_testset_v1.json", 20),
        ("preference/oasst_rm_zh.json", 40),
        ("preference/alpaca_eval_gpt4.jsonl.gz", 60),
        ("sft/alpaca_zh_demo.json", 60),
        ("sft/oasst_sft_zh.json", 30),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            lines = gzip.open(real_data / name, "rt", encoding="utf-8").readlines()
            lines = lines[:: len(lines) // count]
            with gzip.open(folder / name, "wt", encoding="utf-8") as file:
                file.writelines(lines)
        else:
            rows = json.loads((real_data / name).read_text(encoding="utf-8"))
            rows = rows[:: len(rows) // count]
            (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    (folder / "tokenizers").symlink_to(real_data / "tokenizers")
    return folder


def small(config, **changes):
    shape = dataclasses.replace(
        config.model, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32
    )
    return dataclasses.replace(
        config,
        model=shape,
        sft=tiny.short(config.sft, num_steps=2, batch_size=4),
        **changes,
    )


def small_preferences(config, **changes):
    scorer = tiny.short(config.reward_model, num_steps=2, batch_size=8)
    return small(config, reward_model=scorer, **changes)


def start(module, config, tmp_path, data):
    arguments = ["--workdir", str(tmp_path / "run"), "--data", str(data), *ONE_DEVICE]
    return launch.launch(module.run, config, arguments)


def test_the_model_of_harmlessness_is_measured_beside_length(experiment, tmp_path, few):
    module = experiment("reward_model_harmless")
    config = small_preferences(module.config)
    summary = start(module, config, tmp_path, few)
    found = summary["reward_model"]
    assert found["eval_accuracy_low"] <= found["eval_accuracy"] <= found["eval_accuracy_high"]
    assert found["eval_longer_wins"] + found["eval_shorter_wins"] == pytest.approx(1.0)
    assert 0.0 <= found["train_accuracy"] <= 1.0
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"{found['eval_accuracy']:.1%}</b><p>held-out comparisons, 95 % interval" in report


@pytest.mark.slow
def test_both_losses_are_measured_on_gpt4_on_people_and_by_model(experiment, tmp_path, few):
    module = experiment("reward_model_gpt4_comparisons")
    config = module.config
    config = small_preferences(config, alpaca_eval_rows=40)
    summary = start(module, config, tmp_path, few)["reward_model"]
    assert summary.keys() == {"rank", "regression"}
    for figures in summary.values():
        assert {"gpt4_en", "gpt4_zh", "pandalm_en", "oasst_zh", "alpaca_eval"} == figures.keys()
        judged = figures["alpaca_eval"]
        assert judged["gap"].keys() == judged["gpt4_win_rate"].keys()
        assert all(0.0 <= rate <= 1.0 for rate in judged["gpt4_win_rate"].values())
        assert -1.0 <= judged["order"] <= 1.0 and 8 < len(judged["gap"]) <= 16
    assert summary["rank"] != summary["regression"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Accuracy, Reward model (regression)" in report and "comparisons, oasst_zh" in report


def test_chinese_answers_are_packed_learned_and_exported(experiment, tmp_path, few):
    module = experiment("sft_alpaca_zh")
    config = small(module.config)
    summary = start(module, config, tmp_path, few)
    assert summary["utilisation"]["packed"] > summary["utilisation"]["plain"]
    # Frequencies of a few rows beat the uniform distribution; two steps of noise hardly do.
    assert 4.0 < summary["sft"]["frequency_loss"] < np.log(6400) < summary["sft"]["eval_loss"] + 0.5
    exported = {path.name for path in (tmp_path / "run" / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported


@pytest.mark.parametrize(
    "name", ["reward_model_harmless", "reward_model_gpt4_comparisons", "sft_alpaca_zh"]
)
def test_without_data_they_say_how_to_name_it(experiment, name, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
    module = experiment(name)
    with pytest.raises(SystemExit) as stopped:
        launch.launch(module.run, module.config, ["--workdir", str(tmp_path / "x"), *ONE_DEVICE])
    assert stopped.value.code == 2 and "--data DIR" in capsys.readouterr().err
