"""A model together with its tokenizer, as a Hugging Face folder: read, checked and written."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

import jax

from rlhf_jax import processes, storage
from rlhf_jax.data import chat, tokenizers
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


def reward_model(
    name: str | pathlib.Path,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh | None = None,
    compute: Compute = transformer.AS_CONFIGURED,
) -> Model:
    """The reward model of a folder, or of an `org/name`, as `language_model` reads those."""
    model = transformer.computed_as(huggingface.load(huggingface.fetch(name), mesh), compute)
    if "score" not in model.weights:
        raise ValueError(f"{name}: a language model, where a reward model is needed")
    tokenizers.check_vocab(tokenizer, model.config.vocab_size)
    return model


def export(
    folder: str | os.PathLike,
    model: Model,
    tokenizer: Tokenizer,
    like: str | pathlib.Path | None = None,
) -> None:
    """Writes model and tokenizer as a folder that transformers reads, replacing what is there.

    With several processes all of them call this function, and process 0 writes.

    An adapter is merged into the weights. A model with a scalar head is written as a reward model,
    without the bias, and with a chat template that ends at the token it scores: see
    `chat.ending_at_eos`.
    `like` is the folder or the hub name that the model came from: its files supply the
    entries of the configuration besides the shapes. The old config.json is removed first and the
    new one written last, so that after an interruption there is the old folder, the new one, or
    one that nothing takes for a model. (A folder in a bucket could not be renamed.)

    Raises ValueError, and leaves what is there, for weights that are NaN or infinite.
    """
    if "q" in model.weights:
        raise ValueError(
            "a network of action values is no model that transformers has; export the policy, and "
            "keep the network's checkpoint"
        )
    folder = storage.path(folder)
    head = "score" if "score" in model.weights else "lm"
    model = lora.merge(model)
    if head == "score":
        model = transformer.without_score_bias(model)
    scores = head == "score" and tokenizer.chat_template is not None
    saved = chat.ending_at_eos(tokenizer) if scores else tokenizer
    huggingface.check_finite(model.weights)  # before what is there is removed
    ids = {"eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id}

    def begin() -> None:
        (folder / "config.json").unlink(missing_ok=True)
        storage.remove(folder)
        saved.save(folder)

    processes.first(begin)
    huggingface.save(folder, model, like=like, head=head, fields=ids)
