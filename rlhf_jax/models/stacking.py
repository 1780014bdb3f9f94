"""Layers of the same kind, stacked, so that training compiles one layer and loops over it.

    {"layer_0": w0, "layer_1": w1, ...}  <->  {"layers": {"layer_0": [w0, w1, ...]}}

Where kinds of layers alternate, the loop runs over the repeating pattern: in Gemma 2, "layers"
holds "layer_0" (layers 0, 2, 4, ...) and "layer_1" (layers 1, 3, 5, ...). Layers beyond the last
whole repetition stay by themselves. Only the models inside a training run are stacked. What goes in
and comes out, checkpoints and folders have a name per layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from rlhf_jax import sharding
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import STACK, Model, layer_name

# A stacked array in a checkpoint: what comes before, the layer in the pattern, what comes after.
_STACKED = re.compile(rf"(.*?)\b{STACK}([./])layer_(\d+)(.*)")


def stack_all(mesh: jax.sharding.Mesh, models: Any) -> Any:
    """A tree with models in it, with layers stacked where training wants that (`is_wanted`).

    Arrays that several models share, such as the base of adapters, are still shared afterwards.
    The tree may be of shapes.
    """
    joined = {}

    def join(arrays):
        key = tuple(map(id, arrays))
        if key not in joined:
            joined[key] = _join(arrays)
        return joined[key]

    def stacked(node):
        return stack(node, join) if _is_model(node) and is_wanted(node, mesh) else node

    return jax.tree.map(stacked, models, is_leaf=_is_model)


def unstack_all(models: Any) -> Any:
    """The inverse of `stack_all`."""
    return jax.tree.map(lambda x: unstack(x) if _is_model(x) else x, models, is_leaf=_is_model)


def _is_model(node: Any) -> bool:
    return isinstance(node, Model)


def is_wanted(model: Model, mesh: jax.sharding.Mesh) -> bool:
    """Whether training stacks the layers of this model: as its configuration says, or by platform.

    On accelerators the loop keeps compilation and temporary memory small, which a CPU needs less.
    """
    if model.config.scan_layers is not None:
        return model.config.scan_layers
    return mesh.devices.flat[0].platform != "cpu"


def stack(model: Model, join: Callable | None = None) -> Model:
    """The model with its layers stacked, or as it is where fewer than two repetitions are alike.

    A part of a model (`partition`) is stacked in the same way, and nothing is done to a model that
    is stacked already. `join` makes one array [L, ...] of several.
    """
    size = transformer.pattern(model.config)
    repeats = model.config.num_layers // size
    if repeats < 2 or layer_name(0) not in model.weights:
        return model

    def of_kind(i: int) -> Any:
        alike = (model.weights[layer_name(repeat * size + i)] for repeat in range(repeats))
        return jax.tree.map(lambda *arrays: (join or _join)(arrays), *alike)

    taken = {layer_name(i) for i in range(repeats * size)}
    rest = {name: x for name, x in model.weights.items() if name not in taken}
    return Model(model.config, {STACK: {layer_name(i): of_kind(i) for i in range(size)}, **rest})


def unstack(model: Model) -> Model:
    """The inverse of `stack`; a model that is not stacked is returned as it is."""
    if STACK not in model.weights:
        return model
    weights = {name: x for name, x in model.weights.items() if name != STACK}
    kinds = model.weights[STACK]
    for i in range(len(kinds)):
        leaves, structure = jax.tree.flatten(kinds[layer_name(i)])
        for repeat, layer in enumerate(zip(*map(_split, leaves))):
            weights[layer_name(repeat * len(kinds) + i)] = jax.tree.unflatten(structure, layer)
    return Model(model.config, weights)


def is_stacked(path: tuple) -> bool:
    """Whether the array at this key path of a tree is one of all layers, [L, ...]."""
    return any(getattr(key, "key", None) == STACK for key in path)


def split_names(flat: dict[str, Any]) -> dict[str, Any]:
    """Arrays by path, with a path per layer: "a/layers/layer_0/b" [L, ...] -> "a/layer_3/b" [...].

    Also for "." between the parts of a path, and for `jax.ShapeDtypeStruct`s in place of arrays.
    """
    separate = {}
    for name, array in flat.items():
        layers = _layer_names(name, flat)
        separate |= dict(zip(layers, _split(array))) if layers else {name: array}
    return separate


def join_names(separate: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_names`: the arrays under the names of `like`, stacked as these are.

    `separate` is emptied, so that its arrays are freed as soon as they are joined.
    """
    joined = {}
    for name in like:
        layers = _layer_names(name, like)
        joined[name] = _join([separate.pop(x) for x in layers]) if layers else separate.pop(name)
    return joined


def _layer_names(name: str, flat: dict[str, Any]) -> list[str]:
    """The names of the layers that are stacked under `name`; none where it is not stacked."""
    found = _STACKED.fullmatch(name)
    if not found:
        return []
    before, dot, kind, after = found.groups()
    start = f"{before}{STACK}{dot}"
    size = len({x[len(start) :].split(dot)[0] for x in flat if x.startswith(start)})
    repeats = flat[name].shape[0]
    return [f"{before}{layer_name(repeat * size + int(kind))}{after}" for repeat in range(repeats)]


def _join(arrays) -> Any:
    """Arrays [...] as one, [L, ...]; outside of a program it is split over devices as they are."""
    where = sharding.with_leading_axis(arrays[0])
    if isinstance(arrays[0], Shape):
        return Shape((len(arrays), *arrays[0].shape), arrays[0].dtype, sharding=where)
    return jnp.stack(arrays) if where is None else _stacking(where)(arrays)


def _split(array) -> Any:
    """An array [L, ...] as L arrays [...], split over devices as it is."""
    where = sharding.without_leading_axis(array)
    if isinstance(array, Shape):
        count, *shape = array.shape
        return [Shape(tuple(shape), array.dtype, sharding=where) for _ in range(count)]
    return list(array) if where is None else _splitting(where)(array)


@functools.lru_cache(maxsize=64)
def _stacking(where: jax.sharding.Sharding):
    return jax.jit(jnp.stack, out_shardings=where)


@functools.lru_cache(maxsize=64)
def _splitting(where: jax.sharding.Sharding):
    return jax.jit(list, out_shardings=where)
