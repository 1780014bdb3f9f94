"""What a run survives: a second process, damage to its checkpoints, signals, and being slow."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import lock, sharding, stopping, workdir
from rlhf_jax.training import checkpoint, loop
from rlhf_jax.training.checkpoint import Checkpoints, Clock
from rlhf_jax.training.loop import Outcome, Plan
from rlhf_jax.training.metrics import Display

DISPLAY = Display("Task", (), {})


# ------------------------------------------------------------------------------------- checksums


def reference_checksum(array):
    """The same in Python's whole numbers, element by element."""

    def mixed(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return x

    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    bits = np.ravel(array).view(kinds[array.dtype.itemsize]).tolist()
    return sum(mixed(b ^ mixed((i + 0x9E3779B9) % 2**32)) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (8, 6)], ids=str)
def test_a_checksum_is_a_sum_of_hashes_of_bits_and_places(shape, dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 3).astype(dtype)
    assert int(checkpoint.checksum(array)) == reference_checksum(np.asarray(array))


def test_a_checksum_does_not_depend_on_the_mesh_and_notices_a_bit_and_an_exchange():
    array = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    whole = int(checkpoint.checksum(jnp.asarray(array)))
    for mesh in ("8x1x1", "1x2x4"):
        split = sharding.put_rows(tiny.mesh(mesh), array)
        assert int(checkpoint.checksum(split)) == whole
    flipped = array.copy()
    flipped.view(np.uint32)[3, 3] ^= 1
    assert int(checkpoint.checksum(jnp.asarray(flipped))) != whole
    assert int(checkpoint.checksum(jnp.asarray(array[::-1]))) != whole


# ------------------------------------------------------------------------------ damaged checkpoints


def tree(value):
    return {"a": jnp.full((64, 64), float(value)), "count": jnp.int32(value)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("stored") / "stage"
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step))
    return folder


def data_files(folder):
    """The files that hold arrays, the largest one last."""
    files = [x for x in folder.rglob("*") if x.is_file() and "/d/" in x.as_posix()]
    return sorted(files, key=lambda x: x.stat().st_size)


def flip_in_stored_sum(folder):
    """As if the arrays were others: the sums of step 2 are changed in place of its data."""
    file = folder / "_CHECKPOINT_METADATA"
    found = json.loads(file.read_text())
    found["custom_metadata"]["checksums"]["a"] ^= 1
    file.write_text(json.dumps(found))


def flip_bits(folder):
    for file in data_files(folder):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)


def truncate(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[:20])


def empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGE = {
    "other numbers": flip_in_stored_sum,
    "flipped bits": flip_bits,
    "truncated": truncate,
    "no list of arrays": lambda folder: (folder / "default" / "_METADATA").unlink(),
    "no sums": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "sums cut off": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text('{"a'),
    "no arrays": lambda folder: shutil.rmtree(folder / "default"),
    "emptied": empty,
}


# Orbax leaves coroutines behind that were to read on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_next_older_one_is_used(stored, damage, tmp_path):
    folder = tmp_path / "stage"
    shutil.copytree(stored, folder)
    DAMAGE[damage](folder / "2")
    said = []
    with Checkpoints(folder, keep=5, say=said.append) as checkpoints:
        step, found = checkpoints.restore(tree(0))
        assert step == 1 and float(found["a"].mean()) == 1.0 and int(found["count"]) == 1
        (line,) = said or [f"{folder}/2 is damaged: it is not found; step 1 is used instead"]
        assert f"{folder}/2 is damaged: " in line and "; step 1 is used instead" in line
        assert "\n" not in line
        checkpoints.save(2, tree(2))  # the run comes past the step again
    with Checkpoints(folder, keep=5, say=said.append) as checkpoints:
        step, found = checkpoints.restore(tree(0))
    assert step == 2 and float(found["a"].mean()) == 2.0


def test_without_an_intact_checkpoint_a_run_says_so_and_does_not_begin_anew(stored, tmp_path):
    folder = tmp_path / "stage"
    shutil.copytree(stored, folder)
    for step in "12":
        flip_in_stored_sum(folder / step)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(ValueError, match=r"2 is damaged: a is not .*1 is damaged: .*remove"):
            checkpoints.restore(tree(0))
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.restore(tree(0)) is None


def test_another_shape_or_type_is_not_damage(stored):
    with Checkpoints(stored) as checkpoints:
        for other, said in (
            (jnp.zeros((3, 3)), r"a is float32 \(64, 64\) .* but float32 \(3, 3\) in this run"),
            (jnp.zeros((64, 64), jnp.bfloat16), r"but bfloat16 \(64, 64\) in this run"),
        ):
            with pytest.raises(ValueError, match=said):
                checkpoints.restore(tree(0) | {"a": other})
        assert checkpoints.latest() == 2


