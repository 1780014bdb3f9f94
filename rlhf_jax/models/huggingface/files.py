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
_CHECKED_AT_ONCE = 2**22  # numbers
PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)")


class Stored(NamedTuple):
    """A tensor in a file, which has not been read yet."""

    file: pathlib.Path
    handle: Any  # of safetensors: `handle[:]` reads the tensor, `handle.get_shape()` does not


def check_finite(file: pathlib.Path, name: str, array: np.ndarray) -> None:
    """Raises ValueError, naming file and tensor, for an array that holds NaN or infinity."""
    # By parts, so that the answers of a large tensor take little memory.
    rows = max(1, _CHECKED_AT_ONCE * len(array) // max(array.size, 1)) if array.ndim else 1
    parts = [array[i : i + rows] for i in range(0, len(array), rows)] if array.ndim else [array]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(
            f"{file}: tensor {name} holds NaN or infinity as {array.dtype}; no training can repair "
            "that: fetch the file again, or go back to an earlier export"
        )


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
        base = storage.read_json(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: an adapter of {base}, not a model; load {base}, then "
            "load_adapter(folder, model, like=its folder)"
        )
    if not record.is_file():
        raise ValueError(f"{record}: no such file, so {folder} is not a model folder")
    return storage.read_json(record)


def open_folder(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """All tensors in a folder by name, without reading them; `stack` closes their files.

    Raises ValueError for pickled weights, damaged files, and an index that its files contradict.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    for file in (single, index):
        storage.check_file(file)
    if single.is_file():
        return open_file(single, stack)
    if not index.is_file():
        pickled = [x for x in sorted(folder.iterdir()) if PICKLED.fullmatch(x.name)]
        if pickled:
            raise _pickled(pickled[0])
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    file_of = storage.read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(x, str) for x in file_of.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    stored = {}
    for name in sorted(set(file_of.values())):
        if not storage.names_inside(name):
            raise ValueError(
                f"{index}: names the file {name!r:.80}, which is outside its folder; an index "
                "names files beside it: fetch the model again"
            )
        if PICKLED.fullmatch(pathlib.PurePath(name).name):
            raise _pickled(folder / name)
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {index.name} names it")
        stored.update(open_file(folder / name, stack))
    for tensor, name in file_of.items():
        if tensor not in stored or stored[tensor].file != folder / name:
            raise ValueError(f"{index}: places {tensor} in {name}, which does not hold it")
    return stored


def _pickled(file: pathlib.Path) -> ValueError:
    return ValueError(
        f"{file}: pickled weights are not read (a pickle can run any code); convert them once with "
        "transformers' save_pretrained, which writes model.safetensors"
    )


def open_file(file: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """All tensors in one safetensors file by name, without reading them; `stack` closes it."""
    try:
        opened = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: damaged or not a safetensors file ({error}); fetch it again"
        ) from error
    return {name: Stored(file, opened.get_slice(name)) for name in opened.keys()}
