"""A small run of two stages that kills itself at a moment: what `chaos.py` starts again and again.

    CHAOS=saving:2:0.01 python experiments/benchmarks/chaos_run.py --workdir runs/chaos

kills it (SIGKILL) 0.01 seconds after its second checkpoint was begun. Moments are stepping, saving,
restoring and compiling; without CHAOS it runs to its end. So it is an experiment like any other.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp

from rlhf_jax import config as configuration
from rlhf_jax import evaluation, pipeline
from rlhf_jax.algorithms import ppo, sft
from rlhf_jax.config import Whole
from rlhf_jax.data import batches, tokenizers
from rlhf_jax.launch import Context, launch
from rlhf_jax.models import transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import arithmetic
from rlhf_jax.training import metrics
from rlhf_jax.training.state import OptimizerConfig

MAX_PROMPT, MAX_RESPONSE = 84, 24
TOKENIZER = tokenizers.byte_tokenizer()
ADAM = OptimizerConfig(learning_rate=1e-3)


class Config(configuration.Config):
    """Two stages."""

    seed: Whole = 0
    model: transformer.Config
    sft: sft.Config
    ppo: ppo.Config


config = Config(
    model=transformer.Config(
        vocab_size=264, num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, max_length=128
    ),
    sft=sft.Config(num_steps=12, batch_size=8, save_every=3, optimizer=ADAM),
    ppo=ppo.Config(
        num_iterations=8,
        batch_size=8,
        sampling=Sampling(max_new_tokens=MAX_RESPONSE),
        num_epochs=1,
        policy_optimizer=ADAM,
        critic_optimizer=ADAM,
        save_every=2,
        normalise_scores=True,
    ),
)


def run(config: Config, context: Context) -> dict:
    """Imitates sums in words, then PPO on the length of the answer; returns the figures."""
    seed = config.seed
    rows, held_out = (arithmetic.demonstrations(seed, 64, (1,), held_out=x) for x in (False, True))
    examples = pipeline.Split(
        *(batches.demonstrations(x, TOKENIZER, MAX_PROMPT, MAX_RESPONSE) for x in (rows, held_out))
    )
    asked = pipeline.Split(*(batches.prompts(x, TOKENIZER, MAX_PROMPT) for x in (rows, held_out)))
    task = pipeline.Task(TOKENIZER, asked)
    policy = pipeline.new_model(config.model, context, seed)
    policy, found = pipeline.supervised(
        sft.run, sft.evaluate, config.sft, context, TOKENIZER, policy, examples,
        stage="sft", seed=seed,
    )  # fmt: skip
    trained = pipeline.online(
        ppo.run, config.ppo, context, task, policy, None, stage="ppo", seed=seed, reward=brevity
    ).policy
    exam = pipeline.exam(
        context, task, policy, None, config.ppo.sampling, 8, seed=seed, reward=brevity
    )
    return {"sft": found, "ppo": evaluation.figures(evaluation.evaluate(exam, trained))}


def brevity(prompts: list, responses: list, rows: list) -> list[float]:
    """Minus the length of each response."""
    return [-float(len(response)) for response in responses]


def kill_after(seconds: float) -> None:
    """Ends this process by SIGKILL, as a machine that goes down does."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    kill() if seconds == 0 else threading.Timer(seconds, kill).start()


def counting(fn: Callable, number: int, seconds: float) -> Callable:
    """The function, whose call of this number (from 1) leads to the end."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            kill_after(seconds)
        return fn(*args, **kwargs)

    return wrapped


def prepare(moment: str, number: int, seconds: float) -> None:
    """Sees to it that the process is killed `seconds` after the moment has come so many times."""
    if moment == "stepping":
        metrics.Stage.write = counting(metrics.Stage.write, number, seconds)
    elif moment == "saving":
        manager = ocp.CheckpointManager
        manager.save = counting(manager.save, number, seconds)
    elif moment == "restoring":
        manager = ocp.CheckpointManager
        manager.restore = counting(manager.restore, number, seconds)
    elif moment == "compiling":
        # Told when a program has been lowered, after which it is compiled.
        count = counting(lambda: None, number, seconds)

        def listen(event: str, *_, **__) -> None:
            if event.endswith("jaxpr_to_mlir_module_duration"):
                count()

        jax.monitoring.register_event_duration_secs_listener(listen)
    else:
        raise ValueError(f"CHAOS={moment!r} is none of stepping, saving, restoring, compiling")


if __name__ == "__main__":
    if os.environ.get("CHAOS"):
        moment, number, seconds = os.environ["CHAOS"].split(":")
        prepare(moment, int(number), float(seconds))
    launch(run, config)