@pytest.mark.parametrize("lowest", [True, False])
def test_the_newest_and_the_best_are_kept(tmp_path, lowest):
    with Checkpoints(tmp_path, 2, best="loss", lowest=lowest) as checkpoints:
        for step, loss in enumerate((3.0, 1.0, 9.0, 4.0, 5.0, 6.0), 1):
            checkpoints.save(step, tree(step), {"loss": loss, "other": -loss})
        assert checkpoints.steps() == [6, 5, 2 if lowest else 3]
        with pytest.raises(ValueError, match="keep_best='loss' is no metric .* it has other"):
            checkpoints.save(7, tree(7), {"other": 1.0})
    best = 2 if lowest else 3
    with Checkpoints(tmp_path, 2, best="loss", lowest=lowest) as checkpoints:  # a run that goes on
        for step in (7, 8, 9):
            checkpoints.save(step, tree(step), {"loss": 5.0})
        assert checkpoints.steps() == [9, 8, best]


def test_a_best_checkpoint_by_evaluations_is_told_at_the_steps_that_have_one(tmp_path, capsys):
    with Checkpoints(tmp_path, 1, best="eval/loss", lowest=True) as checkpoints:
        for step, metrics in enumerate([{"eval/loss": 2.0}, {"loss": 1.0}, {"loss": 1.0}], 1):
            checkpoints.save(step, tree(step), metrics)
        assert checkpoints.steps() == [3, 1]
        with pytest.raises(ValueError, match="keep_best='eval/loss' is no metric .* eval/accuracy"):
            checkpoints.save(4, tree(4), {"eval/accuracy": 1.0})
    said = capsys.readouterr()
    assert "metrics" not in said.out + said.err


def test_the_best_by_an_evaluation_needs_evaluations():
    with pytest.raises(ValueError, match="eval_every=0 never runs"):
        dataclasses.replace(tiny.SFT, keep_best="eval/loss")
    with pytest.raises(ValueError, match="eval_every=0 never runs"):
        dataclasses.replace(tiny.PPO, keep_best="eval/score")
    dataclasses.replace(tiny.SFT, keep_best="eval/loss", eval_every=2)


def test_a_disk_that_is_full_is_said_in_one_line(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1))
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, "No space left on device", "somewhere")

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._manager, "save", full)
            said = r"cannot be written \(.*No space left on device.*\); the newest .* is step 1"
            with pytest.raises(OSError, match=said) as error:
                checkpoints.save(2, tree(2))
        assert error.value.filename is None and "\n" not in str(error.value)
        monkeypatch.setattr(checkpoint.storage, "free", lambda folder: 2**10)
        said = "cannot be written .No space left: it takes 0.0 MiB, 0.0 are free.; the newest"
        with pytest.raises(OSError, match=said):
            checkpoints.save(2, tree(2))
        assert checkpoints.steps() == [1]


# ------------------------------------------------------------------------------------ one at a time

