"""Rotary positions: the frequencies of every scaling, and the turns they give at a position.

Frequencies follow from the configuration, so they are computed once, in float64 on the host, and
are constants of the compiled program; only dynamic-NTK and LongRoPE look at the text's length.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax import config

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


class Scaling(config.Config):
    """How the frequencies are stretched for texts longer than a model was first trained on.

    linear: all divided by `factor` (Chen et al. 2023). dynamic: the base grows with the text
    beyond `original_length` (NTK-aware). llama3: low frequencies divided, high ones kept, a ramp
    between. yarn: the same idea with a ramp over dimensions (Peng et al. 2023). longrope: one
    divisor a frequency, `short_factors` up to `original_length` and `long_factors` beyond.
    `attention_factor` multiplies cosines and sines (None: what the method's authors advise).
    """

    kind: Kind = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


def longest_alike(scaling: Scaling) -> int | None:
    """Longest text whose every prefix has its frequencies, tokens; None: there is no such limit.

    Beyond it a token more turns all the keys before it another way, which a cache cannot do.
    """
    return scaling.original_length if scaling.kind in ("dynamic", "longrope") else None


def _plain(base: float, size: int) -> np.ndarray:
    return base ** (-np.arange(0, size, 2) / size)


def _llama3(scaling: Scaling, base: float, size: int) -> np.ndarray:
    """Llama 3.1: wavelengths of over `original_length / low_freq_factor` tokens are stretched."""
    plain = _plain(base, size)
    turned = scaling.original_length * plain / (2 * math.pi)  # full turns within the trained text
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turned - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(scaling: Scaling, base: float, size: int) -> np.ndarray:
    """YaRN, section 3.2: the ramp runs over dimensions, from beta_fast to beta_slow turns."""

    def dimension(turns):
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / 2 / math.log(base)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001  # as transformers does
    stretched = np.clip((np.arange(size // 2) - low) / width, 0.0, 1.0)
    plain = _plain(base, size)
    return stretched * plain / scaling.factor + (1 - stretched) * plain


def frequencies(scaling: Scaling, base: float, size: int) -> np.ndarray:
    """Radians a position of each pair of `size` turned features, [size / 2] float64.

    Of texts no longer than `longest_alike`.
    """
    if scaling.kind == "linear":
        return _plain(base, size) / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(scaling, base, size)
    if scaling.kind == "yarn":
        return _yarn(scaling, base, size)
    if scaling.kind == "longrope":
        return _plain(base, size) / np.asarray(scaling.short_factors)
    return _plain(base, size)


def _stretched(
    scaling: Scaling, base: float, size: int, lengths: Int[Array, "B T"]
) -> Float[Array, "B 1 T F"]:
    """Frequencies at each token, by the length of the text that it is part of."""
    lengths = lengths[:, None, :, None]
    original, exponent = scaling.original_length, np.arange(0, size, 2) / size
    if scaling.kind == "longrope":
        plain = _plain(base, size)
        short, long = (
            jnp.float32(plain / np.asarray(x))
            for x in (scaling.short_factors, scaling.long_factors)
        )
        return jnp.where(lengths > original, long, short)
    times = jnp.maximum(lengths, original) / original
    grown = scaling.factor * times - (scaling.factor - 1)
    # (base * grown ** (size / (size - 2))) ** -exponent, without leaving float32's comfort.
    return _plain(base, size) * grown ** (-size / (size - 2) * exponent)


def attention_factor(scaling: Scaling) -> float:
    """What cosines and sines are multiplied with."""
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))


def turns(
    scaling: Scaling,
    base: float,
    size: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B 1 T R"], Float[Array, "B 1 T R"]]:
    """Cosines and sines for `rotate`, R = size, float32; the sines' first half is negated.

    `lengths` [B, T] of each token's text is needed only where one outgrows `longest_alike`.
    Differs from transformers there: a text's own length counts, not that of the batch's longest,
    so that what a model says of a row does not depend on the other rows.
    """
    if lengths is None:
        radians = jnp.float32(frequencies(scaling, base, size))
    else:
        radians = _stretched(scaling, base, size, lengths)
    angles = positions[:, None, :, None] * radians
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(scaling)
    if factor != 1:
        cos, sin = factor * cos, factor * sin
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(
    x: Float[Array, "B H T Dh"], turn: tuple[Float[Array, "B 1 T R"], Float[Array, "B 1 T R"]]
) -> Float[Array, "B H T Dh"]:
    """Rotary embedding, half-rotated layout (first half with second half, as transformers).

    `turn` is from `turns`; where it is narrower than the heads, their other features stay.
    Rolled, not split and joined: about 4 % of a training step on CPU.
    """
    cos, sin = turn
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], turn), x[..., size:]], axis=-1)
    return (x * cos + jnp.roll(x, size // 2, axis=-1) * sin).astype(x.dtype)
