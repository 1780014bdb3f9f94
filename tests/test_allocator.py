"""Freed memory is kept from step to step, where that is glibc's to decide."""

import os
import subprocess
import sys

import pytest

from rlhf_jax import allocator

PROGRAM = """
import resource
from rlhf_jax import allocator
kept = allocator.keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # with a temporary of 64 MB
    return jnp.tanh(x @ x.T) @ x

x, faults = jnp.ones((4096, 8)), []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


def faults(**environment):
    """(whether memory is kept, the fewest page faults of a step) of a new process."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"} | environment
    ours = {x: value for x, value in os.environ.items() if x not in allocator.USERS_OWN}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=ours | own,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = found.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_step_maps_no_memory_anew_unless_the_user_has_settings_of_their_own():
    kept, count = faults()
    assert kept and count < 100
    kept, count = faults(MALLOC_ARENA_MAX="8")
    assert not kept and count > 10_000  # 64 MB in pages of 4 kB are 16,384
