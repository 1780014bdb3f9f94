"""What the processes of one run tell each other, by way of their devices.

A program on several hosts is the same program once per host, and every process must enqueue the
same collectives in the same order. So whatever is read from a disk or a clock is decided by process
0 for all (`first`), or checked to be the same everywhere (`everywhere`, `agree`). With one process
all of these are ordinary calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def texts(text: str) -> list[str]:
    """The text that each process passes, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size)).tolist()
    # A power of two, so that texts of about the same length share a compiled program.
    padded = np.zeros(1 << (max(sizes) - 1).bit_length() if max(sizes) else 1, np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def first(decide: Callable[[], Any]) -> Any:
    """What `decide()` returns on process 0 (JSON's types), on every process.

    The others do not call it, and wait until it has returned. If it raises, process 0 raises that
    error, and the others a ValueError with its text.
    """
    if jax.process_count() == 1:
        return decide()
    if jax.process_index() == 0:
        try:
            told = {"value": decide()}
        except Exception as error:
            texts(json.dumps({"error": _line(error)}))
            raise
        texts(json.dumps(told))
        return told["value"]
    told = json.loads(texts("")[0])
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


def everywhere(work: Callable[[], Any]) -> Any:
    """What `work()` returns here, once it has returned on every process.

    Where it raises a ValueError or OSError on any process, all of them raise: the others a
    ValueError that names the process. So none of them waits for one that has given up.
    """
    if jax.process_count() == 1:
        return work()
    try:
        value = work()
    except (ValueError, OSError) as error:
        texts(_line(error))
        raise
    for process, error in enumerate(texts("")):
        if error:
            raise ValueError(f"process {process}: {error}")
    return value


def agree(what: str, fingerprint: Callable[[], str]) -> None:
    """Raises ValueError, on every process, unless `fingerprint()` is the same on all of them.

    It is only computed where there are several processes. `what` is how the error begins.
    """
    if jax.process_count() == 1:
        return
    found = texts(fingerprint())
    for process, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"{what} on process {process} is not what process 0 has; give every host the same "
                "files and start it with the same command"
            )


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
