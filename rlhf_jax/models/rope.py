"""Rotary position embeddings (RoPE, arXiv:2104.09864) and the ways to scale their frequencies.

Each pair of features of a query or key is rotated by an angle: the token's position times the
pair's frequency. Frequencies follow from the configuration, so they are computed once, in float64
on the host, and are constants of the compiled program. Only with dynamic-NTK and LongRoPE scaling
do they depend on the length of the text.
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
    """How frequencies are changed for texts longer than a model was first trained on.

    linear: all are divided by `factor` (Chen et al. 2023). dynamic: the base grows with the length
    of the text beyond `original_length` (NTK-aware). llama3: low frequencies are divided by
    `factor`, high ones are kept, with a ramp between them. yarn: the same idea with the ramp over
    the index of the frequency (Peng et al. 2023). longrope: each frequency has a divisor of its
    own, from `short_factors` up to `original_length` and from `long_factors` beyond it. The turns
    of a frequency are counted over `original_length` tokens.
    """

    kind: Kind = "default"
    factor: config.Positive = 1.0
    original_length: config.Whole = 0  # length of the texts of the first training, tokens
    low_freq_factor: config.Positive = 1.0  # llama3: frequencies of fewer turns are divided
    high_freq_factor: config.Positive = 4.0  # llama3: frequencies of more turns are kept
    beta_fast: config.Positive = 32.0  # yarn: turns at which the ramp begins
    beta_slow: config.Positive = 1.0  # yarn: turns at which the ramp ends
    truncate: bool = True  # yarn: the ramp begins and ends at whole indices
    attention_factor: config.Positive | None = None  # scales cosines and sines; None: as published
    short_factors: tuple[config.Positive, ...] = ()
    long_factors: tuple[config.Positive, ...] = ()


def fixed_up_to(scaling: Scaling) -> int | None:
    """The length of text, in tokens, up to which the frequencies are fixed; None: always fixed.

    Beyond it each further token changes the rotation of all keys before it, so that the keys in a
    cache become wrong.
    """
    return scaling.original_length if scaling.kind in ("dynamic", "longrope") else None


def _unscaled(base: float, size: int) -> np.ndarray:
    return base ** (-np.arange(0, size, 2) / size)


def _llama3(scaling: Scaling, base: float, size: int) -> np.ndarray:
    """Llama 3.1: wavelengths above `original_length / low_freq_factor` tokens are lengthened."""
    unscaled = _unscaled(base, size)
    turns = scaling.original_length * unscaled / (2 * math.pi)  # over `original_length` tokens
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return share * unscaled + (1 - share) * unscaled / scaling.factor


def _yarn(scaling: Scaling, base: float, size: int) -> np.ndarray:
    """YaRN, section 3.2: the ramp runs from the frequency that turns beta_fast times over
    `original_length` tokens to the one that turns beta_slow times."""

    def dimension(turns):
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / 2 / math.log(base)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001  # as transformers does
    share = np.clip((np.arange(size // 2) - low) / width, 0.0, 1.0)
    unscaled = _unscaled(base, size)
    return share * unscaled / scaling.factor + (1 - share) * unscaled


def frequencies(scaling: Scaling, base: float, size: int) -> np.ndarray:
    """Frequencies of the `size / 2` pairs of features, radians per position, [size / 2] float64.

    They are right for texts of at most `fixed_up_to` tokens.
    """
    if scaling.kind == "linear":
        return _unscaled(base, size) / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(scaling, base, size)
    if scaling.kind == "yarn":
        return _yarn(scaling, base, size)
    if scaling.kind == "longrope":
        return _unscaled(base, size) / np.asarray(scaling.short_factors)
    return _unscaled(base, size)


def _frequencies_by_length(
    scaling: Scaling, base: float, size: int, lengths: Int[Array, "B T"]
) -> Float[Array, "B 1 T F"]:
    """Frequencies for each token, by the length of the text that it belongs to."""
    lengths = lengths[:, None, :, None]
    original, exponent = scaling.original_length, np.arange(0, size, 2) / size
    if scaling.kind == "longrope":
        unscaled = _unscaled(base, size)
        short, long = (
            jnp.float32(unscaled / np.asarray(x))
            for x in (scaling.short_factors, scaling.long_factors)
        )
        return jnp.where(lengths > original, long, short)
    ratio = jnp.maximum(lengths, original) / original
    growth = scaling.factor * ratio - (scaling.factor - 1)
    # This is (base * growth ** (size / (size - 2))) ** -exponent; computed as written there, the
    # power of a large base would lose digits in float32.
    return _unscaled(base, size) * growth ** (-size / (size - 2) * exponent)


def attention_factor(scaling: Scaling) -> float:
    """The number by which cosines and sines are multiplied; 1 for most kinds of scaling."""
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))


def cos_sin(
    scaling: Scaling,
    base: float,
    size: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B 1 T R"], Float[Array, "B 1 T R"]]:
    """Cosines and sines of the angles, for `rotate`: R = `size` features, float32.

    Both are repeated for the second half of the features, and the first half of the sines is
    negated. `lengths` is the length of the text that each token belongs to, needed only where one
    is longer than `fixed_up_to`. There transformers takes the length of the longest text of the
    batch, and this function each text's own, so that a row's output does not depend on other rows.
    """
    if lengths is None:
        radians = jnp.float32(frequencies(scaling, base, size))
    else:
        radians = _frequencies_by_length(scaling, base, size, lengths)
    angles = positions[:, None, :, None] * radians
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(scaling)
    if factor != 1:
        cos, sin = factor * cos, factor * sin
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(
    x: Float[Array, "B H T Dh"], rotary: tuple[Float[Array, "B 1 T R"], Float[Array, "B 1 T R"]]
) -> Float[Array, "B H T Dh"]:
    """Queries or keys, rotated by the cosines and sines of `cos_sin`.

    A pair is one feature of the first half and its counterpart in the second, as in transformers.
    Where R is smaller than Dh, only the first R features are rotated.
    """
    cos, sin = rotary
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], rotary), x[..., size:]], axis=-1)
    # Rolling instead of splitting and joining halves saves 4 % of a training step on a CPU.
    return (x * cos + jnp.roll(x, size // 2, axis=-1) * sin).astype(x.dtype)
