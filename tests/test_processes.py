"""Several processes: two with four devices do what one with eight does; bad starts are refused."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
import toy_run

from rlhf_jax import distributed, processes, sharding
from rlhf_jax.data import batches
from rlhf_jax.launch import launch
from rlhf_jax.models import huggingface
from rlhf_jax.models.huggingface import files

HERE = pathlib.Path(__file__).parent
FAST = "--xla_backend_optimization_level=0"  # see conftest.py


def start(program, *arguments, folder, devices):
    """A process that runs a program of this folder on its own virtual devices."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST}",
    }
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def free_port():
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


# ------------------------------------------------------------------------------- one whole run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of the same run on two processes and on one."""
    folder = tmp_path_factory.mktemp("runs")
    joined = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2)
    started = [
        start(
            "toy_run.py",
            *("--workdir", folder / "two", *joined, "--process-id", process),
            folder=folder,
            devices=4,
        )
        for process in range(2)
    ]
    launch(toy_run.run, toy_run.config, ["--workdir", str(folder / "one")])
    for process in started:
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, output[-2000:] + error[-4000:]
    return folder / "two", folder / "one"


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # What the clock and the machine say is not the same in any two runs.
    timed = ("seconds", "tokens_per_second", "model_flops_utilisation", "memory")
    return {
        (line.pop("stage"), line.pop("step")): {
            name: value for name, value in line.items() if not name.startswith(timed)
        }
        for line in lines
    }


def assert_same_metrics(workdir, other, count):
    found, expected = metrics(workdir), metrics(other)
    assert found.keys() == expected.keys() and len(found) == count
    for step, values in expected.items():
        assert_close(found[step], values)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A KL is the small difference of two sums of some 40 nats, whose rounding it has.
        nats = 1e-5 if "kl" in name else 1e-6
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=nats, err_msg=name)


def assert_same_model(folder, other):
    found, expected = (huggingface.load(x).weights for x in (folder, other))
    for path, array in jax.tree.leaves_with_path(expected):
        mine = found
        for key in path:
            mine = mine[key.key]
        gap = np.linalg.norm(np.asarray(mine) - np.asarray(array))
        assert gap <= 1e-5 * np.linalg.norm(np.asarray(array)), jax.tree_util.keystr(path)


def test_every_stage_of_two_processes_reports_what_one_process_reports(runs):
    two, one = runs
    assert_same_metrics(two, one, 4 + 4 + 3)  # steps of SFT, reward model and PPO
    found, expected = (json.loads((x / "summary.json").read_text()) for x in runs)
    scores = [x[name] for x in (found, expected) for name in x if name.startswith("in Python")]
    assert len(scores) == 4 and len(scores[0]) == 8 and all(x == scores[0] for x in scores)
    lengths = [x[name] for x in (found, expected) for name in x if name.startswith("mean length")]
    assert lengths == [np.mean(np.mod(scores[0], 100))] * 4
    for stage in ("sft", "reward_model", "ppo"):
        assert_close(found[stage], expected[stage])
    texts = [(x / "samples.jsonl").read_text() for x in runs]
    assert texts[0] == texts[1] != ""


def test_the_exported_models_are_those_of_one_process(runs):
    two, one = runs
    for name in ("scorer", "policy"):
        assert_same_model(two / "export" / name, one / "export" / name)
        files = [sorted(x.name for x in (run / "export" / name).iterdir()) for run in runs]
        assert files[0] == files[1] and "config.json" in files[0]


