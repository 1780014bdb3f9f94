"""Draws the curves of one or several runs on one figure: gold score and KL by iteration.

    rlhf-jax-plot docs/quickstart.png runs/seed0 runs/seed1 runs/seed2

The first path is the figure to write, the others are the folders of runs. Every run is one line,
named after its folder, so that the spread over seeds can be seen.
"""

from __future__ import annotations

import pathlib
from typing import Annotated

import tyro

from rlhf_jax.launch import command
from rlhf_jax.training.metrics import read_lines

PANELS = {"objective/gold": "gold score", "objective/kl": "KL to the reference, nats per response"}


def plot(
    figure: Annotated[pathlib.Path, tyro.conf.Positional],
    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional],
) -> None:
    """Writes the figure.

    Args:
        figure: the image to write, a .png file
        runs: folders of runs, each with a metrics.jsonl
    """
    if figure.suffix != ".png":
        raise ValueError(f"{figure}: the figure is a PNG image; give it a name that ends in .png")
    if not runs:
        raise ValueError("no run is named; give at least one folder of a run after the figure")
    curves = {run: read(run) for run in runs}
    import matplotlib

    matplotlib.use("Agg")  # draws into files, which needs no display
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(1, len(PANELS), figsize=(8, 2.8), layout="constrained")
    for run, lines in curves.items():
        for axis, name in zip(axes, PANELS):
            axis.plot([x["step"] for x in lines], [x[name] for x in lines], label=run.name)
    for axis, title in zip(axes, PANELS.values()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure, dpi=110)
    plt.close(drawing)


def read(run: pathlib.Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that hold both curves, one per iteration.

    Raises ValueError where there is no such line: only a synthetic task has a gold score.
    """
    lines = [x for x in read_lines(run / "metrics.jsonl") if PANELS.keys() <= x.keys()]
    if not lines:
        raise ValueError(
            f"{run}: its metrics.jsonl holds no line with {' and '.join(PANELS)}; name the folder "
            "of a run that trained a policy on a task with a gold score"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-plot`; `argv` defaults to the process's arguments."""
    command(plot, argv, description=__doc__)


if __name__ == "__main__":
    main()
