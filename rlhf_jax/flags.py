"""The command line of an experiment: one flag for every setting, and help in two lengths.

`--help` shows what the experiment itself has set, in the order of its stages, and the flags that
most runs need. `--help-all` shows every setting of every stage, as tyro writes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlhf_jax import sharding
from rlhf_jax.config import Config
from rlhf_jax.models.transformer import Precision, Remat

LINES, COLUMNS = 100, 100  # of the short help: two screens
COLUMN = 45  # where its texts begin
# The flags of `launch` that the short help shows.
USUAL = ("workdir", "from", "data", "mesh", "sweep", "seeds", "plan", "debug")
_FRAME = "│╭╮╰╯─ "


def parse(config: Config, argv: list[str] | None):
    """The flags, `config` among them.

    Exits (SystemExit) with 0 after `--help` and `--help-all`, and with 2 on a wrong flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    kind = _kind(config)
    about = inspect.cleandoc(sys.modules["__main__"].__doc__ or "")
    options = {"description": about, "config": (tyro.conf.AvoidSubcommands,)}
    if "--help-all" in argv:
        argv = ["--help"]
    elif {"--help", "-h"} & set(argv):
        print(short_help(config, about))
        raise SystemExit(0)
    return _checked(tyro.cli(kind, args=argv, **options))


def _checked(flags: Any) -> Any:
    """The flags, with those of sweeps as one list. Raises ValueError for what only a sweep has."""
    if () in flags.sweep:
        raise ValueError("--sweep names no setting; write for example --sweep ppo.kl_coef=0.05,0.2")
    flags = dataclasses.replace(flags, sweep=tuple(itertools.chain(*flags.sweep)))
    several = bool(flags.sweep) or flags.seeds != 1
    if several and flags.plan:
        raise ValueError("--plan is of one run; leave out --sweep and --seeds")
    for name, value in (("sweep-shard", flags.sweep_shard), ("together", flags.together)):
        if value and not several:
            raise ValueError(f"--{name} is of several runs; name them by --sweep or --seeds")
    return flags


def _own() -> tuple:
    """(name, type, default, metavar, text) of the flags that every experiment has."""
    mesh = ",".join(f"{axis}={size}" for axis, size in zip(sharding.AXES, (1, 4, 2)))
    return (
        ("workdir", str | None, None, "DIR", "where the run lives [default: new, under runs/]"),
        ("from_", str | None, None, "DIR", "another run, whose exported models this starts from"),
        ("data", Path | None, None, "DIR", "folder of real data [default: $RLHF_JAX_DATA]"),
        ("mesh", str, "", "SIZES", f"such as {mesh} [default: all devices]"),
        (
            "sweep",
            tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
            (),
            "FIELD=A,B",
            "values of a setting to compare, or of several",
        ),
        ("seeds", int, 1, "N", "runs of everything, each with a seed of its own"),
        ("sweep_shard", str, "", "I/N", "the part of a sweep that this process runs, from 1/N"),
        ("together", bool, False, None, "compute online stages of a sweep's runs in one program"),
        ("plan", str, "", "SLICE", "such as v5e:4x4: only compile for it, and print what it takes"),
        ("profile", int, 0, "STEPS", "number of steps of each stage to trace to workdir/profile"),
        ("dtype", Precision | None, None, None, "of matrix products [default: as configured]"),
        ("remat", Remat | None, None, None, "what a backward pass recomputes to save memory"),
        ("scan_layers", bool | None, None, None, "compile one layer and loop over it in training"),
        ("coordinator", str | None, None, "HOST:PORT", "process 0, of several [default: detected]"),
        ("num_processes", int | None, None, "N", "how many there are; 1 looks for no others"),
        ("process_id", int | None, None, "I", "which of them this is, from 0"),
        ("coordinator_timeout", int, 300, "SECONDS", "how long to wait for all of them"),
    )


