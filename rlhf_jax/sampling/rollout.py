"""What the policy did, recorded once: shared by every online algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlhf_jax import sharding
from rlhf_jax.data.batches import Prompts
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import decode

Score = Callable[[Any, Array, Array, Array], Array]  # (params, tokens, attend, mask) -> [B]


class Rollout(NamedTuple):
    """Responses and what was true of them when they were sampled. Never recomputed later.

    tokens, attend, mask [B, T]; old_logprobs [B, T]: the policy's, nats, at the sampling
    temperature; sampler_logprobs [B, T]: as the sampler saw them (the same array in float32);
    ref_logprobs [B, T]: the reference's; scores [B]; lengths [B]; finished [B]: 1 if EOS came;
    index [B]: which prompt.
    """

    tokens: Int[Array, "B T"]
    attend: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    sampler_logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"]
    scores: Float[Array, " B"]
    lengths: Int[Array, " B"]
    finished: Float[Array, " B"]
    index: Int[Array, " B"]


def response_logprobs(
    model: Model,
    tokens: Int[Array, "B T"],
    attend: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    temperature: float | Array,
    start: int,
    micro_batches: int = 1,
) -> Float[Array, "B T"]:
    """Log-probabilities of the sampled tokens under `model`, nats, 0 where mask is 0."""

    def forward(tokens, attend):
        hidden = transformer.hidden_states(model, tokens, attend)
        return heads.token_logprobs(model, hidden, tokens, temperature, start)[0]

    return heads.map_rows(forward, micro_batches, tokens, attend) * mask


def collect(
    policy: Model,
    reference: Model,
    score: Score,
    scorer: Any,
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    temperature: float | Array,
    micro_batches: int = 1,
) -> Rollout:
    """Samples one response a prompt, then scores it by the reference and by `score(scorer, ...)`.

    A pure function, to be jitted whole. In float32 the sampler's own log-probabilities are the old
    ones. In bfloat16 a cached decode and a full forward round differently, so the old ones come
    from the full forward, which is also what the loss runs.
    """
    samples = decode.sample(
        policy,
        prompts.tokens,
        prompts.attend,
        decode.row_keys(key, prompts.index),
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        temperature=temperature,
    )
    samples = sharding.constrain_rows(samples)
    rows = (samples.tokens, samples.attend, samples.mask)
    start = prompts.tokens.shape[1]
    old = samples.logprobs
    if policy.config.dtype != "float32":
        old = response_logprobs(policy, *rows, temperature, start, micro_batches)
    ref = response_logprobs(reference, *rows, temperature, start, micro_batches)
    scores = heads.map_rows(lambda *xs: score(scorer, *xs), micro_batches, *rows)
    return Rollout(
        *rows,
        old_logprobs=old,
        sampler_logprobs=samples.logprobs,
        ref_logprobs=ref,
        scores=scores.astype(jnp.float32),
        lengths=samples.lengths,
        finished=samples.finished,
        index=prompts.index,
    )
