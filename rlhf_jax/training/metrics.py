"""What a run writes while it trains: progress on the console, metrics.jsonl, TensorBoard, samples.

    log = Log(folder)
    with log.stage("ppo", total=config.num_iterations, start=resumed_at) as stage:
        for step in range(resumed_at, config.num_iterations):
            state, metrics = train_step(state, batch)
            stage.write(step, metrics, tokens=batch.tokens.size)

Steps count from 0. Each `write` converts the metrics of the write before it, so the host waits for
the step that the device has finished, or is about to finish, and never for the one just started.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePath

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# The first two of these that a step reports are shown beside the progress of its stage.
HEADLINE = ("objective/scores", "objective/kl", "loss", "rewards/accuracies")
LINES_PER_STAGE = 20  # where the output is no terminal (a log file, a notebook)

Check = Callable[[int, dict[str, float]], None]


class Log:
    """The console and the files of one run; only process 0 prints and writes.

    `folder=None` keeps everything in memory (`Stage.history`); `quiet=True` prints nothing.
    With `profile_steps=N` each stage writes a `jax.profiler` trace of N steps after its first
    (which compiles) to `folder/profile/<stage>`. `trained` says whether any step was written.
    """

    def __init__(self, folder: Path | None = None, quiet: bool = False, profile_steps: int = 0):
        if profile_steps < 0 or (profile_steps and folder is None):
            raise ValueError(
                f"profile_steps={profile_steps} with folder={folder}; "
                "it must be at least 0, and a trace needs a folder"
            )
        self.folder = None if folder is None else Path(folder)
        self.profile_steps = profile_steps
        self.trained = False
        self.writes = jax.process_index() == 0 and folder is not None
        self.console = Console(quiet=quiet or jax.process_index() != 0)

    def stage(self, name: str, total: int, start: int = 0, check: Check | None = None) -> Stage:
        """One stage of `total` steps, of which `start` are done; use it in a `with` statement.

        On entry the lines of this stage with step >= start leave metrics.jsonl (and TensorBoard is
        told to purge them): they are about to be made again.
        `check(step, floats)` sees the converted metrics of every step and may raise.
        """
        return Stage(self, name, total, start, check)

    def samples(self, stage: str, step: int, rows: list[dict[str, str | float | int]]) -> None:
        """Write texts to samples.jsonl, in place of any that this stage and step had before.

        The report pairs rows of the same `prompt`: the first `completion` with the last one, or
        `before` and `after` of a single row. Numbers in a row are shown as its scores.
        """
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "samples.jsonl"
        _drop_lines(path, lambda line: (line["stage"], line["step"]) == (stage, step))
        with path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json_line({"stage": stage, "step": step, **row}))

    def table(self, title: str, rows: list[dict[str, str | float | int]]) -> None:
        """Print rows under the keys of the first one, say the same prompts before and after."""
        if not rows:
            return
        table = Table(title=title, title_justify="left", show_lines=len(rows[0]) > 2)
        for name in rows[0]:
            numbers = not isinstance(rows[0][name], str)
            table.add_column(Text(name), overflow="fold", justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*(Text(_shown(value)) for value in row.values()))
        self.console.print(table)

    def print(self, text: str) -> None:
        """Print a line, above the progress bar if one is running. The text is not markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Stage:
    """The steps of one stage; made by `Log.stage`. `history` holds every converted dict."""

    def __init__(self, log: Log, name: str, total: int, start: int, check: Check | None):
        self.name = name
        self.history: list[dict[str, float]] = []
        self._log, self._total, self._start, self._check = log, total, start, check
        self._pending: tuple | None = None
        self._written = 0
        self._tracing = False

    def __enter__(self) -> Stage:
        log = self._log
        self._file = self._board = None
        self._seconds_before = 0.0
        if log.writes:
            log.folder.mkdir(parents=True, exist_ok=True)
            self._seconds_before = self._drop_remade_steps()
            self._file = (log.folder / "metrics.jsonl").open("a", encoding="utf-8")
            # One folder per stage, because a purge hides every later step of its whole folder.
            self._board = _summary_writer()(
                str(log.folder / "tensorboard" / self.name), purge_step=self._start, flush_secs=10
            )
        self._progress = _Progress(log.console, self.name, self._total, self._start)
        self._speed = _Speed(time.perf_counter())
        return self

    def write(self, step: int, metrics: dict, tokens: int | jax.Array = 0) -> None:
        """Take the scalars of one step (device arrays or floats); convert those before them.

        `tokens` is what the step processed; it becomes the metric `tokens_per_second` of every
        step but the first. Raises ValueError, a step late, for a metric that is not a scalar.
        """
        self._log.trained = True
        previous, self._pending = self._pending, (step, metrics, tokens)
        if previous is not None:
            self._convert(*previous, check=self._check)
        self._written += 1
        self._trace(metrics)

    def flush(self) -> None:
        """Wait for the newest step and convert it now, before a checkpoint say."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._convert(*pending, check=self._check)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.flush()
            elif self._pending is not None:
                # The step that is pending may be the one that failed: then converting it raises
                # again, and must not hide the error that is already on its way.
                with contextlib.suppress(Exception):
                    self._convert(*self._pending, check=None)
        finally:
            self._stop_trace()
            self._progress.close()
            if self._file is not None:
                self._file.close()
                self._board.close()

    def _drop_remade_steps(self) -> float:
        """Trim metrics.jsonl; returns the seconds that the steps before `start` took."""

        def remade(line: dict) -> bool:
            return line["stage"] == self.name and line["step"] >= self._start

        kept = _drop_lines(self._log.folder / "metrics.jsonl", remade)
        return max((line["seconds"] for line in kept if line["stage"] == self.name), default=0.0)

    def _convert(self, step: int, metrics: dict, tokens, check: Check | None) -> None:
        values, tokens = jax.device_get((metrics, tokens))
        floats = {name: self._scalar(name, values[name]) for name in metrics}
        rate = self._speed.add(time.perf_counter(), float(tokens))
        if rate is not None:
            floats["tokens_per_second"] = rate
        seconds = round(self._seconds_before + self._speed.seconds, 3)
        self.history.append({"step": step, "seconds": seconds, **floats})
        if self._file is not None:
            self._file.write(json_line({"stage": self.name, **self.history[-1]}))
            self._file.flush()
            for name, value in floats.items():
                # TensorBoard has no use for NaN (and its writer prints a warning for each).
                if math.isfinite(value):
                    self._board.add_scalar(f"{self.name}/{name}", value, step)
        self._progress.show(step, floats, self._speed)
        if check is not None:
            check(step, floats)

    def _scalar(self, name: str, value) -> float:
        array = np.asarray(value)
        if array.size != 1:
            raise ValueError(
                f"metric '{name}' of stage '{self.name}' has shape {array.shape}; write scalars"
            )
        return float(array.item())

    def _trace(self, metrics: dict) -> None:
        """Called after each write: trace `profile_steps` steps, from the second of the stage."""
        steps = self._log.profile_steps
        if not (steps and self._log.writes) or self._written not in (1, 1 + steps):
            return
        # Otherwise the trace would begin in the first step and miss the end of the last one.
        jax.block_until_ready(metrics)
        if self._written == 1:
            jax.profiler.start_trace(str(self._log.folder / "profile" / self.name))
            self._tracing = True
        else:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def _summary_writer() -> type:
    """tensorboardX's SummaryWriter. On import it also loads torch where it finds it: not here."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # makes `import torch` an ImportError, which it expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class _Speed:
    """Wall time between conversions. The first step compiles, so averages leave it out."""

    def __init__(self, now: float):
        self.began = self.last = now
        self.first_ended: float | None = None
        self.steps = 0
        self.tokens = 0.0

    def add(self, now: float, tokens: float) -> float | None:
        """One more step is complete; returns its tokens per second, None for the first."""
        elapsed, self.last = max(now - self.last, 1e-9), now
        if self.first_ended is None:
            self.first_ended = now
            return None
        self.steps += 1
        self.tokens += tokens
        return tokens / elapsed if tokens else None

    @property
    def seconds(self) -> float:
        return self.last - self.began

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.last - self.first_ended, 1e-9)

    @property
    def seconds_per_step(self) -> float | None:
        return (self.last - self.first_ended) / self.steps if self.steps else None


