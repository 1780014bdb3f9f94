"""Ablations: one experiment with several values of some settings, over several seeds.

    python experiments/quickstart.py --sweep ppo.kl_coef=0.01,0.05,0.2 --seeds 5

A point is one value of each swept setting. The workdir of a sweep holds a run for every point and
seed (`points/ppo.kl_coef=0.05/seed2`), each of which can be continued and looked at like any other,
the checkpoints of their stages (`stages/`), and what is made of all of them: sweep.json with every
figure, sweep.md with the table, sweep.png with curves, report.html.

Runs that do the same in a stage share it: a stage of the same settings, on the same data, after the
same stages. So what a sweep over PPO's settings does not change, the warm start and the reward
model, is trained once per seed. Runs of one process also share compiled programs: real numbers and
seeds are arguments of these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from rlhf_jax import processes, storage, workdir
from rlhf_jax.config import Config
from rlhf_jax.stopping import Terminated
from rlhf_jax.storage import Path
from rlhf_jax.together import Member, Together
from rlhf_jax.training import checkpoint, figure, report
from rlhf_jax.training.metrics import Log, flat, plain
from rlhf_jax.training.state import TrainingStopped
from rlhf_jax.workdir import FREE

MOST = 10_000  # runs of a sweep
LONGEST = 120  # bytes of the name of a folder


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  # of the swept values, such as "ppo.kl_coef=0.05"; "all" where only seeds differ
    seed: int
    config: Config

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Where the run lives in the workdir of the sweep."""
        return folder_of(self.name, self.seed)


def folder_of(point: str, seed: int | str) -> str:
    """Where the run of a point and a seed lives in the workdir of its sweep.

    A name that no folder can have, or that is too long for most, is shortened and gets its hash.
    """
    name = point.replace("/", "_")
    if name != point or len(name.encode()) > LONGEST:
        name = f"{name.encode()[:LONGEST].decode(errors='ignore')}-{_hash(point)}"
    return f"points/{name}/seed{seed}"


def check_folder(folder: Path) -> None:
    """Raises ValueError for a workdir that holds something else than a sweep."""
    if not folder.exists() or folder.is_dir() and (folder / "points").exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--workdir {folder} is a file; name a folder")
    if (folder / "config.json").exists():
        raise ValueError(f"--workdir {folder} holds a single run; name another folder for a sweep")
    if not workdir.is_empty(folder):
        raise ValueError(
            f"--workdir {folder} is not empty and has no points/, so it holds no sweep; name "
            "another folder"
        )


class Shared:
    """The stages that the runs of a sweep have in common, one folder of checkpoints for each."""

    def __init__(self, folder: Path, described: dict, config: Config):
        # Settings of stages count where their stage runs, all others everywhere.
        stages = [k for k, v in vars(config).items() if isinstance(v, checkpoint.Config)]
        others = {k: v for k, v in described["config"].items() if k not in stages}
        self._folder = folder
        self._before = _hash(described | {"config": others})

    def stage(self, name: str, config: Config, data: Callable[[], str]) -> Path:
        """The folder of the next stage of a run, from its settings and the hash of its data."""
        settings = {k: v for k, v in plain(dataclasses.asdict(config)).items() if k not in FREE}
        self._before = _hash([self._before, name, settings, data()])
        return self._folder / f"{name}-{self._before}"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


# -------------------------------------------------------------------------------------- the points


def points(config: Config, swept: Sequence[str], seeds: int) -> list[Point]:
    """The runs of a sweep, those of one seed next to each other.

    `swept` are settings with their values, "ppo.kl_coef=0.01,0.05"; of several the grid is taken.
    `seeds` are counted from the configuration's own. Raises ValueError for a setting that does not
    exist or is swept twice, and for a value that it cannot have.
    """
    settings: dict[str, list[str]] = {}
    for text in swept:
        name, values = _parsed(config, text)
        if name in settings:
            raise ValueError(f"--sweep {text}: {name} is swept already; name all values at once")
        settings[name] = values
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1")
    count = seeds * math.prod(map(len, settings.values()))
    if count > MOST:
        raise ValueError(f"--sweep and --seeds ask for {count} runs; {MOST} is the most")
    first = vars(config).get("seed")
    if seeds > 1 and (first is None or "seed" in settings):
        raise ValueError(f"--seeds {seeds}: there is no 'seed' that is free to be counted up")
    grid: dict[str, Config] = {}
    alike: dict[str, str] = {}
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values))
        name = ",".join(f"{k}={v}" for k, v in chosen.items()) or "all"
        grid[name] = _with(config, chosen)
        same = alike.setdefault(_hash(plain(dataclasses.asdict(grid[name]))), name)
        if same != name:
            raise ValueError(f"--sweep: {same} and {name} are the same settings")
    if seeds == 1:
        return [Point(name, vars(made).get("seed", 0), made) for name, made in grid.items()]
    return [
        Point(name, seed, dataclasses.replace(made, seed=seed))
        for seed in range(first, first + seeds)
        for name, made in grid.items()
    ]


