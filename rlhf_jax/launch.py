"""The command line of an experiment: flags, the workdir and its rules, errors as one line.

    config = pipeline.Config(...)
    if __name__ == "__main__":
        launch(pipeline.run, config)

`command` is for tools that train nothing: flags and errors only.

Exit codes: 0 done, 2 bad input, 3 training stopped (a non-finite loss, a failed check),
130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import tyro

from rlhf_jax import sharding
from rlhf_jax.config import Config, Source
from rlhf_jax.data import formats
from rlhf_jax.training import report
from rlhf_jax.training.metrics import Log, plain, write_atomically
from rlhf_jax.training.state import TrainingStopped

# What may differ, and only grow, when a workdir is used again: the length of the last stage. An
# earlier stage that grew would leave the later ones trained on a model that is no more.
LENGTHS = ("num_iterations",)
_PIECE, _READ_WHOLE = 2**16, 2**28  # bytes


class Context(NamedTuple):
    """What `run(config, context)` gets from the command line besides its configuration."""

    workdir: Path
    log: Log
    mesh: jax.sharding.Mesh
    data: Path | None


def launch(
    run: Callable[[Config, Context], dict], config: Config, argv: list[str] | None = None
) -> dict:
    """Parse the command line over `config`, call `run(config, context)`, return its summary.

    The workdir then holds config.json, summary.json, report.html and what `run` wrote. Started
    again on a workdir that holds a summary, it returns that without training; with a larger
    number of iterations, or after an interruption, `run` is called again and continues
    from its checkpoints. Any other difference is refused.

    `argv=None` reads `sys.argv`. Exits (SystemExit) with the codes above, having printed one line
    to stderr; with `--debug` the traceback too.
    """
    flags = _parse(config, argv)
    with contextlib.ExitStack() as undo:
        try:
            return _launch(run, flags, undo)
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            _fail(2, _one_line(error), flags.debug)
        except TrainingStopped as error:
            kept = "the workdir is kept, the last checkpoint in it is intact"
            _fail(3, f"training stopped: {_one_line(error)}; {kept}", flags.debug)
        except KeyboardInterrupt as error:
            _fail(130, f"interrupted{error}", flags.debug)


def _launch(run, flags, undo: contextlib.ExitStack) -> dict:
    config, experiment = flags.config, experiment_name(run)
    mesh = sharding.make_mesh(**_mesh_sizes(flags.mesh))
    data = _data_folder(flags.data)
    if flags.profile < 0:
        raise ValueError(f"--profile {flags.profile}: the number of steps must be at least 0")
    if flags.workdir is None and jax.process_count() > 1:
        raise ValueError("--workdir is missing: several processes need the same one; name it")
    workdir = _new_workdir(experiment) if flags.workdir is None else flags.workdir
    record = {"experiment": experiment, "config": plain(dataclasses.asdict(config))}
    record["data"] = None if data is None else str(data.resolve())
    record["contents"] = _contents(config, workdir)
    finished = _compare(workdir, record)
    log = Log(workdir, profile_steps=flags.profile)
    if finished is not None:
        log.print(f"{workdir} is finished; nothing to train")
        _finish(log, finished)
        return finished
    found = _find(workdir)
    undo.callback(_restore, workdir, found, log)
    if log.writes:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "summary.json").unlink(missing_ok=True)
        described = record | _environment(mesh)
        write_atomically(workdir / "config.json", json.dumps(described, indent=2) + "\n")
    log.print(f"{experiment}: {workdir}")
    _set_up_jax()
    try:
        summary = plain(run(config, Context(workdir, log, mesh, data)))
    except TrainingStopped:
        undo.pop_all()
        raise
    except KeyboardInterrupt as error:
        if found.fresh and not log.trained:
            raise KeyboardInterrupt(" before the first step; nothing is kept") from error
        again = f"the same command with --workdir {workdir} continues from the last checkpoint"
        raise KeyboardInterrupt(f"; {again}") from error
    undo.pop_all()
    if log.writes:
        write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    _finish(log, summary)
    return summary


# ------------------------------------------------------------------------------ the command line


def command(run: Callable | dict[str, Callable], argv: list[str] | None = None):
    """Call a function, or the named one of several, with the command line as its arguments.

    For tools that train nothing: no workdir. Returns what the function returns, or exits
    (SystemExit) as `launch` does, having printed one line to stderr.
    """
    _set_up_jax()
    described = inspect.cleandoc(vars(sys.modules["__main__"]).get("__doc__") or "")
    try:
        if isinstance(run, dict):
            return tyro.extras.subcommand_cli_from_dict(run, description=described, args=argv)
        return tyro.cli(run, description=described, args=argv)
    except (ValueError, OSError) as error:
        _fail(2, _one_line(error, hint=""), debug=False)
    except KeyboardInterrupt:
        _fail(130, "interrupted", debug=False)


def _parse(config: Config, argv: list[str] | None):
    """The flags, `config` among them; exits with 0 after --help and 2 on a wrong flag."""
    arg = tyro.conf.arg
    own = (
        ("workdir", Path | None, None, "DIR", "where the run lives [default: new, under runs/]"),
        ("data", Path | None, None, "DIR", "folder of real data [default: $RLHF_JAX_DATA]"),
        ("mesh", str, "", "SIZES", f"such as {_mesh_example()} [default: all devices]"),
        ("profile", int, 0, "STEPS", "trace so many steps of each stage to workdir/profile"),
    )
    taken = {name for name, *_ in own} | {"debug", "config"}
    for field in dataclasses.fields(config):
        if field.name in taken:
            kind = type(config).__name__
            raise TypeError(f"{kind}.{field.name}: launch has a flag of that name; rename it")
    switch = Annotated[
        bool, arg(help="show the traceback of an error"), tyro.conf.FlagCreatePairsOff
    ]
    flags = dataclasses.make_dataclass(
        "Flags",
        [
            ("config", Annotated[type(config), arg(name="")], dataclasses.field(default=config)),
            *(
                (
                    name,
                    Annotated[kind, arg(metavar=metavar, help=text, help_behavior_hint="")],
                    default,
                )
                for name, kind, default, metavar, text in own
            ),
            ("debug", switch, False),
        ],
        frozen=True,
        kw_only=True,
    )
    main = sys.modules["__main__"]
    return tyro.cli(
        flags,
        args=argv,
        description=inspect.cleandoc(main.__doc__ or ""),
        config=(tyro.conf.AvoidSubcommands,),
    )


def experiment_name(run: Callable) -> str:
    """The name of the program's file, or of the module of `run` where the program has none."""
    file = Path(vars(sys.modules["__main__"]).get("__file__") or "")
    return file.stem if file.suffix == ".py" and file.stem != "__main__" else run.__module__


