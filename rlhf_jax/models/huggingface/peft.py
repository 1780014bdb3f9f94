"""LoRA adapters in the folders of peft: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import processes, sharding, storage
from rlhf_jax.models import lora, transformer
from rlhf_jax.models.huggingface import configurations, families, files, folders

_PEFT = "base_model.model."
# Settings that are read here, that the tensors show, or that matter only in training.
HARMLESS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "task_type",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
# Other settings, with the values that leave an adapter plain LoRA. A setting that is named neither
# above nor here must be off.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    # The ways to initialise that do not change the base.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
OFF = (None, False, [])


def check(settings: dict[str, Any], file: str) -> None:
    """Raises ValueError for a setting that may change what the adapter computes."""
    for name, value in settings.items():
        if name not in HARMLESS and value not in PLAIN.get(name, OFF):
            raise ValueError(f"{file}: {name}={value!r} is not plain LoRA")


def to_peft(
    model: transformer.Model, family: families.Family, head: str, base: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings and tensors with which peft describes the model's adapter.

    With head="score" the scalar head is among the tensors. Raises ValueError for a model without an
    adapter, and for an adapter of kernels that the family stores joined or untransposed.
    """
    tensors, ranks, scales, targets = {}, set(), set(), set()
    for kernel, node in _kernels(model.weights, family):
        if "lora_a" not in node:
            continue
        module = kernel.removesuffix(".weight")
        tensors[f"{_PEFT}{module}.lora_A.weight"] = np.ascontiguousarray(
            sharding.to_host(node["lora_a"]).T
        )
        tensors[f"{_PEFT}{module}.lora_B.weight"] = np.ascontiguousarray(
            sharding.to_host(node["lora_b"]).T
        )
        ranks.add(node["lora_a"].shape[1])
        scales.add(float(node["lora_scale"]))
        targets.add(module.rpartition(".")[2])
    if not tensors:
        raise ValueError("the model has no adapter to write; see lora.attach")
    (rank,), (scale,) = ranks, scales
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    if head == "score":
        name = families.stored_name(family, "score/kernel")
        kernel = sharding.to_host(model.weights["score"]["kernel"])
        tensors[_PEFT + name] = np.ascontiguousarray(kernel.T)
        record |= {"task_type": "SEQ_CLS", "modules_to_save": [family.modules["score"]]}
    return record, tensors


def from_peft(
    model: transformer.Model,
    family: families.Family,
    settings: dict[str, Any],
    tensors: dict[str, np.ndarray],
    files: tuple[str, str],
) -> transformer.Model:
    """The model with the adapter that settings and tensors of peft describe.

    `files` are the names of the two files, for errors. Raises ValueError as `load_adapter` says.
    """
    record, file = files
    check(settings, record)
    rank = configurations.whole("r", settings.get("r"), record)
    alpha = configurations.real("lora_alpha", settings.get("lora_alpha", 8), record)
    # Rank-stabilised LoRA divides by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    weights = jax.tree.map(lambda x: x, model.weights)  # new dictionaries, which are filled below
    unread = dict(tensors)
    for kernel, node in _kernels(weights, family):
        module = _PEFT + kernel.removesuffix(".weight")
        (size, out), found = node["kernel"].shape, []
        for letter, shape in (("A", (rank, size)), ("B", (out, rank))):
            name = f"{module}.lora_{letter}.weight"
            if name in unread:
                found.append(_transposed(unread.pop(name), name, shape, file))
        if len(found) == 1:
            raise ValueError(f"{file}: {kernel} has one of lora_A and lora_B, not both")
        if found:
            a, b = found
            node |= {"lora_a": a, "lora_b": b, "lora_scale": jnp.float32(scale)}
    score = _PEFT + families.stored_name(family, "score/kernel")
    if score in unread:
        if "score" not in weights:
            weights.pop("head", None)  # classifiers of transformers have no language-model head
        kernel = _transposed(unread.pop(score), score, (1, model.config.d_model), file)
        weights["score"] = {"kernel": kernel, "bias": jnp.zeros((1,))}
    elif settings.get("task_type") == "SEQ_CLS":
        raise ValueError(f"{file}: tensor {score} is missing, but task_type is SEQ_CLS")
    if unread:
        raise ValueError(f"{file}: tensor {min(unread)} has no place in the model")
    model = dataclasses.replace(model, weights=weights)
    if not lora.has_adapter(model):
        raise ValueError(f"{file}: holds no adapter of this model")
    return model


