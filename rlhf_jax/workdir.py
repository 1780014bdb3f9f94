"""The folder of one run: what it holds, and what is allowed when it is used again.

`config.json` says which run this is: the experiment, its configuration, the folder of real data,
and a fingerprint of every file that the configuration names. `summary.json` is written last, so it
says that the run is finished. A workdir may be used again to continue an interrupted run, or a
finished one with more iterations. Any other change is refused, because the folder would then hold
the results of two different runs. A run that fails before its first step leaves no trace.
While a run uses the folder no other process can (`lock`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import time
import typing
from collections.abc import Iterator
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from rlhf_jax import lock, processes, storage
from rlhf_jax.config import Config, Source
from rlhf_jax.data import formats
from rlhf_jax.storage import Path
from rlhf_jax.training.metrics import Log, flat, plain, read_object
from rlhf_jax.training.state import TrainingStopped

# The settings that may grow when a workdir is used again: the length of the last stage. If an
# earlier stage could grow, the later stages would have been trained on a model that is gone.
LENGTHS = ("num_iterations",)
# The settings that change no number: a run may go on with others.
FREE = ("save_every", "save_seconds", "keep", "keep_best", "best_is")
# What a run of an older folder had in place of settings that there were not yet, where that is not
# None, [] or "".
BEFORE = {"on_bad_update": "stop", "seed": 0}
SHARED_SECONDS = 5.0  # within which a file of another host must come into sight
# What a process that was killed may leave behind: its lock, and files not written to their end.
_LEFT_BEHIND = re.compile(r"\.lock|\..+\.\d+|shared-\d+-\d+")
_PIECE, _READ_WHOLE = 2**16, 2**28  # bytes


def new_folder(experiment: str) -> pathlib.Path:
    """A folder under runs/ that does not exist yet, named after the experiment and the time."""
    base = pathlib.Path("runs") / f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def describe(
    experiment: str,
    config: Config,
    data: pathlib.Path | None,
    folder: Path,
    dtype: str | None = None,
) -> dict:
    """The part of config.json with which a later use of the folder must agree.

    `dtype` is that of matrix products where the command line says so. How the layers are looped
    over and what is computed again only changes roundings, and may change as the mesh may.
    """
    return {
        "experiment": experiment,
        "dtype": dtype,
        "config": plain(dataclasses.asdict(config)),
        "data": None if data is None else str(data.resolve()),
        "contents": _fingerprints(config, folder),
    }


def compare(folder: Path, run: dict) -> dict | None:
    """The summary if `run` (see `describe`) is finished in this folder; None if it must be trained.

    Raises ValueError where the folder holds another run, or something that is no run.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"--workdir {folder} is a file; name a folder")
    if not (folder / "config.json").exists():
        if not is_empty(folder):
            raise ValueError(
                f"--workdir {folder} is not empty and has no config.json, so it is not a run; "
                "name another folder"
            )
        return None
    before = read_object(folder / "config.json", "name a new --workdir")
    kinds = {"experiment": str, "config": dict}
    if any(type(before.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(
            f"{folder / 'config.json'}: 'experiment' or 'config' is missing, or not what a run "
            "writes there; name a new --workdir"
        )
    if type(before.get("contents", {})) is not dict:
        raise ValueError(f"{folder / 'config.json'}: 'contents' is no object; name a new --workdir")
    old, new = _settings(before, run), _settings(run, before)
    # A setting that the library did not have yet when the folder was written was off.
    new = {
        name: x
        for name, x in new.items()
        if name in old or x not in (None, [], "", BEFORE.get(name.rpartition(".")[2]))
    }
    changed = [name for name in (old | new) if old.get(name, ()) != new.get(name, ())]
    changed = [name for name in changed if name.rpartition(".")[2] not in FREE]
    refused = [name for name in changed if not _has_grown(name, old, new)]
    if refused:
        listed = ", ".join(f"{_shown(old, name)} -> {_shown(new, name)}" for name in refused)
        raise ValueError(
            f"--workdir {folder} holds a run with other settings: {listed} (old -> new); name a "
            f"new --workdir or use the old values (only {', '.join(LENGTHS)} may grow)"
        )
    if changed or not (folder / "summary.json").exists():
        return None
    return read_object(folder / "summary.json", "remove the file to finish the run again")


def check_shared(folder: Path) -> None:
    """Raises ValueError, on every process, unless all of them see what process 0 writes there.

    Nothing stays behind. With one process nothing is done.
    """
    if jax.process_count() == 1:
        return

    found = []

    def leave_mark() -> str:
        found.append(_inspect(folder)._replace(texts={}))
        folder.mkdir(parents=True, exist_ok=True)
        mark = f"shared-{os.getpid()}-{time.time_ns()}"
        storage.write(folder / mark, mark)
        return mark

    mark = processes.first(leave_mark)
    answers = processes.texts("seen" if _appears(folder / mark) else "")

    def clean() -> None:
        (folder / mark).unlink()
        _restore(folder, *found)

    processes.first(clean)
    if "" in answers:
        raise ValueError(
            f"--workdir {folder}: process {answers.index('')} does not see what process 0 writes "
            "there; name a folder that all hosts share, by its absolute path, or one in a bucket"
        )


def _appears(file: Path) -> bool:
    """Whether a file that exists comes into sight; a network file system may need a moment."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def begin(folder: Path, run: dict, mesh: jax.sharding.Mesh) -> None:
    """Marks the folder as holding `run`, unfinished, and notes the machine and the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.*"):
        if _LEFT_BEHIND.fullmatch(left.name):
            left.unlink(missing_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    described = run | _environment(mesh)
    storage.write(folder / "config.json", json.dumps(described, indent=2) + "\n")


def finish(folder: Path, summary: dict) -> None:
    """Marks the run in the folder as finished."""
    storage.write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


@contextlib.contextmanager
def taken(folder: Path, log: Log) -> Iterator[_Found]:
    """The folder for this run alone, put back as it was if the body fails before the first step.

    So a misspelt file name leaves no empty run behind, and cannot spoil a finished one. When
    training stops because its numbers are bad, everything is kept for inspection. Raises
    `lock.InUse`, on every process, where another run is using the folder.
    """
    found = _inspect(folder)
    with contextlib.ExitStack() as stack:
        processes.first(lambda: stack.enter_context(lock.held(folder)))
        try:
            yield found
        except TrainingStopped:
            raise
        except BaseException:
            if log.writes and not log.trained:
                with contextlib.suppress(OSError):  # of which the first one is to be heard
                    _restore(folder, found)
            raise


def how_to_continue(was_empty: bool, folder: Path, log: Log) -> str:
    """What the same command will do next, as the end of a sentence about a run that was stopped."""
    if was_empty and not log.trained:
        return " before the first step; nothing is kept"
    again = f"; the same command with --workdir {folder}"
    if log.running is None:
        return f"{again} goes on"
    stage, total = log.running
    steps = ocp.utils.checkpoint_steps(storage.absolute(folder) / "checkpoints" / stage)
    if not steps:
        return f"{again} begins {stage} anew, of which no checkpoint was saved"
    return f"{again} continues {stage} from step {max(steps)} of {total}"


# ------------------------------------------------------------------------ starting from another run

# The settings that name a model to start from, and where a run exports one, the best first.
EXPORTS = {
    "model": ("export/policy", "export/sft", "export"),
    "scorer": ("export/reward_model",),
}


def started_from(config: Config, folder: str) -> Config:
    """The configuration with the exported models of another run: its policy and its reward model.

    Each is a Hugging Face folder with its tokenizer, as a setting `model` or `scorer` names it.
    Raises ValueError for a folder that is no run or has exported nothing, and for an experiment
    that starts from no model or is told which.
    """
    where = storage.path(folder)
    if not (where / "config.json").is_file():
        raise ValueError(f"--from {folder}: no run; name the workdir of one, with its config.json")
    if "experiment" not in read_object(where / "config.json", "name the workdir of a run"):
        raise ValueError(
            f"--from {folder}: no run, but perhaps a model; name a model's folder by --model"
        )
    hints = typing.get_type_hints(type(config))
    free = [name for name in EXPORTS if hints.get(name) is Source and not vars(config)[name]]
    if "model" not in free:
        if hints.get("model") is Source:
            why = "is named by --model already; leave one of them out"
        else:
            why = "is made by this experiment; name an experiment with a flag --model"
        raise ValueError(f"--from {folder}: the model to start from {why}")
    found = {
        name: str(where / path)
        for name in free
        for path in reversed(EXPORTS[name])
        if (where / path / "config.json").is_file()
    }
    if "model" not in found:
        raise ValueError(
            f"--from {folder}: it holds no exported model ({', '.join(EXPORTS['model'])}); "
            "let that run finish, or name one whose experiment exports its policy"
        )
    return dataclasses.replace(config, **found)


# ------------------------------------------------------------------------------- comparing two runs


def _settings(run: dict, other: dict) -> dict:
    """The settings of a run by dotted name; data and contents only where `other` has them too."""
    settings = flat(run["config"]) | {"experiment file": run["experiment"]}
    if run.get("data") and other.get("data"):  # an experiment that reads no data may be given some
        settings["data"] = run["data"]
    settings["dtype"] = run.get("dtype")
    for name, fingerprint in run.get("contents", {}).items():
        if name in other.get("contents", {}):
            settings[f"contents of {name}"] = fingerprint
    return settings


def _has_grown(name: str, old: dict, new: dict) -> bool:
    if name.rpartition(".")[2] not in LENGTHS or name not in old or name not in new:
        return False
    return isinstance(old[name], int) and isinstance(new[name], int) and new[name] > old[name]


def _shown(values: dict, name: str) -> str:
    return f"{name}={json.dumps(values[name])}" if name in values else f"no {name}"


def _fingerprints(config: Config, folder: Path, prefix: str = "") -> dict[str, str]:
    """A fingerprint of every file or folder that a `Source` of the configuration names."""
    found = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = vars(config)[field.name]
        if isinstance(value, Config):
            found |= _fingerprints(value, folder, f"{prefix}{field.name}.")
        elif hints[field.name] is Source and value:
            path = pathlib.Path(os.path.expanduser(formats.located(value)[0]))
            storage.check_file(path)
            if path.exists():
                found[f"{prefix}{field.name}"] = _fingerprint(path, folder)
    return found


def _fingerprint(path: pathlib.Path, workdir: Path) -> str:
    """A hash of a file, or of all files in a folder; a large file is read at 64 places only.

    Files in the workdir do not count, because the run itself writes them.
    """
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.resolve().is_relative_to(storage.absolute(workdir).resolve()):
            continue
        size = file.stat().st_size
        offsets = range(0, size, _PIECE)
        if size > _READ_WHOLE:
            offsets = [(size - _PIECE) * i // 63 for i in range(64)]
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            for offset in offsets:
                opened.seek(offset)
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()


def _environment(mesh: jax.sharding.Mesh) -> dict:
    try:
        version = importlib.metadata.version("rlhf_jax")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "rlhf_jax": version,
        },
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# ---------------------------------------------------------------------------- restoring the folder


class _Found(NamedTuple):
    """The disk before the run wrote to it."""

    empty: bool  # the folder does not exist, or nothing is in it
    missing: list[Path]  # of the folder and its parents, those that do not exist; deepest first
    texts: dict[str, str]  # the files that a run replaces when it begins


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what a process that was killed may have left behind."""
    return all(_LEFT_BEHIND.fullmatch(path.name) for path in folder.iterdir())


def _inspect(folder: Path) -> _Found:
    empty = not folder.exists() or is_empty(folder)
    # A bucket has no folders of its own: they come and go with what is in them.
    parents = () if storage.in_bucket(folder) else (folder, *folder.parents)
    missing = [path for path in parents if not path.exists()]
    paths = [folder / name for name in ("config.json", "summary.json")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}
    return _Found(empty, missing, texts)


def _restore(folder: Path, found: _Found) -> None:
    if not folder.exists():
        return
    for name, text in found.texts.items():
        storage.write(folder / name, text)
    if found.empty:
        storage.remove(folder)
        if folder not in found.missing and not storage.in_bucket(folder):
            folder.mkdir()
        for parent in found.missing[1:]:
            if not any(parent.iterdir()):  # another run may have begun there meanwhile
                parent.rmdir()
