"""PPO by the conventions of other programs: `Preset`s of settings, batch and loss for `ppo.run`.

    preset = ppo_presets.verl
    ppo.run(preset.config(num_iterations=100), **preset.functions, policy=policy, ...)

They differ in where the score is paid, what is whitened and by which variance, how much KL is a
reward, and what is clipped. All are PPO with a critic of its own, so a policy loss and a value loss
that are added up here and stepped apart there give the same updates but for the clipping of
gradients. Learning rates, batches and lengths are the experiment's: they are not presets.

| | TRL 1.10 | OpenRLHF 0.11 | verl 0.10 | InstructGPT |
|---|---|---|---|---|
| score paid | after EOS | at EOS | at EOS | at EOS |
| KL in the reward | 0.05 k1 | 0.01 k1, each within +-10 | none | 0.02 k1 |
| score clipped | - | +-10 | - | - |
| advantages whitened | unbiased | biased variance | unbiased | unbiased * |
| lambda | 0.95 | 1 | 1 | 0.95 * |
| policy clip | 0.2 | 0.2 | 0.2, dual 3 | 0.2 * |
| value clip | 0.2 | 0.5 | 0.5 | 0.2 * |
| epochs | 4 | 1 | 1 | 1, in 8 minibatches |

All average over the tokens of a minibatch and have discount 1. The paper of InstructGPT
(arXiv:2203.02155) does not state what is marked *; it is as in TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import losses, online
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import Count, NonNegative, Positive, Share
from rlhf_jax.sampling.rollout import Rollout


class Preset(NamedTuple):
    """The settings of `ppo.run`, to be completed, and the functions that go with them."""

    config: type[ppo.Config]
    make_batch: Callable = ppo.make_batch
    loss: Callable = ppo.loss

    @property
    def functions(self) -> dict[str, Callable]:
        """What `ppo.run` and `ppo.programs` are to be given."""
        return {"make_batch": self.make_batch, "loss_fn": self.loss}


class TrlConfig(ppo.Config):
    """Those of TRL's PPOTrainer."""

    score_at: Literal["last", "after_eos"] = "after_eos"


class OpenRlhfConfig(ppo.Config):
    """Those of OpenRLHF's trainer with the "gae" estimator."""

    num_epochs: Count = 1
    gae_lambda: Share = 1.0
    value_clip_eps: NonNegative = 0.5
    kl_coef: NonNegative = 0.01
    score_bound: Positive = 10.0  # scores are clipped to +- this
    kl_bound: Positive = 10.0  # the KL of a token too, nats


class VerlConfig(ppo.Config):
    """Those of verl with the "gae" estimator."""

    num_epochs: Count = 1
    gae_lambda: Share = 1.0
    value_clip_eps: NonNegative = 0.5
    kl_coef: NonNegative = 0.0
    dual_clip: Positive = 3.0  # bounds the loss of a negative advantage A by this times |A|

    def check(self) -> None:
        """Raises ValueError for a bound that would cut off the update that it is to protect."""
        super().check()
        if self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1: the ratio starts at 1")


class InstructGptConfig(ppo.Config):
    """Those of the paper, without its pretraining mix: see `ppo_variants.mixed_loss`."""

    num_epochs: Count = 1
    num_minibatches: Count = 8
    kl_coef: NonNegative = 0.02


def openrlhf_batch(config: OpenRlhfConfig, params: dict, memory: Any, rollout: Rollout):
    """`ppo.make_batch` with clipped scores, clipped KL and the biased variance."""

    def bounded_kl(**logprobs: Array) -> Float[Array, "B T"]:
        return jnp.clip(losses.kl_k1(**logprobs), -config.kl_bound, config.kl_bound)

    bounded = jnp.clip(rollout.scores, -config.score_bound, config.score_bound)
    rollout = rollout._replace(scores=bounded)
    return ppo.make_batch(
        config,
        params,
        memory,
        rollout,
        kl_estimate=bounded_kl,
        whiten=losses.masked_whiten,
    )


def verl_loss(config: VerlConfig, params: dict, batch: ppo.Batch):
    """`ppo.loss` with the dual clip."""
    return ppo.loss_of(config, batch, online.forward(config, params, batch), config.dual_clip)


trl = Preset(TrlConfig)
openrlhf = Preset(OpenRlhfConfig, openrlhf_batch)
verl = Preset(VerlConfig, loss=verl_loss)
instructgpt = Preset(InstructGptConfig)