def _transposed(tensor, name, shape, file):
    """A stored tensor [out, in] as an array [in, out]. Raises ValueError unless it has `shape`."""
    if tensor.shape != shape:
        raise ValueError(
            f"{file}: tensor {name} has shape {tensor.shape}, but rank and model make it {shape}"
        )
    return jnp.asarray(tensor.T, jnp.float32)


def _kernels(weights: dict, family):
    """(stored name, module's weights) of every kernel that can have an adapter of peft."""
    nodes = {}

    def walk(node, path):
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, (*path, name))
        if "kernel" in node and path[0] not in ("head", "score"):
            nodes["/".join((*path, "kernel"))] = node

    walk(weights, ())
    for name, paths in families.groups(family, list(nodes)).items():
        if len(paths) == 1 and not family.conv1d:
            yield name, nodes[paths[0]]
        elif any("lora_a" in nodes[path] for path in paths):
            raise ValueError(
                f"{family.causal} stores {name} joined with others or untransposed, so peft has no "
                "adapter like this model's; export lora.merge(model) instead"
            )


def save_adapter(
    folder: str | os.PathLike,
    model: transformer.Model,
    *,
    like: str | pathlib.Path,
    head: Literal["lm", "score"] | None = None,
) -> None:
    """Writes the model's adapter, which peft then reads on top of the base in the folder `like`.

    `head` is needed for a model with two heads: the one that the adapter is for. A scalar head
    ("score") is written with the adapter, for `AutoModelForSequenceClassification` with
    `num_labels=1`, which finds the last token by the base's `pad_token_id`. With several processes
    all of them call this function, and process 0 writes.
    Raises ValueError for a model without an adapter; for a weight that is not finite; for a scalar
    head with a bias, which peft has no place for (see `transformer.without_score_bias`); and for a
    family whose kernels transformers stores joined (GPT-2, Phi-3, GPT-NeoX), where peft adapts the
    joined kernel and this library its parts: export `lora.merge(model)` instead.
    """
    head = folders.choose_head(model, head)
    family, _ = configurations.family_of(files.read_config(pathlib.Path(like)))
    folders.check_finite(model.weights)
    record, tensors = to_peft(model, family, head, str(like))
    folder = storage.path(folder)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_tensors(folder / files.ADAPTER_FILES[1], tensors)
        files.write_json(folder / files.ADAPTER_FILES[0], record)

    processes.first(write)


def load_adapter(
    folder: str | pathlib.Path, model: transformer.Model, *, like: str | pathlib.Path
) -> transformer.Model:
    """The model with the adapter in a folder of peft; `like` is the folder the model came from.

    The arrays of the model are shared, not copied. An adapter that holds a scalar head (`SEQ_CLS`
    with one label) makes the model a reward model with that head.
    Raises ValueError for a model that has an adapter already, a setting that is not plain LoRA, a
    tensor of the wrong shape or one that the model has no place for (such as that of a joined
    kernel, see `save_adapter`), and a damaged file.
    """
    record, file = (pathlib.Path(folder) / name for name in files.ADAPTER_FILES)
    if not record.is_file() or not file.is_file():
        raise ValueError(
            f"{folder}: holds no {' and '.join(files.ADAPTER_FILES)}, so it is no adapter"
        )
    if lora.has_adapter(model):
        raise ValueError("the model has an adapter already; load this one onto its base")
    family, _ = configurations.family_of(files.read_config(pathlib.Path(like)))
    settings = storage.read_json(record)
    with contextlib.ExitStack() as stack:
        tensors = {name: x.handle[:] for name, x in files.open_file(file, stack).items()}
    for name, tensor in tensors.items():
        files.check_finite(file, name, tensor)
    return from_peft(model, family, settings, tensors, (str(record), str(file)))
