"""What the experiments on real preference data share: settings, a model to start from, figures.

A reward model should start from a language model. Where no pretrained one is named by `start`, a
model of a few million parameters first learns to write the preferred answers, and the reward model
is trained from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from rlhf_jax import abstract, evaluation, folders, pipeline
from rlhf_jax import config as configuration
from rlhf_jax.abstract import Program
from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.config import Count, Share, Whole
from rlhf_jax.data import batches, tokenizers
from rlhf_jax.data.batches import Examples, Loader
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.launch import Context
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.training.state import OptimizerConfig

# A model of three million parameters, for the tokenizer of 6,400 entries in the real data.
SMALL = transformer.Config(
    vocab_size=6400,
    num_layers=4,
    d_model=192,
    num_heads=6,
    num_kv_heads=6,
    head_dim=32,
    d_ff=512,
    max_length=512,
    tied=True,
)


class Config(configuration.Config):
    """Which model a reward model on real data starts from, and how both are trained."""

    seed: Whole = 0
    # The language model to start from: a folder, or org/name on the hub. With "" it is `model`,
    # randomly initialised and tuned by `sft` first.
    start: configuration.Source = ""
    max_prompt: Count = 192  # tokens; what is longer is dropped and counted
    max_response: Count = 128  # tokens, EOS included
    held_out: Share = 0.2  # share of the prompts that nothing is trained on
    model: transformer.Config = SMALL
    sft: sft.Config = sft.Config(
        num_steps=150,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, schedule="cosine"),
    )
    reward_model: reward_model.Config = reward_model.Config(
        num_steps=150,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10, schedule="cosine"),
    )


def open_tokenizer(start: str, context: Context) -> tokenizers.Tokenizer:
    """The tokenizer of the model named `start`, or the small one of the real data if none is named.

    Raises ValueError where the folder of real data is not named.
    """
    if context.data is None:
        raise ValueError("this experiment reads real data: name its folder by --data DIR")
    if start:
        return tokenizers.from_folder(huggingface.fetch(start))
    return tokenizers.from_folder(context.data / "tokenizers" / "minimind")


def check(config: Config, context: Context) -> None:
    """Raises ValueError for sizes that cannot work in a later stage."""
    shape = planned_shape(config.start, config.model, context)
    stages = {"sft": config.sft, "reward_model": config.reward_model}
    pipeline.check(context, shape, config.max_prompt + config.max_response, **stages)


def starting_model(config: Config, context: Context, tokenizer, rows: list, held_out: list):
    """The language model that reward models start from, and its figures.

    With `config.start` it is that model as it is, without figures; otherwise a new model that is
    tuned on `rows`, with its loss on `held_out`.
    """
    if config.start:
        return folders.language_model(config.start, tokenizer, context.mesh, context.compute), {}
    sizes = (tokenizer, config.max_prompt, config.max_response)
    answers = pipeline.Split(
        *(batches.demonstrations(part, *sizes, on_bad_row="drop") for part in (rows, held_out))
    )
    initial = pipeline.new_model(config.model, context, config.seed)
    return pipeline.supervised(
        sft.run,
        sft.evaluate,
        config.sft,
        context,
        tokenizer,
        initial,
        answers,
        stage="sft",
        seed=config.seed,
    )


def train_scorer(
    config: Config,
    context: Context,
    tokenizer: Tokenizer,
    policy: Model,
    data: pipeline.Split,
    *,
    loss_fn: Callable = reward_model.loss,
    stage: str = "reward_model",
) -> tuple[Model, dict]:
    """Trains a reward model that starts from `policy`. Returns it with its held-out figures."""
    return pipeline.supervised(
        reward_model.run,
        reward_model.evaluate,
        config.reward_model,
        context,
        tokenizer,
        policy,
        data,
        stage=stage,
        seed=config.seed,
        loss_fn=loss_fn,
    )


def planned_shape(start: str, model: transformer.Config, context: Context) -> transformer.Config:
    """The shape of the model that training starts from; of a named one the config.json is read."""
    return context.compute.of(huggingface.shape(huggingface.fetch(start)) if start else model)


def programs(
    config: Config,
    context: Context,
    losses: Mapping[str, Callable] = MappingProxyType({"reward_model": reward_model.loss}),
) -> list[Program]:
    """What `starting_model`, then `train_scorer` by each loss, run on pairs: see `abstract`.

    `measure` runs the program of their evaluation.
    """
    length, mesh = config.max_prompt + config.max_response, context.mesh
    policy = abstract.model(planned_shape(config.start, config.model, context), mesh)
    listed = []
    if not config.start:
        tuned = sft.programs(config.sft, policy, length, mesh)
        policy, listed = tuned.result, tuned.programs
    for name, loss_fn in losses.items():
        stage = reward_model.programs(
            config.reward_model, policy, length, mesh, loss_fn=loss_fn, name=name
        )
        listed = [*listed, *(x for x in stage.programs if x.name != f"{name}: centre")]
    return listed


def measure(config: Config, context: Context, scorer: Model, examples: Examples) -> dict:
    """Measures the reward model on other examples. Returns figures named as in a summary."""
    loader = Loader(examples, config.reward_model.batch_size, config.seed)
    figures = reward_model.evaluate(config.reward_model, scorer, loader, mesh=context.mesh)
    return evaluation.held_out(figures)
