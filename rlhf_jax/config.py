"""Configurations that are both plain values for people and pytrees for jax.

Real numbers (learning rates, coefficients, temperatures) are leaves, so a new value never
recompiles a step and a sweep over them can be one vmapped program. Everything else (counts, names,
switches) is static: it may shape the program.
"""

from __future__ import annotations

import dataclasses
import types
import typing

import jax

# A file, a folder, or the name of either on a hub: what it holds belongs to the settings of a run.
Source = typing.NewType("Source", str)


class Config:
    """Base of every configuration: subclassing is all there is to do.

    `class MyConfig(ppo.Config): alpha: float = 0.1` is a frozen, keyword-only dataclass and a
    pytree whose leaves are its `float` fields (and those of nested configurations). A field that
    is `float | None` is off when None; switching it on or off recompiles, a new value does not.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        # jax rebuilds a Config around tracers, which a type checker of tests would not call floats.
        typing.no_type_check(cls.__init__)
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        traced = [name for name in names if _is_traced(hints[name])]
        static = [name for name in names if name not in traced]
        jax.tree_util.register_dataclass(cls, data_fields=traced, meta_fields=static)


def _is_traced(hint) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_traced(option) for option in typing.get_args(hint))
    return hint is float or (isinstance(hint, type) and issubclass(hint, Config))