def _mesh_axes() -> list[str]:
    return list(inspect.signature(sharding.make_mesh).parameters)


def _mesh_example() -> str:
    return ",".join(f"{axis}={size}" for axis, size in zip(_mesh_axes(), (1, 4, 2)))


def _mesh_sizes(text: str) -> dict[str, int]:
    """ "data=1,tensor=2" -> {"data": 1, "tensor": 2}."""
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in _mesh_axes() or not size.isdecimal() or axis in sizes:
            axes = ", ".join(_mesh_axes())
            raise ValueError(
                f"--mesh {text}: '{part}' is not axis=size with an axis of {axes}, each once; "
                f"write for example --mesh {_mesh_example()}"
            )
        sizes[axis] = int(size)
    return sizes


def _data_folder(flag: Path | None) -> Path | None:
    named = os.environ.get("RLHF_JAX_DATA")
    data = flag if flag is not None else Path(named) if named else None
    if data is not None and not data.is_dir():
        source = "--data" if flag is not None else "RLHF_JAX_DATA"
        raise ValueError(f"{source} {data}: no such folder; name one that exists")
    return data


# ------------------------------------------------------------------------------------ the workdir


def _new_workdir(experiment: str) -> Path:
    base = Path("runs") / f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def _compare(workdir: Path, record: dict) -> dict | None:
    """The summary if this very run is finished, None if there is something to train.

    Raises ValueError where the workdir holds another run, or something else altogether.
    """
    if not workdir.exists():
        return None
    if not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file; name a folder")
    if not (workdir / "config.json").exists():
        if any(workdir.iterdir()):
            raise ValueError(
                f"--workdir {workdir} is not empty and has no config.json, so it is not a run; "
                "name another folder"
            )
        return None
    before = _read_json(workdir / "config.json", "name a new --workdir")
    if not {"experiment", "config"} <= before.keys():
        raise ValueError(
            f"{workdir / 'config.json'}: 'experiment' or 'config' is missing; name a new --workdir"
        )
    old = _flat(before["config"]) | {"experiment file": before["experiment"]}
    new = _flat(record["config"]) | {"experiment file": record["experiment"]}
    if before.get("data") and record["data"]:  # an experiment that needs none may be given one
        old, new = old | {"data": before["data"]}, new | {"data": record["data"]}
    for name in before.get("contents", {}).keys() & record["contents"].keys():
        key = f"contents of {name}"
        old, new = (x | {key: y["contents"][name]} for x, y in ((old, before), (new, record)))
    changed = [name for name in (old | new) if old.get(name, ()) != new.get(name, ())]
    refused = [name for name in changed if not _longer(name, old, new)]
    if refused:
        listed = ", ".join(f"{_name(old, name)} -> {_name(new, name)}" for name in refused)
        raise ValueError(
            f"--workdir {workdir} holds a run with other settings: {listed} (old -> new); "
            "name a new --workdir or use the old values (only num_iterations may grow)"
        )
    if changed or not (workdir / "summary.json").exists():
        return None
    return _read_json(workdir / "summary.json", "remove the file to finish the run again")


