"""Efficient sampling for reinforcement learning: ESRL (arXiv:2308.02223).

Two ideas of the paper. *Two-stage sampling*: responses are decoded without a gradient, and one pass
over whole rows scores them with it; every online algorithm here does so (`online.sample`, then
`online.forward`), and `decoded_logprobs` is the variant it replaces, which differentiates through
the decoding. *Dynamic sampling*: what the policy can already do is explored less. The capability
of each prompt is estimated when it is sampled, and at the prompt's next visit

    samples      k = round(k_min + (K - k_min) (1 - C))       of its K are trained on
    temperature  tau = heat_min + (1 - heat_min) (1 - C)      times the run's

and of the responses of an iteration only `train_responses` are trained on, those with the least
capability. Rewards are compared with a queue of the last ones, as z-scores, and the loss may be
mixed with the cross entropy of references.

What was seen of the method: the abstract, a caption and the group's public code, in which the share
of responses with the highest mean of 1 + p log p (p the largest probability of a token) is dropped
from each batch; rewards go through a queue of 1,000; and the loss is mixed with cross entropy. Our
design: C from exact entropies or from rewards, in [0, 1]; the rules for k and tau, which the public
code lacks; and arrays whose shapes do not depend on k. So a sample that a prompt does not get is
drawn all the same and has weight 0 in the update, unless `train_responses` leaves it out. It is not
counted as consumed.

Where tau < 1 the sampler is not the policy: `off_policy="weight"` weights each response, as in
REINFORCE. The gradient is biased: the queue holds the response itself, and rewards are divided by
its standard deviation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import abstract, losses, on_policy, online
from rlhf_jax.abstract import Stage
from rlhf_jax.config import Count, NonNegative, Positive, Share
from rlhf_jax.data import loader
from rlhf_jax.data.records import Prompts
from rlhf_jax.models import decoding, transformer
from rlhf_jax.models.transformer import Model
from rlhf_jax.sampling.rollout import Rollout
from rlhf_jax.training import state as training
from rlhf_jax.training.metrics import Display

DISPLAY = Display(
    "ESRL",
    online.HEADLINE,
    {
        **online.CURVES,
        "esrl/consumed": "Samples trained on",
        "esrl/capability": "Capability",
        "loss": "Loss",
    },
)


class Config(online.Config):
    """Settings of an ESRL run."""

    num_epochs: Count = 1
    samples_per_prompt: Count = 8  # K, the most that a prompt gets; its reference is among them
    min_samples: Count | None = None  # k_min, what a prompt with capability 1 gets; None: K
    min_heat: Positive = 1.0  # heat_min, of a prompt with capability 1
    # Responses of an iteration that are trained on, the least capable ones. None: all.
    train_responses: Count | None = None
    queue_size: Count = 1000  # rewards that a reward is compared with
    kl_coef: NonNegative = 0.05  # reward subtracted per nat of KL
    mle_share: Share = 0.0  # weight of the cross entropy of references; that of the rest is 1 - it

    def check(self) -> None:
        """Raises ValueError for more samples than are drawn, sizes that do not divide, and heat.

        Where temperatures differ the sampler is not the policy, and `off_policy` must say so.
        """
        super().check()
        if self.min_heat != 1.0 and self.off_policy == "refuse":
            raise ValueError(
                f"min_heat={self.min_heat} makes the sampler another distribution than the policy; "
                'set off_policy="weight" (importance weights) or "ignore"'
            )
        if self.fewest > self.samples_per_prompt:
            raise ValueError(
                f"min_samples={self.min_samples} must be at most "
                f"samples_per_prompt={self.samples_per_prompt}"
            )
        updates = self.num_epochs * self.num_minibatches
        if updates > 1:
            raise ValueError(
                f"num_epochs * num_minibatches = {updates} updates per iteration, but the loss is "
                "the policy gradient in the first only; use one update"
            )
        if self.num_trained > self.num_responses:
            raise ValueError(
                f"train_responses={self.train_responses} must be at most the "
                f"{self.num_responses} that are sampled"
            )
        if self.num_trained % self.micro_batches:
            raise ValueError(
                f"train_responses={self.train_responses} are not a multiple of "
                f"micro_batches={self.micro_batches}"
            )

    @property
    def fewest(self) -> int:
        """k_min."""
        return self.min_samples or self.samples_per_prompt

    @property
    def num_trained(self) -> int:
        """Responses that an iteration trains on."""
        return self.train_responses or self.num_responses

    def row_counts(self) -> dict[str, int]:
        """The numbers of rows that must divide over a mesh: those that are sampled, and trained."""
        return {
            "batch_size * samples_per_prompt": self.num_responses,
            "train_responses": self.num_trained,
            "train_responses / micro_batches": self.num_trained // self.micro_batches,
        }


class Memory(NamedTuple):
    """What ESRL knows of earlier iterations."""

    rewards: training.Queue
    capability: Float[Array, " N"]  # of each prompt at its last visit, 0 before the first


class Batch(NamedTuple):
    """What the loss of one minibatch reads."""

    tokens: Int[Array, "B T"]
    attend: Int[Array, "B T"]
    mask: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, " B"]
    is_trained: Float[Array, " B"]  # 1 on responses of the first k of their prompt
    references: Float[Array, " B"] | None  # 1 on references


# -------------------------------------------------------------------------------- capability


def entropy_capability(vocabulary: int, rollout: Rollout) -> Float[Array, " M"]:
    """1 - mean entropy of a response's tokens / log V: from 0 (uniform) to 1 (certain)."""
    mean = losses.masked_mean(rollout.entropy, rollout.mask, axis=1)
    return 1.0 - mean / jnp.log(vocabulary)


