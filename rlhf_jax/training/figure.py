"""Curves of several runs on one figure, as a PNG image."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.storage import Path
from rlhf_jax.training.metrics import read_displays, read_lines

GOLD = {"objective/gold": "gold score", "objective/kl": "KL to the reference, nats per response"}
MOST_PANELS = 3


class Curve(NamedTuple):
    """A line of the figure."""

    name: str  # in the legend
    runs: list[list[dict]]  # what `read` returned of each run


def read(run: Path, panels: dict[str, str], stage: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl that hold all of these metrics, one per step.

    With `stage` only those of this stage. Raises ValueError where there is no such line. Raises it
    too where lines of several stages would be one curve.
    """
    if not (run / "metrics.jsonl").exists():
        raise ValueError(f"{run}: no run; name the folder of one, with its metrics.jsonl")
    lines = [x for x in read_lines(run / "metrics.jsonl") if panels.keys() <= x.keys()]
    lines = [x | {name: _number(run, x, name) for name in panels} for x in lines]
    found = list(dict.fromkeys(x["stage"] for x in lines))
    if not lines:
        why = (
            "name the folder of a run that trained a policy on a task with a gold score"
            if panels == GOLD
            else "name others by --metrics"
        )
        raise ValueError(
            f"{run}: its metrics.jsonl holds no line with {' and '.join(panels)}; {why}"
        )
    if stage is None and len(found) > 1:
        raise ValueError(
            f"{run}: its stages {', '.join(found)} would be one line; name some by --stages"
        )
    if stage is not None and stage not in found:
        names = ", ".join(found)
        what = "both curves" if len(panels) == 2 else " and ".join(panels)
        raise ValueError(f"{run}: no stage {stage!r} has {what}, but {names}")
    return [x for x in lines if stage in (None, x["stage"])]


def _number(run: Path, line: dict, name: str) -> float:
    """A metric of a line, where NaN and infinities are texts (`metrics.plain`)."""
    value = line[name]
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{run}: {name!r} of {line['stage']}, step {line['step']} is {value!r:.40}, and no "
            "number that could be drawn; name others by --metrics"
        )
    return value


def draw(curves: Sequence[Curve], panels: dict[str, str]) -> bytes:
    """A panel for each metric, and a line for each curve: the mean over its runs, in a band of all.

    `panels` gives each metric its title. The band goes from the lowest run to the highest. Raises
    ValueError where the runs of one curve do not have the same steps.
    """
    for name, runs in curves:
        if len({tuple(x["step"] for x in run) for run in runs}) > 1:
            counts = ", ".join(str(len(run)) for run in runs)
            raise ValueError(
                f"the runs have {counts} iterations of {name}; a mean needs as many of each run"
            )
    import matplotlib

    matplotlib.use("Agg")  # draws into files, which needs no display
    import matplotlib.pyplot as plt

    size = (4 * len(panels), 2.8)
    drawing, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    axes = axes[0]
    for name, runs in curves:
        steps = [x["step"] for x in runs[0]]
        for axis, metric in zip(axes, panels):
            each_step = [[x[metric] for x in step] for step in zip(*runs)]
            (line,) = axis.plot(steps, list(map(statistics.fmean, each_step)), label=name)
            if len(runs) > 1:
                low, high = list(map(min, each_step)), list(map(max, each_step))
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, title in zip(axes, panels.values()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    image = io.BytesIO()
    drawing.savefig(image, format="png", dpi=110)
    plt.close(drawing)
    return image.getvalue()


def of_last_stage(runs: Sequence[Path]) -> tuple[str, dict[str, str]] | None:
    """The last stage of the runs, and its metrics to draw: those that its `Display` puts first.

    Only metrics that every step of every run has. None where there is no such stage or metric.
    """
    if not runs:
        return None
    every = [read_lines(run / "metrics.jsonl") for run in runs]
    stages = [line["stage"] for line in every[0]]
    displays = read_displays(runs[0])
    if not stages or stages[-1] not in displays:
        return None
    stage = stages[-1]
    lines = [line for run in every for line in run if line["stage"] == stage]
    present = set.intersection(*(set(line) for line in lines))
    headings = {name: name for name in displays[stage].headline} | displays[stage].curves
    panels = {name: title for name, title in headings.items() if name in present}
    return (stage, dict(list(panels.items())[:MOST_PANELS])) if panels else None
