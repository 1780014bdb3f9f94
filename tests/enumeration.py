"""A policy so small that all of its responses can be listed: five tokens, at most three of them.

Expectations are then sums over the list, and exact.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses, online
from rlhf_jax.data.batches import Prompts
from rlhf_jax.data.records import Ends
from rlhf_jax.models import transformer
from rlhf_jax.sampling import Drawing, Sampling

VOCABULARY, LONGEST, EOS, PROMPT = 5, 3, 4, (1, 2)
ENDS = Ends((EOS,), 0)
SAMPLING = Sampling(max_new_tokens=LONGEST)
SHAPE = transformer.Config(
    vocab_size=VOCABULARY,
    num_layers=1,
    d_model=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    d_ff=8,
    max_length=8,
)


@functools.cache
def model(seed=0):
    """Weights five times as large as at the start of training, so that some tokens are rare."""
    policy = jax.jit(transformer.init, static_argnums=0)(SHAPE, jax.random.key(seed))
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, policy)


def responses():
    """(tokens [N, R], mask [N, R]) of all responses, padded with 0."""
    rest = [x for x in range(VOCABULARY) if x != EOS]
    ended = ((*head, EOS) for n in range(LONGEST) for head in itertools.product(rest, repeat=n))
    rows = [*ended, *itertools.product(rest, repeat=LONGEST)]
    tokens, mask = np.zeros((2, len(rows), LONGEST), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return jnp.asarray(tokens), jnp.asarray(mask, jnp.float32)


def rows():
    """(tokens, attend, mask) of all responses after the prompt, [N, T] each."""
    tokens, mask = responses()
    prompt = jnp.tile(jnp.array(PROMPT), (len(tokens), 1))
    tokens = jnp.concatenate([prompt, tokens], axis=1)
    mask = jnp.concatenate([jnp.zeros(prompt.shape), mask], axis=1)
    attend = jnp.concatenate([jnp.ones(prompt.shape), mask[:, len(PROMPT) :]], axis=1)
    return tokens, attend.astype(jnp.int32), mask


def logprobs(policy):
    """log p of every token of every response, [N, T]; 0 outside the mask."""
    tokens, attend, mask = rows()
    logits = transformer.logits(policy, transformer.hidden_states(policy, tokens, attend))
    return losses.token_logprobs(logits, tokens) * mask


def score(params, tokens, attend, mask):
    """A reward that depends on the tokens and on their places."""
    del params, attend
    place = jnp.arange(tokens.shape[1])
    return jnp.sum(jnp.sin(3.0 * tokens + 2.0 * place) * mask, axis=1)


def exact(value):
    """The gradient of `value(policy)` at `model()`, one vector."""
    gradient = jax.jit(jax.grad(value))(model())
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


def prompts(count):
    """The same prompt `count` times, under different numbers, so that its samples differ."""
    tokens = jnp.tile(jnp.array(PROMPT), (count, 1))
    return Prompts(tokens, jnp.ones_like(tokens), jnp.arange(count))


def estimates(config, algorithm, count, memory=None, drawing=None, reference=None):
    """Gradients of the loss on `count` independent rollouts, [count, number of weights].

    `config.batch_size` is the number of prompts of a rollout.
    """
    drawing = drawing or Drawing(ENDS)
    params = {"policy": model(), "reference": reference or model(), "scorer": ()}
    start = algorithm.memory if memory is None else memory

    def estimate(iteration):
        rollout = online.collect(
            drawing, score, config, params, iteration, prompts(config.batch_size)
        )
        batch, _, _ = algorithm.make_batch(config, params, start, rollout)

        def loss(policy):
            return algorithm.loss(config, {**params, "policy": policy}, batch)[0]

        return jax.tree.leaves(jax.grad(loss)(params["policy"]))

    found = jax.jit(lambda: jax.lax.map(estimate, jnp.arange(count)))()
    return np.concatenate([np.asarray(x).reshape(count, -1) for x in found], axis=1)


def z_scores(estimates, expected, directions=8):
    """Distance of their mean from `expected`, in standard errors, along random directions."""
    along = np.random.default_rng(0).normal(size=(estimates.shape[1], directions))
    projected = estimates @ along
    error = projected.std(axis=0, ddof=1) / np.sqrt(len(projected))
    return (projected.mean(axis=0) - expected @ along) / error