def _kind(config: Config) -> type:
    """The dataclass of all flags. Raises TypeError for a setting with the name of a flag."""
    arg, own = tyro.conf.arg, _own()
    taken = {name for name, *_ in own} | {"debug", "config"}
    for field in dataclasses.fields(config):
        if field.name in taken:
            kind = type(config).__name__
            raise TypeError(f"{kind}.{field.name}: launch has a flag of that name; rename it")
    switch = Annotated[
        bool, arg(help="show the traceback of an error"), tyro.conf.FlagCreatePairsOff
    ]

    def flag(name: str, kind: Any, default: Any, metavar: str | None, text: str) -> tuple:
        # `from` is a word of Python, and so no name of a field.
        shown = arg(name=name.rstrip("_"), metavar=metavar, help=text, help_behavior_hint="")
        return name, Annotated[kind, shown], default

    settings = Annotated[type(config), arg(name="")]
    fields = [("config", settings, dataclasses.field(default=config)), *(flag(*x) for x in own)]
    return dataclasses.make_dataclass(
        "Flags", [*fields, ("debug", switch, False)], frozen=True, kw_only=True
    )


# --------------------------------------------------------------------------------- the short help


def short_help(config: Config, about: str) -> str:
    """What `--help` prints of an experiment with this configuration and docstring.

    It fits `LINES`: where an experiment sets too much, the settings inside of a stage's own parts
    (its optimizers, its sampling) are left out, and then the stages for which there is no room.
    """
    texts, paragraphs = _texts(config), about.split("\n\n")
    lines = ["\n\n".join(paragraphs[:3]), "", "flags:", *_listed(USUAL, texts), "", "settings:"]
    settings = dict(_settings(config))
    lines += _listed([name for name in settings if "." not in name], texts)
    last = ["", f"--help-all shows all {len(texts)} flags."]
    room = LINES - "\n".join([*lines, *last]).count("\n") - 1
    for depth in (3, 2):
        inside = [name for name in settings if settings[name] and 1 < len(name.split(".")) <= depth]
        stages = [
            ["", f"{stage}:", *_listed([x for x in inside if x.startswith(f"{stage}.")], texts)]
            for stage in dict.fromkeys(name.split(".")[0] for name in inside)
        ]
        if sum(map(len, stages)) <= room:
            break
    for stage in stages:
        if len(stage) <= room:
            lines += stage
            room -= len(stage)
    return "\n".join([*lines, *last])


def _settings(config: Config, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every setting as its flag is called, and whether it is other than its class has it."""
    for field in dataclasses.fields(config):
        value, name = vars(config)[field.name], f"{prefix}{field.name}".replace("_", "-")
        if isinstance(value, Config):
            yield from _settings(value, f"{name}.")
        else:
            yield name, value != field.default


def _page(config: Config) -> str:
    """The whole help, in one column whatever the terminal: a wide one would get several."""
    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(COLUMNS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            options = {"description": "", "config": (tyro.conf.AvoidSubcommands,)}
            tyro.cli(_kind(config), args=["--help"], **options)
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


def _listed(names: Iterable[str], texts: dict[str, tuple[str, str]]) -> list[str]:
    """A line for each flag, cut where it would need a second one."""
    wide = COLUMNS - COLUMN
    lines = []
    for name in names:
        usage, text = texts[name]
        text = textwrap.shorten(text, wide, placeholder="...")
        lines.append(f"  {usage}".ljust(COLUMN - 1) + f" {text}")
    return [line[:COLUMNS].rstrip() for line in lines]


def names(config: Config) -> list[str]:
    """Every flag of an experiment, as it is called: those of `launch` and the settings."""
    own = [name.rstrip("_").replace("_", "-") for name, *_ in _own()]
    return [*own, "debug", *(name for name, _ in _settings(config))]


def _texts(config: Config) -> dict[str, tuple[str, str]]:
    """(usage, text) of every flag by its name, read from the whole help."""
    found = {name: (f"--{name}", "") for name in names(config)}
    unread, name = set(found), None
    for line in _page(config).splitlines():
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip(_FRAME)
        match = re.match(r"--([\w.-]+)", text)
        # The text of another flag may begin a line with the name of one.
        if match and match[1] in unread:
            name = match[1]
            unread.remove(name)
            usage, _, rest = text.partition("   ")  # tyro puts short ones into one line
            found[name] = (usage, rest.strip())
        elif not text or set(text) <= {"-"} or re.fullmatch(r"([\w.-]+ )?options", text):
            name = None  # between two groups
        elif name is not None:
            usage, before = found[name]
            found[name] = (usage, f"{before} {text}".strip())
    return found
