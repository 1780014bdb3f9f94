"""Draws the curves of one or several runs on one figure: gold score and KL by iteration.

    rlhf-jax-plot docs/quickstart.png runs/seed0 runs/seed1 runs/seed2
    rlhf-jax-plot figure.png runs/seed0 runs/seed1 runs/seed2 --stages trl verl

The first path is the figure to write, the others are the folders of runs. Every run is one line,
named after its folder, so that the spread over seeds can be seen.

With --stages, which names stages that every run has, each stage is one line: the mean over the
runs. A band around it goes from the lowest run to the highest.
"""

from __future__ import annotations

import io
import statistics
from typing import Annotated, NamedTuple

import tyro

from rlhf_jax import storage
from rlhf_jax.launch import command
from rlhf_jax.training.metrics import read_lines

PANELS = {"objective/gold": "gold score", "objective/kl": "KL to the reference, nats per response"}


class Curve(NamedTuple):
    """A line of the figure."""

    name: str  # in the legend
    runs: list[list[dict]]  # what `read` returned of each run


def plot(
    figure: Annotated[str, tyro.conf.Positional],
    runs: Annotated[tuple[str, ...], tyro.conf.Positional],
    stages: tuple[str, ...] = (),
) -> None:
    """Writes the figure.

    Args:
        figure: the image to write, a .png file
        runs: folders of runs, each with a metrics.jsonl
        stages: names of stages, each of which becomes one line; by default each run is one
    """
    file, folders = storage.path(figure), [storage.path(run) for run in runs]
    if file.suffix != ".png":
        raise ValueError(f"{figure}: the figure is a PNG image; give it a name that ends in .png")
    if not runs:
        raise ValueError("no run is named; give at least one folder of a run after the figure")
    if stages:
        curves = [Curve(stage, [read(folder, stage) for folder in folders]) for stage in stages]
    else:
        curves = [Curve(folder.name, [read(folder)]) for folder in folders]
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.write(file, draw(curves))


def read(run: storage.Path, stage: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl that hold both curves, one per iteration.

    With `stage` only those of this stage. Raises ValueError where there is no such line: only a
    synthetic task has a gold score. Raises it too where lines of several stages would be one curve.
    """
    lines = [x for x in read_lines(run / "metrics.jsonl") if PANELS.keys() <= x.keys()]
    found = list(dict.fromkeys(x["stage"] for x in lines))
    if not lines:
        raise ValueError(
            f"{run}: its metrics.jsonl holds no line with {' and '.join(PANELS)}; name the folder "
            "of a run that trained a policy on a task with a gold score"
        )
    if stage is None and len(found) > 1:
        raise ValueError(
            f"{run}: its stages {', '.join(found)} would be one line; name some by --stages"
        )
    if stage is not None and stage not in found:
        raise ValueError(f"{run}: no stage {stage!r} has both curves, but {', '.join(found)}")
    return [x for x in lines if stage in (None, x["stage"])]


def draw(curves: list[Curve]) -> bytes:
    """A PNG image with a line for each curve: the mean over its runs, in a band of all of them.

    The band goes from the lowest run to the highest. Raises ValueError where the runs of one curve
    do not have the same steps.
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

    drawing, axes = plt.subplots(1, len(PANELS), figsize=(8, 2.8), layout="constrained")
    for name, runs in curves:
        steps = [x["step"] for x in runs[0]]
        for axis, metric in zip(axes, PANELS):
            each_step = [[x[metric] for x in step] for step in zip(*runs)]
            (line,) = axis.plot(steps, list(map(statistics.fmean, each_step)), label=name)
            if len(runs) > 1:
                low, high = list(map(min, each_step)), list(map(max, each_step))
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, title in zip(axes, PANELS.values()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    image = io.BytesIO()
    drawing.savefig(image, format="png", dpi=110)
    plt.close(drawing)
    return image.getvalue()


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-plot`; `argv` defaults to the process's arguments."""
    command(plot, argv, description=__doc__)


if __name__ == "__main__":
    main()