def _parsed(config: Config, text: str) -> tuple[str, list[str]]:
    name, equals, listed = text.partition("=")
    name, values = name.strip().replace("-", "_"), [x.strip() for x in listed.split(",")]
    known = list(flat(dataclasses.asdict(config)))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        section = [x for x in known if x.startswith(f"{name}.")][:1]
        hint = "".join(f"; did you mean {x}?" for x in section or near)
        raise ValueError(f"--sweep {text}: there is no setting {name!r}{hint}")
    if not equals or "" in values:
        raise ValueError(
            f"--sweep {text}: a value is missing; write for example --sweep {name}=1,2"
        )
    if len(set(values)) < len(values):
        raise ValueError(f"--sweep {text}: a value is named twice")
    return name, values


def _with(config: Config, values: dict[str, str]) -> Config:
    """The configuration with other values, given as on the command line."""
    now, flags = flat(dataclasses.asdict(config)), []
    for name, value in values.items():
        stage, dot, field = name.replace("_", "-").rpartition(".")
        if isinstance(now[name], bool) and value in ("True", "False"):
            flags.append(f"--{stage}{dot}{'' if value == 'True' else 'no-'}{field}")
        else:
            flags += [f"--{stage}{dot}{field}", value]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # a box of several lines
            options = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(type(config), args=flags, default=config, config=options)
    except SystemExit:
        shown = ", ".join(f"{k}={v}" for k, v in values.items())
        why = " ".join(
            re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]|For full helptext.*", "", said.getvalue()).split()
        )
        raise ValueError(f"--sweep: {shown} is not what this setting is made of: {why}") from None


