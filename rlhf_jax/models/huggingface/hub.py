"""Downloads of model folders from the Hugging Face hub."""

from __future__ import annotations

import pathlib
import re

from rlhf_jax.models.huggingface import files

# The files that are downloaded; a question mark stands for one digit.
FETCHED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    *files.ADAPTER_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]


def fetch(name: str | pathlib.Path) -> pathlib.Path:
    """The local folder of a model: `name` if that is a folder, else `org/name` on the hub.

    Only configuration, safetensors and tokenizer files are downloaded, never pickles or code. The
    hub's client keeps them in its cache, so that a second call downloads nothing.
    Raises ValueError if `name` is neither a folder nor a model on the hub that can be read.
    """
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    name = str(name)
    if name.startswith((".", "~", "/")):
        raise ValueError(f"{name}: no such folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name}: no such folder, and not the org/name of a model on the hub")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=FETCHED))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name}: gated on the hub; accept its licence on its page there and log in with "
            "`hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"{name}: neither a folder here nor a model on the hub; check the spelling, or log in "
            "with `hf auth login` if it is private"
        ) from error
    except OSError as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name}: no such folder here, and the hub could not be read ({why})"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name}: the hub has no safetensors files of it; pickled weights (.bin) are not read "
            "(a pickle can run any code): convert them once with transformers' save_pretrained"
        )
    return folder
