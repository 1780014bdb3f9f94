"""SFT, a reward model and PPO with Qwen3 1.7B on your files, for a slice of 16 TPU v5e chips.

    python experiments/qwen3_1b7_rlhf.py --model Qwen/Qwen3-1.7B --demonstrations F --preferences F
    python experiments/qwen3_1b7_rlhf.py --plan v5e:4x4

The inputs, stages and exports are those of `own_data.py`; only the model's shape and the sizes of
batches are stated here. The second command needs no model, no data and no TPU: it compiles every
program for the slice and prints what it takes (see `docs/scaling.md`).

An SFT step has 64 rows of up to 2,048 tokens, a step of the reward model 32 pairs, and an iteration
of PPO 64 prompts of up to 1,024 tokens with as many sampled after each.

Result: planned and run at toy size (`tests/test_real_sizes.py`), not trained.
"""

from __future__ import annotations

from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.launch import launch
from rlhf_jax.models import transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import own_data
from rlhf_jax.training.state import OptimizerConfig

# Of the config.json of Qwen/Qwen3-1.7B.
SHAPE = transformer.Config(
    vocab_size=151936,
    num_layers=28,
    d_model=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_ff=6144,
    max_length=40960,
    rope_base=1e6,
    norm_eps=1e-6,
    qk_norm=True,
    tied=True,
    dtype="bfloat16",
    remat="full",
)

config = own_data.Config(
    shape=SHAPE,
    max_prompt=1024,
    max_response=1024,
    sft=sft.Config(
        num_steps=1000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50, schedule="cosine"),
    ),
    reward_model=reward_model.Config(
        num_steps=500,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=25, schedule="cosine"),
    ),
    ppo=own_data.PpoConfig(
        num_iterations=200,
        batch_size=64,
        sampling=Sampling(max_new_tokens=1024),
        num_epochs=2,
        num_minibatches=2,
        policy_optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=20),
        critic_optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=20),
        kl_coef=0.05,
        missing_eos_penalty=1.0,
    ),
)

if __name__ == "__main__":
    launch(own_data.run, config, programs=own_data.programs)
