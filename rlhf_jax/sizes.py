"""What a run needs at least, in closed form, so that sizes absurd for the machine are refused.

These are lower bounds of bytes, from the configurations alone: nothing is allocated, traced or
compiled for them, and no loop runs over layers or rows. A run is refused where the bound is more
than `MARGIN` times the memory of all devices together. What a run that is not absurd really takes,
and whether it fits, is told by `--plan`.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax

from rlhf_jax import chips, online_config
from rlhf_jax.models import flops, transformer
from rlhf_jax.training import loop

MARGIN = 2.0  # of a bound over the memory: swap, and memory that a device does not tell of
STORED = 2  # bytes per weight of a model that is read and perhaps not trained, but adapted
TRAINED = 16  # bytes per weight in training: the weight, its gradient and Adam's two moments
_TOKEN = 12  # bytes per token of a batch: its id, whether it is attended to, and its mask
_HALF = 2  # bytes of a number in the smallest type of matrix products


def num_weights(shape: transformer.Config) -> int:
    """The weights of a language model, without norms and biases."""
    tables = 1 if shape.tied else 2
    positions = shape.max_length + shape.position_offset if shape.positions == "learned" else 0
    embedded = tables * shape.vocab_size + positions
    return flops.trunk_weights(shape) + embedded * shape.d_model


def check_model(
    shape: transformer.Config, mesh: jax.sharding.Mesh, bytes_per_weight: int = STORED
) -> None:
    """Raises ValueError for a model that could never lie on the devices of the mesh."""
    count = num_weights(shape)
    sizes = ", ".join(f"{name}={vars(shape)[name]}" for name in _SHAPE)
    _check(f"a model of {count:.2g} weights ({sizes})", bytes_per_weight * count, mesh.devices.flat)


_SHAPE = ("vocab_size", "num_layers", "d_model", "num_heads", "head_dim", "d_ff", "max_length")


def check_stage(
    name: str,
    config: loop.Config | online_config.Config,
    shape: transformer.Config,
    longest: int,
    mesh: jax.sharding.Mesh,
) -> None:
    """Raises ValueError for batches of a stage that could never lie on the devices of the mesh.

    `longest` is the length of a prompt with its response, in tokens.
    """
    if isinstance(config, loop.Config):
        rows, slices = config.batch_size, config.micro_batches
        drawn = 0
        said = f"{name}.batch_size={rows}"
    else:
        rows, slices = config.num_responses, config.num_minibatches * config.micro_batches
        drawn = _cache(shape, config.sampling.max_new_tokens)
        said = f"{name}.batch_size * samples_per_prompt = {rows}"
    hidden = rows // slices * longest * shape.d_model * _HALF  # of one forward pass
    need = rows * (longest * _TOKEN + drawn) + hidden
    _check(f"{said} rows of {longest} tokens", need, mesh.devices.flat)


def check_drawn(name: str, rows: int, length: int, shape: transformer.Config) -> None:
    """Raises ValueError where so many answers of `length` tokens could never be drawn together."""
    need = rows * (length * _TOKEN + _cache(shape, length))
    _check(f"{name}={rows} answers of {length} tokens", need, jax.devices())


def _cache(shape: transformer.Config, length: int) -> int:
    """Bytes of the keys and values of one response, for all of its tokens, while it is drawn."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * length * _HALF


def _check(what: str, need: int, devices: Iterable[jax.Device]) -> None:
    memory = chips.memory(list(devices))
    if memory is not None and need > MARGIN * memory:
        raise ValueError(
            f"{what} needs {need / chips.GIB:.3g} GiB at the very least, but the devices have "
            f"{memory / chips.GIB:.3g} GiB together; choose smaller sizes"
        )
