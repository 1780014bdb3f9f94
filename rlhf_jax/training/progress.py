"""The progress of a stage on the console: a bar on a terminal, elsewhere up to twenty lines."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rlhf_jax.training.speed import Speed

LINES_PER_STAGE = 20  # at most, where the output is no terminal but a log file or a notebook


class Progress:
    """Shows the number of steps done, the headline metrics, the speed and the time that is left.

    `headline` names the metrics; None shows the first two that a step reports.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        total: int,
        start: int,
        headline: tuple[str, ...] | None,
    ):
        self.console, self.name, self.total, self.headline = console, name, total, headline
        self.stride = max(1, math.ceil((total - start) / LINES_PER_STAGE))
        self.bar = None
        if console.is_terminal and not console.quiet:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=14),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task(name, total=total, completed=start, note="")
            self.bar.start()

    def show(self, step: int, floats: dict[str, float], speed: Speed) -> None:
        """Shows that a step is complete, with its metrics."""
        done = step + 1
        headline = list(floats)[:2] if self.headline is None else self.headline
        note = [f"{name} {floats[name]:.4g}" for name in headline if name in floats]
        if speed.tokens:
            note.append(f"{_thousands(speed.tokens_per_second)} tokens/s")
        if speed.utilisation is not None:
            note.append(f"{speed.utilisation:.0%} of peak FLOP/s")
        if speed.seconds_per_step is not None and done < self.total:
            note.append(f"{_clock((self.total - done) * speed.seconds_per_step)} left")
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note="  ".join(note))
        elif done % self.stride == 0 or done == self.total:
            line = "  ".join([f"{self.name} {done}/{self.total}", _clock(speed.seconds), *note])
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self.bar is not None:
            self.bar.stop()


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
