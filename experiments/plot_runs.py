"""Draws the PPO curves of several workdirs on one figure: gold score and KL by iteration.

python experiments/plot_runs.py docs/quickstart.png runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import pathlib
import sys

from rlhf_jax.training.metrics import read_lines

PANELS = {"objective/gold": "gold score", "objective/kl": "KL to the reference, nats a response"}


def draw(target: pathlib.Path, workdirs: list[pathlib.Path]) -> None:
    """Writes the figure as PNG; each workdir holds a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(8, 2.8), layout="constrained")
    for workdir in workdirs:
        lines = [x for x in read_lines(workdir / "metrics.jsonl") if x["stage"] == "ppo"]
        for axis, name in zip(axes, PANELS):
            axis.plot([x["step"] for x in lines], [x[name] for x in lines], label=workdir.name)
    for axis, title in zip(axes, PANELS.values()):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("PPO iteration")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]), [pathlib.Path(name) for name in sys.argv[2:]])
