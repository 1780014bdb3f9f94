"""One run in one folder: a lock that a process holds for as long as it runs.

The file `.lock` in the folder says who holds it: host, process and since when. On a disk it is
locked for this process by the operating system, which frees it when the process ends, however it
ends; what a killed process has left behind therefore hinders nobody. Across hosts this works where
the file system passes locks on, as NFS does. Where it does not, and in a bucket, which has no locks
at all, the holder writes a heartbeat into the file every `BEAT` seconds. Who finds the name of
another host in it waits for `PATIENCE` seconds: if the heartbeat goes on, the folder is in use.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator

from rlhf_jax import storage
from rlhf_jax.storage import Path

NAME = ".lock"
BEAT = 10.0  # seconds
PATIENCE = 25.0  # seconds
_HELD = (errno.EACCES, errno.EAGAIN)
_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")  # this process is there
_MINE: set[str] = set()  # the folders whose locks this process holds
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it does not exist, while the body runs.

    Raises InUse naming the holder if another process has it, or waits for that one if there is a
    function `say` that can be told so. Another run of this process is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = os.fspath(storage.absolute(folder))
    if key in _MINE:  # which the operating system would grant once more
        raise InUse(f"{folder} is in use by another run of this process; name another folder")
    file = _open(folder / NAME, say)
    _MINE.add(key)
    try:
        _wait_for_other_host(file)
        ended = threading.Event()
        file.write(_holder(0))
        beats = threading.Thread(target=_beat, args=(file, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            with contextlib.suppress(OSError):
                file.path.unlink()  # while it is still locked
    finally:
        _MINE.remove(key)
        file.close()


class InUse(ValueError):
    """Another process has the lock."""


def _open(path: Path, say: Callable[[str], None] | None) -> _File:
    said = False
    while True:
        try:
            return _File(path)
        except InUse as error:
            if say is None:
                raise
            if not said:
                say(f"waiting: {error}")
            said = True
            time.sleep(1.0)


class _File:
    """The file of a lock: on a disk opened once and locked, because closing it frees the lock."""

    def __init__(self, path: Path):
        self.path = path
        self._opened = None if storage.in_bucket(path) else _lock(path)

    def read(self) -> bytes:
        if self._opened is not None:
            return os.pread(self._opened, 2**16, 0)
        return self.path.read_bytes() if self.path.exists() else b""

    def write(self, text: str) -> None:
        if self._opened is None:
            storage.write(self.path, text)
            return
        os.pwrite(self._opened, text.encode(), 0)
        os.ftruncate(self._opened, len(text.encode()))

    def close(self) -> None:
        if self._opened is not None:
            os.close(self._opened)


def _lock(path: Path) -> int | None:
    """The opened file, locked; None where the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not `flock`, which processes that this one has forked would go on holding.
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that has finished may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(opened).st_ino:
                    return opened
        except OSError as error:
            found = os.pread(opened, 2**16, 0)
            os.close(opened)
            if error.errno in _HELD:
                raise _in_use(path, found) from None
            if error.errno in _NO_LOCKS:
                return None
            raise
        os.close(opened)


def _wait_for_other_host(file: _File) -> None:
    """Raises ValueError if a process that the operating system does not know of is alive."""
    before = file.read()
    holder = _parsed(before)
    known = not storage.in_bucket(file.path) and holder and holder["host"] == platform.node()
    if holder is None or known:
        return
    time.sleep(PATIENCE)
    now = file.read()
    if now and now != before:
        raise _in_use(file.path, now)


def _beat(file: _File, ended: threading.Event) -> None:
    """Writes the heartbeat until the run has ended."""
    count = 0
    while not ended.wait(BEAT):
        count += 1
        with contextlib.suppress(OSError):  # a full disk is for others to report
            file.write(_holder(count))


def _holder(beat: int) -> str:
    who = {"host": platform.node(), "process": os.getpid()}
    return json.dumps(who | {"since": _SINCE, "beat": beat}) + "\n"


def _parsed(found: bytes) -> dict | None:
    """Who holds a lock; None for a file that is empty or was not written to its end."""
    try:
        holder = json.loads(found)
    except ValueError:
        return None
    complete = isinstance(holder, dict) and {"host", "process", "since"} <= holder.keys()
    return holder if complete else None


def _in_use(path: Path, found: bytes) -> InUse:
    holder = _parsed(found)
    who = "another process"
    if holder is not None:
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    return InUse(
        f"{path.parent} is in use by {who}; wait for it, stop it, or name another --workdir"
    )