def test_one_process_continues_from_the_checkpoint_of_two(runs, tmp_path):
    two, one = runs
    shutil.copytree(two, tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/ppo/3")
    (tmp_path / "two/summary.json").unlink()
    launch(toy_run.run, toy_run.config, ["--workdir", str(tmp_path / "two")])
    assert_same_metrics(tmp_path / "two", one, 4 + 4 + 3)
    assert_same_model(tmp_path / "two/export/policy", one / "export/policy")


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What two processes, each in a folder of its own, are told: case -> [host 0's, host 1's]."""
    folder = tmp_path_factory.mktemp("hosts")
    port, started = free_port(), []
    for process, word in enumerate("ab"):
        (folder / str(process)).mkdir()
        (folder / str(process) / "words.jsonl").write_text(f'{{"prompt": "{word}"}}\n')
        here = folder / str(process)
        started.append(start("toy_hosts.py", port, process, folder=here, devices=1))
    reports = []
    for process in started:
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-4000:]
        reports.append(json.loads(output.splitlines()[-1]))
    left = {str(x.relative_to(folder)) for x in folder.rglob("*")}
    return {case: [report[case] for report in reports] for case in reports[0]}, left


@pytest.mark.parametrize(
    "case, told",
    {
        "workdir missing": "--workdir is missing: several processes need the same one",
        "workdir not shared": "--workdir run: process 1 does not see what process 0 writes there",
        "settings": "process 0 and process 1 were started differently: config.rate: 0.0 and 0.1;",
        "files": "process 0 and process 1 were started differently: contents.words: ",
        "mesh": "mesh data=1,fsdp=1,tensor=1 uses 1 of 2 devices",
        "another run": "--workdir ../run holds a run with other settings: rate=0.1 -> rate=0.5",
    }.items(),
)
def test_every_host_is_told_in_one_line_what_is_wrong(launched, case, told):
    for host in launched[0][case]:
        assert host["code"] == 2 and host["error"].startswith(f"error: {told}")
        assert host["error"].count("\n") == 1


def test_an_error_of_one_host_ends_the_others_too(launched):
    first, second = launched[0]["only here"]
    assert first["code"] == second["code"] == 2
    assert second["error"].startswith("error: --data absent: no such folder")
    assert first["error"] == second["error"].replace("error: ", "error: process 1: ")


def test_hosts_that_agree_run_and_one_of_them_writes(launched):
    reports, left = launched
    for case in ("good", "finished"):
        assert [host["summary"] for host in reports[case]] == [{"processes": 2}] * 2
    # Nothing is left of the runs that were refused.
    written = {"run", "run/config.json", "run/summary.json", "run/report.html"}
    assert left == written | {"0", "1", "0/words.jsonl", "1/words.jsonl"}


def test_a_coordinator_that_is_not_there_is_told_with_the_seconds_waited(tmp_path):
    flags = ["--num-processes", 2, "--process-id", 1, "--coordinator-timeout", 2]
    address = f"localhost:{free_port()}"
    begun = time.monotonic()
    process = start("toy_run.py", "--coordinator", address, *flags, folder=tmp_path, devices=1)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and time.monotonic() - begun < 40
    assert error.startswith(f"error: {address} was not reached, or not all processes had come")
    assert "within 2 seconds" in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, told",
    {
        "--num-processes 2": "--num-processes and --process-id need --coordinator host:port",
        "--process-id 0": "--num-processes and --process-id need --coordinator host:port",
        "--coordinator a --num-processes 2 --process-id 0": "--coordinator a is not host:port",
        "--coordinator a:1 --num-processes 2": "--coordinator needs --num-processes and",
        "--coordinator a:1 --num-processes 2 --process-id 2": "--process-id 2 is not in 0..1",
        "--coordinator a:1 --num-processes 2 --process-id 0": "devices have been used already",
    }.items(),
)
def test_flags_that_cannot_find_other_processes_are_refused(flags, told, capsys):
    jax.devices()
    with pytest.raises(SystemExit) as exit:
        launch(toy_run.run, toy_run.config, flags.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"error: {told}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "variables, asked",
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"SLURM_STEP_NODELIST": "n[0-1]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # in a batch script, outside of srun
        ({"SLURM_STEP_NODELIST": "n0", "SLURM_NTASKS": "1"}, False),
    ],
)
def test_jax_is_asked_to_join_where_a_scheduler_has_started_several(monkeypatch, variables, asked):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NODELIST", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.start(distributed.Flags())
    assert calls == [(None, None, None)] * asked  # jax finds the addresses itself
    distributed.start(distributed.Flags(num_processes=1))
    assert len(calls) == asked


def test_a_launcher_that_jax_does_not_know_is_told_with_the_remedy(monkeypatch):
    """Open MPI 5, for one, says how many there are and not where."""

    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    told = r"does not find .* \(coordinator_address should be defined\); name them by --coord"
    with pytest.raises(ValueError, match=told):
        distributed.start(distributed.Flags())
    monkeypatch.setattr(distributed, "_environment", lambda: distributed.CLOUD_TPU)
    distributed.start(distributed.Flags())  # a TPU of one host, outside of Google's cloud


# ---------------------------------------------------------------------- what they tell each other


class Elsewhere:
    """Stands in for another process, which passes its own text."""

    def __init__(self, monkeypatch, mine, others):
        monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))
        monkeypatch.setattr(jax, "process_index", lambda: mine)
        self.said = []
        others = list(others)
        monkeypatch.setattr(
            processes,
            "texts",
            lambda text: self.said.append(text) or self.of_all(text, mine, others),
        )

    @staticmethod
    def of_all(text, mine, others):
        return [*others[:mine], text, *others[mine:]]


def test_data_that_differs_between_processes_is_refused(monkeypatch):
    def fingerprint(rows):
        return batches.demonstrations(rows, toy_run.tiny.TOKENIZER, 8, 8).fingerprint()

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d" * 5}]
    assert fingerprint(rows) == fingerprint([dict(row) for row in rows])
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint([rows[0], rows[1] | {"completion": "dddde"}])
    processes.agree("data", lambda: 1 / 0)  # not computed in one process
    Elsewhere(monkeypatch, 0, [fingerprint(rows)])
    processes.agree("data", lambda: fingerprint(rows))
    with pytest.raises(ValueError, match="data on process 1 is not what process 0 has; .* same"):
        processes.agree("data", lambda: fingerprint(rows[:1]))


def test_an_error_of_process_0_is_every_process_s(monkeypatch):
    def fail():
        raise FileNotFoundError(2, "No such file", "absent")

    first = Elsewhere(monkeypatch, 0, [""])
    with pytest.raises(FileNotFoundError):
        processes.first(fail)
    Elsewhere(monkeypatch, 1, first.said)
    with pytest.raises(ValueError, match="^absent: No such file$"):
        processes.first(lambda: pytest.fail("only process 0 decides"))
    Elsewhere(monkeypatch, 1, ['{"value": [1, null]}'])
    assert processes.first(lambda: None) == [1, None]


# ----------------------------------------------------------------------------- rows of processes


class Chip:
    """A device of some process."""

    platform = device_kind = "chip"

    def __init__(self, number, process_index):
        self.id, self.process_index = number, process_index


@pytest.mark.parametrize(
    "owners, shape, mine, expected",
    [
        ([0, 0, 1, 1], (1, 4, 1), 1, [4, 5, 6, 7]),  # rows in the order of the processes
        ([0, 1, 1, 0], (1, 4, 1), 0, [0, 1, 6, 7]),  # as the wires of a slice may order them
        ([0, 0, 1, 1], (1, 2, 2), 1, [4, 5, 6, 7]),  # two devices hold the same rows
        ([0, 0, 1, 1], (1, 1, 4), 1, list(range(8))),  # tensors are split across processes
        ([0, 0, 1, 1], (2, 1, 2), 0, [0, 1, 2, 3]),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(owners, shape, mine, expected, monkeypatch):
    chips = np.empty(len(owners), object)
    chips[:] = [Chip(i, owner) for i, owner in enumerate(owners)]
    mesh = jax.sharding.Mesh(chips.reshape(shape), sharding.AXES)
    monkeypatch.setattr(jax, "process_index", lambda: mine)
    assert sharding.process_rows(mesh, 8).tolist() == expected


def test_the_rows_of_a_process_are_put_and_read_back():
    """One process holds all of them; two are in the whole run above."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"tokens": np.arange(24).reshape(8, 3), "index": np.arange(8), "none": None}
    placed = sharding.put_rows(mesh, batch)
    assert placed["tokens"].sharding.spec == sharding.rows(mesh).spec
    for read in (sharding.own_rows(placed), sharding.to_host(sharding.gather(placed))):
        assert read["none"] is None
        np.testing.assert_array_equal(read["tokens"], batch["tokens"])
        np.testing.assert_array_equal(read["index"], batch["index"])


def test_a_model_folder_is_read_in_the_slices_that_the_devices_hold(tmp_path, monkeypatch):
    """With tensors divided over eight devices no read is more than an eighth of a large one."""
    model = toy_run.tiny.model()
    huggingface.save(tmp_path / "m", model)
    read, opened = {}, files.open_folder

    class Watched(NamedTuple):
        handle: object
        name: str

        def get_shape(self):
            return self.handle.get_shape()

        def get_dtype(self):
            return self.handle.get_dtype()

        def __getitem__(self, index):
            part = self.handle[index]
            read.setdefault(self.name, []).append(part.size)
            return part

    def watching(*arguments):
        found = opened(*arguments)
        return {k: x._replace(handle=Watched(x.handle, k)) for k, x in found.items()}

    monkeypatch.setattr(files, "open_folder", watching)
    loaded = huggingface.load(tmp_path / "m", sharding.make_mesh(fsdp=4, tensor=2))
    assert toy_run.tiny.equal(loaded.weights, model.weights)
    for name, sizes in read.items():
        whole = sum(sizes)
        assert len(sizes) == (1 if "norm" in name else 8), name
        assert max(sizes) * len(sizes) == whole


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_machines_and_slices_follow_each_other_in_a_mesh(platform, monkeypatch):
    chips = [Chip(i, i // 2) for i in range(4)]
    for chip in chips:
        chip.platform, chip.slice_index = platform, chip.process_index
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    if platform == "tpu":  # whose slices only `data` crosses
        with pytest.raises(ValueError, match="2 slices, so data must be a multiple of that; use"):
            sharding.make_mesh(fsdp=4)
    else:
        mesh = sharding.make_mesh(fsdp=2, tensor=2)
        assert [[x.process_index for x in shard] for shard in mesh.devices[0]] == [[0, 0], [1, 1]]