HOLD = """
import pathlib, sys, time
from rlhf_jax import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    arguments = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_a_live_process_uses_is_refused_and_free_once_it_is_killed(holder, tmp_path):
    folder = tmp_path / "run"
    said = f"is in use by process {holder.pid} on .*, since 20.*; wait for it, stop it, or name"
    for _ in range(2):  # to be refused does not free it
        with pytest.raises(ValueError, match=said), lock.held(folder):
            pass
    holder.kill()
    holder.wait()
    assert (folder / ".lock").exists()
    with lock.held(folder):
        assert json.loads((folder / ".lock").read_text() or "{}")["process"] == os.getpid()
        again = pytest.raises(ValueError, match="in use by another run of this process")
        with again, lock.held(folder, print):
            pass
    assert not (folder / ".lock").exists()


def test_a_lock_of_another_host_counts_for_as_long_as_its_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    file = tmp_path / ".lock"
    theirs = {"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00", "beat": 3}
    file.write_text(json.dumps(theirs))
    with lock.held(tmp_path):  # no heartbeat
        pass
    file.write_text(json.dumps(theirs))
    later = json.dumps(theirs | {"beat": 4})
    monkeypatch.setattr(lock.time, "sleep", lambda _: file.write_text(later))
    said = "in use by process 7 on elsewhere, since 2026-01-01 00:00:00"
    with pytest.raises(ValueError, match=said), lock.held(tmp_path):
        pass


def test_without_locks_of_the_system_the_heartbeat_alone_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda path: None)
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.held(tmp_path):
        found = {(tmp_path / ".lock").read_text() for _ in range(2000)}
    assert len(found) > 1 and not (tmp_path / ".lock").exists()


def test_what_a_killed_process_leaves_behind_makes_no_folder_a_run_or_a_refusal(tmp_path):
    for name in (".lock", ".config.json.4711", "shared-12-34"):
        (tmp_path / name).write_text("")
    assert workdir.compare(tmp_path, {}) is None
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        workdir.compare(tmp_path, {})


# ----------------------------------------------------------------------------------------- signals


class Batches:
    """Batch i is i, and a signal comes with some of them."""

    def __init__(self, signals):
        self.signals = signals

    def from_position(self, start):
        for i in range(start, 6):
            for number in self.signals.get(i, ()):
                os.kill(os.getpid(), number)
            yield i


def counted(folder, signals, stop, **plan):
    def step(state, batch):
        return {"count": state["count"] + 1}, Outcome({}, jnp.int32(1))

    settings = {"num_steps": 6, "save_every": 100} | plan
    with stop.handled(), Checkpoints(folder, keep=9) as checkpoints:
        runtime = dataclasses.replace(tiny.runtime(checkpoints=checkpoints), stop=stop)
        start, nothing = {"count": jnp.int32(0)}, lambda step, metrics: None
        plan = Plan("task", DISPLAY, **settings)
        state, _ = loop.train(step, start, Batches(signals), plan, runtime, check=nothing)
    return int(state["count"])


@pytest.mark.parametrize(
    "number, error",
    [(signal.SIGTERM, stopping.Terminated), (signal.SIGINT, KeyboardInterrupt)],
    ids=["SIGTERM", "ctrl-C"],
)
def test_a_signal_ends_a_stage_after_its_step_which_is_saved(number, error, tmp_path, capfd):
    before = signal.getsignal(number)
    with pytest.raises(error):
        counted(tmp_path, {2: [number]}, stopping.Stop())
    assert signal.getsignal(number) == before
    assert "stopping after this step" in capfd.readouterr().err
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]
    assert counted(tmp_path, {}, stopping.Stop()) == 6


def test_a_second_ctrl_c_ends_a_stage_at_once_without_a_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        counted(tmp_path, {2: [signal.SIGINT, signal.SIGINT]}, stopping.Stop())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []


def test_outside_of_a_stage_a_signal_ends_the_program_at_once():
    stop = stopping.Stop()
    with pytest.raises(stopping.Terminated), stop.handled():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_third_signal_ends_the_process_while_it_is_stopping(tmp_path):
    program = """
import os, signal
from rlhf_jax import stopping
stop = stopping.Stop()
with stop.handled():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("not reached")
"""
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# -------------------------------------------------------------------------------------------- time


def test_a_stage_is_saved_when_the_time_has_come(tmp_path):
    counted(tmp_path / "slow", {}, stopping.Stop(), save_seconds=1e-9)
    counted(tmp_path / "quick", {}, stopping.Stop(), save_seconds=math.inf)
    steps = [Checkpoints(tmp_path / name).steps() for name in ("slow", "quick")]
    assert len(steps[0]) > 1 and steps[1] == [6]


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    clock, saved = Clock(60.0, 0), []
    for done in range(1, 1001):
        now[0] += 10.0
        if clock.due(done):
            saved.append(done)
            now[0] += 30.0
            clock.saved(done, 30.0)
    gaps = np.diff(saved) * 10.0
    assert saved[0] == 6 and set(gaps) == {600.0}


def test_several_processes_ask_each_other_seldom(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.processes, "first", lambda decide: asked.append(1) or decide())
    clock, saved = Clock(60.0, 0), []
    for done in range(1, 2001):
        now[0] += 0.1 + (5.0 if done == 1 else 0.0)  # compilation
        if clock.due(done):
            saved.append(now[0])
            clock.saved(done, 0.5)
    gaps = np.diff([0.0, *saved])
    assert len(saved) == 3 and np.all((gaps >= 60.0) & (gaps < 62.0))
    assert len(asked) < 50


def test_a_run_may_go_on_with_other_settings_of_its_checkpoints_alone(tmp_path):
    class Settings(checkpoint.Config):
        rate: float = 1.0

    def described(config):
        return workdir.describe("toy", config, None, tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(described(Settings())))
    kept = Settings(save_seconds=5.0, keep=9, keep_best="loss", best_is="lowest")
    assert workdir.compare(pathlib.Path(tmp_path), described(kept)) is None
    with pytest.raises(ValueError, match="rate=1.0 -> rate=2.0"):
        workdir.compare(pathlib.Path(tmp_path), described(Settings(rate=2.0)))
