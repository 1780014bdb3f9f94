"""The speed benchmark at toy size: which rows it gives, and that their units agree."""

import importlib.util
import json
import pathlib
import sys

import pytest

from rlhf_jax.models import transformer

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"
SPEC = importlib.util.spec_from_file_location("speed", FOLDER / "speed.py")
speed = importlib.util.module_from_spec(SPEC)
sys.modules["speed"] = speed  # dataclasses look their module up
SPEC.loader.exec_module(speed)

SHAPE = transformer.Config(
    vocab_size=32, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16
)
TOY = speed.Config(steps=2, batch=2, prompt=3, response=4, epochs=2, model=SHAPE, matmul=64, copy=1)
TOKENS = {"sft": 2 * 7, "reward_model": 2 * 2 * 7, "sampling": 2 * 4, "ppo": 2 * 7}


def test_every_task_gives_a_row_whose_units_agree_with_each_other():
    rows = speed.run(TOY)
    assert [row.task for row in rows] == list(TOKENS)
    for row in rows:
        seconds = row.seconds_per_step
        assert row.tokens_per_second == pytest.approx(TOKENS[row.task] / seconds)
        assert row.arithmetic_share == pytest.approx(row.gigaflops / row.matmul_gflops / seconds)
        assert row.memory_share == pytest.approx(row.gigabytes / row.copy_gbytes / seconds)
        assert row.compile_seconds > 0
        assert 0 < row.program_megabytes < row.process_megabytes


def test_json_has_one_line_a_task(capsys, monkeypatch, tmp_path):
    row = speed.Row("sft", 0.123456, *[1.0] * 10)
    monkeypatch.setattr(speed, "run", lambda config: [row])
    path = tmp_path / "speed.jsonl"
    speed.main(speed.Config(json=path))
    assert "sft" in capsys.readouterr().out
    assert json.loads(path.read_text())["seconds_per_step"] == 0.1235


def test_flops_of_a_forward_pass_are_those_of_its_products_counted_one_by_one():
    c, rows, length = SHAPE, 2, 5
    flops = 0
    for position in range(length):
        products = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)]
        flops += sum(2 * n * m for n, m in products)  # query, key, value, out, gate, up, down
        seen = position + 1
        flops += 2 * (2 * seen * 2 * 4)  # scores and mixing: 2 heads of 4 with `seen` columns
    flops += 3 * 2 * 8 * 32  # logits at three positions
    assert speed.forward_flops(c, rows, 0, length, heads=3) == rows * flops


def test_decoding_after_a_prefill_costs_what_the_whole_row_costs():
    whole = speed.forward_flops(SHAPE, 2, 0, 9, heads=4)
    parts = [speed.forward_flops(SHAPE, 2, *span, heads=2) for span in ((0, 5), (5, 9))]
    assert sum(parts) == whole
