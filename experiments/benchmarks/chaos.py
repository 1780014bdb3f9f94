"""Does a run survive kills, damage, a full disk, a folder that it cannot write to?

    python experiments/benchmarks/chaos.py [--every 1] [--workdir DIR]

Each row of the table starts the small run of `chaos_run.py`, does something to it, and starts it
again. A row holds if the run then ends with the parameters of an uninterrupted one, bit for bit
(the checksums of all arrays, the losses and the summary are compared), or if it was refused in one
line with an exit code of the library and nothing was lost. `--every 5` takes every fifth kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import orbax.checkpoint as ocp

from rlhf_jax.launch import command
from rlhf_jax.training.checkpoint import Checkpoints

PROGRAM = pathlib.Path(__file__).with_name("chaos_run.py")
# (moment, its number, seconds after it); restoring needs a checkpoint, and so a kill before.
STEPPING = [("stepping", number, 0.0) for number in (1, 2, 5, 11, 12, 13, 16, 20)]
SAVING = [
    ("saving", number, seconds)
    for number, seconds in (
        (1, 0.0), (1, 0.01), (2, 0.03), (3, 0.1), (4, 0.005), (5, 0.02), (6, 0.05), (8, 0.2),
    )
]  # fmt: skip
RESTORING = [("restoring", 1, seconds) for seconds in (0.0, 0.005, 0.02, 0.05, 0.1)]
COMPILING = [("compiling", number, 0.01) for number in (3, 8, 15, 30)]
KILLS = [*STEPPING, *SAVING, *RESTORING, *COMPILING]
PREPARED = ("stepping", 19, 0.0)  # what is killed here has checkpoints of PPO's iterations 4 and 6
UNTIMED = ("seconds", "tokens_per_second", "model_flops_utilisation", "reward/")


class Row(NamedTuple):
    """What was done and what came of it."""

    what: str
    held: bool
    how: str


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    errors: list[str]  # lines on stderr, without warnings of libraries


def start(folder: pathlib.Path, moment: tuple | None = None, **options) -> subprocess.Popen:
    """The run in this folder, killed at the moment."""
    chaos = "" if moment is None else ":".join(map(str, moment))
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), "--workdir", str(folder)],
        env={**os.environ, "CHAOS": chaos},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen) -> Ended:
    """Waits for a process; it counts as hanging after ten minutes."""
    _, errors = process.communicate(timeout=600)
    lines = [line for line in errors.splitlines() if line.strip()]
    return Ended(process.returncode, [line[:300] for line in lines])


def result(folder: pathlib.Path) -> dict:
    """All that must be equal: sums of the newest arrays of each stage, losses, summary."""
    found = {"summary": json.loads((folder / "summary.json").read_text())}
    for stage in ("sft", "ppo"):
        with Checkpoints(folder / "checkpoints" / stage, say=lambda line: None) as stored:
            found[stage] = {"step": stored.latest(), **stored.checksums(stored.latest())}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found["lines"] = [
        {k: v for k, v in line.items() if not k.startswith(UNTIMED)} for line in lines
    ]
    return found


def one_line(done: Ended, *words: str) -> bool:
    """Whether a process was refused in one line that has these words."""
    return (
        done.code in (2, 3)
        and len(done.errors) == 1
        and all(word in done.errors[0] for word in words)
    )


def killed(folder: pathlib.Path, moment: tuple, expected: dict) -> Row:
    """A row of the table for one kill."""
    what = f"kill -9 {moment[0]} ({moment[1]}, {moment[2] * 1000:.0f} ms later)"
    if moment[0] == "restoring":
        ended(start(folder, PREPARED))
    first = ended(start(folder, moment))
    if first.code != -signal.SIGKILL:
        return Row(what, False, f"was not killed: exit {first.code} {first.errors[-1:]}")
    return Row(what, *continued(folder, expected))


def continued(folder: pathlib.Path, expected: dict) -> tuple[bool, str]:
    """Whether the run, started again, ends as it would have without interruption."""
    done = ended(start(folder))
    if done.code:
        return False, f"exit {done.code}: {done.errors[-1:]}"
    found = result(folder)
    different = [name for name in expected if found[name] != expected[name]]
    return not different, f"differs in {different}" if different else "continued, the same bits"


def damaged(folder: pathlib.Path, whole: pathlib.Path, expected: dict) -> Iterator[Row]:
    """Rows for damage to the newest checkpoint of a run that was killed."""
    for name, spoil in DAMAGE.items():
        shutil.copytree(whole, folder)
        steps = ocp.utils.checkpoint_steps(folder / "checkpoints" / "ppo")
        spoil(folder / "checkpoints" / "ppo" / str(max(steps)))
        yield Row(f"newest checkpoint: {name}", *continued(folder, expected))
        shutil.rmtree(folder)


def _arrays(folder: pathlib.Path) -> list[pathlib.Path]:
    return [x for x in folder.rglob("*") if x.is_file() and "/d/" in x.as_posix()]


def _flip(folder: pathlib.Path) -> None:
    for file in _arrays(folder):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def _truncate(folder: pathlib.Path) -> None:
    for file in _arrays(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "flipped bits": _flip,
    "cut in half": _truncate,
    "no _METADATA": lambda folder: (folder / "default" / "_METADATA").unlink(),
    "emptied": _empty,
}


def signalled(folder: pathlib.Path, number: int, code: int, expected: dict) -> Row:
    """A row for a signal in the middle of the first stage."""
    process = start(folder)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(number)
    done = ended(process)
    what = signal.Signals(number).name
    last = done.errors[-1] if done.errors else ""
    if done.code != code or "continues sft from step" not in last:
        return Row(what, False, f"exit {done.code}: {last}")
    held, how = continued(folder, expected)
    return Row(what, held, f"exit {code}, saved; {how}")


def second(folder: pathlib.Path, expected: dict) -> Row:
    """A row for two processes in one folder."""
    process = start(folder)
    while process.poll() is None and not (folder / ".lock").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    other, first = ended(start(folder)), ended(process)
    if not one_line(other, "is in use by process", str(process.pid)) or first.code:
        return Row(
            "a second process",
            False,
            f"{first.code} {first.errors[:2]} / {other.code} {other.errors[:2]}",
        )
    held, how = continued(folder, expected)
    return Row("a second process", held, f"refused in one line; the first one: {how}")


@contextlib.contextmanager
def mounted(folder: pathlib.Path, size: str) -> Iterator[None]:
    """A small file system in memory at the folder; needs the rights of root."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: pathlib.Path, expected: dict) -> Row:
    """A row for a disk that is full while a checkpoint is saved, and then larger."""
    what = "a full disk while saving"
    with mounted(folder, "2500k"):
        run = folder / "run"
        done = ended(start(run))
        if not one_line(done, "No space left"):
            return Row(what, False, f"exit {done.code}: {done.errors[:2]}")
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        held, how = continued(run, expected)
    return Row(what, held, f"refused in one line; with more room: {how}")


