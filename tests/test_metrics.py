"""The log of a run: what is written when, what survives a resume, what a console shows."""

import io
import json
import math
import pathlib
import struct
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rlhf_jax.training import metrics
from rlhf_jax.training.metrics import Display, Log

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PPO = Display("PPO", ("objective/scores", "objective/kl"), {"objective/kl": "KL"})
SFT = Display("Supervised fine-tuning", ("loss",), {"loss": "Loss"})


class OnDevice:
    """A scalar that remembers when the host asked for it."""

    def __init__(self, value, asked):
        self.value, self.asked = value, asked

    def __array__(self, dtype=None, copy=None):
        self.asked.append(self.value)
        return np.asarray(self.value, dtype)


def lines(folder, name="metrics.jsonl"):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / name).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def train(log, name, start, total, value=float, **options):
    with log.stage(name, total, start=start, **options) as stage:
        for step in range(start, total):
            stage.write(step, {"loss": value(step)})
    return stage


def ticking(monkeypatch, times):
    clock = iter(times)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


def test_the_host_asks_for_a_step_only_when_the_next_one_has_been_started():
    asked = []
    with Log(quiet=True).stage("sft", 3) as stage:
        stage.write(0, {"loss": OnDevice(10.0, asked)})
        assert asked == [] and stage.history == []
        stage.write(1, {"loss": OnDevice(11.0, asked)})
        assert asked == [10.0]
        stage.write(2, {"loss": OnDevice(12.0, asked)})
        assert asked == [10.0, 11.0]
    assert asked == [10.0, 11.0, 12.0]
    assert [(line["step"], line["loss"]) for line in stage.history] == [
        (0, 10.0),
        (1, 11.0),
        (2, 12.0),
    ]


def test_what_is_measured_on_the_host_is_asked_for_when_its_step_is_converted():
    asked, checked = [], []

    def measure(step):
        def more():
            asked.append(step)
            return {"gold": 0.5 + step}

        return more

    log = Log(quiet=True)
    with log.stage("ppo", 3, check=lambda step, floats: checked.append(floats)) as stage:
        stage.write(0, {"loss": 0.0, "kl": 1.0}, tokens=1, more=measure(0))
        assert asked == []
        stage.write(1, {"loss": 0.0, "kl": 1.0}, tokens=1, more=measure(1))
        assert asked == [0]
        stage.flush()
        assert asked == [0, 1]
        stage.write(2, {"loss": 0.0})
    assert asked == [0, 1] and checked[0] == {"loss": 0.0, "kl": 1.0, "gold": 0.5}
    after_metrics = ["step", "seconds", "loss", "kl", "gold", "tokens_per_second"]
    assert list(stage.history[1]) == after_metrics and stage.history[1]["gold"] == 1.5


def test_an_error_of_what_is_measured_on_the_host_ends_the_stage():
    def more():
        raise ZeroDivisionError("no response has a word")

    with pytest.raises(ZeroDivisionError, match="no response has a word"):
        with Log(quiet=True).stage("ppo", 3) as stage:
            stage.write(0, {"loss": 0.0}, more=more)
            stage.write(1, {"loss": 0.0}, more=more)


def test_flush_converts_the_newest_step_and_checks_it():
    checked = []
    with Log(quiet=True).stage("sft", 2, check=lambda *seen: checked.append(seen)) as stage:
        stage.write(0, {"loss": 1.0})
        stage.flush()
        assert checked == [(0, {"loss": 1.0})]
        stage.flush()
        stage.write(1, {"loss": 2.0})
    assert checked == [(0, {"loss": 1.0}), (1, {"loss": 2.0})]


def test_lines_hold_stage_step_seconds_and_metrics_in_the_order_they_were_given(tmp_path):
    with Log(tmp_path, quiet=True).stage("ppo", 1) as stage:
        stage.write(0, {"objective/kl": jnp.float32(0.5), "lr": 1e-5})
    (line,) = lines(tmp_path)
    assert list(line) == ["stage", "step", "seconds", "objective/kl", "lr"]
    assert (line["stage"], line["step"], line["objective/kl"], line["lr"]) == ("ppo", 0, 0.5, 1e-5)


def test_nan_and_infinity_are_written_as_strings_that_float_reads(tmp_path):
    bad = {"a": jnp.float32(jnp.nan), "b": math.inf, "c": -np.inf}
    with Log(tmp_path, quiet=True).stage("ppo", 1) as stage:
        stage.write(0, bad)
    (line,) = lines(tmp_path)
    assert math.isnan(float(line["a"]))
    assert (float(line["b"]), float(line["c"])) == (math.inf, -math.inf)
    assert math.isnan(stage.history[0]["a"])


def test_a_failing_check_ends_the_stage_with_its_line_on_disk(tmp_path):
    def check(step, floats):
        if floats["loss"] > 1:
            raise RuntimeError(f"step {step}")

    with pytest.raises(RuntimeError, match="step 2"):
        train(Log(tmp_path, quiet=True), "sft", 0, 9, check=check)
    # Step 3 had been started when step 2 was found to be bad; it is written, but not checked.
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_the_check_sees_the_last_step_too():
    def check(step, floats):
        if step == 2:
            raise RuntimeError("the last one")

    with pytest.raises(RuntimeError, match="the last one"):
        train(Log(quiet=True), "sft", 0, 3, check=check)


