"""A model together with its tokenizer, as a Hugging Face folder: read, checked and written."""

from __future__ import annotations

import pathlib
import shutil
from typing import NamedTuple

import jax

from rlhf_jax.data import tokenizers
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import huggingface, lora, transformer
from rlhf_jax.models.transformer import Compute, Model


class Pretrained(NamedTuple):
    """A language model and the tokenizer that it was trained with."""

    model: Model
    tokenizer: Tokenizer


def load(
    name: str | pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
    compute: Compute = transformer.AS_CONFIGURED,
) -> Pretrained:
    """Reads a language model and its tokenizer from a folder, or from `org/name` on the hub.

    Raises ValueError as `language_model` does, and where the folder holds no tokenizer.
    """
    folder = huggingface.fetch(name)
    tokenizer = tokenizers.from_folder(folder)
    return Pretrained(language_model(folder, tokenizer, mesh, compute), tokenizer)


def language_model(
    name: str | pathlib.Path,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh | None = None,
    compute: Compute = transformer.AS_CONFIGURED,
) -> Model:
    """The language model of a folder, or of an `org/name` that is fetched from the hub.

    `compute` says how it is computed; by default in float32.

    Raises ValueError for a reward model, and for a model whose vocabulary is smaller than the
    tokenizer's, because some tokens would then have no embedding.
    """
    model = huggingface.load(huggingface.fetch(name), mesh)
    if "score" in model.weights:
        raise ValueError(f"{name}: a reward model, which writes no text; name a language model")
    tokenizers.check_vocab(tokenizer, model.config.vocab_size)
    return transformer.computed_as(model, compute)


def export(
    folder: pathlib.Path,
    model: Model,
    tokenizer: Tokenizer,
    like: str | pathlib.Path | None = None,
) -> None:
    """Writes model and tokenizer as a folder that transformers reads, replacing what is there.

    An adapter is merged into the weights. A model with a scalar head is written as a reward model.
    `like` is the folder or the hub name that the model came from: its files supply the
    entries of the configuration besides the shapes. The folder is written under another name first
    and renamed at the end, so that an interruption leaves the old folder or the new one, never
    half of one.
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
