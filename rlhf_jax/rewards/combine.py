"""Rewards made of rewards: weighted sums, a cache, several processes.

short = text.without_reference(functools.partial(text.length_penalty, free=50, longest=100))
reward = weighted({"bleu": (1.0, text.against(text.sentence_bleu)), "long": (-0.1, short)})
reward = cached(in_processes(reward, 8))
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import numbers
import signal
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from multiprocessing import connection, reduction
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data.schema import Example
from rlhf_jax.rewards import host
from rlhf_jax.rewards.host import Reward, RewardFailed, Scored

_ARGUMENTS = ("prompts", "responses", "rows")
_AT_MOST = 5.0  # seconds until a process that has closed its pipe has ended
_PARTS = 4  # of a batch per process, so that a slow part does not leave the others without work


def weighted(parts: Mapping[str, tuple[float | int, Reward]]) -> Reward:
    """The sum of weight times reward over `parts`, which maps names to (weight, reward).

    Each part is reported by its name, without its weight ("reward/bleu"); a part that has parts
    itself reports these too ("reward/mix/bleu"). Raises ValueError for a weight that is no finite
    number, for a name that a run has taken, and for a reward of other arguments.
    """
    if not parts:
        raise ValueError("weighted({}) has no parts; give at least one {name: (weight, reward)}")
    for name, part in parts.items():
        if not isinstance(part, tuple) or len(part) != 2 or not callable(part[1]):
            raise ValueError(f"part {name!r} is {str(part)[:60]}, but a part is (weight, reward)")
        weight, reward = part
        is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight):
            raise ValueError(f"part {name!r} has the weight {weight!r}; a weight is finite")
        host.check_part_name(name)
        host.check_arguments(reward, *_ARGUMENTS)
    name = f"weighted({', '.join(parts)})"
    return host.named(name, functools.partial(_weighted, dict(parts)))


def _weighted(
    parts: dict[str, tuple[float | int, Reward]],
    prompts: list[str],
    responses: list[str],
    rows: list[Example],
) -> Scored:
    total, found = np.zeros(len(responses)), {}
    for name, (weight, reward) in parts.items():
        scored = host.call(reward, prompts, responses, rows)
        total += weight * scored.scores
        found |= {name: scored.scores}
        found |= {f"{name}/{inner}": values for inner, values in scored.parts.items()}
    return Scored(total, found)


def cached(reward: Reward, size: int = 100_000) -> Reward:
    """The same reward, which scores a response to a row once and remembers it.

    The newest `size` triples of prompt, response and row are kept in this process. It is for
    rewards that are slow and always give the same score. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: a cache keeps at least 1 score")
    host.check_arguments(reward, *_ARGUMENTS)
    # (prompt, response, id of the row) -> (row, score, parts). The id stands for the number of the
    # row in the data set; the row is kept so that no other one is given its id.
    kept: OrderedDict[tuple, tuple] = OrderedDict()

    def look_up(prompts: list[str], responses: list[str], rows: list[Example]) -> Scored:
        keys = list(zip(prompts, responses, map(id, rows)))
        found = {key: kept[key] for key in keys if key in kept}
        new: dict[tuple, int] = {}  # where each unknown triple comes first
        for i, key in enumerate(keys):
            if key not in found:
                new.setdefault(key, i)
        if new:
            asked = ([texts[i] for i in new.values()] for texts in (prompts, responses, rows))
            scored = host.call(reward, *asked)
            for k, (key, i) in enumerate(new.items()):
                parts = {name: values[k] for name, values in scored.parts.items()}
                found[key] = (rows[i], scored.scores[k], parts)
        for key, value in found.items():
            kept[key] = value
            kept.move_to_end(key)
        while len(kept) > size:
            kept.popitem(last=False)
        names = found[keys[0]][2] if keys else {}
        return Scored(
            [found[key][1] for key in keys],
            {name: [found[key][2][name] for key in keys] for name in names},
        )

    look_up.__name__ = host.name_of(reward)
    return look_up


# ------------------------------------------------------------------------------ several processes


