"""LoRA (Hu et al. 2021, arXiv:2106.09685): a small trained product beside each frozen kernel.

    policy = lora.attach(policy, lora.Config(rank=8), key)
    ppo.run(config, policy=policy, ...)      # or sft.run, reward_model.run: nothing else changes

An adapter is three more leaves beside a `kernel`, W + scale * A B: `lora_a` [in, rank], `lora_b`
[rank, out] and `lora_scale` []. Whoever trains a model that has them differentiates only those
(and a scalar head), keeps optimizer state only for those, and shares the rest: models attached to
the same base hold the same buffers, so that policy, reference, reward model and critic cost one
base together. No dropout: in RL it would make the first ratio differ from 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import config
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import Model

ADAPTER = ("lora_a", "lora_b")


class Config(config.Config):
    """rank of the product; alpha: its scale is alpha / rank; targets: the kernels that get one,
    e.g. ("query", "value"); () means every kernel of the layers (peft's "all-linear")."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()


def attach(model: Model, config: Config, key: Array) -> Model:
    """The model with a fresh adapter, which changes nothing yet: A is uniform in +-1 / sqrt(in)
    (as peft draws it), B is 0. The base's arrays are shared, not copied.

    Raises ValueError for a rank below 1, a target that the model does not have, and a model that
    has an adapter already.
    """
    if config.rank < 1:
        raise ValueError(f"rank={config.rank} must be at least 1")
    if has_adapter(model):
        raise ValueError("the model has an adapter already; merge it first, or train that one")
    found = set()
    wanted = lambda name: not config.targets or name in config.targets  # noqa: E731

    def add(path: tuple, node: dict, number: list[int]) -> dict:
        if len(path) > 1 and "kernel" in node and wanted(path[-1]):  # heads have none
            found.add(path[-1])
            number[0] += 1
            size, out = node["kernel"].shape
            bound = size**-0.5
            a = jax.random.uniform(
                jax.random.fold_in(key, number[0]), (size, config.rank), minval=-bound, maxval=bound
            )
            scale = jnp.float32(config.alpha / config.rank)
            return {
                **node,
                "lora_a": a,
                "lora_b": jnp.zeros((config.rank, out)),
                "lora_scale": scale,
            }
        inner = lambda k, v: add((*path, k), v, number) if isinstance(v, dict) else v  # noqa: E731
        return {k: inner(k, v) for k, v in node.items()}

    weights = add((), model.weights, [0])
    missing = sorted(set(config.targets) - found)
    if missing:
        raise ValueError(f"targets={missing}: the model has no kernels of these names")
    return dataclasses.replace(model, weights=weights)


def has_adapter(model: Any) -> bool:
    """Whether a model has an adapter. Anything that is no `Model` has none."""
    return isinstance(model, Model) and bool(_pick(model.weights, lambda path: path[-1] in ADAPTER))


def trainable(models: dict) -> dict:
    """What training changes: of a model with an adapter that and a scalar head, else everything."""
    return {
        name: _part(model, _trained) if has_adapter(model) else model
        for name, model in models.items()
    }


def frozen(models: dict) -> dict:
    """The rest of those that have an adapter: their base. {} without adapters."""
    return {
        name: _part(model, lambda path: not _trained(path))
        for name, model in models.items()
        if has_adapter(model)
    }


def join(frozen: dict, trainable: dict) -> dict:
    """Both by name; a name in both is a base and its adapter, which are put together."""
    return {
        **frozen,
        **{
            name: dataclasses.replace(part, weights=_union(frozen[name].weights, part.weights))
            if name in frozen
            else part
            for name, part in trainable.items()
        },
    }


def merge(model: Model) -> Model:
    """The adapter folded into the kernels, W + scale * A B: what export writes."""

    def fold(node: dict) -> dict:
        if "lora_a" in node:
            product = node["lora_scale"] * transformer.dot(node["lora_a"], node["lora_b"])
            kept = {k: v for k, v in node.items() if not k.startswith("lora_")}
            return {**kept, "kernel": node["kernel"] + product}
        return {k: fold(v) if isinstance(v, dict) else v for k, v in node.items()}

    return dataclasses.replace(model, weights=fold(model.weights))


def _trained(path: tuple[str, ...]) -> bool:
    return path[-1] in ADAPTER or path[0] == "score"


def _part(model: Model, keep: Callable[[tuple], bool]) -> Model:
    return dataclasses.replace(model, weights=_pick(model.weights, keep))


def _pick(node: dict, keep: Callable[[tuple], bool], path: tuple = ()) -> dict:
    """The leaves whose path is kept, in the same nesting, without empty branches."""
    picked = {}
    for name, value in node.items():
        here = (*path, name)
        if isinstance(value, dict):
            value = _pick(value, keep, here)
        elif not keep(here):
            value = {}
        if not isinstance(value, dict) or value:
            picked[name] = value
    return picked


def _union(a: dict, b: dict) -> dict:
    both = {name: _union(a[name], b[name]) for name in a.keys() & b.keys()}
    return {**a, **b, **both}
