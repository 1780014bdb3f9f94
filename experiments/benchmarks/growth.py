"""Measures how the cost of a step grows: its seconds with rows and length, its memory with the ids.

    python experiments/benchmarks/growth.py --json growth.jsonl --plot docs/cost_growth.png

The seconds are measured on one device. The memory is what the compiler reserves for temporaries.
The embedding and the head have a row for each token id, so that gradients must grow with the
vocabulary; one gradient of every trained parameter is therefore left out. Activations need not
grow, which is seen from the memory that as many rows again add. An exponent is the slope of a
straight line through the logarithms: 1 is linear, 0 is flat.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
import workloads
from rich.console import Console
from rich.table import Table

from rlhf_jax import chips, sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(workloads.Workload):
    """Which tasks and which sizes; `prompt` and `response` are those of the runs over rows."""

    batch: int = 8  # rows where the length or the vocabulary varies
    tasks: tuple[str, ...] = ("sft", "reward_model", "sampling", "ppo")
    rows: tuple[int, ...] = (8, 16, 32, 64)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # tokens; half prompt, half response
    vocabularies: tuple[int, ...] = (2048, 8192, 32768, 131072)  # token ids
    steps: int = 3  # timed repetitions, of which the median is reported
    json: Path | None = None
    plot: Path | None = None  # a .png file


class Panel(NamedTuple):
    """One thing that varies, and what it is measured to cost."""

    name: str
    varies: str
    cost: str


ROWS = Panel("rows", "rows", "seconds")
LENGTH = Panel("length", "tokens per row", "seconds")
VOCABULARY = Panel("vocabulary", "token ids", "megabytes of temporaries without gradients")
ACTIVATIONS = Panel("activations", "token ids", "megabytes that as many rows again add")
PANELS = (ROWS, LENGTH, VOCABULARY, ACTIVATIONS)


class Point(NamedTuple):
    """What one step costs at one size."""

    panel: str
    task: str
    size: int
    cost: float


def seconds(config: workloads.Workload, task: str, steps: int) -> float:
    """The median time of a step."""
    mesh = sharding.make_mesh(data=1, fsdp=1)
    with jax.set_mesh(mesh):
        made = workloads.make(config, task, mesh)
        return statistics.median(chips.timed(made.step, made.state, steps)[0])


def megabytes(config: workloads.Workload, task: str) -> float:
    """Temporaries of a step without the gradients, as compiled and not run."""
    mesh = sharding.make_mesh(data=1, fsdp=1)
    with jax.set_mesh(mesh):
        made = workloads.make(config, task, mesh)
        gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.trained))
        return (workloads.compile_programs(made).temporaries - gradients) / 1e6


def run(config: Config) -> Iterator[Point]:
    """Measures every task at every size."""
    base = workloads.Workload(
        **{field.name: vars(config)[field.name] for field in dataclasses.fields(workloads.Workload)}
    )
    for task in config.tasks:
        for size in config.rows:
            sized = dataclasses.replace(base, batch=size)
            yield Point(ROWS.name, task, size, seconds(sized, task, config.steps))
        for size in config.lengths:
            sized = dataclasses.replace(base, prompt=size // 2, response=size - size // 2)
            yield Point(LENGTH.name, task, size, seconds(sized, task, config.steps))
        for size in config.vocabularies:
            model = dataclasses.replace(base.model, vocab_size=size)
            sized = dataclasses.replace(base, model=model)
            held = megabytes(sized, task)
            yield Point(VOCABULARY.name, task, size, held)
            twice = megabytes(dataclasses.replace(sized, batch=2 * base.batch), task)
            yield Point(ACTIVATIONS.name, task, size, twice - held)


def exponent(points: list[Point]) -> float:
    """p of cost = c * size^p by least squares on the logarithms; NaN for fewer than two points.

    A cost of 0, as of activations where the peak of memory lies elsewhere, has no logarithm and
    does not count.
    """
    points = [x for x in points if x.cost > 0]
    if len(points) < 2:
        return float("nan")
    sizes, costs = np.log([x.size for x in points]), np.log([x.cost for x in points])
    return float(np.polyfit(sizes, costs, 1)[0])


def curves(points: list[Point], panel: Panel) -> dict[str, list[Point]]:
    """The points of one panel by task."""
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.panel == panel.name:
            found.setdefault(point.task, []).append(point)
    return found


def show(points: list[Point], console: Console) -> None:
    """Prints a table for each panel: the costs, the exponent of all sizes and of the last two."""
    for panel in PANELS:
        tasks = curves(points, panel)
        if not tasks:
            continue
        table = Table(title=f"{panel.cost} by {panel.varies}", title_justify="left")
        table.add_column("task")
        for point in next(iter(tasks.values())):
            table.add_column(f"{point.size:,}", justify="right")
        for head in ("exponent", "of the last two"):
            table.add_column(head, justify="right")
        for task, line in tasks.items():
            slopes = (f"{exponent(part):.2f}" for part in (line, line[-2:]))
            table.add_row(task, *(f"{x.cost:.3g}" for x in line), *slopes)
        console.print(table)


def plot(points: list[Point], path: Path) -> None:
    """Draws the panels beside each other, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, which needs no display
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    drawing, axes = plt.subplots(2, 2, figsize=(9, 8), layout="constrained")
    for axis, panel in zip(axes.flat, PANELS):
        sizes = sorted({x.size for x in points if x.panel == panel.name})
        for task, line in curves(points, panel).items():
            label = f"{task.replace('_', ' ')}: exponent {exponent(line):.2f}"
            costs = [x.cost if x.cost > 0 else np.nan for x in line]
            axis.plot([x.size for x in line], costs, marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel=panel.varies)
        axis.set_title(panel.cost, fontsize=10)
        axis.set_xticks(sizes, [f"{x:,}" for x in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def main(config: Config) -> None:
    """Prints the tables; writes the points to `config.json` and the figure to `config.plot`."""
    console, points = Console(), []
    for point in run(config):
        points.append(point)
        console.print(f"{point.task}, {point.size:,} {point.panel}: {point.cost:.3g}")
    show(points, console)
    if config.json:
        config.json.write_text("".join(json.dumps(x._asdict()) + "\n" for x in points))
    if config.plot:
        plot(points, config.plot)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
