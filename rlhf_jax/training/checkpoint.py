"""The checkpoints of one stage, which Orbax writes in the background and restores onto any mesh."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rlhf_jax import config, processes, sharding, storage
from rlhf_jax.config import Count, Positive
from rlhf_jax.models import stacking

# A checkpoint that the clock asks for may take this share of the time, and no more.
SHARE = 0.05


class Config(config.Config):
    """When a stage is saved besides every so many steps, and what is kept."""

    # Seconds after which a stage is saved; less often where saving takes more than a twentieth of
    # the time.
    save_seconds: Positive = 60.0
    keep: Count = 2  # checkpoints, the newest ones
    keep_best: str = ""  # a metric, whose best checkpoint is kept too; "" is none
    best_is: Literal["highest", "lowest"] = "highest"  # value of that metric

    def check_best(self, eval_every: int) -> None:
        """Raises ValueError where the best checkpoint is told by an evaluation that never runs."""
        if self.keep_best.startswith("eval/") and not eval_every:
            raise ValueError(
                f"keep_best={self.keep_best!r} is measured by evaluations, which eval_every=0 "
                "never runs; set it above 0"
            )


class Damaged(ValueError):
    """A checkpoint that cannot be read, or that holds other numbers than were saved."""


class Checkpoints:
    """The newest checkpoints of a stage and the best one, in one folder per step.

    A tree is stored as a flat dictionary from the path of each array to the array, so that the
    files do not depend on the Python types of this library, nor on whether layers were stacked
    (`stacking`): every layer has paths of its own. `save` returns once the arrays are
    copied off the device and writes them in the background. Only complete checkpoints are found.
    With several processes each writes and reads the arrays of its own devices, into one folder.

    With every array its `checksum` is stored. A checkpoint whose arrays have others, or that cannot
    be read, is damaged: it is named, and the next older one is restored in its place.

    `say` prints a line for people.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int = 2,
        *,
        best: str = "",
        lowest: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.folder = storage.absolute(folder)
        self._metric, self._best, self._say = best, _Best(lowest), say
        self._damaged: list[int] = []
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(keep), self._best]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=True)
        handler = ocp.StandardCheckpointHandler()
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handler
            )
        except ValueError as error:  # Orbax forgives no JSON that is not an object
            raise ValueError(
                f"{self.folder}: the _CHECKPOINT_METADATA of a checkpoint in it is damaged "
                f"({_line(error)}); remove the folder of that step"
            ) from error
        for step in self._manager.all_steps() if best else ():
            with contextlib.suppress(Damaged):  # `restore` says so
                described = _readable(functools.partial(self._described, step))
                if best in described.get("metrics", {}):
                    self._best.values[step] = described["metrics"][best]

    def steps(self) -> list[int]:
        """The steps that are stored, the newest one first, without those found damaged."""
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        return [step for step in steps if step not in self._damaged]

    def latest(self) -> int | None:
        """The newest step that is stored, or None; waits for one that is being written."""
        return next(iter(self.steps()), None)

    def names(self) -> list[str]:
        """The paths of the arrays of the newest checkpoint, which must exist."""
        return sorted(self._stored(self.latest()))

    def checksums(self, step: int) -> dict[str, int]:
        """The checksum of every array of a step. Raises Damaged where they are not stored."""
        found = self._described(step)
        if "checksums" not in found:
            raise Damaged("its checksums are missing")
        return found["checksums"]

    def _described(self, step: int) -> dict:
        """What `save` has written beside the arrays of a step."""
        return self._manager.metadata(step).custom_metadata or {}

    def save(self, step: int, tree: Any, metrics: dict[str, Any] | None = None) -> None:
        """Stores a tree of arrays as `step`; does nothing if that step is stored already.

        `metrics` are those of the step, among them the one that tells the best checkpoint. Without
        it, as after a step that was not evaluated, this one is not the best. Raises OSError where
        it, or the one before, cannot be written, ValueError for a metric that does not exist.
        """
        while self._damaged:  # the run has come further from an intact one
            self._manager.delete(self._damaged.pop())
        if step in self._manager.all_steps():
            return
        flat = stacking.split_names(_flat(tree))
        self._check_room(flat)
        described = {"checksums": checksums(flat), "metrics": self._of_best(step, metrics or {})}
        try:
            arguments = ocp.args.StandardSave(flat)
            self._manager.save(step, args=arguments, custom_metadata=described, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Waits for a checkpoint that is being written. Raises OSError where it cannot be."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._not_written(error) from error

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest intact checkpoint as (step, tree), None if there is none at all.

        The tree has the types and shardings of `like`. Raises ValueError naming the first array
        that only one of the two has, or whose shapes or types differ, and where there are
        checkpoints but none is intact.
        """
        # Not by jax.tree.map, which would sort the names.
        wanted = {name: ocp.utils.to_shape_dtype_struct(x) for name, x in _flat(like).items()}
        reasons: list[str] = []
        for step in self.steps():
            try:
                found = self._read(step, wanted)
            except Damaged as error:
                reasons.append(f"{self.folder / str(step)} is damaged: {error}")
                self._damaged.append(step)
                continue
            for text in reasons:
                self._say(f"{text}; step {step} is used instead")
            leaves = [found[name] for name in wanted]
            return step, jax.tree.unflatten(jax.tree.structure(like), leaves)
        if reasons:
            raise ValueError(
                f"{'; '.join(reasons)}; no other checkpoint is left: remove {self.folder} to start "
                "this stage again"
            )
        return None

    def _read(self, step: int, wanted: dict) -> dict[str, Any]:
        """The arrays of a step. Raises Damaged, on every process if on any."""
        stored = stacking.split_names(wanted)
        sums, kept = _readable(lambda: (self.checksums(step), self._stored(step)))
        self._check(step, kept, stored)
        arguments = ocp.args.StandardRestore(stored)
        separate = _readable(lambda: self._manager.restore(step, args=arguments))
        wrong = [name for name, sum in checksums(separate).items() if sums.get(name) != sum]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise Damaged(f"{wrong[0]}{more} is not what was saved")
        return stacking.join_names(separate, wanted)

    def _stored(self, step: int) -> dict[str, Any]:
        metadata = self._manager.item_metadata(step)
        if metadata is None:
            raise Damaged("the list of its arrays is missing")
        return dict(metadata)

    def _check(self, step: int, stored: dict, wanted: dict) -> None:
        stored, wanted = (
            {name: (str(jnp.dtype(x.dtype)), tuple(x.shape)) for name, x in arrays.items()}
            for arrays in (stored, wanted)
        )
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.folder / str(step)}: {name} is {_shown(stored.get(name))} in the "
                    f"checkpoint but {_shown(wanted.get(name))} in this run; use a new workdir"
                )

    def _check_room(self, arrays: dict[str, Array]) -> None:
        """Raises OSError where the disk has no room for them, before Orbax begins to write.

        It would fail only once the disk is full, and with many messages of its threads.
        """
        if storage.in_bucket(self.folder):
            return
        needed = sum(array.nbytes for array in arrays.values())
        room = processes.first(lambda: storage.free(self.folder))
        if room < needed:
            error = f"No space left: it takes {needed / 2**20:.1f} MiB, {room / 2**20:.1f} are free"
            raise self._not_written(OSError(error))

    def _of_best(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """The metric of a step that tells the best checkpoint, {} where it has none.

        Raises ValueError for a metric that does not exist.
        """
        name = self._metric
        evaluated = any(x.startswith("eval/") for x in metrics)
        if name and name not in metrics and (evaluated or not name.startswith("eval/")):
            raise ValueError(
                f"keep_best={name!r} is no metric of this stage; it has {', '.join(metrics)}"
            )
        if name not in metrics:
            return {}
        self._best.values[step] = float(metrics[name])
        return {name: float(metrics[name])}

    def _not_written(self, error: Exception) -> OSError:
        steps = [step for step in self._manager.all_steps() if step not in self._damaged]
        kept = f"the newest complete one is step {max(steps)}" if steps else "there is none before"
        return OSError(f"{self.folder}: a checkpoint cannot be written ({_line(error)}); {kept}")

    def close(self) -> None:
        """Waits for a checkpoint that is being written. Leaving a `with` statement does it too."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_):
        self.close()


class _Best:
    """Orbax's policy that preserves the checkpoint with the best metric of those that have one.

    Orbax's own one forgets metrics when a run goes on, or fails where their file is damaged.
    """

    def __init__(self, lowest: bool):
        self.values: dict[int, float] = {}  # by step
        self._sign = -1 if lowest else 1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        known = [x.step for x in checkpoints if math.isfinite(self.values.get(x.step, math.nan))]
        best = max(known, key=lambda step: (self._sign * self.values[step], step), default=None)
        return [x.step == best for x in checkpoints]


class Clock:
    """When the time says that a stage should be saved; the same on all processes.

    Process 0 decides. Asking the others holds up the device, so with several processes it is not
    done after every step, but after ever fewer of them until the time has come.
    """

    def __init__(self, seconds: float, start: int):
        self._seconds, self._cost = seconds, 0.0
        self._since, self._when, self._next = start, time.monotonic(), start + 1

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps."""
        if done < self._next:
            return False
        due, self._next = processes.first(lambda: self._decide(done))
        return due

    def _decide(self, done: int) -> tuple[bool, int]:
        elapsed = time.monotonic() - self._when
        left = max(self._seconds, self._cost / SHARE) - elapsed
        if left <= 0 or jax.process_count() == 1:
            return left <= 0, done + 1
        steps = left / (elapsed / (done - self._since))
        return False, done + max(1, int(steps / 2))

    def saved(self, done: int, seconds: float) -> None:
        """Notes that a checkpoint was made, and how long it took."""
        self._since, self._when, self._cost = done, time.monotonic(), seconds
        self._next = done + 1


def checksums(arrays: dict[str, Array]) -> dict[str, int]:
    """The `checksum` of each array, by its name."""
    # One after the other: each is a sum over devices, and of many that are under way at once the
    # virtual devices of a busy CPU may wait for each other for ever.
    return {name: int(checksum(array)) for name, array in arrays.items()}


@jax.jit
def checksum(array: Array) -> UInt32[Array, ""]:
    """A number that is almost surely another one if any bit, or the order of elements, differs.

    The sum, modulo 2^32, of a hash of each element's bits and its place. A sum does not depend on
    how an array is split over devices, so nothing is gathered but one number. (The hash is the
    finaliser of MurmurHash3.)
    """
    bits = array
    if array.dtype != jnp.bool_:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
        bits = jax.lax.bitcast_convert_type(array, unsigned[array.dtype.itemsize])
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(_mixed(bits ^ _mixed(place + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _readable(work: Callable[[], Any]) -> Any:
    """What `work()` returns. Raises Damaged on every process where it raises on any of them."""

    def attempt() -> Any:
        try:
            return work()
        except Exception as error:  # whatever Orbax, TensorStore or a JSON parser makes of damage
            raise Damaged(_line(error)) from error

    try:
        return processes.everywhere(attempt)
    except ValueError as error:
        raise Damaged(str(error)) from error


def _shown(kind: tuple[str, tuple] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {kind[1]}"


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _flat(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree.flatten_with_path(tree)
    return {sharding.path_name(path).replace("/", "."): leaf for path, leaf in pairs}
