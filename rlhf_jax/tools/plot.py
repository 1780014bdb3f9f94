"""Draws the curves of one or several runs on one figure: by default gold score and KL by iteration.

    rlhf-jax-plot docs/quickstart.png runs/seed0 runs/seed1 runs/seed2
    rlhf-jax-plot figure.png runs/seed0 runs/seed1 runs/seed2 --stages trl verl

The first path is the figure to write, the others are the folders of runs. Every run is one line,
named after its folder, so that the spread over seeds can be seen.

With --stages, which names stages that every run has, each stage is one line: the mean over the
runs. A band around it goes from the lowest run to the highest.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from rlhf_jax import storage
from rlhf_jax.launch import command
from rlhf_jax.training.figure import GOLD, Curve, draw, read


def plot(
    figure: Annotated[str, tyro.conf.Positional],
    runs: Annotated[tuple[str, ...], tyro.conf.Positional],
    stages: tuple[str, ...] = (),
    metrics: tuple[str, ...] = tuple(GOLD),
) -> None:
    """Writes the figure.

    Args:
        figure: the image to write, a .png file
        runs: folders of runs, each with a metrics.jsonl
        stages: names of stages, each of which becomes one line; by default each run is one
        metrics: what is drawn, each in a panel of its own
    """
    panels = {name: GOLD.get(name, name) for name in metrics}
    file, folders = storage.path(figure), [storage.path(run) for run in runs]
    if file.suffix != ".png":
        raise ValueError(f"{figure}: the figure is a PNG image; give it a name that ends in .png")
    if not metrics:
        raise ValueError("--metrics names none; leave it out for the gold score and the KL")
    if not runs:
        raise ValueError("no run is named; give at least one folder of a run after the figure")
    if file.parent.exists():
        storage.check_output("figure", file)
    if stages:
        curves = [
            Curve(stage, [read(folder, panels, stage) for folder in folders]) for stage in stages
        ]
    else:
        curves = [Curve(folder.name, [read(folder, panels)]) for folder in folders]
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.write(file, draw(curves, panels))


def main(argv: list[str] | None = None) -> None:
    """The console command `rlhf-jax-plot`; `argv` defaults to the process's arguments."""
    command(plot, argv, description=__doc__)


if __name__ == "__main__":
    main()
