"""The files of a model folder: JSON, and safetensors files that are opened but not read yet."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import storage

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)")


class Stored(NamedTuple):
    """A tensor in a file, which has not been read yet."""

    file: pathlib.Path
    handle: Any  # of safetensors: `handle[:]` reads the tensor, `handle.get_shape()` does not


def read_json(file: storage.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, if it does not hold one."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}: must hold a JSON object, not a {type(record).__name__}")
    return record


def write_json(file: storage.Path, record: dict[str, Any]) -> None:
    """Writes an object to a JSON file."""
    storage.write(file, json.dumps(record, indent=2) + "\n")


def write_tensors(file: storage.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file as transformers and peft do."""
    if storage.in_bucket(file):
        storage.write(file, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    else:  # without a second copy in memory
        file.touch()
        mode = file.stat().st_mode
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        # safetensors replaces the file by one that only its owner may read, whatever the umask.
        file.chmod(mode)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises ValueError if the folder has none, and says so if it holds an adapter instead of a model.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; a model is a local folder; fetch('org/name') downloads one"
        )
    record, adapter = folder / "config.json", folder / ADAPTER_FILES[0]
    if not record.is_file() and adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: an adapter of {base}, not a model; load {base}, then "
            "load_adapter(folder, model, like=its folder)"
        )
    if not record.is_file():
        raise ValueError(f"{record}: no such file, so {folder} is not a model folder")
    return read_json(record)


def open_folder(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """All tensors in a folder by name, without reading them; `stack` closes their files.

    Raises ValueError for pickled weights, damaged files, and an index that its files contradict.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return open_file(single, stack)
    if not index.is_file():
        pickled = [x for x in sorted(folder.iterdir()) if PICKLED.fullmatch(x.name)]
        if pickled:
            raise ValueError(
                f"{pickled[0]}: pickled weights are not read (a pickle can run any code); convert "
                "them once with transformers' save_pretrained, which writes model.safetensors"
            )
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(x, str) for x in file_of.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    stored = {}
    for name in sorted(set(file_of.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {index.name} names it")
        stored.update(open_file(folder / name, stack))
    for tensor, name in file_of.items():
        if tensor not in stored or stored[tensor].file != folder / name:
            raise ValueError(f"{index}: places {tensor} in {name}, which does not hold it")
    return stored


def open_file(file: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """All tensors in one safetensors file by name, without reading them; `stack` closes it."""
    try:
        opened = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: damaged or not a safetensors file ({error}); fetch it again"
        ) from error
    return {name: Stored(file, opened.get_slice(name)) for name in opened.keys()}
