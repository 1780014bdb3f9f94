"""The command line of an experiment: flags, exit codes, errors as one line.

    config = pipeline.Config(...)
    if __name__ == "__main__":
        launch(pipeline.run, config, programs=programs)

`command` is for tools that train nothing: flags and errors only. What a workdir holds, and what is
allowed when it is used again, is in `workdir`. The exit codes are those of `Exit`.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import tyro

from rlhf_jax import allocator, distributed, plan, processes, sharding, storage, sweep, workdir
from rlhf_jax import flags as command_line
from rlhf_jax.abstract import Program
from rlhf_jax.config import Config
from rlhf_jax.models.transformer import AS_CONFIGURED, Compute
from rlhf_jax.stopping import Stop, Terminated
from rlhf_jax.together import Member
from rlhf_jax.training import report
from rlhf_jax.training.metrics import Log, flat, plain
from rlhf_jax.training.state import TrainingStopped


class Exit(enum.IntEnum):
    """How every program of this library ends; 0 where it has done what was asked."""

    BAD_INPUT = 2  # a wrong flag (tyro's own exit code), value, file or row
    TRAINING_STOPPED = 3  # a non-finite loss or gradient, a failed check, a reward that hangs
    DOES_NOT_FIT = 4  # what `--plan` compiled needs more memory than a chip has
    INTERRUPTED = 130  # by ctrl-C: 128 + SIGINT, as in shells
    TERMINATED = 143  # 128 + SIGTERM; the step that ran has been saved


class Context(NamedTuple):
    """What `run(config, context)` gets from the command line besides its configuration."""

    workdir: storage.Path  # the folder of this run
    log: Log  # of this run, writing to the workdir
    mesh: jax.sharding.Mesh
    data: Path | None  # the folder of real data; None where nobody named one
    compute: Compute = AS_CONFIGURED  # how models are computed, where the command line says so
    stop: Stop = Stop()  # what may end a stage early; connected to no signal unless by `launch`
    shared: sweep.Shared | None = None  # the stages that runs of a sweep have in common
    together: Member | None = None  # of runs whose online stages are computed together


def launch(
    run: Callable[[Config, Context], dict],
    config: Config,
    argv: list[str] | None = None,
    *,
    programs: Callable[[Config, Context], list[Program]] | None = None,
) -> dict:
    """Calls `run` with the configuration that the command line asks for; returns its summary.

    Flags change fields of `config`, which gives the defaults; `argv=None` reads `sys.argv`. The
    workdir then holds config.json, summary.json, report.html and what `run` wrote. If it holds the
    summary of this very run already, that is returned without training. After an interruption, or
    with more iterations, `run` is called again and continues from its checkpoints. Any other change
    is refused (see `workdir`).

    With `--plan v5e:4x4` nothing is run or written. The programs of the experiment, which
    `programs(config, context)` lists with the shapes that `run` calls them with, are compiled for
    that slice and what they need is printed (see `plan`); the summary is then {}.

    On an error it prints one line to stderr, with `--debug` the traceback too, and exits
    (SystemExit) with a code of `Exit`.
    """
    allocator.keep_freed_memory()
    try:
        flags = command_line.parse(config, argv)
        if flags.from_ is not None:
            started = workdir.started_from(flags.config, flags.from_)
            flags = dataclasses.replace(flags, config=started)
    except (
        ValueError,
        OSError,
    ) as error:  # of the configuration: tyro's own errors exit with the same code
        _fail(Exit.BAD_INPUT, f"error: {_one_line(error, hint='')}", debug=False)
    try:
        return _plan(run, programs, flags) if flags.plan else _launch(run, flags)
    except (ValueError, OSError) as error:
        _fail(Exit.BAD_INPUT, f"error: {_one_line(error)}", flags.debug)
    except TrainingStopped as error:
        kept = "the workdir is kept, the last checkpoint in it is intact"
        message = f"error: training stopped: {_one_line(error)}; {kept}"
        _fail(Exit.TRAINING_STOPPED, message, flags.debug)
    except (KeyboardInterrupt, Terminated) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = Exit.INTERRUPTED if interrupted else Exit.TERMINATED
        _fail(code, f"{code.name.lower()}{error}", flags.debug)


def _launch(run: Callable, flags) -> dict:
    distributed.start(
        distributed.Flags(
            flags.coordinator, flags.num_processes, flags.process_id, flags.coordinator_timeout
        )
    )
    stop = Stop()
    with stop.handled():
        context, described = processes.everywhere(lambda: _prepare(run, flags, stop))
        # What makes other programs, and would leave the processes waiting for each other.
        compiled = {"mesh": dict(context.mesh.shape), "compute": context.compute._asdict()}
        swept = {"sweep": list(flags.sweep), "seeds": flags.seeds, "shard": flags.sweep_shard}
        distributed.check_same(described | compiled | swept)
        if flags.sweep or flags.seeds != 1:
            return _sweep(run, flags, context, described["experiment"])
        return _run(run, flags.config, context, described)


def _run(run: Callable, config: Config, context: Context, described: dict) -> dict:
    """One run in its workdir, or its summary if it is finished."""
    folder, log = context.workdir, context.log
    summary = processes.first(lambda: workdir.compare(folder, described))
    if summary is not None:
        log.print(f"{folder} is finished; nothing to train")
    else:
        workdir.check_shared(folder)
        with workdir.taken(folder, log) as found:
            processes.first(lambda: workdir.begin(folder, described, context.mesh))
            log.print(f"{described['experiment']}: {folder}")
            try:
                summary = plain(run(config, context))
            except (KeyboardInterrupt, Terminated) as error:
                raise type(error)(workdir.how_to_continue(found.empty, folder, log)) from error
            processes.first(lambda: workdir.finish(folder, summary))
    processes.first(lambda: _show(log, summary))
    return summary


def _sweep(run: Callable, flags, context: Context, experiment: str) -> dict:
    """The runs of a sweep, one after the other, in this process."""
    folder = context.workdir
    every = sweep.points(flags.config, flags.sweep, flags.seeds)
    chosen = sweep.shard(every, flags.sweep_shard)
    processes.first(lambda: sweep.check_folder(folder))

    def described(point: sweep.Point, where: storage.Path) -> dict:
        return workdir.describe(experiment, point.config, context.data, where, flags.dtype)

    def finished(point: sweep.Point, where: storage.Path) -> dict | None:
        try:
            return workdir.compare(where, described(point, where))
        except ValueError:  # the folder holds a run with other settings
            return None

    def train(point: sweep.Point, where: storage.Path, member: Member | None = None) -> dict:
        quiet = member is not None and member.number > 0
        log = Log(where, quiet=quiet, profile_steps=flags.profile)
        about = described(point, where)
        shared = sweep.Shared(folder / "stages", about, point.config)
        own = context._replace(workdir=where, log=log, shared=shared, together=member)
        try:
            return _run(run, point.config, own, about)
        except Exception:
            if flags.debug:
                traceback.print_exc()
            raise
        except (KeyboardInterrupt, Terminated) as error:
            again = f"; the same command with --workdir {folder} continues at {point.title}"
            raise type(error)(again) from error

    if flags.together:
        sweep.run_together(chosen, folder, context.log, context.mesh, train)
    return sweep.run(chosen, every, folder, context.log, train, finished)


def _prepare(run: Callable, flags, stop: Stop) -> tuple[Context, dict]:
    """What `run` is given besides its configuration, and the description of the run."""
    mesh = sharding.make_mesh(**_mesh_sizes(flags.mesh))
    data = _data_folder(flags.data)
    if flags.profile < 0:
        raise ValueError(f"--profile {flags.profile}: the number of steps must be at least 0")
    if flags.workdir is None and jax.process_count() > 1:
        raise ValueError("--workdir is missing: several processes need the same one; name it")
    experiment = experiment_name(run)
    if flags.workdir is None:
        folder = workdir.new_folder(experiment)
    elif not flags.workdir.strip():
        raise ValueError("--workdir is the empty text; name a folder, or leave the flag out")
    else:
        folder = storage.path(flags.workdir)
    log = Log(folder, profile_steps=flags.profile)
    described = workdir.describe(experiment, flags.config, data, folder, flags.dtype)
    return Context(folder, log, mesh, data, _compute(flags), stop), described


def _compute(flags) -> Compute:
    return Compute(flags.dtype, flags.remat, flags.scan_layers)


def _plan(run: Callable, programs: Callable | None, flags) -> dict:
    if programs is None:
        raise ValueError(f"--plan {flags.plan}: this experiment does not list its programs")
    # Nothing may look for the TPU that is only planned for.
    jax.config.update("jax_platforms", "cpu")
    devices = plan.topology(flags.plan)
    mesh = sharding.make_mesh(**_mesh_sizes(flags.mesh), devices=devices)
    context = Context(storage.path("."), Log(), mesh, _data_folder(flags.data), _compute(flags))
    title = f"{experiment_name(run)} on {flags.plan}"
    too_large = plan.report(title, programs(flags.config, context), mesh, context.log.print)
    if too_large is not None:
        _fail(Exit.DOES_NOT_FIT, too_large, debug=False)
    return {}


# ------------------------------------------------------------------------------ the command line


def command(
    run: Callable | dict[str, Callable], argv: list[str] | None = None, *, description: str
):
    """Calls a function, or one of several by name, with the command line as its arguments.

    For tools that train nothing: no workdir. `description` is the text of `--help`, usually the
    tool's docstring. Returns what the function returns, or exits (SystemExit) as `launch` does,
    having printed one line to stderr.
    """
    # By default the usage would begin with the whole path of an installed program.
    about = {"prog": Path(sys.argv[0]).name, "description": inspect.cleandoc(description)}
    allocator.keep_freed_memory()
    try:
        if isinstance(run, dict):
            return tyro.extras.subcommand_cli_from_dict(run, args=argv, **about)
        return tyro.cli(run, args=argv, **about)
    except (ValueError, OSError) as error:
        _fail(Exit.BAD_INPUT, f"error: {_one_line(error, hint='')}", debug=False)
    except KeyboardInterrupt:
        _fail(Exit.INTERRUPTED, "interrupted", debug=False)


def experiment_name(run: Callable) -> str:
    """The name of the program's file, or of the module of `run` where the program has none."""
    file = Path(vars(sys.modules["__main__"]).get("__file__") or "")
    return file.stem if file.suffix == ".py" and file.stem != "__main__" else run.__module__


def _mesh_sizes(text: str) -> dict[str, int]:
    """ "data=1,tensor=2" -> {"data": 1, "tensor": 2}."""
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in sharding.AXES or not size.isdecimal() or axis in sizes:
            axes = ", ".join(sharding.AXES)
            raise ValueError(
                f"--mesh {text}: '{part}' is not axis=size with an axis of {axes}, each once; "
                f"write for example --mesh {sharding.AXES[0]}=1,{sharding.AXES[1]}=4"
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


# ------------------------------------------------------------------------------------- the output


def _show(log: Log, summary: dict) -> None:
    rows = [{"figure": name, "value": _rounded(value)} for name, value in flat(summary).items()]
    log.table("Summary", rows)
    log.repeat_alarms()
    if log.writes:
        log.print(f"report: {report.write(log.folder)}")


def _rounded(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _one_line(error: Exception, hint: str = " (--debug shows where)") -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    # Messages of this library say what to do. For others, such as a wrong shape in an edited loss,
    # one needs to see where they were raised.
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).is_relative_to(Path(__file__).parent)
    return text if ours else text + hint


def _fail(code: Exit, message: str, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
    distributed.fail(code)
    raise SystemExit(code)