class _Worker(NamedTuple):
    """A process that scores what it is sent, and this end of the pipe to it."""

    process: Any
    pipe: Any


def in_processes(reward: Reward, processes: int) -> Reward:
    """The same reward, scored by this many Python processes at once, each some of the responses.

    For functions that compute for long in Python, of which one process runs one at a time. The
    processes start at the first call and end with this one. They start empty and import what they
    need (the start method "spawn"), so `reward` is a function at the top level of a module, one
    made of such functions by `functools.partial`, or what `against` and `weighted` return; what it
    remembers, it remembers in each process. They leave accelerators alone.
    Raises ValueError for fewer than 1 process and for a reward that cannot be sent to another
    process. RewardFailed names the responses of the part in which it was raised.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}: at least 1 has to score")
    host.check_arguments(reward, *_ARGUMENTS)
    who = host.name_of(reward)
    try:
        reduction.ForkingPickler.dumps(reward)
    except Exception as error:
        raise ValueError(
            f"{who} cannot be sent to another process ({error}); define it at the top level of a "
            "module, and put cached() around in_processes() and not inside"
        ) from error
    idle: list[_Worker] = []

    def share_out(prompts: list[str], responses: list[str], rows: list[Example]) -> Scored:
        # Taken, and given back at the end: a call that a time limit left behind keeps its own.
        workers = [idle.pop() for _ in range(len(idle))]
        workers = workers or [_start(reward) for _ in range(processes)]
        try:
            found = _shared_out(who, workers, prompts, responses, rows)
        except BaseException:
            for worker in workers:  # their pipes may hold answers that nobody waits for
                worker.process.terminate()
            raise
        idle.extend(workers)
        return Scored(
            np.concatenate([part.scores for part in found]),
            {name: np.concatenate([x.parts[name] for x in found]) for name in found[0].parts},
        )

    share_out.__name__ = who
    return share_out


def _start(reward: Reward) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Python kills daemons when it ends. It would wait for the processes of a ProcessPoolExecutor,
    # so that a run whose reward hangs could not end.
    process = context.Process(target=_serve, args=(reward, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(reward: Reward, pipe: Any) -> None:
    """Scores what comes through the pipe until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that started this one
    jax.config.update("jax_platforms", "cpu")  # the accelerator is that process's
    while True:
        try:
            texts = pipe.recv()
        except EOFError:
            return
        try:
            answer = host.call(reward, *texts)
        except ValueError as error:  # all that `call` raises
            answer = str(error), "".join(traceback.format_exception(error))
        pipe.send(answer)


def _shared_out(who: str, workers: list[_Worker], *texts: list) -> list[Scored]:
    """What the workers give the parts of a batch, in order."""
    count = len(texts[0])
    size = max(1, -(-count // (_PARTS * len(workers))))
    starts = list(range(0, count, size))[::-1]
    free, busy, found = list(workers), {}, {}
    while starts or busy:
        while starts and free:
            worker, start = free.pop(), starts.pop()
            of = f"responses {start} to {min(start + size, count) - 1} of {count}"
            busy[worker.pipe] = worker, start, of
            with _explained(who, worker, of):
                worker.pipe.send([x[start : start + size] for x in texts])
        for pipe in connection.wait(list(busy)):
            worker, start, of = busy.pop(pipe)
            with _explained(who, worker, of):
                found[start] = pipe.recv()
            free.append(worker)
            if not isinstance(found[start], Scored):
                message, trace = found[start]
                raise RewardFailed(f"{message}; in another process, {of}") from RuntimeError(trace)
    return [found[start] for start in sorted(found)]


@contextlib.contextmanager
def _explained(who: str, worker: _Worker, of: str) -> Iterator[None]:
    """Says that a process has ended, where the pipe to it is closed."""
    try:
        yield
    except (EOFError, OSError) as error:
        worker.process.join(_AT_MOST)
        raise RewardFailed(
            f"{who}: the process that was to score {of} ended with code {worker.process.exitcode}; "
            "what it printed says why, for example that it cannot import the reward, which must be "
            "at the top level of a module, and of a program that starts below "
            'if __name__ == "__main__"'
        ) from error
