"""Runs of a sweep in step: where they call the same program, one vmapped program does it for all.

Every run has a thread of its own, and only one thread works at a time: it has the turn. A run that
comes to a program of an online stage hands in its arguments and gives the turn away. The last one
to come stacks the arguments of all, runs the vmapped program once, and everyone takes its own
results. So an experiment is written as if it ran alone, and the data, logs, checkpoints and
evaluations of the runs are those of single ones. Arguments that came out of such a program are not
stacked again.

Runs differ in numbers (coefficients, rates, seeds) and in their data. Where the shapes or settings
of their programs differ, or one of them has ended, the others go on alone, and say so.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import stopping

# An iteration is three or four programs, none of which reads all that the others leave behind.
KEPT = 5


class Call(NamedTuple):
    """What a run has handed in."""

    program: Callable
    arguments: tuple


class _Stacked(NamedTuple):
    """Arrays of all runs, kept so that their identities stay theirs, and as one array."""

    each: list
    whole: jax.Array
    used: int  # the program that read or wrote them last


class Together:
    """The meeting point of `count` runs."""

    def __init__(self, count: int, say: Callable[[str], None]):
        self._count, self._say = count, say
        self._turn = threading.Condition()
        self._busy = False  # whether a thread has the turn
        self._calls: dict[int, Call] = {}
        self._results: dict[int, Any] = {}
        self._apart = False  # whether the runs go on alone
        self._vmapped: dict[Callable, Callable] = {}
        self._stacked: dict[tuple[int, ...], _Stacked] = {}
        self.programs_run = 0  # for all together

    def run(self, works: Sequence[Callable[[Member], Any]]) -> list[Future]:
        """Runs every work with its member, and returns what each returned or raised."""
        found = [Future() for _ in works]

        def work(i: int) -> None:
            self._take_turn()
            try:
                found[i].set_result(works[i](Member(self, i)))
            except BaseException as error:
                found[i].set_exception(error)
            finally:
                self._leave()

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(works))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except (KeyboardInterrupt, stopping.Terminated) as error:
            # While a stage trains, a signal waits for its step, so no step is lost here.
            stopping.leave(error, "; the same command goes on from the last checkpoints")
        return found

    def call(self, i: int, program: Callable, arguments: tuple) -> Any:
        """The result of `program(*arguments)` for run i, once all runs have come to it."""
        with self._turn:
            if not self._apart:
                self._calls[i] = Call(program, arguments)
                if len(self._calls) == self._count:
                    self._meet()
                else:
                    self._busy = False
                    self._turn.notify_all()
                    self._turn.wait_for(
                        lambda: not self._busy and (i in self._results or self._apart)
                    )
                    self._busy = True
                if i in self._results:
                    return self._results.pop(i)
                self._calls.pop(i, None)
        return program(*arguments)

    def _meet(self) -> None:
        """Runs the program for all; leaves no results where they must go on alone."""
        calls = [self._calls[i] for i in range(self._count)]
        self._calls.clear()
        why = _difference(calls)
        if why is not None:
            self._part(why)
            return
        program = calls[0].program
        if program not in self._vmapped:
            self._vmapped[program] = jax.jit(jax.vmap(program))
        leaves = [jax.tree.leaves(call.arguments) for call in calls]
        stacked = [self._stack(list(each)) for each in zip(*leaves)]
        arguments = jax.tree.unflatten(jax.tree.structure(calls[0].arguments), stacked)
        result = self._vmapped[program](*arguments)
        parts = _unstacked(self._count)(result)
        for whole, *each in zip(*map(jax.tree.leaves, (result, *parts))):
            self._stacked[tuple(map(id, each))] = _Stacked(each, whole, self.programs_run)
        self.programs_run += 1
        recent = self.programs_run - KEPT
        self._stacked = {k: x for k, x in self._stacked.items() if x.used >= recent}
        self._results = dict(enumerate(parts))

    def _stack(self, each: list) -> jax.Array:
        """An array of every run as one, or that which they were taken from."""
        key = tuple(map(id, each))
        found = self._stacked.get(key)
        whole = jnp.stack(list(map(jnp.asarray, each))) if found is None else found.whole
        self._stacked[key] = _Stacked(each, whole, self.programs_run)
        return whole

    def _part(self, why: str) -> None:
        if not self._apart:
            self._say(f"the runs go on one by one: {why}")
        self._apart = True
        self._stacked.clear()
        self._turn.notify_all()

    def _take_turn(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: not self._busy)
            self._busy = True

    def _leave(self) -> None:
        with self._turn:
            self._busy = False
            if self._calls:  # the others would wait for ever
                self._part("one of them has ended before the others")
            self._apart = True
            self._turn.notify_all()


class Member(NamedTuple):
    """One of the runs."""

    together: Together
    number: int

    def of(self, program: Callable) -> Callable:
        """What a run calls in place of a compiled program."""

        def call(*arguments):
            return self.together.call(self.number, program, arguments)

        return call


def _difference(calls: Sequence[Call]) -> str | None:
    """Why calls cannot be one; None if they can."""
    first = calls[0]
    for other in calls[1:]:
        if other.program is not first.program:
            return "they call different programs"
        if jax.tree.structure(other.arguments) != jax.tree.structure(first.arguments):
            return "their programs have different settings"
        shapes = [
            [jnp.shape(x) for x in jax.tree.leaves(call.arguments)] for call in (first, other)
        ]
        if shapes[0] != shapes[1]:
            return "their data have different shapes"
    return None


@functools.lru_cache(maxsize=16)
def _unstacked(count: int) -> Callable:
    """A program that takes an array of all runs apart, in every place of a tree."""

    def parts(tree: Any) -> list[Any]:
        return [jax.tree.map(operator.itemgetter(i), tree) for i in range(count)]

    return jax.jit(parts)