def test_an_exception_in_the_loop_writes_what_is_there(tmp_path):
    with pytest.raises(KeyError, match="from the loop"):
        with Log(tmp_path, quiet=True).stage("sft", 9) as stage:
            stage.write(0, {"loss": 1.0})
            raise KeyError("from the loop")
    assert [line["step"] for line in lines(tmp_path)] == [0]


def test_a_step_that_cannot_be_converted_does_not_mask_the_exception():
    class Failed:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("the step failed on the device")

    with pytest.raises(KeyError, match="from the loop"):
        with Log(quiet=True).stage("sft", 9) as stage:
            stage.write(0, {"loss": Failed()})
            raise KeyError("from the loop")


def test_a_metric_that_is_no_scalar_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'norms' of stage 'sft' has shape \(3,\)"):
        with Log(quiet=True).stage("sft", 1) as stage:
            stage.write(0, {"norms": jnp.ones(3)})


def test_a_resumed_stage_drops_the_steps_it_makes_again(tmp_path):
    log = Log(tmp_path, quiet=True)
    train(log, "sft", 0, 3)
    train(log, "ppo", 0, 6)
    train(Log(tmp_path, quiet=True), "ppo", 4, 8, value=lambda step: 100.0 + step)
    found = [(line["stage"], line["step"], line["loss"]) for line in lines(tmp_path)]
    assert found == [("sft", step, float(step)) for step in range(3)] + [
        *(("ppo", step, float(step)) for step in range(4)),
        *(("ppo", step, 100.0 + step) for step in range(4, 8)),
    ]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_stage_started_afresh_drops_all_its_steps_and_no_others(tmp_path):
    log = Log(tmp_path, quiet=True)
    train(log, "sft", 0, 2)
    train(log, "ppo", 0, 3)
    train(log, "sft", 0, 1)
    found = [(line["stage"], line["step"]) for line in lines(tmp_path)]
    assert found == [("ppo", 0), ("ppo", 1), ("ppo", 2), ("sft", 0)]


