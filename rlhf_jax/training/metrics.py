"""What a run writes while it trains: progress on the console, metrics.jsonl, TensorBoard, samples.

    log = Log(folder)
    with log.stage("ppo", total=config.num_iterations, start=resumed_at) as stage:
        for step in range(resumed_at, config.num_iterations):
            state, metrics = train_step(state, batch)
            stage.write(step, metrics, tokens=jnp.sum(batch.attend > 0))

Steps count from 0. Metrics stay on the device until they are converted to Python floats, and the
conversion waits for the device. So each `write` converts the metrics of the step before, which the
device has finished or is about to finish, and never waits for the step that was just started.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax import chips, storage
from rlhf_jax.storage import Path
from rlhf_jax.training import alarms
from rlhf_jax.training.alarms import Alarm
from rlhf_jax.training.progress import Progress
from rlhf_jax.training.speed import Speed

Check = Callable[[int, dict[str, float]], None]


class Display(NamedTuple):
    """How the console and the report show a stage. Each algorithm's module states its own.

    DISPLAY = Display("PPO", ("objective/scores",), {"objective/kl": "KL, nats per response"})
    """

    title: str  # the heading of the stage's section in the report
    headline: tuple[str, ...]  # the metrics printed beside the progress of the stage
    curves: dict[str, str]  # the metrics that the report does not fold away, with their headings


class Log:
    """The console and the files of one run; only process 0 prints and writes.

    With `folder=None` nothing is written and the metrics are kept in memory (`Stage.history`);
    with `quiet=True` nothing is printed. With `profile_steps=N` each stage writes a `jax.profiler`
    trace of the N steps after its first one, which compiles, to `folder/profile/<stage>`.
    `trained` says whether any step of any stage was written, and `running` is the name and length
    of the newest stage. A folder in a bucket gets no TensorBoard events.
    """

    def __init__(self, folder: Path | None = None, quiet: bool = False, profile_steps: int = 0):
        if profile_steps < 0 or (profile_steps and folder is None):
            raise ValueError(
                f"profile_steps={profile_steps} with folder={folder}; "
                "it must be at least 0, and a trace needs a folder"
            )
        self.folder = None if folder is None else storage.path(folder)
        self.profile_steps = profile_steps
        self.trained = False
        self.running: tuple[str, int] | None = None
        self.writes = jax.process_index() == 0 and folder is not None
        self.console = _console(quiet or jax.process_index() != 0)

    def stage(
        self,
        name: str,
        total: int,
        start: int = 0,
        check: Check | None = None,
        display: Display | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> Stage:
        """One stage of `total` steps, of which `start` are done; use it in a `with` statement.

        Steps of this stage from `start` on that an earlier process wrote are removed from
        metrics.jsonl, and TensorBoard is told to hide them, because they will be run again.
        `check(step, floats)` sees the converted metrics of every step and may raise. Without a
        `display` the console and the report show the metrics by their names. `devices` are those
        that the steps run on; they are what speed and memory are measured of.
        """
        return Stage(self, name, total, start, check, display, devices)

    def samples(self, stage: str, step: int, rows: list[dict[str, str | float | int]]) -> None:
        """Writes texts to samples.jsonl, in place of those that this stage and step had before.

        The report pairs rows of the same `prompt`: the first `completion` with the last one, or
        `before` and `after` of a single row. Numbers in a row are shown as its scores.
        """
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "samples.jsonl"
        _drop_lines(path, lambda line: (line["stage"], line["step"]) == (stage, step))
        with storage.Lines(path) as file:
            for row in rows:
                file.write(json_line({"stage": stage, "step": step, **row}))

    def alarm(self, stage: str, step: int, alarm: Alarm) -> None:
        """Prints what is wrong with a stage, and adds it to alarms.jsonl for the report."""
        line = {"stage": stage, "step": step, **alarm._asdict()}
        self._print_alarm(line)
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            with storage.Lines(self.folder / "alarms.jsonl") as file:
                file.write(json_line(line))

    def withdraw(self, stage: str, name: str) -> None:
        """Removes an alarm of a stage that an earlier process gave, from alarms.jsonl."""
        if self.writes:
            path = self.folder / "alarms.jsonl"
            _drop_lines(path, lambda line: (line["stage"], line["name"]) == (stage, name))

    def repeat_alarms(self) -> None:
        """Prints once more, for the end of a run, what is in alarms.jsonl."""
        for line in read_lines(self.folder / "alarms.jsonl") if self.writes else ():
            self._print_alarm(line)

    def _print_alarm(self, line: dict) -> None:
        self.print(
            f"ALARM  {line['stage']}, step {line['step'] + 1}: {line['name']}: {line['text']}"
        )

    def table(self, title: str, rows: list[dict[str, str | float | int]]) -> None:
        """Prints rows as a table, whose columns are the keys of the first row."""
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
        """Prints a line, above the progress bar if one is running. The text is not markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Stage:
    """One stage of a run, made by `Log.stage`; `history` holds the metrics of every step."""

    def __init__(
        self,
        log: Log,
        name: str,
        total: int,
        start: int,
        check: Check | None,
        display: Display | None,
        devices: Sequence[jax.Device],
    ):
        self.name = name
        self.history: list[dict[str, float]] = []
        self._log, self._total, self._start, self._check = log, total, start, check
        self._display, self._devices = display, devices
        self._pending: tuple | None = None
        self._lines: list[dict] = []  # of every step, those of an earlier process included
        self._alarms: set[str] = set()  # that have been given
        self._written = 0
        self._tracing = False

    def __enter__(self) -> Stage:
        log = self._log
        log.running = (self.name, self._total)
        self._file = self._board = None
        self._seconds_before = 0.0
        if log.writes:
            log.folder.mkdir(parents=True, exist_ok=True)
            self._seconds_before = self._remove_repeated_steps()
            _record_display(log.folder, self.name, self._display)
            self._file = storage.Lines(log.folder / "metrics.jsonl")
            if not storage.in_bucket(log.folder):
                # One folder per stage, because a purge hides the later steps of a whole folder.
                self._board = _summary_writer()(
                    str(log.folder / "tensorboard" / self.name),
                    purge_step=self._start,
                    flush_secs=10,
                )
        headline = None if self._display is None else self._display.headline
        self._progress = Progress(log.console, self.name, self._total, self._start, headline)
        peak = chips.peak_flops(self._devices) if self._devices else None  # may have to measure it
        self._speed = Speed(time.perf_counter(), self._devices, peak)
        return self

    def write(
        self,
        step: int,
        metrics: dict,
        tokens: int | jax.Array = 0,
        more: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Takes the scalars of one step and converts those of the step before.

        `metrics` are scalars, on the device or not. `tokens` counts the real tokens that the step
        processed, on all hosts together and without padding. Every step but the first is given the
        metrics of `Speed.add`: `tokens_per_second`, and from a metric called `model_flops` the
        `model_flops_utilisation` of the stage's devices. `alarms` is how many the stage has given
        (`training/alarms.py`), from the first one on. `more` is called when this step is
        converted (at the next write, or at `flush`) and returns further scalars: what is measured
        on the host, such as `more=lambda: observe(rollout)`, then does not keep the device waiting.

        Raises ValueError for a metric that is not a scalar, and whatever `more` raises, both when
        the step is converted.
        """
        self._log.trained = True
        previous, self._pending = self._pending, (step, metrics, tokens, more)
        if previous is not None:
            self._convert(*previous, check=self._check)
        self._written += 1
        self._trace(metrics)

    def flush(self) -> None:
        """Waits for the newest step and converts it now, for example before a checkpoint."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._convert(*pending, check=self._check)
        if self._file is not None:
            self._file.flush()

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.flush()
            elif self._pending is not None:
                # If the pending step is the one that failed, converting it raises once more. That
                # must not hide the error that is already being raised.
                with contextlib.suppress(Exception):
                    self._convert(*self._pending, check=None)
        finally:
            self._stop_trace()
            self._progress.close()
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()

    def _remove_repeated_steps(self) -> float:
        """Removes steps from `start` on from the files; returns the seconds of those before."""

        def is_repeated(line: dict) -> bool:
            return line["stage"] == self.name and line["step"] >= self._start

        kept = _drop_lines(self._log.folder / "metrics.jsonl", is_repeated)
        given = _drop_lines(self._log.folder / "alarms.jsonl", is_repeated)
        self._alarms = {line["name"] for line in given if line["stage"] == self.name}
        self._lines = [line for line in kept if line["stage"] == self.name]
        return max((line["seconds"] for line in self._lines), default=0.0)

    def _convert(self, step: int, metrics: dict, tokens, more, check: Check | None) -> None:
        values, tokens = jax.device_get((metrics, tokens))
        values = {name: values[name] for name in metrics}  # device_get sorts the names
        if more is not None:
            values |= more()
        floats = {name: self._scalar(name, value) for name, value in values.items()}
        flops = floats.get("model_flops", 0.0)
        floats |= self._speed.add(time.perf_counter(), float(tokens), flops)
        seconds = round(self._seconds_before + self._speed.seconds, 3)
        line = {"step": step, "seconds": seconds, **floats}
        found = self._new_alarms(line)
        if self._alarms:
            line["alarms"] = floats["alarms"] = float(len(self._alarms))
        self.history.append(line)
        if self._file is not None:
            self._file.write(json_line({"stage": self.name, **line}))
        if self._board is not None:
            for name, value in floats.items():
                # TensorBoard cannot draw NaN, and its writer prints a warning for each.
                if math.isfinite(value):
                    self._board.add_scalar(f"{self.name}/{name}", value, step)
        self._progress.show(step, floats, self._speed)
        if check is not None:
            check(step, floats)
        for alarm in found:
            self._log.alarm(self.name, step, alarm)

    def _new_alarms(self, line: dict) -> list[Alarm]:
        """The alarms that a step gives and none before it gave."""
        self._lines.append(line)
        found = [a for a in alarms.of_training(self._lines) if a.name not in self._alarms]
        self._alarms |= {alarm.name for alarm in found}
        return found

    def _scalar(self, name: str, value) -> float:
        array = np.asarray(value)
        if array.size != 1:
            raise ValueError(
                f"metric '{name}' of stage '{self.name}' has shape {array.shape}; write scalars"
            )
        return float(array.item())

    def _trace(self, metrics: dict) -> None:
        """Starts the trace after the first step of the stage and ends it after the last one."""
        steps = self._log.profile_steps
        if not (steps and self._log.writes) or self._written not in (1, 1 + steps):
            return
        # Without waiting, the trace would begin within the first step and miss the end of the last.
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


def _console(quiet: bool) -> Console:
    """A console that prints plain lines in a notebook, so that those of a cell form one block.

    By default rich prints an HTML block per line in a notebook. With that switched off, it takes
    the notebook for a terminal, because Jupyter sets FORCE_COLOR, and tries to redraw a bar.
    """
    in_notebook = Console().is_jupyter
    return Console(quiet=quiet, force_jupyter=False, force_terminal=False if in_notebook else None)


def _summary_writer() -> type:
    """tensorboardX's SummaryWriter, kept from importing torch where torch is installed."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # `import torch` raises ImportError, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


def _record_display(folder: Path, stage: str, display: Display | None) -> None:
    """Writes how a stage is shown to stages.json, in place of what an earlier process wrote."""
    before = read_displays(folder)
    after = {name: shown for name, shown in before.items() if name != stage}
    if display is not None:
        after[stage] = display
    if after != before:
        text = json.dumps({name: shown._asdict() for name, shown in after.items()}, indent=2)
        storage.write(folder / "stages.json", text + "\n")


def read_displays(folder: Path) -> dict[str, Display]:
    """How each stage of a run is shown, from its stages.json; none where the file is absent.

    Raises ValueError naming the file where it is not what `Log.stage` writes.
    """
    path = folder / "stages.json"
    if not path.exists():
        return {}
    stages = read_object(path, "remove the file")
    try:
        return {
            name: Display(shown["title"], tuple(shown["headline"]), dict(shown["curves"]))
            for name, shown in stages.items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: a stage lacks its title, headline or curves; remove it"
        ) from error


def plain(value):
    """The same value made of JSON's types. Raises ValueError for a value that has no such form.

    Tuples become lists and arrays of one element numbers. Paths become strings, and so do NaN and
    infinities, which JSON does not have.
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
    """`plain(value)` as one line of JSON, its line break included."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict]:
    """The objects of metrics.jsonl or samples.jsonl; none where the file is absent.

    A last line without a line break is left out, because a process was killed while writing it.
    Raises ValueError with file and line for any other line that is no object with `stage` and
    `step`.
    """
    if not path.exists():
        return []
    storage.check_file(path)
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


def read_object(path: Path, remedy: str) -> dict:
    """The JSON object in a file. Raises ValueError, ending in `remedy`, where it holds none."""
    storage.check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; {remedy}")
    return value


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one: {"ppo": {"kl_coef": 0.1}} becomes {"ppo.kl_coef": 0.1}."""
    merged = {}
    for name, value in tree.items():
        nested = isinstance(value, dict) and value
        merged |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return merged


def _drop_lines(path: Path, drop: Callable[[dict], bool]) -> list[dict]:
    """Rewrites a file without the lines for which `drop` is true; returns the other lines."""
    kept = [line for line in read_lines(path) if not drop(line)]
    if path.exists():
        text = "".join(json_line(line) for line in kept)
        if text != path.read_text(encoding="utf-8"):
            storage.write(path, text)
    return kept


def _shown(value: str | float | int) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
