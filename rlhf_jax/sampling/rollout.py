"""Rollouts: responses are sampled, then judged, and what was measured is recorded once.

    prompts -> sample -> Samples -> judge -> Rollout

There are two steps so that a reward written in Python can score the responses on the host while the
device runs `judge`. Both are pure functions, which the caller compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlhf_jax import losses, shards
from rlhf_jax.data.batches import Demonstrations, Prompts
from rlhf_jax.data.records import Ends
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling import decode
from rlhf_jax.sampling.decode import Choose, Guide, Processor, Samples, Sampling

TABLE_BITS = 18  # of the hash table of `distinct_bigrams`, which is 1 MiB
# A reward on the device: (params, tokens [B, T], attend [B, T], mask [B, T]) -> scores [B].
Score = Callable[[Any, Array, Array, Array], Array]


class Drawing(NamedTuple):
    """How tokens are chosen, beyond the numbers in `Sampling`: functions, and what ends a response.

    ends: the EOS and padding ids. choose: draws a token from logits. processors: change the logits
    before the filters.
    """

    ends: Ends
    choose: Choose = decode.categorical
    processors: tuple[Processor, ...] = ()


class Rollout(NamedTuple):
    """Responses and what was true of them when they were sampled; never recomputed later.

    All log-probabilities are in nats, at the sampling temperature, and 0 where `mask` is 0.
    """

    tokens: Int[Array, "B T"]  # prompt on the left, response on the right
    attend: Int[Array, "B T"]  # 1 on every real token
    mask: Float[Array, "B T"]  # 1 on sampled tokens up to and including EOS
    old_logprobs: Float[Array, "B T"]  # the denominator of ratios; see `judge`
    sampler_logprobs: Float[Array, "B T"]  # as decoding with the cache computed them
    # Of the distribution that was sampled, after processors, penalties and filters.
    filtered_logprobs: Float[Array, "B T"]
    forward_logprobs: Float[Array, "B T"]  # as a forward pass over whole rows computes them
    ref_logprobs: Float[Array, "B T"]  # the reference's
    entropy: Float[Array, "B T"]  # of the policy's distribution of each token, nats
    values: Float[Array, "B T"] | None  # of the state before each token; None without a critic
    scores: Float[Array, " B"]  # of the reward
    lengths: Int[Array, " B"]  # sampled tokens
    finished: Float[Array, " B"]  # 1 where the response ended with EOS
    index: Int[Array, " B"]  # number of the prompt, see `Prompts`
    given: Float[Array, " B"] | None = None  # 1 where the response is a reference, not a sample
    pretraining: Demonstrations | None = None  # the text of this iteration that a run mixes in


class Outputs(NamedTuple):
    """Outputs of the trained networks per response token."""

    logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"] | None  # None without a critic
    entropy: Float[Array, "B T"]


def forward(
    params: dict,
    tokens: Array,
    attend: Array,
    *,
    sampling: Sampling,
    micro_batches: int = 1,
    entropy_gradient: bool = False,
) -> Outputs:
    """Log-probabilities, values and entropies from one pass over whole rows [B, T].

    Values come from `params["critic"]`, or from the policy's own scalar head where it has one.
    Log-probabilities and entropies are 0 before the response. Entropies carry a gradient only with
    `entropy_gradient`.
    """
    policy = params["policy"]
    start = tokens.shape[1] - sampling.max_new_tokens

    def of_rows(tokens, attend):
        hidden = transformer.hidden_states(policy, tokens, attend)
        logprobs, entropy = heads.token_logprobs(
            policy, hidden, tokens, sampling.temperature, start, entropy_gradient
        )
        critic = params.get("critic", policy)
        if "score" not in critic.weights:
            return Outputs(logprobs, None, entropy)
        if critic is not policy:
            hidden = transformer.hidden_states(critic, tokens, attend)
        return Outputs(logprobs, heads.token_values(critic, hidden), entropy)

    recompute = heads.must_recompute(policy, params.get("critic", policy))
    return heads.map_rows(of_rows, micro_batches, tokens, attend, recompute=recompute)


def sample(
    policy: Model,
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    sampling: Sampling,
    drawing: Drawing,
    first_sample: int | Array = 0,
    rows: int = 1,
    guide: Guide | None = None,
) -> tuple[Samples, Int[Array, " M"]]:
    """Samples `rows` responses to each row of `prompts`: (samples, the prompts' numbers).

    M = B * rows; the responses to a prompt follow each other. Sample k of prompt i is a function of
    (key, i, k) alone. The first response to a prompt is its sample number `first_sample`, further
    ones, also those to another row with the same prompt, are the samples after that.
    """
    index = jnp.repeat(prompts.index, rows)
    samples = decode.sample(
        policy,
        prompts.tokens,
        prompts.attend,
        decode.row_keys(key, index, first_sample),
        sampling=sampling,
        ends=drawing.ends,
        choose=drawing.choose,
        processors=drawing.processors,
        heat=prompts.heat,
        guide=guide,
    )
    return shards.constrain_rows(samples), index


def with_references(samples: Samples, prompts: Prompts, ends: Ends, every: int) -> Samples:
    """The samples [M] of `prompts` [B], but in every `every`-th row the prompt's reference.

    The log-probabilities of these rows are 0 until `judge` fills them in.
    """
    width = prompts.tokens.shape[1]
    longest = samples.tokens.shape[1] - width
    missing = longest - prompts.references.shape[1]  # `online.run` checks that it is not below 0
    references = jnp.pad(prompts.references, ((0, 0), (0, missing)), constant_values=ends.pad_id)
    rows = samples.tokens.shape[0] // prompts.tokens.shape[0]
    references, lengths = (
        jnp.repeat(x, rows, axis=0) for x in (references, prompts.reference_lengths)
    )
    is_given = jnp.arange(samples.tokens.shape[0]) % every == 0
    active = jnp.arange(longest) < lengths[:, None]

    def put(whole, response):
        replaced = jnp.concatenate([whole[:, :width], response.astype(whole.dtype)], axis=1)
        return jnp.where(is_given[:, None], replaced, whole)

    nothing = jnp.zeros(active.shape)
    return Samples(
        tokens=put(samples.tokens, references),
        attend=put(samples.attend, active),
        mask=put(samples.mask, active),
        logprobs=put(samples.logprobs, nothing),
        filtered_logprobs=put(samples.filtered_logprobs, nothing),
        lengths=jnp.where(is_given, lengths, samples.lengths),
        finished=jnp.where(is_given, 1.0, samples.finished),
        given=is_given.astype(jnp.float32),
    )


def judge(
    params: dict,
    samples: Samples,
    index: Int[Array, " B"],
    *,
    sampling: Sampling,
    score: Score | None,
    micro_batches: int = 1,
) -> Rollout:
    """The samples with the outputs of reference, trained networks and reward.

    `params` holds "policy", "reference", "scorer" (the reward's parameters) and perhaps "critic".
    Without `score` the scores are 0, to be filled in by a reward on the host. In float32 the
    sampler's own log-probabilities are the old ones. In bfloat16 decoding with the cache and a pass
    over whole rows round differently, so the old ones come from that pass, as the loss's do. Those
    of references always do.
    Raises ValueError if the reward does not return one number per response.
    """
    rows = (samples.tokens, samples.attend, samples.mask)
    policy, micro = params["policy"], micro_batches
    outputs = forward(params, *rows[:2], sampling=sampling, micro_batches=micro)
    forward_logprobs = outputs.logprobs * samples.mask
    exact = policy.config.dtype == "float32"

    def of_sampler(logprobs):
        if samples.given is None:
            return logprobs
        return jnp.where(samples.given[:, None] > 0, forward_logprobs, logprobs)

    reference = {"policy": params["reference"]}
    ref = forward(reference, *rows[:2], sampling=sampling, micro_batches=micro)
    scores = jnp.zeros(rows[0].shape[0])
    if score is not None:

        def of_rows(*rows):
            return check_scores(score, score(params["scorer"], *rows), rows[0].shape[0])

        scores = heads.map_rows(of_rows, micro, *rows)
    return Rollout(
        *rows,
        old_logprobs=of_sampler(samples.logprobs) if exact else forward_logprobs,
        sampler_logprobs=of_sampler(samples.logprobs),
        filtered_logprobs=of_sampler(samples.filtered_logprobs),
        forward_logprobs=forward_logprobs,
        ref_logprobs=ref.logprobs * samples.mask,
        entropy=outputs.entropy,
        values=outputs.values,
        scores=scores.astype(jnp.float32),
        lengths=samples.lengths,
        finished=samples.finished,
        index=index,
        given=samples.given,
    )


def drawn(rollout: Rollout, every: int) -> Rollout:
    """The responses without every `every`-th one, from the first on: what was drawn at random."""
    rows = np.arange(rollout.scores.shape[0])
    return jax.tree.map(lambda x: x[rows[rows % every > 0]], rollout)


def check_scores(reward: Callable, scores: Any, count: int) -> Any:
    """Returns `scores`. Raises ValueError, naming the reward, unless there is one per response."""
    shape = getattr(scores, "shape", None)
    if shape != (count,):
        name = getattr(reward, "__name__", "the reward")
        found = f"shape {list(shape)}" if shape is not None else f"a {type(scores).__name__}"
        raise ValueError(
            f"{name} returned {found}, but a reward gives one number per response: [B] = [{count}]"
        )
    return scores


def measurements(rollout: Rollout) -> dict[str, Array]:
    """Metrics of any rollout, under the names that TRL gives the same quantities.

    KL and entropy are summed over the tokens of a response and averaged over responses.
    "objective/entropy" is the estimate -log p of what was sampled, as in TRL;
    "objective/token_entropy" is exact, in nats per token. `docs/conventions.md` lists them all.
    """
    mask = rollout.mask
    both = {"logprobs": rollout.old_logprobs, "ref_logprobs": rollout.ref_logprobs}
    return {
        "objective/kl": jnp.mean(jnp.sum(losses.kl_k1(**both) * mask, axis=1)),
        "objective/kl_k3": jnp.mean(jnp.sum(losses.kl_k3(**both) * mask, axis=1)),
        "objective/entropy": jnp.mean(-jnp.sum(rollout.old_logprobs * mask, axis=1)),
        "objective/token_entropy": losses.masked_mean(rollout.entropy, mask),
        "objective/scores": jnp.mean(rollout.scores),
        "objective/scores_std": jnp.std(rollout.scores),
        "objective/length": jnp.mean(rollout.lengths.astype(jnp.float32)),
        "num_tokens": jnp.sum(rollout.lengths),
        "val/num_eos_tokens": jnp.sum(rollout.finished),
        "objective/eos_share": jnp.mean(rollout.finished.astype(jnp.float32)),
        "objective/distinct_bigrams": distinct_bigrams(rollout.tokens, mask),
    }


def distinct_bigrams(tokens: Int[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, ""]:
    """Distinct pairs of neighbouring tokens as a share of all pairs of responses; 0 without any.

    Estimated by linear counting (Whang et al. 1990): pairs are hashed into a table, and the number
    of pairs is read off the share of it that stays empty. Sorting them would gather all responses
    on one device.
    """
    both = mask[:, :-1] * mask[:, 1:]
    first, second = tokens[:, :-1].astype(jnp.uint32), tokens[:, 1:].astype(jnp.uint32)
    hashed = (first * jnp.uint32(0x9E3779B1)) ^ (second * jnp.uint32(0x85EBCA77))
    hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0x2C1B3C6D)
    places = (hashed >> (32 - TABLE_BITS)).astype(jnp.int32).reshape(-1)
    size = 2**TABLE_BITS
    counts = jnp.zeros(size).at[places].add(both.reshape(-1))
    empty = jnp.maximum(jnp.mean(counts == 0.0), 1.0 / size)
    total = jnp.sum(both)
    return jnp.minimum(-size * jnp.log(empty) / jnp.maximum(total, 1.0), 1.0)


def gaps(rollout: Rollout) -> dict[str, Array]:
    """What `on_policy.checks` reads: how far computations of the same log-probabilities disagree,
    in nats, and how many scores are not finite."""

    def gap(other: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return jnp.abs(rollout.old_logprobs - other) * rollout.mask

    return {
        "check/logprob_gap": jnp.max(gap(rollout.forward_logprobs)),
        "check/sampler_gap": losses.masked_mean(gap(rollout.sampler_logprobs), rollout.mask),
        "check/reference_gap": jnp.max(gap(rollout.ref_logprobs)),
        "check/bad_scores": jnp.sum(~jnp.isfinite(rollout.scores)),
    }


def texts(tokenizer: Tokenizer, samples: Any) -> tuple[list[str], list[str]]:
    """(prompts, responses) as text, from any record with `tokens`, `attend` and `mask` [B, T]."""
    # On the host: indexing device arrays by a mask would compile a program for each length.
    rows = jax.device_get((samples.tokens, samples.attend, samples.mask))
    prompts, responses = [], []
    for tokens, attend, mask in zip(*rows):
        prompts.append(tokenizer.decode(tokens[(attend > 0) & (mask == 0)].tolist()))
        responses.append(tokenizer.decode(tokens[mask > 0].tolist()))
    return prompts, responses
