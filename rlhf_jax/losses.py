"""Losses: arrays in, arrays out, one small function per equation.

Every [B, T] array is aligned to tokens: entry t is about token t. Nothing is reduced here but by
the functions that say so, because the mean over tokens or sequences is the algorithm's choice.
All arithmetic is float32 whatever the inputs are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]


def align(outputs: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
    """Moves what the model said *at* token t to the token it is *about*, t + 1.

    [B, T, ...] -> [B, T, ...]. Entry 0 has no predecessor and is 0. This is the only shift in the
    package: logits (through hidden states), values and entropies all pass through it.
    """
    return jnp.pad(outputs[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (outputs.ndim - 2))


def _from_first(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Sets entry 0, which has no predecessor, to 0."""
    return x.at[:, 0].set(0.0)


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], temperature: Scalar = 1.0
) -> Float[Array, "B T"]:
    """log p(token t | tokens before t), in nats. [B, T, V], [B, T] -> [B, T]; entry 0 is 0.

    The temperature divides the logits: the one that sampled must be the one that scores.
    """
    logits = align(logits).astype(jnp.float32) / temperature
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return _from_first(jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0])


def _chunk_logprobs(hidden, unembedding, tokens, temperature, softcap):
    logits = jnp.einsum(
        "bcd,dv->bcv",
        hidden,
        unembedding.astype(hidden.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits / temperature
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # Entropy is a measurement, never an objective here; without its gradient the backward pass
    # stays one softmax.
    known = jax.lax.stop_gradient(logits - total[..., None])
    entropy = -jnp.sum(jnp.exp(known) * known, axis=-1)
    return chosen - total, entropy


def chunked_token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    *,
    chunk: int = 32,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs` of the final hidden states, and the entropy, without a [B, T, V] array.

    [B, T, D], [D, V], [B, T] -> ([B, T], [B, T]), nats, float32; entry 0 of both is 0. The
    vocabulary is reached `chunk` positions of every row at a time (so that a batch split over
    devices stays split), forward and backward: the backward pass computes the chunk's logits
    again. `softcap` is Gemma's c * tanh(logits / c). The entropy carries no gradient.
    """
    batch, length, width = hidden.shape
    hidden = align(hidden)
    if length <= chunk:
        logprobs, entropy = _chunk_logprobs(hidden, unembedding, tokens, temperature, softcap)
        return _from_first(logprobs), _from_first(entropy)
    chunks = -(-length // chunk)
    chunk = -(-length // chunks)  # equal pieces: fewer than `chunks` positions of padding
    pad = chunks * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    padded = jnp.pad(tokens, ((0, 0), (0, pad)))
    hidden = hidden.reshape(batch, chunks, chunk, width).swapaxes(0, 1)
    padded = padded.reshape(batch, chunks, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(unembedding, temperature, piece):
        return _chunk_logprobs(piece[0], unembedding, piece[1], temperature, softcap)

    logprobs, entropy = jax.lax.map(
        lambda piece: one(unembedding, temperature, piece), (hidden, padded)
    )
    join = lambda x: x.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :length]  # noqa: E731
    return _from_first(join(logprobs)), _from_first(join(entropy))


def masked_sum(x: Array, mask: Array, axis=None) -> Array:
    """Sum of x where mask is 1; what x holds elsewhere, NaN included, does not count."""
    return jnp.sum(jnp.where(mask > 0, x.astype(jnp.float32) * mask, 0.0), axis=axis)


def masked_mean(x: Array, mask: Array, axis=None) -> Array:
    """Mean of x over the entries where mask is 1, float32. An empty mean is 0.

    Under jit the sums run over the global array, so mesh shape and padding cannot change it.
    """
    count = jnp.sum(mask.astype(jnp.float32), axis=axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def masked_whiten(
    x: Array, mask: Array, shift_mean: bool = True, unbiased: bool = False, eps: Scalar = 1e-8
) -> Array:
    """x to variance 1 (and mean 0 if `shift_mean`) over the mask; 0 outside it.

    Population variance by default, `eps` inside the square root (Huang et al. 2023, item 18);
    `unbiased=True` divides by n - 1 as TRL and verl do.
    """
    x = jnp.where(mask > 0, x, 0.0)  # 0 times NaN would reach the gradient of every entry
    mean = masked_mean(x, mask)
    count = jnp.sum(mask.astype(jnp.float32))
    variance = masked_mean(jnp.square(x - mean), mask)
    if unbiased:
        variance = variance * count / jnp.maximum(count - 1.0, 1.0)
    whitened = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask > 0, whitened if shift_mean else whitened + mean, 0.0)


def rank_loss(
    *, chosen: Float[Array, " B"], rejected: Float[Array, " B"], margin: Array | float = 0.0
) -> Float[Array, " B"]:
    """-log sigmoid(chosen - rejected - margin), nats per pair. [B], [B] -> [B].

    Bradley-Terry; the margin is Llama 2's (arXiv:2307.09288, eq. 2).
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centring_penalty(
    *, chosen: Float[Array, " B"], rejected: Float[Array, " B"]
) -> Float[Array, " B"]:
    """(chosen + rejected)^2: pulls the scores of a pair towards mean 0 (Eisenstein et al. 2023)."""
    return jnp.square(chosen + rejected)


def ranked_pairs(ranks: Int[Array, "B K"], mask: Float[Array, "B K"]) -> Float[Array, "B K K"]:
    """1 at [b, i, j] where response i is ranked better than j and both are present."""
    present = mask[:, :, None] * mask[:, None, :]
    return present * (ranks[:, :, None] < ranks[:, None, :])


def kwise_rank_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Float[Array, "B K"],
    margin: Array | float = 0.0,
) -> Float[Array, " B"]:
    """Mean rank loss over the pairs of each prompt whose ranks differ. [B, K] x 3 -> [B], nats.

    InstructGPT (arXiv:2203.02155, eq. 1): all C(K, 2) comparisons of a prompt are one element,
    divided by their number. Rank 0 is best; equal ranks are ties and make no pair, so the divisor
    is the number of pairs that differ. A prompt with no pair gives 0. `margin`: a number, [B], or
    [B, K, K] for each pair (better, worse).
    """
    pairs = ranked_pairs(ranks, mask)
    scores = jnp.where(mask > 0, scores, 0.0)  # 0 times NaN would reach the gradient of its pairs
    margin = jnp.asarray(margin, jnp.float32)
    margin = margin if margin.ndim == 3 else margin.reshape(-1, 1, 1)
    losses = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :] - margin)
    return masked_mean(losses, pairs, axis=(1, 2))


def plackett_luce_loss(
    scores: Float[Array, "B K"], ranks: Int[Array, "B K"], mask: Float[Array, "B K"]
) -> Float[Array, " B"]:
    """-log P(ranking) under Plackett-Luce, nats per prompt. [B, K] x 3 -> [B].

    Each response but the worst is chosen by softmax among itself and those ranked worse; K = 2 is
    Bradley-Terry. Tied responses do not compete with each other (a tie says nothing of their
    order). A prompt without a pair that differs gives 0.
    """
    pairs = ranked_pairs(ranks, mask)
    field = jnp.where(pairs > 0, scores[:, None, :], -jnp.inf)
    field = jnp.concatenate([scores[:, :, None], field], axis=2)
    stages = jax.nn.logsumexp(field, axis=2) - scores
    return masked_sum(stages, jnp.max(pairs, axis=2), axis=1)


def score_regression_loss(
    *, scores: Float[Array, "*n"], targets: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """(scores - targets)^2 elementwise, no factor 1/2."""
    return jnp.square(scores - targets)


def clipped_policy_loss(
    *,
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate, negated, per token. All [B, T] -> [B, T].

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7; `clip_eps_high` loosens the upper side (DAPO,
    arXiv:2503.14476). Not reduced: the caller chooses the mean.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(
    *,
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    clip_eps: Scalar,
) -> Float[Array, "B T"]:
    """1/2 max((V - G)^2, (V_old + clip(V - V_old, +-eps) - G)^2), per token. All [B, T] -> [B, T].

    OpenAI baselines' form (Huang et al. 2023, item 19), the factor 1/2 included.
    """
    clipped = old_values + jnp.clip(values - old_values, -clip_eps, clip_eps)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def kl_k1(
    *, logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Schulman's k1, log p - log p_ref: unbiased for tokens drawn from p, may be negative."""
    return logprobs - ref_logprobs


def kl_k2(
    *, logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Schulman's k2, (log p - log p_ref)^2 / 2: biased, low variance, its gradient is the KL's."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def kl_k3(
    *, logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Schulman's k3, r - 1 - log r with r = p_ref / p: unbiased and never negative."""
    difference = ref_logprobs - logprobs
    return jnp.expm1(difference) - difference
