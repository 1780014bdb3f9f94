"""The weights as decoding reads them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax import sharding
from rlhf_jax.models import stacking
from rlhf_jax.models.transformer import Model


def weights_for(model: Model) -> Model:
    """The language model as decoding reads it, to be made once before a loop over tokens.

    Layers have weights of their own, because a loop over stacked ones would copy the key-value
    cache for every token; matrices have the type of the products; and no weight is split over fsdp,
    or it would be gathered for every token. For an unstacked float32 model on one device this is
    the model itself.
    """
    model = stacking.unstack(model)

    def cast(x: Array) -> Array:
        # Norms, biases and adapters' scales are used in float32.
        return x.astype(model.config.dtype) if jnp.ndim(x) > 1 else x

    weights = {name: x for name, x in model.weights.items() if name != "score"}
    weights = sharding.for_decoding(jax.tree.map(cast, weights))
    return dataclasses.replace(model, weights=weights)