class _Progress:
    """A bar where the output is a terminal, otherwise a plain line now and then."""

    def __init__(self, console: Console, name: str, total: int, start: int):
        self.console, self.name, self.total = console, name, total
        self.stride = max(1, math.ceil((total - start) / LINES_PER_STAGE))
        self.bar = None
        if console.is_terminal and not console.is_jupyter and not console.quiet:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=14),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(name, total=total, completed=start, note="")
            self.bar.start()

    def show(self, step: int, floats: dict[str, float], speed: _Speed) -> None:
        done = step + 1
        shown = [name for name in HEADLINE if name in floats][:2]
        note = [f"{name} {floats[name]:.4g}" for name in shown]
        if speed.tokens:
            note.append(f"{_thousands(speed.tokens_per_second)} tokens/s")
        if speed.seconds_per_step is not None and done < self.total:
            note.append(f"{_clock((self.total - done) * speed.seconds_per_step)} left")
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note="  ".join(note))
        elif done % self.stride == 0 or done == self.total:
            line = "  ".join([f"{self.name} {done}/{self.total}", _clock(speed.seconds), *note])
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def plain(value):
    """The same value in JSON's types: paths and numbers that JSON lacks become strings.

    Arrays of one element become numbers, tuples lists. Raises ValueError for anything else.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.size == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def json_line(value: dict) -> str:
    """`value` as one line of valid JSON: NaN and infinities as the strings "NaN", "Infinity"."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a file that readers see either in its old or in its new form, never half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict]:
    """The objects of metrics.jsonl or samples.jsonl; none where the file is absent.

    A last line without its end is what a killed process leaves: it is left out. Raises ValueError
    with file and line for any other line that is not an object with `stage` and `step`.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); remove the line") from error
        if not (isinstance(row, dict) and {"stage", "step"} <= row.keys()):
            raise ValueError(f"{path}:{number}: 'stage' or 'step' is missing; remove the line")
        parsed.append(row)
    return parsed


def _drop_lines(path: Path, drop: Callable[[dict], bool]) -> list[dict]:
    """Rewrite the file without some of its lines; returns those that stay."""
    kept = [line for line in read_lines(path) if not drop(line)]
    if path.exists():
        text = "".join(json_line(line) for line in kept)
        if text != path.read_text(encoding="utf-8"):
            write_atomically(path, text)
    return kept


def _shown(value: str | float | int) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
