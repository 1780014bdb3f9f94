"""A tiny text task that the tests of whole runs share: bytes, one layer, eight tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import launch, sharding, storage
from rlhf_jax.algorithms import ppo, reward_model, sft
from rlhf_jax.data import batches, tokenizers
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.transformer import Compute
from rlhf_jax.rewards import learned
from rlhf_jax.sampling import rollout
from rlhf_jax.sampling.decode import Sampling
from rlhf_jax.training.loop import Runtime
from rlhf_jax.training.metrics import Log
from rlhf_jax.training.state import OptimizerConfig

MESHES = {
    "1x1x1": (1, 1, 1),
    "8x1x1": (8, 1, 1),
    "1x8x1": (1, 8, 1),
    "2x2x2": (2, 2, 2),
    "1x2x4": (1, 2, 4),
}
TOKENIZER = tokenizers.byte_tokenizer()
SHAPE = transformer.Config(
    vocab_size=264,
    num_layers=1,
    d_model=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    d_ff=64,
    max_length=32,
)
WORDS = ["ab", "cd", "efg", "hi", "jkl", "mn", "opq", "rs", "tu", "vwx", "yz", "zab"]
# With the usual eps of 1e-8 Adam makes whole steps of gradients that are nothing but rounding, and
# so runs on different meshes would part.
ADAM = OptimizerConfig(learning_rate=3e-3, schedule="constant", eps=1e-5)
SFT = sft.Config(num_steps=6, batch_size=8, optimizer=ADAM, save_every=2)
REWARD_MODEL = reward_model.Config(num_steps=6, batch_size=8, optimizer=ADAM, save_every=2)
PPO = ppo.Config(
    num_iterations=4,
    batch_size=16,
    sampling=Sampling(max_new_tokens=8),
    num_epochs=2,
    num_minibatches=2,
    policy_optimizer=ADAM,
    critic_optimizer=ADAM,
    save_every=1,
)


def short(config, **changes):
    """A configuration of a stage with changes, and no warm-ups: they would outlast a few steps."""
    optimizers = {
        name: dataclasses.replace(value, warmup_steps=0)
        for name, value in vars(config).items()
        if isinstance(value, OptimizerConfig)
    }
    return dataclasses.replace(config, **{**optimizers, **changes})


def mesh(name="1x1x1"):
    """The mesh; skips the test where there are too few devices, as on one GPU."""
    needed = math.prod(MESHES[name])
    if jax.device_count() < needed:
        pytest.skip(f"needs {needed} devices")
    return sharding.make_mesh(*MESHES[name])


def runtime(name="1x1x1", checkpoints=None):
    """A runtime on one of the meshes that prints nothing."""
    return Runtime(mesh(name), Log(quiet=True), checkpoints)


def context(mesh, **compute):
    """What `programs` of an experiment is given besides its configuration."""
    return launch.Context(storage.path("."), Log(quiet=True), mesh, None, Compute(**compute))


def model(name="1x1x1", seed=0):

    key = jax.random.key(seed)
    return sharding.initialise(mesh(name), transformer.init, SHAPE, key, static_argnums=0)


def demonstrations(batch_size=8, seed=0):
    rows = [{"prompt": word, "completion": word[::-1]} for word in WORDS]
    return batches.Loader(batches.demonstrations(rows, TOKENIZER, 4, 5), batch_size, seed)


def comparisons(batch_size=8, seed=0):
    rows = [{"prompt": w, "chosen": w[::-1] + "!", "rejected": w} for w in WORDS]
    return batches.Loader(batches.comparisons(rows, TOKENIZER, 4, 5), batch_size, seed)


def prompts(batch_size=16, seed=0):
    rows = [{"prompt": word} for word in WORDS]
    return batches.Loader(batches.prompts(rows, TOKENIZER, 4), batch_size, seed)


def run_ppo(config=PPO, mesh="1x1x1", checkpoints=None, **changes):
    """PPO against a fresh scorer, whose copy is the critic; `changes` are other inputs."""
    policy = model(mesh)
    scorer = heads.init_scorer(policy, jax.random.key(7))
    reward = {"score": learned.score, "scorer": scorer}
    arguments = {"prompts": prompts(config.batch_size), "critic": scorer, **reward} | changes
    return ppo.run(
        config,
        policy=policy,
        tokenizer=TOKENIZER,
        runtime=runtime(mesh, checkpoints),
        **arguments,
    )


def distance(tree, other):
    """Norm of the difference of two trees, on the host."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other))
    return float(np.sqrt(sum(np.sum((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs)))


def equal(tree, other):
    """Whether two trees are the same, bit for bit."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other))
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def share_below_128(params, tokens, attend, mask):
    """An on-device reward without parameters: the share of ids below 128."""
    del params, attend
    return ((tokens < 128) * mask).sum(1) / mask.sum(1)


def some_rollout(count, width=6):
    """A rollout of numbers that mean nothing; row i belongs to prompt i // 3."""
    zeros = jnp.zeros((count, width))
    return rollout.Rollout(
        tokens=jnp.zeros((count, width), jnp.int32),
        attend=jnp.ones((count, width), jnp.int32),
        mask=jnp.ones((count, width)),
        old_logprobs=zeros,
        sampler_logprobs=zeros,
        filtered_logprobs=zeros,
        forward_logprobs=zeros,
        ref_logprobs=zeros,
        entropy=zeros,
        values=None,
        scores=jnp.arange(float(count)),
        lengths=jnp.full(count, width),
        finished=jnp.ones(count),
        index=jnp.arange(count) // 3,
    )


def untimed(line):
    """The metrics of a step without those that depend on the machine and its load."""
    timed = ("seconds", "tokens_per_second", "model_flops_utilisation", "device_memory_gib")
    return {name: x for name, x in line.items() if not name.startswith(timed)}
