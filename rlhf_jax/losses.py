"""Losses: arrays in, arrays out, one small function per equation.

Every [B, T] array is aligned to tokens: entry t is about token t. Only the functions that say so
reduce their result, because which mean to take is the algorithm's choice. All arithmetic is
float32, whatever the inputs are. Arguments that must have the same shape are checked: broadcasting
[B, 1] against [B] would silently give [B, B].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]

# Log-ratios are clamped at +-20 before they are exponentiated, as verl does: exp(90) is infinite in
# float32, and infinity times an advantage of 0 is NaN.
MAX_LOG_RATIO = 20.0

# The tokens of a chunk of logits, at the least. Every chunk adds to the whole gradient of the
# unembedding: at 131,072 ids and 32 tokens that is half of the time on a CPU.
MIN_CHUNK = 128


def matched(**arrays) -> tuple[Array, ...]:
    """The arrays in float32. Raises ValueError, naming them, unless all have the same shape."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"arguments of different shapes: {listed}; they must have the same shape, and are not "
            "broadcast"
        )
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays.values())


def _entrywise(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)` entry by entry, NaN where an argument is not finite.

    Such an entry has gradient 0, so that entries outside a mask do no harm: the mean over the mask
    multiplies their gradients by 0, but 0 times NaN would be NaN.
    """
    finite = jnp.isfinite(arrays[0])
    for array in arrays[1:]:
        finite &= jnp.isfinite(array)
    clean = (jnp.where(finite, array, 0.0) for array in arrays)
    return jnp.where(finite, function(*clean), jnp.nan)


# ------------------------------------------------------------------------------- log-probabilities


def align(outputs: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
    """Moves what the model said *at* token t to the token it is *about*, t + 1.

    [B, T, ...] -> [B, T, ...]. Entry 0 has no predecessor and is 0. This is the only shift in the
    package: logits (through hidden states), values and entropies all pass through it.
    """
    return jnp.pad(outputs[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (outputs.ndim - 2))


def _without_first(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Sets entry 0, which has no predecessor, to 0."""
    return x.at[:, 0].set(0.0)


def _check_tokens(tokens: Array, name: str, outputs: Array) -> None:
    """Raises ValueError unless there is one token for each position of `outputs` [B, T, ...]."""
    if tokens.shape != outputs.shape[:2]:
        raise ValueError(
            f"tokens {tokens.shape} and {name} {outputs.shape} differ in their first two axes; "
            f"tokens must have shape {outputs.shape[:2]}"
        )


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], temperature: Scalar = 1.0
) -> Float[Array, "B T"]:
    """log p(token t | tokens before t), in nats. [B, T, V], [B, T] -> [B, T]; entry 0 is 0.

    The temperature divides the logits: the one that sampled must be the one that scores.
    Raises ValueError if tokens and logits differ in shape.
    """
    _check_tokens(tokens, "logits", logits)
    logits = align(logits).astype(jnp.float32) / temperature
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return _without_first(jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0])


def head_logits(hidden, unembedding):
    """Products with the head, float32, before soft cap and temperature."""
    return jnp.einsum(
        "bcd,dv->bcv",
        hidden,
        unembedding.astype(hidden.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def scaled_logits(logits, temperature, softcap):
    """Gemma's soft cap, softcap * tanh(logits / softcap), and then the temperature."""
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits / temperature


def _scaled_backward(raw, logits, gradient, temperature, softcap):
    """The gradients of the arguments of `scaled_logits`, whose result is `logits`."""
    inner = gradient / temperature
    d_temperature = -jnp.sum(inner * logits)
    if softcap is None:
        return inner, (d_temperature, None)
    capped = jnp.tanh(raw / softcap)
    slope = 1.0 - jnp.square(capped)
    return inner * slope, (d_temperature, jnp.sum(inner * (capped - raw / softcap * slope)))


def columns(tokens, size, vocabulary):
    """Which column of a shard of `size` each token is; outside of [0, size) on another shard."""
    return tokens if vocabulary is None else tokens - jax.lax.axis_index(vocabulary) * size


def _chunk_logprobs(vocabulary, logits, tokens):
    """Log-probabilities, entropies and log-sum-exp of the positions of one chunk, [B, C] each."""
    column, size = columns(tokens, logits.shape[-1], vocabulary), logits.shape[-1]
    chosen = jnp.take_along_axis(logits, jnp.clip(column, 0, size - 1)[..., None], axis=-1)[..., 0]
    if vocabulary is None:
        total = jax.nn.logsumexp(logits, axis=-1)
    else:
        largest = jax.lax.pmax(jnp.max(logits, axis=-1), vocabulary)
        weight = jax.lax.psum(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), vocabulary)
        total = largest + jnp.log(weight)
        here = (column >= 0) & (column < size)
        chosen = jax.lax.psum(jnp.where(here, chosen, 0.0), vocabulary)
        size *= jax.lax.axis_size(vocabulary)
    # An id that is no token must not pass for another one.
    chosen = jnp.where((tokens >= 0) & (tokens < size), chosen, jnp.nan)
    all_logprobs = logits - total[..., None]
    entropy = -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, axis=-1)
    if vocabulary is not None:
        entropy = jax.lax.psum(entropy, vocabulary)
    return chosen - total, entropy, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_chunks(vocabulary, entropy_gradient, hidden, unembedding, tokens, temperature, softcap):
    """Log-probabilities and entropies, [n, B, C] each, of chunks [n, B, C, D].

    The backward pass is written out, because the derived one is a quarter slower on CPUs: it
    scatters into the logits' gradient and multiplies by a transposed copy of it. Here one pass over
    the logits gives p - [token], from which both products start.
    """
    given = (hidden, unembedding, tokens, temperature, softcap)
    return _of_chunks_forward(vocabulary, entropy_gradient, *given)[0]


def _of_chunks_forward(
    vocabulary, entropy_gradient, hidden, unembedding, tokens, temperature, softcap
):
    def of_chunk(arrays):
        logits = head_logits(arrays[0], unembedding)
        return _chunk_logprobs(vocabulary, scaled_logits(logits, temperature, softcap), arrays[1])

    logprobs, entropy, total = jax.lax.map(of_chunk, (hidden, tokens))
    kept = entropy if entropy_gradient else None
    return (logprobs, entropy), (hidden, unembedding, tokens, temperature, softcap, total, kept)


def _of_chunks_backward(vocabulary, entropy_gradient, saved, gradients):
    hidden, unembedding, tokens, temperature, softcap, total, entropy = saved
    if not entropy_gradient:
        gradients = (gradients[0], None)
    if vocabulary is not None:
        # Every shard has the same output, and its gradient arrives divided among the shards: so
        # it is without `check_vma`, as `heads` calls it.
        gradients = jax.lax.psum(gradients, vocabulary)
    size = unembedding.shape[1]
    sums = jax.tree.map(jnp.zeros_like, (unembedding, temperature, softcap))

    def of_chunk(sums, arrays):
        hidden, tokens, total, (gradient, of_entropy), entropy = arrays
        raw = head_logits(hidden, unembedding)
        logits = scaled_logits(raw, temperature, softcap)
        is_token = jnp.arange(size) == columns(tokens, size, vocabulary)[..., None]
        p = jnp.exp(logits - total[..., None])
        d_logits = gradient[..., None] * (is_token - p)
        if entropy_gradient:
            surprise = logits - (total - entropy)[..., None]  # log p + entropy
            d_logits -= of_entropy[..., None] * p * surprise
        d_raw, d_scales = _scaled_backward(raw, logits, d_logits, temperature, softcap)
        d_raw = d_raw.astype(hidden.dtype)
        how = {"precision": "highest", "preferred_element_type": jnp.float32}
        d_hidden = jnp.einsum("bcv,dv->bcd", d_raw, unembedding.astype(hidden.dtype), **how)
        d_unembedding = jnp.einsum("bcd,bcv->dv", hidden, d_raw, **how)
        steps = (d_unembedding.astype(unembedding.dtype), *d_scales)
        return jax.tree.map(jnp.add, sums, steps), d_hidden.astype(hidden.dtype)

    sums, d_hidden = jax.lax.scan(of_chunk, sums, (hidden, tokens, total, gradients, entropy))
    return d_hidden, sums[0], None, *sums[1:]


_of_chunks.defvjp(_of_chunks_forward, _of_chunks_backward)


def chunking(
    batch: int, length: int, vocabulary: int, chunk_bytes: int | None = None
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Splits [B, T, ...] to [n, B, C, ...], and joins [n, B, C] to [B, T], whose entry 0 is 0.

    C positions have `chunk_bytes` of logits: 16 MiB by default, or `MIN_CHUNK` tokens' if more.
    """
    if chunk_bytes is None:
        chunk_bytes = max(2**24, 4 * MIN_CHUNK * vocabulary)
    chunk = max(1, chunk_bytes // (4 * batch * vocabulary))
    chunks = -(-length // chunk)
    chunk = -(-length // chunks)  # equal chunks: fewer than `chunks` positions of padding

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def joined(x):
        return _without_first(x.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :length])

    return split, joined


def chunked_token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    *,
    chunk_bytes: int | None = None,
    vocabulary: str | None = None,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs` of the final hidden states, and the entropy, without a [B, T, V] array.

    [B, T, D], [D, V], [B, T] -> ([B, T], [B, T]), in nats, float32; entry 0 of both is 0. Logits
    are computed for some positions at a time (`chunking`), and again in the backward pass. The
    entropy has a gradient only with `entropy_gradient`. The log-probability of an id outside of the
    vocabulary is NaN. In `jax.shard_map`, `vocabulary` is the axis that splits the unembedding.
    Raises ValueError if tokens and hidden states differ in shape.
    """
    _check_tokens(tokens, "hidden", hidden)
    split, joined = chunking(*tokens.shape, unembedding.shape[1], chunk_bytes)
    scales = jax.tree.map(jnp.float32, (temperature, softcap))
    logprobs, entropy = _of_chunks(
        vocabulary, entropy_gradient, split(align(hidden)), unembedding, split(tokens), *scales
    )
    return joined(logprobs), joined(entropy)


# ---------------------------------------------------------------------------- masked sums and means


def masked_sum(x: Array, mask: Array, axis=None) -> Array:
    """Sum of x over the entries where mask is 1, float32. x and mask have the same shape.

    Other entries of x, NaN included, do not count.
    """
    x, mask = matched(x=x, mask=mask)
    return jnp.sum(jnp.where(mask > 0, x * mask, 0.0), axis=axis)


def masked_mean(x: Array, mask: Array, axis=None) -> Array:
    """Mean of x over the entries where mask is 1, float32; 0 for an empty mask.

    x and mask have the same shape. Under jit the sums run over the global array, so neither the
    shape of the mesh nor padding can change the mean.
    """
    count = jnp.sum(mask.astype(jnp.float32), axis=axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def masked_whiten(
    x: Array, mask: Array, shift_mean: bool = True, unbiased: bool = False, eps: Scalar = 1e-8
) -> Array:
    """Scales x to variance 1 (and shifts it to mean 0 if `shift_mean`) over the mask, float32.

    The result is 0 outside the mask. Population variance by default, with `eps` inside the square
    root (Huang et al. 2023, item 18); `unbiased=True` divides by n - 1 as TRL and verl do.
    """
    x, mask = matched(x=x, mask=mask)
    x = jnp.where(mask > 0, x, 0.0)  # otherwise 0 times NaN would reach every entry's gradient
    mean = masked_mean(x, mask)
    count = jnp.sum(mask)
    variance = masked_mean(jnp.square(x - mean), mask)
    if unbiased:
        variance = variance * count / jnp.maximum(count - 1.0, 1.0)
    whitened = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask > 0, whitened if shift_mean else whitened + mean, 0.0)


# ---------------------------------------------------------------------------- losses of comparisons


def rank_loss(
    *, chosen: Float[Array, " B"], rejected: Float[Array, " B"], margin: Array | float = 0.0
) -> Float[Array, " B"]:
    """-log sigmoid(chosen - rejected - margin), in nats per pair. [B], [B] -> [B].

    This is the Bradley-Terry model; the margin, a number or [B], is Llama 2's (arXiv:2307.09288,
    eq. 2).
    Raises ValueError if shapes differ.
    """
    if jnp.ndim(margin) == 0:
        margin = jnp.full(jnp.shape(chosen), margin, jnp.float32)
    chosen, rejected, margin = matched(chosen=chosen, rejected=rejected, margin=margin)
    return _entrywise(lambda gap: -jax.nn.log_sigmoid(gap), chosen - rejected - margin)


def centring_penalty(
    *, chosen: Float[Array, "*#n"], rejected: Float[Array, "*#n"]
) -> Float[Array, "..."]:
    """(chosen + rejected)^2: pulls the scores of a pair towards mean 0 (Eisenstein et al. 2023).

    Any shape; axes of size 1 are broadcast, so that [B, K, 1] and [B, 1, K] give the penalty of
    every pair of K responses, [B, K, K]. Raises ValueError if the numbers of axes differ.
    """
    if jnp.ndim(chosen) != jnp.ndim(rejected):
        raise ValueError(
            f"chosen {jnp.shape(chosen)} and rejected {jnp.shape(rejected)} must have the same "
            "number of axes"
        )
    total = jnp.asarray(chosen, jnp.float32) + jnp.asarray(rejected, jnp.float32)
    return _entrywise(jnp.square, total)


def ranked_pairs(ranks: Int[Array, "B K"], present: Float[Array, "B K"]) -> Float[Array, "B K K"]:
    """1 at [b, i, j] where response i is ranked better than j and both are present, else 0."""
    _, present = matched(ranks=ranks, present=present)
    both = present[:, :, None] * present[:, None, :]
    return both * (ranks[:, :, None] < ranks[:, None, :])


def kwise_rank_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    present: Float[Array, "B K"],
    margin: Array | float = 0.0,
) -> Float[Array, " B"]:
    """Mean rank loss over the pairs of each prompt whose ranks differ. [B, K] x 3 -> [B], nats.

    InstructGPT (arXiv:2203.02155, eq. 1): the mean over all C(K, 2) comparisons of a prompt. Rank 0
    is best; equal ranks are ties and make no pair, so the mean is over the pairs that differ. A
    prompt with no pair gives 0. `present` is 1 where there is a response. `margin`: a number, [B],
    or [B, K, K] for each pair (better, worse).
    Raises ValueError if shapes differ.
    """
    scores, _, present = matched(scores=scores, ranks=ranks, present=present)
    pairs = ranked_pairs(ranks, present)
    margin = jnp.asarray(margin, jnp.float32)
    if margin.shape not in ((), pairs.shape[:1], pairs.shape):
        raise ValueError(
            f"margin {margin.shape} must be a number, one per prompt {pairs.shape[:1]} or one per "
            f"pair of responses {pairs.shape}"
        )
    if margin.ndim == 1:
        margin = margin[:, None, None]
    # Otherwise 0 times NaN would reach the gradient of the present responses.
    scores = jnp.where(present > 0, scores, 0.0)
    margin = jnp.where(pairs > 0, margin, 0.0)
    terms = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :] - margin)
    return masked_mean(terms, pairs, axis=(1, 2))


def plackett_luce_loss(
    scores: Float[Array, "B K"], ranks: Int[Array, "B K"], present: Float[Array, "B K"]
) -> Float[Array, " B"]:
    """-log P(ranking) under the Plackett-Luce model, in nats per prompt. [B, K] x 3 -> [B].

    Each response but the worst is chosen by a softmax among itself and those ranked worse; K = 2 is
    Bradley-Terry. Tied responses do not compete with each other (a tie says nothing about their
    order). A prompt without a pair that differs gives 0. `present` is 1 where there is a response.
    Raises ValueError if shapes differ.
    """
    scores, _, present = matched(scores=scores, ranks=ranks, present=present)
    scores = jnp.where(present > 0, scores, 0.0)  # otherwise 0 times NaN would reach the gradient
    pairs = ranked_pairs(ranks, present)
    worse = jnp.where(pairs > 0, scores[:, None, :], -jnp.inf)
    competing = jnp.concatenate([scores[:, :, None], worse], axis=2)
    terms = jax.nn.logsumexp(competing, axis=2) - scores
    return masked_sum(terms, jnp.max(pairs, axis=2), axis=1)


def score_regression_loss(
    *, scores: Float[Array, "*n"], targets: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """(scores - targets)^2 for each entry, without a factor 1/2. Raises if shapes differ."""
    scores, targets = matched(scores=scores, targets=targets)
    return _entrywise(jnp.square, scores - targets)


# ----------------------------------------------------------------------- losses of policy and value


def clipped_policy_loss(
    *,
    logprobs: Float[Array, "*n"],
    old_logprobs: Float[Array, "*n"],
    advantages: Float[Array, "*n"],
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
) -> Float[Array, "*n"]:
    """PPO's clipped surrogate objective, negated. [B, T] per token, or [B] per response.

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7; `clip_eps_high` loosens the upper side (DAPO,
    arXiv:2503.14476). `dual_clip` c > 1 bounds the loss of a negative advantage A by c * |A| (Ye et
    al. 2020, arXiv:1912.09729, eq. 5). The log-ratio logprobs - old_logprobs is clamped at +-20
    (`MAX_LOG_RATIO`).
    Not reduced: the caller chooses the mean. Raises ValueError if shapes differ.
    """
    logprobs, old_logprobs, advantages = matched(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    high = clip_eps if clip_eps_high is None else clip_eps_high

    def loss(log_ratio, advantages):
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + high)
        found = -jnp.minimum(ratio * advantages, clipped * advantages)
        if dual_clip is None:
            return found
        return jnp.where(advantages < 0, jnp.minimum(found, -dual_clip * advantages), found)

    log_ratio = jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _entrywise(loss, log_ratio, advantages)


def clipped_value_loss(
    *,
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    clip_eps: Scalar,
) -> Float[Array, "B T"]:
    """1/2 max((V - G)^2, (V_old + clip(V - V_old, +-eps) - G)^2), per token. All [B, T] -> [B, T].

    OpenAI baselines' form (Huang et al. 2023, item 19), including the factor 1/2.
    Raises ValueError if shapes differ.
    """
    values, old_values, returns = matched(values=values, old_values=old_values, returns=returns)
    clipped = old_values + jnp.clip(values - old_values, -clip_eps, clip_eps)
    return _entrywise(
        lambda error, clipped_error: (
            0.5 * jnp.maximum(jnp.square(error), jnp.square(clipped_error))
        ),
        values - returns,
        clipped - returns,
    )


# ------------------------------------------------------------------------------------- divergences


def kl_k1(
    *, logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Schulman's k1, log p - log p_ref, in nats per token: unbiased for tokens drawn from p.

    May be negative for a single token. Raises ValueError if shapes differ.
    """
    logprobs, ref_logprobs = matched(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def kl_k2(
    *, logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Schulman's k2, (log p - log p_ref)^2 / 2, in nats per token.

    Biased, of low variance, and its gradient is that of the KL divergence. Raises ValueError if
    shapes differ.
    """
    return _entrywise(
        lambda difference: 0.5 * jnp.square(difference),
        kl_k1(logprobs=logprobs, ref_logprobs=ref_logprobs),
    )


def kl_k3(
    *, logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Schulman's k3, r - 1 - log r with r = p_ref / p, in nats per token.

    Unbiased for tokens drawn from p, and never negative. Raises ValueError if shapes differ.
    """
    return _entrywise(
        lambda difference: jnp.expm1(difference) - difference,
        -kl_k1(logprobs=logprobs, ref_logprobs=ref_logprobs),
    )
