"""LoRA (Hu et al. 2021, arXiv:2106.09685): a small trained product beside each frozen kernel.

    policy = lora.attach(policy, lora.Config(rank=8), key)
    ppo.run(config, policy=policy, ...)      # or sft.run, reward_model.run: nothing else changes

An adapter is three more arrays beside a `kernel` W, which then acts as W + scale * A B: `lora_a`
[in, rank] (A), `lora_b` [rank, out] (B) and `lora_scale` []. A and B are trained, together with a
scalar head where the model has one; optimizer state exists for these only (`models/partition.py`).
All other arrays are frozen and shared: models that were attached to the same base hold the same
buffers, so that policy, reference, reward model and critic together cost the memory of one base.
There is no dropout, because in RL it would make the first probability ratio differ from 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import config
from rlhf_jax.models import layers
from rlhf_jax.models.transformer import Model

TRAINED = ("lora_a", "lora_b")  # the arrays of an adapter that training changes


class Config(config.Config):
    """Size and place of an adapter."""

    rank: config.Count = 8  # inner size of the product A B
    alpha: config.Positive = 16.0  # the product is scaled by alpha / rank
    targets: tuple[str, ...] = ()  # kernels, e.g. ("query", "value"); (): all in the layers


def attach(model: Model, config: Config, key: Array) -> Model:
    """The model with a new adapter, which does not change its output yet.

    A is uniform in +-1 / sqrt(in), as peft draws it, and B is 0. The base's arrays are shared with
    the model given, not copied. Without named `targets` every kernel of the layers gets an adapter
    (peft's "all-linear"); the heads never do.
    Raises ValueError for a target that the model does not have, for a rank above that of every
    kernel, and for a model that has an adapter already.
    """
    if has_adapter(model):
        raise ValueError("the model has an adapter already; merge it first, or train that one")
    paths = _target_paths(model, config.targets)
    _check_rank(model, config, paths)
    weights = model.weights
    for number, path in enumerate(paths, start=1):
        weights = _add_adapter(weights, path, config, jax.random.fold_in(key, number))
    return dataclasses.replace(model, weights=weights)


def has_adapter(model: Any) -> bool:
    """Whether a model has an adapter. Anything that is not a `Model` has none."""
    if not isinstance(model, Model):
        return False
    return any(path[-1].key in TRAINED for path, _ in jax.tree.leaves_with_path(model.weights))


def merge(model: Model) -> Model:
    """The model with its adapter folded into the kernels, W + scale * A B: what is exported."""

    def fold(node: dict) -> dict:
        if "lora_a" in node:
            product = node["lora_scale"] * layers.dot(node["lora_a"], node["lora_b"])
            rest = {name: x for name, x in node.items() if not name.startswith("lora_")}
            return {**rest, "kernel": node["kernel"] + product}
        return {name: fold(x) if isinstance(x, dict) else x for name, x in node.items()}

    return dataclasses.replace(model, weights=fold(model.weights))


def _target_paths(model: Model, targets: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Paths of the modules that get an adapter, in the order of the weight tree."""
    modules = []

    def walk(node: dict, path: tuple[str, ...]) -> None:
        # The heads have a kernel too, but theirs is a path of one key.
        if len(path) > 1 and "kernel" in node:
            modules.append(path)
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, (*path, name))

    walk(model.weights, ())
    missing = sorted(set(targets) - {path[-1] for path in modules})
    if missing:
        raise ValueError(f"targets={missing}: the model has no kernels of these names")
    return [path for path in modules if not targets or path[-1] in targets]


def _check_rank(model: Model, config: Config, paths: list[tuple[str, ...]]) -> None:
    def full_rank(path: tuple[str, ...]) -> int:
        node = model.weights
        for name in path:
            node = node[name]
        return min(node["kernel"].shape)

    highest = max(map(full_rank, paths), default=0)
    if config.rank > highest:
        raise ValueError(
            f"rank={config.rank} is above {highest}, the highest rank that a kernel of the model "
            "has; an adapter is of a lower one, such as 8"
        )


def _add_adapter(node: dict, path: tuple[str, ...], config: Config, key: Array) -> dict:
    """The weights with an adapter beside the kernel of the module at `path`."""
    if path:
        return {**node, path[0]: _add_adapter(node[path[0]], path[1:], config, key)}
    width, out = node["kernel"].shape
    bound = width**-0.5
    return {
        **node,
        "lora_a": jax.random.uniform(key, (width, config.rank), minval=-bound, maxval=bound),
        "lora_b": jnp.zeros((config.rank, out)),
        "lora_scale": jnp.float32(config.alpha / config.rank),
    }
