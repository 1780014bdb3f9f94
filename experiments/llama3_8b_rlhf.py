"""SFT, a reward model and PPO with Llama 3 8B on your files, for a TPU pod slice.

    python experiments/llama3_8b_rlhf.py --model meta-llama/Meta-Llama-3-8B-Instruct \
        --demonstrations F --preferences F
    python experiments/llama3_8b_rlhf.py --plan v5e:16x16 --mesh data=1,fsdp=32,tensor=8
    python experiments/llama3_8b_rlhf.py --plan v5p:4x4x8 --mesh data=1,fsdp=32,tensor=4

With `--lora-rank 16` it fits `v5e:4x8` in micro-batches: `docs/scaling.md` has the command.

The inputs, stages and exports are those of `own_data.py`; only the model's shape and the sizes of
batches are stated here. With `--plan` neither model nor data nor TPU is needed: every program is
compiled for the slice, and what it takes is printed (see `docs/scaling.md`).

Every optimizer step sees 524,288 tokens: 256 rows of up to 2,048 in SFT, 128 pairs of them in the
reward model, and in PPO 256 prompts of up to 1,024 tokens with as many sampled after each.

Result: planned and run at toy size (`tests/test_real_sizes.py`), not trained.
"""

from __future__ import annotations

from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.launch import launch
from rlhf_jax.models import transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.tasks import own_data
from rlhf_jax.training.state import OptimizerConfig

# Of the config.json of meta-llama/Meta-Llama-3-8B and its Instruct version.
SHAPE = transformer.Config(
    vocab_size=128256,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_length=8192,
    rope_base=5e5,
    norm_eps=1e-5,
    dtype="bfloat16",
    remat="full",
)

config = own_data.Config(
    shape=SHAPE,
    max_prompt=1024,
    max_response=1024,
    sft=sft.Config(
        num_steps=500,
        batch_size=256,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=25, schedule="cosine"),
    ),
    reward_model=reward_model.Config(
        num_steps=300,
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=15, schedule="cosine"),
    ),
    ppo=own_data.PpoConfig(
        num_iterations=200,
        batch_size=256,
        sampling=Sampling(max_new_tokens=1024),
        num_epochs=2,
        num_minibatches=1,
        policy_optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=10),
        critic_optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=10),
        kl_coef=0.05,
        missing_eos_penalty=1.0,
    ),
)

if __name__ == "__main__":
    launch(own_data.run, config, programs=own_data.programs)