def shard(found: list[Point], text: str) -> list[Point]:
    """The part "i/n" of the runs, i from 1 to n; those of one seed stay together where they can.

    Raises ValueError for anything else.
    """
    if not text:
        return found
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--sweep-shard {text} is not i/n with i from 1 to n, such as 1/4")
    i, n = int(i), int(n)
    if n > len(found):
        raise ValueError(f"--sweep-shard {text}: there are {len(found)} runs to share out")
    return found[len(found) * (i - 1) // n : len(found) * i // n]


# ---------------------------------------------------------------------------------------- the runs


def run(
    chosen: Sequence[Point],
    every: Sequence[Point],
    folder: Path,
    log: Log,
    train: Callable[[Point, Path], dict],
    finished: Callable[[Point, Path], dict | None],
) -> dict[str, dict]:
    """Trains the chosen points, and returns the table of all that are finished: see `table`.

    `train(point, folder)` returns a run's summary, without training where it is finished. A run
    that fails, for whatever reason, is reported, and the next one begins; with several processes
    this holds for the errors that all of them have. Raises ValueError where all of them fail.
    """
    failed: dict[str, str] = {}
    for number, point in enumerate(chosen, 1):
        log.print(f"point {number} of {len(chosen)}: {point.title}")
        try:
            train(point, folder / point.folder)
        except Exception as error:  # of any kind: a device's memory may be full, for one
            own = isinstance(error, ValueError | OSError | TrainingStopped)
            if not own and jax.process_count() > 1:  # the others may not have it, and would wait
                raise
            kind = "" if own else f"{type(error).__name__}: "
            failed[point.title] = kind + " ".join(str(error).split())
            log.print(f"failed: {point.title}: {failed[point.title]}")
    found = processes.first(lambda: table(every, folder, finished))
    if any(found.values()):
        without = processes.first(lambda: write(folder, found, failed))
        show(log, found)
        if without:
            log.print(f"no figure: {without}")
    if failed:
        log.print(f"{len(failed)} of {len(chosen)} points failed: {_listed(failed)}")
        if len(failed) == len(chosen):
            raise ValueError(f"all {len(chosen)} points failed; {_listed(failed)}")
    return found


def _listed(failed: dict[str, str]) -> str:
    """The reasons of runs by name, each reason once."""
    names: dict[str, list[str]] = {}
    for name, why in failed.items():
        names.setdefault(why, []).append(name)
    return "; ".join(
        f"{first}{f' and {len(more)} more' if more else ''}: {why}"
        for why, (first, *more) in names.items()
    )


def run_together(
    chosen: Sequence[Point],
    folder: Path,
    log: Log,
    mesh: jax.sharding.Mesh,
    train: Callable[[Point, Path, Member], dict],
) -> None:
    """Trains the chosen points in step, see `together`; what does not end is left to `run`.

    Not on several devices, whose sharding of rows a vmapped program would have to share with the
    runs: there nothing is done, and said so.
    """
    if mesh.devices.size > 1:
        log.print(f"the runs go on one by one: {mesh.devices.size} devices split their rows")
        return
    meeting = Together(len(chosen), log.print)
    works = [functools.partial(train, point, folder / point.folder) for point in chosen]
    for point, found in zip(chosen, meeting.run(works)):
        error = found.exception()
        if isinstance(error, KeyboardInterrupt | Terminated):
            raise error
        if error is not None:
            log.print(f"{point.title} goes on alone: {' '.join(str(error).split())}")
    log.print(f"{meeting.programs_run} programs were run for {len(chosen)} runs together")


def table(
    every: Sequence[Point], folder: Path, finished: Callable[[Point, Path], dict | None]
) -> dict[str, dict]:
    """Point -> figure -> {"mean", "interval", "values"} over the seeds that are finished.

    `finished(point, folder)` is the summary of a run with these very settings, None without one.
    `interval` is the half width of the 95 % confidence interval of the mean by Student's t, None
    for a single seed. Figures that are no numbers, and seconds, are left out.
    """
    found: dict[str, dict] = {}
    for point in every:
        summary = finished(point, folder / point.folder) or {}
        values = found.setdefault(point.name, {})
        for name, value in flat(summary).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not name.startswith("seconds."):
                values.setdefault(name, {"values": {}})["values"][str(point.seed)] = value
    for figures in found.values():
        for figure_ in figures.values():
            figure_ |= _mean(list(figure_["values"].values()))
    return found


def _mean(values: list[float]) -> dict[str, float | None]:
    count, interval = len(values), None
    if count > 1:
        import scipy.stats  # for whose second no other run should wait

        error = float(np.std(values, ddof=1)) / math.sqrt(count)
        interval = float(scipy.stats.t.ppf(0.975, count - 1)) * error
    return {"mean": float(np.mean(values)), "interval": interval}


# ------------------------------------------------------------------------------------- the results


def rows(found: dict[str, dict]) -> list[dict[str, str]]:
    """The table for people: a row per figure, a column per point."""
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    return [
        {"figure": name} | {point: _cell(figures.get(name)) for point, figures in found.items()}
        for name in names
    ]


def _cell(figure_: dict | None) -> str:
    if figure_ is None:
        return "-"
    count, interval = len(figure_["values"]), figure_["interval"]
    return f"{figure_['mean']:.4g}" + ("" if count == 1 else f" ± {interval:.2g} ({count})")


def show(log: Log, found: dict[str, dict]) -> None:
    """Prints the table."""
    log.table("Mean ± half of the 95 % interval (seeds)", rows(found))


def write(folder: Path, found: dict[str, dict], failed: dict[str, str]) -> str:
    """Writes sweep.json, sweep.md, sweep.png and report.html; says why there is no figure."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"points": found, "failed": failed}, indent=2, ensure_ascii=False)
    storage.write(folder / "sweep.json", text + "\n")
    listed = rows(found)
    columns = list(listed[0])
    lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in listed)]
    storage.write(folder / "sweep.md", "".join(f"| {' | '.join(x)} |\n" for x in lines))
    image, without = None, ""
    try:
        image = curves(folder, found)
    except ValueError as error:  # runs of other lengths, say, which have a table all the same
        without = str(error)
    if image is not None:
        storage.write(folder / "sweep.png", image)
    report.write_sweep(folder, listed, image, failed)
    return without


def curves(folder: Path, found: dict[str, dict]) -> bytes | None:
    """A figure of the last stage, a line per point in a band of its seeds; None without any."""
    runs = {
        name: [folder / folder_of(name, seed) for seed in seeds_of(figures)]
        for name, figures in found.items()
        if figures
    }
    drawn = figure.of_last_stage([run for group in runs.values() for run in group])
    if drawn is None:
        return None
    stage, panels = drawn
    lines = [
        figure.Curve(name, [figure.read(run, panels, stage) for run in group])
        for name, group in runs.items()
    ]
    return figure.draw(lines, panels)


def seeds_of(figures: dict[str, dict]) -> list[str]:
    """The seeds of a point that are finished."""
    return list(dict.fromkeys(seed for x in figures.values() for seed in x["values"]))
