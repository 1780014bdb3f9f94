"""Checkpoints of one stage: written by Orbax in the background, restored onto any mesh."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhf_jax import sharding


class Checkpoints:
    """The last `keep` checkpoints of a stage, one folder a step.

    A tree is stored as a flat dictionary of arrays by path, so that what is on disk does not
    depend on our Python types. Saving copies the arrays off the device and writes in the
    background; a step becomes visible only when it is complete.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest(self) -> int | None:
        """The newest complete step, or None. Waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Stores a tree of arrays as `step`. Does nothing if that step is there already."""
        if step in self._manager.all_steps():
            return
        self._manager.save(step, args=ocp.args.StandardSave(_flat(tree)))

    def restore(self, like: Any) -> Any | None:
        """The newest checkpoint in the shape, types and shardings of `like`; None if there is none.

        Raises ValueError naming the first array that is missing, extra or misshapen.
        """
        step = self.latest()
        if step is None:
            return None
        wanted = _flat(like)
        self._check(step, wanted)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        flat = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        leaves = [flat[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _check(self, step, wanted):
        stored = self._manager.item_metadata(step)
        stored = {name: tuple(array.shape) for name, array in dict(stored).items()}
        wanted = {name: tuple(array.shape) for name, array in wanted.items()}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.folder / str(step)}: {name} is {stored.get(name, 'missing')} in the "
                    f"checkpoint but {wanted.get(name, 'missing')} in this run; use a new workdir"
                )

    def close(self) -> None:
        """Waits for what is being written. Call it, or use the object as a context manager."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_):
        self.close()


def _flat(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree.flatten_with_path(tree)
    return {sharding.path_name(path).replace("/", "."): leaf for path, leaf in pairs}
