"""Memory of the host: what a program frees is kept for its next step."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import jax

# Parameters of glibc's mallopt(3), from malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
USERS_OWN = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
ACCELERATORS = ("nvidia*", "kfd", "accel*", "vfio/[0-9]*")  # in /dev: GPUs, AMD's too, and TPUs


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed, where jax computes on the CPU under glibc: whether it does.

    The CPU's compiled programs ask malloc for their temporaries, all in one piece, at every call.
    By default glibc maps such a piece anew each time, and the 150,000 to 275,000 page faults of a
    training step are a seventh of its processor time. With this there are none once the heap has
    found its size, which can be that of two such pieces, and which never shrinks.
    Call it before jax is used, because threads that exist keep the arena that they have. Nothing
    changes if the environment has settings of its own for malloc (`USERS_OWN`), or beside an
    accelerator, whose host holds whole models for a short time and should give that memory back.
    """
    accelerated = any(any(Path("/dev").glob(name)) for name in ACCELERATORS)
    if accelerated and jax.config.jax_platforms != "cpu":
        return False
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in USERS_OWN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1  # as an unsigned size, the largest
    settings = ((TRIM_THRESHOLD, never), (MMAP_MAX, 0), (ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