def _contents(config: Config, workdir: Path, prefix: str = "") -> dict[str, str]:
    """A fingerprint of every file or folder that a `Source` of the configuration names."""
    found = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value = vars(config)[name]
        if isinstance(value, Config):
            found |= _contents(value, workdir, f"{prefix}{name}.")
        elif hint is Source and value:
            path = Path(os.path.expanduser(formats.located(value)[0]))
            if path.exists():
                found[f"{prefix}{name}"] = _fingerprint(path, workdir)
    return found


def _fingerprint(path: Path, workdir: Path) -> str:
    """A hash of a file, or of all files of a folder, of large ones (weights) at 64 places.

    The run's own files do not count, wherever its workdir lies.
    """
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.resolve().is_relative_to(workdir.resolve()):
            continue
        size = file.stat().st_size
        places = range(0, size, _PIECE)
        if size > _READ_WHOLE:
            places = [(size - _PIECE) * i // 63 for i in range(64)]
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            for place in places:
                opened.seek(place)
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()


def _longer(name: str, old: dict, new: dict) -> bool:
    if name.rpartition(".")[2] not in LENGTHS or name not in old or name not in new:
        return False
    return isinstance(old[name], int) and isinstance(new[name], int) and new[name] > old[name]


def _name(values: dict, name: str) -> str:
    return f"{name}={json.dumps(values[name])}" if name in values else f"no {name}"


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"ppo": {"kl_coef": 0.1}} -> {"ppo.kl_coef": 0.1}."""
    flat = {}
    for name, value in tree.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _read_json(path: Path, remedy: str) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; {remedy}")
    return value


class _Found(NamedTuple):
    """The disk before launch writes to it."""

    fresh: bool  # no workdir, or an empty one
    missing: list[Path]  # the workdir and those of its parents that are not there, deepest first
    texts: dict[str, str]  # the files that launch replaces


def _find(workdir: Path) -> _Found:
    fresh = not workdir.exists() or not any(workdir.iterdir())
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    paths = [workdir / name for name in ("config.json", "summary.json")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}
    return _Found(fresh, missing, texts)


def _restore(workdir: Path, found: _Found, log: Log) -> None:
    """After a failure before the first step: leave the disk as it was found."""
    if log.trained or not log.writes or not workdir.exists():
        return
    for name, text in found.texts.items():
        write_atomically(workdir / name, text)
    if found.fresh:
        shutil.rmtree(workdir)
        if workdir not in found.missing:
            workdir.mkdir()
        for parent in found.missing[1:]:
            if not any(parent.iterdir()):  # another run may have begun there meanwhile
                parent.rmdir()


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


def _set_up_jax() -> None:
    """A disk cache of compiled programs, for the whole process."""
    if not jax.config.jax_compilation_cache_dir:  # set by JAX_COMPILATION_CACHE_DIR too
        folder = Path.home() / ".cache" / "rlhf_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


# ------------------------------------------------------------------------------------- the output


def _finish(log: Log, summary: dict) -> None:
    rows = [{"figure": name, "value": _figure(value)} for name, value in _flat(summary).items()]
    log.table("Summary", rows)
    if log.writes:
        log.print(f"report: {report.write(log.folder)}")


def _figure(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _one_line(error: Exception, hint: str = " (--debug shows where)") -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    # Our own messages say what to do; one from elsewhere (a shape in an edited loss) needs a place.
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).is_relative_to(Path(__file__).parent)
    return text if ours else text + hint


def _fail(code: int, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {message}" if code != 130 else message, file=sys.stderr)
    raise SystemExit(code)
