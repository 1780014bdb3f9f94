"""RLHF for language models in JAX: SFT, reward models by rank loss, clipped PPO.

A pure library, one file per algorithm, and experiments that are programs. Layers, each importing
only those below it: launch, pipeline > algorithms > sampling, rewards, data > models, training >
losses, advantages > sharding, config.
"""

__version__ = "0.1.0"
