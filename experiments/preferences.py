"""What the experiments on real data share: models in and out, a small one to start from, figures.

A reward model should start from a language model. Where none is given by `start`, one of a few
million parameters first learns to write the preferred answers, and is then made a scorer.
"""

from __future__ import annotations

import pathlib
import shutil

from rlhf_jax import config as configuration
from rlhf_jax import pipeline
from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.data import batches, tokenizers
from rlhf_jax.data.batches import Examples, Loader
from rlhf_jax.launch import Context
from rlhf_jax.models import huggingface, lora, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import agreement
from rlhf_jax.training.state import OptimizerConfig

# Three million parameters, for the tokenizer of 6,400 entries.
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
    """What reward models from preference data start from, and how they are trained."""

    seed: int = 0
    # A language model (folder or org/name); "": `model` from noise, which `sft` tunes first.
    start: configuration.Source = ""
    max_prompt: int = 192  # tokens; what is longer is dropped and counted
    max_response: int = 128  # tokens, EOS included
    held_out: float = 0.2  # share of the prompts
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
    """The starting model's tokenizer, or the one of 6,400 entries in the folder of real data."""
    if context.data is None:
        raise ValueError("this experiment reads real data: name its folder by --data DIR")
    if start:
        return tokenizers.from_folder(huggingface.fetch(start))
    return tokenizers.from_folder(context.data / "tokenizers" / "minimind")


def language_model(name: str, tokenizer: tokenizers.Tokenizer, context: Context) -> Model:
    """The model of a folder or of the hub; ValueError if it cannot read what the tokenizer says."""
    model = huggingface.load(huggingface.fetch(name), context.mesh)
    if "score" in model.weights:
        raise ValueError(f"{name}: a reward model, where a language model is needed")
    tokenizers.check_vocab(tokenizer, model.config.vocab_size)
    return model


def export(folder: pathlib.Path, model: Model, tokenizer, like: str | pathlib.Path | None) -> None:
    """Writes model and tokenizer as a Hugging Face folder, whole or not at all.

    An adapter is merged, a model with a scalar head written as a reward model. Replaces what is
    there.
    """
    writing = folder.with_name(f".{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    head = "score" if "score" in model.weights else "lm"
    model = lora.merge(model)
    if head == "score":
        model = transformer.without_score_bias(model)
    ids = {"eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id}
    huggingface.save(writing, model, like=like, head=head, fields=ids)
    tokenizer.save(writing)
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)


def starting_model(config: Config, context: Context, tokenizer, rows: list, held_out: list):
    """(language model, {"eval_loss"}): that of `start` as it is, or a new one tuned on `rows`."""
    if config.start:
        return language_model(config.start, tokenizer, context), {}
    sizes = (tokenizer, config.max_prompt, config.max_response)
    answers = [batches.demonstrations(part, *sizes, on_bad_row="drop") for part in (rows, held_out)]
    initial = pipeline.new_model(config.model, context, config.seed)
    return pipeline.fine_tune(config, context, initial, tokenizer, *answers)


def measure(config: Config, context: Context, scorer: Model, examples: Examples) -> dict:
    """Agreement of the scorer with the ranks of `examples`, beside that of length: `eval_...`."""
    loader = Loader(examples, config.reward_model.batch_size, config.seed)
    found = agreement.agreement(**reward_model.score_all(scorer, loader, mesh=context.mesh))
    return {f"eval_{name}": value for name, value in found.items()}