def reward_capability(vocabulary: int, rollout: Rollout) -> Float[Array, " M"]:
    """Where a response's score lies between the 5 % and the 95 % points of the iteration's."""
    del vocabulary
    low, high = jnp.percentile(rollout.scores, jnp.array([5.0, 95.0]))
    span = jnp.maximum(high - low, 1e-8)
    return jnp.clip((rollout.scores - low) / span, 0.0, 1.0)


def least_capable(capability: Float[Array, " M"], rollout: Rollout) -> Float[Array, " M"]:
    """Which responses are trained on: those with the highest value, here the least capability."""
    del rollout
    return -capability


def at_random(capability: Float[Array, " M"], rollout: Rollout) -> Float[Array, " M"]:
    """A choice at random, to compare with: by a hash of the responses' log-probabilities."""
    bits = jax.lax.bitcast_convert_type(jnp.sum(rollout.old_logprobs, axis=1), jnp.uint32)
    return ((bits * jnp.uint32(2654435761)) >> 8).astype(jnp.float32)


# ------------------------------------------------------------------------------------ the algorithm


def prepare(config: Config, memory: Memory, prompts: Prompts) -> Prompts:
    """The prompts with the heat that their capability leaves them."""
    known = memory.capability[prompts.index % memory.capability.shape[0]]
    return prompts._replace(heat=config.min_heat + (1.0 - config.min_heat) * (1.0 - known))


def _z_scores(rewards: Float[Array, " M"], queue: training.Queue) -> Float[Array, " M"]:
    # From one of them on, or the rounding of a mean far from 0 would pass for a spread.
    rewards, values = rewards - queue.values[0], queue.values - queue.values[0]
    mean = losses.masked_mean(values, queue.held)
    variance = losses.masked_mean(jnp.square(values - mean), queue.held)
    return (rewards - mean) * jax.lax.rsqrt(variance + 1e-8)


def _remembered(
    known: Float[Array, " N"], prompts: Int[Array, " G"], found: Float[Array, " G"]
) -> Float[Array, " N"]:
    """The capabilities with those that were found; the mean for a prompt that occurs twice."""
    visits = jnp.zeros_like(known).at[prompts].add(1.0)
    total = jnp.zeros_like(known).at[prompts].add(found)
    return jnp.where(visits > 0, total / jnp.maximum(visits, 1.0), known)


def make_batch(
    capability: Callable,
    priority: Callable,
    config: Config,
    params: dict,
    memory: Memory,
    rollout: Rollout,
):
    """Advantages against the queue, and which responses are trained on: (Batch, memory, metrics).

    Rewards are pushed before they are compared, as in the group's code, so a constant reward gives
    no gradient.
    """
    kl = losses.kl_k1(logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs)
    rewards = rollout.scores - config.kl_coef * losses.masked_sum(kl, rollout.mask, axis=1)
    given = jnp.zeros(rewards.shape) if rollout.given is None else rollout.given
    found = capability(params["policy"].config.vocab_size, rollout)

    count = config.samples_per_prompt
    prompts = rollout.index[::count] % memory.capability.shape[0]
    known = memory.capability[prompts]
    allowed = config.fewest + jnp.round((count - config.fewest) * (1.0 - known))
    is_trained = (jnp.arange(count) < allowed[:, None]).reshape(-1) * (1.0 - given)

    drawn = 1.0 - given
    queue = memory.rewards.push(rewards, drawn)
    gains = _z_scores(rewards, queue) * on_policy.response_weights(config, rollout)
    of_prompt = losses.masked_mean(found.reshape(-1, count), drawn.reshape(-1, count), axis=1)
    memory = Memory(queue, _remembered(memory.capability, prompts, of_prompt))
    batch = Batch(
        tokens=rollout.tokens,
        attend=rollout.attend,
        mask=rollout.mask,
        old_logprobs=rollout.old_logprobs,
        advantages=jnp.where(is_trained > 0, gains, 0.0),
        is_trained=is_trained,
        references=rollout.given,
    )
    if config.train_responses is not None:
        # References first, then those of the first k, in the order of their priority.
        keys = (-priority(found, rollout), -is_trained, -given)
        order = jnp.lexsort(keys)[: config.train_responses]
        batch = jax.tree.map(lambda x: x[order], batch)
    metrics = {
        "esrl/capability": losses.masked_mean(found, drawn),
        "esrl/samples_per_prompt": jnp.mean(allowed),
        "esrl/consumed": jnp.sum(batch.is_trained),
        "objective/rlhf_reward": losses.masked_mean(rewards, drawn),
    }
    return batch, memory, metrics


