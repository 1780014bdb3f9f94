"""Several hosts: how the processes of a run find each other, and what they must agree on.

`start` calls `jax.distributed.initialize`, whose own detection knows Cloud TPU (also on GKE), SLURM
and Open MPI; elsewhere the coordinator is named by flags. Everything else (devices, collectives,
checkpoints) is jax's and Orbax's.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from rlhf_jax import processes
from rlhf_jax.training.metrics import flat

# How long a process that ends waits for the others to end before the run is given up, seconds.
SHUTDOWN_SECONDS = 30
CLOUD_TPU = "Cloud TPU"
BAD_INPUT = 2  # the exit code, as in `launch.Exit`


class Flags(NamedTuple):
    """How the processes find each other; None leaves it to what the environment says."""

    coordinator: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300  # seconds to wait for the coordinator and for all processes


def start(flags: Flags) -> None:
    """Joins the other processes of this run, if there are any; to be called before devices are.

    There are where the flags say so, or the environment: a task of SLURM or Open MPI that has
    others beside it, a Cloud TPU host. `num_processes=1` switches this off. Does nothing where
    `jax.distributed.initialize` has been called already.

    Raises ValueError for flags that contradict each other, for a coordinator that cannot be
    reached in time, and where devices have been used before.
    """
    _check(flags)
    if jax.distributed.is_initialized() or flags.num_processes == 1:
        return
    if flags.coordinator is None and not _environment():
        return
    where = flags.coordinator or f"the coordinator that {_environment()} names"
    late = (
        f"error: {where} was not reached, or not all processes had come, within {flags.timeout} "
        "seconds; check the address and that every host runs the same command "
        "(--coordinator-timeout waits longer)"
    )
    # jax ends a process that waits in vain by an abort with a stack trace, which cannot be caught.
    with _deadline(flags.timeout, BAD_INPUT, late):
        try:
            jax.distributed.initialize(
                flags.coordinator,
                flags.num_processes,
                flags.process_id,
                initialization_timeout=2 * flags.timeout + 60,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except ValueError as error:  # jax finds no address, or no numbers
            alone = "," not in os.environ.get("TPU_WORKER_HOSTNAMES", "")
            if flags.coordinator is None and _environment() == CLOUD_TPU and alone:
                return  # a TPU that belongs to no pod
            raise ValueError(
                f"jax does not find the other processes ({_first_line(error)}); name them by "
                "--coordinator, --num-processes and --process-id, or look for none by "
                "--num-processes 1"
            ) from error
        except RuntimeError as error:
            if "before any JAX" in str(error):
                if flags.coordinator is None and _environment() == CLOUD_TPU:
                    return  # as in a notebook; the TPU itself knows the other hosts
                raise ValueError(
                    "devices have been used already, so that the processes cannot be joined any "
                    "more; call launch, or jax.distributed.initialize, before anything else"
                ) from error
            why = _first_line(error)
            raise ValueError(f"{where}: the processes could not be joined ({why})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _deadline(seconds: int, code: int, message: str) -> Iterator[None]:
    """Ends the process with a line on stderr unless the body is done in time."""

    def end() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def fail(code: int) -> None:
    """To be called before a process ends with an error that the others may not have.

    A process that ends waits for the others. If they are in the middle of a computation that needs
    this process, they never come, and jax aborts all of them. So this one leaves before that, with
    its own exit code. Does nothing where there is one process.
    """
    if not jax.distributed.is_initialized():
        return
    ending = threading.Event()

    def leave() -> None:
        ending.wait()
        time.sleep(SHUTDOWN_SECONDS - 5)
        os._exit(code)

    threading.Thread(target=leave, daemon=True).start()
    atexit.register(ending.set)  # called before jax's own, which waits: the last one comes first


def _check(flags: Flags) -> None:
    if flags.timeout < 1:
        raise ValueError(f"--coordinator-timeout {flags.timeout} must be at least 1 second")
    named = (flags.num_processes, flags.process_id)
    if flags.coordinator is None:
        if flags.process_id is not None or flags.num_processes not in (None, 1):
            raise ValueError(
                "--num-processes and --process-id need --coordinator host:port, the address of "
                "process 0"
            )
        return
    if not re.fullmatch(r".+:\d+", flags.coordinator):
        raise ValueError(f"--coordinator {flags.coordinator} is not host:port; name both")
    if None in named and not _environment():
        raise ValueError(
            "--coordinator needs --num-processes and --process-id where no scheduler says them"
        )
    if None not in named and not 0 <= flags.process_id < flags.num_processes:
        raise ValueError(
            f"--process-id {flags.process_id} is not in 0..{flags.num_processes - 1}: processes "
            "are counted from 0"
        )


def _environment() -> str | None:
    """What says that there may be several processes, None if nothing does.

    Only whether to ask jax is decided here; addresses and numbers are those that jax detects.
    """
    variables = os.environ
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        return "SLURM"
    tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
    if tpu and importlib.util.find_spec("libtpu") and variables.get("JAX_PLATFORMS") != "cpu":
        return CLOUD_TPU
    return None


def check_same(described: dict) -> None:
    """Raises ValueError, on every process, naming the fields in which their descriptions differ.

    A description is what `workdir.describe` returns, and whatever else must be the same; the code
    and the version of jax are compared with it.
    """
    if jax.process_count() == 1:
        return
    described = described | {"code": _code(), "jax": jax.__version__}
    found = [flat(json.loads(text)) for text in processes.texts(json.dumps(described))]
    for process, other in enumerate(found):
        names = [x for x in found[0] | other if found[0].get(x, ()) != other.get(x, ())]
        if names:
            listed = ", ".join(f"{x}: {_shown(found[0], x)} and {_shown(other, x)}" for x in names)
            raise ValueError(
                f"process 0 and process {process} were started differently: {listed}; start every "
                "host with the same command, code and files"
            )


def _code() -> str:
    """A hash of this library's source files and of the program's."""
    program = vars(sys.modules["__main__"]).get("__file__")
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    digest = hashlib.blake2b(digest_size=8)
    for file in [*files, *([pathlib.Path(program)] if program else [])]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _shown(values: dict, name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"
