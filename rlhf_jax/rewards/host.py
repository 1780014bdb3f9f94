"""A reward written in Python: it reads texts on the host while the device runs `judge`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import pathlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax import processes, sharding
from rlhf_jax.data.batches import Examples
from rlhf_jax.data.schema import BadRow, Example
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.sampling import rollout
from rlhf_jax.training import loop
from rlhf_jax.training.state import TrainingStopped

# Names of parts that a run adds, in seconds; see `for_run`.
TIMES = ("seconds", "waited")
_AT_MOST = 5.0  # seconds that a failed reward waits for the device, see `_clock`


class Scored(NamedTuple):
    """What a reward returns that reports more than its scores; each part as "reward/<name>"."""

    scores: Sequence[float]  # one per response
    parts: Mapping[str, Sequence[float]]  # name -> one per response


# (prompts, responses, rows) -> one score per response, or `Scored`. `rows` are the rows of the data
# set that the prompts come from, as they were read: `row.extra` holds the fields that the format
# did not use.
Reward = Callable[[list[str], list[str], list[Example]], Sequence[float] | Scored]


class RewardFailed(ValueError):
    """A reward that raised, or did not return one number per response. One line says which."""


def scores(
    reward: Reward,
    tokenizer: Tokenizer,
    examples: Examples,
    samples: Any,
    index: Any,
    timeout: float | None = None,
) -> Scored:
    """The reward of each sample that this process answers for, on the host: float32 arrays [B].

    With one process these are all. See `sharding.own_rows`, and `put_own_rows`, which puts the
    arrays of several together; a process that answers for no sample has no parts either.
    `samples` have `tokens`, `attend` and `mask` [B, T]; `index` [B] are the numbers of their
    prompts. `timeout` is in seconds.
    Raises RewardFailed (a ValueError) for a reward that raised, or gave anything but one finite
    number for each response; BadRow for a row that it cannot use; TrainingStopped for one that
    takes longer than `timeout`. The reward is then left running in its thread, because Python
    cannot stop a thread. A single call of compiled code that never lets go of the interpreter,
    such as `re` on a bad pattern, delays this error too, unless it runs under
    `combine.in_processes`.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout={timeout} must be above 0 seconds; None sets no limit")
    samples, index = sharding.own_rows((samples, index))
    if not len(index):  # several processes split tensors among them, and another one scores
        return Scored(np.zeros(0, np.float32), {})
    prompts, responses = rollout.texts(tokenizer, samples)
    numbers = [i % len(examples) for i in index.tolist()]
    rows = [examples.sources[i] for i in numbers]
    found = _within(timeout, reward, prompts, responses, rows)
    scored = jax.tree.map(lambda x: x.astype(np.float32), found)
    _check_finite(name_of(reward), scored, responses, [examples.where[i] for i in numbers])
    return scored


def call(reward: Reward, prompts: list[str], responses: list[str], rows: list[Example]) -> Scored:
    """What a reward gives these responses, as float64 arrays [B]; a plain sequence has no parts.

    Raises RewardFailed, from the reward's own error, for one that raises, and for one that does not
    return one number per response; BadRow as it is.
    """
    who = name_of(reward)
    try:
        returned = reward(prompts, responses, rows)
    except (BadRow, RewardFailed):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardFailed(
            f"{who} raised {type(error).__name__}: {error} "
            f"({pathlib.Path(place.filename).name}:{place.lineno}) on {len(responses)} responses, "
            f"the first of them {responses[0][:60]!r} to the prompt {prompts[0][-60:]!r}"
        ) from error
    if not isinstance(returned, Scored):
        return Scored(_numbers(who, returned, len(responses)), {})
    for name in returned.parts:
        check_part_name(name)
    return Scored(
        _numbers(who, returned.scores, len(responses)),
        {
            name: _numbers(f"{who}, part {name!r},", values, len(responses))
            for name, values in returned.parts.items()
        },
    )


def _numbers(who: str, returned: Any, count: int) -> Float[np.ndarray, " B"]:
    try:
        values = np.asarray(returned)
    except ValueError:  # rows of unequal length
        values = np.asarray(None)
    if values.dtype.kind not in "biuf":
        raise RewardFailed(f"{who} returned {str(returned)[:80]}; a reward returns numbers")
    if values.shape != (count,):
        raise RewardFailed(
            f"{who} returned shape {list(values.shape)}, but a reward gives one number per "
            f"response: [B] = [{count}]"
        )
    return values.astype(np.float64)


def _check_finite(who: str, scored: Scored, responses: list[str], where: list[str]) -> None:
    arrays = {f"{who}, part {name!r},": values for name, values in scored.parts.items()}
    for name, values in {**arrays, who: scored.scores}.items():
        for i in np.flatnonzero(~np.isfinite(values)):
            raise RewardFailed(
                f"{name} gave {values[i]} to response {i} of the batch, {responses[i][:60]!r} "
                f"({where[i]}); a reward is a finite number"
            )


