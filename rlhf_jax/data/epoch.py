"""Runs a compiled function once on every row of a loader: sums of its scalars, or its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.data.loader import Loader
from rlhf_jax.models import stacking


def sums(
    fn: Callable,
    static: tuple,
    args: tuple,
    loader: Loader,
    mesh: jax.sharding.Mesh | None = None,
) -> list[float]:
    """Adds up the scalars `fn(*static, *args, batch)` over all batches.

    `fn` is defined at module level and `static` is hashable, so that the program is compiled once
    in a process. Without a mesh it runs on all devices.
    """
    totals = [list(map(float, out)) for out in _batches(fn, static, args, loader, mesh)]
    return [sum(column) for column in zip(*totals)]


def rows(
    fn: Callable,
    static: tuple,
    args: tuple,
    loader: Loader,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """What `fn(*static, *args, batch)` returns for each row of the loader, in order, on every host.

    `fn` returns a tree of arrays with a leading row axis; padding rows are cut off. The other
    arguments are those of `sums`.
    """
    parts = [sharding.to_host(out) for out in _batches(fn, static, args, loader, mesh)]
    # Only the last batch has padding rows, at its end.
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(loader.examples)], *parts)


def _batches(fn, static, args, loader, mesh) -> Iterator[Any]:
    run, mesh = program(fn, static), mesh or sharding.make_mesh()
    args = stacking.stack_all(mesh, args)
    with jax.set_mesh(mesh):
        own = loader.reading(sharding.process_rows(mesh, loader.batch_size))
        for batch in own.epoch_batches():
            yield run(*args, sharding.put_rows(mesh, batch))


@functools.lru_cache(maxsize=64)
def program(fn: Callable, static: tuple) -> Callable:
    """The compiled `fn(*static, ...)`, the same object for the same arguments."""
    return jax.jit(functools.partial(fn, *static))
