"""Configurations: frozen dataclasses of plain values that are also jax pytrees.

Real numbers (learning rates, coefficients, temperatures) and seeds of stages are leaves, so a new
value never recompiles a step. Everything else (counts, names, switches) is static: it may shape the
program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import numbers
import pathlib
import traceback
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

# A file, a folder, or the name of either on a hub: what it holds belongs to the settings of a run.
Source = typing.NewType("Source", str)


class Range(NamedTuple):
    """The values that a field may have: from `low` to `high`, which count too unless `open_`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        if self == Range():
            return ""
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        if self.high < math.inf:
            return f"in {left}{self.low:g}, {self.high:g}{right}"
        return f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"


class Traced(NamedTuple):
    """Marks a field of whole numbers that is an argument of compiled programs, not a part."""


# Programs hold whole numbers in 32 bits, and real ones as float32: what is larger is infinite there
# and what is smaller is 0.
MAX_INT = 2**31 - 1
MAX_FLOAT, MIN_FLOAT = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)

# What fields of a Config may be declared as, so that the Config checks them itself.
Count = Annotated[int, Range(1)]  # 1, 2, ...
Whole = Annotated[int, Range(0)]  # 0, 1, 2, ...
Draws = Annotated[int, Range(1, 4096)]  # answers to one prompt
# Of a stage: another seed is no other program.
Seed = Annotated[int, Range(0), Traced()]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, open_high=True)]  # of an average, which 1 would never change


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """Base class of every configuration; a subclass needs no decorator.

    `class MyConfig(ppo.Config): alpha: float = 0.1` is a frozen, keyword-only dataclass and a
    pytree whose leaves are its `float` fields (and those of nested configurations). A field that
    is `float | None` is off when None; switching it on or off recompiles, a new value does not.

    A Config checks itself when it is made: fields declared as `Count`, `Share` and the like must
    lie in their range, all numbers must be finite, a `Literal` must be one of its choices, and
    `check` tests conditions on several fields. A whole number given for a real field becomes a
    float, because jax would compile a program for `kl_coef=1` beside the one for `kl_coef=1.0`.
    Raises ValueError naming the field.
    Traced values and arrays are not checked, nor are Configs that jax's tree functions rebuild.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        # A loss may replace a number by a traced one, which a type checker would not call a float.
        typing.no_type_check(cls.__init__)
        _register(cls)

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            value = vars(self)[name]
            whole = type(value) is int and abs(value) <= MAX_FLOAT
            if whole and _is_traced(hint) and not _is_seed(hint):
                object.__setattr__(self, name, float(value))
            check_field(name, vars(self)[name], hint)
        if _has_values(self):
            self.check()

    def check(self) -> None:
        """Raises ValueError if fields contradict each other; overridden by subclasses."""


def _register(cls: type[Config]) -> None:
    """Makes a pytree of the class, rebuilt without `__init__`.

    jax rebuilds trees around whatever a function returns: tracers, shardings, None, or the axis
    numbers of a vmap. None of these are settings, so they must be neither checked nor converted.
    """
    traced = [name for name, hint in _hints(cls).items() if _is_traced(hint)]
    static = [name for name in _hints(cls) if name not in traced]

    def flatten_with_keys(config):
        leaves = [(jax.tree_util.GetAttrKey(name), vars(config)[name]) for name in traced]
        return leaves, tuple(vars(config)[name] for name in static)

    def unflatten(fixed, leaves):
        config = object.__new__(cls)
        vars(config).update(zip(static, fixed))
        vars(config).update(zip(traced, leaves))
        return config

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The type of each field. Other annotations, such as a ClassVar, are no fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _has_values(config: Config) -> bool:
    """Whether every real field holds a number, not a tracer, so that `check` can compare them."""
    for name, hint in _hints(type(config)).items():
        value = vars(config)[name]
        if isinstance(value, Config):
            if not _has_values(value):
                return False
        elif _is_traced(hint):
            off = value is None and type(None) in _options(hint)
            if not off and not isinstance(value, numbers.Real):
                return False
    return True


def check_field(name: str, value: Any, hint) -> None:
    """Raises ValueError if no member of the type `hint` accepts the value of the field `name`."""
    rules = [_broken_rule(value, option) for option in _options(hint)]
    if all(rules):
        # Python writes no whole number of more than 4300 digits.
        huge = type(value) is int and abs(value) > MAX_FLOAT
        shown = "a huge whole number" if huge else repr(value)
        raise ValueError(f"{name}={shown} must be {' or '.join(rules)}")


def _broken_rule(value: Any, option) -> str | None:
    """What the value should have been for one member of a union; None if it is fine."""
    if option is type(None):
        return None if value is None else "None"
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        # 1 == True in Python, but code that asks whether a switch `is True` would not find it so.
        is_choice = any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool)
            for choice in choices
        )
        return None if is_choice else f"one of {', '.join(map(repr, choices))}"
    if typing.get_origin(option) is tuple and isinstance(value, tuple):
        member, *_ = typing.get_args(option)
        rules = [rule for x in value if (rule := _broken_rule(x, member))]
        return f"a tuple of numbers, each {rules[0]}" if rules else None
    if option is bool:
        return None if isinstance(value, bool) else "True or False"
    ranges = [x for x in getattr(option, "__metadata__", ()) if isinstance(x, Range)]
    base = typing.get_args(option)[0] if ranges else option
    if base not in (int, float):
        return None
    (allowed,) = ranges or [Range()]
    kind = "a whole number" if base is int else "a number"
    if isinstance(value, bool | str | None) or (base is int and isinstance(value, float)):
        return f"{kind} {allowed}".rstrip()
    if not isinstance(value, numbers.Real):  # an array or a tracer
        return None
    if value not in allowed:
        return str(allowed) or "finite"
    if base is int:
        return None if abs(value) <= MAX_INT else f"at most {MAX_INT}"
    if not abs(value) <= MAX_FLOAT:
        return "finite"
    held = float(np.float32(value)) if abs(value) >= MIN_FLOAT else 0.0
    return None if held in allowed else f"{allowed}, as float32 holds it"


def _options(hint) -> tuple:
    """The members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_seed(hint) -> bool:
    return any(isinstance(x, Traced) for x in getattr(hint, "__metadata__", ()))


def _is_traced(hint) -> bool:
    if _is_seed(hint):
        return True
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_is_traced, typing.get_args(hint)))
    return hint is float or (isinstance(hint, type) and issubclass(hint, Config))


def fold_seed(run_seed: int, stage: str | int) -> int:
    """A seed in [0, 2^31) for one stage of a run, from the run's seed and the stage's name.

    A hash and not a sum, so that stage 1 of run 1 does not draw what stage 0 of run 2 draws.
    """
    digest = hashlib.blake2b(f"{run_seed}/{stage}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 2**31


@contextlib.contextmanager
def explained_tracing() -> Iterator[None]:
    """Explains in one sentence why a loss cannot branch on a traced number.

    It wraps the call of a function that a user wrote: jax's errors about `if`, `bool()` or
    `float()` of a traced value become a ValueError that names the line.
    """
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        library = pathlib.Path(jax.__file__).parent
        frames = traceback.extract_tb(error.__traceback__)
        place = [x for x in frames if not pathlib.Path(x.filename).is_relative_to(library)][-1]
        raise ValueError(
            f"{place.filename}:{place.lineno}: `{place.line}` asks for a number while the program "
            "is still being traced; the real numbers of a Config and all arrays have none yet: use "
            "jnp.where or jax.lax.cond, or declare the field of the Config as int or bool"
        ) from error