def _within(timeout: float | None, reward: Reward, *texts: list) -> Scored:
    """`call` in a thread of its own, so that the run need not wait for it longer than `timeout`."""
    if timeout is None:
        return call(reward, *texts)
    future = Future()

    def work() -> None:
        try:
            future.set_result(call(reward, *texts))
        except BaseException as error:
            future.set_exception(error)

    # Python waits for the threads of a pool before it ends, but not for a daemon.
    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(timeout)
    except TimeoutError:  # of this wait: the reward's own is a RewardFailed
        raise TrainingStopped(
            f"{name_of(reward)} took longer than reward_timeout={timeout:g} seconds to score "
            f"{len(texts[0])} responses; make it faster, or raise the limit"
        ) from None


# ------------------------------------------------------------------------------------ in a run


def for_run(
    reward: Reward, tokenizer: Tokenizer, examples: Examples, timeout: float | None
) -> Callable[[Any, Any, Any], Scored]:
    """`(samples, index, judged) -> Scored`, which a run calls once per iteration.

    These are `scores`, and among the parts two times of this process: "seconds", from when the
    samples are there to when the scores are; and "waited", how much of that came after the device
    had finished `judge`, of which `judged` is an output, so that it had nothing to do. A thread
    looks at the clock when `judged` is there: nothing waits for it. With several processes, one
    that answers for no sample learns the names of the parts from the others, in the first
    iteration. Raises ValueError if they differ between processes or iterations, and what `scores`
    raises.
    """
    names: list[str] | None = None

    def score(samples: Any, index: Any, judged: Any) -> Scored:
        nonlocal names
        samples, index = sharding.own_rows((samples, index))  # waits for the samples
        begin = time.perf_counter()
        with _clock(judged) as finished:
            found, parts = scores(reward, tokenizer, examples, samples, index, timeout)
            end = time.perf_counter()
        waited = max(0.0, end - finished[0]) if finished else 0.0
        own = sorted(parts) if len(found) else None
        if names is None:
            names = _agreed(name_of(reward), own)
        if own not in (None, names):
            raise RewardFailed(f"{name_of(reward)} reported {names} before, and now {own}")
        parts = {name: parts.get(name, found) for name in names}  # `found` is empty without parts
        times = zip(TIMES, (end - begin, waited))
        return Scored(found, parts | {name: np.full_like(found, x) for name, x in times})

    return score


@contextlib.contextmanager
def _clock(array: Any) -> Iterator[list[float]]:
    """A list that gets the time when the device has computed `array`; nothing waits for that.

    Where the body fails, it does wait for some seconds: a thread that waits for a device while
    Python ends can abort the process, and the exit code would be lost.
    """
    finished: list[float] = []

    def watch() -> None:
        jax.block_until_ready(array)
        finished.append(time.perf_counter())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield finished
    except BaseException:
        thread.join(_AT_MOST)
        raise


def _agreed(who: str, own: list[str] | None) -> list[str]:
    """The names of the parts that all processes with samples report."""
    told = [json.loads(text) for text in processes.texts(json.dumps(own))]
    found = [names for names in told if names is not None]
    if any(names != found[0] for names in found):
        raise RewardFailed(
            f"{who} reports other parts on other processes: {found}; report the same everywhere"
        )
    return found[0]


def report(mesh: jax.sharding.Mesh, parts: dict[str, Array]) -> dict[str, Array]:
    """Metrics "reward/<name>" of parts that are split over a mesh by rows: their means.

    A time is that of the process that took longest. The program is only enqueued.
    """
    program = loop.compiled(
        _report, (), in_shardings=sharding.rows(mesh), out_shardings=sharding.replicated(mesh)
    )
    return program(parts)


def _report(parts: dict[str, Array]) -> dict[str, Array]:
    return {
        f"reward/{name}": (jnp.max if name in TIMES else jnp.mean)(values)
        for name, values in parts.items()
    }


# --------------------------------------------------------------------------------- about rewards


def name_of(reward: Callable) -> str:
    """What errors call a reward or a metric; of a `functools.partial`, its function's name."""
    name = getattr(reward, "__name__", None)
    if name is None and isinstance(reward, functools.partial):
        return name_of(reward.func)
    return name or "the reward"


def named(name: str, reward: functools.partial) -> functools.partial:
    """`reward` under this name. A partial, because other processes can be sent it."""
    reward.__name__ = name
    return reward


def check_part_name(name: Any) -> None:
    """Raises RewardFailed (a ValueError) unless a part can be reported under this name."""
    if not isinstance(name, str) or not name or name in TIMES:
        raise RewardFailed(
            f"a part of a reward is named {name!r}, but a name is a text, and "
            f"{' and '.join(TIMES)} are taken by the times of a run; rename it"
        )


def check_arguments(reward: Callable, *names: str) -> None:
    """Raises ValueError unless `reward` can be called with these arguments, in this order."""
    try:
        inspect.signature(reward).bind(*names)
    except TypeError as error:
        name = name_of(reward)
        called = ", ".join(names)
        raise ValueError(f"{name} is called as {name}({called}), but {error}") from None
