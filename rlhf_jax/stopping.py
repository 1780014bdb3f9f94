"""How a run is told to stop: by SIGTERM (a scheduler that needs the machine) or by ctrl-C.

While a stage trains, the first signal lets the step that runs come to its end and be saved.
Anywhere else, and for the second ctrl-C, the program stops at once. A further signal while it is
stopping ends the process without more words. None of them costs more than the steps since the last
checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils


class Terminated(BaseException):
    """SIGTERM was received: like KeyboardInterrupt, not an error that anything should catch."""


def leave(error: KeyboardInterrupt | Terminated, text: str) -> NoReturn:
    """Ends the process at once, having printed a line, with the exit code of the signal.

    For where other threads compute: they cannot be told to end, and Python aborts if it ends first.
    """
    interrupted = isinstance(error, KeyboardInterrupt)
    name, number = ("interrupted", signal.SIGINT) if interrupted else ("terminated", signal.SIGTERM)
    print(f"{name}{text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(128 + number)


class Stop:
    """What a run asks after every step, and what the signals set.

    An object that no `handled` has connected to the signals never asks for anything, so that Python
    itself answers ctrl-C, as in a notebook.

    With several processes jax's coordination service watches for SIGTERM, in place of Python: a
    signal to one of them stops all of them after the same step, and outside of training it waits
    for the next stage. Ctrl-C stops a process at once.
    """

    def __init__(self):
        self._signal: int | None = None  # received, and not yet obeyed
        self._waits = False  # whether a stage is training
        self._ending = False
        self._steps = 0

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Connects the signals for as long as the body runs; in the main thread alone."""
        several = jax.process_count() > 1
        if several or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def after_steps(self) -> Iterator[None]:
        """In the body a first signal waits until `asked` is called."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def asked(self) -> bool:
        """Whether to save and stop after this step; the same on all processes.

        Every process calls it after every step.
        """
        if jax.process_count() == 1:
            return self._signal is not None
        self._steps += 1
        if multihost_utils.reached_preemption_sync_point(self._steps):
            self._signal = signal.SIGTERM
        return self._signal is not None

    def obey(self) -> None:
        """Raises what belongs to the signal that `asked` has seen."""
        self._ending = True
        raise Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _receive(self, number: int, frame) -> None:
        del frame
        if self._ending:
            os._exit(128 + number)
        if self._waits and self._signal is None:
            self._signal = number
            how = " (ctrl-C again: at once)" if number == signal.SIGINT else ""
            print(f"stopping after this step{how}", file=sys.stderr, flush=True)
            return
        self._signal = number
        self.obey()
