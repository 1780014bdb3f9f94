"""Batches of a tokenised dataset, drawn with Grain.

Batch i is a function of (seed, i) alone: every epoch is one reshuffle of the whole dataset,
batches run on across epochs, and each process reads its rows of the same global batch. So the
position of a run is one number, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rlhf_jax.data.records import Batch, Examples


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of `examples`, numbered without end across reshuffled epochs.

    With shuffle=False every epoch is in the order of the dataset. A batch larger than the dataset
    holds rows of several epochs. Raises ValueError without examples, or for a batch size or a seed
    out of range.
    """

    examples: Examples
    batch_size: int  # rows of the global batch, over all processes
    seed: int = 0
    shuffle: bool = True
    places: tuple[int, ...] | None = None  # of the global batch that are read; None: all

    def __post_init__(self):
        if len(self.examples) == 0:
            raise ValueError("there are no examples to draw batches from; check the dataset")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")

    def __len__(self) -> int:
        """Number of batches in one epoch, the last partial one included."""
        return -(-len(self.examples) // self.batch_size)

    def reading(self, places: Int[np.ndarray, " N"]) -> Loader:
        """The same batches, of which only these places are read: what one process needs.

        `places` are in 0..batch_size - 1, and a place may be read several times. [N]
        """
        return dataclasses.replace(self, places=tuple(places.tolist()))

    def batch(self, i: int) -> Batch:
        """Batch i >= 0, a function of (seed, i)."""
        if i < 0:
            raise ValueError(f"batch number {i} must be 0 or more")
        return self._pipeline()[i]

    def from_position(self, i: int) -> Iterator[Batch]:
        """Batches i, i + 1, ... without end, prefetched by a background thread."""
        import grain

        if i < 0:
            raise ValueError(f"batch number {i} must be 0 or more")
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(self._pipeline()[i:].to_iter_dataset(options))

    def epoch_batches(self) -> list[Batch]:
        """Every example once, in the order of the dataset, in batches of one shape.

        The last batch is filled up with padding rows: attend and mask 0, index -1.
        `records.real_rows` counts the real ones.
        """
        index = np.arange(len(self) * self.batch_size)
        index = np.where(index < len(self.examples), index, -1).reshape(len(self), self.batch_size)
        return [self.examples.gather(rows[self._places()]) for rows in index]

    def _places(self) -> np.ndarray | slice:
        return slice(None) if self.places is None else np.array(self.places, np.int64)

    def _pipeline(self):
        import grain

        places = self._places()
        count = len(self.examples)

        def gather(i: int, rows: np.ndarray):
            # In 64 bits, because the positions of a long run pass 2^31.
            epoch = (i * self.batch_size + np.arange(self.batch_size, dtype=np.int64)) // count
            return self.examples.gather((rows + count * (epoch - epoch[0]))[places])

        order = grain.MapDataset.range(count)
        if self.shuffle:
            # Grain shuffles epoch e by seed + e, so that seeds 0 and 1 would share all epochs but
            # one. Spread the seeds first.
            spread = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
            order = order.shuffle(seed=spread)
        return order.repeat(sys.maxsize // count).batch(self.batch_size).map_with_index(gather)


class Together(NamedTuple):
    """Batch i of each loader, as a tuple; None for a loader that is None."""

    loaders: tuple[Loader | None, ...]

    def from_position(self, i: int) -> Iterator[tuple[Batch | None, ...]]:
        """Tuples of batches i, i + 1, ... without end; see `Loader.from_position`."""
        return zip(*(x.from_position(i) if x else itertools.repeat(None) for x in self.loaders))


def expect(loader: Any, caller: str, *kinds: type) -> None:
    """Raises ValueError unless `loader` is a Loader whose batches are of one of `kinds`.

    `caller` names the function that takes the loader, for the error: `expect(demonstrations,
    "sft.run", Demonstrations)`.
    """
    names = [kind.__name__ for kind in kinds]
    wanted = " or ".join(name.lower() for name in names)
    if not isinstance(loader, Loader):
        raise ValueError(
            f"{caller} takes a Loader of {wanted}, got {type(loader).__name__}; "
            "make one by batches.Loader(examples, batch_size)"
        )
    found = loader.examples.kind.__name__
    if found not in names:
        builders = " or ".join(f"batches.{name.lower()}(...)" for name in names)
        raise ValueError(
            f"{caller} takes {wanted}, but the loader draws {found}; build them with {builders}"
        )