def loss(config: Config, params: dict, batch: Batch):
    """REINFORCE on the responses that are trained on, mixed with the references' cross entropy."""
    logprobs, _, entropy = online.forward(config, params, batch)
    logps = losses.masked_sum(logprobs, batch.mask, axis=1)
    value = losses.masked_mean(-batch.advantages * logps, batch.is_trained)
    metrics = {
        **on_policy.drift(batch, logprobs),
        "policy/entropy_avg": losses.masked_mean(entropy, batch.mask),
    }
    if batch.references is None:
        return value, metrics
    imitated = losses.masked_mean(-logprobs, batch.mask * batch.references[:, None])
    metrics["loss/mle"] = imitated
    return (1.0 - config.mle_share) * value + config.mle_share * imitated, metrics


def decoded_logprobs(
    policy: Model,
    tokens: Int[Array, "B T"],
    attend: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    temperature: losses.Scalar = 1.0,
) -> Float[Array, "B T"]:
    """log p of the responses by T decoding steps that a gradient goes through: what ESRL replaces.

    `online.forward` gives the same numbers and gradients from one pass. Here every step's
    activations, and every step's key-value cache, are kept for the backward pass.
    """
    start = tokens.shape[1] - max_new_tokens
    model = decoding.weights_for(policy)
    hidden, cache = decoding.prefill(model, tokens[:, :start], attend[:, :start], tokens.shape[1])

    def logprob(hidden, token):
        logits = transformer.logits(model, hidden) / temperature
        return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

    def step(carry, token):
        hidden, cache = carry
        found = logprob(hidden, token)
        return decoding.decode(model, cache, token), found

    _, found = jax.lax.scan(step, (hidden, cache), tokens[:, start:].T)
    return jnp.pad(found.T, ((0, 0), (start, 0))) * (attend > 0)


@functools.cache
def _batch_maker(capability: Callable, priority: Callable) -> Callable:
    """`make_batch` of these functions, the same object for the same ones (see `loop.compiled`)."""
    return functools.partial(make_batch, capability, priority)


def algorithm(
    config: Config,
    num_prompts: int,
    capability: Callable = entropy_capability,
    priority: Callable = least_capable,
    loss_fn: Callable = loss,
) -> online.Algorithm:
    """ESRL as `online` runs it on a dataset of so many prompts."""
    memory = Memory(training.Queue.empty(config.queue_size), jnp.zeros(num_prompts))
    return online.Algorithm(
        "esrl",
        DISPLAY,
        online.policy_alone,
        _batch_maker(capability, priority),
        loss_fn,
        memory,
        references=True,
        prepare=prepare if config.min_heat != 1.0 else None,
    )


def run(
    config: Config,
    *,
    capability: Callable = entropy_capability,
    priority: Callable = least_capable,
    loss_fn: Callable = loss,
    **inputs: Unpack[online.Inputs],
) -> online.Result:
    """Trains `policy` on a reward; see `online.Inputs`.

    capability: (number of token ids, rollout) -> [M] in [0, 1]. priority: (capability, rollout) ->
    [M], of which the highest are the `train_responses`.
    Raises ValueError if `mle_share` is the weight of references that the prompts do not have.
    """
    loader.expect(inputs.get("prompts"), "esrl.run", Prompts)
    examples = inputs["prompts"].examples
    if bool(config.mle_share) != bool(examples.shape.reference):
        raise ValueError(
            f"mle_share={config.mle_share} is the weight of the references, and the prompts have "
            f"{'some' if examples.shape.reference else 'none'}; give both or neither "
            "(batches.prompts(max_reference=...) reads them)"
        )
    if examples.shape.reference and config.num_trained <= config.batch_size:
        raise ValueError(
            f"train_responses={config.train_responses} must be above the {config.batch_size} "
            "references of an iteration, which are trained on first"
        )
    made = algorithm(config, len(examples), capability, priority, loss_fn)
    trained, history = online.run(config, made, **inputs)
    return online.Result(trained["policy"], history)


def programs(
    config: Config,
    *,
    num_prompts: int,
    capability: Callable = entropy_capability,
    priority: Callable = least_capable,
    loss_fn: Callable = loss,
    **shapes: Unpack[abstract.Inputs],
) -> Stage:
    """What `run` runs; `result` is the trained policy."""
    made = algorithm(config, num_prompts, capability, priority, loss_fn)
    return abstract.online(config, made, **shapes)
