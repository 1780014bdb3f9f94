"""The benchmarks at toy size: what they report, that their units agree, and their lower bounds."""

import dataclasses
import json
import shlex
import sys

import jax
import pytest
from conftest import load_program

from rlhf_jax.models import transformer

# The programs import `bounds` and `workloads`, which stand beside them and are loaded first.
bounds, workloads, speed, growth, gpu = (
    load_program(f"benchmarks/{name}") for name in ("bounds", "workloads", "speed", "growth", "gpu")
)

SHAPE = transformer.Config(
    vocab_size=32, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16
)
SIZES = {"batch": 2, "prompt": 3, "response": 4, "epochs": 2, "model": SHAPE}
TOKENS = {"sft": 2 * 7, "reward_model": 2 * 2 * 7, "sampling": 2 * 4, "ppo": 2 * 7}
TOY = speed.Config(steps=2, matmul=64, copy=1, tasks=tuple(TOKENS), **SIZES)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """The backend's optimisations take a third of the time and change no figure tested here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_every_task_gives_a_row_whose_units_agree_with_each_other():
    rows = list(speed.run(TOY))
    assert [row.task for row in rows] == list(TOKENS)
    for row in rows:
        seconds = row.seconds_per_step
        assert row.tokens_per_second == pytest.approx(TOKENS[row.task] / seconds)
        assert row.arithmetic_share == pytest.approx(row.gigaflops / row.matmul_gflops / seconds)
        assert row.memory_share == pytest.approx(row.gigabytes / row.copy_gbytes / seconds)
        assert row.compilations == 0 and row.compile_seconds > 0
        assert 0 < row.program_megabytes < row.process_megabytes
        assert row.round_seconds == (seconds,) and row.peer_seconds == ()


def test_rows_of_the_same_prompt_are_decoded_searched_and_trained_on():
    tasks = ("sampling", "greedy", "beam", "grpo")
    rows = list(speed.run(dataclasses.replace(TOY, tasks=tasks, samples=2)))
    assert [row.task for row in rows] == list(tasks)
    assert all(row.compilations == 0 for row in rows)


def test_a_prompt_that_is_shared_is_read_once():
    apart, shared = (bounds.sampling_work(dataclasses.replace(TOY, samples=n)) for n in (1, 2))
    assert apart.flops - shared.flops == bounds.forward_flops(SHAPE, 1, 0, 3, heads=1)
    assert apart.bytes - shared.bytes == 2 * 4 * 4 * 3 * 3  # 2 x 4 numbers a column, 3 steps of 3


def test_a_shared_critic_saves_the_passes_and_the_updates_of_a_network_of_its_own():
    policy = jax.eval_shape(lambda: transformer.init(SHAPE, jax.random.key(0)))
    own, shared = (bounds.ppo_work(TOY, policy, critic) for critic in (policy, None))
    value = bounds.forward_flops(SHAPE, 2, 0, 7, heads=0)
    assert own.flops - shared.flops == (1 + 3 * 2) * value
    updates = 2 * bounds.update_bytes(policy)
    assert own.bytes - shared.bytes == bounds.weight_bytes(SHAPE, head=False) + updates


def peer(code):
    return shlex.join([sys.executable, "-c", code])


def test_another_program_is_timed_in_turn_with_ours_in_every_round(tmp_path):
    calls = tmp_path / "calls"
    code = f"""if True:
        from pathlib import Path
        calls = len(Path({str(calls)!r}).read_text()) if Path({str(calls)!r}).exists() else 0
        Path({str(calls)!r}).write_text("." * (calls + 1))
        print("loading")
        print('{{"seconds_per_step": %d}}' % (calls + 1))
    """
    config = dataclasses.replace(
        TOY, tasks=("sft",), rounds=3, json=tmp_path / "speed.jsonl", peer=(f"sft={peer(code)}",)
    )
    speed.main(config)
    (line,) = config.json.read_text().splitlines()
    found = json.loads(line)
    assert found["peer_seconds"] == [1.0, 2.0, 3.0] and len(found["round_seconds"]) == 3
    assert found["seconds_per_step"] == sorted(found["round_seconds"])[1]
    assert (found["batch"], found["prompt"], found["vocab_size"]) == (2, 3, 32)
    assert found["device_megabytes"] is None  # a CPU does not tell


def test_a_program_that_fails_or_prints_no_seconds_says_what_it_wrote():
    with pytest.raises(RuntimeError, match="exit code 3, 0 lines.*\n.*out of rows"):
        code = "import sys; print('out of rows', file=sys.stderr); sys.exit(3)"
        speed.seconds_of_peer(shlex.split(peer(code)))
    with pytest.raises(RuntimeError, match="exit code 0, 0 lines"):
        speed.seconds_of_peer(shlex.split(peer("print('done')")))


@pytest.mark.parametrize("entry", ["python peer.py", "dpo=python peer.py", "sft,dpo=x"])
def test_a_peer_without_one_of_our_tasks_is_refused(entry):
    with pytest.raises(ValueError, match="write TASK=COMMAND, with tasks from sft, "):
        speed.peers(dataclasses.replace(TOY, peer=(entry,)))


def test_a_task_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no task is called 'trpo'; choose from sft, "):
        list(speed.run(dataclasses.replace(TOY, tasks=("trpo",))))


def test_a_program_that_is_compiled_after_the_first_step_is_an_error(monkeypatch):
    step = jax.jit(lambda x: x[:-1])  # another shape in every step, so another program

    def make(config, mesh, policy):
        x, work = jax.numpy.ones(9), bounds.Work(1.0, 1.0)
        return workloads.Task(x, step, ((step, (x,)),), tokens=1, work=work, trained=())

    monkeypatch.setitem(workloads.MAKERS, "sampling", make)
    with pytest.raises(RuntimeError, match="sampling: 3 programs were compiled after the first"):
        list(speed.run(dataclasses.replace(TOY, tasks=("sampling",))))


def test_flops_of_a_forward_pass_are_those_of_its_products_counted_one_by_one():
    rows, length = 2, 5
    flops = 0
    for position in range(length):
        products = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)]
        flops += sum(2 * n * m for n, m in products)  # query, key, value, out, gate, up, down
        seen = position + 1
        flops += 2 * (2 * seen * 2 * 4)  # scores and mixing: 2 heads of 4 with `seen` columns
    flops += 3 * 2 * 8 * 32  # logits at three positions
    assert bounds.forward_flops(SHAPE, rows, 0, length, heads=3) == rows * flops


def test_decoding_after_a_prefill_costs_what_the_whole_row_costs():
    whole = bounds.forward_flops(SHAPE, 2, 0, 9, heads=4)
    parts = [bounds.forward_flops(SHAPE, 2, *span, heads=2) for span in ((0, 5), (5, 9))]
    assert sum(parts) == whole


def test_weights_that_are_read_in_bfloat16_are_half_as_many_bytes():
    half = dataclasses.replace(SHAPE, dtype="bfloat16")
    whole = bounds.weight_bytes(SHAPE, head=True)
    assert bounds.weight_bytes(half, head=True) == whole / 2 > 0


def test_the_exponent_is_the_power_that_the_costs_grow_with():
    points = [growth.Point("rows", "sft", size, 7 * size**1.5) for size in (1, 3, 10)]
    assert growth.exponent(points) == pytest.approx(1.5)


def test_costs_are_seconds_of_a_step_and_megabytes_that_more_rows_add_to():
    base = bounds.Workload(**SIZES)
    assert growth.seconds(base, "sft", 1) > 0
    held, more = (
        growth.megabytes(dataclasses.replace(base, batch=rows), "sft") for rows in (16, 32)
    )
    assert 0 < held < more


def test_the_growth_of_costs_is_measured_at_every_size_and_drawn(tmp_path, capsys, monkeypatch):
    def seconds(config, task, steps):
        return config.batch * (config.prompt + config.response) ** 2

    def megabytes(config, task):
        return config.model.vocab_size + 0.5 * config.batch

    monkeypatch.setattr(growth, "seconds", seconds)
    monkeypatch.setattr(growth, "megabytes", megabytes)
    config = growth.Config(json=tmp_path / "growth.jsonl", plot=tmp_path / "growth.png")
    growth.main(config)
    points = [growth.Point(**json.loads(x)) for x in config.json.read_text().splitlines()]
    sizes = (config.rows, config.lengths, config.vocabularies, config.vocabularies)
    for panel, expected, power in zip(growth.PANELS, sizes, (1, 2, None, 0)):
        tasks = growth.curves(points, panel)
        assert tuple(tasks) == config.tasks
        for line in tasks.values():
            assert tuple(x.size for x in line) == expected
            assert power is None or growth.exponent(line) == pytest.approx(power)
    assert config.plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "seconds by rows" in printed and "exponent" in printed


def toy_gpu(**changes):
    sizes = gpu.Sizes(batch=2, prompt=3, response=4)
    model = dataclasses.replace(SHAPE, tied=True, dtype="bfloat16")
    return gpu.Config(
        **{"model": model, "sft": sizes, "sampling": sizes, "ppo": sizes, "epochs": 1},
        **{"shared_critic": True, "steps": 1, "matmul": 64, "copy": 1, **changes},
    )


def test_an_accelerator_is_measured_in_fine_tuning_sampling_and_ppo(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = toy_gpu(generate=False, json=tmp_path / "gpu.jsonl")
    gpu.main(config)
    lines = [json.loads(line) for line in config.json.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["sft", "sampling", "ppo_shared"]
    for line in lines:
        share = line["gigaflops"] / line["matmul_gflops"] / line["seconds_per_step"]
        assert line["arithmetic_share"] == pytest.approx(share, rel=0.01)
        assert line["peak_share"] is None and line["generate_seconds"] is None
    printed = capsys.readouterr().out
    assert "missed" in printed and "unknown" in printed


def test_generate_of_transformers_is_timed_where_torch_has_the_device():
    torch = pytest.importorskip("torch")
    assert gpu.seconds_of_generate(toy_gpu(torch_device="cpu")) > 0
    if not torch.cuda.is_available():
        assert gpu.seconds_of_generate(toy_gpu()) is None


def test_the_shape_that_an_accelerator_is_measured_with_is_that_of_llama_3_2_1b():
    shapes = jax.eval_shape(lambda: transformer.init(gpu.LLAMA_1B, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_235_814_400