def test_the_half_line_of_a_killed_process_is_dropped(tmp_path):
    train(Log(tmp_path, quiet=True), "sft", 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 3, "lo')
    train(Log(tmp_path, quiet=True), "sft", 3, 5)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{", '{"step": 1}', "[1]"])
def test_a_broken_line_is_refused_with_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 0, "seconds": 1.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*; remove the line"):
        train(Log(tmp_path, quiet=True), "sft", 1, 2)


def test_seconds_go_on_from_where_the_last_process_stopped(tmp_path, monkeypatch):
    ticking(monkeypatch, [100.0, 103.0, 104.0])  # entry, then the end of each step
    train(Log(tmp_path, quiet=True), "sft", 0, 2)
    ticking(monkeypatch, [900.0, 902.0])
    train(Log(tmp_path, quiet=True), "sft", 2, 3)
    assert [line["seconds"] for line in lines(tmp_path)] == [3.0, 4.0, 6.0]


def test_tokens_per_second_is_wall_time_between_steps_and_leaves_out_the_first(monkeypatch):
    ticking(monkeypatch, [0.0, 60.0, 62.0, 63.0])  # the first step compiles for a minute
    with Log(quiet=True).stage("sft", 3) as stage:
        for step in range(3):
            stage.write(step, {"loss": 0.0}, tokens=jnp.int32(1000))
        stage.flush()
        # Two steps, 2000 tokens, three seconds.
        assert stage._speed.tokens_per_second == pytest.approx(2000 / 3)
        assert stage._speed.seconds_per_step == pytest.approx(1.5)
    assert "tokens_per_second" not in stage.history[0]
    assert [line["tokens_per_second"] for line in stage.history[1:]] == [500.0, 1000.0]


def events(folder):
    """(tag, step, value) and purges of TensorBoard's record files, read by their own format."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                found.append(("purge", event.step, None))
    return found


def test_tensorboard_shows_each_metric_as_stage_slash_metric(tmp_path):
    with Log(tmp_path, quiet=True).stage("ppo", 2, start=1) as stage:
        stage.write(1, {"objective/kl": 0.5, "broken": math.nan})
    found = events(tmp_path / "tensorboard" / "ppo")
    assert found == [("purge", 1, None), ("ppo/objective/kl", 1, 0.5)]


def test_samples_of_a_step_replace_those_that_it_had(tmp_path):
    log = Log(tmp_path, quiet=True)
    log.samples("ppo", 0, [{"prompt": "a", "completion": "first", "score": 1}])
    log.samples("ppo", 9, [{"prompt": "a", "completion": "late\u2028", "score": math.nan}])
    train(log, "ppo", 0, 1)  # what was sampled before a stage stays
    log.samples("ppo", 0, [{"prompt": "a", "completion": "again", "score": 0.5}])
    late, again = lines(tmp_path, "samples.jsonl")
    assert (late["step"], late["completion"], late["score"]) == (9, "late\u2028", "NaN")
    assert again == {"stage": "ppo", "step": 0, "prompt": "a", "completion": "again", "score": 0.5}


def test_each_stage_leaves_how_it_is_shown_beside_its_metrics(tmp_path):
    log = Log(tmp_path, quiet=True)
    train(log, "sft", 0, 1)
    assert not (tmp_path / "stages.json").exists() and metrics.read_displays(tmp_path) == {}
    train(log, "ppo", 0, 1, display=PPO)
    train(log, "sft", 0, 1, display=SFT)
    title = {"title": "PPO", "headline": ["objective/scores", "objective/kl"]}
    written = json.loads((tmp_path / "stages.json").read_text())
    assert written["ppo"] == {**title, "curves": {"objective/kl": "KL"}}
    assert metrics.read_displays(tmp_path) == {"ppo": PPO, "sft": SFT}
    train(log, "ppo", 0, 1)  # trained anew by something that states no display
    assert metrics.read_displays(tmp_path) == {"sft": SFT}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("text", ["", "[]", '{"ppo": 1}', '{"ppo": {"title": "PPO"}}'])
def test_a_broken_record_of_displays_is_named(tmp_path, text):
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(ValueError, match=r"stages\.json: .*; remove"):
        metrics.read_displays(tmp_path)


def test_quiet_prints_nothing(tmp_path, capsys):
    log = Log(tmp_path, quiet=True)
    train(log, "sft", 0, 3)
    log.table("title", [{"prompt": "a"}])
    log.print("text")
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_stage_prints_about_twenty_lines(capsys):
    with Log().stage("ppo", 1000, display=PPO) as stage:
        for step in range(1000):
            numbers = {"loss": 0.0, "objective/scores": 2.5, "objective/kl": 0.25}
            stage.write(step, numbers, tokens=10)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 20
    assert printed[-1].startswith("ppo 1000/1000  ")
    assert "objective/scores 2.5  objective/kl 0.25" in printed[-1]
    assert "tokens/s" in printed[-1] and "loss" not in printed[-1]


def test_on_a_terminal_a_stage_is_one_bar():
    log = Log()
    log.console = Console(force_terminal=True, file=io.StringIO(), width=120, _environ={})
    with log.stage("reward_model", 4) as stage:  # without a display: its first two metrics
        log.print("[bold] is not markup")
        for step in range(4):
            stage.write(step, {"loss": 0.5, "rewards/accuracies": 0.75, "lr": 0.001})
    shown = log.console.file.getvalue()
    assert "4/4" in shown and "loss 0.5  rewards/accuracies 0.75" in shown and "lr" not in shown
    assert "[bold] is not markup" in shown


def test_in_a_notebook_a_stage_prints_plain_lines_into_one_block():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = """
from rlhf_jax.training.metrics import Log
log = Log()
with log.stage("sft", 40) as stage:
    for step in range(40):
        stage.write(step, {"loss": 0.5})
log.table("Answers", [{"prompt": "a", "response": "b"}])
"""
    cell = nbformat.v4.new_code_cell(code)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute(cwd=REPOSITORY)
    # A notebook shows adjacent pieces of one stream as one block.
    assert {(x.output_type, x.name) for x in cell.outputs} == {("stream", "stdout")}
    text = "".join(x.text for x in cell.outputs)
    printed = text.splitlines()
    assert printed[0].startswith("sft 2/40  ") and printed[19].startswith("sft 40/40  ")
    assert "Answers" in printed[20] and "\x1b" not in text


def test_a_table_has_the_keys_as_columns_and_prints_brackets_as_they_are(capsys):
    Log().table("Before and after", [{"prompt": "[red]x", "after": "y", "gold": 0.123456, "n": 2}])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("prompt", "after", "gold", "[red]x", "0.1235"))


def test_a_profile_covers_the_steps_after_the_first(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    log = Log(tmp_path, quiet=True, profile_steps=2)
    with log.stage("sft", 5) as stage:
        for step in range(5):
            stage.write(step, {"loss": 0.0})
            seen.append(step)
    assert seen == [str(tmp_path / "profile" / "sft"), 0, 1, "stop", 2, 3, 4]
    seen.clear()
    train(log, "ppo", 0, 2)  # shorter than the trace: it ends with the stage
    assert seen == [str(tmp_path / "profile" / "ppo"), "stop"]


def test_a_profile_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="a trace needs a folder"):
        Log(profile_steps=3)


def test_other_processes_write_and_print_nothing_but_see_and_check_every_step(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    checked = []
    log = Log(tmp_path / "run")
    stage = train(log, "sft", 0, 3, check=lambda step, floats: checked.append(step), display=SFT)
    log.samples("sft", 0, [{"prompt": "a"}])
    assert checked == [0, 1, 2] and len(stage.history) == 3
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_json_takes_arrays_of_one_element_and_paths_and_refuses_functions(tmp_path):
    value = {"a": jnp.float32(0.5), "b": (1, np.int64(2)), "c": tmp_path, 3: None}
    assert metrics.plain(value) == {"a": 0.5, "b": [1, 2], "c": str(tmp_path), "3": None}
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        metrics.plain({"loss": len})
