"""Building blocks of a model: matrix products, linear layers and norms.

What is cheap to compute is computed again in the backward pass and not kept from the forward pass
(`jax.checkpoint`): the norms and the gate of an MLP would keep as many bytes as their products, and
on a CPU, bytes cost more than arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# By default TPUs multiply float32 arrays in bfloat16 and GPUs in TF32, so ask for full precision.
# Products of bfloat16 arrays are not affected.
dot = functools.partial(jnp.matmul, precision="highest")
einsum = functools.partial(jnp.einsum, precision="highest")

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
}


class Linear(nn.Module):
    """x @ kernel, plus the product of a LoRA adapter where there is one: [B, T, in] -> [B, T, out].

    Tokens are flattened to [B * T, in] first: on a CPU the product is then 1.5 times as fast.
    """

    features: int  # out
    dtype: Any  # the type in which the product is computed
    scale: float = 1.0  # the kernel is initialised with standard deviation scale / sqrt(in)
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.scale * x.shape[-1] ** -0.5)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        flat = x.reshape(-1, x.shape[-1])
        out = dot(flat, kernel.astype(self.dtype))
        if self.has_variable("params", "lora_a"):  # see lora.py
            a, b, scale = (self.get_variable("params", f"lora_{x}") for x in ("a", "b", "scale"))
            out = out + dot(dot(flat, a.astype(self.dtype)), (scale * b).astype(self.dtype))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            out = out + bias.astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square, in float32 whatever the type of the input."""

    eps: float
    plus_one: bool = False  # multiply by 1 + scale, as Gemma does

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), jnp.float32)

        @jax.checkpoint
        def norm(x, scale):
            y = _divide_by_rms(x.astype(jnp.float32), self.eps)
            return (y * (1 + scale if self.plus_one else scale)).astype(x.dtype)

        return norm(x, scale)


class LayerNorm(nn.Module):
    """Gives each vector mean 0 and variance 1, in float32 whatever the type of the input."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)

        @jax.checkpoint
        def norm(x, scale, bias):
            y = x.astype(jnp.float32)
            y = _divide_by_rms(y - jnp.mean(y, axis=-1, keepdims=True), self.eps)
            return (y * scale + bias).astype(x.dtype)

        return norm(x, scale, bias)


def _divide_by_rms(x, eps):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
