"""Networks of action values: Q(s, a), the value of each token a after the text s, and perhaps V(s).

A network is a `Model` with the trunk of a policy. Its head "q" [D, V] gives Q; a second one,
"twin", and the scalar head "score", which gives V, are there in networks for ILQL. Where there are
two heads, Q is the lower of the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import shards, vocabulary
from rlhf_jax.models import layers, transformer
from rlhf_jax.models.transformer import Model

TWIN_SCALE = 0.01  # the twin starts with this share of the usual spread, so that the two differ


def single(policy: Model, key: Array) -> Model:
    """The policy's trunk, with a head of action values that starts at exactly 0."""
    del key
    weights = {k: v for k, v in policy.weights.items() if k not in transformer.HEADS}
    return Model(policy.config, {**weights, "q": {"kernel": jnp.zeros(_shape(policy))}})


def twin(policy: Model, key: Array) -> Model:
    """`single` with a twin head, near 0, and a scalar head for V, which starts at exactly 0."""
    scale = TWIN_SCALE * policy.config.d_model**-0.5
    kernel = scale * jax.random.normal(key, _shape(policy))
    weights = {**single(policy, key).weights, "twin": {"kernel": kernel}}
    return transformer.with_score_head(Model(policy.config, weights), None)


def _shape(policy: Model) -> tuple[int, int]:
    return policy.config.d_model, policy.config.vocab_size


def kernels(network: Model) -> tuple[Float[Array, "D V"], ...]:
    """The heads of action values. Raises ValueError where there are none."""
    if "q" not in network.weights:
        raise ValueError(
            "a network of action values has a head q, such as q_learning.run trains, and this "
            f"model has {sorted(network.weights.keys() & set(transformer.HEADS))}"
        )
    return tuple(network.weights[x]["kernel"] for x in ("q", "twin") if x in network.weights)


def values(network: Model, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """Q of every token, from final hidden states; float32."""
    found = [
        layers.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        for kernel in kernels(network)
    ]
    return found[0] if len(found) == 1 else jnp.minimum(*found)


def chosen(
    network: Model, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> tuple[tuple[Float[Array, "B T"], Float[Array, "B T"]], ...]:
    """For each head: (Q of each token, log-sum-exp of the Q of all tokens in its place)."""
    heads = kernels(network)
    fn = vocabulary.of_heads(vocabulary.chosen)
    return shards.over_vocabulary(fn, (hidden,) * len(heads), heads, tokens)


def soft_value(
    policy: Model,
    network: Model,
    hiddens: tuple[Float[Array, "B T D"], Float[Array, "B T E"]],
    tokens: Int[Array, "B T"],
    beta: float | Array,
) -> Float[Array, "B T"]:
    """beta log sum_a p(a) exp(Q(a) / beta) of the state before each token; p has no gradient.

    `hiddens` are the policy's and the network's; only the shape of `tokens` is read.
    """
    hiddens = (jax.lax.stop_gradient(hiddens[0]), hiddens[1])
    heads = (jax.lax.stop_gradient(transformer.unembedding(policy)), *kernels(network)[:1])
    fn = vocabulary.of_heads(vocabulary.soft_value, softcap=policy.config.logit_softcap)
    return shards.over_vocabulary(fn, hiddens, heads, tokens, beta)


def limited_best(
    policy: Model,
    network: Model,
    target: Model,
    hiddens: tuple[Float[Array, "B T D"], Float[Array, "B T E"], Float[Array, "B T E"]],
    tokens: Int[Array, "B T"],
    top_k: int,
) -> Float[Array, "B T"]:
    """The target's Q of the token that the network finds best, in the state before each token.

    It is chosen among the `top_k` most likely tokens of the policy. No gradient passes. `hiddens`
    are those of the three; only the shape of `tokens` is read.
    """
    heads = (transformer.unembedding(policy), kernels(network)[0], kernels(target)[0])
    hiddens, heads = jax.lax.stop_gradient((hiddens, heads))
    fn = vocabulary.of_heads(vocabulary.limited_best, top_k=top_k)
    return shards.over_vocabulary(fn, hiddens, heads, tokens)
