"""RLHF for language models in JAX: SFT, reward models by rank loss, clipped PPO.

A pure library, one file per algorithm, and experiments that are programs. Layers, each importing
only those below it: launch, pipeline > algorithms > sampling, rewards, data > models, training >
losses, advantages > sharding, config.

Importing the package sets one global of jax, and only where you have not set it: compiled programs
are kept in `~/.cache/rlhf_jax/compiled`, so that the next process does not compile them again. Name
another folder with the environment variable JAX_COMPILATION_CACHE_DIR, or before or after the
import with `jax.config.update("jax_compilation_cache_dir", folder)`, where None keeps none.
"""

import os

import jax

__version__ = "0.1.0"

# Here, because the folder must be known before the first program is compiled, wherever that is.
_compiled = os.path.expanduser("~/.cache/rlhf_jax/compiled")
_has_home = not _compiled.startswith("~")
if _has_home and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", _compiled)
