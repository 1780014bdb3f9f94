"""Batches of a tokenised dataset, drawn with Grain.

Batch i is a function of (seed, i) alone: every epoch is one reshuffle of the whole dataset,
batches run on across epochs, and hosts read slices of the same global batch. So the position of a
run is one number, whatever the number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_jax.data.records import Batch, Examples


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of `examples`, numbered without end across reshuffled epochs.

    With shuffle=False every epoch is in the order of the dataset. A batch larger than the dataset
    holds rows of several epochs. Raises ValueError without examples, or for a batch size or a seed
    out of range.
    """

    examples: Examples
    batch_size: int  # rows of the global batch, over all hosts
    seed: int = 0
    shuffle: bool = True

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

    def batch(self, i: int) -> Batch:
        """Global batch i >= 0, a function of (seed, i)."""
        return self.host_batch(i, host=0, hosts=1)

    def host_batch(self, i: int, host: int, hosts: int) -> Batch:
        """The rows of global batch i that `host` of `hosts` reads: one contiguous slice.

        Raises ValueError if the batch does not divide over the hosts.
        """
        if i < 0:
            raise ValueError(f"batch number {i} must be 0 or more")
        return self._pipeline(host, hosts)[i]

    def from_position(
        self, i: int, host: int | None = None, hosts: int | None = None
    ) -> Iterator[Batch]:
        """Batches i, i + 1, ... without end, prefetched by a background thread.

        `host` of `hosts` reads its slices; by default this process among jax's processes.
        """
        import grain

        if i < 0:
            raise ValueError(f"batch number {i} must be 0 or more")
        pipeline = self._pipeline(*_this_host(host, hosts))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(pipeline[i:].to_iter_dataset(options))

    def epoch_batches(self, host: int | None = None, hosts: int | None = None) -> list[Batch]:
        """Every example once, in the order of the dataset, in batches of one shape.

        The last batch is filled up with padding rows: attend and mask 0, index -1.
        `records.real_rows` counts the real ones. Hosts read slices as in `from_position`.
        """
        host, hosts = _this_host(host, hosts)
        part = self._slice(host, hosts)
        index = np.arange(len(self) * self.batch_size)
        index = np.where(index < len(self.examples), index, -1).reshape(len(self), self.batch_size)
        return [self.examples.gather(rows[part]) for rows in index]

    def _slice(self, host: int, hosts: int) -> slice:
        if self.batch_size % hosts or not 0 <= host < hosts:
            raise ValueError(
                f"batch_size={self.batch_size} rows cannot be split for host {host} of {hosts}; "
                "use a multiple of the number of hosts, which count from 0"
            )
        rows = self.batch_size // hosts
        return slice(host * rows, (host + 1) * rows)

    def _pipeline(self, host: int, hosts: int):
        import grain

        part = self._slice(host, hosts)
        count = len(self.examples)

        def gather(i: int, rows: np.ndarray):
            # In 64 bits, because the positions of a long run pass 2^31.
            epoch = (i * self.batch_size + np.arange(self.batch_size, dtype=np.int64)) // count
            return self.examples.gather((rows + count * (epoch - epoch[0]))[part])

        order = grain.MapDataset.range(count)
        if self.shuffle:
            # Grain shuffles epoch e by seed + e, so that seeds 0 and 1 would share all epochs but
            # one. Spread the seeds first.
            spread = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
            order = order.shuffle(seed=spread)
        return order.repeat().batch(self.batch_size).map_with_index(gather)


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


def _this_host(host: int | None, hosts: int | None) -> tuple[int, int]:
    if host is None or hosts is None:
        import jax

        return jax.process_index(), jax.process_count()
    return host, hosts
