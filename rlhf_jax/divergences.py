"""The KL divergence of two models over the whole vocabulary, without a [B, T, V] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import losses
from rlhf_jax.losses import Scalar


def chunked_token_kl(
    hiddens: tuple[Float[Array, "B T D"], Float[Array, "B T E"]],
    unembeddings: tuple[Float[Array, "D V"], Float[Array, "E V"]],
    tokens: Int[Array, "B T"],
    temperature: Scalar = 1.0,
    *,
    softcaps: tuple[Scalar | None, Scalar | None] = (None, None),
    vocabulary: str | None = None,
) -> Float[Array, "B T"]:
    """KL(p || q) of the distributions of each token, in nats, aligned to the tokens; entry 0 is 0.

    Each pair is of p and of q. Logits are computed for some positions at a time
    (`losses.chunking`), and again in the backward pass. Only the shape of `tokens` is read. Inside
    `jax.shard_map`, `vocabulary` names the mesh axis whose shards hold the columns of the
    unembeddings; the sums run over all of them.
    """
    split, joined = losses.chunking(*tokens.shape, unembeddings[0].shape[1])

    @jax.checkpoint
    def of_chunk(hiddens):
        p, q = (
            _log_softmax(losses.scaled_logits(losses.head_logits(*x), temperature, cap), vocabulary)
            for *x, cap in zip(hiddens, unembeddings, softcaps)
        )
        return _total(jnp.exp(p) * (p - q), vocabulary)

    return joined(jax.lax.map(of_chunk, tuple(split(losses.align(x)) for x in hiddens)))


def _total(x: Float[Array, "B C V"], vocabulary: str | None) -> Float[Array, "B C"]:
    found = jnp.sum(x, axis=-1)
    return found if vocabulary is None else jax.lax.psum(found, vocabulary)


def _log_softmax(logits: Float[Array, "B C V"], vocabulary: str | None) -> Float[Array, "B C V"]:
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    if vocabulary is not None:
        largest = jax.lax.pmax(largest, vocabulary)
    shifted = logits - largest[..., None]
    return shifted - jnp.log(_total(jnp.exp(shifted), vocabulary))[..., None]
