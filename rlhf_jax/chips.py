"""What devices can do at most: peak rates by the kind of device, from their makers, or measured.

A share of a peak rate is comparable between machines only if both use the same peak, so the table
holds the makers' figures for dense bfloat16 products (without sparsity). A CPU is not in it: its
rate depends on how many cores a process may use, so that it is measured.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Chip(NamedTuple):
    """The peak figures of one device."""

    flops: float  # per second, dense bfloat16 products
    hbm: float  # bytes of its memory
    bandwidth: float  # bytes per second between the device and its memory
    source: str


GIB = 2**30
_TPU = "Google Cloud TPU documentation, page of the chip; hbm: what libtpu 0.0.42 says is available"
_H100 = "NVIDIA H100 data sheet, figures with sparsity halved"
_H200 = "NVIDIA H200 data sheet, figures with sparsity halved"
_A100 = "NVIDIA A100 data sheet"
# The keys begin as `Device.device_kind` does; the longest that fits counts.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75 * GIB, 1.2e12, _TPU),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 0.819e12, _TPU),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2.765e12, _TPU),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1.64e12, _TPU),
    "NVIDIA H100": Chip(989.5e12, 80e9, 3.35e12, _H100),
    "NVIDIA H100 PCIe": Chip(756.5e12, 80e9, 2.0e12, _H100),
    "NVIDIA H100 NVL": Chip(835.5e12, 94e9, 3.9e12, _H100),
    "NVIDIA H200": Chip(989.5e12, 141e9, 4.8e12, _H200),
    "NVIDIA H200 NVL": Chip(835.5e12, 141e9, 4.8e12, _H200),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1.555e12, _A100),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40e9, 1.555e12, _A100),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.039e12, _A100),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1.935e12, _A100),
}


def find(device_kind: str) -> Chip | None:
    """The chip of a `Device.device_kind`, None for one that the table does not have."""
    fitting = [kind for kind in CHIPS if device_kind.startswith(kind)]
    return CHIPS[max(fitting, key=len)] if fitting else None


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOPs per second of all the devices together; None if their kind is not known.

    On CPUs it is the measured rate of a float32 product times the number of processes, because the
    virtual devices of a process share its cores.
    """
    if devices[0].platform == "cpu":
        return _rate_of_this_cpu() * len({device.process_index for device in devices})
    chip = find(devices[0].device_kind)
    return None if chip is None else chip.flops * len(devices)


def memory(devices: Sequence[jax.Device]) -> float | None:
    """Bytes of the memory of all the devices together; None if it is not known.

    The virtual devices of a process on a CPU share the memory of its host.
    """
    if devices[0].platform == "cpu":
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return float(host) * len({device.process_index for device in devices})
    chip = find(devices[0].device_kind)
    return None if chip is None else chip.hbm * len(devices)


@functools.cache
def _rate_of_this_cpu() -> float:
    return product_rate()


def product_rate(size: int = 1024, dtype: str = "float32") -> float:
    """Measures the FLOPs per second of a [size, size] product on one device, the best of five."""
    with _on_one_device():
        x = jnp.full((size, size), 1 / size, dtype)
        return 2.0 * size**3 / min(timed(jax.jit(lambda y: y @ x), x, 5)[0])


def copy_rate(megabytes: int = 256) -> float:
    """Measures the bytes per second, read and written, of x + 1 in place, the best of five."""
    with _on_one_device():
        x = jnp.zeros(megabytes * 2**18, jnp.float32)
        bytes_moved = 2.0 * x.nbytes
        return bytes_moved / min(timed(jax.jit(lambda y: y + 1, donate_argnums=0), x, 5)[0])


def _on_one_device():
    """Programs run on this process's first device, whatever mesh the caller has set."""
    return jax.set_mesh(jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("device",)))


def timed(step: Callable[[Any], Any], state: Any, repeats: int) -> tuple[list[float], Any]:
    """(seconds of each of `repeats` steps state -> state, the last state).

    One step before them does not count. A step is over when its state is there.
    """
    state, taken = jax.block_until_ready(step(state)), []
    for _ in range(repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        taken.append(time.perf_counter() - start)
    return taken, state