def read_only(folder: pathlib.Path, whole: pathlib.Path, expected: dict) -> Row:
    """A row for a folder that became read-only, and then was not."""
    what = "a read-only folder"
    with mounted(folder, "100m"):
        run = folder / "run"
        shutil.copytree(whole, run)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        done = ended(start(run))
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        if not one_line(done, "ead-only"):
            return Row(what, False, f"exit {done.code}: {done.errors[:2]}")
        held, how = continued(run, expected)
    return Row(what, held, f"refused in one line; afterwards: {how}")


def rows(base: pathlib.Path, every: int) -> Iterator[Row]:
    """All rows of the table."""
    whole = base / "whole"
    assert ended(start(whole)).code == 0
    expected = result(whole)
    for number, moment in enumerate(KILLS[::every]):
        yield killed(base / f"kill{number}", moment, expected)
    stopped = base / "stopped"
    ended(start(stopped, PREPARED))
    yield from damaged(base / "damaged", stopped, expected)
    yield second(base / "second", expected)
    yield signalled(base / "SIGTERM", signal.SIGTERM, 143, expected)
    yield signalled(base / "SIGINT", signal.SIGINT, 130, expected)
    if os.geteuid() == 0:
        yield full_disk(base / "full", expected)
        yield read_only(base / "read-only", stopped, expected)


def main(every: int = 1, workdir: pathlib.Path | None = None) -> None:
    """Prints the table, and exits with 1 unless every row holds.

    every: take every so many-th kill. workdir: where the runs live [default: removed at the end].
    """
    with contextlib.ExitStack() as stack:
        if workdir is None:
            workdir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for row in rows(workdir, every):
            found.append(row)
            print(f"{'holds' if row.held else 'FAILS'}  {row.what}: {row.how}", flush=True)
    held = sum(row.held for row in found)
    print(f"{held} of {len(found)} hold")
    if held < len(found):
        raise SystemExit(1)


if __name__ == "__main__":
    command(main, description=__doc__)
