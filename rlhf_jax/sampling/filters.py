"""Top-k, top-p and min-p as traced numbers. A filter that is None costs nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import config


class Filters(config.Config):
    """Which tokens may be drawn. None switches a filter off, and off is static: with all three
    off nothing is compiled. A number is traced: a new value does not recompile.

    top_k: keep the k most likely tokens (ties at the border all survive, k above V keeps all).
    top_p: keep the smallest set of most likely tokens whose mass reaches p, the crossing token
    included. min_p: drop tokens less likely than min_p times the most likely one. Applied in this
    order after the temperature, each to what the one before left, as transformers does.
    """

    top_k: float | None = None
    top_p: float | None = None
    min_p: float | None = None

    def check(self) -> None:
        """Raises ValueError for a number outside its range."""
        if self.top_k is not None and (self.top_k < 1 or self.top_k != int(self.top_k)):
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1], or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1], or None")


def apply(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Logits (already divided by the temperature) with -inf where a token may not be drawn."""
    if filters.top_k is not None:
        size = logits.shape[-1]
        k = jnp.clip(filters.top_k, 1, size)
        logits = jnp.where(
            logits < _border(logits, jnp.ones_like(logits), size - k), -jnp.inf, logits
        )
    if filters.top_p is not None:
        logits = _top_p(logits, filters.top_p)
    if filters.min_p is not None:
        # p_i < min_p * p_max, in logs; the normaliser cancels.
        limit = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(filters.min_p)
        logits = jnp.where(logits < limit, -jnp.inf, logits)
    return logits


def _top_p(logits, p):
    """Drops from the least likely token upwards, as long as what is dropped weighs <= 1 - p."""
    mass = jax.nn.softmax(logits, axis=-1)
    border = _border(logits, mass, 1.0 - p)
    below, tied = logits < border, logits == border
    # Of tokens tied at the border only as many stay as p needs: the later ones, as a stable
    # ascending sort leaves them.
    room = 1.0 - p - jnp.sum(jnp.where(below, mass, 0.0), axis=-1, keepdims=True)
    each = jnp.max(jnp.where(tied, mass, 0.0), axis=-1, keepdims=True)
    rank = jnp.cumsum(tied, axis=-1)
    drop = below | (tied & (rank <= jnp.floor(room / each)) & (rank < rank[:, -1:]))
    return jnp.where(drop, -jnp.inf, logits)


def _border(logits: Float[Array, "B V"], weights: Float[Array, "B V"], room) -> Float[Array, "B 1"]:
    """The largest logit of each row such that what lies strictly below it weighs <= room.

    Found bit by bit in 32 weighted counts, without a sort: at B=32, V=4096 on 2 cores XLA's sort
    takes 25 ms a token, three times the rest of a decoding step.
    """
    ordered = _ordered(logits)

    def refine(i, border):
        higher = border | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        below = jnp.sum(jnp.where(ordered < higher, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(below <= room, higher, border)

    border = jax.lax.fori_loop(0, 32, refine, jnp.zeros_like(ordered[:, :1]))
    # The likeliest token stays even where rounding leaves room for all.
    most = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(ordered >= border, logits, most), axis=-1, keepdims=True)


def _ordered(x: Float[Array, "B V"]):
    """Floats as unsigned integers in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
