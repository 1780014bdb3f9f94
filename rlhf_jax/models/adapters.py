"""Adapters as peft has them: its settings and tensors, from ours and to ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import configs, families, lora, transformer

_PEFT = "base_model.model."
# Settings of peft that are read here, that its tensors say too, or that only made them.
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
# Of the others the values that leave an adapter plain LoRA; the rest only where it is off.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    # Those that leave the base alone.
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
    """peft's settings and tensors of the model's adapter, its scalar head included for "score"."""
    tensors, ranks, scales, targets = {}, set(), set(), set()
    for kernel, node in _kernels(model.weights, family):
        if "lora_a" not in node:
            continue
        module = kernel.removesuffix(".weight")
        tensors[f"{_PEFT}{module}.lora_A.weight"] = np.ascontiguousarray(node["lora_a"].T)
        tensors[f"{_PEFT}{module}.lora_B.weight"] = np.ascontiguousarray(node["lora_b"].T)
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
        tensors[_PEFT + name] = np.ascontiguousarray(model.weights["score"]["kernel"].T)
        record |= {"task_type": "SEQ_CLS", "modules_to_save": [family.modules["score"]]}
    return record, tensors


def from_peft(
    model: transformer.Model,
    family: families.Family,
    settings: dict[str, Any],
    tensors: dict[str, np.ndarray],
    files: tuple[str, str],
) -> transformer.Model:
    """`model` with peft's adapter; `files` name its settings and tensors in errors."""
    record, file = files
    check(settings, record)
    rank = configs.whole("r", settings.get("r"), record)
    alpha = configs.real("lora_alpha", settings.get("lora_alpha", 8), record)
    # Rank-stabilised: alpha over the root (Kalajdzievski 2023, arXiv:2312.03732).
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    weights = jax.tree.map(lambda x: x, model.weights)  # the dictionaries anew, not the arrays
    left = dict(tensors)
    for kernel, node in _kernels(weights, family):
        module = _PEFT + kernel.removesuffix(".weight")
        (size, out), found = node["kernel"].shape, []
        for letter, shape in (("A", (rank, size)), ("B", (out, rank))):
            name = f"{module}.lora_{letter}.weight"
            if name in left:
                found.append(_turned(left.pop(name), name, shape, file))
        if len(found) == 1:
            raise ValueError(f"{file}: {kernel} has one of lora_A and lora_B, not both")
        if found:
            a, b = found
            node |= {"lora_a": a, "lora_b": b, "lora_scale": jnp.float32(scale)}
    score = _PEFT + families.stored_name(family, "score/kernel")
    if score in left:
        if "score" not in weights:
            weights.pop("head", None)  # as transformers' classifiers, which have the one head
        kernel = _turned(left.pop(score), score, (1, model.config.d_model), file)
        weights["score"] = {"kernel": kernel, "bias": jnp.zeros((1,))}
    elif settings.get("task_type") == "SEQ_CLS":
        raise ValueError(f"{file}: tensor {score} is missing, but task_type is SEQ_CLS")
    if left:
        raise ValueError(f"{file}: tensor {min(left)} has no place in the model")
    model = dataclasses.replace(model, weights=weights)
    if not lora.has_adapter(model):
        raise ValueError(f"{file}: holds no adapter of this model")
    return model


def _turned(tensor, name, shape, file):
    """Ours of one of their tensors, whose shape must be this."""
    if tensor.shape != shape:
        raise ValueError(
            f"{file}: tensor {name} has shape {tensor.shape}, but rank and model make it {shape}"
        )
    return jnp.asarray(tensor.T, jnp.float32)


def _kernels(weights: dict, family):
    """(their name, node) of every kernel that an adapter of peft can stand beside."""
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
                f"{family.causal} keeps {name} fused or turned, so an adapter beside it is not one "
                "of peft's; export lora.merge(model) instead"
            )
