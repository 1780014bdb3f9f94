"""Does a long run keep its memory and its open files? Thousands of PPO iterations at toy size.

    python experiments/benchmarks/soak.py --iterations 2000 --figure soak.png

Everything that a run has is on: a reward in Python, logs, TensorBoard, samples of held-out answers,
a checkpoint every 50 iterations. Resident memory and open files of the process are read in every
iteration. It fails if either has grown by more than a twentieth from one quarter of the run to the
last, the first quarter left out, in which programs are compiled and buffers find their size.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile

import chaos_run
import numpy as np

from rlhf_jax import pipeline, storage
from rlhf_jax.algorithms import ppo
from rlhf_jax.data import batches
from rlhf_jax.launch import command, launch
from rlhf_jax.tasks import arithmetic
from rlhf_jax.training import figure

PANELS = {"resident": "resident memory, MiB", "files": "open files"}


def read() -> dict[str, float]:
    """Resident memory in MiB and the number of open files of this process (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {"resident": resident, "files": len(os.listdir("/proc/self/fd"))}


def measure(iterations: int, workdir: str) -> list[dict[str, float]]:
    """The readings of every iteration of a run."""
    readings: list[dict[str, float]] = []

    def watched(prompts: list, responses: list, rows: list) -> list[float]:
        readings.append({"step": len(readings), **read()})
        return chaos_run.brevity(prompts, responses, rows)

    def run(config: chaos_run.Config, context) -> dict:
        rows = arithmetic.prompts(config.seed, 64, (1,))
        asked = batches.prompts(rows, chaos_run.TOKENIZER, chaos_run.MAX_PROMPT)
        task = pipeline.Task(chaos_run.TOKENIZER, pipeline.Split(asked, asked))
        policy = pipeline.new_model(config.model, context, config.seed)
        pipeline.online(
            ppo.run, config.ppo, context, task, policy, None,
            stage="ppo", seed=config.seed, reward=watched,
        )  # fmt: skip
        return {}

    config = chaos_run.config
    long = dataclasses.replace(config.ppo, num_iterations=iterations, save_every=50)
    launch(run, dataclasses.replace(config, ppo=long), ["--workdir", workdir])
    return readings


def main(iterations: int = 2000, figure_file: str = "") -> None:
    """Runs, prints the means of each quarter, and exits with 1 where memory or files grow.

    iterations: of PPO. figure_file: a PNG image to draw the readings to.
    """
    with tempfile.TemporaryDirectory() as folder:
        readings = measure(iterations, os.path.join(folder, "run"))
    quarters = np.array_split(np.arange(len(readings)), 4)
    grown = []
    for name, title in PANELS.items():
        values = np.array([reading[name] for reading in readings])
        means = [float(values[quarter].mean()) for quarter in quarters]
        print(f"{title}: {', '.join(f'{mean:.1f}' for mean in means)} (means of the quarters)")
        if means[3] > 1.05 * means[1]:
            grown.append(title)
    if figure_file:
        curve = figure.Curve("2 cores", [readings])
        storage.write(storage.path(figure_file), figure.draw([curve], PANELS))
    if grown:
        raise ValueError(f"{' and '.join(grown)} grew by more than a twentieth")


if __name__ == "__main__":
    command(main, description=__doc__)
