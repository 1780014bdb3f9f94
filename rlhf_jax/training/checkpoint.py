"""The checkpoints of one stage, which Orbax writes in the background and restores onto any mesh."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhf_jax import sharding, storage
from rlhf_jax.models import stacking


class Checkpoints:
    """The last `keep` checkpoints of a stage, in one folder per step.

    A tree is stored as a flat dictionary from the path of each array to the array, so that the
    files do not depend on the Python types of this library, nor on whether layers were stacked
    (`stacking`): every layer has paths of its own. `save` returns once the arrays are
    copied off the device and writes them in the background. Only complete checkpoints are found.
    With several processes each writes and reads the arrays of its own devices, into one folder.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self.folder = storage.absolute(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest(self) -> int | None:
        """The newest step that is stored, or None; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def names(self) -> list[str]:
        """The paths of the arrays of the newest checkpoint, which must exist."""
        return sorted(self._stored(self.latest()))

    def save(self, step: int, tree: Any) -> None:
        """Stores a tree of arrays as `step`; does nothing if that step is stored already."""
        if step in self._manager.all_steps():
            return
        flat = stacking.split_names(_flat(tree))
        self._manager.save(step, args=ocp.args.StandardSave(flat))

    def restore(self, like: Any) -> Any | None:
        """The newest checkpoint with the types and shardings of `like`; None if there is none.

        Raises ValueError naming the first array that only one of the two has, or whose shapes
        differ.
        """
        step = self.latest()
        if step is None:
            return None
        # Not by jax.tree.map, which would sort the names.
        wanted = {name: ocp.utils.to_shape_dtype_struct(x) for name, x in _flat(like).items()}
        stored = stacking.split_names(wanted)
        self._check(step, stored)
        separate = self._manager.restore(step, args=ocp.args.StandardRestore(stored))
        flat = stacking.join_names(separate, wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in wanted])

    def _stored(self, step) -> dict[str, Any]:
        return dict(self._manager.item_metadata(step))

    def _check(self, step, wanted):
        stored = {name: tuple(array.shape) for name, array in self._stored(step).items()}
        wanted = {name: tuple(array.shape) for name, array in wanted.items()}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.folder / str(step)}: {name} is {stored.get(name, 'missing')} in the "
                    f"checkpoint but {wanted.get(name, 'missing')} in this run; use a new workdir"
                )

    def close(self) -> None:
        """Waits for a checkpoint that is being written. Leaving a `with` statement does it too."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_):
        self.close()


def _flat(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree.flatten_with_path(tree)
    return {sharding.path_name(path).replace("/", "."): leaf for path, leaf in pairs}
