"""Splits models into the part that training changes and the part that stays frozen, and back.

    trainable, frozen = partition({"policy": policy, "critic": critic})
    params = combine(frozen, trainable)      # what a loss is given

A model with a LoRA adapter trains the adapter and the heads that are new (a scalar head, those of
action values) and freezes the rest; any other model is trained whole. The functions are named after
equinox's. Nothing is copied: the parts hold the models' own arrays, so that models which share a
base still share it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.models import lora
from rlhf_jax.models.transformer import Model

Path = tuple[str, ...]  # the keys that lead to an array, e.g. ("layer_0", "mlp", "up", "kernel")


def partition(models: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models by name -> (trainable, frozen), both by name.

    `trainable` has every name; `frozen` has those of the models with an adapter, so it is {} where
    there is none. A part is a `Model` whose weights lack the arrays of the other part.
    """
    adapted = {name: model for name, model in models.items() if lora.has_adapter(model)}
    trainable = models | {name: _part(model, _is_trained) for name, model in adapted.items()}
    frozen = {name: _part(model, _is_frozen) for name, model in adapted.items()}
    return trainable, frozen


def combine(frozen: dict[str, Any], trainable: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `partition`: a name found in both is put together from its two parts.

    `frozen` may hold further models, such as a reference, which are passed on as they are.
    """
    combined = frozen | trainable
    for name in frozen.keys() & trainable.keys():
        weights = _union(frozen[name].weights, trainable[name].weights)
        combined[name] = dataclasses.replace(trainable[name], weights=weights)
    return combined


def in_compute_type(models: dict[str, Any]) -> dict[str, Any]:
    """Frozen models with their matrices in the type of their products.

    Products would round them to that type anyway, so no number changes; nothing is made larger.
    Norms, biases and the scalar head, which are used in float32, stay as they are, and so does what
    is no `Model`. Arrays that several models share are still shared afterwards. The models may be
    of shapes.
    """
    done = {}

    def cast(dtype, path, x):
        if x.ndim < 2 or x.dtype.itemsize <= dtype.itemsize or path[0].key == "score":
            return x
        if id(x) not in done:
            done[id(x)] = sharding.cast(x, dtype)
        return done[id(x)]

    def of_model(model):
        if not isinstance(model, Model):
            return model
        cast_to = functools.partial(cast, jnp.dtype(model.config.dtype))
        weights = jax.tree.map_with_path(cast_to, model.weights)
        return dataclasses.replace(model, weights=weights)

    return {name: of_model(model) for name, model in models.items()}


def _is_trained(path: Path) -> bool:
    """Whether training changes this array of a model that has an adapter."""
    return path[-1] in lora.TRAINED or path[0] in ("score", "q", "twin")


def _is_frozen(path: Path) -> bool:
    return not _is_trained(path)


def _part(model: Model, belongs: Callable[[Path], bool]) -> Model:
    return dataclasses.replace(model, weights=_select(model.weights, belongs))


def _select(weights: dict, belongs: Callable[[Path], bool], path: Path = ()) -> dict:
    """The arrays whose path belongs, in the same nesting, without the branches left empty."""
    selected = {}
    for name, value in weights.items():
        if isinstance(value, dict):
            branch = _select(value, belongs, (*path, name))
            if branch:
                selected[name] = branch
        elif belongs((*path, name)):
            selected[name] = value
    return selected


def _union(one: dict, other: dict) -> dict:
    """Two nested dictionaries as one; where both hold a name, both hold a dictionary."""
    both = {name: _union(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}
