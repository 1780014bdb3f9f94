"""Log-probabilities, values and scores of whole rows.

Everything per token is aligned to the tokens: entry t is about token t, given the tokens before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import losses, shards, vocabulary
from rlhf_jax.models import layers, transformer
from rlhf_jax.models.transformer import Model


def map_rows(fn: Callable, micro_batches: int, *arrays, recompute: bool = True):
    """`fn(*arrays)`, computed on `micro_batches` slices of the rows one after the other.

    This divides the memory of the activations by `micro_batches`; the backward pass computes the
    forward pass of each slice again. With `recompute=False` (see `must_recompute`) it does not, and
    what the slices keep is kept for all of them: where layers are computed again, their inputs.

    The outputs of all slices are joined to [B, ...] before a loss is computed, so any loss, however
    it is reduced, is exactly that of the whole batch. Each slice takes every `micro_batches`-th
    row, so that rows split over devices stay split.
    Raises ValueError if `micro_batches` does not divide the rows.
    """
    if micro_batches == 1:
        return fn(*arrays)
    rows = arrays[0].shape[0]
    if rows % micro_batches:
        raise ValueError(f"micro_batches={micro_batches} does not divide a batch of {rows} rows")

    def cut(x):
        return x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(rows, *x.shape[2:])

    one_slice = jax.checkpoint(fn) if recompute else fn
    slices = tuple(cut(x) for x in arrays)
    return jax.tree.map(join, jax.lax.map(lambda piece: one_slice(*piece), slices))


def must_recompute(*models: Model) -> bool:
    """Whether a slice of `map_rows` that these models read is to be computed again.

    Not where all of their layers are computed again as a whole (`remat="full"`), because that would
    be a third forward pass.
    """
    return any(model.config.remat != "full" for model in models)


@functools.partial(transformer.jit, static_argnames=("start", "entropy_gradient"))
def token_logprobs(
    model: Model,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    temperature: losses.Scalar = 1.0,
    start: int = 1,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probabilities, entropies) per token, nats, from hidden states; 0 before column `start`.

    Columns before `start`, such as those of the prompts, are not multiplied by the unembedding.
    """
    first = max(start, 1) - 1
    softcap = model.config.logit_softcap
    logprobs, entropy = shards.over_vocabulary(
        functools.partial(
            losses.chunked_token_logprobs, softcap=softcap, entropy_gradient=entropy_gradient
        ),
        hidden[:, first:],
        transformer.unembedding(model),
        tokens[:, first:],
        temperature,
    )
    skipped = ((0, 0), (first, 0))
    return jnp.pad(logprobs, skipped), jnp.pad(entropy, skipped)


def scalar(model: Model, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """The scalar head's output for hidden states, float32."""
    head = model.weights["score"]
    return (layers.dot(hidden.astype(jnp.float32), head["kernel"]) + head["bias"])[..., 0]


def init_scorer(policy: Model, key: Array) -> Model:
    """The scorer that training starts from: the model without its language-model head.

    A scalar head that the model already has is kept; otherwise `transformer.with_score_head` draws
    a new one from `key`.
    """
    scorer = transformer.without_lm_head(policy)
    if transformer.has_score_head(scorer):
        return scorer
    return transformer.with_score_head(scorer, key)


def token_values(model: Model, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Value of the state before each token: the scalar head's output one token earlier."""
    return losses.align(scalar(model, hidden))


@transformer.jit
def sequence_scores(
    model: Model, tokens: Int[Array, "B T"], attend: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """Score of each row: the scalar head at its last real token, with padding on either side."""
    hidden = transformer.hidden_states(model, tokens, attend)
    steps = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(attend > 0, steps, 0), axis=1)
    return scalar(model, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def token_kl(
    model: Model,
    reference: Model,
    hiddens: tuple[Float[Array, "B T D"], Float[Array, "B T E"]],
    tokens: Int[Array, "B T"],
    temperature: losses.Scalar = 1.0,
    start: int = 1,
) -> Float[Array, "B T"]:
    """KL of the model's distribution of each token to the reference's, over the whole vocabulary.

    `hiddens` are the model's and the reference's. Nats, [B, T]; 0 before column `start`. It has the
    gradient of the KL, and none for the reference.
    """
    first, models = max(start, 1) - 1, (model, jax.lax.stop_gradient(reference))
    softcaps = tuple(x.config.logit_softcap for x in models)
    found = shards.over_vocabulary(
        vocabulary.of_heads(vocabulary.token_kl, softcaps=softcaps),
        (hiddens[0][:, first:], jax.lax.stop_gradient(hiddens[1])[:, first:]),
        tuple(map(transformer.unembedding, models)),
        tokens[:, first:],
        temperature,
    )
    return jnp.pad(found, ((0, 0), (first, 0)))
