"""The speed of a stage: tokens per second, model-FLOPs utilisation, and memory of the devices."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from rlhf_jax import chips


class Speed:
    """The wall time, tokens and model FLOPs of the steps so far. `now` is a time in seconds.

    Averages leave out the first step, because it compiles. `devices` are those that the steps run
    on, and `peak` their FLOPs per second together; without it there is no utilisation.
    """

    def __init__(self, now: float, devices: Sequence[jax.Device] = (), peak: float | None = None):
        self.devices, self.peak = devices, peak
        self.began = self.last = now
        self.first_ended: float | None = None
        self.steps = 0
        self.tokens = 0.0
        self.flops = 0.0

    def add(self, now: float, tokens: float, flops: float = 0.0) -> dict[str, float]:
        """Counts a step that ended at `now`: its metrics, of which the first step has none.

        What was not counted (0 tokens, 0 FLOPs) has no metric. The memory is the most that one of
        this process's devices has held at once so far, where the device tells.
        """
        elapsed, self.last = max(now - self.last, 1e-9), now
        if self.first_ended is None:
            self.first_ended = now
            return {}
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        found = {}
        if tokens:
            found["tokens_per_second"] = tokens / elapsed
            if self.devices:
                found["tokens_per_second_per_device"] = tokens / elapsed / len(self.devices)
        if flops and self.peak:
            found["model_flops_utilisation"] = flops / elapsed / self.peak
        memory = peak_memory(self.devices)
        return found if memory is None else {**found, "device_memory_gib": memory / chips.GIB}

    @property
    def seconds(self) -> float:
        """From the beginning of the stage to the end of the newest step."""
        return self.last - self.began

    @property
    def tokens_per_second(self) -> float:
        """The mean over the steps after the first."""
        return self.tokens / max(self.last - self.first_ended, 1e-9)

    @property
    def utilisation(self) -> float | None:
        """The mean model-FLOPs utilisation of the steps after the first; None where unknown."""
        if not (self.flops and self.peak):
            return None
        return self.flops / max(self.last - self.first_ended, 1e-9) / self.peak

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over the steps after the first; None before there are any."""
        return (self.last - self.first_ended) / self.steps if self.steps else None


def peak_memory(devices: Sequence[jax.Device]) -> int | None:
    """The most bytes that one of this process's devices has held at once; None where unknown.

    Reading it does not wait for the device. CPUs do not tell.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in local]
    known = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return max(known) if known else None
